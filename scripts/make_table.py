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

from heads.searched import schedule_name
from sampling.grid import unset_settings
from util.args import OneLineParser, check_output_file
from util.checkpoint import atomic_file
from util.door import run_main
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
from util.images.folders import check_output_folder
from util.images.pictures import is_png

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
    "judge_fid": "FID of the judge",
    "mar_evals": "transformer evals",
    "mlp_evals": "MLP evals",
    "images_per_second": "images/s",
}
# labels of the plot's axes; other settings have their name
AXES = {
    "mar_evals": "transformer evaluations an image",
    "mlp_evals": "diffusion MLP evaluations an image",
    "num_iter": "autoregressive steps",
    "num_sampling_steps": "diffusion steps",
    "images_per_second": "images/s",
}


def decimals(numbers: list[float]) -> int:
    """Digits after the point that leave the largest of a column four digits: 12.34, 0.1234; none for whole numbers."""
    largest = max((abs(n) for n in numbers), default=0)
    if all(float(n).is_integer() for n in numbers):
        return 0
    return min(max(3 - math.floor(math.log10(largest)), 0), 4) if largest else 0


def setting_texts(groups, columns: list[str]) -> list[dict[str, str]]:
    """{setting: text} of each group; long texts of a setting are cut in the middle, unless two would become equal."""
    rows = [{} for _ in groups]
    for c in columns:
        values = [settings.get(c) for settings, *_ in groups]
        if c == "schedule":
            values = [v and schedule_name(v) for v in values]
        texts = ["–" if v is None else f"{v:g}" if isinstance(v, float) else str(v) for v in values]
        short = [text if len(text) <= 24 else f"{text[:10]}…{text[-10:]}" for text in texts]
        if len({*short}) == len({*texts}):
            texts = short
        for row, text in zip(rows, texts):
            row[c] = text
    return rows


def markdown(groups, columns: list[str], names: list[str]) -> str:
    """The table in Markdown, its columns aligned."""
    several_seeds = any(count > 1 for *_, count in groups)
    head = [*columns, "seeds"] if several_seeds else [*columns]
    table = [head + [HEADINGS.get(n, n) for n in names]]
    stats = [{n: mean_and_spread(values[n]) for n in names if n in values} for _, values, _ in groups]
    digits = {n: decimals([x for s in stats if n in s for x in s[n] if x is not None]) for n in names}
    for (*_, count), texts, figures in zip(groups, setting_texts(groups, columns), stats):
        line = [texts[c].replace("|", "\\|") for c in columns]
        if several_seeds:
            line.append(str(count))
        for n in names:
            mean, spread = figures.get(n, (None, None))
            text = "–" if mean is None else f"{mean:.{digits[n]}f}"
            exact = spread is None or (n in COSTS and spread == 0)  # the same count for all seeds
            line.append(text if exact else f"{text} ± {spread:.{digits[n]}f}")
        table.append(line)
    return align(table, len(columns))


def align(table: list[list[str]], num_left: int) -> str:
    """A Markdown table of these lines, of which the first is the head; the first num_left columns to the left."""
    widths = [max(3, *(len(line[i]) for line in table)) for i in range(len(table[0]))]
    rule = ["-" * w if i < num_left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    padded = [
        [text.ljust(w) if i < num_left else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths))]
        for line in (table[0], rule, *table[1:])
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in padded)


def print_tables(groups, names: list[str]) -> None:
    """The groups in Markdown, a table for each protocol; of several tables each has a heading."""
    parts = by_protocol(groups)
    for i, (heading, part) in enumerate(parts.items()):
        if i > 0:
            print()
        if len(parts) > 1:
            print(f"{heading}:\n")
        measured = [n for n in names if any(n in values for _, values, _ in part)]
        print(markdown(part, varying(part), measured) if measured else "neither figures nor evaluations")


def is_table(path: Path) -> bool:
    """Does the file begin as `write_csv` does?"""
    with open(path, "rb") as file:
        return b"seeds" in file.readline().strip().split(b",")


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


