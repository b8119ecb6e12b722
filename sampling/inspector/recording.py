"""Runs of the sampling loop of which every step is told while it happens, and kept.

Legend: B images, B' of them unfinished, L tokens an image, N tokens drawn in a step, K steps. An event is a dict that
JSON can hold; a run gives one that says what is to come, one a step, and one at the end.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from heads.policy import FLAGS, moved_rule
from heads.rules import Rules, whole_group
from sampling.canvas import of_rows
from sampling.inspector.spec import Spec, tokens_of
from sampling.inspector.steering import Observed, Steered
from sampling.run import SamplingRun
from sampling.settings import SampleConfig
from util.rng import generator, seed_of

MAPS = ("tau", "cfg", "rank", "sure", "logit")  # of each token, by what it was drawn; NaN where that is not known


def hand_made_rules(sampling: SampleConfig) -> Rules:
    """The rules that the learned ones move, and the hand-made ones as they are."""
    resolved, names = sampling.resolved(), {"infer_mode": "baseline"}
    for kind, flag in FLAGS.items():
        name = getattr(resolved, flag)
        learned = name in ("learned", None)
        names[flag] = moved_rule(kind, sampling) if learned else name
    return replace(sampling, **names).rules(None)


@dataclass
class Recording:
    """What a run has made: images uint8 (B, H, W, C), and how.

    order_step (B, L): the step that drew each token, −1 for those known from the start; maps: {name of MAPS: (B, L)};
    steps: those that were taken, over all stages; frames: after each of them uint8 (B, H, W, C), None where drawing it
    would have taken too long; tokens: after each (B, L, …); unknown (L,) bool: tokens unknown at the start; evals:
    {"mar", "mlp"} of an image; events: those of the steps.
    """

    images: np.ndarray
    order_step: np.ndarray
    maps: dict[str, np.ndarray]
    steps: list[int]
    frames: list
    tokens: list
    unknown: np.ndarray
    evals: dict
    events: list[dict]

    @property
    def size(self) -> int:
        """Bytes, about."""
        arrays = [self.images, *(frame for frame in self.frames if frame is not None), *self.maps.values()]
        return sum(array.nbytes for array in arrays) + sum(x.numel() * x.element_size() for x in self.tokens)


class Watch:
    """The callback of a run, which makes the event of each step.

    run: a `sampling.run.SamplingRun`; model: the `Observed` one that it samples; first: steps of the stages before it.
    emit(event) may raise, which ends the run. start (B, L) bool: tokens unknown at its start. frames: whether pictures
    are drawn.
    """

    def __init__(self, spec: Spec, run: SamplingRun, model: Observed, emit: Callable, first: int = 0, frames=True):
        self.spec, self.run, self.model, self.emit, self.first = spec, run, model, emit, first
        self.hand_made = hand_made_rules(spec.sampling)
        self.frames_wanted = frames
        parts, config = run.parts, model.config
        count = len(run.labels)
        mask = run.known["mask"].numpy() if run.known else np.ones((1, config.seq_len), dtype=bool)
        self.start = np.broadcast_to(mask, (count, config.seq_len))
        self.order_step = np.full((count, config.seq_len), -1)
        self.maps = {name: np.full((count, config.seq_len), np.nan, np.float32) for name in MAPS}
        self.frames, self.tokens, self.events = [], [], []
        self.steps = []  # those that were taken; `SamplingRun.latents` asks whether there are any
        options = spec.sampling.token_head_options() | dict(num_steps=spec.sampling.num_sampling_steps)
        self.sampler = parts.model.token_head.sampler(**options, clip=parts.tokenizer.clip)
        self.discrete = parts.model.token_head.discrete
        self.more = [generator(seed_of("sure", spec.seed, first, i)) for i in range(count)]
        heads, resolved = spec.loaded.heads, spec.sampling.resolved()
        self.heads = heads if heads is not None and resolved.order == "learned" else None
        self.drawing, self.painting = 0.0, 0.0
        self.began = time.perf_counter()

    def see(self, state, scores) -> None:
        """Before a step's tokens are drawn: what the rules see, and the scores (B', L) of the tokens."""
        self.state, self.scores = state, scores
        self.logits = self.heads.logits(state, self.spec.sampling.cfg) if self.heads else None

    def see_drawn(self, scores) -> None:
        """The scores (B', L) of an order that looks at what was drawn."""
        self.scores = scores

    def set_postfix_str(self, text: str) -> None:
        """In the place of a progress bar."""

    def record(self, step, rows, plan, tokens) -> None:
        """The callback of `sampling.loop.generate`."""
        seconds = time.perf_counter() - self.began
        self.drawing += seconds
        row_of = {image: row for row, image in enumerate(self.state.images.tolist())}
        image, position = rows.T
        row = torch.tensor([row_of[i] for i in image.tolist()], dtype=torch.long)  # there may be none
        drawn_with = {"tau": plan.tau[row, position], "cfg": plan.cfg[row, position]}
        drawn_with["rank"] = self.ranks()[row, position]
        sure = self.sureness(plan, rows, row, tokens)
        if sure is not None:
            drawn_with["sure"] = sure
        if self.logits is not None:
            drawn_with["logit"] = self.logits[row, position]
        place = tuple(rows.numpy().T)  # not the tensors: numpy takes one of a single number for that number
        self.order_step[place] = self.first + step
        for name, value in drawn_with.items():
            self.maps[name][place] = value.detach().float().cpu().numpy()
        self.steps.append(self.first + step)
        self.tokens.append(tokens.detach().clone())
        self.frames.append(self.frame(tokens))
        evals = {"mar": self.model.last.passes, "mlp": self.run.evals["mlp"]}
        event = {"step": self.first + step, "seconds": round(seconds, 4)}
        event |= {name: round(value / len(self.start), 4) for name, value in evals.items()}
        event["images"] = self.of_images(plan, rows)
        event["frame"] = self.frames[-1]
        self.events.append(event)
        self.emit(event)
        self.began = time.perf_counter()

    def ranks(self) -> torch.Tensor:
        """Of each unknown token (B', L) the place of its score among those unknown, 0 for the highest."""
        scores = self.scores.float().masked_fill(~self.state.mask, -math.inf)
        return scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)

    def of_images(self, plan, rows) -> list[dict]:
        """Of each unfinished image: its tokens of this step with their values, and what the hand-made rules say."""
        state = self.state
        group = whole_group(self.hand_made.group, state).tolist()
        hand_made = self.hand_made(state)
        selected = plan.select.cpu()
        result = []
        for row, image in enumerate(state.images.tolist()):
            positions = selected[row].nonzero().flatten().tolist()
            item = {"image": image, "unknown": int(state.num_unknown[row]), "positions": positions}
            for name in MAPS:
                item[name] = list(map(finite, self.maps[name][image, positions].tolist()))
            base = {"tau": hand_made.tau, "cfg": hand_made.cfg}
            item["base"] = {name: finite(float(value[row].mean())) for name, value in base.items()}
            item["base"]["group"] = int(group[row])
            result.append(item)
        return result

    def sureness(self, plan, rows, row, tokens) -> torch.Tensor | None:
        """Of each row (N, 2) drawn: log p of its id, or the standard deviation over draws besides; None: not asked."""
        asked, guided, z, free = self.model.last.pair
        tau, cfg = plan.tau[row, rows[:, 1]], plan.cfg[row, rows[:, 1]]
        if self.discrete:
            places = {pair: i for i, pair in enumerate(map(tuple, asked.tolist()))}
            kept = torch.tensor([places[pair] for pair in map(tuple, rows.tolist())], dtype=torch.long)
            all_tau, all_cfg = torch.ones(len(asked)), torch.ones(len(asked))
            all_tau[kept], all_cfg[kept] = tau.cpu(), cfg.cpu()
            ids = torch.zeros(len(asked), dtype=torch.long)  # of what was not kept any id does
            ids[kept] = tokens[rows[:, 0], rows[:, 1]].cpu()
            scale = all_cfg.to(z.device) if len(guided) else 1.0
            options = dict(guided=_some(guided, asked))
            log_prob = self.sampler.log_prob(ids.to(z.device), z, free, scale, all_tau.to(z.device), **options)
            return log_prob.cpu()[kept]
        if not self.spec.sure:
            return None
        draws = []
        for _ in range(self.spec.sure):
            noise = self.sampler.noise(self.more, asked, plan.num_steps).to(z.device)
            scale = cfg if len(guided) else 1.0
            options = dict(guided=_some(guided, asked), profile=plan.profile and of_rows(plan.profile, row))
            draws.append(self.sampler.draw(z, free, scale, tau, noise, plan.num_steps, **options).float())
        return torch.stack(draws).std(dim=0, correction=0).flatten(1).mean(dim=1).cpu()

    def frame(self, tokens) -> np.ndarray | None:
        """The picture after a step; None where pictures have taken longer than the steps themselves so far."""
        late = self.painting > self.drawing + 0.1
        if not self.frames_wanted or late:
            return None
        began = time.perf_counter()
        picture = self.run.growth(tokens, self.start & (self.order_step < 0))
        self.painting += time.perf_counter() - began
        return picture


