"""Print docs/leaderboard.md: rules side by side at equal numbers of steps, what was optimised apart from what judges.

    python scripts/make_leaderboard.py --hand OUT/hand/results.jsonl --row "heads, per step=OUT/steps/results.jsonl" ...
    python scripts/make_leaderboard.py --hand OUT/hand/results.jsonl --row OUT/modes/results.jsonl

The lines have the figures of the reward, by features and by pixels, and of a judge (sample.py --judge). --hand:
hand-made rules; each --row: the settings of a file under a name, or under those of their inference modes. Guidance
trades pixels against features, so a row is compared with the hand-made rule of the smallest judge distance among those
whose pixel distance is not larger than its own, or if there is none with the one that comes nearest. `beyond` is the
difference over the root of the sum of both variances.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

from sampling.grid import unset_settings
from util.args import OneLineParser
from util.door import run_main
from util.evaluation.rivals import HEADINGS, cells, entries, mean, steps

PAGES = {  # part of docs/leaderboard.md -> what stands above its tables
    "frozen": """# Leaderboard

Rules side by side on digits, at equal numbers of steps, printed by `bash scripts/leaderboard.sh`. The quickstart's
base is frozen; nothing but the rules differs. Heads are those of `bash scripts/train_heads.sh`, one set for all
numbers of steps, trained for 4 to 8 of them, once for each seed.

Reward: the Fréchet distances that schedules and heads were optimised by, and hand-made rules chosen by, on the features
of the digit classifier and on pixels. Judge: the same distance on the features of another classifier, which took no
part. 1,800 images against the 1,797 real ones; mean and standard deviation over seeds: of the images, and for heads of
their training too. Guidance trades pixels against features, so a row is compared with the hand-made rule that the judge
likes best among those of no larger pixel distance. Where none comes that near, it is the one that comes nearest, and
its larger pixel distance stands there too; `none` where the row is that rule itself. `beyond` is the difference over
the root of the sum of both variances. Hand-made rules: those of `search_grid.sh` that no other beats in both
reward features on images of another seed. The searched schedule is of 4 steps, found on other seeds; other numbers of
steps interpolate it. Evaluations are those of an image; images/s were measured on two shared CPU cores and say little.
CIFAR-10 at 8 steps (`PRESET=cifar10`) needs a GPU and has not been measured.""",
    "cotrained": """## A co-trained backbone

Printed by `bash scripts/train_policy.sh`, on the quickstart's base after more epochs on the states that halton's order
visits, into which random masks fade over the first half of them (`--mix_anneal`). Hand-made rules, from `GRID=small` on
the first of the training seeds, the schedule and the heads (`train_heads.sh --order halton --learn
group,tau,cfg,profile`) are its own; the published rules, `anneal`, count as hand-made. The first row has the base after
as many epochs with random masks.""",
}


def parse(argv=None):
    """The command line."""
    parser = OneLineParser(prog="make_leaderboard.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--hand", action="append", required=True, type=Path, help="results.jsonl of hand-made rules")
    parser.add_argument(
        "--row", action="append", default=[], help="FILE or NAME=FILE: a results.jsonl, and what to call its rules"
    )
    parser.add_argument("--page", choices=PAGES, help="a part of docs/leaderboard.md: print its text above the tables")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    """Read, compare, print a table for each number of steps; returns the exit code."""
    args = parse(argv)
    rows = []
    for text in args.row:
        name, _, path = text.rpartition("=")
        rows += entries(Path(path), name or None, unset_settings())
    hand = [entry for path in args.hand for entry in entries(path, None, unset_settings())]
    # one that two files have, of the same images, is one rule
    hand = list({(entry.name, steps(entry), *entry.judge, *entry.pixels): entry for entry in reversed(hand)}.values())
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
