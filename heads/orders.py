"""Hand-made orders: which tokens come next. A new one is one function and one row of ORDERS, or of AFTER_DRAW.

Legend: B images, L tokens an image. An order is a function of the `StepState` that gives scores (B, L), highest first,
in float32 on the device of the mask.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from heads.step import StepState


def random_order(state: StepState) -> torch.Tensor:
    """The image's own Gumbel draws: a uniformly random order."""
    return state.gumbel


def raster_order(state: StepState) -> torch.Tensor:
    """Row by row."""
    positions = torch.arange(state.mask.shape[1], device=state.mask.device)
    return (-positions.float()).expand(state.mask.shape)


def halton_order(state: StepState) -> torch.Tensor:
    """Cells in the order in which the Halton sequence (2, 3) first falls into them."""
    return (
        _halton_scores(math.isqrt(state.mask.shape[1]))
        .to(state.mask.device, non_blocking=True)
        .expand(state.mask.shape)
    )


def center_order(state: StepState) -> torch.Tensor:
    """From the centre outwards; cells at equal distance in the image's random order."""
    side = math.isqrt(state.mask.shape[1])
    offset = torch.arange(side) - (side - 1) / 2
    distance = (offset[:, None] ** 2 + offset[None, :] ** 2).flatten()
    return _by_level(state, distance.unique(return_inverse=True)[1])


def multiscale_order(state: StepState) -> torch.Tensor:
    """A coarse grid first, then again and again the points midway; within one grid in the image's random order."""
    side = math.isqrt(state.mask.shape[1])
    num_levels = max(side - 1, 1).bit_length()
    level = torch.full((side, side), num_levels)
    for i in reversed(range(num_levels)):
        stride = 2 ** (num_levels - i)
        level[::stride, ::stride] = i
    return _by_level(state, level.flatten())


def checkerboard_order(state: StepState) -> torch.Tensor:
    """Cells (i, j) with i + j ≡ 0 (mod 4), then ≡ 2, then odd; within each class in the image's random order (GtR)."""
    side = math.isqrt(state.mask.shape[1])
    diagonal = torch.arange(side)[:, None] + torch.arange(side)
    level = torch.where(diagonal % 2 == 1, 2, diagonal % 4 // 2)
    return _by_level(state, level.flatten())


@dataclass(frozen=True)
class Confidence:
    """All unknown tokens are drawn, and those kept that the model is surest of (MaskGIT; arXiv 2406.11838, Table 5).

    noise: of Gumbel draws, new ones at each step, at the first step. score: a row of SCORES.
    """

    noise: float
    score: str

    def scores(self, state: StepState, log_prob, gumbel) -> torch.Tensor:
        """Scores (B, L) of what was drawn: its log p (B, L), and Gumbel draws (B, L)."""
        return SCORES[self.score](state, log_prob, gumbel, self.noise)


@dataclass(frozen=True)
class LearnedConfidence(Confidence):
    """The same, each score moved by what a head says: logits(state) (B, L) + share · score."""

    logits: Callable
    share: float

    def scores(self, state: StepState, log_prob, gumbel) -> torch.Tensor:
        """Scores (B, L), as above."""
        return self.logits(state) + self.share * super().scores(state, log_prob, gumbel)


def linear_score(state: StepState, log_prob, gumbel, noise: float) -> torch.Tensor:
    """log p with Gumbel noise that falls in a line from `noise` at the first step to 0 at the last."""
    left = state.per_image(lambda u, k: noise * (1 - (round(u * k) - 1) / max(k - 1, 1)))
    return log_prob + left.float().unsqueeze(1).to(log_prob.device, non_blocking=True) * gumbel


def warm_up_score(state: StepState, log_prob, gumbel, noise: float) -> torch.Tensor:
    """A random order in the first two steps, then p."""
    early = state.per_image(lambda u, k: round(u * k)) <= 2
    return torch.where(early.unsqueeze(1).to(log_prob.device, non_blocking=True), gumbel, log_prob.exp())


# what tokens that were drawn are kept by: (state, log p (B, L), Gumbel draws (B, L), noise) -> scores (B, L)
SCORES = {
    "linear": linear_score,
    "none": lambda state, log_prob, gumbel, noise: log_prob.exp(),
    "random": lambda state, log_prob, gumbel, noise: gumbel,
    "warm_up": warm_up_score,
}


def _by_level(state, level):
    """Scores (B, L) that rank by level (L,), lowest first, and by the Gumbel draws within a level."""
    rank = state.gumbel.argsort(dim=1).argsort(dim=1).float()  # 0…L−1: exact in float32, unlike a sum with the draws
    return rank - level.to(rank.device, non_blocking=True).float() * level.numel()


@functools.lru_cache(maxsize=16)
def _halton_scores(side: int) -> torch.Tensor:
    rank, i = {}, 0
    while len(rank) < side * side:
        i += 1
        cell = _radical_inverse(i, 2, side) * side + _radical_inverse(i, 3, side)
        rank.setdefault(cell, len(rank))
    return torch.tensor([-float(rank[cell]) for cell in range(side * side)])


def _radical_inverse(i: int, base: int, side: int) -> int:
    """Which of `side` cells of [0, 1) the radical inverse of i lies in; in whole numbers, for points on a border."""
    numerator, denominator = 0, 1
    while i:
        numerator, denominator, i = numerator * base + i % base, denominator * base, i // base
    return numerator * side // denominator


ORDERS = {
    "random": random_order,
    "raster": raster_order,
    "halton": halton_order,
    "center": center_order,
    "multiscale": multiscale_order,
    "checkerboard": checkerboard_order,
}


ANY_SHAPE = ("random", "raster")  # of these orders; the others count places in a square image


def check_square(order: str, flag: str = "order") -> None:
    """Raise ValueError for an order, which a flag names, that images which are not square do not have."""
    if order in ORDERS and order not in ANY_SHAPE:
        valid = ", ".join((*ANY_SHAPE, *AFTER_DRAW))
        raise ValueError(f"--{flag} {order} is of square images, these are not; valid: {valid}")


def is_known_ahead(order) -> bool:
    """Is this a hand-made order, the same whatever the model computes?"""
    return order in ORDERS.values()


# orders that look at the tokens that were drawn: only ids have a probability
AFTER_DRAW = {"confidence": Confidence}
