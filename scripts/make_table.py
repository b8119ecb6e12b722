"""Print the results of sample.py as a Markdown table: mean ± standard deviation over seeds, one row a setting.

python scripts/make_table.py OUT/results.jsonl [--csv FILE] [--plot FILE.png [--x NAME]] [--metrics fid,is_mean]
python scripts/make_table.py OUT/run_1/results.jsonl OUT/run_2/results.jsonl ...

Columns: the settings that differ between the rows, the metrics, the network evaluations an image takes (transformer,
diffusion MLP), images/s. The standard deviation is that of a sample (n − 1); a single seed has none. Figures that must
not be compared (generation and reconstruction, other references, other features) stand in tables of their own.

Of several files each is a run, named by its folder in the column `run`. Lines of one run that differ in seed and
checkpoint only are repeats of one setting, trained or sampled with other seeds: they are averaged over, and the weights
are no column. (In a single file other weights are another setting.)
"""

import csv
import io
import json
import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

from util.args import OneLineParser, run_main
from util.checkpoint import atomic_file
from util.evaluation.tables import (
    COSTS,
    METRICS,
    by_protocol,
    group_seeds,
    is_number,
    mean_and_spread,
    order_groups,
    pick_figures,
    read_runs,
    varying,
)

HEADINGS = {
    "fid": "FID",
    "sfid": "sFID",
    "rfid": "rFID",
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "is_mean": "IS",
    "kid_mean": "KID",
    "precision": "precision",
    "recall": "recall",
    "svc_accuracy": "SVC accuracy",
    "frechet_pixels": "Fréchet (pixels)",
    "mar_evals": "transformer evals",
    "mlp_evals": "MLP evals",
    "images_per_second": "images/s",
}
# of the plot's axes, where the name says too little
AXES = {"mar_evals": "transformer evaluations an image", "mlp_evals": "diffusion MLP evaluations an image"}
AXES |= {"num_iter": "autoregressive steps", "num_sampling_steps": "diffusion steps", "images_per_second": "images/s"}


def decimals(numbers: list[float]) -> int:
    """Digits after the point that leave the largest of a column four digits: 12.34, 0.1234; none for whole numbers."""
    largest = max((abs(n) for n in numbers), default=0)
    if all(float(n).is_integer() for n in numbers):
        return 0
    return min(max(3 - math.floor(math.log10(largest)), 0), 4) if largest else 0


def told(groups, columns: list[str]) -> list[dict[str, str]]:
    """{setting: text} of each group; long ones are shortened in the middle, unless two would look the same."""
    found = [{} for _ in groups]
    for c in columns:
        values = [settings.get(c) for settings, *_ in groups]
        texts = ["–" if v is None else f"{v:g}" if isinstance(v, float) else str(v) for v in values]
        short = [text if len(text) <= 24 else f"{text[:10]}…{text[-10:]}" for text in texts]
        for group, text in zip(found, short if len({*short}) == len({*texts}) else texts):
            group[c] = text
    return found


def markdown(groups, columns: list[str], names: list[str]) -> str:
    """The table in Markdown, its columns aligned."""
    many = any(n > 1 for *_, n in groups)
    table = [[*columns, *(["seeds"] if many else []), *(HEADINGS.get(n, n) for n in names)]]
    stats = [{n: mean_and_spread(values[n]) for n in names if n in values} for _, values, _ in groups]
    digits = {n: decimals([x for s in stats if n in s for x in s[n] if x is not None]) for n in names}
    for (*_, count), texts, found in zip(groups, told(groups, columns), stats):
        line = [texts[c].replace("|", "\\|") for c in columns] + ([str(count)] if many else [])
        for n in names:
            mean, spread = found.get(n, (None, None))
            text = "–" if mean is None else f"{mean:.{digits[n]}f}"
            exact = spread is None or (n in COSTS and spread == 0)  # the same count for all seeds
            line.append(text if exact else f"{text} ± {spread:.{digits[n]}f}")
        table.append(line)
    widths = [max(3, *(len(line[i]) for line in table)) for i in range(len(table[0]))]
    table.insert(1, ["-" * w if i < len(columns) else "-" * (w - 1) + ":" for i, w in enumerate(widths)])
    padded = [
        [text.ljust(w) if i < len(columns) else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths))]
        for line in table
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in padded)


def print_tables(groups, names: list[str]) -> None:
    """The groups in Markdown, a table for each protocol; a heading above each where there are several."""
    parts = by_protocol(groups)
    for i, (heading, part) in enumerate(parts.items()):
        if len(parts) > 1:
            print(("\n" if i else "") + heading + ":\n")
        print(markdown(part, varying(part), [n for n in names if any(n in values for _, values, _ in part)]))