def finite(value: float) -> float | None:
    """Rounded for a page; None for what JSON has no number for."""
    return round(value, 5) if math.isfinite(value) else None


def _some(guided, rows):
    """`guided` as the sampler takes it: None where that is all rows, or none."""
    return None if len(guided) in (0, len(rows)) else guided


@torch.no_grad()
def record(spec: Spec, emit: Callable, frames: bool = True) -> Recording:
    """Make the images of a request, and again the regions that it names; emit(event) at every step.

    What was steered by the last step holds for these regions from their first. What an edit keeps stays, but for them.
    """
    run = SamplingRun(spec.parts(), spec.sampling, spec.labels, spec.seed, None, spec.edit)
    watch = sample(spec, run, emit, frames=frames)
    recording = kept(run, watch, watch.images)
    later = sorted(spec.changes, key=lambda change: change.step)
    spec = replace(spec, changes=tuple(replace(change, step=0, next=()) for change in later))
    edit = spec.edit
    for redo in spec.redo:
        run = SamplingRun(spec.parts(), spec.sampling, spec.labels, redo.seed, None, None)
        edit = run.edit = edit and replace(edit, unknown=edit.unknown | redo.region)  # its tokens are the recording's
        count = len(spec.labels)
        mask = torch.from_numpy(tokens_of(spec.loaded, redo.region))[None]
        run.known = dict(tokens=recording.tokens[-1], mask=mask.expand(count, -1))
        watch = sample(spec, run, emit, first=recording.steps[-1] + 1, frames=frames)
        recording = joined(recording, kept(run, watch, watch.images))
    return recording


