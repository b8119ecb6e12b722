"""MaskGIL's published schedules, as pure functions: training masks, and how many tokens each step of sampling reveals.

Legend: B images, L tokens an image, K = num_iter steps of sampling.
"""

import functools
import math

import torch

# share of the tokens that training masks, of a uniform draw
MASK_RATIOS = {
    "arccos": lambda r: r.arccos() * 2 / math.pi,
    "cosine": lambda r: (math.pi * r / 2).cos(),
    "linear": lambda r: r,
    "square": lambda r: r**2,
}
# weight of the tokens that a step reveals, of what falls in a line from 1 at the first step to 0 at the last
STEP_WEIGHTS = {
    "arccos": lambda r: r.arccos() * 2 / math.pi,
    "cosine": lambda r: (math.pi * r / 2).cos(),
    "root": lambda r: 1 - r.sqrt(),
    "linear": lambda r: 1 - r,
    "square": lambda r: 1 - r**2,
}


def draw_mask(kind: str, r: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Training masks (B, L) bool of uniform draws r (B,) and u (B, L): each token by itself, so that any number is.

    kind: a row of MASK_RATIOS; another one is a ValueError.
    """
    _check("mask schedule", kind, MASK_RATIOS)
    return u < MASK_RATIOS[kind](r).unsqueeze(1)


@functools.lru_cache(maxsize=256)
def step_shares(kind: str, num_iter: int) -> tuple[float, ...]:
    """Shares (K,), float32 numbers of sum 1, of the tokens unknown at the start that each step reveals.

    kind: a row of STEP_WEIGHTS; another one is a ValueError. Of one step the share is 1.
    """
    _check("token schedule", kind, STEP_WEIGHTS)
    if num_iter == 1:
        return (1.0,)
    weights = STEP_WEIGHTS[kind](torch.linspace(1, 0, num_iter))
    return tuple((weights / weights.sum()).tolist())


def token_schedule(kind: str, num_iter: int, total: int) -> list[int]:
    """The numbers of tokens that at most num_iter steps reveal, each at least 1, their sum total.

    Each is its share of total, half to even; the last step takes what is left, and none goes beyond it. Of total 0
    there are none; fewer than 1 step or than 0 tokens raise ValueError.
    """
    for name, value, low in (("num_iter", num_iter, 1), ("total", total, 0)):
        if value < low:
            raise ValueError(f"{name} must be at least {low}, got {value}")
    if not total:
        return []
    counts, left = [], total
    for step, share in enumerate(step_shares(kind, num_iter)):
        wanted = int((torch.tensor(share) * total).round()) if step < num_iter - 1 else left
        counts.append(min(max(wanted, 1), left))
        left -= counts[-1]
        if not left:
            break
    return counts


def _check(what: str, kind: str, table: dict) -> None:
    if kind not in table:
        raise ValueError(f"unknown {what} {kind!r}; valid: {', '.join(table)}")
