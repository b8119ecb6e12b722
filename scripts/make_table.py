"""Print the results of sample.py as a Markdown table: mean ± standard deviation over seeds, one row a setting.

python scripts/make_table.py OUT/results.jsonl [--csv FILE] [--plot FILE.png] [--metrics fid,is_mean]

Columns: the settings that differ between the rows, the metrics, the network evaluations an image takes (transformer,
diffusion MLP), images/s. The standard deviation is that of a sample (n − 1); a single seed has none. Figures that must
not be compared (generation and reconstruction, other references, other features) stand in tables of their own.
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

METRICS = ("fid", "rfid", "is_mean", "psnr", "ssim", "svc_accuracy", "frechet_pixels")
PROTOCOL = ("kind", "features", "reference")  # figures are comparable where these are the same
FIRST = ("infer_mode", "order", "group", "tau_schedule", "cfg_schedule", "num_iter", "num_sampling_steps", "cfg")
COSTS = ("mar_evals", "mlp_evals", "images_per_second")
HEADINGS = {
    "fid": "FID",
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


def read_lines(path: Path) -> list[dict]:
    """The result lines of a file, one cut short by a crash left out; no file or no line raises ValueError."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    rows = [row for row in rows if isinstance(row, dict) and isinstance(row.get("settings"), dict)]
    if not rows:
        raise ValueError(f"{path} holds no results of sample.py")
    return rows


def figures(row: dict) -> dict[str, float]:
    """All numbers that a line reports; the costs only where images were made for it, not found on disk."""
    found = {k: v for k, v in row.get("metrics", {}).items() if v is not None}
    if row.get("num_made", 1):
        found |= {k: row[k] for k in COSTS if row.get(k) is not None}
    return found


def group_seeds(rows: list[dict]) -> list[tuple[dict, dict[str, list[float]], int]]:
    """(settings without the seed, {figure: one value a seed}, number of seeds) for each setting.

    Kind, weights and reference count as settings. Of two lines with the same seed the later counts.
    """
    groups = {}
    for row in rows:
        settings = {k: v for k, v in row["settings"].items() if k != "seed"}
        settings |= {k: row.get(k) for k in ("weights", "reference")}
        settings["kind"] = row.get("kind", "generation")
        _, seeds = groups.setdefault(json.dumps(settings, sort_keys=True), (settings, {}))
        seeds[row["settings"].get("seed")] = figures(row)
    result = []
    for settings, seeds in groups.values():
        names = dict.fromkeys(name for found in seeds.values() for name in found)
        values = {name: [found[name] for found in seeds.values() if name in found] for name in names}
        result.append((settings, values, len(seeds)))
    return result


def by_protocol(groups) -> dict[str, list]:
    """The groups whose figures may be compared, under a heading that says what they have in common."""
    parts = {}
    for group in groups:
        kind, features, reference = (group[0].get(k) for k in PROTOCOL)
        heading = f"{kind}, features {features}, reference {reference}"
        parts.setdefault(heading, []).append(group)
    return parts


def varying(groups) -> list[str]:
    """The settings that are not the same in all groups, the best known ones first."""
    there = {name for settings, *_ in groups for name in settings}
    names = [*(n for n in FIRST if n in there), *sorted(there - set(FIRST))]
    return [n for n in names if len({json.dumps(settings.get(n)) for settings, *_ in groups}) > 1]


