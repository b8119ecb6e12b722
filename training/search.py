"""A search for a schedule by CMA-ES: where it begins, what it moves, and its state in a file. (docs/heads.md)"""

import hashlib
import itertools
import json
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from heads.policy import build_rules
from heads.schedules import MIN_STEPS
from heads.searched import KINDS
from heads.step import StepState
from util.checkpoint import atomic_file

# The grid that the search starts from: the smallest geometric mean of the distances wins, which needs no unit.
GRID = dict(
    cfg_schedule=("constant", "linear"),
    cfg=(1.25, 1.8, 3.0),
    temperature=(0.9, 1.0),
    group=("cosine", "power", "staged"),
)
# How far a coordinate of 1 moves a value: factors e^x of a group and of τ, terms of w and of the profile.
MOVES = dict(group=0.3, tau=0.1, cfg=0.4, profile=0.3)
BOUNDS = dict(tau=(0.4, 1.6), cfg=(0.0, 8.0), profile=(0.0, 3.0))
NUM_KNOTS = 8
DIGITS = 6  # after the point, of all values: what is written is what was measured


# ------------------------------------------------------------------------------------------------------ the schedules


def values_of(rules, num_iter: int, length: int) -> dict[str, list[float]]:
    """What hand-made rules decide at each step about an image of `length` tokens, as the values of a schedule."""
    mask, decided = torch.ones(1, length, dtype=torch.bool), {"group": [], "tau": [], "cfg": []}
    start, zeros = torch.full((1,), float(length)), torch.zeros(1, length)
    for step in range(num_iter):
        n = mask.sum(dim=1).float()
        plan = rules(StepState(step, num_iter, mask, n, start, zeros, None, torch.zeros(1, dtype=torch.long)))
        mask = mask & ~plan.select
        decided["group"].append(1 - mask.sum().item() / length)
        decided["tau"].append(plan.tau[0, 0].item())
        decided["cfg"].append(plan.cfg[0, 0].item())
    decided["profile"] = [1.0] * NUM_KNOTS
    return {kind: [round(x, DIGITS) for x in numbers] for kind, numbers in decided.items()}


def kinds_of(model) -> tuple[str, ...]:
    """What a schedule can say of a `models.families.Backbone`: not its groups, where they are fixed; no profile of
    guidance, where tokens are drawn without diffusion steps."""
    missing = {"group"} & model.fixed_rules.keys() | ({"profile"} if not model.token_head.has_steps else set())
    return tuple(kind for kind in KINDS if kind not in missing)


def hand_made_grid(num_iter: int, length: int, kinds=KINDS) -> list[dict]:
    """The schedules, with values of these kinds, of those points of GRID that so many steps allow.

    Where groups are not among the kinds, tokens become known evenly over the steps.
    """
    grid = GRID if "group" in kinds else GRID | dict(group=("constant",))
    points = [dict(zip(grid, point)) for point in itertools.product(*grid.values())]
    points = [point for point in points if num_iter >= MIN_STEPS.get(point["group"], 1)]
    schedules = [values_of(build_rules("baseline", **point), num_iter, length) for point in points]
    return [{kind: values[kind] for kind in kinds} for values in schedules]


def moved(start: dict, x: np.ndarray) -> dict[str, list[float]]:
    """The schedule at x, whose coordinates move the groups, τ, w and the profile of the start, at 0.

    x has as many as the start has values, 3K + 8 with all kinds, in the order of MOVES.
    """
    kinds = [kind for kind in MOVES if kind in start]
    ends = np.cumsum([len(start[kind]) for kind in kinds])[:-1]
    schedule = {}
    for kind, part in zip(kinds, np.split(np.asarray(x), ends)):
        step = MOVES[kind] * part
        if kind == "group":
            sizes = np.diff(start["group"], prepend=0.0) * np.exp(step)
            schedule[kind] = np.cumsum(sizes) / sizes.sum()
        else:
            value = start[kind] * np.exp(step) if kind == "tau" else start[kind] + step
            schedule[kind] = value.clip(*BOUNDS[kind])
    result = {kind: [round(float(x), DIGITS) for x in numbers] for kind, numbers in schedule.items()}
    if "group" in result:
        result["group"][-1] = 1.0
    return result


def ratio(distances: dict, unit: dict, weights: dict) -> float:
    """The weighted mean over the kinds of the distance over that of the unit."""
    return float(np.average([distances[kind] / unit[kind] for kind in unit], weights=[weights[kind] for kind in unit]))


class Options(NamedTuple):
    """Of a search: points of a generation, seed, first standard deviation, {kind: weight of its distance}."""

    popsize: int
    seed: int
    sigma: float
    reward_weights: dict[str, float]


