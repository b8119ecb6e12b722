"""Hand-made rules: which tokens come next, how many, at which temperature, under which guidance.

Legend: B images, L tokens an image, M tokens unknown at the start (L, fewer when editing), n tokens unknown now,
K = num_iter, u = (step + 1) / K. `mask` (B, L) bool is True where a token is unknown.

A rule is a function of the `StepState`; a new one is one function and one row of ORDERS, GROUPS, TAUS, CFGS or
DIFFUSION_STEPS.
Everything is float32 on the device of the mask, and learned rules start from these same functions.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from util.args import flag, parse_range


@dataclass(frozen=True)
class RuleOptions:
    """The numbers that rules read. In training each image has its own guidance scale: then cfg is (B, 1)."""

    cfg: float = flag(1.0, "guidance scale w; 1.0 = off", low=0)
    temperature: float = flag(1.0, "noise temperature tau", low=0)
    temperature_end: float = flag(1.0, "tau at the last step of the linear tau schedule", low=0)
    group_a: float = flag(1.0, "curvature of the exp group schedule")
    group_p: float = flag(2.0, "exponent of the power group schedule", low=1e-6)
    cfg_power: float = flag(1.0, "exponent of the power_cosine guidance schedule", low=1e-6)
    order_noise: float = flag(1.0, "share of the hand-made order in the learned one; 0 = the head alone", low=0)
    order_base: str = flag("random", "hand-made order that the learned one moves")
    cfg_interval: str = flag("0,1", "lo,hi: share of known tokens within which interval guidance acts", metavar="LO,HI")

    def __post_init__(self):
        _ = self.interval  # a wrong text is an error now, not at the first step
        if self.order_base not in ORDERS:
            raise ValueError(f"unknown order_base {self.order_base!r}; valid: {', '.join(ORDERS)}")
        for name in ("cfg", "temperature", "temperature_end", "order_noise"):
            value = getattr(self, name)
            if not isinstance(value, torch.Tensor) and not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a number of at least 0, got {value}")

    @property
    def interval(self) -> tuple[float, float]:
        """cfg_interval as two numbers."""
        return parse_range("cfg_interval", self.cfg_interval, float, low=0, high=1)


@dataclass
class StepState:
    """What a rule may look at. In training each image has its own step and num_iter: then they are (B,) on the CPU."""

    step: int | torch.Tensor
    num_iter: int | torch.Tensor
    mask: torch.Tensor  # (B, L) bool
    num_unknown: torch.Tensor  # (B,) float32, n
    num_start: torch.Tensor  # (B,) float32, M
    gumbel: torch.Tensor  # (B, L), one draw for each token, fixed for the image
    z: torch.Tensor  # (B, L, D), conditional decoder output
    images: torch.Tensor  # (B,) long, where these images stand in the batch given to generate()
    num_steps: tuple[int, int] = (100, 100)  # diffusion steps asked for at the first and at the last step

    def per_image(self, function) -> torch.Tensor:
        """function(u) of the progress u = (step + 1) / num_iter as float64 (B,) on the CPU, for a Python function."""
        steps, totals = torch.as_tensor(self.step).tolist(), torch.as_tensor(self.num_iter).tolist()
        if not isinstance(steps, list):
            return torch.full(self.num_unknown.shape, function((steps + 1) / totals), dtype=torch.float64)
        return torch.tensor([function((s + 1) / k) for s, k in zip(steps, totals)], dtype=torch.float64)

    @property
    def is_last(self) -> bool | torch.Tensor:
        """Is this the last step? (B,) bool on the device of the mask where steps differ between images."""
        last = self.step >= self.num_iter - 1
        return last.to(self.mask.device, non_blocking=True) if isinstance(last, torch.Tensor) else last


@dataclass
class StepPlan:
    """What the rules decided: select (B, L) bool, tau and cfg (B, L) float32, read where select is True, and T."""

    select: torch.Tensor
    tau: torch.Tensor
    cfg: torch.Tensor
    num_steps: int  # diffusion steps, for all images alike


def annealed_steps(state: StepState) -> int:
    """Diffusion steps T of this step, by the row of DIFFUSION_STEPS that was asked for: 100 constant, 50:5 linear.

    A function of step and num_iter alone: images share one T, whose value must not depend on which share the batch.
    """
    first, last = state.num_steps
    share = state.step / max(state.num_iter - 1, 1)
    return DIFFUSION_STEPS["constant" if first == last else "linear"](share, first, last)


@dataclass(frozen=True)
class Rules:
    """Five rules in a row; calling them with a StepState gives the StepPlan."""

    order: Callable  # (state) -> scores (B, L): highest first
    group: Callable  # (state) -> how many tokens, (B,)
    tau: Callable  # (state) -> float, (B, 1) or (B, L)
    cfg: Callable  # (state, unknown_after (B,)) -> float, (B, 1) or (B, L)
    num_steps: Callable = annealed_steps  # (state) -> int, known without waiting for the device

    def __call__(self, state: StepState) -> StepPlan:
        n = state.num_unknown
        k = whole_group(self.group, state)
        return StepPlan(
            select=hard_topk(self.order(state), k, state.mask),
            tau=_per_token(self.tau(state), state.mask),
            cfg=_per_token(self.cfg(state, n - k), state.mask),
            num_steps=self.num_steps(state),
        )


def whole_group(group: Callable, state: StepState) -> torch.Tensor:
    """Group size (B,) of a group rule: never empty, never more than there is; the last step takes everything."""
    n, last = state.num_unknown, state.is_last
    if last is True:
        return n
    k = torch.minimum(group(state).clamp(min=1), n)
    return k if last is False else torch.where(last, n, k)


def _per_token(value, mask):
    if not isinstance(value, torch.Tensor):  # filled there: nothing to copy, nothing to wait for
        return torch.full(mask.shape, float(value), device=mask.device)
    return value.to(mask.device, torch.float32, non_blocking=True).expand(mask.shape)


def hard_topk(scores: torch.Tensor, k: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """(B, L) bool: the k (B,) highest scores (B, L) among valid (B, L), for all images at once; ties go by position."""
    scores = scores.clamp(min=torch.finfo(scores.dtype).min).masked_fill(~valid, -math.inf)
    order = torch.argsort(scores, dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return (rank < k.unsqueeze(1)) & valid


# ---------------------------------------------------------------------------------------------------------- order


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


# ---------------------------------------------------------------------------------------------------------- group


def _group(share_left):
    """A group rule from the share of M that should be unknown after the step: u, options -> [0, 1]."""

    def rule(state: StepState, options: RuleOptions) -> torch.Tensor:
        n = state.num_unknown
        # the floor is taken in float64, as published; MPS has none
        wide = torch.float32 if n.device.type == "mps" else torch.float64
        share = state.per_image(lambda u: share_left(u, options)).to(wide).to(n.device, non_blocking=True)
        wanted = torch.floor(state.num_start.to(wide) * share).float()
        # max(1, min(n − 1, ·)) as published; where one token is left that is no progress, so it is taken
        after = torch.minimum(wanted, n - 1).clamp(min=1)
        return torch.where(n > 1, n - after, n)

    return rule


def _exp_share(u: float, options: RuleOptions) -> float:
    a = options.group_a
    if a > 0:  # the same fraction without the large exponentials
        return 1 - math.exp(a * (u - 1)) * math.expm1(-a * u) / math.expm1(-a)
    return 1 - (math.expm1(a * u) / math.expm1(a) if a else u)  # a = 0 is the limit, the constant schedule


# ----------------------------------------------------------------------------------------------------- tau and cfg


def _known_share(state, unknown_after):
    """v = (M − m') / M (B, 1), where m' is what is unknown after the step but at least 1, as published counts it."""
    m = state.num_start
    return ((m - unknown_after.clamp(min=1)) / m).unsqueeze(1)


def linear_cfg(state, unknown_after, options):
    """1 + (w − 1)·v: guidance grows with the share of known tokens."""
    return 1 + (options.cfg - 1) * _known_share(state, unknown_after)


def power_cosine_cfg(state, unknown_after, options):
    """1 + (w − 1)·(1 − cos(π·v^p)) / 2 with p = cfg_power."""
    v = _known_share(state, unknown_after)
    return 1 + (options.cfg - 1) * (1 - torch.cos(math.pi * v**options.cfg_power)) / 2


def interval_cfg(state, unknown_after, options):
    """w where lo <= v <= hi, else 1."""
    v = _known_share(state, unknown_after)
    low, high = options.interval
    return torch.where((v >= low) & (v <= high), options.cfg, 1.0)


ORDERS = {
    "random": random_order,
    "raster": raster_order,
    "halton": halton_order,
    "center": center_order,
    "multiscale": multiscale_order,
}
GROUPS = {
    "cosine": _group(lambda u, options: math.cos(math.pi / 2 * u)),
    "constant": _group(lambda u, options: 1 - u),
    "exp": _group(_exp_share),
    "power": _group(lambda u, options: 1 - u**options.group_p),
}
TAUS = {
    "constant": lambda state, options: options.temperature,
    "linear": lambda state, options: (
        state.per_image(lambda u: options.temperature + (options.temperature_end - options.temperature) * u)
        .float()
        .unsqueeze(1)
    ),
}
CFGS = {
    "constant": lambda state, unknown_after, options: options.cfg,
    "linear": linear_cfg,
    "power_cosine": power_cosine_cfg,
    "interval": interval_cfg,
}
# T from 0, where the least is known and tokens vary most, to 1, the last step (DiSA, arXiv 2505.20297)
DIFFUSION_STEPS = {
    "constant": lambda share, first, last: first,
    "linear": lambda share, first, last: round(first + (last - first) * share),
}
