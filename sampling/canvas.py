"""The tokens of a batch while it is sampled: what is known, what is random, and what a step has chosen.

Legend: B images, B' of them unfinished, L tokens an image, C channels a token, D width, N tokens drawn in a step, G of
them guided, V ids. `mask` (B, L) bool is True where a token is unknown. It lives on the host, so that shapes are known
there: one copy a step, of the plan, keeps it current.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from heads.orders import is_known_ahead
from heads.step import StepPlan, StepState
from util.dist import send
from util.rng import generator


class Chosen(NamedTuple):
    """The tokens of a step.

    rows (N, 2) long on the host: (image, position), row-major. guided (G,) long on the host: the rows with w ≠ 1.
    tau (N,) on the device; cfg (N,) on the device, or the number 1.0 where no row is guided. num_steps and profile are
    the plan's, its tensors (N,). judged: ids of which log p is asked for.
    """

    rows: torch.Tensor
    guided: torch.Tensor
    tau: torch.Tensor
    cfg: torch.Tensor | float
    num_steps: int
    profile: Callable | None
    judged: bool

    def draw(self, sampler, z, z_uncond, noise, recompute: bool):
        """(tokens (N, …), where they are judged log p of all ids (N, V), else None) of a `models.token_head.Sampler`.

        z (N, D), z_uncond (G, D) or None; recompute: keep no activations, the backward pass computes them again.
        """
        call = partial(checkpoint, use_reentrant=False) if recompute else _call
        some = self._some(z.device)
        options = dict(guided=some, profile=self.profile)
        drawn = call(sampler.draw, z, z_uncond, self.cfg, self.tau, noise, self.num_steps, **options)
        if not self.judged:
            return drawn, None
        return drawn, call(sampler.log_probs, z, z_uncond, self.cfg, self.tau, guided=some)

    def mixture(self, sampler, z, z_uncond, noise, state: StepState) -> torch.Tensor:
        """Weights (N, V) of the codes, of a sampler of ids, at the step of this state."""
        share = state.step / max(state.num_iter - 1, 1)
        return sampler.mixture(z, z_uncond, self.cfg, self.tau, noise, share, guided=self._some(z.device))

    def _some(self, device) -> torch.Tensor | None:
        """`guided` on the device; None where that is all rows, or none."""
        return None if len(self.guided) in (0, len(self.rows)) else send(self.guided, device)


def _call(function: Callable, *args, **options):
    return function(*args, **options)


class Canvas:
    """The tokens of a batch, what is known of them, and what is random about them.

    tokens (B, L, …) are replaced and never written into, so that gradients pass. unknown (B, L) bool is on the host.
    gumbel (B, L): one Gumbel draw a token, which make the image's random order. orders (B, L) long: positions in that
    order, in the one given or, where it is known ahead, in that of the rules; the first revealed first.
    """

    def __init__(self, empty, tokens, mask, seeds, orders):
        _check_images(empty.shape, seeds, orders, tokens, mask)
        shape, device = empty.shape[:2], empty.device
        known = tokens is not None
        self.tokens = send(tokens.to(empty.dtype), device) if known else empty
        self.unknown = mask.to("cpu", torch.bool, copy=True) if known else torch.ones(shape, dtype=torch.bool)
        self.broken = torch.zeros(shape[0], dtype=torch.bool, device=device)  # images of which an id is −1
        if known and not self.tokens.is_floating_point():
            none = (self.tokens < 0) & ~send(mask.bool(), device)
            self.broken, self.tokens = none.any(dim=1), self.tokens.clamp(min=0)
        self.num_start = self.unknown.sum(dim=1).float()  # (B,), M
        if seeds is None:
            seeds = torch.randint(0, 2**32, (shape[0],)).tolist()
        self.generators = [generator(seed) for seed in seeds]
        self.gumbel = send(torch.stack([_gumbel(shape[1], g) for g in self.generators]), device)
        self.orders = self.gumbel.argsort(dim=1, descending=True)
        self.ahead = None  # (rows, noise) of the step, where `make_noise` made it
        if orders is not None:
            self.orders = send(torch.as_tensor(orders), device).flip(1)

    def published_order(self, state: StepState) -> torch.Tensor:
        """Scores (B', L) of the orders given."""
        return -torch.argsort(self.orders, dim=1).float()[state.images]

    def ordered(self, rules, given: bool):
        """The rules that follow the orders, if these were given; else the orders follow the rules, if known ahead."""
        if given:
            return replace(rules, order=self.published_order)
        if is_known_ahead(rules.order):
            on_host = self.host_state(0, 1, torch.arange(len(self.unknown)), None, (1, 1))
            self.orders = rules.order(self.state(on_host, None, None)).argsort(dim=1, descending=True, stable=True)
        return rules

    def make_noise(self, sampler, counts, images, num_steps: int) -> None:
        """Make the noise of counts (B',) tokens of the images while the device still computes z; None: not yet."""
        self.ahead = None
        if counts is not None and counts.any() and self.tokens.device.type != "mps":  # which rounds sizes in float32
            rows = torch.stack([images, torch.zeros_like(images)], dim=1).repeat_interleave(counts.long(), dim=0)
            self.ahead = rows, send(sampler.noise(self.generators, rows, num_steps), self.tokens.device)

    def noise(self, sampler, noise_fn, step: int, rows, num_steps: int) -> torch.Tensor:
        """What the sampler draws the tokens at rows (N, 2) with, or what noise_fn(step, rows) gives, on the device."""
        if self.ahead is not None:
            expected, noise = self.ahead
            if not torch.equal(expected[:, 0], rows[:, 0]):
                said, chosen = (x[:, 0].bincount(minlength=len(self.unknown)).tolist() for x in (expected, rows))
                raise RuntimeError(f"tokens of each image: {said} by the group rule on the host, {chosen} were chosen")
            return noise
        noise = noise_fn(step, rows) if noise_fn else sampler.noise(self.generators, rows, num_steps)
        return send(noise, self.tokens.device)

    def check_finished(self, num_iter: int, num_taken: int | None = None) -> None:
        """Raise ValueError if so many steps have left tokens unknown, unless only some were to be taken."""
        if num_taken is None and self.unknown.any():
            raise ValueError(f"num_iter {num_iter} is too small: {int(self.unknown.sum())} tokens are left to draw")

    def steps(self, num: int) -> Iterator[tuple[int, torch.Tensor]]:
        """(step, images (B',) long on the host with unknown tokens) of so many steps, or until no image has any."""
        for step in range(num):
            images = self.unknown.any(dim=1).nonzero().squeeze(1)
            if not len(images):
                return
            yield step, images

    def host_state(self, step, num_iter, images, positions, num_steps) -> StepState:
        """What the rules see, as far as it is known on the host, before z is computed: without z and gumbel.

        Where z is of some positions (B', P) only, these are the ones to choose from.
        """
        unknown = mask = self.unknown[images]
        if positions is not None:
            mask = unknown & torch.zeros_like(unknown).scatter(1, positions, True)
        return StepState(
            step=step,
            num_iter=num_iter,
            mask=mask,
            num_unknown=unknown.sum(dim=1).float(),
            num_start=self.num_start[images],
            gumbel=None,
            z=None,
            images=images,
            num_steps=num_steps,
        )

    def state(self, on_host: StepState, z, positions) -> StepState:
        """What the rules see: the same on the device, with z (B', P, D) at positions (B', P) spread over all L."""
        device = self.tokens.device
        if positions is not None:
            places = send(positions, device).unsqueeze(-1).expand(-1, -1, z.shape[-1])
            z = z.new_zeros(*on_host.mask.shape, z.shape[-1]).scatter(1, places, z)
        parts = {name: send(getattr(on_host, name), device) for name in ("mask", "num_unknown", "num_start", "images")}
        return replace(on_host, gumbel=self.gumbel[parts["images"]], z=z, **parts)

    def select(self, plan: StepPlan, images) -> Chosen:
        """The tokens that the plan (B', L) for these images selects; the one wait for the device of a step.

        A w that has a gradient is computed with where it is 1 too.
        """
        acts = torch.ones_like(plan.select) if plan.cfg.requires_grad else plan.cfg != 1.0
        select, guided = torch.stack([plan.select, plan.select & acts]).cpu()
        rows = select.nonzero()  # (N, 2), row-major
        guided = guided[rows[:, 0], rows[:, 1]].nonzero().squeeze(1)  # (G,)
        row, column = send(rows, self.tokens.device).unbind(dim=1)
        cfg = plan.cfg[row, column] if len(guided) else 1.0
        rows = torch.stack([images[rows[:, 0]], rows[:, 1]], dim=1)
        profile = plan.profile and of_rows(plan.profile, row)
        judged = plan.looks_at_ids and not self.tokens.is_floating_point()
        return Chosen(rows, guided, plan.tau[row, column], cfg, plan.num_steps, profile, judged)

    def judged(self, rules, state: StepState, plan: StepPlan, images, rows, drawn, log_probs, local: bool):
        """(plan, rows, drawn) when ids are drawn (N,) at rows (N, 2) with log p (N, V): what the rules keep of them.

        Where log p has a gradient the plan has it and, unless it is local, its sum for each image is added to the
        plan's. images (B',) are those of the plan.
        """
        log_prob = log_probs.gather(1, drawn.clamp(min=0).unsqueeze(1)).squeeze(1)
        place = torch.searchsorted(images, rows[:, 0].contiguous()), rows[:, 1]  # on the host
        index = send(torch.stack(place), log_prob.device).unbind()
        spread = torch.zeros_like(plan.tau).index_put(index, log_prob)  # (B', L)
        if log_prob.requires_grad:
            plan = replace(plan, ids=log_probs)
        if log_prob.requires_grad and not local:
            of_images = spread.sum(dim=1)
            plan = replace(plan, log_prob=of_images if plan.log_prob is None else plan.log_prob + of_images)
        if plan.keep is None:
            return plan, rows, drawn
        draws = torch.stack([_gumbel(plan.tau.shape[1], self.generators[i]) for i in images.tolist()])
        plan = rules.after_draw(state, plan, spread.detach(), send(draws, spread.device))
        keep = plan.select.cpu()[place].nonzero().squeeze(1)  # on the host: to index by bools waits for the device
        there = send(keep, drawn.device)
        if plan.ids is not None:
            plan = replace(plan, ids=plan.ids[there])
        return plan, rows[keep], drawn[there]

    def renew(self, images, gumbel) -> None:
        """Replace the draws of these images by gumbel (B', L); None: keep them."""
        if gumbel is not None:
            index = send(images, self.gumbel.device)
            self.gumbel = self.gumbel.to(gumbel.dtype).index_copy(0, index, gumbel)

    def write(self, rows, drawn) -> torch.Tensor:
        """drawn (N, …) are the tokens at rows (N, 2); returned with id 0 where none could be drawn."""
        place = send(rows, self.tokens.device).unbind(dim=1)
        if not drawn.is_floating_point():
            none = torch.zeros_like(self.tokens, dtype=torch.bool).index_put(place, drawn < 0)
            self.broken, drawn = self.broken | none.any(dim=1), drawn.clamp(min=0)
        self.tokens = self.tokens.index_put(place, drawn.to(self.tokens.dtype))
        self.unknown[rows[:, 0], rows[:, 1]] = False
        return drawn

    def result(self) -> torch.Tensor:
        """The tokens (B, L, …), those of a broken image −1."""
        if self.tokens.is_floating_point():
            return self.tokens
        return self.tokens.masked_fill(self.broken.unsqueeze(1), -1)


def _gumbel(length: int, generator: torch.Generator) -> torch.Tensor:
    """Gumbel draws (L,): minus the log of exponential ones."""
    return -torch.empty(length).exponential_(generator=generator).log()


def of_rows(profile: Callable, image: torch.Tensor) -> Callable:
    """A profile that gives a float or one number for each of B' images, as one that gives a float or one for each row.

    image (N,) long says which of the B' images each row belongs to.
    """

    def per_row(share):
        m = profile(share)
        return m.flatten()[image] if isinstance(m, torch.Tensor) and m.dim() else m

    return per_row


def _check_images(shape, seeds, orders, tokens, mask):
    """Raise ValueError for what does not fit tokens of the shape (B, L, …)."""
    if seeds is not None and len(seeds) != shape[0]:
        raise ValueError(f"seeds must be one int for each of the {shape[0]} labels, got {len(seeds)}")
    positions = torch.arange(shape[1]).expand(tuple(shape[:2]))
    if orders is not None and not torch.equal(torch.sort(torch.as_tensor(orders))[0].cpu(), positions):
        raise ValueError(f"orders must be {tuple(shape[:2])}, each row a permutation of the positions")
    if (tokens is None) != (mask is None):
        raise ValueError("tokens and mask go together: give both or neither")
    if mask is not None and (tuple(mask.shape) != tuple(shape[:2]) or tuple(tokens.shape) != tuple(shape)):
        raise ValueError(f"mask must be {tuple(shape[:2])} and tokens {tuple(shape)}")