def order_groups(groups, columns):
    """Sorted by the columns: numbers by size, anything else in the order of first appearance."""
    seen = {c: list(dict.fromkeys(json.dumps(settings.get(c)) for settings, *_ in groups)) for c in columns}

    def key(group):
        values = [(c, group[0].get(c)) for c in columns]
        return [(0, v) if _is_number(v) else (1, seen[c].index(json.dumps(v))) for c, v in values]

    return sorted(groups, key=key)


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def mean_and_spread(values: list[float]) -> tuple[float, float | None]:
    """Mean and standard deviation (n − 1), None for a single value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def pick_figures(groups, wanted: str | None) -> list[str]:
    """The figures to show: those asked for, else the usual ones there are; one that is nowhere raises ValueError."""
    there = dict.fromkeys(name for _, values, _ in groups for name in values)
    metrics = [m for m in METRICS if m in there] if wanted is None else wanted.split(",")
    for name in metrics:
        if name not in there:
            valid = ", ".join(n for n in there if n not in COSTS) or "none"
            raise ValueError(f"unknown metric {name!r}; these results have: {valid}")
    return [*metrics, *(c for c in COSTS if c in there and c not in metrics)]


def decimals(numbers: list[float]) -> int:
    """Digits after the point that leave the largest of a column four digits: 12.34, 0.1234; none for whole numbers."""
    largest = max((abs(n) for n in numbers), default=0)
    if all(float(n).is_integer() for n in numbers):
        return 0
    return min(max(3 - math.floor(math.log10(largest)), 0), 4) if largest else 0


def cell(value) -> str:
    """A setting as text; a long one is shortened in the middle."""
    text = "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 24 else f"{text[:10]}…{text[-10:]}"


def markdown(groups, columns: list[str], names: list[str]) -> str:
    """The table in Markdown, its columns aligned."""
    many = any(n > 1 for *_, n in groups)
    table = [[*columns, *(["seeds"] if many else []), *(HEADINGS.get(n, n) for n in names)]]
    stats = [{n: mean_and_spread(values[n]) for n in names if n in values} for _, values, _ in groups]
    digits = {n: decimals([x for s in stats if n in s for x in s[n] if x is not None]) for n in names}
    for (settings, _, count), found in zip(groups, stats):
        line = [cell(settings.get(c)).replace("|", "\\|") for c in columns] + ([str(count)] if many else [])
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


def draw_plot(path: Path, groups, columns: list[str], metric: str) -> None:
    """The metric against transformer and against MLP evaluations: a colour a mode, a line style the other settings.

    A line joins the settings that differ in the number of steps only. Without counted evaluations, or where the figures
    must not be compared: ValueError.
    """
    groups = [group for group in groups if metric in group[1]]
    if len(parts := by_protocol(groups)) > 1:
        raise ValueError(f"{metric} cannot be in one plot, it was measured in {len(parts)} ways: {'; '.join(parts)}")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = {}
    for settings, values, _ in groups:
        if metric in values and "mar_evals" in values and "mlp_evals" in values:
            rest = ", ".join(f"{c} {cell(settings.get(c))}" for c in columns if c not in ("infer_mode", "num_iter"))
            lines.setdefault((settings.get("infer_mode"), rest), []).append(values)
    if not lines:
        raise ValueError(f"no line has both {metric} and counted network evaluations: there is nothing to plot")
    modes, rests = (list(dict.fromkeys(key[i] for key in lines)) for i in (0, 1))
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
    for panel, cost in zip(panels, ("mar_evals", "mlp_evals")):
        for (mode, rest), points in lines.items():
            points = sorted(points, key=lambda values: np.mean(values[cost]))
            stats = [mean_and_spread(values[metric]) for values in points]
            panel.errorbar(
                [np.mean(values[cost]) for values in points],
                [mean for mean, _ in stats],
                yerr=[spread or 0 for _, spread in stats],
                color=f"C{modes.index(mode) % 10}",
                linestyle=("-", "--", ":", "-.")[rests.index(rest) % 4],
                marker="osD^vPX*"[rests.index(rest) % 8],
                markersize=5,
                capsize=3,
                label=f"{mode}, {rest}" if rest else mode,
            )
        panel.set_xscale("log", base=2)
        ticks = sorted({round(np.mean(values[cost])) for points in lines.values() for values in points})
        while len(ticks) > 8:
            ticks = ticks[::2]
        panel.set_xticks(ticks, [f"{t:,}" for t in ticks])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.set_xlabel(f"{'transformer' if cost == 'mar_evals' else 'diffusion MLP'} evaluations an image")
    panels[0].set_ylabel(HEADINGS.get(metric, metric))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)


def main(argv=None) -> int:
    """Read, print, write; returns the exit code."""
    parser = OneLineParser(prog="make_table.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("results", type=Path, help="results.jsonl that sample.py has written")
    parser.add_argument("--csv", type=Path, help="file for the same table as CSV, in full precision")
    parser.add_argument("--plot", type=Path, help="file (.png) for the first metric against network evaluations")
    parser.add_argument("--metrics", help=f"comma list of metrics (default: of {','.join(METRICS)} those there are)")
    args = parser.parse_args(argv)
    groups = group_seeds(read_lines(args.results))
    columns, names = varying(groups), pick_figures(groups, args.metrics)
    groups = order_groups(groups, columns)
    for path in (args.csv, args.plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"there is no folder {path.parent}")
    print_tables(groups, names)
    if args.csv is not None:
        write_csv(args.csv, groups, columns, names)
    if args.plot is not None:
        draw_plot(args.plot, groups, columns, names[0] if names else "fid")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
