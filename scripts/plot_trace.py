"""Draw the growth of images, from the trace.npz of `sample.py --save_trace N`: one PNG and one GIF an image.

python scripts/plot_trace.py OUT/<setting>/trace.npz --out DIR [--images 0,1,2]

DIR/rules.png: τ and guidance scale of each step in all traced images, and how much of their variance is between steps,
between images and between tokens: a schedule differs between steps only.
DIR/trace_<i>.png: maps of the step, τ and guidance scale of each token, tokens a step, the image after each step.
DIR/trace_<i>.gif: the growing image and, beside it, its mask with the newest tokens in orange. The tokens that an
edited image had from the start are blank in the maps. Of a model that draws scales there are neither maps nor mask, but
τ and guidance scale of each step.
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

from sampling.adaptive import shares_of
from sampling.trace import as_grid, draw_gif, has_grid, load_trace, picture
from util.args import OneLineParser
from util.checkpoint import atomic_file
from util.door import run_main
from util.images.folders import check_output_folder

FILM_ROW, FILM_MAX = 8, 16  # pictures a row of the film strip, and altogether
# of a trace: (key, title, colour map)
RULES = (("tau", "temperature τ", "magma"), ("cfg", "guidance scale w", "cividis"))


def parse_images(text: str | None, count: int) -> list[int]:
    """The image numbers in the comma list; all of them for None."""
    if text is None:
        return list(range(count))
    try:
        images = [int(part) for part in text.split(",")]
        valid = all(0 <= i < count for i in images)
    except ValueError:
        valid = False
    if not valid:
        raise ValueError(f"--images must be numbers from 0 to {count - 1} with commas between, got {text!r}")
    return images


def draw_map(figure, axis, values, title: str, cmap: str, numbers: bool = False) -> None:
    """A heat map of values (h, w), which may be masked, with its colour bar; numbers: write them into the map."""
    low, high = float(values.min()), float(values.max())
    constant = high - low < 1e-6
    if constant:  # a colour map needs a range
        title, low, high = f"{title}: {low:g} for all", low - 0.5, high + 0.5
    image = axis.imshow(values, cmap=cmap, vmin=low, vmax=high)
    bar = figure.colorbar(image, ax=axis, fraction=0.046, pad=0.03)
    bar.ax.tick_params(labelsize=8)
    if constant:
        bar.set_ticks([(low + high) / 2])
    else:
        bar.locator.set_params(nbins=5, integer=values.dtype.kind == "i")
        bar.update_ticks()
    axis.set_title(title, fontsize=10)
    axis.set_xticks([])
    axis.set_yticks([])
    if numbers:
        size = min(9, 110 / max(values.shape) / max(2, len(f"{values.max()}")) * 1.6)
        for (y, x), value in np.ma.ndenumerate(values):
            color = "black" if image.norm(value) > 0.55 else "white"
            axis.text(x, y, str(value), ha="center", va="center", fontsize=size, color=color)


def draw_bars(axis, group_size: np.ndarray) -> None:
    """Tokens revealed at each step (K,)."""
    steps = np.arange(1, len(group_size) + 1)
    axis.bar(steps, group_size, color="#4c72b0", width=0.8)
    axis.set_title(f"tokens a step ({group_size.sum()} in all)", fontsize=10)
    axis.set_xlabel("step", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.set_xlim(0.3, len(steps) + 0.7)
    axis.set_ylim(0, group_size.max() * 1.12)
    for direction in (axis.xaxis, axis.yaxis):
        direction.get_major_locator().set_params(integer=True)
    axis.spines[["top", "right"]].set_visible(False)
    if len(steps) <= 16:
        for x, size in zip(steps, group_size):
            axis.text(x, size, str(size), ha="center", va="bottom", fontsize=8)


def draw_steps(axis, values: np.ndarray, order_step: np.ndarray, title: str) -> None:
    """The mean of values (L,) over the tokens of each step; a band from their least to their largest."""
    numbers = np.unique(order_step[order_step >= 0])
    parts = [values[order_step == number] for number in numbers]
    axis.fill_between(numbers + 1, [part.min() for part in parts], [part.max() for part in parts], alpha=0.25)
    axis.plot(numbers + 1, [part.mean() for part in parts], color="#4c72b0", marker=".")
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("step", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.spines[["top", "right"]].set_visible(False)


def by_step(values: np.ndarray, order_step: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance (N, K) of values (N, L) over the tokens that an image draws in a step; NaN where it draws 0."""
    chosen = order_step[:, :, None] == np.arange(order_step.max() + 1)  # (N, L, K)
    number = chosen.sum(axis=1)
    with np.errstate(invalid="ignore"):  # 0 / 0
        mean = (values[:, :, None] * chosen).sum(axis=1) / number
        variance = (np.square(values[:, :, None] - mean[:, None]) * chosen).sum(axis=1) / number
    return mean, variance


