"""Training batches as the rules see them: the StepState of a mask, which has to look as it does in sampling.

Legend: B images, L tokens an image, n tokens unknown now, K = num_iter. `mask` (B, L) bool is True where a token is
masked.
"""

import functools

import torch

from heads.policy import PolicyHeads
from heads.rules import whole_group
from heads.schedules import GROUPS, RuleOptions
from heads.step import StepState
from training.objectives.draws import PolicyDraws


def training_state(policy: PolicyDraws, mask, z=None, num_visible=None) -> StepState:
    """The StepState of images with this mask; the step is the one drawn, else the one that fits the mask best.

    num_visible: B ints, the tokens that are not masked, for a mask on a device: else it is waited for. A published mask
    belongs to the step of a cosine schedule of num_iter steps that meets as many unknown tokens, or comes nearest.
    """
    length, step = mask.shape[1], policy.step
    n = mask.sum(dim=1)
    if step is None:
        counts = n.tolist() if num_visible is None else [length - visible for visible in num_visible]
        step = torch.tensor([_nearest_step(length, k, c) for k, c in zip(policy.num_iter.tolist(), counts)])
    return StepState(
        step=step,
        num_iter=policy.num_iter,
        mask=mask,
        num_unknown=n.float(),
        num_start=torch.full_like(n, length, dtype=torch.float32),
        gumbel=policy.gumbel,
        z=z,
        images=torch.arange(len(mask), device=mask.device),
    )


@functools.lru_cache(maxsize=4096)
def _nearest_step(length: int, num_iter: int, unknown: int) -> int:
    """The step at which a cosine schedule of num_iter steps over length tokens has about this many unknown."""
    visited = _unknown_counts(length, num_iter)
    return min(range(len(visited)), key=lambda step: abs(visited[step] - unknown))


@functools.lru_cache(maxsize=256)
def _unknown_counts(length: int, num_iter: int) -> list[float]:
    """How many tokens are unknown before each step of the cosine schedule, as long as there are any."""
    counts, n = [], torch.full((1,), float(length))
    while n > 0:
        counts.append(n.item())
        mask = torch.zeros(1, length, dtype=torch.bool)
        state = StepState(len(counts) - 1, num_iter, mask, n, torch.full((1,), float(length)), None, None, None)
        n = n - base_group(state)
    return counts


def base_group(state: StepState) -> torch.Tensor:
    """Group size (B,) of the cosine schedule at this state; all that is left at the last step."""
    return whole_group(lambda state: GROUPS["cosine"](state, RuleOptions()), state)


def needs_every_loss(heads: PolicyHeads | None) -> bool:
    """Do the losses of these heads compare all masked tokens, targets or not?"""
    return heads is not None and bool({"order", "group"} & set(heads.learn))
