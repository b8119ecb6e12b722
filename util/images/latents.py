"""Latents, or ids, on disk: written once by scripts/cache_latents.py, read by training in place of images.

    FOLDER/settings.json      written first: data, tokenizer and format; a run that continues must have the same
    FOLDER/index.json         written last: the settings, classes, name and label of each image, names of broken ones
    packed (the default): a few large files, memory-mapped
        shard-00000.npy       (n, 2, c, h, w): moments of n images in a row, each with those of its mirror image
        shard-00000.json      written after it: count, checksum, positions of images that could not be read
    npz: MAR's own layout
        CLASS/IMAGE.npz       float arrays `moments` and `moments_flip` (c, h, w)

Moments are those of a tokenizer's `encode_moments`: scale, mean and sampling are applied when they are read. Where the
index has a codebook_size above 0, a packed cache holds ids in their place, uint16 or uint32: (n, 2, h, w), or of a
multi-scale tokenizer (n, 2, L). A folder of .npz files without settings.json and index.json is a cache of MAR's
main_cache.py.
"""

import bisect
import hashlib
import itertools
import json
import warnings
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from tqdm import tqdm

from util.args import check_values
from util.images.datasets import FolderDataset, ImageDataset
from util.images.folders import walk
from util.images.reading import Reading, stored_reading
from util.sizes import Size, sides

VERSION = 1
AGAIN = "run scripts/cache_latents.py again to make it anew"
# keys of settings.json, and of index.json
FORMAT = {"version", "format", "dtype", "shard_size"}
SETTINGS = FORMAT | {"img_size", "shape", "fingerprint", "classes", "num_images", "images"}
INDEX = SETTINGS | {"tokenizer", "channels", "flip", "names", "labels", "broken"}


def npz_path(folder: Path, name: str) -> Path:
    """The file for an image; a name that leads out of the folder raises ValueError."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError(f"the latents in {folder} have the image {name!r}, whose file would be outside")
    return folder / f"{name}.npz"


def read_json(path: Path, keys: set[str]) -> dict | None:
    """The dict in a file, None without a file; anything but a dict with these keys raises ValueError."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    missing = sorted(keys - content.keys() if isinstance(content, dict) else keys)
    if missing:
        raise ValueError(f"{path} is damaged, it has no {missing[0]!r}: {AGAIN}")
    return content


def shard_path(folder: Path, number: int) -> Path:
    """File number `number` of the packed format."""
    return folder / f"shard-{number:05d}.npy"


def read_npz(path, shape=None) -> np.ndarray:
    """(2, c, h, w) from a file of MAR's layout, every byte checked (CRC). A bad file raises errors of many types."""
    try:
        file = np.load(path, allow_pickle=False)
    except ValueError:  # numpy takes any other file for a pickle, and its error advises to load it as one
        raise ValueError("it is no .npz file") from None
    with file:
        pair = np.stack([file["moments"], file["moments_flip"]])
    if pair.ndim != 4 or pair.dtype.kind != "f" or (shape is not None and pair.shape[1:] != tuple(shape)):
        raise ValueError(f"moments are {pair.dtype} {pair.shape[1:]}, expected floats {shape or '(c, h, w)'}")
    return pair


def open_shard(path: Path, count: int, shape, dtype) -> np.ndarray:
    """Memory-map (count, 2, *shape). A missing, truncated or different file raises ValueError."""
    try:
        shard = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise ValueError(f"cannot read {path} ({error}): {AGAIN}") from None
    expected = (count, 2, *shape)
    if getattr(shard, "shape", None) != expected or shard.dtype != np.dtype(dtype):
        raise ValueError(f"{path} is not an array {expected} of {dtype}: {AGAIN}")
    return shard


def checksum(array: np.ndarray) -> str:
    """16 hex digits over the values."""
    digest = hashlib.blake2b(digest_size=8)
    for row in array:
        digest.update(np.ascontiguousarray(row))
    return digest.hexdigest()