def write_csv(path: Path, groups, columns: list[str], names: list[str]) -> None:
    """The table as CSV in full precision: of a figure x the columns x and x_std (empty for a single seed)."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow([*columns, "seeds", *(head for n in names for head in (n, f"{n}_std"))])
    for settings, values, count in groups:
        numbers = [x for n in names for x in (mean_and_spread(values[n]) if n in values else (None, None))]
        shown = [json.dumps(v) if isinstance(v, list) else v for v in (settings.get(c) for c in columns)]
        writer.writerow([*shown, count, *numbers])
    with atomic_file(path) as temporary, open(temporary, "w", newline="") as file:
        file.write(text.getvalue())


def point_on(x: str, settings: dict, values: dict):
    """Where a group stands on the axis x, a setting or a figure; None where it has neither."""
    found = settings.get(x)
    return found if found is not None else np.mean(values[x]) if x in values else None


def draw_plot(path: Path, groups, columns: list[str], panels: list[tuple[str, str]]) -> None:
    """Panels (x, metric) side by side: a colour a run (of a single file: a mode), a line style the other settings.

    x is a setting or a figure. A line joins the groups that differ in x only; with a figure for x, in the number of
    steps only. Nothing to draw, or figures that must not be compared: ValueError.
    """
    groups = [group for group in groups if any(metric in group[1] for _, metric in panels)]
    if len(parts := by_protocol(groups)) > 1:
        what = ", ".join(dict.fromkeys(metric for _, metric in panels))
        raise ValueError(f"{what} cannot be in one plot, measured in {len(parts)} ways: {'; '.join(parts)}")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    x_name = panels[0][0]
    color_by = "run" if "run" in columns and x_name != "run" else "infer_mode"
    moves = "num_iter" if any(x_name in values for _, values, _ in groups) else x_name
    lines = {}
    for (settings, values, _), texts in zip(groups, told(groups, columns)):
        if all(metric in values and point_on(x, settings, values) is not None for x, metric in panels):
            rest = ", ".join(f"{c} {texts[c]}" for c in columns if c not in (color_by, moves))
            lines.setdefault((settings.get(color_by), rest), []).append((settings, values))
    if not lines:
        needed = ", ".join(dict.fromkeys(name for panel in panels for name in panel))
        raise ValueError(f"no line has all of {needed}: there is nothing to plot")
    colors, rests = (list(dict.fromkeys(key[i] for key in lines)) for i in (0, 1))
    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 4.6), squeeze=False, layout="constrained")
    for axis, (x, metric) in zip(axes[0], panels):
        for (color, rest), points in lines.items():
            where = [point_on(x, *point) for point in points]
            order = np.argsort(where) if all(map(is_number, where)) else range(len(points))
            stats = [mean_and_spread(points[i][1][metric]) for i in order]
            axis.errorbar(
                [where[i] for i in order],
                [mean for mean, _ in stats],
                yerr=[spread or 0 for _, spread in stats],
                color=f"C{colors.index(color) % 10}",
                linestyle=("-", "--", ":", "-.")[rests.index(rest) % 4],
                marker="osD^vPX*"[rests.index(rest) % 8],
                markersize=5,
                capsize=3,
                label=", ".join(filter(None, (color, rest))),
            )
        ticks = {point_on(x, *point) for points in lines.values() for point in points}
        if all(map(is_number, ticks)):
            mark_numbers(axis, sorted(ticks), x)
        axis.grid(alpha=0.3)
        axis.set_xlabel(AXES.get(x, x))
        axis.set_ylabel(HEADINGS.get(metric, metric))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=max(1, min(4, 75 * len(panels) // (max(map(len, labels)) + 6))),
            fontsize=9,
            frameon=False,
        )
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)


def mark_numbers(axis, numbers: list[float], x: str) -> None:
    """Ticks at the numbers themselves, on a logarithmic axis where they are costs or far apart."""
    if x in COSTS or (numbers[0] > 0 and numbers[-1] / numbers[0] >= 8):
        axis.set_xscale("log", base=2)
    while len(numbers) > 8:
        numbers = numbers[::2]
    axis.set_xticks(numbers, [f"{n:,.0f}" if n >= 100 else f"{n:.3g}" for n in numbers])
    axis.minorticks_off()


def choose_panels(x: str | None, groups, names: list[str]) -> list[tuple[str, str]]:
    """What to draw: the first metric against network evaluations, or every metric against x, which must be there."""
    metrics = [n for n in names if n not in COSTS] or ["fid"]
    if x is None:
        return [(cost, metrics[0]) for cost in ("mar_evals", "mlp_evals")]
    there = {*varying(groups), *(n for n in names if n in COSTS)}
    if x not in there:
        raise ValueError(f"--x {x!r} is nothing that differs between these results; valid: {', '.join(sorted(there))}")
    return [(x, metric) for metric in metrics]


def parse(argv=None):
    """The command line."""
    parser = OneLineParser(prog="make_table.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("results", type=Path, nargs="+", help="results.jsonl that sample.py has written; several: runs")
    parser.add_argument("--csv", type=Path, help="file for the same table as CSV, in full precision")
    parser.add_argument("--plot", type=Path, help="file (.png) for the first metric against network evaluations")
    parser.add_argument("--x", help="with --plot: all metrics against this setting, or against images_per_second")
    parser.add_argument("--metrics", help=f"comma list of metrics (default: of {','.join(METRICS)} those there are)")
    args = parser.parse_args(argv)
    if args.x and not args.plot:
        parser.error("--x is the horizontal axis of --plot, which is missing")
    return args


def main(argv=None) -> int:
    """Read, print, write; returns the exit code."""
    args = parse(argv)
    groups = group_seeds(read_runs(args.results))
    columns, names = varying(groups), pick_figures(groups, args.metrics)
    groups = order_groups(groups, columns)
    panels = choose_panels(args.x, groups, names)
    for path in (args.csv, args.plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"there is no folder {path.parent}")
    print_tables(groups, names)
    if args.csv is not None:
        write_csv(args.csv, groups, columns, names)
    if args.plot is not None:
        draw_plot(args.plot, groups, columns, panels)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
