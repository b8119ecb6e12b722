"""What the tests of a training step's parts share: draws and a batch of images of 16 tokens."""

import torch

from training.objectives.draws import training_draws

LENGTH, CHANNELS, REPEATS = 16, 2, 3


def draws(samples, seed=0, step=0, **kwargs):
    usual = dict(seq_len=LENGTH, token_dim=CHANNELS, diffusion_batch_mul=REPEATS)
    return training_draws(seed, step, samples, **usual | dict(mask_ratio_min=0.7, label_drop_prob=0.1) | kwargs)


def batch(size=3):
    g = torch.Generator().manual_seed(0)
    return torch.randn(size, LENGTH, CHANNELS, generator=g).clamp(-1, 1), torch.tensor([0, -1, 2])[:size]