def shares(mean: np.ndarray, variance: np.ndarray) -> dict[str, float]:
    """The shares of variance of a results line, of means and variances (N, K) of the traced images."""
    drawn = ~np.isnan(mean)
    sums = [drawn, np.nan_to_num(mean), np.square(np.nan_to_num(mean)), np.nan_to_num(variance)]
    return shares_of(torch.tensor(np.stack([x.sum(axis=0) for x in sums], axis=1), dtype=torch.float64))


def draw_rules(path: Path, trace: dict[str, np.ndarray]) -> None:
    """The PNG of τ and w over the steps, a line for each traced image."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for axis, (key, title, _) in zip(axes, RULES):
        mean, variance = by_step(trace[key], trace["order_step"])
        steps, part = np.arange(1, mean.shape[1] + 1), shares(mean, variance)
        axis.plot(steps, mean.T, color="#4c72b0", alpha=max(0.15, 1 / len(mean)), linewidth=1, marker=".")
        axis.plot(steps, np.nanmean(mean, axis=0), color="black", linewidth=2)
        spread = ", ".join(f"{name} {part[name]:.0%}" for name in ("steps", "images", "tokens"))
        axis.set_title(f"{title}\nvariance {part['total']:.3g}: {spread}", fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"traced images (blue): {len(trace['labels'])}; their mean (black)", fontsize=11)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    plt.close(figure)


def draw_image(path: Path, trace: dict[str, np.ndarray], i: int) -> None:
    """The PNG of image i of the trace."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    taken = int(trace["order_step"][i].max()) + 1  # steps until the image was complete
    shown = np.unique(np.linspace(0, taken - 1, min(taken, FILM_MAX)).round().astype(int))
    rows = math.ceil(len(shown) / FILM_ROW)
    figure = plt.figure(figsize=(13, 3.7 + 1.75 * rows), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06, wspace=0.03)
    top, film = figure.subfigures(2, 1, height_ratios=[3.7, 1.75 * rows])
    top.suptitle(f"image {i}, label {trace['labels'][i]}: complete after {taken} steps", fontsize=12)
    if has_grid(trace):
        maps = top.subplots(1, 4)
        draw_bars(maps[1], trace["group_size"][i][:taken])
        maps[1].set_box_aspect(1)
        draw_maps(top, maps[[0, 2, 3]], trace, i)
    else:
        bars, *lines = top.subplots(1, 3)
        draw_bars(bars, trace["group_size"][i][:taken])
        for axis, (key, title, _) in zip(lines, RULES):
            draw_steps(axis, trace[key][i], trace["order_step"][i], title)
    panels = film.subplots(rows, FILM_ROW, squeeze=False).ravel()
    for axis in panels:
        axis.axis("off")
    for axis, step in zip(panels, shown):
        axis.imshow(picture(trace["frames"][i, step]))
        axis.set_title(f"step {step + 1}", fontsize=9)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    plt.close(figure)


def draw_maps(figure, axes, trace: dict[str, np.ndarray], i: int) -> None:
    """The step, τ and guidance scale of each token of image i, on three axes."""
    frames = trace["frames"][i]
    order = np.ma.masked_less(as_grid(trace["order_step"][i], frames) + 1, 1)
    draw_map(figure, axes[0], order, "step at which a token came", "viridis", numbers=max(order.shape) <= 16)
    for axis, (key, title, colors) in zip(axes[1:], RULES):
        draw_map(figure, axis, np.ma.array(as_grid(trace[key][i], frames), mask=order.mask), title, colors)


def main(argv=None) -> int:
    """Read, draw; returns the exit code."""
    parser = OneLineParser(prog="plot_trace.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("trace", type=Path, help="trace.npz that sample.py --save_trace has written")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--images", help="comma list of image numbers (default: all that were traced)")
    args = parser.parse_args(argv)
    trace = load_trace(args.trace, of_scales=True)
    images = parse_images(args.images, len(trace["labels"]))
    check_output_folder("out", args.out)
    args.out.mkdir(parents=True, exist_ok=True)
    draw_rules(args.out / "rules.png", trace)
    print(args.out / "rules.png")
    for i in images:
        draw_image(args.out / f"trace_{i}.png", trace, i)
        draw_gif(args.out / f"trace_{i}.gif", trace, i)
        print(args.out / f"trace_{i}.png")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
