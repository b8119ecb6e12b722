"""How images grow: what was drawn when, under which temperature and guidance, and the picture after each step."""

import math
import zipfile
from pathlib import Path

import numpy as np

from util.checkpoint import atomic_file

GREY = 128  # what is not known yet


class Trace:
    """How the images 0…N−1 of a sampling run grew, for `folder`/trace.npz. L tokens an image, K = num_iter steps.

    order_step (N, L): the step at which each token was revealed, −1 if it was known from the start; tau, cfg (N, L):
    the temperature and guidance scale it was drawn with (1 if known); group_size (N, K): tokens revealed at each step;
    frames (N, K, H, W, C) uint8: the image after each step, its unknown tokens mid-grey; labels (N,). Use: `begin` a
    batch, hand `record` to generate() as its callback, `end` the batch.
    """

    def __init__(self, folder: Path, labels: list[int], seq_len: int, num_iter: int):
        self.path, self.labels, self.seq_len, self.num_iter = folder / "trace.npz", labels, seq_len, num_iter
        self.batches, self.count, self.steps = [], 0, []

    def is_saved(self) -> bool:
        """Is there a file that already holds these images (or more)? True where there are none to trace."""
        return not self.labels or num_traced(self.path) >= len(self.labels)

    def begin(self, batch: range | None) -> None:
        """The images `batch` of the run are next; those from N on will not be recorded, nor any for None."""
        self.count = 0 if batch is None else min(len(self.labels) - batch.start, len(batch))
        self.steps = []

    def record(self, step, rows, plan, tokens) -> None:
        """The callback of generate(); what it notes stays on the device until `end`."""
        if self.count:
            self.steps.append((step, rows, plan.tau, plan.cfg, tokens[: self.count].clone()))

    def end(self, decode, images: np.ndarray) -> None:
        """Work out the batch: decode turns tokens (n, L, C) into uint8 (n, H, W, C); images are what came out of it."""
        if not self.count:
            return
        n, length, steps = self.count, self.seq_len, self.num_iter
        images = images[:n]
        order, tau, cfg = np.full((n, length), -1), *np.ones((2, n, length), np.float32)
        frames = np.repeat(images[:, None], steps, axis=1)  # (n, K, H, W, C): finished images stay as they are
        for step, rows, step_tau, step_cfg, _ in self.steps:
            rows = rows.numpy()
            where = np.unique(rows[:, 0], return_inverse=True)[1].reshape(-1)  # plans hold the unfinished images only
            row, (image, position) = where[rows[:, 0] < n], rows[rows[:, 0] < n].T
            order[image, position] = step
            tau[image, position], cfg[image, position] = (v.cpu().numpy()[row, position] for v in (step_tau, step_cfg))
        for step, *_, tokens in self.steps:
            unknown = _over_pixels(order > step, images.shape)
            grown = np.where((order > step).any(axis=1)[:, None, None, None], decode(tokens), images)
            frames[:, step] = np.where(unknown, GREY, grown)
        group_size = (order[:, :, None] == np.arange(steps)).sum(axis=1)  # (n, K)
        self.batches.append(dict(order_step=order, tau=tau, cfg=cfg, group_size=group_size, frames=frames))
        self.count, self.steps = 0, []
        if sum(len(part["tau"]) for part in self.batches) == len(self.labels):
            self._save()

    def _save(self):
        arrays = {key: np.concatenate([part[key] for part in self.batches]) for key in self.batches[0]}
        with atomic_file(self.path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, **arrays, labels=np.asarray(self.labels, dtype=np.int64))


def num_traced(path: Path) -> int:
    """How many images the trace file holds; 0 for no file or a broken one."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return len(file["labels"])
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        return 0


def _over_pixels(cells: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Cells (n, L) of a square grid as (n, H, W, 1), for images of shape (n, H, W, C)."""
    n, height, width, _ = shape
    side = math.isqrt(cells.shape[1])
    grid = cells.reshape(n, side, 1, side, 1)
    return np.broadcast_to(grid, (n, side, height // side, side, width // side)).reshape(n, height, width, 1)
