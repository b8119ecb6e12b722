"""The six rules of a step, and how their answers become a plan.

Legend: B images, L tokens an image, n tokens unknown now. `mask` (B, L) bool is True where a token is unknown.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from heads.luce import PlackettLuce
from heads.orders import ORDERS, Confidence, check_square, is_known_ahead
from heads.schedules import annealed_steps, constant_profile, is_size_known_ahead
from heads.step import StepPlan, StepState

if TYPE_CHECKING:
    from models.families import Backbone


@dataclass(frozen=True)
class Rules:
    """Six rules in a row; calling them with a StepState gives the StepPlan."""

    order: Callable | Confidence  # (state) -> scores (B, L): highest first
    group: Callable  # (state) -> how many tokens, (B,)
    tau: Callable  # (state) -> float, (B, 1) or (B, L)
    cfg: Callable  # (state, unknown_after (B,)) -> float, (B, 1) or (B, L)
    num_steps: Callable = annealed_steps  # (state) -> int, known without waiting for the device
    profile: Callable = constant_profile  # (state) -> what `StepPlan.profile` says

    def __call__(self, state: StepState) -> StepPlan:
        if isinstance(self.order, Confidence):
            keep = torch.minimum(whole_group(self.group, state), state.mask.sum(dim=1))
            return self._plan(state, state.mask, state.num_unknown - keep, keep=keep)
        scores = self.order(state)
        select = hard_topk(scores, whole_group(self.group, state), state.mask)
        luce = self.order if isinstance(self.order, PlackettLuce) else None
        return self._plan(
            state,
            select,
            state.num_unknown - select.sum(dim=1),  # not n − k: fewer may be there to choose from
            gumbel=luce and luce.renewed(state, scores, select),
            log_prob=luce.log_prob(state, scores, select) if luce and scores.requires_grad else None,
        )

    def _plan(self, state: StepState, select, after, **parts) -> StepPlan:
        """The plan that selects tokens (B, L) bool and leaves so many unknown, after (B,)."""
        return StepPlan(
            select=select,
            tau=_per_token(self.tau(state), state.mask),
            cfg=_per_token(self.cfg(state, after), state.mask),
            num_steps=self.num_steps(state),
            profile=self.profile(state),
            **parts,
        )

    def num_selected(self, on_host: StepState) -> torch.Tensor | None:
        """How many tokens (B,) the plan will select, of a state on the host without z; None where a head decides it.

        A subclass that changes `__call__` changes this too.
        """
        if not is_size_known_ahead(self.group):
            return None
        most = on_host.mask.sum(dim=1)
        return most if isinstance(self.order, Confidence) else torch.minimum(whole_group(self.group, on_host), most)

    def after_draw(self, state: StepState, plan: StepPlan, log_prob, gumbel) -> StepPlan:
        """The plan whose selection is what is kept of it; log_prob (B, L) of what was drawn, gumbel (B, L) draws."""
        scores = self.order.scores(state, log_prob, gumbel)
        return replace(plan, select=hard_topk(scores, plan.keep, state.mask))

    def check(self, model: "Backbone") -> None:
        """Raise ValueError for an order that looks at what the model's tokens do not have, or have too late."""
        if model.fixed_rules.get("group") == "one" and not is_known_ahead(self.order):
            raise ValueError(
                "--order must be known before the first token is drawn: this model draws one token a step and is told "
                f"where; valid: {', '.join(ORDERS)}"
            )
        if is_known_ahead(self.order) and not has_square_images(model.config):
            check_square(next(name for name, order in ORDERS.items() if order is self.order))
        if isinstance(self.order, Confidence) and not model.token_head.discrete:
            raise ValueError(
                "--order confidence needs the probability of a token, which only ids have (--loss ce): "
                "choose another order for a diffusion loss"
            )


def has_square_images(config) -> bool:
    """Has an image of a model of this configuration as many rows as columns of tokens?"""
    shape = getattr(config, "shape", None)  # of those that may be others
    return shape is None or shape[0] == shape[1]


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
