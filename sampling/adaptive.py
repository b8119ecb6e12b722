"""Are learned rules adaptive, or schedules? (docs/heads.md)

What of τ and w differs between steps, images and tokens; and heads that say the same about all images of a step.

Legend: B images of a batch, B' of them unfinished, L tokens an image.
"""

import copy
from collections import defaultdict
from dataclasses import replace

import torch

from heads.policy import PolicyHeads
from sampling.loop import generate
from util import dist
from util.rng import seed_of

NUM_RECORDED = 256  # images whose mean stands for all


def without_adaptive(parts, sampling) -> PolicyHeads:
    """Heads like those of `sampling.run.Parts`, whose adaptive part is its mean at each step.

    The mean is over unknown tokens of 256 images, classes in turn, sampled with the heads as they are: a function of
    weights and settings alone.
    """
    said, heads = defaultdict(list), copy.copy(parts.heads)

    def record(name, state, a):
        said[name, state.step].append((a * state.mask).sum() / state.mask.sum())
        return a

    heads.adaptive = record
    labels = torch.arange(NUM_RECORDED) % parts.model.config.class_num
    with dist.autocast(parts.device, parts.dtype):
        generate(
            parts.model,
            labels,
            replace(sampling, heads_adaptive="on").rules(heads),
            num_iter=sampling.num_iter,
            num_steps=sampling.num_sampling_steps,
            seeds=[seed_of("adaptive", i) for i in range(NUM_RECORDED)],
            clip=parts.tokenizer.clip,
            tokenizer=parts.tokenizer,
            refresh_every=sampling.refresh_every,
            **sampling.token_head_options(),
        )
    means = {key: torch.stack(values).mean() for key, values in said.items()}

    def recall(name, state, a):
        # a step that no recorded image reached has nothing to say
        return torch.zeros_like(a) + means.get((name, state.step), 0.0)

    heads = copy.copy(parts.heads)
    heads.adaptive = recall
    return heads


class Spread:
    """The variance of τ and w over steps, images and tokens, collected by a callback of `generate`.

    names: those of tau and w that are learned. Steps, the images of a step and the tokens that an image draws in it
    weigh the same: total variance = variance over steps of the mean over images, plus the mean over steps of that over
    images, plus the mean over both of that over tokens.
    """

    def __init__(self, names):
        self.names, self.pending = tuple(names), []
        self.sums = defaultdict(lambda: torch.zeros(4, dtype=torch.float64))  # images, Σ mean, Σ mean², Σ variance

    def record(self, step: int, plan) -> None:
        """The values of a step's plan (B', L) at the tokens that it selects; nothing waits for the device."""
        chosen = plan.select.float()
        number = chosen.sum(dim=1).clamp(min=1)
        for name in self.names:
            value = {"tau": plan.tau, "w": plan.cfg}[name]
            mean = (value * chosen).sum(dim=1) / number
            variance = ((value - mean.unsqueeze(1)).square() * chosen).sum(dim=1) / number
            self.pending.append((name, step, mean, variance))

    def end_batch(self) -> None:
        """Add up what was recorded."""
        for name, step, mean, variance in self.pending:
            mean, variance = mean.double().cpu(), variance.double().cpu()
            sums = (torch.ones_like(mean), mean, mean.square(), variance)
            self.sums[name, step] += torch.stack([x.sum() for x in sums])
        self.pending = []

    def report(self, num_iter: int, device) -> dict:
        """{name_variance: {total, steps, images, tokens}} summed over the processes; the last three are shares."""
        report = {}
        for name in self.names:
            sums = torch.stack([self.sums[name, step] for step in range(num_iter)])
            sums = (
                dist.all_sum(sums.to(device, torch.float32) if device.type == "mps" else sums.to(device)).double().cpu()
            )
            if (sums[:, 0] > 0).any():
                report[f"{name}_variance"] = shares_of(sums)
        return report


def shares_of(sums: torch.Tensor) -> dict[str, float]:
    """{total, steps, images, tokens} of sums (K, 4): images of a step and, over them, Σ mean, Σ mean², Σ variance.

    Mean and variance are those over the tokens that an image draws in the step. Steps without images do not count.
    """
    sums = sums[sums[:, 0] > 0]
    mean, squares, variance = (sums[:, 1:] / sums[:, :1]).unbind(dim=1)  # of each step
    parts = {
        "steps": mean.var(correction=0),
        "images": (squares - mean.square()).clamp(min=0).mean(),
        "tokens": variance.mean(),
    }
    total = sum(parts.values())
    total = total if total > 1e-10 else torch.zeros(())  # less is rounding
    shares = {part: round((value / total).item(), 4) if total > 0 else 0.0 for part, value in parts.items()}
    return {"total": round(total.item(), 6), **shares}
