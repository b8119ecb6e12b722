"""What learns from whole images by other ways than a gradient through what is drawn: choices, and ids."""

import torch

from models.coding import blanked
from util import dist
from util.dist import send
from util.rng import generator, seed_of


class Decisions:
    """log P (b,) of what order and group heads decide for the images of a `Rollout`, which has no other gradient.

    logits: what the order head said, flat, one tensor a step; NaN for tokens that were known.
    """

    def __init__(self, rollout, device):
        draws = [torch.randn(rollout.num_iter, generator=generator(seed_of("explore", s))) for s in rollout.seeds]
        self.noise, self.sigma = send(torch.stack(draws), device), rollout.sigma  # (b, K)
        self.log_prob = torch.zeros(len(rollout.seeds), device=device)
        self.logits = []

    def explored(self, name: str, state, r: torch.Tensor) -> torch.Tensor:
        """r of the group head (B', 1) with Gaussian noise; of the other heads r as it is."""
        if name == "order":
            self.logits.append(r.detach().masked_fill(~state.mask, torch.nan).flatten())
        if name != "group":
            return r
        x = (r + self.sigma * self.noise[state.images, state.step].unsqueeze(1)).detach()
        self._add(state.images, -((x - r) / self.sigma).square().squeeze(1) / 2)
        return x

    def chosen(self, rows, plan) -> None:
        """The tokens at rows (N, 2) that a step's plan (B', L) chose."""
        if plan.log_prob is not None:
            images, log_prob = rows[:, 0].unique_consecutive(), plan.log_prob
            if len(images) < len(log_prob):  # some drew nothing; finding them waits for the device
                log_prob = log_prob[plan.select.any(dim=1)]
            self._add(send(images, log_prob.device), log_prob)

    def _add(self, images, value):
        self.log_prob = self.log_prob.index_add(0, images, value.float())


class ExpectedCost:
    """What ids would have cost had others been drawn, to first order: a gradient for what they are drawn with.

    An image's cost c is a function of the codes e_n that its tokens n stand for. Near those drawn it is linear,
    c + ⟨∂c/∂e_n, e_v − e_n⟩ with another id v at n, whose expectation under p_n has the gradient Σ_v ∇p_n(v)·⟨∂c/∂e_n,
    e_v⟩: the straight-through estimator with the sum over the codebook in place of a draw. It says what each token does
    to the image, and nothing of what later tokens make of it. `drawn` collects p while the tokens are drawn.
    """

    def __init__(self):
        self.steps, self.vectors, self.codes = [], None, None

    def drawn(self, rows, plan) -> None:
        """The tokens at rows (N, 2) of a step, with log p (N, V) of all ids in its plan."""
        if plan.ids is not None:
            self.steps.append((rows, plan.ids))

    def render(self, tokenizer, ids: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) of ids, differentiable in the codes that they stand for."""
        self.codes = tokenizer.codes().detach()
        self.vectors = self.codes[ids.clamp(min=0)].requires_grad_()
        return blanked(tokenizer.render_codes(self.vectors), ids)

    def loss(self, cost: torch.Tensor) -> torch.Tensor:
        """Σ over tokens and ids of p·⟨∂c/∂e, e_v⟩ for the costs (B,) of the images; 0 where no p has a gradient."""
        if not self.steps:
            return cost.new_zeros(())
        (slopes,) = torch.autograd.grad(cost.sum(), self.vectors)
        slopes = slopes.flatten(1, -2)  # (B, L, C)
        total = cost.new_zeros(())
        for rows, log_probs in self.steps:
            image, place = rows.to(slopes.device).unbind(dim=1)
            total = total + (log_probs.exp() * (slopes[image, place] @ self.codes.T)).sum()
        return total


def score_loss(cost, log_prob) -> torch.Tensor:
    """Σ log P·(c − mean) / deviation of costs c (b,) and log P (b,): its gradient is that of the score function.

    Mean and deviation are over the micro-batches of all processes.
    """
    cost = cost.detach()
    count, total = dist.all_sum(torch.stack([torch.ones_like(cost).sum(), cost.sum()]))
    shifted = cost - total / count
    deviation = (dist.all_sum(shifted.square().sum()) / count).sqrt()
    advantage = shifted / deviation.clamp(min=1e-12)
    return (log_prob * advantage).sum().to(cost.dtype)
