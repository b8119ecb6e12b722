"""Traces of sampling: step, temperature and guidance scale of each token, and the picture after each step; as a GIF."""

import math
from pathlib import Path

import numpy as np
from PIL import Image

from util.args import check_input_file
from util.checkpoint import atomic_file

GREY = 128  # of unknown tokens
KEYS = ("order_step", "tau", "cfg", "group_size", "frames", "labels")
UNKNOWN, KNOWN, NEW = (70, 70, 70), (225, 225, 225), (245, 130, 32)  # colours of the mask
GIF_SIDE = 256  # pixels, at least


class Trace:
    """Records the images 0…N−1 of a sampling run in `folder`/trace.npz. L tokens an image, K = num_iter steps.

    order_step (N, L): the step at which each token was revealed, −1 if it was known from the start; tau, cfg (N, L):
    the temperature and guidance scale it was drawn with (1 if known); group_size (N, K): tokens revealed at each step;
    frames (N, K, H, W, C) uint8: the image after each step, its unknown tokens mid-grey (of several scales the image
    that those so far make); labels (N,). For each batch: call `begin`, pass `record` to generate() as its callback,
    call `end`.
    """

    def __init__(self, folder: Path, labels: list[int], seq_len: int, num_iter: int):
        self.path, self.labels, self.seq_len, self.num_iter = folder / "trace.npz", labels, seq_len, num_iter
        self.batches, self.count, self.steps = [], 0, []

    def is_saved(self) -> bool:
        """Does the file hold at least these images? True if N = 0."""
        return not self.labels or num_traced(self.path) >= len(self.labels)

    def begin(self, batch: range | None) -> None:
        """Start with the images `batch` of the run, of which those below N are recorded; None records nothing."""
        self.count = 0 if batch is None else min(len(self.labels) - batch.start, len(batch))
        self.steps = []

    def record(self, step, rows, plan, tokens) -> None:
        """The callback of generate(); its tensors stay on the device until `end`."""
        if self.count:
            self.steps.append((step, rows, plan.tau, plan.cfg, tokens[: self.count].clone()))

    def end(self, decode, images: np.ndarray) -> None:
        """Add the batch, whose finished images are given; the last batch of the N images writes the file.

        decode(tokens (n, L, …), unknown (n, L) bool) -> uint8 (n, H, W, C) of unfinished ones.
        """
        if not self.count:
            return
        n, images = self.count, images[: self.count]
        order_step = np.full((n, self.seq_len), -1)
        tau, cfg = np.ones((n, self.seq_len), np.float32), np.ones((n, self.seq_len), np.float32)
        for step, rows, step_tau, step_cfg, _ in self.steps:
            rows = rows.numpy()
            # a plan has a row for each unfinished image only
            plan_row = np.unique(rows[:, 0], return_inverse=True)[1].reshape(-1)[rows[:, 0] < n]
            image, position = rows[rows[:, 0] < n].T
            order_step[image, position] = step
            tau[image, position] = step_tau.cpu().numpy()[plan_row, position]
            cfg[image, position] = step_cfg.cpu().numpy()[plan_row, position]
        frames = np.repeat(images[:, None], self.num_iter, axis=1)  # (n, K, H, W, C)
        for step, *_, tokens in self.steps:
            unknown = order_step > step  # (n, L)
            unfinished = unknown.any(axis=1)[:, None, None, None]
            frames[:, step] = np.where(unfinished, decode(tokens, unknown), images)
        group_size = (order_step[:, :, None] == np.arange(self.num_iter)).sum(axis=1)  # (n, K)
        self.batches.append(dict(order_step=order_step, tau=tau, cfg=cfg, group_size=group_size, frames=frames))
        self.count, self.steps = 0, []
        if sum(len(part["tau"]) for part in self.batches) == len(self.labels):
            self._save()

    def _save(self):
        """Write the file."""
        arrays = {key: np.concatenate([part[key] for part in self.batches]) for key in self.batches[0]}
        save_trace(self.path, arrays | {"labels": np.asarray(self.labels, dtype=np.int64)})


