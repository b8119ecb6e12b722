"""Print docs/leaderboard.md: rules side by side at equal numbers of steps, what was optimised apart from what judges.

    python scripts/make_leaderboard.py --hand OUT/hand/results.jsonl --row "heads, per step=OUT/steps/results.jsonl" ...
    python scripts/make_leaderboard.py --hand OUT/hand/results.jsonl --row OUT/modes/results.jsonl

The lines have the figures of the reward, by features and by pixels, and of a judge (sample.py --judge). --hand:
hand-made rules; each --row: the settings of a file under a name, or under those of their inference modes. Guidance
trades pixels against features, so a row is compared with the hand-made rule of the smallest judge distance among those
whose pixel distance is not larger than its own. `beyond` is the difference over the root of the sum of both variances.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

from sampling.grid import unset_settings
from util.args import OneLineParser
from util.door import run_main
from util.evaluation.tables import COSTS, group_seeds, mean_and_spread, read_lines

NEEDED = ("fid", "frechet_pixels", "judge_fid")  # figures of a line
HEADINGS = ("rules", "reward: features", "reward: pixels", "judge", "best hand-made judge", "difference", "beyond")
HEADINGS += ("transformer evals", "MLP evals", "images/s", "seeds")
PAGES = {  # part of docs/leaderboard.md -> what stands above its tables
    "frozen": """# Leaderboard

Rules side by side on digits, at equal numbers of steps, printed by `bash scripts/leaderboard.sh`. The quickstart's
base is frozen; nothing but the rules differs. Heads are those of `bash scripts/train_heads.sh`, one set for all
numbers of steps, trained for 4 to 8 of them, once for each seed.

Reward: the Fréchet distances that schedules and heads were optimised by, and hand-made rules chosen by, on the
features of the digit classifier and on pixels. Judge: the same distance on the features of another classifier, which
took no part. 1,800 images against the 1,797 real ones; mean and standard deviation over seeds: of the images, and for
heads of their training too. Guidance trades pixels against features, so a row is compared with the hand-made rule that
the judge likes best among those of no larger pixel distance; `none` where no hand-made rule comes that near on pixels,
or where it is that rule itself. `beyond` is the difference over the root of the sum of both variances. Hand-made rules:
those that no other beats in both reward features, of the 136 of `search_grid.sh` at 4 and 8 steps, and of its 36 of
`GRID=small` at 16. The searched schedule is of 4 steps; others interpolate it. Evaluations are those of an image;
images/s were measured on two shared CPU cores and say little.""",
    "cotrained": """## A co-trained backbone

Printed by `bash scripts/train_policy.sh`, on the quickstart's base after more epochs on the states that halton's order
visits, into which random masks fade over the first half of them (`--mix_anneal`). Hand-made rules, from `GRID=small`,
the schedule and the heads (`train_heads.sh --order halton --learn group,tau,cfg,profile`) are its own. The first row
has the base after as many epochs with random masks.""",
}


@dataclass
class Entry:
    """A setting: its rules' name, the values of its figures over seeds, and what sampling it costs."""

    name: str
    settings: dict
    features: list[float]
    pixels: list[float]
    judge: list[float]
    costs: dict[str, float]


def parse(argv=None):
    """The command line."""
    parser = OneLineParser(prog="make_leaderboard.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--hand", action="append", required=True, type=Path, help="results.jsonl of hand-made rules")
    parser.add_argument(
        "--row", action="append", default=[], help="FILE or NAME=FILE: a results.jsonl, and what to call its rules"
    )
    parser.add_argument("--page", choices=PAGES, help="a part of docs/leaderboard.md: print its text above the tables")
    return parser.parse_args(argv)


