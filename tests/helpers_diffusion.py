"""What the tests of DiffLoss, its solvers and its process share: the sizes of a tiny DiffLoss, and rows for it."""

import torch

from diffusion.schedule import NUM_TRAIN_STEPS
from tests.helpers import randn

CHANNELS, WIDTH, NUM_STEPS, N = 3, 8, 5, 5
CLIP = (-3.0, 3.0)  # without it x₀ from pure noise by untrained weights runs to 10⁴, and nothing else would show


def inputs(n=N, num_steps=NUM_STEPS):
    """z, z_uncond and noise of n rows."""
    return randn(n, WIDTH, seed=1), randn(n, WIDTH, seed=2), randn(num_steps + 1, n, CHANNELS, seed=3)


def training_inputs(n=N):
    """target, z, t (0 and 999 among them) and noise of n rows."""
    t = torch.linspace(0, NUM_TRAIN_STEPS - 1, n).long()
    return randn(n, CHANNELS, seed=4).clamp(-1, 1), randn(n, WIDTH, seed=5), t, randn(n, CHANNELS, seed=6)
