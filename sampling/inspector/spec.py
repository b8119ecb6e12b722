"""What a page asks for, as plain JSON, and the checks that make of it what the sampling loop takes.

A request names a checkpoint, settings of sample.py as texts, a label for each image and a seed, and what is steered:
`Spec` has the keys. The same request gives the same images, bit for bit, whoever sends it: the address of a page holds
nothing else.
"""

import base64
import io
import json
import shlex
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import numpy as np

from heads.policy import PolicyHeads
from heads.schedules import needed_steps
from models.text_encoder import TextEncoder
from sampling.editing import MODES, Edit, read_picture
from sampling.grid import span
from sampling.inspector.steering import Change
from sampling.prompts import encoded
from sampling.run import Parts
from sampling.settings import SampleConfig
from util import dist
from util.args import defaults, pick, read_texts
from util.images.captions import clean
from util.sizes import shape_of

MOST_IMAGES, MOST_CHANGES, MOST_REDOS, MOST_DRAWS = 64, 256, 16, 16
MOST_SEED = 2**53 - 1  # the largest whole number that a page has
MOST_STEPS = 4096  # autoregressive ones, and those of the token head, of a request
MOST_CHARACTERS = 1000  # of a prompt


@dataclass(frozen=True)
class Loaded:
    """A checkpoint that the inspector shows: what makes images, the names of its classes, its sampling settings.

    encoder: of a model of text, which has no classes, what reads prompts. flags: those of sample.py that it was loaded
    with.
    """

    name: str
    path: str
    parts: Parts
    classes: list[str]
    base: SampleConfig
    encoder: TextEncoder | None = None
    flags: tuple[str, ...] = ()

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
    """A region of finished images made again, cells (h, w) bool of the token grid, with noise of this seed."""

    region: np.ndarray
    seed: int


@dataclass(frozen=True)
class Spec:
    """A request that was checked.

    text: its JSON in one form, the same for equal requests. conditions: the classes, or the prompts, that labels
    number, one for each image. Image i depends on (seed, i) as in sample.py. changes: what is steered; redo: regions
    made again, one after the other; sure: how many times each token of a diffusion head is drawn besides, to see how
    far the draws lie apart; edit: a picture of which a part is kept.
    """

    loaded: Loaded
    text: str
    texts: dict
    sampling: SampleConfig
    conditions: tuple[str, ...]
    labels: list[int]
    seed: int
    changes: tuple[Change, ...]
    redo: tuple[Redo, ...]
    sure: int
    edit: Edit | None

    @property
    def names(self) -> list[str]:
        """The class, or the prompt, of each image."""
        return ["any" if label < 0 else self.conditions[label] for label in self.labels]

    def parts(self) -> Parts:
        """What makes its images; a model of text has its prompts from then on. On the thread that draws only."""
        model, captions = self.loaded.model, list(self.conditions)
        if self.loaded.encoder is not None and (model.prompts is None or model.prompts.captions != captions):
            model.prompts = encoded(captions, self.loaded.encoder)
        return self.loaded.parts

    def command(self) -> str | None:
        """The sample.py command of the same images; what is steered or made again has no flag.

        prompts.txt: the prompts, one a line. None: sample.py makes images of the prompts in turn only.
        """
        words = ["--class_labels=" + ",".join(map(str, self.labels))]
        if self.loaded.encoder is not None:
            if self.labels != [i % len(self.conditions) for i in range(len(self.labels))]:
                return None
            words = [f"--prompts={self.conditions[0] if len(self.conditions) == 1 else 'prompts.txt'}"]
        words += ["--num_images", str(len(self.labels))]
        words += ["--edit_image", "image.png", "--edit_mask", "mask.png"] if self.edit else []
        return shlex.join(["python", "sample.py", *self.flags("OUT"), *words, "--metrics", "none"])

    def flags(self, output_dir: str) -> list[str]:
        """The flags of sample.py that say checkpoint, settings, seed and arithmetic."""
        parts = self.loaded.parts
        words = ["--checkpoint", self.loaded.path, *self.loaded.flags]
        words += ["--output_dir", output_dir, "--seed", str(self.seed)]
        words += [f"--{name}={text}" for name, text in self.texts.items() if text]
        return [*words, "--device", str(parts.device), "--dtype", dist.dtype_name(parts.dtype)]


