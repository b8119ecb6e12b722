"""All that is random about a training batch, drawn image by image from named seeds.

Legend: b images, L tokens an image, N rows (tokens that the token head sees) in all, m draws of the token head for
each (for the diffusion loss m = diffusion_batch_mul noise levels).
"""

import math
from dataclasses import dataclass, replace

import torch
from scipy.special import ndtr, ndtri

from models.mask_schedules import draw_mask
from util.dist import send
from util.rng import generator, seed_of


def _moved(draws, device, keep=()):
    """A dataclass with its tensors on the device, but for the fields to keep where they are."""
    values = {k: v for k, v in vars(draws).items() if isinstance(v, torch.Tensor) and k not in keep}
    return replace(draws, **{k: send(v, device) for k, v in values.items()})


@dataclass(frozen=True)
class TokenDraws:
    """The tokens that go through the token head, targets of its loss first."""

    rows: torch.Tensor  # (N,) long, as image·L + position
    draws: dict[str, torch.Tensor]  # `TokenHead.draws`, each (m, N, …)
    num_others: int = 0  # of the last rows, which heads compare with the others and the loss leaves out

    @property
    def num_targets(self) -> int:
        """Number of rows that the loss is a mean over."""
        return len(self.rows) - self.num_others

    def to(self, device) -> "TokenDraws":
        """The same on a device."""
        return _moved(replace(self, draws={k: send(v, device) for k, v in self.draws.items()}), device)

    def narrowed(self, targets, others) -> "TokenDraws":
        """Of draws for every token those of targets (b, L) bool, then those of others (b, L) bool."""
        parts = [part.flatten().nonzero().squeeze(1) for part in (targets, others & ~targets)]
        rows = torch.cat(parts)
        return TokenDraws(rows, {k: v[:, rows] for k, v in self.draws.items()}, num_others=len(parts[1]))


@dataclass(frozen=True)
class PolicyDraws:
    """What learned heads, and masks that a schedule visits, need of b images."""

    gumbel: torch.Tensor  # (b, L)
    num_iter: torch.Tensor  # (b,) long, on the CPU
    cfg: torch.Tensor  # (b,)
    place: torch.Tensor  # (b,) in [0, 1): how far through its schedule the image is
    mix: torch.Tensor  # (b,) in [0, 1): a share of the images keeps its random mask
    step: torch.Tensor | None = None  # (b,) long, on the CPU: the step that meets this mask, where that is known
    heads_rest: bool = False  # heads say nothing yet, hand-made rules decide

    def to(self, device) -> "PolicyDraws":
        """The same on a device."""
        return _moved(self, device, keep=("num_iter", "step"))


@dataclass(frozen=True)
class Draws:
    """The draws of b training images."""

    flip: torch.Tensor  # (b,) bool: mirror the image
    drop: torch.Tensor  # (b,) bool: train without the label
    mask: torch.Tensor  # (b, L) bool, True = masked
    orders: torch.Tensor  # (b, L) long, positions in a random order in which the tokens that are not masked come first
    num_visible: list[int]  # (b) tokens that are not masked
    tokens: TokenDraws
    policy: PolicyDraws | None = None
    posterior: torch.Tensor | None = None  # (b, c, h, w) normal draws of the tokenizer's posterior, if it has one

    def to(self, device) -> "Draws":
        """The same draws with their tensors on a device."""
        policy = None if self.policy is None else self.policy.to(device)
        return _moved(replace(self, tokens=self.tokens.to(device), policy=policy), device)

    def for_device(self, device: torch.device) -> "Draws":
        """The same, what is large in memory from which a GPU, if it is one, copies while it computes."""
        if device.type != "cuda":
            return self
        draws = {name: value.pin_memory() for name, value in self.tokens.draws.items()}
        posterior = None if self.posterior is None else self.posterior.pin_memory()
        return replace(self, tokens=replace(self.tokens, draws=draws), posterior=posterior)

    def first(self, num: int) -> "Draws":
        """Those of the first num tokens of each image."""
        length, rows = self.mask.shape[1], self.tokens.rows
        kept = rows % length < num
        rows = rows[kept] // length * num + rows[kept] % length
        tokens = TokenDraws(rows, {name: value[:, kept] for name, value in self.tokens.draws.items()})
        mask = self.mask[:, :num]
        return replace(self, mask=mask, num_visible=(~mask).sum(dim=1).tolist(), tokens=tokens)

    def with_mask(self, mask, step, targets, others=None) -> "Draws":
        """Draws that were made for every token, narrowed to another mask (b, L) that is met at step (b,).

        targets (b, L) bool: what the backbone learns; others (b, L) bool: what heads compare with it.
        """
        tokens = self.tokens.narrowed(targets, torch.zeros_like(targets) if others is None else others)
        policy = None if self.policy is None else replace(self.policy, step=step)
        num_visible = (~mask).sum(dim=1).tolist()
        orders = self.orders.gather(1, mask.gather(1, self.orders).to(torch.uint8).argsort(dim=1, stable=True))
        return replace(self, mask=mask, orders=orders, num_visible=num_visible, tokens=tokens, policy=policy)