def sample(spec: Spec, run: SamplingRun, emit, first: int = 0, frames: bool = True, **continued) -> Watch:
    """The `Watch` of a run, with the images uint8 (B, H, W, C) that it made; continued: fields of `Steered`."""
    start = continued.get("start", 0)
    model = Observed(spec.loaded.model, spec.changes, start)
    run.parts = replace(run.parts, model=model)
    watch = Watch(spec, run, model, emit, first, frames)
    rules = Steered.around(run.rules, changes=spec.changes, watch=watch.see, watch_drawn=watch.see_drawn, **continued)
    run.rules = rules
    watch.images = run.draw_batch(range(len(run.labels)), watch, watch)
    return watch


def kept(run: SamplingRun, watch: Watch, images) -> Recording:
    """The recording of a run that has ended."""
    evals = {name: round(run.evals[name] / len(images), 4) for name in ("mar", "mlp")}
    made = watch.steps, watch.frames, watch.tokens
    return Recording(images, watch.order_step, watch.maps, *made, watch.start[0], evals, watch.events)


def joined(before: Recording, after: Recording) -> Recording:
    """Two stages as one: what the second drew has its values, the rest those of the first."""
    drawn = after.order_step >= 0
    maps = {name: np.where(drawn, after.maps[name], before.maps[name]) for name in MAPS}
    order_step = np.where(drawn, after.order_step, before.order_step)
    evals = {name: round(before.evals[name] + after.evals[name], 4) for name in before.evals}
    lists = [getattr(before, name) + getattr(after, name) for name in ("steps", "frames", "tokens")]
    return Recording(after.images, order_step, maps, *lists, before.unknown, evals, before.events + after.events)