class Latents:
    """What data sets of cached latents have in common: ds[i] -> (moments (2, c, h, w) plain and mirrored, label, i).

    Also `shape` (c, h, w) of the moments, `fingerprint` of the tokenizer that made them (None in caches of MAR's),
    `reading`, how its images were read (None for images from no folder), and `names` of the images. A cache of ids has
    a codebook_size above 0 and, in place of the moments, ids (2, h, w) or (2, L) long.
    """

    codebook_size = 0

    def check(self, tokenizer, name: str, discrete: bool = False) -> None:
        """Raise ValueError unless this tokenizer, called `name`, could have made the latents or, if discrete, ids."""
        if discrete != (self.codebook_size > 0):
            held, wanted, tokens = ("latents", "ids", "discrete") if discrete else ("ids", "latents", "continuous")
            raise ValueError(
                f"the cache in {self.folder} holds {held}, this model takes {wanted}: choose another --loss, or a "
                f"cache that scripts/cache_latents.py --tokens {tokens} makes"
            )
        if self.codebook_size not in (0, tokenizer.codebook_size):
            raise ValueError(
                f"the ids in --cached_path {self.folder} are of a codebook of {self.codebook_size} entries, that of "
                f"the tokenizer {name} has {tokenizer.codebook_size}: give the --tokenizer that made them, or make "
                "another cache with scripts/cache_latents.py"
            )
        grid = (side // tokenizer.stride for side in sides(self.img_size))
        expected = tokenizer.ids_shape(self.img_size) if discrete else (tokenizer.moment_channels, *grid)
        if tuple(self.shape) != expected:
            raise ValueError(
                f"the latents in {self.folder} have the shape {tuple(self.shape)}, those of the tokenizer {name} at "
                f"{self.img_size} pixels have {expected}"
            )
        if self.fingerprint not in (None, tokenizer.fingerprint):
            raise ValueError(
                f"the latents in {self.folder} were made by another tokenizer than {name} (fingerprint "
                f"{self.fingerprint}, not {tokenizer.fingerprint})"
            )
        if discrete and (largest := self.largest_id()) >= self.codebook_size:
            raise ValueError(
                f"--cached_path {self.folder} is damaged: it holds the id {largest}, its codebook has the entries 0 to "
                f"{self.codebook_size - 1}: {AGAIN}"
            )


def check_reading(content: dict, path: Path) -> None:
    """Raise ValueError where what a file says about reading images is nothing that flags can say."""
    if not isinstance(content.get("reading"), dict | None):
        raise ValueError(f"{path} is damaged, its 'reading' is no dict: {AGAIN}")
    check_values(Reading, content.get("reading") or {}, path)


def reading_of(index: dict) -> Reading | None:
    """How the images of a cache were read; None for a data set that is no folder."""
    return None if index.get("reading", {}) is None else stored_reading(index.get("reading"))


class PackedLatents(Latents, ImageDataset):
    """Latents in a few memory-mapped files; a file of the wrong size raises ValueError at once."""

    def __init__(self, folder: Path, index: dict):
        super().__init__(len(index["names"]), index["classes"], index["channels"], index["img_size"], index["flip"])
        self.reading, self.names = reading_of(index), index["names"]
        self.folder, self.shape, self.fingerprint = folder, tuple(index["shape"]), index["fingerprint"]
        self.labels, self.dtype, self.shards = index["labels"], index["dtype"], index.get("shards", [])
        self.codebook_size = index.get("codebook_size", 0)  # none in a cache of before there were ids
        self.ends = list(itertools.accumulate(count for count, _ in self.shards))
        num_stored = self.ends[-1] if self.ends else 0
        if not self.ends or len(self) != num_stored:
            raise ValueError(f"{folder}: index.json names {len(self)} images, its files hold {num_stored}")
        self.open = {}
        for number in range(len(self.shards)):
            self.shard(number)

    def shard(self, number: int) -> np.ndarray:
        """The array (n, 2, …) of file `number`."""
        if number not in self.open:
            path = shard_path(self.folder, number)
            self.open[number] = open_shard(path, self.shards[number][0], self.shape, self.dtype)
        return self.open[number]

    def __getstate__(self):
        return self.__dict__ | {"open": {}}  # pickled for a DataLoader worker, a memory map would become a copy

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int, int]:
        i = self._index(i)
        number = bisect.bisect_right(self.ends, i)
        row = i - self.ends[number]  # negative: counted from the end of the file
        pair = np.array(self.shard(number)[row], dtype=np.int64 if self.codebook_size else None)
        return torch.from_numpy(pair), self.labels[i], i

    def largest_id(self) -> int:
        """Of a cache of ids; reads everything, for ImageNet 1.3 GB."""
        return max(int(self.shard(number).max(initial=0)) for number in range(len(self.shards)))

    def verify(self) -> None:
        """Read everything; a file whose values are not those once written raises ValueError."""
        with tqdm(self.shards, desc="verifying", unit="file", leave=False) as progress:
            for number, (_, expected) in enumerate(progress):
                if checksum(self.shard(number)) != expected:
                    raise ValueError(f"{shard_path(self.folder, number)} is damaged (its checksum is wrong): {AGAIN}")