class RowsOf:
    """The rows that go through the token head: m times N of b·L tokens, and its draws for them, each (m·N, …)."""

    def __init__(self, draws: Draws):
        self.tokens, self.shape = draws.tokens, draws.mask.shape
        self.repeats = max((len(value) for value in draws.tokens.draws.values()), default=1)  # m
        self.draws = {name: value.flatten(0, 1) for name, value in draws.tokens.draws.items()}

    def __call__(self, x) -> torch.Tensor:
        """x (b, L, …) as (m·N, …)."""
        return x.flatten(0, 1)[self.tokens.rows].repeat(self.repeats, *(1 for _ in x.shape[2:]))

    def spread(self, x) -> torch.Tensor:
        """x (b, 1) or (b, L), one value an image or a token, as (m·N,)."""
        return self(x.expand(self.shape))

    def targets(self, x) -> torch.Tensor:
        """Of x (m·N,) the targets of the loss (m, ·)."""
        return x.view(self.repeats, -1)[:, : self.tokens.num_targets]

    def mean(self, x, num_targets) -> torch.Tensor:
        """Of x (m·N,) the sum over the targets as a mean over num_targets tokens."""
        return self.targets(x).sum() / (self.repeats * num_targets)

    def reported(self, losses: dict, measures: dict, tail: int, num_targets) -> dict[str, torch.Tensor]:
        """Means of the measures (m·N,); of an image's last `tail` tokens, if any, those of losses too: <name>_tail."""
        means = {name: self.mean(x, num_targets) for name, x in measures.items()}
        if not tail:
            return means
        length = self.shape[1]
        last = torch.arange(length, device=self.tokens.rows.device) >= length - tail
        last = self.spread(last.float().unsqueeze(0))
        for name, x in (losses | measures).items():
            means[f"{name}_tail"] = self.mean(x.detach() * last, num_targets) * length / tail
        return means

    def with_and_without_gradient(self) -> list[torch.Tensor]:
        """Indices into m·N rows: those of the targets, and the others."""
        index = torch.arange(self.repeats * len(self.tokens.rows), device=self.tokens.rows.device)
        index = index.view(self.repeats, -1)
        return [part.flatten() for part in index.split([self.tokens.num_targets, self.tokens.num_others], dim=1)]


@dataclass(frozen=True)
class DrawSettings:
    """What `training_draws` draws from.

    num_iter, the range of steps that is trained for, adds what heads and visited masks need, with K log-uniform in it
    and cfg uniform in [1, cfg_max]; the other draws are the same with or without it. every_token: the token head's
    draws for all tokens, for a mask that is not known yet. mask_schedule: a row of `models.mask_schedules.MASK_RATIOS`,
    whose masks take the place of MAR's; with num_iter, of an image whose mask would be empty one token is masked.
    loss_tokens: "masked" or "all", which tokens are targets. posterior: shape (c, h, w) of an image's draws for the
    posterior of its tokenizer.
    """

    seq_len: int
    mask_ratio_min: float
    label_drop_prob: float
    mask_ratio_per_image: bool = False
    num_iter: tuple[int, int] | None = None
    cfg_max: float = 1.0
    every_token: bool = False
    mask_schedule: str | None = None
    loss_tokens: str = "masked"
    posterior: tuple[int, int, int] | None = None


