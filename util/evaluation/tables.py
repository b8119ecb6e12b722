"""The lines of results files as the rows of a table: grouped over seeds, split by protocol, ordered."""

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np

from util.args import check_input_file
from util.evaluation.features import features_name
from util.evaluation.results import CLASSIFIERS, numbered_results

METRICS = ("fid", "sfid", "rfid", "is_mean", "psnr", "ssim", "svc_accuracy", "frechet_pixels", "judge_fid")
PROTOCOL = ("kind", "features", "reference")  # figures may be compared if these settings are the same
FIRST = ("run", "infer_mode", "order", "group", "tau_schedule", "cfg_schedule", "cfg_profile")
FIRST += ("num_iter", "num_sampling_steps", "cfg")
COSTS = ("mar_evals", "mlp_evals", "images_per_second")


def read_lines(path: Path) -> list[dict]:
    """The result lines of a file, one cut short by a crash left out; no file or no line raises ValueError.

    So does a figure that is no finite number, with file, line and its name; null is one that was not measured.
    """
    check_input_file(path, "results.jsonl")
    rows = [(number, row) for number, row in numbered_results(path) if isinstance(row.get("settings"), dict)]
    if not rows:
        raise ValueError(f"{path} holds no results of sample.py")
    for number, row in rows:
        if not isinstance(row.get("metrics", {}), dict):
            raise ValueError(f"{path}, line {number}: metrics must be figures by name, got {row['metrics']!r}")
        for name, value in figures(row).items():
            if not (is_number(value) and math.isfinite(value)):
                way_out = "null in its place leaves it out of the table"
                raise ValueError(f"{path}, line {number}: {name} must be a finite number, got {value!r}; {way_out}")
    return [row for _, row in rows]


def figures(row: dict) -> dict[str, float]:
    """All numbers that a line reports; the costs only if images were made for it, not read from an earlier run."""
    numbers = {k: v for k, v in row.get("metrics", {}).items() if v is not None}
    if row.get("num_made", 1):
        numbers.update((k, row[k]) for k in COSTS if row.get(k) is not None)
    return numbers


def read_runs(paths: list[Path]) -> list[dict]:
    """The lines of all files; of several, `run` is the name of the folder, which two with the same raise ValueError."""
    names = [path.absolute().parent.name for path in paths]
    if len(paths) == 1:
        return read_lines(paths[0])
    rows = []
    for path, name in zip(paths, names):
        if names.count(name) > 1:
            raise ValueError(f"two of the files are in folders named {name!r}: they would be taken for one run")
        rows += [{**row, "run": name} for row in read_lines(path)]
    return rows


def group_seeds(rows: list[dict], unset: dict | None = None) -> list[tuple[dict, dict[str, list[float]], int]]:
    """(settings without the seed, {figure: one value a repeat}, number of repeats) for each setting.

    Kind, reference, a classifier's file that was replaced, and run or else weights count as settings; how many images
    were sampled together does not, but in int8. Of two lines with the same seed (and, in a run, the same checkpoint)
    the later counts. unset: values of settings, for lines that are older than the flag of a setting which
    others of the lines have.
    """
    groups = {}
    later = {name: unset[name] for row in rows for name in row["settings"] if name in (unset or {})}
    replaced = {name: _replaced(rows, name) for name in CLASSIFIERS}
    for row, reference in zip(rows, _references(rows)):
        sampled = not later.keys().isdisjoint(row["settings"])  # a line of sample.py, not of a reconstruction
        settings = {**(later if sampled else {}), **row["settings"]}
        settings.pop("seed", None)
        if settings.get("dtype") != "int8":
            settings.pop("eval_bsz", None)
        for name, files in replaced.items():
            if settings.get(CLASSIFIERS[name]) in files:
                settings[name] = row.get(name, "unknown")
        repeat = row["settings"].get("seed")
        if "run" in row:
            settings["run"] = row["run"]
            repeat = repeat, row.get("checkpoint", row.get("weights"))  # a path: its weights change as training goes on
        else:
            settings["weights"] = row.get("weights")
        settings["reference"], settings["kind"] = reference, row.get("kind", "generation")
        _, repeats = groups.setdefault(json.dumps(settings, sort_keys=True), (settings, {}))
        repeats[repeat] = figures(row)
    result = []
    for settings, repeats in groups.values():
        names = dict.fromkeys(name for numbers in repeats.values() for name in numbers)
        values = {name: [numbers[name] for numbers in repeats.values() if name in numbers] for name in names}
        result.append((settings, values, len(repeats)))
    return result


def _replaced(rows: list[dict], name: str) -> set[str]:
    """The files of classifiers of which lines know several contents, under a key of CLASSIFIERS."""
    pairs = {(row["settings"].get(CLASSIFIERS[name]), row[name]) for row in rows if name in row}
    return {file for file, count in Counter(file for file, _ in pairs).items() if count > 1}


def _references(rows: list[dict]) -> list:
    """The hash of each line's reference; with that of its files where lines of the same hash have several."""
    pairs = {(str(row.get("reference")), str(row["reference_content"])) for row in rows if row.get("reference_content")}
    counts = Counter(reference for reference, _ in pairs)
    return [
        f"{row['reference']} (files {row.get('reference_content', 'unknown')})"
        if counts[str(row.get("reference"))] > 1
        else row.get("reference")
        for row in rows
    ]


def by_protocol(groups) -> dict[str, list]:
    """The groups whose figures may be compared, under a heading that says what they have in common."""
    parts = {}
    for group in groups:
        kind, features, reference = (group[0].get(k) for k in PROTOCOL)
        features = features_name(features, group[0].get("fid_weights"))
        heading = f"{kind}, features {features}, reference {reference}"
        parts.setdefault(heading, []).append(group)
    return parts


def varying(groups) -> list[str]:
    """The settings that are not the same in all groups, those of FIRST in its order before the others by name."""
    present = {name for settings, *_ in groups for name in settings}
    names = [*(n for n in FIRST if n in present), *sorted(present - set(FIRST))]
    return [n for n in names if len({json.dumps(settings.get(n)) for settings, *_ in groups}) > 1]


def order_groups(groups, columns):
    """Sorted by the columns: numbers by size, anything else in the order of first appearance."""
    seen = {c: list(dict.fromkeys(json.dumps(settings.get(c)) for settings, *_ in groups)) for c in columns}

    def key(group):
        values = [(c, group[0].get(c)) for c in columns]
        return [(0, v) if is_number(v) else (1, seen[c].index(json.dumps(v))) for c, v in values]

    return sorted(groups, key=key)


def is_number(value) -> bool:
    """Is it an int or a float? A bool is none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def mean_and_spread(values: list[float]) -> tuple[float, float | None]:
    """Mean and standard deviation (n − 1), None for a single value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def shown(values: list[float]) -> str:
    """Mean ± standard deviation in three digits."""
    average, spread = mean_and_spread(values)
    return f"{average:.3f}" if spread is None else f"{average:.3f} ± {spread:.3f}"


def pick_figures(groups, wanted: str | None) -> list[str]:
    """The figures to show: those of the comma list `wanted`, else those of METRICS that the groups have; the costs.

    A wanted one that no group has raises ValueError.
    """
    present = dict.fromkeys(name for _, values, _ in groups for name in values)
    metrics = [m for m in METRICS if m in present] if wanted is None else wanted.split(",")
    for name in metrics:
        if name not in present:
            valid = ", ".join(n for n in present if n not in COSTS) or "none"
            raise ValueError(f"unknown metric {name!r}; these results have: {valid}")
    return [*metrics, *(c for c in COSTS if c in present and c not in metrics)]
