"""Parametrisations of the learned heads: the network that gives r, and what r does to the hand-made value it moves.

A new one is a row of FORMS. Legend: B images, L tokens an image, D width of z, u = (step + 1) / K. r = 0 leaves the
hand-made value bit for bit as it is, and every network starts at r = 0.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from diffusion.schedule import NUM_TRAIN_STEPS
from heads.schedules import interpolate
from heads.step import StepState

NUM_KNOTS, PROFILE_KNOTS = 16, 8


class Head(nn.Module):
    """r (B, L, 1) from z (B, L, D) and the step's numbers (B, 3); the last layer starts at zero."""

    def __init__(self, dim: int, width: int = 64):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.token = nn.Linear(dim, width)
        self.step = nn.Linear(3, width)
        self.out = nn.Linear(width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, z, step):
        hidden = self.token(self.norm(z)) + self.step(step).unsqueeze(1)  # (B, L, width)
        return self.out(nn.functional.gelu(hidden))

    def shared(self, state: StepState):
        """The part of r that all images share: none."""
        return 0.0


class KnotHead(Head):
    """r = v(u) + a(z, step): v is one curve for all images, linear between knots that start at zero; a is a `Head`."""

    def __init__(self, dim: int):
        super().__init__(dim, width=128)
        self.values = nn.Parameter(torch.zeros(NUM_KNOTS))

    def shared(self, state: StepState) -> torch.Tensor:
        """v(u) (B, 1); one number where all images are at the same step."""
        if not isinstance(state.step, torch.Tensor):
            return interpolate(self.values, (state.step + 1) / state.num_iter)
        shares, which = state.per_image(lambda u, k: u).unique(return_inverse=True)
        v = torch.stack([interpolate(self.values, share) for share in shares.tolist()])
        return v[which.to(v.device, non_blocking=True)].unsqueeze(1)


class WideHead(Head):
    """A `Head` of the width of a `KnotHead`; a curve that all tokens share would not change their order."""

    def __init__(self, dim: int):
        super().__init__(dim, width=128)


class ProfileHead(nn.Module):
    """m(t / 1000) = 1 + tanh of a curve, linear between knots that start at zero; the same for all images."""

    def __init__(self, dim: int):
        super().__init__()
        self.values = nn.Parameter(torch.zeros(PROFILE_KNOTS))
        place = np.linspace(0, PROFILE_KNOTS - 1, NUM_TRAIN_STEPS + 1)
        left = place.astype(np.int64)
        sides = np.stack([left, np.minimum(left + 1, PROFILE_KNOTS - 1)])
        self.register_buffer("sides", torch.from_numpy(sides), persistent=False)
        self.register_buffer("nearness", torch.from_numpy(place - left).float(), persistent=False)

    def forward(self) -> Callable:
        """The function m of t / 1000, t a whole number between 0 and 1000, that gives a tensor ()."""
        below, above = self.values[self.sides]
        m = 1 + torch.tanh(below + self.nearness * (above - below))  # of all t, since each is asked for at every step
        return lambda share: m[round(share * NUM_TRAIN_STEPS)]


def bounded(base: torch.Tensor, r: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """base + (distance to the bound that r points to)·tanh(r); the bounds are widened to contain the base."""
    up, down = (high - base).clamp(min=0), (base - low).clamp(min=0)
    return base + torch.where(r >= 0, up, down) * torch.tanh(r)


def scaled(base: torch.Tensor, r: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """base·exp(tanh(r) / 2), clipped to the bounds, which are widened to contain the base."""
    return _clipped(base * torch.exp(torch.tanh(r) / 2), base, low, high)


def shifted(base: torch.Tensor, r: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """base + 3·tanh(r), clipped to the bounds, which are widened to contain the base."""
    return _clipped(base + 3 * torch.tanh(r), base, low, high)


def _clipped(value, base, low, high):
    return torch.minimum(torch.maximum(value, base.clamp(max=low)), base.clamp(min=high))


def of_unknown(state: StepState, base_k: torch.Tensor, r: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Group size (B,) = ρ·n, ρ being moved between its bounds."""
    return bounded(base_k / state.num_unknown, r, low, high) * state.num_unknown


def of_all(state: StepState, base_k: torch.Tensor, r: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Group size (B,) that brings the share of known tokens, moved between 0 and 1, to where it should be; in [low·n,
    high·n], which is widened to contain the base."""
    n, total = state.num_unknown, state.num_start
    share = (total - n + base_k) / total
    k = base_k + (bounded(share, r, 0.0, 1.0) - share) * total
    return torch.minimum(torch.maximum(k, torch.minimum(low * n, base_k)), torch.maximum(high * n, base_k))


class Form(NamedTuple):
    """A row of FORMS. heads: {name: (dim) -> network}; group: (state, base_k, r, low, high) -> k; tau, cfg: (base, r,
    low, high) -> value; renews: are the random order's draws of tokens that stay unknown made anew after each step, so
    that the order of all is a Plackett–Luce draw?"""

    heads: dict[str, Callable]
    group: Callable
    tau: Callable
    cfg: Callable
    renews: bool


FORMS = {
    "bounded": Form(dict.fromkeys(("order", "group", "tau", "cfg"), Head), of_unknown, bounded, bounded, False),
    "knots": Form(
        dict(order=WideHead, group=KnotHead, tau=KnotHead, cfg=KnotHead, profile=ProfileHead),
        of_all,
        scaled,
        shifted,
        True,
    ),
}
