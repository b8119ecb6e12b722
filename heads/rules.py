"""The six rules of a step, and how their answers become a plan.

Legend: B images, L tokens an image, n tokens unknown now. `mask` (B, L) bool is True where a token is unknown.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from heads.luce import PlackettLuce
from heads.schedules import annealed_steps, constant_profile
from heads.step import StepPlan, StepState


@dataclass(frozen=True)
class Rules:
    """Six rules in a row; calling them with a StepState gives the StepPlan."""

    order: Callable  # (state) -> scores (B, L): highest first
    group: Callable  # (state) -> how many tokens, (B,)
    tau: Callable  # (state) -> float, (B, 1) or (B, L)
    cfg: Callable  # (state, unknown_after (B,)) -> float, (B, 1) or (B, L)
    num_steps: Callable = annealed_steps  # (state) -> int, known without waiting for the device
    profile: Callable = constant_profile  # (state) -> what `StepPlan.profile` says

    def __call__(self, state: StepState) -> StepPlan:
        scores = self.order(state)
        select = hard_topk(scores, whole_group(self.group, state), state.mask)
        luce = self.order if isinstance(self.order, PlackettLuce) else None
        after = state.num_unknown - select.sum(dim=1)  # not n − k: fewer may be there to choose from
        return StepPlan(
            select=select,
            tau=_per_token(self.tau(state), state.mask),
            cfg=_per_token(self.cfg(state, after), state.mask),
            num_steps=self.num_steps(state),
            profile=self.profile(state),
            gumbel=luce and luce.renewed(state, scores, select),
            log_prob=luce.log_prob(state, scores, select) if luce and scores.requires_grad else None,
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
