"""Traces of sampling: step, temperature and guidance scale of each token, and the picture after each step."""

import math
import zipfile
from pathlib import Path

import numpy as np

from util.checkpoint import atomic_file

GREY = 128  # of unknown tokens


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
        with atomic_file(self.path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, **arrays, labels=np.asarray(self.labels, dtype=np.int64))


def num_traced(path: Path) -> int:
    """Number of images in the trace file; 0 for no file or a broken one."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return len(file["labels"])
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        return 0


def over_pixels(cells: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Values (n, L) of the tokens of a grid as (n, H, W, 1), for images of shape (n, H, W, C)."""
    n, height, width, _ = shape
    h, w = token_grid(cells.shape[1], height, width)
    grid = cells.reshape(n, h, 1, w, 1)
    return np.broadcast_to(grid, (n, h, height // h, w, width // w)).reshape(n, height, width, 1)


def token_grid(length: int, height: int, width: int) -> tuple[int, int] | None:
    """(h, w) of so many square tokens that fill an image of (height, width) pixels; None where none do."""
    side = math.isqrt(height * width // length)
    if side**2 * length != height * width or height % side or width % side:
        return None
    return height // side, width // side
