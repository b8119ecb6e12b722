"""One training step's forward pass: the diffusion loss and, with learned heads, theirs (DESIGN.md section 4).

Legend: B images, L tokens an image, N token rows in all, m noise levels each, C channels, D width of z, n tokens
unknown now, K = num_iter. `mask` (B, L) bool is True where a token is masked. draws is a
`training.objectives.draws.TrainingDraws`.
"""

import functools

import torch
from torch import nn

from diffusion import gaussian
from diffusion.schedule import cosine_schedule
from heads.policy import PolicyHeads, base_scores
from heads.rules import whole_group
from heads.schedules import CFGS, GROUPS, RuleOptions
from heads.step import StepState
from training.objectives.head_losses import (
    HeadLossConfig,
    budget_loss,
    comparable,
    guidance_loss,
    order_and_size_losses,
)


def training_state(draws, z=None, mask=None) -> StepState:
    """The StepState of training images; the step is the one drawn, else the one that fits the mask best.

    A published mask belongs to the step of a cosine schedule of num_iter steps that meets as many unknown tokens, or
    comes nearest to it.
    """
    mask = draws.mask if mask is None else mask
    length, step = mask.shape[1], draws.step
    n = mask.sum(dim=1)
    if step is None:
        step = torch.tensor([_nearest_step(length, k, c) for k, c in zip(draws.num_iter.tolist(), n.tolist())])
    return StepState(
        step=step,
        num_iter=draws.num_iter,
        mask=mask,
        num_unknown=n.float(),
        num_start=torch.full_like(n, length, dtype=torch.float32),
        gumbel=draws.gumbel,
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


class HeadPlan:
    """What the heads say about a batch of training masks, and the losses that follow from it.

    tau and w are (B, 1) or (B, L), None where not learned; tau has its gradient for the diffusion loss to reach.
    options: order_noise and order_base are those of sampling.
    """

    def __init__(self, heads, config: HeadLossConfig, options: RuleOptions, draws, z):
        self.heads, self.config, self.options, self.rows = heads, config, options, draws.rows
        self.state = training_state(draws, z)
        self.scale = draws.cfg  # (B,), the guidance scale of the image's schedule
        self.base_k = base_group(self.state)
        self.k = heads.group_size(self.state, self.base_k, self.scale) if "group" in heads.learn else self.base_k
        self.tau = self.w = None
        if "tau" in heads.learn:
            self.tau = heads.temperature(self.state, torch.ones_like(self.scale).unsqueeze(1), self.scale)
        if "cfg" in heads.learn:
            after = self.state.num_unknown - self.k.detach().round()
            base = CFGS["linear"](self.state, after, RuleOptions(cfg=self.scale.unsqueeze(1)))
            self.w = heads.guidance(self.state, base, self.scale)

    def losses(self, token_loss, t, repeats) -> dict[str, torch.Tensor]:
        """The losses order, size, budget of the heads there are, from the diffusion losses (m·N,), detached."""
        found = {}
        mask = self.state.mask
        if needs_every_loss(self.heads):
            rows = comparable(token_loss, t).reshape(repeats, -1).mean(dim=0)  # (N,)
            difficulty = rows.new_zeros(mask.numel()).index_copy(0, self.rows, rows).view(mask.shape)
            scores = base_scores(self.state, self.options)
            if "order" in self.heads.learn:
                scores = scores + self.heads.logits(self.state, self.scale)
            found["order"], size = order_and_size_losses(scores, self.k, mask, difficulty, self.config)
            if "order" in self.heads.learn:
                found["size"] = size
        if "group" in self.heads.learn:
            found["budget"] = budget_loss(self.k, self.base_k)
        return found

    def statistics(self) -> dict[str, torch.Tensor]:
        """Mean and spread of ρ, τ and w, and the mean of k / k_cosine, of the heads there are."""
        values = {"tau": self.tau, "w": self.w}
        if "group" in self.heads.learn:
            values["rho"] = self.k / self.state.num_unknown
            values["k_over_cosine"] = self.k / self.base_k
        found = {}
        for name, value in values.items():
            if value is not None:
                found[f"{name}_mean"] = value.detach().mean()
                found[f"{name}_std"] = value.detach().std(correction=0)
        return found


def needs_every_loss(heads: PolicyHeads | None) -> bool:
    """Do the losses of these heads compare all masked tokens, targets or not?"""
    return heads is not None and bool({"order", "group"} & set(heads.learn))


class TrainingLoss(nn.Module):
    """What DistributedDataParallel wraps: one forward pass that returns every loss, the heads' included."""

    def __init__(
        self,
        mar,
        heads: PolicyHeads | None = None,
        config: HeadLossConfig = HeadLossConfig(),  # noqa: B008
        options: RuleOptions = RuleOptions(),  # noqa: B008
    ):
        super().__init__()
        self.mar = mar
        self.heads = heads
        self.config = config
        self.options = options

    def train(self, mode: bool = True):
        """As ever, but what is wholly frozen stays in eval mode: its dropout would only be noise."""
        super().train(mode)
        for part in self.mar.children():
            if mode and not any(p.requires_grad for p in part.parameters()):
                part.eval()
        return self

    def forward(self, tokens, labels, draws, num_targets) -> dict[str, torch.Tensor]:
        """Sums over the target tokens of tokens (b, L, C) divided by num_targets, the number they are a mean over.

        Only the rows that draws names go through the diffusion MLP, those that are no targets without gradient. Keys:
        loss (the one to minimise), mse, vb, and with heads their losses and the mean and spread of what they say.
        """
        z = self.mar.encode_decode(tokens, draws.mask, labels, draws.num_visible)
        repeats = len(draws.t)

        def to_rows(x):  # (b, L, …) -> (m·N, …), the rows
            return x.flatten(0, 1)[draws.rows].repeat(repeats, *[1] * (x.dim() - 2))

        plan = None
        if self.heads is not None and not draws.heads_rest:
            plan = HeadPlan(self.heads, self.config, self.options, draws, z)
        tau = to_rows(plan.tau.expand(draws.mask.shape)) if plan and plan.tau is not None else None
        target, noise, t = to_rows(tokens), draws.noise.flatten(0, 1), draws.t.flatten()
        x_t = self.mar.diffloss.noised(target, t, noise, tau)
        eps, v = self._predict(x_t, t, to_rows(z), repeats, draws.num_targets)
        mse, vb = gaussian.training_losses(cosine_schedule(), target, x_t, t, noise, eps, v)
        learned = {name: x.view(repeats, -1)[:, : draws.num_targets] for name, x in (("mse", mse), ("vb", vb))}
        terms = {name: x.sum() / (repeats * num_targets) for name, x in learned.items()}
        loss = terms["mse"] + terms["vb"]
        if plan:
            found = plan.losses((mse + vb).detach(), t, repeats)
            if plan.w is not None:
                eps_u = self._unconditional(tokens, draws, x_t, t, to_rows)
                keep = to_rows((labels >= 0).unsqueeze(1).expand(draws.mask.shape))
                w = to_rows(plan.w.expand(draws.mask.shape))
                found["cfg"] = guidance_loss(w, eps.detach(), eps_u, noise, keep)
            loss = loss + sum(getattr(self.config, f"lambda_{name}") * value for name, value in found.items())
            terms |= found | plan.statistics()
        elif self.heads is not None:  # DistributedDataParallel waits for a gradient of every parameter
            loss = loss + 0.0 * sum(p.sum() for p in self.heads.parameters())
        return {"loss": loss, **{name: value.detach() for name, value in terms.items()}}

    def _predict(self, x_t, t, z, repeats, num_targets):
        """(ε, v) of all rows (m·N, C); of the first num_targets of each N with gradient, of the others without."""
        index = torch.arange(len(x_t), device=x_t.device).view(repeats, -1)
        parts = [part.flatten() for part in (index[:, :num_targets], index[:, num_targets:])]
        if not len(parts[1]):
            return self.mar.diffloss.predict(x_t, t, z)
        found = []
        for part, learned in zip(parts, (True, False)):
            with torch.set_grad_enabled(learned and torch.is_grad_enabled()):
                found.append(self.mar.diffloss.predict(x_t[part], t[part], z[part]))
        place = torch.cat(parts).argsort()
        return tuple(torch.cat(values)[place] for values in zip(*found))

    @torch.no_grad()
    def _unconditional(self, tokens, draws, x_t, t, to_rows):
        """ε_u (m·N, C) on the same noisy tokens: the one extra pass, and only where guidance is learned."""
        z = self.mar.encode_decode(tokens, draws.mask, None, draws.num_visible)
        return self.mar.diffloss.predict(x_t.detach(), t, to_rows(z))[0]