def coordinate(x: str, settings: dict, values: dict):
    """A group's value on the axis x, a setting or a figure; None if it has neither."""
    if settings.get(x) is not None:
        return settings[x]
    return np.mean(values[x]) if x in values else None


def is_point(panel: tuple[str, str], settings: dict, values: dict) -> bool:
    """Has a group what a panel (x, metric) shows?"""
    x, metric = panel
    return metric in values and coordinate(x, settings, values) is not None


def split_shown(groups, columns: list[str], panels: list[tuple[str, str]]) -> tuple[list, list[str]]:
    """(the groups that a panel shows, the settings of the others as text)."""
    shown, others = [], []
    for group, texts in zip(groups, setting_texts(groups, columns)):
        if any(is_point(panel, *group[:2]) for panel in panels):
            shown.append(group)
        else:
            others.append(", ".join(f"{c} {texts[c]}" for c in columns))
    return shown, others


def plot_lines(groups, columns: list[str], panels: list[tuple[str, str]]) -> dict[tuple, list[tuple[dict, dict]]]:
    """{(run or mode, other settings as text): points (settings, values)}, of groups that a panel shows.

    A line joins the groups that differ in x only; with a figure for x, in the number of steps only. No groups, or
    figures that must not be compared: ValueError.
    """
    if not groups:
        needed = " or ".join(f"{metric} with {x}" for x, metric in panels)
        raise ValueError(f"no line has {needed}: there is nothing to plot")
    parts = by_protocol(groups)
    if len(parts) > 1:
        metrics = ", ".join(dict.fromkeys(metric for _, metric in panels))
        raise ValueError(f"{metrics} cannot be in one plot, measured in {len(parts)} ways: {'; '.join(parts)}")
    first_x = panels[0][0]
    color_by = "run" if "run" in columns and first_x != "run" else "infer_mode"
    along = "num_iter" if any(first_x in values for _, values, _ in groups) else first_x
    lines = {}
    for (settings, values, _), texts in zip(groups, setting_texts(groups, columns)):
        others = ", ".join(f"{c} {texts[c]}" for c in columns if c not in (color_by, along))
        lines.setdefault((settings.get(color_by), others), []).append((settings, values))
    return lines


def label_of(key: tuple) -> str:
    """What the legend calls a line of `plot_lines`."""
    return ", ".join(filter(None, key))


def draw_panel(axis, x: str, metric: str, lines: dict) -> None:
    """The metric against x, with those points of `plot_lines` that have both; bars are standard deviations.

    The color and the style of a line are the same in all panels.
    """
    colors, styles = (list(dict.fromkeys(key[i] for key in lines)) for i in (0, 1))
    lines = {key: [point for point in points if is_point((x, metric), *point)] for key, points in lines.items()}
    for (color, style), points in lines.items():
        if not points:
            continue
        places = [coordinate(x, *point) for point in points]
        order = np.argsort(places) if all(map(is_number, places)) else range(len(points))
        stats = [mean_and_spread(points[i][1][metric]) for i in order]
        axis.errorbar(
            [places[i] for i in order],
            [mean for mean, _ in stats],
            yerr=[spread or 0 for _, spread in stats],
            color=f"C{colors.index(color) % 10}",
            linestyle=("-", "--", ":", "-.")[styles.index(style) % 4],
            marker="osD^vPX*"[styles.index(style) % 8],
            markersize=5,
            capsize=3,
            label=label_of((color, style)),
        )
    ticks = {coordinate(x, *point) for points in lines.values() for point in points}
    if all(map(is_number, ticks)):
        mark_numbers(axis, sorted(ticks), x)
    axis.grid(alpha=0.3)
    axis.set_xlabel(AXES.get(x, x))
    axis.set_ylabel(HEADINGS.get(metric, metric))


