"""Solvers: from noise to tokens along a respaced schedule, with a temperature for each row.

Legend: N token rows, C channels of a token, T steps. A solver is a function

    solver(predict, schedule, noise, tau, clip) -> x_0 (N, C) float32

predict(x_t (N, C), i) -> (eps, v), both (N, C), at step i; guidance is already inside it. noise is (T + 1, N, C): the
starting point, then one draw a step. tau is a float or (N, 1). clip is (lo, hi) for the predicted x₀, or None.
A new solver is one function and one row of SOLVERS. Nothing here waits for the device.
"""

import torch

from diffusion import gaussian


def ddpm(predict, schedule, noise, tau, clip):
    """Ancestral sampling (DDPM Alg. 2), learned variances; tau multiplies the posterior noise (MAR, section 3.2)."""
    x = noise[0]
    for draw, i in enumerate(reversed(range(len(schedule))), start=1):
        eps, v = predict(x, i)
        t = torch.full((1,), i, dtype=torch.long, device=x.device)  # one row of tables serves all N
        x_start = gaussian.predict_x_start(schedule, x, t, eps)
        if clip is not None:
            x_start = x_start.clamp(*clip)
        x = gaussian.posterior_mean(schedule, x_start, x, t)
        if i > 0:
            x = x + torch.exp(0.5 * gaussian.log_variance(schedule, v, t)) * noise[draw] * tau
    return x


SOLVERS = {"ddpm": ddpm}