def rules_of(settings: dict) -> str:
    """The inference mode of learned rules; of hand-made ones in words what differs from the published ones."""
    if settings["infer_mode"] != "baseline":
        return settings["infer_mode"]
    words = [f"cfg {settings['cfg']:g} {settings['cfg_schedule']}", f"τ {settings['temperature']:g}"]
    words += [settings[kind] for kind, usual in (("order", "random"), ("group", "cosine")) if settings[kind] != usual]
    words += [f"w from {settings['cfg_interval']}"] if settings["cfg_schedule"] == "interval" else []
    words += [f"t in {settings['cfg_t_interval']}"] if settings["cfg_profile"] == "interval" else []
    return ", ".join(words)


def entries(path: Path, name: str | None) -> list[Entry]:
    """The settings of a file that a judge measured too; a file without such ones raises ValueError.

    Under a name, checkpoints that differ in their training seed are repeats of one setting.
    """
    lines = read_lines(path)
    if name:
        lines = [{**line, "run": name} for line in lines]
    result = []
    for settings, figures, _ in group_seeds(lines, unset_settings()):
        if figures.keys() >= set(NEEDED):
            costs = {key: mean(figures[key]) for key in COSTS if key in figures}
            result.append(Entry(name or rules_of(settings), settings, *(figures[key] for key in NEEDED), costs))
    if not result:
        raise ValueError(f"{path} has no setting with the figures {', '.join(NEEDED)}, which sample.py --judge gives")
    return result


def mean(values: list[float]) -> float:
    return mean_and_spread(values)[0]


def rival(entry: Entry, hand: list[Entry]) -> Entry | None:
    """The hand-made rule of as many steps and no larger pixel distance that the judge likes best; None without one."""
    same = [other for other in hand if mean(other.pixels) <= mean(entry.pixels) and steps(other) == steps(entry)]
    return min(same, key=lambda other: mean(other.judge), default=None)


def steps(entry: Entry) -> tuple:
    return entry.settings["num_iter"], str(entry.settings["num_sampling_steps"]), entry.settings["solver"]


def cells(entry: Entry, hand: list[Entry]) -> list[str]:
    """A row of the table, with the columns of HEADINGS."""
    other = rival(entry, hand)
    against = ["none", "", ""]
    if other is not None and other is not entry:
        difference = mean(entry.judge) / mean(other.judge) - 1
        spreads = [mean_and_spread(values)[1] or 0.0 for values in (entry.judge, other.judge)]
        error = math.hypot(*spreads)
        beyond = f"{abs(mean(entry.judge) - mean(other.judge)) / error:.1f}" if error else "–"
        against = [f"{shown(other.judge)} ({other.name})", f"{100 * difference:+.0f} %", beyond]
    costs = [f"{entry.costs[key]:.4g}" if key in entry.costs else "–" for key in COSTS]
    return [
        entry.name,
        *map(shown, (entry.features, entry.pixels, entry.judge)),
        *against,
        *costs,
        str(len(entry.judge)),
    ]


def shown(values: list[float]) -> str:
    """Mean ± standard deviation."""
    average, spread = mean_and_spread(values)
    return f"{average:.3f}" if spread is None else f"{average:.3f} ± {spread:.3f}"


def main(argv=None) -> int:
    """Read, compare, print a table for each number of steps; returns the exit code."""
    args = parse(argv)
    rows = []
    for text in args.row:
        name, _, path = text.rpartition("=")
        rows += entries(Path(path), name or None)
    hand = [entry for path in args.hand for entry in entries(path, None)]
    if args.page:
        print(PAGES[args.page])
    for number in sorted({steps(entry) for entry in hand + rows}):
        print(f"\n### {number[0]} steps of {number[1]} diffusion steps, {number[2]}\n")
        print(f"| {' | '.join(HEADINGS)} |\n| --- |{' ---: |' * (len(HEADINGS) - 1)}")
        table = [entry for entry in rows if steps(entry) == number]
        table += sorted((entry for entry in hand if steps(entry) == number), key=lambda entry: mean(entry.pixels))
        for entry in table:
            print(f"| {' | '.join(cells(entry, hand))} |")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
