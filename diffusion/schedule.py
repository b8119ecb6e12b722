"""Noise schedule: the cosine betas of improved diffusion (arXiv 2102.09672, Eq. 17) and their respacing to fewer steps.

Legend: T diffusion steps. Tables are computed in float64 and handed out in float32, once for each device.
"""

import functools
import math

import numpy as np
import torch

from util.dist import send

NUM_TRAIN_STEPS = 1000
MAX_BETA = 0.999
# An error of ε becomes one of x₀ that is √(1/ᾱ − 1) times as large: 71 at this timestep, 20000 at the last.
LAST_STABLE = 990


def cosine_betas(num_steps: int = NUM_TRAIN_STEPS) -> np.ndarray:
    """Betas (num_steps,) float64 whose cumulative product follows cos²((t + 0.008) / 1.008 · π/2)."""

    def alpha_bar(t):
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    edges = [alpha_bar(i / num_steps) for i in range(num_steps + 1)]
    return np.array([min(1 - edges[i + 1] / edges[i], MAX_BETA) for i in range(num_steps)])


def step_range(num_steps: int | str) -> tuple[int, int]:
    """Diffusion steps at the first and at the last autoregressive step: 100 or "100" -> (100, 100), "50:5" -> (50, 5).

    Anything else, or a number outside 1…1000, raises ValueError.
    """
    ends = str(num_steps).split(":")
    numbers = [int(end) for end in ends if end.isdecimal()]
    if len(numbers) != len(ends) or len(ends) > 2 or not all(1 <= n <= NUM_TRAIN_STEPS for n in numbers):
        raise ValueError(
            f"num_sampling_steps must be a whole number between 1 and {NUM_TRAIN_STEPS}, or two with a colon between "
            f"(50:5), got {num_steps!r}"
        )
    return numbers[0], numbers[-1]


def num_steps_setting(text: int | str) -> int | str:
    """The text in its one form, so that equal settings compare equal: 100 for "100" and "100:100", else "50:5"."""
    first, last = step_range(text)
    return first if first == last else f"{first}:{last}"


# --------------------------------------------------------------------------------------------------------- spacing


def _uniform(num_steps):
    """Both ends included. Accumulated in float64, rounded half to even: ties fall where the published code has them."""
    stride = (NUM_TRAIN_STEPS - 1) / (num_steps - 1) if num_steps > 1 else 0.0
    return np.cumsum([0.0] + [stride] * (num_steps - 1))


def _logsnr(num_steps):
    """Even in λ = log(√ᾱ / √(1−ᾱ)), up to LAST_STABLE."""
    kept = np.cumprod(1.0 - cosine_betas())
    minus_lambda = 0.5 * np.log((1 - kept) / kept)  # ascending
    even = np.linspace(minus_lambda[0], minus_lambda[LAST_STABLE], num_steps)
    return np.interp(even, minus_lambda, np.arange(NUM_TRAIN_STEPS))


def _quadratic(num_steps):
    """Even in √t, up to LAST_STABLE: most steps where little noise is left (DDIM, appendix D.3)."""
    return np.linspace(0.0, math.sqrt(LAST_STABLE), num_steps) ** 2


# From which training timesteps T steps are made: T -> ascending numbers (T,) in [0, 999], rounded afterwards.
SPACINGS = {"uniform": _uniform, "logsnr": _logsnr, "quadratic": _quadratic}


def spaced_timesteps(num_steps: int, spacing: str = "uniform") -> np.ndarray:
    """Training timesteps (num_steps,) int64, ascending and all different, from 0 on; a row of SPACINGS says which.

    Rounded to whole timesteps, the only ones that the network knows; of two that fall together one is moved. A single
    step is at LAST_STABLE, whatever the spacing: at 0 it would take the noise that it starts from for an image.
    """
    if not 1 <= num_steps <= NUM_TRAIN_STEPS:
        raise ValueError(f"num_sampling_steps must be between 1 and {NUM_TRAIN_STEPS}, got {num_steps}")
    if spacing not in SPACINGS:
        raise ValueError(f"unknown spacing {spacing!r}; valid: {', '.join(SPACINGS)}")
    if num_steps == 1:
        return np.array([LAST_STABLE])
    rounded, place = np.round(SPACINGS[spacing](num_steps)).astype(np.int64), np.arange(num_steps)
    rising = np.maximum.accumulate(rounded - place) + place  # each at least one above the one before
    first = max(rounded[-1], num_steps - 1)  # of sampling, that is the largest
    return np.minimum(rising, first - num_steps + 1 + place)


class Schedule:
    """The tables of one Gaussian diffusion process of T steps over a subset of the training timesteps.

    `timesteps` (T,) are what the network is told; all other tables are indexed by the step 0…T−1.
    """

    def __init__(self, betas: np.ndarray, timesteps: np.ndarray):
        self.betas = betas
        self.timesteps = timesteps
        alphas = 1.0 - betas
        self.alphas_cumprod = np.cumprod(alphas)
        previous = np.append(1.0, self.alphas_cumprod[:-1])
        self.posterior_variance = betas * (1.0 - previous) / (1.0 - self.alphas_cumprod)
        # The first posterior variance is 0; the published code puts the second in its place before the logarithm.
        clipped = self.posterior_variance.copy()
        clipped[0] = clipped[1] if len(clipped) > 1 else betas[0]
        self.posterior_log_variance_clipped = np.log(clipped)
        self.posterior_mean_coef_x0 = betas * np.sqrt(previous) / (1.0 - self.alphas_cumprod)
        self.posterior_mean_coef_xt = (1.0 - previous) * np.sqrt(alphas) / (1.0 - self.alphas_cumprod)
        self._values, self._on_device = {}, {}

    def __len__(self) -> int:
        return len(self.betas)

    def values(self, name: str) -> np.ndarray:
        """Table `name` (T,), float32; names beyond the attributes are the roots and logs defined here.

        float32 whatever the model's dtype: the process is numerically part of the result, not of the network.
        """
        if name not in self._values:
            derived = {
                "sqrt_alphas_cumprod": lambda: np.sqrt(self.alphas_cumprod),
                "sqrt_one_minus_alphas_cumprod": lambda: np.sqrt(1.0 - self.alphas_cumprod),
                "sqrt_recip_alphas_cumprod": lambda: np.sqrt(1.0 / self.alphas_cumprod),
                "sqrt_recipm1_alphas_cumprod": lambda: np.sqrt(1.0 / self.alphas_cumprod - 1.0),
                "log_betas": lambda: np.log(self.betas),
            }
            self._values[name] = (derived[name]() if name in derived else getattr(self, name)).astype(np.float32)
        return self._values[name]

    def table(self, name: str, device) -> torch.Tensor:
        """`values` on `device`."""
        key = (name, str(device))
        if key not in self._on_device:
            self._on_device[key] = send(torch.tensor(self.values(name)), device)
        return self._on_device[key]


@functools.cache  # at most 1000 numbers of steps; a capture is known by its schedule
def cosine_schedule(num_steps: int = NUM_TRAIN_STEPS, spacing: str = "uniform") -> Schedule:
    """The cosine schedule over `num_steps` of the 1000 training steps; the betas are rebuilt so that ᾱ is kept."""
    timesteps = spaced_timesteps(num_steps, spacing)
    kept = np.cumprod(1.0 - cosine_betas())[timesteps]
    return Schedule(1.0 - kept / np.append(1.0, kept[:-1]), timesteps)
