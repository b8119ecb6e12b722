"""The best settings of a sweep: the lines of results files with the smallest figures, as a results file of their own.

    python scripts/best_settings.py OUT/results.jsonl --by fid,frechet_pixels --top 3 --out OUT/best.jsonl
    python sample.py --checkpoint DIR --output_dir OUT/judged --settings_of OUT/best.jsonl --seed 1,2

A setting's score is the geometric mean of the figures in --by, which needs no unit, each averaged over seeds. --front
keeps, instead of the --top of them, all that no other setting beats in every figure. Settings that must not be compared
(other features, another reference) are refused. What chose a setting does not judge it:
sample the best again with other seeds, and measure them by other features (docs/evaluation.md).
"""

import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

from sampling.grid import unset_settings
from util.args import OneLineParser, check_output_file
from util.checkpoint import atomic_file
from util.door import run_main
from util.evaluation.tables import by_protocol, group_seeds, mean_and_spread, read_lines
from util.images.folders import check_output_folder


def parse(argv=None):
    """The command line."""
    parser = OneLineParser(prog="best_settings.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("results", nargs="+", type=Path, help="results.jsonl of one or several sweeps")
    parser.add_argument("--by", default="fid", help="comma list of figures, small is good (default: fid)")
    parser.add_argument("--top", type=int, default=3, help="how many settings (default: 3)")
    parser.add_argument("--front", action="store_true", help="all settings that no other beats in every figure")
    parser.add_argument("--out", type=Path, required=True, help="file (.jsonl) to write")
    parser.add_argument("--dry_run", action="store_true", help="print the command line's values and stop")
    args = parser.parse_args(argv)
    if args.top < 1:
        parser.error(f"--top must be at least 1, got {args.top}")
    return args


def front(ranked):
    """Of (score, settings, figures) those that no other beats: as good in every figure, and better in one."""
    points = [list(figures.values()) for _, _, figures in ranked]

    def beaten(a):
        return any(b != a and all(x <= y for x, y in zip(b, a)) for b in points)

    return [row for row, point in zip(ranked, points) if not beaten(point)]


def best(rows: list[dict], names: list[str]) -> list[tuple[float, dict, dict[str, float]]]:
    """(score, settings, figures) of all settings among the lines, the best first.

    Lines that cannot be compared, and a figure that is missing or not above 0, raise ValueError.
    """
    groups = group_seeds(rows, unset_settings())
    parts = by_protocol(groups)
    if len(parts) > 1:
        raise ValueError(f"these results were measured in {len(parts)} ways and cannot be compared: {'; '.join(parts)}")
    scored = []
    for settings, values, _ in groups:
        lacking = [name for name in names if name not in values]
        if lacking:
            raise ValueError(f"there are results without {lacking[0]!r}; they have: {', '.join(values)}")
        figures = {name: mean_and_spread(values[name])[0] for name in names}
        wrong = [name for name, value in figures.items() if not value > 0]
        if wrong:
            raise ValueError(f"{wrong[0]} must be above 0 to be ranked by, got {figures[wrong[0]]}")
        scored.append((math.prod(figures.values()) ** (1 / len(figures)), settings, figures))
    return sorted(scored, key=lambda row: row[0])


def is_results(path: Path) -> bool:
    """Is it a results file?"""
    try:
        return bool(read_lines(path))
    except ValueError:
        return False


def main(argv=None) -> int:
    """Rank, print, write; returns the exit code."""
    args = parse(argv)
    check_output_file("out", args.out, is_results, args.results)
    check_output_folder("out", args.out.absolute().parent)
    if args.dry_run:
        print(json.dumps({**vars(args), "results": [str(p) for p in args.results], "out": str(args.out)}, indent=2))
        return 0
    rows = [row for path in args.results for row in read_lines(path)]
    ranked = best(rows, args.by.split(","))
    ranked = front(ranked) if args.front else ranked[: args.top]
    with atomic_file(args.out) as temporary:
        lines = [json.dumps({"settings": settings, "metrics": figures}) for _, settings, figures in ranked]
        temporary.write_text("\n".join(lines) + "\n")
    for place, (score, settings, figures) in enumerate(ranked, start=1):
        names = ("order", "group", "tau_schedule", "temperature", "cfg_schedule", "cfg", "cfg_profile")
        shown = ", ".join(f"{name} {settings.get(name)}" for name in names)
        print(f"{place}. score {score:.3f} ({', '.join(f'{k} {v:.3f}' for k, v in figures.items())}): {shown}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
