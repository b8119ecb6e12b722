"""Hand-made schedules: how many tokens, at which temperature, under which guidance, in how many diffusion steps; and
how much of the guidance acts at each of these.

Legend: B images, M tokens unknown at the start (L, fewer when editing), n tokens unknown now, K = num_iter,
u = (step + 1) / K. A new schedule is one function and one row of GROUPS, TAUS, CFGS or PROFILES. Everything is float32
on the device of the mask, and learned rules start from these same functions.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from heads.orders import AFTER_DRAW, ORDERS, SCORES
from heads.searched import schedule_setting, schedule_values
from heads.step import StepState
from models.mask_schedules import STEP_WEIGHTS, step_shares
from util.args import flag, parse_range


@dataclass(frozen=True)
class RuleOptions:
    """The numbers that rules read. In training each image has its own guidance scale: then cfg is (B, 1)."""

    cfg: float = flag(1.0, "guidance scale w; 1.0 = off", low=0)
    temperature: float = flag(1.0, "temperature tau, of the noise or of the softmax over ids", low=0)
    temperature_end: float = flag(1.0, "tau at the last step of the linear tau schedule", low=0)
    group_a: float = flag(1.0, "curvature of the exp group schedule")
    group_p: float = flag(2.0, "exponent of the power group schedule", low=1e-6)
    cfg_power: float = flag(1.0, "exponent of the power_cosine guidance schedule", low=1e-6)
    order_noise: float = flag(1.0, "share of the hand-made order in the learned one; 0 = the head alone", low=0)
    order_base: str = flag("random", "hand-made order that the learned one moves")
    group_base: str = flag("cosine", "hand-made group rule that the learned one moves")
    confidence_noise: float = flag(4.5, "Gumbel noise of the order confidence at the first step; falls to 0", low=0)
    confidence_score: str = flag(
        "linear", "of the order confidence: log p with that noise, p, at random, or so in two steps", choices=SCORES
    )
    cfg_interval: str = flag("0,1", "lo,hi: share of known tokens within which interval guidance acts", metavar="LO,HI")
    cfg_t_interval: str = flag("0,1", "lo,hi: t/1000 within which the interval profile has guidance", metavar="LO,HI")
    schedule: str | None = flag(
        None, "JSON file with values of each step, for the rules schedule", type=schedule_setting, metavar="FILE"
    )
    cfg_base: str | None = None  # a model's own guidance schedule, which the learned one moves; None: linear

    def __post_init__(self):
        if self.schedule is not None:
            object.__setattr__(self, "schedule", schedule_setting(self.schedule))
        self.interval(), self.t_interval()  # a wrong text is an error now, not at the first step
        tables = dict(order_base=ORDERS | AFTER_DRAW, group_base=FREE_GROUPS, confidence_score=SCORES)
        for name, table in tables.items():
            if getattr(self, name) not in table:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; valid: {', '.join(table)}")
        for name in ("cfg", "temperature", "temperature_end", "order_noise", "confidence_noise"):
            value = getattr(self, name)
            if not isinstance(value, torch.Tensor) and not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a number of at least 0, got {value}")

    def interval(self) -> tuple[float, float]:
        """cfg_interval as two numbers."""
        return parse_range("cfg_interval", self.cfg_interval, float, low=0, high=1)

    def t_interval(self) -> tuple[float, float]:
        """cfg_t_interval as two numbers."""
        return parse_range("cfg_t_interval", self.cfg_t_interval, float, low=0, high=1)

    def searched(self, kind: str) -> np.ndarray:
        """The values (K,) or (P,) of the schedule for rules of this kind; a schedule without them raises KeyError."""
        return schedule_values(self.schedule)[kind]


_CONFIDENT = ("order", tuple(AFTER_DRAW))
READ_BY = {  # number of single rules -> (kind, the rules of it that read it when sampling)
    "temperature_end": ("tau", ("linear",)),
    "group_a": ("group", ("exp",)),
    "group_p": ("group", ("power",)),
    "cfg_power": ("cfg", ("power_cosine",)),
    "cfg_interval": ("cfg", ("interval",)),
    "cfg_t_interval": ("profile", ("interval",)),
    "confidence_noise": _CONFIDENT,
    "confidence_score": _CONFIDENT,
    "order_noise": ("order", ("learned",)),
    "order_base": ("order", ("learned",)),
    "group_base": ("group", ("learned",)),
}


def interpolate(knots, share: float):
    """Knots (..., P), a tensor or an array, evenly spread over [0, 1], linearly interpolated at the share: (...)."""
    last = knots.shape[-1] - 1
    place = min(max(share, 0.0), 1.0) * last
    left = int(place)
    below, above = knots[..., left], knots[..., min(left + 1, last)]
    return below + (place - left) * (above - below)


# ---------------------------------------------------------------------------------------------------------- group


def _floor(x: torch.Tensor) -> torch.Tensor:
    """The largest whole number not above x, of products like 100 · (1 − 4/5) too, which rounding leaves below it."""
    return torch.floor(x + 1e-9)


def _group(share_left, whole=_floor):
    """A group rule from the share of M that should be unknown after the step: u, K, options -> [0, 1]."""

    def rule(state: StepState, options: RuleOptions) -> torch.Tensor:
        n = state.num_unknown
        # whole numbers are taken in float64, as published; MPS has none
        wide = torch.float32 if n.device.type == "mps" else torch.float64
        share = state.per_image(lambda u, k: share_left(u, k, options)).to(wide).to(n.device, non_blocking=True)
        wanted = whole(state.num_start.to(wide) * share).float()
        # max(1, min(n − 1, ·)) as published; where one token is left that is no progress, so it is taken
        after = torch.minimum(wanted, n - 1).clamp(min=1)
        return torch.where(n > 1, n - after, n)

    return rule


def _exp_share(u: float, num_iter: int, options: RuleOptions) -> float:
    a = options.group_a
    if a > 0:  # the same fraction without the large exponentials
        return 1 - math.exp(a * (u - 1)) * math.expm1(-a * u) / math.expm1(-a)
    return 1 - (math.expm1(a * u) / math.expm1(a) if a else u)  # a = 0 is the limit, the constant schedule


def _staged_share(u: float, num_iter: int, options: RuleOptions) -> float:
    """GtR's rates: a quarter of the tokens, a quarter, and half, in about 3/4, 3/16 and 1/16 of the steps."""
    check_num_iter("staged", num_iter)
    second, third = max(1, round(num_iter * 3 / 16)), max(1, round(num_iter / 16))
    first = num_iter - second - third
    done = round(u * num_iter)
    if done <= first:
        return 1 - done / (4 * first)
    return 0.75 - (done - first) / (4 * second) if done <= first + second else (num_iter - done) / (2 * third)


