"""Solvers: from noise to tokens along a respaced schedule, with a temperature for each row.

Legend: N token rows, C channels of a token, T steps, λ = log(√ᾱ / √(1−ᾱ)). `run` of a solver is a function

    run(predict, schedule, noise, tau, clip) -> x_0 (N, C) float32

predict(x_t (N, C), i) -> (eps, v), both (N, C), at step i; guidance is already inside it. noise is (T + 1, N, C): the
starting point, then one draw a step. tau is a float or (N, 1). clip is (lo, hi) for the predicted x₀, or None.
A new solver is one function and one row of SOLVERS. Nothing here waits for the device.

What τ does: it scales the noise that a solver is given to use, in `ddpm` and `dpmpp_sde` the draws of the steps, in
`ddim` and `dpmpp`, which have no other, the starting point. Of data N(m, s²) with the exact ε all four make N(m, τ²s²)
in the limit of many steps. The other reading, ε/τ, makes s·√(τ/(2−τ)) ≈ τ·s with the stochastic ones; with the
deterministic ones it makes s·(s·√ᾱ)^(1/τ−1) for s ≫ √(1−ᾱ) of the last step, ᾱ being that of the starting point: no
limit, but a spread that the choice of the first timestep decides. So the noise is scaled everywhere.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from diffusion import gaussian


def _predict_x_start(schedule, x, i, eps, clip):
    x_start = gaussian.predict_x_start(schedule, x, i, eps)
    return x_start if clip is None else x_start.clamp(*clip)


def ddpm(predict, schedule, noise, tau, clip):
    """Ancestral sampling (DDPM Alg. 2), learned variances; tau multiplies the posterior noise (MAR, section 3.2)."""
    x, draws = noise[0], noise[1:-1] * tau
    for step, i in enumerate(reversed(range(len(schedule)))):
        eps, v = predict(x, i)
        x = gaussian.posterior_mean(schedule, _predict_x_start(schedule, x, i, eps, clip), x, i)
        if i > 0:
            x = torch.addcmul(x, torch.exp(0.5 * gaussian.log_variance(schedule, v, i)), draws[step])
    return x


def dpm(predict, schedule, noise, tau, clip, order, stochastic):
    """The exponential integrator in λ of the data prediction D, taken as constant over a step (DPM-Solver++ Alg. 2).

    order 1: D is the predicted x₀ (DDIM); order 2: extrapolated to the step's middle from the last two (2M).
    stochastic: the reverse SDE (SDE-DPM-Solver++), else the probability-flow ODE. The learned variance is not used.
    """
    signal, sigma = np.sqrt(schedule.alphas_cumprod), np.sqrt(1.0 - schedule.alphas_cumprod)
    lam = np.log(signal / sigma)
    x, draws, before = (noise[0], noise[1:-1] * tau, None) if stochastic else (noise[0] * tau, None, None)
    for step, i in enumerate(reversed(range(len(schedule)))):
        d = x_start = _predict_x_start(schedule, x, i, predict(x, i)[0], clip)
        if i == 0:
            return x_start  # the step to σ = 0, h = ∞: nothing remains of x_t, and the extrapolation has no limit
        h = lam[i - 1] - lam[i]
        if order == 2 and before is not None:
            d = torch.add(x_start, x_start - before, alpha=float(0.5 * h / (lam[i] - lam[i + 1])))
        before = x_start
        shrink = np.exp(-h if stochastic else 0.0) * sigma[i - 1] / sigma[i]
        gain = -signal[i - 1] * np.expm1(-2 * h if stochastic else -h)
        x = gaussian.weighted(float(shrink), x, float(gain), d)
        if stochastic:
            x = torch.add(x, draws[step], alpha=float(sigma[i - 1] * np.sqrt(-np.expm1(-2 * h))))


class Solver(NamedTuple):
    """A row of SOLVERS: the function, and the spacing (`diffusion.schedule.SPACINGS`) that it uses if none is named."""

    run: Callable
    spacing: str


# Spacings: "uniform" is the published one. For the others the digits model decided (12 steps, guidance 2, distance to
# the ODE's end of the same noise, in standard deviations 0.68 of a token): dpmpp 0.014 with logsnr, 0.059 quadratic,
# 0.071 uniform; ddim 0.066, 0.067, 0.059. Without clipping x₀ uniform fails altogether, since it starts where ε errors
# are multiplied by 20000: dpmpp 0.017, 0.18, 2.3; ddim 0.081, 0.19, 2.3. On Gaussian data quadratic is on a par.
SOLVERS = {
    "ddpm": Solver(ddpm, "uniform"),
    "ddim": Solver(partial(dpm, order=1, stochastic=False), "logsnr"),
    "dpmpp": Solver(partial(dpm, order=2, stochastic=False), "logsnr"),
    "dpmpp_sde": Solver(partial(dpm, order=2, stochastic=True), "logsnr"),
}