# --------------------------------------------------------------------------------------------------------- the search


class Search:
    """CMA-ES over schedules; what it has measured stands in `state` and, after each generation, in a file.

    measure(values, draw) -> {kind: distance > 0}, a function of the two alone; points are compared under one draw of
    random numbers, 0 for the grid and one more for each generation, so that the search fits no draw's images. The
    points of a generation follow from the seed and from what was measured before, so that the file needs no more than
    that. settings: what must be the same for the file to be gone on with. A file that does not fit raises ValueError.
    """

    def __init__(self, measure, grid: list[dict], path: Path, settings: dict, options: Options):
        self.measure, self.grid, self.path, self.options = measure, grid, path, options
        settings = {**settings, **options._asdict(), "grid": digest(json.dumps(grid).encode())}
        settings["draws"] = "one for each generation"  # in older files all had the same
        settings = json.loads(json.dumps(settings))
        self.state = {"settings": settings, "seconds": 0.0, "grid": [], "generations": []}
        if path.exists():
            self.state = read_state(path)
            changed = [k for k in settings if self.state["settings"].get(k) != settings[k]]
            if changed:
                before, now = self.state["settings"].get(changed[0]), settings[changed[0]]
                raise ValueError(f"{path} is of a search with {changed[0]} {before!r}, not {now!r}: name another --out")

    def run(self, iterations: int, max_seconds: float, *, quiet: bool = False) -> None:
        """The grid, then generations until there are so many, or their evaluations took so long, or CMA-ES ends."""
        total = len(self.grid) + iterations * self.options.popsize
        done = len(self.state["grid"]) + len(self.state["generations"]) * self.options.popsize
        with tqdm(total=total, initial=done, unit="eval", desc="grid", disable=quiet, leave=False) as progress:
            for values in self.grid[len(self.state["grid"]) :]:
                self.state["grid"].append(self._timed(values, 0, progress))
                self._write()
            self._begin()
            progress.set_description("search")
            while len(self.state["generations"]) < iterations and self.state["seconds"] < max_seconds:
                if self.strategy.stop():
                    break
                points, draw = self.strategy.ask(), len(self.state["generations"]) + 1
                measured = [self._timed(moved(self.start, x), draw, progress) for x in points]
                self.state["generations"].append({"points": digest(np.stack(points).tobytes()), "distances": measured})
                ratios = self._tell(points, measured)
                self._write()
                progress.set_postfix_str(f"the generation's mean {np.mean(ratios):.3f} of the start's distance")

    def _begin(self) -> None:
        """The strategy at the best point of the grid, told again what was measured."""
        import cma

        weights = self.options.reward_weights
        scores = [sum(weights[k] * np.log(d) for k, d in distances.items()) for distances in self.state["grid"]]
        number = int(np.argmin(scores))
        self.start, self.unit = self.grid[number], self.state["grid"][number]
        random = np.random.RandomState(self.options.seed)  # its own: cma would seed and use numpy's global one
        options = dict(popsize=self.options.popsize, randn=random.randn, seed=np.nan, verbose=-9, verb_log=0)
        size = sum(len(numbers) for numbers in self.start.values())
        self.strategy = cma.CMAEvolutionStrategy(np.zeros(size), self.options.sigma, options)
        for generation in self.state["generations"]:
            points = self.strategy.ask()
            if digest(np.stack(points).tobytes()) != generation["points"]:
                raise ValueError(f"{self.path} was made by another version of cma or numpy: name another --out")
            self._tell(points, generation["distances"])

    def _tell(self, points, measured) -> list[float]:
        ratios = [ratio(distances, self.unit, self.options.reward_weights) for distances in measured]
        self.strategy.tell(points, ratios)
        return ratios

    def _timed(self, values, draw: int, progress) -> dict[str, float]:
        began = time.perf_counter()
        distances = self.measure(values, draw)
        self.state["seconds"] += time.perf_counter() - began
        progress.update()
        return distances

    def _write(self) -> None:
        with atomic_file(self.path) as temporary:
            temporary.write_text(json.dumps(self.state))

    def candidates(self) -> dict[str, dict]:
        """{name: schedule}: the start, and the mean that the search has come to."""
        return {"start": self.start, "mean": moved(self.start, self.strategy.result.xfavorite)}


def digest(data: bytes) -> str:
    """16 hex digits of the data."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def read_state(path: Path) -> dict:
    """What `Search` wrote; another file raises ValueError."""
    try:
        state = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        state = None
    if not isinstance(state, dict) or not {"settings", "seconds", "grid", "generations"} <= state.keys():
        raise ValueError(f"{path} is no state of a search")
    return state
