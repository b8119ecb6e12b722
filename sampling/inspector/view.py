"""What a page is told: requests, steps and pictures as JSON; and the page itself, one file with all that it needs."""

import base64
import hashlib
import io
import json
import math
import re
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image

from diffusion.solvers import SOLVERS
from heads.policy import INFER_MODES
from sampling.inspector.recording import Recording
from sampling.inspector.spec import Loaded, Spec
from sampling.trace import token_grid
from util.sizes import shape_of, size_of

PAGE = Path(__file__).parent / "page"
SCRIPTS = ("core", "picture", "maps", "curves", "watch", "steer", "branch", "compare", "batch", "share", "main")
THUMBNAIL = 64  # pixels of a picture's side, where a step has several


def png(image: np.ndarray) -> bytes:
    """A picture uint8 (H, W, 1 or 3) as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(file, format="png")
    return file.getvalue()


def data_url(image: np.ndarray) -> str:
    """A picture as the address that holds it."""
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()


def sheet(images: np.ndarray) -> dict:
    """Pictures uint8 (B, H, W, C) as one: its address, and how many stand in a row."""
    count, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    filled = np.concatenate([images, np.zeros((rows * columns - count, *images.shape[1:]), np.uint8)])
    whole = filled.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    return {"url": data_url(whole.reshape(rows * height, columns * width, channels)), "columns": columns}


def small(images: np.ndarray) -> np.ndarray:
    """The same pictures (B, H, W, C) with sides of THUMBNAIL pixels at most, where there are several."""
    longer = max(images.shape[1:3])
    if len(images) == 1 or longer <= THUMBNAIL:
        return images
    height, width = (max(1, round(side * THUMBNAIL / longer)) for side in images.shape[1:3])
    pictures = [Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image) for image in images]
    pictures = [np.asarray(picture.resize((width, height), Image.Resampling.BOX)) for picture in pictures]
    return np.stack(pictures).reshape(len(images), height, width, images.shape[-1])


def encoded(event: dict) -> bytes:
    """An event as a line of JSON; its frame, an array, as a sheet."""
    frame = event.get("frame")
    return json.dumps(event if frame is None else {**event, "frame": sheet(small(frame))}).encode() + b"\n"


def layout(loaded: Loaded) -> list[dict]:
    """The grids that the tokens of an image stand in: rows, columns, and the position of the first token of each."""
    scales = loaded.parts.tokenizer.scales
    shapes = [(side, side) for side in scales] if scales else [shape_of(loaded.model.config)]
    starts = np.cumsum([0, *(rows * columns for rows, columns in shapes)]).tolist()
    return [grid_at(shape, start) for shape, start in zip(shapes, starts)]


def grid_at(shape: tuple[int, int], start: int) -> dict:
    """A grid of this shape (rows, columns) as a page knows it; start: the position of its first token."""
    return {"rows": shape[0], "columns": shape[1], "start": start}


def described(loaded: Loaded) -> dict:
    """What a page needs to know of a checkpoint before it asks for anything."""
    config, base = loaded.model.config, loaded.setting({})
    return {
        "name": loaded.name,
        "path": loaded.path,
        "family": type(loaded.model).__name__,
        "fixed": loaded.model.fixed_rules,
        "classes": loaded.classes,
        "text": loaded.encoder is not None,
        "learned": list(loaded.heads.learn) if loaded.heads is not None else [],
        "discrete": loaded.model.token_head.discrete,
        "has_steps": loaded.model.token_head.has_steps,
        "img_size": config.img_size,
        "channels": loaded.parts.tokenizer.image_channels,
        "layout": layout(loaded),
        "settings": asdict(base),
        "modes": rules_of_modes(loaded),
        "spacings": {name: solver.spacing for name, solver in SOLVERS.items()},
    }


def rules_of_modes(loaded: Loaded) -> dict[str, dict]:
    """{inference mode: the settings that are used where only the mode is named}; without those it cannot have."""
    modes = {}
    for mode in INFER_MODES:
        with suppress(ValueError):
            modes[mode] = asdict(loaded.setting({"infer_mode": mode}))
    return modes


def beginning(spec: Spec) -> dict:
    """The first event of a run."""
    about = described(spec.loaded) | {"settings": asdict(spec.sampling)}
    about |= {"labels": spec.labels, "names": spec.names, "seed": spec.seed, "command": spec.command()}
    return {"begin": about | {"classes": list(spec.conditions)}}


def ending(recording: Recording) -> dict:
    """The last event of a run."""
    digest = hashlib.blake2b(recording.images.tobytes(), digest_size=8).hexdigest()
    return {"end": {"images": sheet(recording.images), "evals": recording.evals, "hash": digest}}


def events_of_trace(trace: dict[str, np.ndarray]) -> list[dict]:
    """The events of a stored trace (`sampling.trace.load_trace`), which knows no seconds and no ranks."""
    order_step, frames = trace["order_step"], trace["frames"]
    (count, length), (height, width, channels) = order_step.shape, frames.shape[2:]
    steps = int(order_step.max()) + 1
    labels = trace["labels"].tolist()
    names = ["any" if label < 0 else str(label) for label in labels]
    about = dict(name="a stored trace", family="", fixed={}, classes=[], learned=[], settings={}, labels=labels)
    about |= dict(names=names, img_size=size_of(height, width), channels=channels, seed=None, command=None)
    about |= dict(layout=[grid_at(token_grid(length, height, width), 0)], discrete=False, has_steps=False)
    about |= dict(path="", text=False, modes={}, spacings={})
    events = [{"begin": about}]
    for step in range(steps):
        images = []
        for i in range(count):
            positions = np.flatnonzero(order_step[i] == step).tolist()
            if positions:
                values = {name: trace[name][i, positions].round(5).tolist() for name in ("tau", "cfg")}
                unknown = int((order_step[i] >= step).sum())
                images.append({"image": i, "unknown": unknown, "positions": positions, **values})
        events.append({"step": step, "images": images, "frame": frames[:, step]})
    evals = {"end": {"images": sheet(frames[:, -1]), "evals": {}, "hash": None}}
    return [*events, evals]


def script() -> str:
    """The page's script, all files of it."""
    return "\n".join((PAGE / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS)


def page(content: dict) -> str:
    """The whole page, which needs nothing besides; content: what it knows from the start, such as the events of a run.

    Only this script runs in it, and it may ask its own server alone.
    """
    code = script()
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    policy = f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data: blob:; "
    policy += "connect-src 'self'; form-action 'none'; base-uri 'none'"
    known = json.dumps(content).replace("<", "\\u003c")
    parts = dict(policy=policy, style=(PAGE / "style.css").read_text(encoding="utf-8"), content=known, script=code)
    # all marks at once, since a part may have the text of a mark in it, such as a checkpoint's name
    text = (PAGE / "index.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda mark: parts[mark[1]], text)


def json_events(events: list[dict]) -> list[dict]:
    """The events as a page reads them."""
    return [json.loads(encoded(event)) for event in events]


def page_of(events: list[dict]) -> str:
    """A page that shows one run and asks no server."""
    return page({"events": json_events(events)})
