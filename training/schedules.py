"""Learning rate and weight decay of each step, and the scales that a progressive run of a next-scale model has reached.

Legend: it steps done, T steps of the run, W of them warm-up, p = (it − W) / (T − 1 − W), S scales. The rows of FACTORS
are VAR's schedules (arXiv 2404.02905, its published code).
"""

import math
from bisect import bisect_left
from dataclasses import dataclass

import torch

from training.optim import lr_at
from util.args import flag

MARS = ("constant", "cosine", "late_cosine")  # by epochs, see `training.optim.lr_at`


def _linear(start: float):
    """Constant until p reaches start, then in a line to the end."""
    return lambda p, end: 1.0 if p < start else end + (1 - end) * (1 - p) / (1 - start)


# name: (p, factor at the end) -> factor of the learning rate
FACTORS = {
    "lin0": _linear(0.05),
    "lin": _linear(0.15),
    "lin00": lambda p, end: end + (1 - end) * (1 - p),
    "cos": lambda p, end: end + (1 - end) * (1 + math.cos(math.pi * p)) / 2,
    "exp": lambda p, end: 1.0 if p < 0.15 else end ** ((p - 0.15) / 0.85),
}


def _bent(place: float):
    """Two lines that meet at p = place, halfway between the end and where one line from 1 to the end would be."""

    def factor(p, end):
        middle = (1 + end + (1 - end) * (1 - place)) / 2
        if p < place:
            return 1 + (middle - 1) * p / place
        return end + (middle - end) * (1 - p) / (1 - place) if place < 1 else end

    return factor


def schedule_setting(text: str) -> str:
    """The name of a schedule as it is; ValueError for one that is none."""
    if text not in MARS:
        factor_of(text)
    return text


def factor_of(name: str):
    """The row of FACTORS of this name, or lin<X>'s, X being from 0 to 1; another name raises ValueError."""
    if name in FACTORS:
        return FACTORS[name]
    try:
        place = float(name.removeprefix("lin")) if name.startswith("lin") else -1.0
    except ValueError:
        place = -1.0
    if not 0 < place <= 1:
        valid = ", ".join((*MARS, *FACTORS))
        raise ValueError(f"invalid value {name!r}: must be one of {valid}, or lin<X> with X above 0, at most 1")
    return _bent(place)


def lr_factor(it: int, schedule: str, warmup_its: int, max_its: int, wp0: float, wpe: float) -> float:
    """What the learning rate is multiplied by at iteration it: from wp0 up to 1, then as the schedule says to wpe."""
    if it < warmup_its:
        return wp0 + (1 - wp0) * it / warmup_its
    return factor_of(schedule)((it - warmup_its) / max(max_its - 1 - warmup_its, 1), wpe)


def decay_at(it: int, max_its: int, start: float, end: float) -> float:
    """Weight decay at iteration it: half a cosine from start to end over the whole run."""
    return end + (start - end) * (1 + math.cos(math.pi * it / max(max_its - 1, 1))) / 2


@dataclass(frozen=True)
class ScheduleConfig:
    """How long is trained, and what changes on the way."""

    epochs: int = flag(400, "passes over the data", low=1)
    lr: float | None = flag(None, "learning rate (default: blr · global batch / 256)", low=0)
    blr: float = flag(1e-4, "base learning rate, for a global batch of 256", low=0)
    min_lr: float = flag(0.0, "where the cosine schedule ends", low=0)
    lr_schedule: str = flag(
        "constant",
        f"after the warm-up: {', '.join((*MARS, *FACTORS))}, or lin<X>",
        type=schedule_setting,
        metavar="NAME",
    )
    warmup_epochs: float = flag(100, "epochs of linear warm-up", low=0)
    wp0: float = flag(0.005, "of VAR's schedules: share of the learning rate at the first step", low=0, high=1)
    wpe: float = flag(0.01, "of VAR's schedules: share of the learning rate at the last step", low=0, high=1)
    weight_decay: float = flag(0.02, "AdamW weight decay", low=0)
    wd_end: float | None = flag(None, "weight decay at the last step, along half a cosine (default: constant)", low=0)
    pg: float = flag(
        0.0,
        "progressive training of scales: share X of the run before all are trained, whose schedule is lin<X>; 0 = off",
        low=0,
        high=1,
    )
    pg0: int = flag(4, "last scale that is trained in the warm-up of --pg", low=0)
    pgwp: float | None = flag(
        None, "epochs over which a new scale of --pg gets its weight (default: epochs / 300)", low=0
    )

    def __post_init__(self):
        schedule_setting(self.lr_schedule)
        if self.wd_end is not None and not self.weight_decay:
            raise ValueError(f"--wd_end {self.wd_end:g} needs a --weight_decay above 0, from which it changes")

    def rate(self, progress: float, steps_per_epoch: int) -> float:
        """The learning rate after so many epochs; with --pg X the schedule is lin<X>."""
        schedule = f"lin{self.pg}" if self.pg else self.lr_schedule
        if schedule in MARS:
            options = dict(lr=self.lr, min_lr=self.min_lr, schedule=schedule, warmup_epochs=self.warmup_epochs)
            return lr_at(progress, epochs=self.epochs, **options)
        it, max_its, warmup_its = (round(x * steps_per_epoch) for x in (progress, self.epochs, self.warmup_epochs))
        return self.lr * lr_factor(it, schedule, warmup_its, max_its, self.wp0, self.wpe)

    def decay(self, it: int, max_its: int) -> float:
        """The weight decay at a step."""
        return self.weight_decay if self.wd_end is None else decay_at(it, max_its, self.weight_decay, self.wd_end)

    def stage(self, it: int, max_its: int, steps_per_epoch: int, num_scales: int) -> tuple[int, float]:
        """(last scale that is trained at a step, weight of its tokens' losses) with --pg; at the end all, each with 1.

        In the warm-up and until another one joins that is pg0, with the weight 1; of a later one the weight rises to 1.
        """
        last, warmup_its = num_scales - 1, round(self.warmup_epochs * steps_per_epoch)

        def reached(it):
            if it < warmup_its:
                return min(self.pg0, last)
            if it >= self.pg * max_its:
                return last
            share = (it - warmup_its) / (self.pg * max_its - warmup_its)
            return min(self.pg0, last) + round(share * (last - min(self.pg0, last)))

        stage = reached(it)
        if stage == last or stage == reached(0):
            return stage, 1.0
        begin = bisect_left(range(it + 1), stage, key=reached)  # stages never go back
        pgwp = self.epochs / 300 if self.pgwp is None else self.pgwp
        return stage, min(max((it - begin + 1) / max(pgwp * steps_per_epoch, 1e-9), 0.01), 1.0)


def stage_weights(patch_nums, stage: int, stage_weight: float) -> torch.Tensor:
    """Weights (n,) of the losses of the tokens of the scales 0 … stage, whose mean over them is that over all scales.

    Those of the newest scale are multiplied by stage_weight.
    """
    sizes = [p * p for p in patch_nums]
    weights = [torch.full((size,), stage_weight if s == stage else 1.0) for s, size in enumerate(sizes[: stage + 1])]
    return torch.cat(weights) * (sum(sizes[: stage + 1]) / sum(sizes))
