"""Rules side by side: each is compared with the best hand-made rule that is as near to the real images in pixels.

The lines of results have the figures of the reward, by features and by pixels, and of a judge (sample.py --judge). A
rule is compared with the hand-made one of the smallest judge distance among those whose pixel distance is not larger
than its own, or if it beats all of them on pixels with the one that comes nearest there. `beyond` is the difference
over the root of the sum of both variances.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from util.evaluation.tables import COSTS, group_seeds, mean_and_spread, read_lines, shown

NEEDED = ("fid", "frechet_pixels", "judge_fid")  # figures of a line
HEADINGS = ("rules", "reward: features", "reward: pixels", "judge", "best hand-made judge", "difference", "beyond")
HEADINGS += ("transformer evals", "MLP evals", "images/s", "seeds")


@dataclass
class Entry:
    """A setting: its rules' name, the values of its figures over seeds, and what sampling it costs."""

    name: str
    settings: dict
    features: list[float]
    pixels: list[float]
    judge: list[float]
    costs: dict[str, float]


def rules_of(settings: dict) -> str:
    """The inference mode of learned rules; of hand-made ones in words what differs from the published ones."""
    if settings["infer_mode"] != "baseline":
        return settings["infer_mode"]
    words = [f"cfg {settings['cfg']:g} {settings['cfg_schedule']}", f"τ {settings['temperature']:g}"]
    words += [settings[kind] for kind, usual in (("order", "random"), ("group", "cosine")) if settings[kind] != usual]
    words += [f"w from {settings['cfg_interval']}"] if settings["cfg_schedule"] == "interval" else []
    words += [f"t in {settings['cfg_t_interval']}"] if settings["cfg_profile"] == "interval" else []
    return ", ".join(words)


def entries(path: Path, name: str | None, unset: dict) -> list[Entry]:
    """The settings of a file that a judge measured too; a file without such ones raises ValueError.

    Checkpoints that differ in their training seed are repeats of one setting. unset: as in `group_seeds`.
    """
    result = []
    for settings, figures, _ in group_seeds([{**line, "run": name} for line in read_lines(path)], unset):
        if figures.keys() >= set(NEEDED):
            costs = {key: mean(figures[key]) for key in COSTS if key in figures}
            result.append(Entry(name or rules_of(settings), settings, *(figures[key] for key in NEEDED), costs))
    if not result:
        raise ValueError(f"{path} has no setting with the figures {', '.join(NEEDED)}, which sample.py --judge gives")
    return result


def mean(values: list[float]) -> float:
    return mean_and_spread(values)[0]


def rival(entry: Entry, hand: list[Entry]) -> Entry | None:
    """The hand-made rule of as many steps and no larger pixel distance that the judge likes best.

    Without one that of the smallest pixel distance; None without hand-made rules of as many steps.
    """
    same = [other for other in hand if steps(other) == steps(entry)]
    near = [other for other in same if mean(other.pixels) <= mean(entry.pixels)]
    if not near:
        return min(same, key=lambda other: mean(other.pixels), default=None)
    return min(near, key=lambda other: mean(other.judge))


def steps(entry: Entry) -> tuple:
    return entry.settings["num_iter"], str(entry.settings["num_sampling_steps"]), entry.settings["solver"]


def cells(entry: Entry, hand: list[Entry]) -> list[str]:
    """A row of the table, with the columns of HEADINGS."""
    other = rival(entry, hand)
    against = ["none", "", ""]
    if other is not None and (other.pixels, other.judge) != (entry.pixels, entry.judge):  # not the rule itself
        difference = mean(entry.judge) / mean(other.judge) - 1
        spreads = [mean_and_spread(values)[1] or 0.0 for values in (entry.judge, other.judge)]
        error = math.hypot(*spreads)
        beyond = f"{abs(mean(entry.judge) - mean(other.judge)) / error:.1f}" if error else "–"
        farther = f", pixels {mean(other.pixels):.4g}" if mean(other.pixels) > mean(entry.pixels) else ""
        against = [f"{shown(other.judge)} ({other.name}{farther})", f"{100 * difference:+.0f} %", beyond]
    costs = [f"{entry.costs[key]:.4g}" if key in entry.costs else "–" for key in COSTS]
    return [
        entry.name,
        *map(shown, (entry.features, entry.pixels, entry.judge)),
        *against,
        *costs,
        str(len(entry.judge)),
    ]
