"""All that is random about a training batch, drawn image by image from named seeds.

Legend: b images, L tokens an image, C channels a token, N masked tokens in all, m = diffusion_batch_mul noise levels.
"""

import math
from dataclasses import dataclass, replace

import torch
from scipy.special import ndtr, ndtri

from diffusion.schedule import NUM_TRAIN_STEPS
from util.rng import generator, seed_of


@dataclass
class TrainingDraws:
    """The draws of b training images; see the legend above."""

    flip: torch.Tensor  # (b,) bool: mirror the image
    drop: torch.Tensor  # (b,) bool: train without the label
    mask: torch.Tensor  # (b, L) bool, True = masked
    rows: torch.Tensor  # (N,) long, masked tokens as image·L + position
    t: torch.Tensor  # (m, N) long
    noise: torch.Tensor  # (m, N, C)
    num_visible: list[int]  # (b) tokens the encoder sees
    # for learned heads, else None
    gumbel: torch.Tensor | None = None  # (b, L)
    num_iter: torch.Tensor | None = None  # (b,) long, on the CPU
    cfg: torch.Tensor | None = None  # (b,)

    def to(self, device) -> "TrainingDraws":
        """The same draws with their tensors on a device."""
        moved = {k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **{**moved, "num_iter": self.num_iter})


def training_draws(
    seed: int,
    step: int,
    samples: list[int],
    *,
    seq_len: int,
    token_dim: int,
    diffusion_batch_mul: int,
    mask_ratio_min: float,
    label_drop_prob: float,
    mask_ratio_per_image: bool = False,
    num_iter: tuple[int, int] | None = None,
    cfg_max: float = 1.0,
) -> TrainingDraws:
    """Draws for the dataset items `samples` in optimizer step `step`.

    The mask ratio comes from (seed, step), all else from (seed, step, sample): the same image gets the same draws
    whatever the number of processes or its place in the batch. num_iter, the range of steps that heads are trained
    for, adds what they need, with cfg uniform in [1, cfg_max]; the other draws are the same with or without it.
    """
    shared = torch.rand((), generator=generator(seed_of("mask ratio", seed, step))).item()
    mask = torch.zeros(len(samples), seq_len, dtype=torch.bool)
    flip, drop, rows, t, noise, num_visible = [], [], [], [], [], []
    gumbel, steps, cfg = [], [], []
    for i, sample in enumerate(samples):
        g = generator(seed_of("train", seed, step, sample))
        uniform = torch.rand(3, generator=g).tolist()
        flip.append(uniform[0] < 0.5)
        drop.append(uniform[1] < label_drop_prob)
        ratio = mask_ratio(uniform[2] if mask_ratio_per_image else shared, mask_ratio_min)
        masked = torch.randperm(seq_len, generator=g)[: math.ceil(seq_len * ratio)]
        mask[i, masked] = True
        rows.append(masked + i * seq_len)
        t.append(torch.randint(0, NUM_TRAIN_STEPS, (diffusion_batch_mul, len(masked)), generator=g))
        noise.append(torch.randn((diffusion_batch_mul, len(masked), token_dim), generator=g))
        num_visible.append(seq_len - len(masked))
        if num_iter is not None:
            gumbel.append(-torch.empty(seq_len).exponential_(generator=g).log())
            steps.append(int(torch.randint(num_iter[0], num_iter[1] + 1, (), generator=g)))
            cfg.append(1 + (cfg_max - 1) * torch.rand((), generator=g).item())
    return TrainingDraws(
        flip=torch.tensor(flip),
        drop=torch.tensor(drop),
        mask=mask,
        rows=torch.cat(rows),
        t=torch.cat(t, dim=1),
        noise=torch.cat(noise, dim=1),
        num_visible=num_visible,
        **(dict(gumbel=torch.stack(gumbel), num_iter=torch.tensor(steps), cfg=torch.tensor(cfg)) if num_iter else {}),
    )


def mask_ratio(uniform: float, minimum: float) -> float:
    """A draw, by its inverse, of the normal distribution (mean 1, std 0.25) truncated to [minimum, 1] (MAGE, MAR)."""
    low = ndtr((minimum - 1.0) / 0.25)
    return float(min(max(1.0 + 0.25 * ndtri(low + uniform * (0.5 - low)), minimum), 1.0))
