"""The Gaussian process over tokens: adding noise, what an ε-prediction says about x₀ and x_{t−1}, the training loss.

Legend: N token rows, C channels of a token; steps t are (N,), or one whole number for all rows. `v` is the network's
second output, in [−1, 1], which places the log variance between its two bounds (learned range, arXiv 2102.09672, Eq.
15). All arithmetic here is float32.
"""

import math

import torch

from diffusion.schedule import Schedule


def _rows(schedule: Schedule, name: str, t: torch.Tensor | int) -> torch.Tensor | float:
    """A table at steps t (N,) as (N, 1), or at one step for all rows as a number."""
    if isinstance(t, int):
        return float(schedule.values(name)[t])
    return schedule.table(name, t.device)[t].unsqueeze(-1)


def weighted(a, x, b, y) -> torch.Tensor:
    """a·x + b·y, in two operations where b is a number; a and b: numbers, or (N, 1)."""
    return a * x + b * y if isinstance(b, torch.Tensor) else torch.add(a * x, y, alpha=b)


def q_sample(schedule, x_start, t, noise):
    """x_t = √ᾱ_t·x₀ + √(1−ᾱ_t)·noise for x_start, noise (N, C) and steps t (N,)."""
    of_x0 = _rows(schedule, "sqrt_alphas_cumprod", t)
    of_noise = _rows(schedule, "sqrt_one_minus_alphas_cumprod", t)
    return weighted(of_x0, x_start, of_noise, noise)


def predict_x_start(schedule, x_t, t, eps):
    """x₀ (N, C) that the noise eps (N, C) in x_t implies."""
    of_xt = _rows(schedule, "sqrt_recip_alphas_cumprod", t)
    of_eps = _rows(schedule, "sqrt_recipm1_alphas_cumprod", t)
    return weighted(of_xt, x_t, -of_eps, eps)


def posterior_mean(schedule, x_start, x_t, t):
    """Mean (N, C) of q(x_{t−1} | x_t, x₀)."""
    of_x0 = _rows(schedule, "posterior_mean_coef_x0", t)
    of_xt = _rows(schedule, "posterior_mean_coef_xt", t)
    return weighted(of_x0, x_start, of_xt, x_t)


def log_variance(schedule, v, t):
    """Log variance (N, C) of p(x_{t−1} | x_t): v moves it from the posterior's (−1) to beta's (+1)."""
    low = _rows(schedule, "posterior_log_variance_clipped", t)
    high = _rows(schedule, "log_betas", t)
    return v * ((high - low) / 2) + (high + low) / 2


def training_losses(schedule, x_start, x_t, t, noise, eps, v):
    """Per-row (mse, vb), both (N,), of the hybrid loss L_simple + L_vlb (arXiv 2102.09672, Eq. 16).

    The mean is detached inside vb, so that vb trains the variance only; vb is in bits and averaged over channels.
    """
    mse = (noise - eps).square().mean(-1)
    true_mean = posterior_mean(schedule, x_start, x_t, t)
    true_log_var = _rows(schedule, "posterior_log_variance_clipped", t)
    mean = posterior_mean(schedule, predict_x_start(schedule, x_t, t, eps.detach()), x_t, t)
    log_var = log_variance(schedule, v, t)
    kl = 0.5 * (
        log_var - true_log_var - 1 + torch.exp(true_log_var - log_var) + (true_mean - mean) ** 2 * torch.exp(-log_var)
    )
    nll = -_discretized_log_likelihood(x_start, mean, 0.5 * log_var)
    vb = torch.where((t == 0).unsqueeze(-1), nll, kl).mean(-1) / math.log(2.0)
    return mse, vb


def _discretized_log_likelihood(x, mean, log_scale):
    """Log probability (N, C) of the 1/255-wide bin around x; the end bins reach to infinity. For data in [−1, 1]."""
    centered = x - mean
    inv_scale = torch.exp(-log_scale)
    cdf_above = _normal_cdf(inv_scale * (centered + 1 / 255))
    cdf_below = _normal_cdf(inv_scale * (centered - 1 / 255))
    floor = 1e-12
    inside = (cdf_above - cdf_below).clamp(min=floor).log()
    lowest = cdf_above.clamp(min=floor).log()
    highest = (1 - cdf_below).clamp(min=floor).log()
    return torch.where(x < -0.999, lowest, torch.where(x > 0.999, highest, inside))


def _normal_cdf(x):
    # tanh form, as the published loss has it: the exact erf differs by up to 3e-4, which would show in the fixtures
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
