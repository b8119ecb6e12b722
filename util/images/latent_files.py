"""Writing latents to disk, in either format of util/images/latents.py, so that an interrupted run can go on.

A unit is a range of images that is written at once. Its content does not depend on the other units, so any process may
write it at any time.
"""

import hashlib
import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from urllib.parse import quote

import numpy as np

from util import dist
from util.checkpoint import atomic_file
from util.images.datasets import FolderDataset, ImageDataset, labels_of
from util.images.latents import SETTINGS, check_reading, checksum, npz_path, open_shard, read_json, read_npz, shard_path
from util.images.reading import MARS_WAY
from util.lock import remove_left


def image_names(dataset: ImageDataset) -> list[str]:
    """A different name for each image: its path below the data set's folder, else <class>/<number>."""
    if isinstance(getattr(dataset, "parts", [None])[0], FolderDataset):  # of several sizes
        return [name for part in dataset.parts for name in image_names(part)]
    if isinstance(dataset, FolderDataset):
        prefix = len(os.path.join(dataset.folder, ""))
        return [_short(path[prefix:].replace(os.sep, "/")) for path, _ in dataset.samples]
    folders = [quote(name, safe=" ") for name in dataset.classes]  # one class of Fashion-MNIST is "T-shirt/top"
    return [f"{folders[label]}/{i:06d}" for i, label in enumerate(labels_of(dataset))]


def _short(name: str) -> str:
    """The name; if its last part with `.npz` has more than 255 bytes, that is 50 characters of it and a checksum."""
    folder, slash, file = name.rpartition("/")
    if len(os.fsencode(file)) <= 255 - len(".npz"):
        return name
    return f"{folder}{slash}{file[:50]}-{hashlib.blake2b(os.fsencode(file), digest_size=8).hexdigest()}"


def write_json(path: Path, content: dict) -> None:
    """Write atomically and with fsync."""
    with atomic_file(path) as temporary, open(temporary, "w") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())


def read_settings(folder: Path) -> dict | None:
    """The content of settings.json, None without one; a damaged file raises ValueError."""
    stored = read_json(folder / "settings.json", SETTINGS)
    if stored is not None:
        check_reading(stored, folder / "settings.json")
    return stored


def older_reading(folder: Path) -> dict:
    """How the images of a cache were read, as far as its settings.json does not say: in MAR's way. {} for no cache."""
    stored = read_settings(folder) or {"reading": None}
    if stored.get("reading", {}) is None:  # of no folder of images
        return {}
    return {name: value for name, value in asdict(MARS_WAY).items() if name not in stored.get("reading", {})}


def check_is_free(folder: Path) -> None:
    """Raise ValueError for a folder that holds something else than a cache of this program."""
    if read_settings(folder) is None and folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"--cached_path {folder} is not empty and no cache of this program; give another")


def begin(folder: Path, settings: dict) -> None:
    """Start a cache in a new or empty folder, or continue one with the same settings; others raise ValueError.

    The first process must call it before the others do (`dist.main_first`): it removes an interrupted run's files.
    """
    check_is_free(folder)
    stored = read_settings(folder)
    if stored is None:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "settings.json", settings)
        return
    if isinstance(settings.get("reading"), dict):  # a cache of before some of these settings was read in MAR's way
        stored["reading"] = {**asdict(MARS_WAY), **(stored.get("reading") or {})}
    elif "reading" in settings:
        stored.setdefault("reading", None)
    stored.setdefault("codebook_size", 0)  # one of before there were ids
    stored.setdefault("content", settings.get("content"))  # one of before it is known by names and sizes alone
    for key, value in settings.items():
        if stored[key] != value:
            raise ValueError(f"--cached_path {folder} holds other latents ({_difference(key, stored[key], value)})")
    if dist.is_main():  # no other process writes yet
        remove_left(folder.rglob(".*.tmp"))


def _difference(key: str, stored, wanted) -> str:
    if key == "reading" and stored and wanted:
        key = next(name for name in wanted if stored[name] != wanted[name])
        stored, wanted = stored[key], wanted[key]
    if key == "content":
        return "of files with the same names and sizes"
    if key != "classes":
        return f"{key} {stored!r} instead of {wanted!r}"
    missing, extra = sorted(set(wanted) - set(stored)), sorted(set(stored) - set(wanted))
    first = f", the first is {(missing + extra)[0]!r}" if missing or extra else ""
    return f"{len(missing)} classes of the data are not in it, {len(extra)} are only in it{first}"


class PackedWriter:
    """Writes images [start, stop), a unit, to one file."""

    def __init__(self, folder: Path, settings: dict, names: list[str]):
        self.folder, self.settings = folder, settings

    def unit_size(self, batch_size: int) -> int:
        """Images in a unit: those of a file."""
        return self.settings["shard_size"]

    def broken(self, unit: range) -> list[int] | None:
        """The unreadable images of a unit that is finished and undamaged, else None."""
        number = unit.start // self.settings["shard_size"]
        path = shard_path(self.folder, number)
        try:
            note = read_json(path.with_suffix(".json"), {"count", "checksum", "broken"})
            if note is None:
                return None
            shard = open_shard(path, note["count"], self.settings["shape"], self.settings["dtype"])
        except ValueError as error:
            print(f"made again: {error}")
            return None
        if len(shard) + len(note["broken"]) == len(unit) and checksum(shard) == note["checksum"]:
            return note["broken"]
        print(f"made again: {path} is damaged")
        return None

    def write(self, unit: range, kept: list[int], pairs: np.ndarray) -> None:
        """Write pairs (n, 2, …), those of the images `kept` of the unit."""
        path = shard_path(self.folder, unit.start // self.settings["shard_size"])
        path.with_suffix(".json").unlink(missing_ok=True)
        with atomic_file(path) as temporary, open(temporary, "wb") as file:
            np.save(file, pairs)
            file.flush()
            os.fsync(file.fileno())
        note = {"count": len(pairs), "checksum": checksum(pairs), "broken": sorted(set(unit) - set(kept))}
        write_json(path.with_suffix(".json"), note)

    def index(self) -> dict:
        """The entries of index.json that only this format has."""
        shards = []
        for number in range(math.ceil(self.settings["num_images"] / self.settings["shard_size"])):
            note = read_json(shard_path(self.folder, number).with_suffix(".json"), {"count", "checksum"})
            shards.append((note["count"], note["checksum"]))
        return {"shards": shards}


class NpzWriter:
    """Writes a file an image; a unit is a batch."""

    def __init__(self, folder: Path, settings: dict, names: list[str]):
        self.folder, self.shape, self.names = folder, settings["shape"], names

    def unit_size(self, batch_size: int) -> int:
        return batch_size

    def broken(self, unit: range) -> list[int] | None:
        """[] if all files of the unit exist and are whole, else None: a batch with a broken image is made again."""
        try:
            for i in unit:
                read_npz(npz_path(self.folder, self.names[i]), self.shape)
        except Exception:  # zipfile and numpy raise many types
            return None
        return []

    def write(self, unit: range, kept: list[int], pairs: np.ndarray) -> None:
        for i, (plain, mirrored) in zip(kept, pairs):
            path = npz_path(self.folder, self.names[i])
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as temporary, open(temporary, "wb") as file:
                np.savez(file, moments=plain, moments_flip=mirrored)

    def index(self) -> dict:
        return {}


WRITERS = {"packed": PackedWriter, "npz": NpzWriter}