def _searched_share(u: float, num_iter: int, options: RuleOptions) -> float:
    """1 − the cumulative curve of the schedule, which begins at 0."""
    return 1 - interpolate(np.append(0.0, options.searched("group")), u)


def _step_group(kind: str):
    """MaskGIL's: the tokens of a step, and not those known after it, follow a curve; the last step takes the rest."""

    def rule(state: StepState, options: RuleOptions) -> torch.Tensor:
        share = state.per_image(lambda u, k: step_shares(kind, k)[round(u * k) - 1])
        return (state.num_start * share.float().to(state.num_start.device, non_blocking=True)).round()

    return rule


MIN_STEPS = {"staged": 3}  # of the group rules that need some
NUM_ITER = 64  # MAR's default
A_STEP = {"one": "one token a step", "scale": "a scale a step"}  # what models draw whose group rule is their own


def default_num_iter(fixed_rules: dict[str, str], length: int | None) -> int | None:
    """Autoregressive steps where none are named: `NUM_ITER`, or those that a model with groups of its own needs.

    fixed_rules: of a `models.families.Backbone`; length: its `needed_steps`, None where they are not known yet.
    """
    return length if fixed_rules.get("group") in A_STEP else NUM_ITER


def needed_steps(model) -> int:
    """Steps that a `models.families.Backbone` needs at least where its groups are of one token, or of a scale."""
    return len(model.config.patch_nums) if model.fixed_rules.get("group") == "scale" else model.config.seq_len


def check_num_iter(group: str | None, num_iter: int | None) -> None:
    """Raise ValueError if a group rule needs more autoregressive steps; None, the default, is enough for all."""
    if num_iter is not None and num_iter < MIN_STEPS.get(group, 1):
        raise ValueError(f"the group rule {group} needs at least {MIN_STEPS[group]} steps, got num_iter {num_iter}")


# ----------------------------------------------------------------------------------------------------- tau and cfg


