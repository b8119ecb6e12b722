"""What a page asks for, as plain JSON, and the checks that make of it what the sampling loop takes.

A request names a checkpoint, settings of sample.py as texts, a label for each image and a seed, and what is steered:
`Spec` has the keys. The same request gives the same images, bit for bit, whoever sends it: the address of a page holds
nothing else.
"""

import base64
import binascii
import io
import json
import shlex
from dataclasses import dataclass, fields, replace

import numpy as np

from heads.policy import PolicyHeads
from heads.schedules import needed_steps
from sampling.editing import MODES, Edit, read_picture
from sampling.grid import span
from sampling.inspector.steering import Change
from sampling.run import Parts
from sampling.settings import SampleConfig
from util import dist
from util.args import defaults, pick, read_texts
from util.sizes import shape_of

MOST_IMAGES, MOST_CHANGES, MOST_REDOS, MOST_DRAWS = 64, 256, 16, 16
MOST_STEPS = 4096  # autoregressive ones, and those of the token head, of a request


@dataclass(frozen=True)
class Loaded:
    """A checkpoint that the inspector shows: what makes images, the names of its classes, its sampling settings."""

    name: str
    path: str
    parts: Parts
    classes: list[str]
    base: SampleConfig

    @property
    def model(self):
        """Its `models.families.Backbone`."""
        return self.parts.model

    @property
    def heads(self) -> PolicyHeads | None:
        """Its policy heads."""
        return self.parts.heads

    def setting(self, texts: dict) -> SampleConfig:
        """The settings that sample.py would have with these flags, checked; ValueError for what it would refuse."""
        schedule = texts.get("schedule") or "{"
        if not isinstance(schedule, str) or not schedule.lstrip().startswith("{"):
            raise ValueError("schedule must be the JSON of its values: a page names no files")
        given = read_texts(SampleConfig, texts)
        for name in ("num_iter", "num_sampling_steps"):
            if max(map(int, str(given.get(name, 1)).split(":"))) > MOST_STEPS:
                raise ValueError(f"{name} must be at most {MOST_STEPS} in the inspector, got {given[name]}")
        lists = {name: [value] for name, value in given.items()}
        base, model = replace(self.base, **given), self.model
        (setting,) = span(lists, base, model.fixed_rules, self.heads is not None, needed_steps(model))
        if setting.sampling.smooth:
            raise ValueError("smooth has no meaning in the inspector, which shows ids as they are drawn")
        setting.sampling.check(model, self.heads)
        return setting.sampling


def base_settings(config: dict) -> SampleConfig:
    """The sampling settings in a checkpoint's config, with the defaults of those that it lacks."""
    return pick(SampleConfig, {**defaults(SampleConfig), **config["sample"]})


@dataclass(frozen=True)
class Redo:
    """A region of finished images made again: tokens to draw anew, (L,) bool, with noise of this seed."""

    unknown: np.ndarray
    seed: int


@dataclass(frozen=True)
class Spec:
    """A request that was checked.

    text: its JSON in one form, the same for equal requests. labels: one for each image; image i depends on (seed, i) as
    in sample.py. changes: what is steered; redo: regions made again, one after the other; sure: how many times each
    token of a diffusion head is drawn besides, to see how far the draws lie apart; edit: a picture of which a part is
    kept.
    """

    loaded: Loaded
    text: str
    texts: dict
    sampling: SampleConfig
    labels: list[int]
    seed: int
    changes: tuple[Change, ...]
    redo: tuple[Redo, ...]
    sure: int
    edit: Edit | None

    def command(self) -> str:
        """The sample.py command of the same images; what is steered or made again has no flag."""
        words = ["--class_labels=" + ",".join(map(str, self.labels)), "--num_images", str(len(self.labels))]
        words += ["--edit_image", "image.png", "--edit_mask", "mask.png"] if self.edit else []
        return shlex.join(["python", "sample.py", *self.flags("OUT"), *words, "--metrics", "none"])

    def flags(self, output_dir: str) -> list[str]:
        """The flags of sample.py that say checkpoint, settings, seed and arithmetic."""
        parts = self.loaded.parts
        words = ["--checkpoint", self.loaded.path, "--output_dir", output_dir, "--seed", str(self.seed)]
        words += [f"--{name}={text}" for name, text in self.texts.items() if text]
        return [*words, "--device", str(parts.device), "--dtype", dist.dtype_name(parts.dtype)]