def read_spec(request, gallery: dict[str, Loaded]) -> Spec:
    """The Spec of a request among the checkpoints; ValueError, one line, for anything that it cannot be."""
    known = ("checkpoint", "settings", "prompts", "labels", "seed", "steer", "redo", "sure", "edit")
    _check_keys(request, known, "the request")
    name = request.get("checkpoint", next(iter(gallery), None))
    if not isinstance(name, str) or name not in gallery:
        shown = str(name)[:40]
        raise ValueError(f"unknown checkpoint {shown!r}; valid: {', '.join(gallery) or 'none was given'}")
    loaded, texts = gallery[name], request.get("settings", {})
    if not isinstance(texts, dict):
        raise ValueError("settings must be a JSON object of texts")
    sampling = loaded.setting(texts)
    conditions = _conditions(request.get("prompts"), loaded)
    changes = _list(request, "steer", MOST_CHANGES)
    edit = _edit(request.get("edit"), loaded)
    return Spec(
        loaded=loaded,
        text=json.dumps({**request, "checkpoint": name}, sort_keys=True),
        texts=texts,
        sampling=sampling,
        conditions=conditions,
        labels=_labels(request.get("labels", [0]), len(conditions)),
        seed=whole(request, "seed", 1, 0, MOST_SEED),
        changes=tuple(_change(item, sampling, loaded, len(conditions)) for item in changes),
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


def _check_keys(item, known, what: str) -> None:
    if not isinstance(item, dict):
        raise ValueError(f"{what} must be a JSON object")
    for name in item:
        if name not in known:
            raise ValueError(f"unknown key {name[:40]!r} in {what}; valid: {', '.join(known)}")


def _conditions(prompts, loaded: Loaded) -> tuple[str, ...]:
    if loaded.encoder is None:
        if prompts is not None:
            raise ValueError(f"prompts have no meaning for {loaded.name}, which is of classes")
        return tuple(loaded.classes)
    right = isinstance(prompts, list) and 1 <= len(prompts) <= MOST_IMAGES
    if not right or not all(isinstance(text, str) and len(text) <= MOST_CHARACTERS for text in prompts):
        most = f"1 to {MOST_IMAGES} texts of at most {MOST_CHARACTERS} characters"
        raise ValueError(f"prompts must be a list of {most}: {loaded.name} is of text")
    captions = tuple(map(clean, prompts))
    if "" in captions:
        raise ValueError(f"prompt {captions.index('') + 1} of {len(captions)} has no text")
    return captions


def _labels(labels, count: int) -> list[int]:
    if not isinstance(labels, list) or not 1 <= len(labels) <= MOST_IMAGES:
        raise ValueError(f"labels must be a list of 1 to {MOST_IMAGES} class numbers, one for each image")
    return [whole({"a label": label}, "a label", 0, -1, count - 1) for label in labels]


def number(item: dict, name: str, most: float = 1000) -> float | None:
    """The number of this name in a request, from 0 to most; None where it has none, ValueError for another value."""
    value = item.get(name)
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= most:
        raise ValueError(f"{name} must be a number from 0 to {most:g}, got {str(value)[:40]!r}")
    return float(value)


def positions_of(item: dict, name: str, count: int) -> tuple[int, ...]:
    """The positions, below count, that a request's list of this name has; ValueError for others."""
    values = item.get(name, [])
    if not isinstance(values, list) or len(values) > count:
        raise ValueError(f"{name} must be a list of at most {count} positions")
    return tuple(
        sorted({whole({f"a position of {name}": v}, f"a position of {name}", 0, 0, count - 1) for v in values})
    )


def _change(item: dict, sampling: SampleConfig, loaded: Loaded, num_labels: int) -> Change:
    _check_keys(item, [field.name for field in fields(Change)], "steer")
    fixed, step = loaded.model.fixed_rules, whole(item, "step", 0, 0, MOST_STEPS - 1)
    with _named(f"what is steered from step {step + 1} on cannot be"):
        if step >= sampling.num_iter:
            raise ValueError(f"there are steps 1 to {sampling.num_iter}; undo it, or take more steps")
        painted = positions_of(item, "next", loaded.model.config.seq_len)
        if painted and fixed.get("group"):
            raise ValueError(f"the next tokens cannot be painted: this model's own group rule is {fixed['group']}")
        label = item.get("label")
        label = None if label is None else whole(item, "label", 0, -1, num_labels - 1)
        return Change(step, number(item, "tau"), number(item, "cfg"), label, painted)


@contextmanager
def _named(what: str):
    """Put what it is about before the line of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


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
    _check_keys(item, ("region", "seed"), "redo")
    with _named("a region cannot be made again"):
        return Redo(_grid(item, "region", loaded), whole(item, "seed", 1, 0, MOST_SEED))


def _edit(item, loaded: Loaded) -> Edit | None:
    if item is None:
        return None
    _check_keys(item, ("image", "region"), "edit")
    if not isinstance(item.get("image"), str):
        raise ValueError("edit must have image, a picture in base64, and region")
    try:
        data = base64.b64decode(item["image"], validate=True)
    except ValueError:
        raise ValueError("edit.image is no base64") from None
    tokenizer, config = loaded.parts.tokenizer, loaded.model.config
    source = read_picture("the uploaded picture", io.BytesIO(data), MODES[tokenizer.image_channels], config.img_size)
    return Edit(source, _grid(item, "region", loaded))