def _searched(kind: str, state: StepState, options: RuleOptions) -> torch.Tensor:
    """The schedule's value (B, 1) of this step: K values stand at u = 1/K, 2/K, …, 1, and before the first it holds."""
    values = options.searched(kind)
    start = 1 / len(values)
    return (
        state.per_image(lambda u, k: interpolate(values, (u - start) / (1 - start) if start < 1 else 0.0))
        .float()
        .unsqueeze(1)
    )


def _known_share(state, unknown_after):
    """v = (M − m') / M (B, 1), where m' is what is unknown after the step but at least 1, as published counts it."""
    m = state.num_start
    return ((m - unknown_after.clamp(min=1)) / m).unsqueeze(1)


def linear_cfg(state, unknown_after, options):
    """1 + (w − 1)·v: guidance grows with the share of known tokens."""
    return 1 + (options.cfg - 1) * _known_share(state, unknown_after)


def ramp_cfg(state, unknown_after, options):
    """1 + (w − 1)·s / (K − 1) at step s of K: guidance grows with the steps, from none at the first; w if K is 1."""
    share = state.per_image(lambda u, k: (round(u * k) - 1) / (k - 1) if k > 1 else 1.0)
    return 1 + (options.cfg - 1) * share.float().to(state.mask.device, non_blocking=True).unsqueeze(1)


def power_cosine_cfg(state, unknown_after, options):
    """1 + (w − 1)·(1 − cos(π·v^p)) / 2 with p = cfg_power."""
    v = _known_share(state, unknown_after)
    return 1 + (options.cfg - 1) * (1 - torch.cos(math.pi * v**options.cfg_power)) / 2


def interval_cfg(state, unknown_after, options):
    """w where lo <= v <= hi, else 1."""
    v = _known_share(state, unknown_after)
    low, high = options.interval()
    return torch.where((v >= low) & (v <= high), options.cfg, 1.0)


# --------------------------------------------------------------------------- guidance over the diffusion steps


def constant_profile(state, options=None):
    """m = 1 at every diffusion step."""
    return None


def interval_profile(state, options):
    """m = 1 where lo <= t / 1000 <= hi, else 0."""
    low, high = options.t_interval()
    return lambda share: 1.0 if low <= share <= high else 0.0


def searched_profile(state, options):
    """m of the schedule's knots."""
    knots = options.searched("profile")
    return lambda share: float(interpolate(knots, share))


GROUPS = {
    "cosine": _group(lambda u, k, options: math.cos(math.pi / 2 * u)),
    "constant": _group(lambda u, k, options: 1 - u),
    "exp": _group(_exp_share),
    "one": lambda state, options: torch.ones_like(state.num_unknown),
    "scale": lambda state, options: state.mask.sum(dim=1).float(),  # all that can be chosen: a scale, if z is of one
    "power": _group(lambda u, k, options: 1 - u**options.group_p),
    "staged": _group(_staged_share),
    **{f"step_{kind}": _step_group(kind) for kind in STEP_WEIGHTS},
    "schedule": _group(_searched_share, torch.round),  # so that shares of whole numbers give these
}
FREE_GROUPS = [name for name in GROUPS if name not in (*A_STEP, "schedule")]  # that a learned one can move by name
TAUS = {
    "constant": lambda state, options: options.temperature,
    "linear": lambda state, options: (
        state.per_image(lambda u, k: options.temperature + (options.temperature_end - options.temperature) * u)
        .float()
        .unsqueeze(1)
    ),
    "schedule": lambda state, options: _searched("tau", state, options),
}
CFGS = {
    "constant": lambda state, unknown_after, options: options.cfg,
    "linear": linear_cfg,
    "ramp": ramp_cfg,
    "power_cosine": power_cosine_cfg,
    "interval": interval_cfg,
    "schedule": lambda state, unknown_after, options: _searched("cfg", state, options),
}
PROFILES = {"constant": constant_profile, "interval": interval_profile, "schedule": searched_profile}


def is_size_known_ahead(group) -> bool:
    """Is this a hand-made group rule, the same whatever the model computes?"""
    return getattr(group, "func", None) in GROUPS.values()


def annealed_steps(state: StepState) -> int:
    """Diffusion steps T of this step: from the first number asked for to the last, since early tokens vary most.

    (DiSA, arXiv 2505.20297.) A function of step and num_iter alone: images share one T, whose value must not depend on
    which share the batch.
    """
    first, last = state.num_steps
    share = state.step / max(state.num_iter - 1, 1)
    return round(first + (last - first) * share)
