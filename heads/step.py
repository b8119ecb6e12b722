"""What a rule sees of a step, and what the rules decide.

Legend: B images, L tokens an image, M tokens unknown at the start (L, fewer when editing), n tokens unknown now,
K = num_iter, u = (step + 1) / K. `mask` (B, L) bool is True where a token is unknown.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass
class StepState:
    """What a rule may look at. In training each image has its own step and num_iter: then they are (B,) on the CPU."""

    step: int | torch.Tensor
    num_iter: int | torch.Tensor
    mask: torch.Tensor  # (B, L) bool; of a family with z of some positions only, those of them that are unknown
    num_unknown: torch.Tensor  # (B,) float32, n, whether there is z of them or not
    num_start: torch.Tensor  # (B,) float32, M
    gumbel: torch.Tensor  # (B, L), one draw for each token, fixed for the image
    z: torch.Tensor  # (B, L, D), conditional decoder output
    images: torch.Tensor  # (B,) long, where these images stand in the batch given to generate()
    num_steps: tuple[int, int] = (100, 100)  # diffusion steps asked for at the first and at the last step

    def per_image(self, function) -> torch.Tensor:
        """function(u, K) of the progress u = (step + 1) / K as float64 (B,) on the CPU, for a Python function."""
        steps, totals = torch.as_tensor(self.step).tolist(), torch.as_tensor(self.num_iter).tolist()
        if not isinstance(steps, list):
            return torch.full(self.num_unknown.shape, function((steps + 1) / totals, totals), dtype=torch.float64)
        return torch.tensor([function((s + 1) / k, k) for s, k in zip(steps, totals)], dtype=torch.float64)

    @cached_property
    def masked(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(the mask as numbers (B, L), how many are True (B,), at least 1), float32."""
        masked = self.mask.float()
        return masked, masked.sum(dim=1).clamp(min=1)

    @cached_property
    def known_share(self) -> torch.Tensor:
        """Share (B,) of the tokens that are known."""
        return 1 - self.num_unknown / self.mask.shape[1]

    def numbers(self, base_cfg: float | torch.Tensor) -> torch.Tensor:
        """What tells heads the step (B, 3): the share of known tokens, log₂ K / 4, and base_cfg − 1."""
        share = self.known_share
        num_iter, base_cfg = (
            x.to(share.device, torch.float32, non_blocking=True).flatten().expand(len(share))
            if isinstance(x, torch.Tensor)
            else torch.full_like(share, x)
            for x in (self.num_iter, base_cfg)
        )
        return torch.stack([share, num_iter.log2() / 4, base_cfg - 1], dim=1)

    @property
    def is_last(self) -> bool | torch.Tensor:
        """Is this the last step? (B,) bool on the device of the mask where steps differ between images."""
        last = self.step >= self.num_iter - 1
        return last.to(self.mask.device, non_blocking=True) if isinstance(last, torch.Tensor) else last


@dataclass
class StepPlan:
    """What the rules decided: select (B, L) bool, tau and cfg (B, L) float32, read where select is True, and T.

    profile: m of w(t) = 1 + (w − 1)·m over the diffusion steps of a token, a function of t / 1000 in [0, 1] that gives
    a float, or a tensor (B,) or (B, 1); None: m = 1. Where m is the float 0 no unconditional half is computed. gumbel
    (B, L): draws that replace the state's for the steps to come; None: these stay. log_prob (B,): of the choice, where
    a learned order has a gradient; the loop adds that of drawn ids, where τ or w have one, unless it is `local`. ids
    (N, V): log p of all ids for the tokens of the step, where τ or w have a gradient. keep (B,): of the tokens selected
    so many are kept once they are drawn, as `Rules.after_draw` says; None: all.
    """

    select: torch.Tensor
    tau: torch.Tensor
    cfg: torch.Tensor
    num_steps: int  # diffusion steps, for all images alike
    profile: Callable | None = None
    gumbel: torch.Tensor | None = None
    log_prob: torch.Tensor | None = None
    ids: torch.Tensor | None = None
    keep: torch.Tensor | None = None

    @property
    def looks_at_ids(self) -> bool:
        """Is the log-probability of drawn ids asked for: to keep some of them, or since τ or w learn by it?"""
        return self.keep is not None or self.tau.requires_grad or self.cfg.requires_grad
