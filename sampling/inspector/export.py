"""A run as a file: the trace that sample.py --save_trace writes, a PNG, a GIF, a page of its own."""

import math
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from sampling.inspector.recording import Recording
from sampling.inspector.spec import Spec
from sampling.inspector.view import beginning, ending, page_of, png
from sampling.trace import draw_gif, save_trace
from util.images.pictures import make_grid


def trace_of(spec: Spec, recording: Recording) -> dict[str, np.ndarray]:
    """The arrays of `sampling.trace.Trace`; a frame that was left out is the one before it."""
    count, steps = len(recording.images), recording.steps[-1] + 1
    frames = np.repeat(recording.images[:, None], steps, axis=1)  # (B, K, H, W, C)
    shown = None
    taken = dict(zip(recording.steps, recording.frames))
    for step in range(steps - 1):
        shown = taken.get(step) if taken.get(step) is not None else shown
        if shown is not None:
            frames[:, step] = shown
    drawn = recording.order_step >= 0
    values = {name: np.where(drawn, recording.maps[name], 1).astype(np.float32) for name in ("tau", "cfg")}
    group_size = (recording.order_step[:, :, None] == np.arange(steps)).sum(axis=1)
    labels = np.asarray(spec.labels, dtype=np.int64)
    assert count == len(labels)
    return dict(order_step=recording.order_step, **values, group_size=group_size, frames=frames, labels=labels)


def as_npz(spec: Spec, recording: Recording) -> bytes:
    """The trace."""
    return written("trace.npz", lambda path: save_trace(path, trace_of(spec, recording)))


def as_png(spec: Spec, recording: Recording) -> bytes:
    """The image, or all of them with the names of their classes."""
    images = recording.images
    if len(images) == 1:
        return png(images[0])
    return png(make_grid(images, spec.names, math.ceil(math.sqrt(len(images)))))


def as_gif(spec: Spec, recording: Recording) -> bytes:
    """The growth of the first image."""
    if spec.loaded.parts.tokenizer.scales:
        raise ValueError("a GIF shows the tokens of one grid; this model's are of several scales: export the page")
    return written("trace.gif", lambda path: draw_gif(path, trace_of(spec, recording), 0))


def as_html(spec: Spec, recording: Recording) -> bytes:
    """A page that shows the run and asks no server."""
    return page_of([beginning(without_folders(spec)), *recording.events, ending(recording)]).encode()


def without_folders(spec: Spec) -> Spec:
    """The same with the names of the files that its checkpoint was loaded from alone: a page is for others to read."""
    flags = tuple(Path(word).name if os.sep in word else word for word in spec.loaded.flags)
    loaded = replace(spec.loaded, path=Path(spec.loaded.path).resolve().name, flags=flags)
    return replace(spec, loaded=loaded)


def written(name: str, write) -> bytes:
    """What write(path) puts into a file of this name."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        write(path)
        return path.read_bytes()


# format -> (function, type of the content)
FORMATS = {
    "npz": (as_npz, "application/octet-stream"),
    "png": (as_png, "image/png"),
    "gif": (as_gif, "image/gif"),
    "html": (as_html, "text/html; charset=utf-8"),
}
