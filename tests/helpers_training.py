"""What the tests of a training step's parts share: draws and a batch of images of 16 tokens."""

import torch

from models.diffloss import DiffLoss
from training.objectives.draws import DrawSettings, training_draws
from training.objectives.token import Batch

LENGTH, CHANNELS, REPEATS = 16, 2, 3


def draws(samples, seed=0, step=0, channels=CHANNELS, repeats=REPEATS, **settings):
    """Draws of a small DiffLoss for images of LENGTH tokens."""
    usual = dict(seq_len=LENGTH, mask_ratio_min=0.7, label_drop_prob=0.1)
    head = DiffLoss(channels, 1, depth=1, width=2, repeats=repeats)
    return training_draws(seed, step, samples, head, DrawSettings(**usual | settings))


def batch(size=3):
    g = torch.Generator().manual_seed(0)
    return torch.randn(size, LENGTH, CHANNELS, generator=g).clamp(-1, 1), torch.tensor([0, -1, 2])[:size]


def terms_of(module, tokens, labels, draws, num_targets) -> dict:
    """What an objective says about a batch."""
    return module(Batch(tokens, labels, draws), num_targets)
