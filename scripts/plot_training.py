"""Draw curves of training runs from their TensorBoard files: losses, and the outputs of the heads.

    python scripts/plot_training.py output_dir/heads --out curves.png
    python scripts/plot_training.py RUN RUN --tags rho_mean,k_over_cosine_mean,tau_mean,w_mean --out curves.png

One panel a quantity, one line a run, a running mean over --smooth steps; for a quantity x_mean whose spread x_std the
run logged, a band of that width. One legend below names the runs of all panels.
"""

import fnmatch
import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

from util.args import OneLineParser, check_output_file
from util.checkpoint import atomic_file
from util.door import run_main
from util.images.folders import check_output_folder
from util.images.pictures import is_png

TAGS = ("mse", "ce", "accuracy", "order", "reward", "distance_*")
TAGS += ("rho_mean", "k_over_cosine_mean", "group_mean", "tau_mean", "w_mean", "profile_mean")


def names_of(folders: list[Path]) -> list[str]:
    """The last two parts of each folder's place; more of them, where two folders would have the same name."""
    places = [folder.absolute().parts for folder in folders]
    for count in range(2, max(map(len, places)) + 1):
        names = ["/".join(parts[-count:]) for parts in places]
        if len({*names}) == len({*places}):
            break
    return names


def read_run(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{quantity: (steps, values)} of a run's training; a folder without TensorBoard files raises ValueError."""
    if not any(folder.glob("events.out.tfevents*")):
        raise ValueError(f"{folder} has no TensorBoard files (events.out.tfevents*)")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 1})
    events.Reload()
    curves = {}
    for tag in events.Tags()["scalars"]:
        if tag.startswith("train/"):
            points = events.Scalars(tag)
            steps, values = [point.step for point in points], [point.value for point in points]
            curves[tag.removeprefix("train/")] = np.array(steps), np.array(values)
    return curves


def smoothed(values: np.ndarray, width: int) -> np.ndarray:
    """At each place the mean of the value and those before it, `width` in all; fewer at the beginning."""
    total = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return (total[ends] - total[starts]) / (ends - starts)


def draw(runs: dict[str, dict], tags: list[str], width: int, path: Path) -> None:
    """One panel a tag, one line a run, to a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(len(tags), 3)
    rows = math.ceil(len(tags) / columns)
    size = (4.2 * columns, 3 * rows + 0.3)
    figure, panels = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    handles = {}
    for panel, tag in zip(panels.flat, tags):
        for number, (name, curves) in enumerate(runs.items()):
            if tag not in curves:
                continue
            steps, values = curves[tag]
            mean = smoothed(values, width)
            color = f"C{number % 10}"
            (handles[name],) = panel.plot(steps, mean, linewidth=1.2, label=name, color=color)
            std_tag = tag.removesuffix("_mean") + "_std"
            if tag.endswith("_mean") and std_tag in curves:
                std = smoothed(curves[std_tag][1], width)
                panel.fill_between(steps, mean - std, mean + std, color=color, alpha=0.15, linewidth=0)
        panel.set_title(tag)
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
    for panel in panels.flat[len(tags) :]:
        panel.set_visible(False)
    handles = {name: handles[name] for name in runs if name in handles}
    across = max(1, int(13 * size[0]) // (max(map(len, handles)) + 6))  # 13 letters an inch
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=across, fontsize=8, frameon=False)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)


def main(argv=None) -> int:
    """Read, draw; returns the exit code."""
    parser = OneLineParser(prog="plot_training.py", description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders with TensorBoard files")
    parser.add_argument(
        "--tags",
        default=",".join(TAGS),
        help="comma list of quantities, or of patterns such as distance_*; those no run has are left out",
    )
    parser.add_argument("--smooth", type=int, default=50, help="steps of the running mean")
    parser.add_argument("--out", type=Path, required=True, help="the PNG to write")
    parser.add_argument("--dry_run", action="store_true", help="check the flags and stop")
    args = parser.parse_args(argv)
    if args.smooth < 1:
        raise ValueError(f"--smooth must be at least 1, got {args.smooth}")
    check_output_file("out", args.out, is_png)
    check_output_folder("out", args.out.parent)
    if args.dry_run:
        return 0
    runs = dict(zip(names_of(args.runs), map(read_run, args.runs)))
    logged = sorted(set().union(*runs.values()))
    tags = list(dict.fromkeys(tag for wanted in args.tags.split(",") for tag in fnmatch.filter(logged, wanted)))
    if not tags:
        raise ValueError(f"none of {args.tags} was logged; there are {', '.join(logged) or 'no scalars'}")
    lacking = [name for name, curves in runs.items() if curves.keys().isdisjoint(tags)]
    if lacking:
        print(f"in no panel, since they logged none of {', '.join(tags)}: {', '.join(lacking)}", file=sys.stderr)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw(runs, tags, args.smooth, args.out)
    print(f"picture: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
