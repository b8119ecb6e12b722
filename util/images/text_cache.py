"""Features of captions on disk: written once by scripts/cache_text.py, read by training and sampling.

FOLDER/settings.json      written first: encoder and captions; a run that continues must have the same
FOLDER/shard-00000.npy    (·, C) float16: features of the tokens of shard_size captions, one after the other
FOLDER/shard-00000.json   written after it: lengths of the captions, checksum
FOLDER/index.json         written last: the settings, the captions, and of each image its name and its captions
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from util.checkpoint import atomic_file
from util.images.folders import shown
from util.images.latent_files import write_json
from util.images.latents import checksum, read_json
from util.lock import remove_left
from util.rng import seed_of

VERSION = 1
AGAIN = "run scripts/cache_text.py again to make it anew"
SETTINGS = {"version", "format", "dtype", "fingerprint", "width", "num_tokens", "shard_size", "num_captions", "content"}
INDEX = SETTINGS | {"encoder", "captions", "names", "numbers", "lengths"}


class CachedTexts:
    """The captions of a cache: `texts[i]` is the features (n, C) float16 of caption i.

    captions: their texts; names: of images; numbers[k]: the captions of image k; fingerprint: of the encoder. Files of
    another size than the index says raise ValueError at once.
    """

    def __init__(self, folder: Path, index: dict):
        self.folder, self.encoder, self.fingerprint = folder, index["encoder"], index["fingerprint"]
        self.width, self.num_tokens, self.shard_size = index["width"], index["num_tokens"], index["shard_size"]
        self.captions, self.names, self.numbers = index["captions"], index["names"], index["numbers"]
        lengths = np.array(index["lengths"], dtype=np.int64)
        if len(lengths) != len(self.captions) or len(self.names) != len(self.numbers):
            raise ValueError(f"{folder / 'index.json'} is damaged, its lists have other lengths: {AGAIN}")
        self.stops = np.concatenate([np.cumsum(part) for part in _parts(lengths, self.shard_size)])
        self.starts = self.stops - lengths
        self.shards = [
            _open_shard(shard_path(folder, number), int(part.sum()), self.width)
            for number, part in enumerate(_parts(lengths, self.shard_size))
        ]

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, i: int) -> np.ndarray:
        return np.array(self.shards[i // self.shard_size][self.starts[i] : self.stops[i]])

    def describe(self) -> dict:
        """What a checkpoint keeps of it."""
        return dict(encoder=self.encoder, fingerprint=self.fingerprint, width=self.width, num_tokens=self.num_tokens)


@dataclass(frozen=True)
class ImageCaptions:
    """Which captions the images of a data set have: numbers[i] of image i.

    broken (N,): marks images that could not be read, see `util.images.datasets`; what stands in has no caption.
    """

    numbers: list[list[int]]
    broken: torch.Tensor

    def draw(self, images: list[int], seed: int, step: int) -> torch.Tensor:
        """The number of a caption for each image (b,) long, −1 for none, drawn from (seed, step, image) alone."""
        drawn = []
        for image in images:
            numbers = self.numbers[image]
            number = numbers[seed_of("caption", seed, step, image) % len(numbers)]
            drawn.append(-1 if self.broken[image] else number)
        return torch.tensor(drawn)

    def examples(self, most: int) -> list[int]:
        """Captions of images that stand at equal distances in the data set, each once."""
        images = range(0, len(self.numbers), max(1, len(self.numbers) // most))
        return list(dict.fromkeys(self.numbers[image][0] for image in images))[:most]


def captions_for(texts: CachedTexts, dataset, names: list[str]) -> ImageCaptions:
    """The captions of a data set whose images have these names; an image without one raises ValueError."""
    known = dict(zip(texts.names, texts.numbers))
    missing = [name for name in names if not known.get(name)]
    if missing:
        what = f"{len(missing)} of the {len(names)} images have no caption in it"
        raise ValueError(f"--cached_text {texts.folder}: {what}: {shown(missing)}")
    return ImageCaptions([known[name] for name in names], dataset.broken)


def shard_path(folder: Path, number: int) -> Path:
    """File `number` of the features."""
    return folder / f"shard-{number:05d}.npy"


def is_text_cache(folder) -> bool:
    """Has scripts/cache_text.py written to this folder?"""
    try:
        settings = read_json(Path(folder) / "settings.json", SETTINGS)
    except ValueError:
        return False
    return settings is not None and settings["format"] == "text"


def open_texts(folder: str, flag: str = "cached_text") -> CachedTexts:
    """The cache in a folder; one that is not there, unfinished, damaged or of another version raises ValueError."""
    if not folder or not Path(folder).is_dir():
        raise ValueError(f"no folder of text features at --{flag} {folder!r}: scripts/cache_text.py makes one")
    if not is_text_cache(folder):
        raise ValueError(f"--{flag} {folder} holds no text features of scripts/cache_text.py")
    index = read_json(Path(folder) / "index.json", INDEX)
    if index is None:
        raise ValueError(f"the text features in {folder} are not complete: run scripts/cache_text.py again to go on")
    if index["version"] != VERSION:
        raise ValueError(f"the text features in {folder} are of version {index['version']!r}, valid: {VERSION}")
    return CachedTexts(Path(folder), index)


def begin(folder: Path, settings: dict) -> None:
    """Start a cache in a new or empty folder, or continue one with the same settings; others raise ValueError."""
    if not is_text_cache(folder):
        if folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"--cached_text {folder} is not empty and no text features; give another")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "settings.json", settings)
        return
    stored = read_json(folder / "settings.json", SETTINGS)
    for key, value in settings.items():
        if stored[key] != value:
            what = f"{key} {stored[key]!r} instead of {value!r}"
            raise ValueError(f"--cached_text {folder} holds features of other texts or of another encoder ({what})")
    remove_left(folder.glob(".*.tmp"))


def read_shard_lengths(folder: Path, number: int, count: int, width: int) -> list[int] | None:
    """Lengths of the captions of a file that is finished and undamaged, else None."""
    try:
        note = read_json(shard_path(folder, number).with_suffix(".json"), {"lengths", "checksum"})
        if note is None or len(note["lengths"]) != count:
            return None
        shard = _open_shard(shard_path(folder, number), sum(note["lengths"]), width)
    except ValueError:
        return None
    return note["lengths"] if checksum(shard) == note["checksum"] else None


def write_shard(folder: Path, number: int, rows: list[np.ndarray]) -> list[int]:
    """Write features (n, C) of captions; their lengths."""
    path, lengths = shard_path(folder, number), [len(row) for row in rows]
    path.with_suffix(".json").unlink(missing_ok=True)
    features = np.concatenate(rows)
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        np.save(file, features)
    write_json(path.with_suffix(".json"), {"lengths": lengths, "checksum": checksum(features)})
    return lengths


def content_of(captions: list[str], names: list[str], numbers: list[list[int]]) -> str:
    """16 hex digits that change with captions and with whose they are."""
    return hashlib.blake2b(json.dumps([captions, names, numbers]).encode(), digest_size=8).hexdigest()


def _parts(lengths: np.ndarray, size: int) -> list[np.ndarray]:
    return [lengths[start : start + size] for start in range(0, len(lengths), size)]


def _open_shard(path: Path, count: int, width: int) -> np.ndarray:
    try:
        shard = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise ValueError(f"cannot read {path} ({error}): {AGAIN}") from None
    if getattr(shard, "shape", None) != (count, width) or shard.dtype != np.float16:
        raise ValueError(f"{path} is not an array {(count, width)} of float16: {AGAIN}")
    return shard