class NpzLatents(Latents, FolderDataset):
    """Latents with a file an image; like a broken image, a broken file is named in a warning and another one used.

    index None: a folder that MAR's main_cache.py wrote, whose sub-folders are the classes. Files that are missing, or
    that the index does not know, raise ValueError.
    """

    def __init__(self, folder: Path, index: dict | None, img_size: Size | None = None):
        stored = find_npz(folder)
        if index is None:
            classes = sorted({name.split("/")[0] for name in stored if "/" in name})
            names = [name for name in stored if "/" in name] if classes else stored
            class_labels = {name: label for label, name in enumerate(classes)}
            labels = [class_labels[name.split("/")[0]] if classes else 0 for name in names]
            if len(names) < len(stored):
                warnings.warn(f"{len(stored) - len(names)} .npz outside the class folders ignored", stacklevel=2)
        else:
            classes, names, labels = index["classes"], index["names"], index["labels"]
            # a cache that is older than the rule for hidden images may have their latents
            missing, extra = set(names) - set(stored), sorted(set(stored) - set(names))
            missing = sorted(missing - set(find_npz(folder, system=True))) if missing else []
            if missing or extra:
                raise ValueError(
                    f"{folder}: {len(missing)} files that index.json names are missing and {len(extra)} are not in it, "
                    f"the first is {npz_path(folder, (missing + extra)[0])}"
                )
        samples = [(str(npz_path(folder, name)), label) for name, label in zip(names, labels)]
        super().__init__(folder, samples, classes or ["all"], index["img_size"] if index else img_size)
        self.fingerprint, self.shape, self.reading, self.names = None, None, reading_of(index or {}), names
        if index is not None:
            self.fingerprint, self.shape = index["fingerprint"], tuple(index["shape"])
            self.flip, self.channels = index["flip"], index["channels"]
        elif samples:
            self.shape = tuple(self[0][0].shape[1:])  # from now on `_load` refuses another one

    def _load(self, path: str) -> torch.Tensor:
        return torch.from_numpy(read_npz(path, self.shape))

    def verify(self) -> None:
        """Read everything; a file that cannot be read raises ValueError."""
        with tqdm(self.samples, desc="verifying", unit="file", leave=False) as progress:
            for path, _ in progress:
                try:
                    self._load(path)
                except Exception as error:  # zipfile and numpy raise many types
                    remedy = "run MAR's main_cache.py again to make it anew" if self.fingerprint is None else AGAIN
                    raise ValueError(f"{path} is damaged ({error}): {remedy}") from None


def find_npz(folder: Path, system: bool = False) -> list[str]:
    """Names (relative paths without .npz, with /) of the files below the folder; system: of hidden ones too."""
    names = []
    for place, _, files in walk(folder, system):
        inside = Path(place).relative_to(folder).as_posix()
        names += [name if inside == "." else f"{inside}/{name}" for name in files if name.endswith(".npz")]
    return sorted(name.removesuffix(".npz") for name in names)


FORMATS = {"packed": PackedLatents, "npz": NpzLatents}


def open_latents(folder, img_size: Size | None = None) -> PackedLatents | NpzLatents:
    """The data set of a cache in any of the formats, of images of img_size pixels.

    A folder without a cache, an unfinished or damaged cache, or one of another image size raises ValueError.
    """
    if not folder or not Path(folder).is_dir():
        raise ValueError(f"no folder of cached latents at --cached_path {str(folder)!r}")
    folder = Path(folder)
    index = read_json(folder / "index.json", INDEX)
    if index is None:
        if (folder / "settings.json").exists():
            raise ValueError(f"the latents in {folder} are not complete: run scripts/cache_latents.py again to go on")
        latents = NpzLatents(folder, None, img_size)
        if not len(latents):
            raise ValueError(f"no cached latents in {folder}: neither index.json nor .npz files")
        return latents
    if index["version"] != VERSION or index["format"] not in FORMATS:
        raise ValueError(
            f"the latents in {folder} have the format {index['format']!r}, version {index['version']!r}; "
            f"valid: {', '.join(FORMATS)}, version {VERSION}"
        )
    check_reading(index, folder / "index.json")
    if img_size not in (None, index["img_size"]):
        raise ValueError(f"the latents in {folder} are of {index['img_size']}-pixel images, not of {img_size}")
    if len(index["labels"]) != len(index["names"]) or not {*index["labels"]} <= {*range(len(index["classes"]))}:
        raise ValueError(f"{folder / 'index.json'} is damaged, its labels do not fit its names and classes: {AGAIN}")
    return FORMATS[index["format"]](folder, index)