def read_spec(request, gallery: dict[str, Loaded]) -> Spec:
    """The Spec of a request among the checkpoints; ValueError, one line, for anything that it cannot be."""
    if not isinstance(request, dict):
        raise ValueError("a request must be a JSON object")
    known = ("checkpoint", "settings", "labels", "seed", "steer", "redo", "sure", "edit")
    for name in request:
        if name not in known:
            raise ValueError(f"unknown key {name!r} in the request; valid: {', '.join(known)}")
    name = request.get("checkpoint", next(iter(gallery), None))
    if not isinstance(name, str) or name not in gallery:
        raise ValueError(f"unknown checkpoint {name!r}; valid: {', '.join(gallery) or 'none was given'}")
    loaded, texts = gallery[name], request.get("settings", {})
    if not isinstance(texts, dict):
        raise ValueError("settings must be a JSON object of texts")
    sampling = loaded.setting(texts)
    changes = _list(request, "steer", MOST_CHANGES)
    edit = _edit(request.get("edit"), loaded)
    return Spec(
        loaded=loaded,
        text=json.dumps({**request, "checkpoint": name}, sort_keys=True),
        texts=texts,
        sampling=sampling,
        labels=_labels(request.get("labels", [0]), loaded),
        seed=whole(request, "seed", 1, 0, 2**63 - 1),
        changes=tuple(_change(item, sampling, loaded) for item in changes),
        redo=tuple(_redo(item, loaded) for item in _list(request, "redo", MOST_REDOS)),
        sure=whole(request, "sure", 0, 0, MOST_DRAWS),
        edit=edit,
    )


def whole(request: dict, name: str, default: int, low: int, high: int) -> int:
    """The whole number of this name in a request; ValueError for another value, or one that is out of bounds."""
    value = request.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} must be a whole number from {low} to {high}, got {str(value)[:40]!r}")
    return value


def _list(request: dict, name: str, most: int) -> list:
    items = request.get(name, [])
    if not isinstance(items, list) or len(items) > most or not all(isinstance(item, dict) for item in items):
        raise ValueError(f"{name} must be a list of at most {most} JSON objects")
    return items


def _labels(labels, loaded: Loaded) -> list[int]:
    last = len(loaded.classes) - 1
    if not isinstance(labels, list) or not 1 <= len(labels) <= MOST_IMAGES:
        raise ValueError(f"labels must be a list of 1 to {MOST_IMAGES} class numbers, one for each image")
    return [whole({"a label": label}, "a label", 0, -1, last) for label in labels]


def _number(item: dict, name: str) -> float | None:
    value = item.get(name)
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1000:
        raise ValueError(f"{name} must be a number from 0 to 1000, got {str(value)[:40]!r}")
    return float(value)


def positions_of(item: dict, name: str, count: int) -> tuple[int, ...]:
    """The positions, below count, that a request's list of this name has; ValueError for others."""
    values = item.get(name, [])
    if not isinstance(values, list) or len(values) > count:
        raise ValueError(f"{name} must be a list of at most {count} positions")
    return tuple(
        sorted({whole({f"a position of {name}": v}, f"a position of {name}", 0, 0, count - 1) for v in values})
    )


def _change(item: dict, sampling: SampleConfig, loaded: Loaded) -> Change:
    names = [field.name for field in fields(Change)]
    for name in item:
        if name not in names:
            raise ValueError(f"unknown key {name!r} in steer; valid: {', '.join(names)}")
    fixed = loaded.model.fixed_rules
    painted = positions_of(item, "next", loaded.model.config.seq_len)
    if painted and fixed.get("group"):
        raise ValueError(f"the next tokens cannot be painted: this model's own group rule is {fixed['group']}")
    label = item.get("label")
    return Change(
        step=whole(item, "step", 0, 0, sampling.num_iter - 1),
        tau=_number(item, "tau"),
        cfg=_number(item, "cfg"),
        label=None if label is None else whole(item, "label", 0, -1, len(loaded.classes) - 1),
        next=painted,
    )


def _grid(item: dict, name: str, loaded: Loaded) -> np.ndarray:
    """(h, w) bool of cells of the token grid, at least one, which the model can make anew."""
    grid = np.zeros(shape_of(loaded.model.config), dtype=bool)
    grid.reshape(-1)[list(positions_of(item, name, grid.size))] = True
    if not grid.any():
        raise ValueError(f"{name} has no cell: paint at least one token to make")
    Edit(np.zeros((*grid.shape, 1), np.uint8), grid).check(loaded.model.fixed_rules)
    return grid


def tokens_of(loaded: Loaded, grid: np.ndarray) -> np.ndarray:
    """(L,) bool: the tokens to make where cells (h, w) bool are to be made."""
    import torch

    return loaded.parts.tokenizer.unknown_tokens(torch.from_numpy(grid)).numpy()


def _redo(item: dict, loaded: Loaded) -> Redo:
    return Redo(tokens_of(loaded, _grid(item, "region", loaded)), whole(item, "seed", 1, 0, 2**63 - 1))


def _edit(item, loaded: Loaded) -> Edit | None:
    if item is None:
        return None
    if not isinstance(item, dict) or not isinstance(item.get("image"), str):
        raise ValueError("edit must be a JSON object with image, a picture in base64, and region")
    try:
        data = base64.b64decode(item["image"], validate=True)
    except binascii.Error:
        raise ValueError("edit.image is no base64") from None
    tokenizer, config = loaded.parts.tokenizer, loaded.model.config
    source = read_picture("the uploaded picture", io.BytesIO(data), MODES[tokenizer.image_channels], config.img_size)
    return Edit(source, _grid(item, "region", loaded))
