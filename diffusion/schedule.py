"""Noise schedule: the cosine betas of improved diffusion (arXiv 2102.09672, Eq. 17) and their respacing to fewer steps.

Legend: T diffusion steps. Tables are computed in float64 and handed out in float32, once for each device.
"""

import functools
import math

import numpy as np
import torch

NUM_TRAIN_STEPS = 1000
MAX_BETA = 0.999


def cosine_betas(num_steps: int = NUM_TRAIN_STEPS) -> np.ndarray:
    """Betas (num_steps,) float64 whose cumulative product follows cos²((t + 0.008) / 1.008 · π/2)."""

    def alpha_bar(t):
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    edges = [alpha_bar(i / num_steps) for i in range(num_steps + 1)]
    return np.array([min(1 - edges[i + 1] / edges[i], MAX_BETA) for i in range(num_steps)])


def spaced_timesteps(num_steps: int, num_train_steps: int = NUM_TRAIN_STEPS) -> np.ndarray:
    """Evenly spaced training timesteps (num_steps,), ascending, both ends included.

    The stride is accumulated in float64 and rounded half to even, so that ties fall where the published code has them.
    """
    if not 1 <= num_steps <= num_train_steps:
        raise ValueError(f"num_sampling_steps must be between 1 and {num_train_steps}, got {num_steps}")
    stride = (num_train_steps - 1) / (num_steps - 1) if num_steps > 1 else 0.0
    return np.round(np.cumsum([0.0] + [stride] * (num_steps - 1))).astype(np.int64)


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
        self._on_device = {}

    def __len__(self) -> int:
        return len(self.betas)

    def table(self, name: str, device) -> torch.Tensor:
        """Table `name` as float32 (T,) on `device`; names beyond the attributes are the roots and logs defined here.

        float32 whatever the model's dtype: the process is numerically part of the result, not of the network.
        """
        key = (name, str(device))
        if key not in self._on_device:
            derived = {
                "sqrt_alphas_cumprod": lambda: np.sqrt(self.alphas_cumprod),
                "sqrt_one_minus_alphas_cumprod": lambda: np.sqrt(1.0 - self.alphas_cumprod),
                "sqrt_recip_alphas_cumprod": lambda: np.sqrt(1.0 / self.alphas_cumprod),
                "sqrt_recipm1_alphas_cumprod": lambda: np.sqrt(1.0 / self.alphas_cumprod - 1.0),
                "log_betas": lambda: np.log(self.betas),
                "timesteps": lambda: self.timesteps,
            }
            values = derived[name]() if name in derived else getattr(self, name)
            self._on_device[key] = torch.tensor(values, dtype=torch.float32, device=device)
        return self._on_device[key]


@functools.lru_cache(maxsize=64)
def cosine_schedule(num_steps: int = NUM_TRAIN_STEPS) -> Schedule:
    """The cosine schedule over `num_steps` of the 1000 training steps; the betas are rebuilt so that ᾱ is kept."""
    timesteps = spaced_timesteps(num_steps)
    kept = np.cumprod(1.0 - cosine_betas())[timesteps]
    return Schedule(1.0 - kept / np.append(1.0, kept[:-1]), timesteps)
