"""A learned order as a Plackett–Luce draw, step by step (docs/heads.md).

Legend: B images, L tokens an image, ℓ = logit / order_noise, g the Gumbel draw of a token. All in float64, since draws
that are nearly equal must stay in their order.
"""

import math
from collections.abc import Callable

import torch

from heads.step import StepState


class PlackettLuce:
    """An order rule: ranks by logit + order_noise·g, and renews g of the tokens that a step leaves unknown.

    One persistent g under logits that change from step to step would be no Plackett–Luce draw.
    """

    def __init__(self, scores: Callable, noise: float):
        self.scores, self.noise = scores, noise

    def __call__(self, state: StepState) -> torch.Tensor:
        return self.scores(state)

    def logits(self, state: StepState, scores) -> torch.Tensor:
        """ℓ (B, L) of scores (B, L)."""
        return (scores - self.noise * state.gumbel).double() / self.noise

    @torch.no_grad()
    def renewed(self, state: StepState, scores, select) -> torch.Tensor:
        """Fresh Gumbel draws (B, L) of the tokens that select (B, L) leaves, given that it was these that it took.

        g' = −log(e^{−g} − e^{−b}) with b = (smallest selected ℓ + g) − ℓ: monotone in g at equal ℓ.
        """
        g = state.gumbel.double()
        logits = self.logits(state, scores)
        least = (logits + g).masked_fill(~select, math.inf).amin(dim=1, keepdim=True)
        left = state.mask & ~select & least.isfinite()
        difference = torch.exp(-g) - torch.exp(logits - least)
        return torch.where(left, -difference.clamp(min=1e-300).log(), g)

    def log_prob(self, state: StepState, scores, select) -> torch.Tensor:
        """log P (B,) of the ordered choice, 0 where all is taken: Σ_j ℓ_j − log Σ e^ℓ of what is unknown at turn j."""
        logits, ranked = self.logits(state, scores), scores.detach().masked_fill(~state.mask, -math.inf)
        order = ranked.argsort(dim=1, descending=True, stable=True)
        logits = logits.masked_fill(~state.mask, -1e30).gather(1, order)
        rest = logits.flip(1).logcumsumexp(dim=1).flip(1)
        chosen = select & (state.mask & ~select).any(dim=1, keepdim=True)
        return ((logits - rest) * chosen.gather(1, order)).sum(dim=1)
