"""Images of several sizes, trained together: data sets of one size each, whose images share an epoch and no batch.

A folder's images go to the size whose ratio of width to height is nearest to theirs, are scaled until they cover it and
cut to it. Of other data sets each size has its own images. A cache of ids is a folder of caches, one for each size:

    FOLDER/buckets.json       written first: version and sizes
    FOLDER/<size>/...         of each size a packed cache, see util/images/latents.py
"""

import bisect
import itertools
import json
import math
from pathlib import Path

import torch
from tqdm import tqdm

from util.checkpoint import atomic_file
from util.images.datasets import FolderDataset, ImageDataset, build_dataset
from util.images.latents import AGAIN, NpzLatents, PackedLatents, open_latents, read_json
from util.images.reading import DEFAULT, Reading, picture_sides
from util.sizes import Size, sides

VERSION = 1
FILE = "buckets.json"


class Buckets(ImageDataset):
    """Data sets of one size each, one after the other: their images, classes and broken files are those of one."""

    def __init__(self, parts: list[ImageDataset]):
        first = parts[0]
        super().__init__(sum(map(len, parts)), first.classes, first.channels, first.img_size, first.flip)
        self.parts, self.counts = parts, tuple(map(len, parts))
        self.starts = [0, *itertools.accumulate(self.counts)][:-1]
        self.labels = torch.tensor([label for part in parts for label in torch.as_tensor(part.labels).tolist()])
        self.layout = getattr(first, "layout", "")
        for part, start in zip(parts, self.starts):
            part.broken, part.when = self.broken[start : start + len(part)], self.when

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Of the images of each part."""
        return tuple(part.img_size for part in self.parts)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int, int]:
        i = self._index(i)
        number = bisect.bisect_right(self.starts, i) - 1
        image, label, _ = self.parts[number][i - self.starts[number]]
        return image, label, i


class BucketLatents(Buckets):
    """Of a cache of several sizes; what `util.images.latents.Latents` has beside the images."""

    def __init__(self, folder: Path, parts: list[PackedLatents]):
        super().__init__(parts)
        first = parts[0]
        self.folder, self.reading, self.fingerprint = folder, first.reading, first.fingerprint
        self.names = [name for part in parts for name in part.names]

    def check(self, tokenizer, name: str, discrete: bool = False) -> None:
        """As `Latents.check`, of all parts."""
        for part in self.parts:
            part.check(tokenizer, name, discrete)


def build_buckets(
    name: str, sizes: tuple[Size, ...], *, data_path=None, split="train", reading: Reading = DEFAULT
) -> Buckets:
    """The data set `name` of DATASETS in these sizes; errors as in `build_dataset`, a size without images is one."""
    where = dict(data_path=data_path, split=split, reading=reading)
    if name != "imagefolder":
        return Buckets([build_dataset(name, img_size=size, **where) for size in sizes])
    folder = build_dataset(name, img_size=sizes[0], **where)
    members = [[] for _ in sizes]
    for sample in tqdm(folder.samples, unit="image", desc="looking at sizes", leave=False, delay=1):
        members[nearest(_ratio_of(sample[0], reading), sizes)].append(sample)
    for size, samples in zip(sizes, members):
        if not samples:
            raise ValueError(f"--buckets: no image in {folder.folder} is nearest to the size {size}: leave it out")
    parts = [
        FolderDataset(folder.folder, samples, folder.classes, size, reading) for size, samples in zip(sizes, members)
    ]
    for part in parts:
        part.ranges, part.layout = folder.ranges, folder.layout
    return Buckets(parts)


def nearest(ratio: float, sizes: tuple[Size, ...]) -> int:
    """Which of the sizes has the ratio of width to height nearest to this, on a logarithmic scale."""
    distances = [abs(math.log(width / height / ratio)) for height, width in map(sides, sizes)]
    return distances.index(min(distances))


def _ratio_of(path: str, reading: Reading) -> float:
    """Width by height of a picture; 1 of a file that cannot be read."""
    try:
        height, width = picture_sides(path, reading)
    except Exception:  # PIL raises almost any type for damaged files; it is named when it is loaded
        return 1.0
    return width / height


def open_cache(folder, img_size: Size | None = None) -> PackedLatents | NpzLatents | BucketLatents:
    """The data set of a cache of one size, img_size (see `open_latents`), or of several, whatever img_size is."""
    sizes = stored_sizes(Path(folder)) if folder and Path(folder).is_dir() else None
    if sizes is None:
        return open_latents(folder, img_size)
    return BucketLatents(Path(folder), [open_latents(part_folder(Path(folder), size), size) for size in sizes])


def part_folder(folder: Path, size: Size) -> Path:
    """Where the cache of one size lies in one of several."""
    return folder / str(size)


def stored_sizes(folder: Path) -> tuple[Size, ...] | None:
    """The sizes of a cache of several; None for another folder. A damaged file raises ValueError."""
    content = read_json(folder / FILE, {"version", "sizes"})
    if content is None:
        return None
    if content["version"] != VERSION or not isinstance(content["sizes"], list):
        raise ValueError(f"{folder / FILE} is damaged or of another version than {VERSION}: {AGAIN}")
    for size in content["sizes"]:
        if not isinstance(size, Size) or min(sides(size)) < 1:
            raise ValueError(f"{folder / FILE} is damaged, {size!r} is no size: {AGAIN}")
    return tuple(content["sizes"])


def begin_buckets(folder: Path, sizes: tuple[Size, ...]) -> None:
    """Start a cache of several sizes in a new or empty folder, or go on with one; one of others raises ValueError."""
    stored = stored_sizes(folder)
    if stored is None:
        if folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"--cached_path {folder} is not empty and no cache of several sizes; give another")
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(folder / FILE) as temporary:
            temporary.write_text(json.dumps(dict(version=VERSION, sizes=sizes)))
    elif stored != sizes:
        held, wanted = (",".join(map(str, some)) for some in (stored, sizes))
        raise ValueError(f"--cached_path {folder} holds the sizes {held}, --buckets names {wanted}")


def names_of_parts(dataset: Buckets, names: list[str]) -> list[list[str]]:
    """The names of a data set's images, part by part."""
    return [names[start : start + count] for start, count in zip(dataset.starts, dataset.counts)]