def training_draws(seed: int, step: int, samples: list[int], token_head, settings: DrawSettings) -> Draws:
    """Draws for the dataset items `samples` in optimizer step `step`; token_head: a `models.token_head.TokenHead`.

    The mask ratio comes from (seed, step), all else from (seed, step, sample): the same image gets the same draws
    whatever the number of processes or its place in the batch.
    """
    length = settings.seq_len
    shared = torch.rand((), generator=generator(seed_of("mask ratio", seed, step))).item()
    mask = torch.zeros(len(samples), length, dtype=torch.bool)
    flip, drop, orders, rows, draws, policy = [], [], [], [], [], []
    for i, sample in enumerate(samples):
        g = generator(seed_of("train", seed, step, sample))
        uniform = torch.rand(3, generator=g).tolist()
        flip.append(uniform[0] < 0.5)
        drop.append(uniform[1] < settings.label_drop_prob)
        masked, visible = _split(uniform[2], shared, g, settings)
        orders.append(torch.cat([visible, masked]))
        mask[i, masked] = True
        drawn = torch.arange(length) if settings.every_token or settings.loss_tokens == "all" else masked
        rows.append(drawn + i * length)
        draws.append(token_head.draws(g, len(drawn)))
        if settings.num_iter is not None:
            policy.append((-torch.empty(length).exponential_(generator=g).log(), torch.rand(4, generator=g)))
    joined = {name: torch.cat([part[name] for part in draws], dim=1) for name in draws[0]}
    return Draws(
        flip=torch.tensor(flip),
        drop=torch.tensor(drop),
        mask=mask,
        orders=torch.stack(orders),
        num_visible=(~mask).sum(dim=1).tolist(),
        tokens=TokenDraws(torch.cat(rows), joined),
        policy=_policy_draws(policy, settings) if policy else None,
        posterior=_posterior_draws(seed, step, samples, settings.posterior) if settings.posterior else None,
    )


def _split(own: float, shared: float, g: torch.Generator, settings: DrawSettings):
    """Positions of an image that are masked, and the others, each in random order.

    own, shared: uniform draws of the image and of the step.
    """
    length = settings.seq_len
    if settings.mask_schedule is None:
        ratio = mask_ratio(own if settings.mask_ratio_per_image else shared, settings.mask_ratio_min)
        return torch.randperm(length, generator=g).tensor_split([math.ceil(length * ratio)])
    u, order = torch.rand(1, length, generator=g), torch.randperm(length, generator=g)
    mask = draw_mask(settings.mask_schedule, torch.tensor([own]), u)[0]
    if settings.num_iter is not None and not mask.any():  # rules choose from masked tokens
        mask[u[0].argmin()] = True
    mask = mask[order]
    return order[mask], order[~mask]


def _posterior_draws(seed: int, step: int, samples: list[int], shape) -> torch.Tensor:
    seeds = [seed_of("posterior", seed, step, sample) for sample in samples]
    return torch.stack([torch.randn(shape, generator=generator(s)) for s in seeds])


def _policy_draws(drawn, settings: DrawSettings) -> PolicyDraws:
    """Of each image's (gumbel (L,), four uniform numbers)."""
    gumbel, uniform = (torch.stack(parts) for parts in zip(*drawn))
    share, cfg, place, mix = uniform.unbind(dim=1)
    num_iter = torch.tensor([log_uniform(u, *settings.num_iter) for u in share.tolist()])
    return PolicyDraws(gumbel, num_iter, 1 + (settings.cfg_max - 1) * cfg, place, mix)


def log_uniform(uniform: float, low: int, high: int) -> int:
    """A whole number in [low, high], k with probability proportional to log((k + 1) / k)."""
    return min(high, int(low * ((high + 1) / low) ** uniform))


def mask_ratio(uniform: float, minimum: float) -> float:
    """A draw, by its inverse, of the normal distribution (mean 1, std 0.25) truncated to [minimum, 1] (MAGE, MAR)."""
    low = ndtr((minimum - 1.0) / 0.25)
    return float(min(max(1.0 + 0.25 * ndtri(low + uniform * (0.5 - low)), minimum), 1.0))
