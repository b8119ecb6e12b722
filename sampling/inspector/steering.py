"""Steering: the rules of a run with some of their answers replaced, and a model whose label changes on the way.

Legend: B images, B' of them unfinished, L tokens an image, N drawn tokens, G of them guided, K autoregressive steps.
The loop stays as it is: it is given other rules and another model, which ask those that they stand before.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch

from heads.orders import Confidence
from heads.rules import Rules
from heads.step import StepPlan, StepState


@dataclass(frozen=True)
class Change:
    """What is different from step `step` on: tau and w of all tokens, the label; and the tokens of that step alone.

    None, or no tokens: as without the change. next: positions in the image; those known already are left out.
    """

    step: int
    tau: float | None = None
    cfg: float | None = None
    label: int | None = None
    next: tuple[int, ...] = ()


@dataclass(frozen=True)
class Steered(Rules):
    """Rules that answer as the ones they were made `around`, but for what the changes say.

    A run that continues another one, of whose K = num_iter steps `start` are behind and which began with num_start
    unknown tokens, has its rules see that one's steps; num_iter None: a run of its own. watch(state, scores (B', L) or
    None) is called at each step, with the scores that rank tokens where these are known before anything is drawn;
    watch_drawn(scores) with those of an order that looks at what was drawn.
    """

    changes: tuple[Change, ...] = ()
    start: int = 0
    num_iter: int | None = None
    num_start: int = 0
    watch: Callable | None = None
    watch_drawn: Callable | None = None

    @classmethod
    def around(cls, rules: Rules, **own) -> "Steered":
        """The rules with changes and watchers of their own."""
        return cls(**{field.name: getattr(rules, field.name) for field in fields(Rules)}, **own)

    def __call__(self, state: StepState) -> StepPlan:
        state = self.placed(state)
        order, group = self.painted(state)
        if self.watch:
            self.watch(state, None if isinstance(order, Confidence) else order(state))
        plan = replace(self.plain(), order=order, group=group)(state)
        for change in sorted(self.changes, key=lambda change: change.step):
            if change.step <= state.step:
                if change.tau is not None:
                    plan = replace(plan, tau=torch.full_like(plan.tau, change.tau))
                if change.cfg is not None:
                    plan = replace(plan, cfg=torch.full_like(plan.cfg, change.cfg))
        return plan

    def num_selected(self, on_host: StepState) -> torch.Tensor | None:
        on_host = self.placed(on_host)
        order, group = self.painted(on_host)
        return replace(self.plain(), order=order, group=group).num_selected(on_host)

    def after_draw(self, state: StepState, plan: StepPlan, log_prob, gumbel) -> StepPlan:
        state = self.placed(state)
        if self.watch_drawn:
            self.watch_drawn(self.order.scores(state, log_prob, gumbel))
        return Rules.after_draw(self, state, plan, log_prob, gumbel)

    def plain(self) -> Rules:
        """The six rules alone."""
        return Rules(**{field.name: getattr(self, field.name) for field in fields(Rules)})

    def placed(self, state: StepState) -> StepState:
        """The state as the run sees it that this one continues."""
        if self.num_iter is None:
            return state
        num_start = torch.full_like(state.num_start, self.num_start)
        return replace(state, step=state.step + self.start, num_iter=self.num_iter, num_start=num_start)

    def painted(self, state: StepState) -> tuple[Callable | Confidence, Callable]:
        """Order and group of this step: those of the painted tokens that are unknown, where there are some."""
        positions = [p for change in self.changes if change.step == state.step for p in change.next]
        chosen = torch.zeros_like(state.mask)
        chosen[:, positions] = True
        chosen &= state.mask
        if not chosen.any():
            return self.order, self.group
        return (lambda _: chosen.float()), (lambda _: chosen.sum(dim=1).float())


class Observed:
    """A model with the labels of changes from their steps on, which keeps the `Switching` that it made last.

    start: steps of the run that this one continues, as in `Steered`.
    """

    def __init__(self, model, changes: tuple[Change, ...] = (), start: int = 0):
        self.model = model
        ordered = sorted(changes, key=lambda change: change.step)
        self.labels = [(max(c.step - start, 0), c.label) for c in ordered if c.label is not None]
        self.last = None

    def __getattr__(self, name):
        return getattr(self.model, name)

    def conditions(self, labels, **options) -> "Switching":
        """The `models.families.Conditions` of a batch of labels (B,)."""
        parts = [(0, self.model.conditions(labels, **options))]
        parts += [(step, self.model.conditions(torch.full_like(labels, new), **options)) for step, new in self.labels]
        self.last = Switching(parts)
        return self.last


class Switching:
    """The `models.families.Conditions` that are those of its last part whose step has come.

    parts: (step, Conditions) in the order of their steps, the first with step 0. pair: what `at` was asked and gave
    last, (rows (N, 2), guided (G,), z (N, D), z without label (G, D) or None).
    """

    def __init__(self, parts: list):
        self.parts, self.pair = parts, None

    @property
    def passes(self) -> float:
        """Images that went through the network so far."""
        return sum(part.passes for _, part in self.parts)

    def _at(self, step: int):
        return [part for start, part in self.parts if start <= step][-1]

    def look(self, step: int, tokens, unknown, images):
        """z and its positions, see `models.families.Conditions`."""
        return self._at(step).look(step, tokens, unknown, images)

    def at(self, step: int, tokens, unknown, rows, guided):
        """z at rows (N, 2), and without label of those guided."""
        z, free = self._at(step).at(step, tokens, unknown, rows, guided)
        self.pair = rows, guided, z, free
        return z, free

    def write(self, step: int, rows, drawn, *mixed) -> None:
        """Tell all parts what was drawn."""
        for _, part in self.parts:
            part.write(step, rows, drawn, *mixed)

    def finished(self, tokens):
        """f̂ of the part that comes last, of mixtures."""
        return self.parts[-1][1].finished(tokens)