def save_trace(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write the arrays of a `Trace`."""
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)


def num_traced(path: Path) -> int:
    """Number of images in the trace file; 0 for no file or a broken one."""
    try:
        return len(_arrays(path, ("labels",))["labels"])
    except Exception:
        return 0


def _arrays(path: Path, names) -> dict[str, np.ndarray]:
    """The arrays of these names; of another file numpy raises exceptions of almost any type."""
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in names}


def _is_trace(trace: dict[str, np.ndarray]) -> bool:
    """Have the arrays the shapes, types and ranges of a `Trace`'s?"""
    order_step, frames = trace["order_step"], trace["frames"]
    if order_step.ndim != 2 or frames.ndim != 5 or frames.dtype != np.uint8 or frames.shape[-1] not in (1, 3):
        return False
    (count, length), steps = order_step.shape, frames.shape[1]
    shapes = dict(tau=(count, length), cfg=(count, length), group_size=(count, steps), labels=(count,))
    if len(frames) != count or any(trace[name].shape != shape for name, shape in shapes.items()):
        return False
    whole = all(trace[name].dtype.kind == "i" for name in ("order_step", "group_size", "labels"))
    finite = all(trace[name].dtype.kind == "f" and np.isfinite(trace[name]).all() for name in ("tau", "cfg"))
    if not (whole and finite and frames.size and order_step.size):
        return False
    return bool(order_step.min() >= -1 and 0 <= order_step.max() < steps)


def load_trace(path: Path, of_scales: bool = False) -> dict[str, np.ndarray]:
    """The arrays of a trace, described in `sampling.trace.Trace`; another file raises ValueError.

    And so does, without of_scales, one whose tokens are no grid, because its model draws scales.
    """
    check_input_file(path, "trace.npz", "sample.py --save_trace N writes one for each setting")
    try:
        trace = _arrays(path, KEYS)
    except Exception:
        trace = None
    if trace is None or not _is_trace(trace):
        raise ValueError(f"{path} is not a trace written by sample.py --save_trace")
    if not (of_scales or has_grid(trace)):
        raise ValueError(
            f"{path} is of a model of several scales, whose tokens are no grid: plot_trace.py draws its pictures"
        )
    return trace


def has_grid(trace: dict[str, np.ndarray]) -> bool:
    """Are the tokens of a trace cells of one grid? Those of several scales are not."""
    return token_grid(trace["order_step"].shape[1], *trace["frames"].shape[2:4]) is not None


def as_grid(values: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """(L,) as the grid (h, w) of the tokens of frames (K, H, W, C)."""
    return values.reshape(token_grid(len(values), *frames.shape[1:3]))


def picture(frame: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 1 or 3) as (H, W, 3)."""
    return np.broadcast_to(frame, (*frame.shape[:2], 3))


def draw_gif(path: Path, trace: dict[str, np.ndarray], i: int) -> None:
    """The GIF of image i, a frame a step, a pause at the end; beside it its mask, where its tokens are a grid."""
    frames, order, masked = trace["frames"][i], trace["order_step"][i], has_grid(trace)
    if masked:
        order = as_grid(order, frames)
    height, width = frames.shape[1:3]
    zoom = math.ceil(GIF_SIDE / min(height, width))
    size = (width * zoom, height * zoom)
    sheets = []
    for step in range(order.max() + 1):
        mask = np.full((*order.shape, 3), UNKNOWN, np.uint8)
        mask[order < step], mask[order == step] = KNOWN, NEW
        parts = [picture(frames[step]), *([mask] if masked else [])]
        sheet = Image.new("RGB", (len(parts) * (size[0] + 8) - 8, size[1]), "white")
        for x, pixels in zip((0, size[0] + 8), parts):
            sheet.paste(Image.fromarray(np.ascontiguousarray(pixels)).resize(size, Image.Resampling.NEAREST), (x, 0))
        sheets.append(sheet)
    pace = max(80, min(500, 8000 // len(sheets)))  # milliseconds
    pauses = [pace] * (len(sheets) - 1) + [2000]
    with atomic_file(path) as temporary:
        sheets[0].save(temporary, format="gif", save_all=True, append_images=sheets[1:], duration=pauses, loop=0)


def over_pixels(cells: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Values (n, L) of the tokens of a grid as (n, H, W, 1), for images of shape (n, H, W, C)."""
    n, height, width, _ = shape
    h, w = token_grid(cells.shape[1], height, width)
    grid = cells.reshape(n, h, 1, w, 1)
    return np.broadcast_to(grid, (n, h, height // h, w, width // w)).reshape(n, height, width, 1)


def token_grid(length: int, height: int, width: int) -> tuple[int, int] | None:
    """(h, w) of so many square tokens that fill an image of (height, width) pixels; None where none do."""
    side = math.isqrt(height * width // length) if length else 0
    if not side or side**2 * length != height * width or height % side or width % side:
        return None
    return height // side, width // side