def draw_plot(path: Path, groups, columns: list[str], panels: list[tuple[str, str]]) -> None:
    """Panels (x, metric) side by side: a colour a run (of a single file: a mode), a line style the other settings.

    x is a setting or a figure. A panel shows the groups that have its own two; groups and panels that are left out are
    named on stderr. What is refused, and which groups a line joins: see `plot_lines`.
    """
    groups, left_out = split_shown(groups, columns, panels)
    lines = plot_lines(groups, columns, panels)
    empty = [panel for panel in panels if not any(is_point(panel, *group[:2]) for group in groups)]
    panels = [panel for panel in panels if panel not in empty]
    if left_out:
        print(f"not in the plot, having nothing that it shows: {'; '.join(left_out)}", file=sys.stderr)
    if empty:
        pairs = "; ".join(f"{x} with {metric}" for x, metric in empty)
        print(f"no panel, since no line has both: {pairs}", file=sys.stderr)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 4.6), squeeze=False, layout="constrained")
    for axis, (x, metric) in zip(axes[0], panels):
        draw_panel(axis, x, metric, lines)
    handles = {}
    for axis in axes[0]:
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels())}
    labels = [label for label in map(label_of, lines) if label in handles]
    if len(labels) > 1:
        figure.legend(
            [handles[label] for label in labels],
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
    """Ticks at the numbers, at most 8; the axis is logarithmic for costs and where the largest is 8 times the least."""
    if x in COSTS or (numbers[0] > 0 and numbers[-1] / numbers[0] >= 8):
        axis.set_xscale("log", base=2)
    while len(numbers) > 8:
        numbers = numbers[::2]
    axis.set_xticks(numbers, [f"{n:,.0f}" if n >= 100 else f"{n:.3g}" for n in numbers])
    axis.minorticks_off()


def choose_panels(x: str | None, groups, names: list[str]) -> list[tuple[str, str]]:
    """(x, metric) of each panel: the first metric against network evaluations; with --x every metric against it.

    An x that does not differ between the groups raises ValueError.
    """
    metrics = [n for n in names if n not in COSTS] or ["fid"]
    if x is None:
        return [(cost, metrics[0]) for cost in ("mar_evals", "mlp_evals")]
    valid = {*varying(groups), *(n for n in names if n in COSTS)}
    if not valid:
        raise ValueError(f"--x {x!r}: these results differ in no setting, and no line has evaluations or images/s")
    if x not in valid:
        raise ValueError(f"--x {x!r} is nothing that differs between these results; valid: {', '.join(sorted(valid))}")
    return [(x, metric) for metric in metrics]


def parse(argv=None):
    """The command line."""
    parser = OneLineParser(prog="make_table.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("results", type=Path, nargs="+", help="results.jsonl that sample.py has written; several: runs")
    parser.add_argument("--csv", type=Path, help="file for the same table as CSV, in full precision")
    parser.add_argument("--plot", type=Path, help="file (.png) for the first metric against network evaluations")
    parser.add_argument("--x", help="with --plot: all metrics against this setting, or against images_per_second")
    usual = ",".join(METRICS)
    parser.add_argument("--metrics", help=f"comma list of metrics (default: of {usual} those in the results)")
    args = parser.parse_args(argv)
    if args.x and not args.plot:
        parser.error("--x is the horizontal axis of --plot, which is missing")
    return args


def main(argv=None) -> int:
    """Read, print, write; returns the exit code."""
    args = parse(argv)
    groups = group_seeds(read_runs(args.results), unset_settings())
    columns, names = varying(groups), pick_figures(groups, args.metrics)
    if not names:
        raise ValueError("no line of these results has figures or evaluations: there is nothing to make a table of")
    groups = order_groups(groups, columns)
    panels = choose_panels(args.x, groups, names)
    for name, path in (("csv", args.csv), ("plot", args.plot)):
        if path is not None:
            check_output_folder(name, path.absolute().parent)
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"there is no folder {path.parent}")
    if args.csv is not None:
        check_output_file("csv", args.csv, is_table, args.results)
    if args.plot is not None:
        check_output_file("plot", args.plot, is_png, args.results)
    print_tables(groups, names)
    if args.csv is not None:
        write_csv(args.csv, groups, columns, names)
    if args.plot is not None:
        draw_plot(args.plot, groups, columns, panels)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
