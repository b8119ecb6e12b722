"""All that is random about a training batch, drawn image by image from named seeds.

Legend: b images, L tokens an image, C channels a token, N rows (tokens that the diffusion MLP sees) in all,
m = diffusion_batch_mul noise levels.
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
    rows: torch.Tensor  # (N,) long, as image·L + position: the masked tokens
    t: torch.Tensor  # (m, N) long
    noise: torch.Tensor  # (m, N, C)
    num_visible: list[int]  # (b) tokens the encoder sees
    # for learned heads and for masks that a schedule visits, else None
    gumbel: torch.Tensor | None = None  # (b, L)
    num_iter: torch.Tensor | None = None  # (b,) long, on the CPU
    cfg: torch.Tensor | None = None  # (b,)
    place: torch.Tensor | None = None  # (b,) in [0, 1): how far through its schedule the image is
    mix: torch.Tensor | None = None  # (b,) in [0, 1): a share of the images keeps its random mask
    step: torch.Tensor | None = None  # (b,) long, on the CPU: the step that meets this mask, where that is known
    num_others: int = 0  # the last so many rows are there to be compared by heads, the diffusion loss leaves them out
    heads_rest: bool = False  # heads say nothing yet, hand-made rules decide

    @property
    def num_targets(self) -> int:
        """How many rows the diffusion loss is a mean over, the first ones."""
        return len(self.rows) - self.num_others

    def to(self, device) -> "TrainingDraws":
        """The same draws with their tensors on a device."""
        moved = {k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **{**moved, "num_iter": self.num_iter, "step": self.step})

    def with_mask(self, mask, step, targets, others=None) -> "TrainingDraws":
        """Draws that were made for every token, narrowed to another mask (b, L) that is met at step (b,).

        targets (b, L) bool: what the backbone learns; others (b, L) bool: what heads compare with it.
        """
        parts = [targets] if others is None else [targets, others & ~targets]
        parts = [part.flatten().nonzero().squeeze(1) for part in parts]
        chosen = torch.cat(parts)
        return replace(
            self,
            mask=mask,
            rows=chosen,
            t=self.t[:, chosen],
            noise=self.noise[:, chosen],
            num_visible=(~mask).sum(dim=1).tolist(),
            step=step,
            num_others=len(chosen) - len(parts[0]),
        )


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
    every_token: bool = False,
) -> TrainingDraws:
    """Draws for the dataset items `samples` in optimizer step `step`.

    The mask ratio comes from (seed, step), all else from (seed, step, sample): the same image gets the same draws
    whatever the number of processes or its place in the batch. num_iter, the range of steps that is trained for, adds
    what heads and visited masks need, with K log-uniform in that range and cfg uniform in [1, cfg_max]; the other draws
    are the same with or without it. every_token: t and noise for all tokens, for a mask that is not known yet.
    """
    shared = torch.rand((), generator=generator(seed_of("mask ratio", seed, step))).item()
    mask = torch.zeros(len(samples), seq_len, dtype=torch.bool)
    flip, drop, rows, t, noise, num_visible = [], [], [], [], [], []
    gumbel, steps, more = [], [], []
    for i, sample in enumerate(samples):
        g = generator(seed_of("train", seed, step, sample))
        uniform = torch.rand(3, generator=g).tolist()
        flip.append(uniform[0] < 0.5)
        drop.append(uniform[1] < label_drop_prob)
        ratio = mask_ratio(uniform[2] if mask_ratio_per_image else shared, mask_ratio_min)
        masked = torch.randperm(seq_len, generator=g)[: math.ceil(seq_len * ratio)]
        mask[i, masked] = True
        drawn = torch.arange(seq_len) if every_token else masked
        rows.append(drawn + i * seq_len)
        t.append(torch.randint(0, NUM_TRAIN_STEPS, (diffusion_batch_mul, len(drawn)), generator=g))
        noise.append(torch.randn((diffusion_batch_mul, len(drawn), token_dim), generator=g))
        num_visible.append(seq_len - len(masked))
        if num_iter is not None:
            gumbel.append(-torch.empty(seq_len).exponential_(generator=g).log())
            more.append(torch.rand(4, generator=g))
            steps.append(_log_uniform(more[-1][0].item(), *num_iter))
    if num_iter is None:
        extra = {}
    else:
        _, cfg, place, mix = torch.stack(more).unbind(dim=1)
        extra = dict(gumbel=torch.stack(gumbel), num_iter=torch.tensor(steps), place=place, mix=mix)
        extra["cfg"] = 1 + (cfg_max - 1) * cfg
    return TrainingDraws(
        flip=torch.tensor(flip),
        drop=torch.tensor(drop),
        mask=mask,
        rows=torch.cat(rows),
        t=torch.cat(t, dim=1),
        noise=torch.cat(noise, dim=1),
        num_visible=num_visible,
        **extra,
    )


def _log_uniform(uniform: float, low: int, high: int) -> int:
    """A whole number in [low, high], k with probability proportional to log((k + 1) / k)."""
    return min(high, int(low * ((high + 1) / low) ** uniform))


def mask_ratio(uniform: float, minimum: float) -> float:
    """A draw, by its inverse, of the normal distribution (mean 1, std 0.25) truncated to [minimum, 1] (MAGE, MAR)."""
    low = ndtr((minimum - 1.0) / 0.25)
    return float(min(max(1.0 + 0.25 * ndtri(low + uniform * (0.5 - low)), minimum), 1.0))
