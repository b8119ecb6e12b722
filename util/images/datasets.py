"""Image datasets and the order in which training visits them.

Every dataset gives ``ds[i] -> (image uint8 (C, H, W), label int, i int)`` and carries ``classes``, ``num_classes``,
``channels``, ``img_size`` (see util/sizes.py), ``flip`` (may an image be mirrored?), ``broken``, ``num_broken`` and
``counts``, how many images in a row have one size (util/images/buckets.py has data sets of several). Only the
permutation of `EpochSampler` and what stands in for broken files are random: the training loop flips images itself,
from per-sample seeds. Files are found by util/images/folders.py and read by util/images/reading.py.
"""

import copy
import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from util import dist
from util.args import flag
from util.images.folders import find_images, shown, training_folder
from util.images.reading import DEFAULT, Reading, center_crop, find_ranges, read_rgb
from util.sizes import Size, sides, size_of

MEMORY_LIMIT = 2**31  # bytes of pixels that `in_memory` holds
MUCH_BROKEN = 0.01  # share of unreadable files that is warned about
CANVASES = {8: None, "8x16": 3, "16x8": 2}  # size -> axis (of images) along which two digits follow each other
FEW = 16  # draws before all images of a class are shuffled


class ImageDataset(Dataset):
    """What all datasets share; sub-classes read image `i` in `__getitem__`."""

    def __init__(self, num_images: int, classes: list[str], channels: int, img_size: Size, flip: bool):
        self.counts = (num_images,)
        self.classes = list(classes)
        self.num_classes = len(classes)  # 1 for unconditional data
        self.channels = channels
        self.img_size = img_size
        self.flip = flip
        # One flag an image, in shared memory: DataLoader workers (fork or spawn) set it for this process too.
        self.broken = torch.zeros(num_images, dtype=torch.uint8).share_memory_()
        self.when = torch.zeros(2, dtype=torch.long).share_memory_()  # seed and epoch, which workers see too

    def set_epoch(self, seed: int, epoch: int) -> None:
        """Choose what stands in for broken files, between two passes over the images; 0, 0 from the start."""
        self.when.copy_(torch.tensor([seed, epoch]))

    def as_reference(self) -> "ImageDataset":
        """The same images as they are in epoch 0 of seed 0, whatever `set_epoch` says here."""
        images = copy.copy(self)
        images.when = torch.zeros_like(self.when)
        return images

    @property
    def num_broken(self) -> int:
        """Number of images that this process and its DataLoader workers could not read so far."""
        return int(self.broken.sum())

    def __len__(self) -> int:
        return len(self.broken)

    def _index(self, i: int) -> int:
        # IndexError ends `for image, label, i in dataset`
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of a dataset of {len(self)} images")
        return int(i)


class MemoryDataset(ImageDataset):
    """Images held as one uint8 tensor (N, C, H, W), labels as N ints."""

    def __init__(self, images: torch.Tensor, labels, classes: list[str], flip: bool):
        super().__init__(len(images), classes, images.shape[1], size_of(*images.shape[2:]), flip)
        self.images = images.contiguous()
        self.labels = torch.as_tensor(labels, dtype=torch.long)
        assert images.dtype == torch.uint8 and len(self.labels) == len(images)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int, int]:
        i = self._index(i)
        return self.images[i], int(self.labels[i]), i


class FolderDataset(ImageDataset):
    """Image files, read as RGB and center-cropped to (3, H, W), the sides of img_size.

    A file that cannot be read is named in one warning, and a readable one of its class stands in for it: drawn from
    (seed, epoch, index) alone, see `set_epoch`. Of a class without any, one of the other classes, with its own label.
    No readable file at all: ValueError.
    """

    def __init__(self, folder: Path, samples: list, classes: list[str], img_size: Size, reading: Reading = DEFAULT):
        super().__init__(len(samples), classes, 3, img_size, reading.flip)
        self.folder = folder
        self.samples = samples  # (path, label) of each
        self.reading = reading
        self.ranges = {}  # see `find_ranges`
        self.layout = ""  # what was recognised, for people
        self.labels = torch.tensor([label for _, label in samples], dtype=torch.long)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int, int]:
        i = self._index(i)
        for k in itertools.chain([i], self._stand_ins(i)):
            if self.broken[k]:
                continue
            path, label = self.samples[k]
            try:
                return self._load(path), label, i
            except Exception as error:  # PIL raises almost any type for damaged files: struct.error, IndexError, ...
                self.broken[k] = 1
                warnings.warn(f"broken image skipped: {shown([path])} ({_reason(error, path)})", stacklevel=2)
        raise ValueError(f"no readable image in {self.folder}: all {len(self)} files are broken")

    def _stand_ins(self, i: int) -> Iterator[int]:
        """All images in a random order, some of them twice; those of the class of image i come first."""
        draws, same = np.random.default_rng([*self.when.tolist(), i]), self.labels == self.labels[i]
        for members in (same.nonzero()[:, 0].numpy(), (~same).nonzero()[:, 0].numpy()):
            if len(members):
                yield from members[draws.integers(len(members), size=FEW)]
                yield from draws.permutation(members)

    def _load(self, path: str) -> torch.Tensor:
        image = center_crop(read_rgb(path, self.reading, self.ranges), self.img_size)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def broken_note(num_broken: int, num_images: int) -> str:
    """What is said of unreadable files, whose draws others of their class replaced; "" without any."""
    if not num_broken:
        return ""
    share = num_broken / num_images
    note = f"{num_broken} of {num_images} images are broken: {share:.2%} of the draws were of others of their class"
    if share <= MUCH_BROKEN:
        return note
    return f"warning: {note}; that is more than {MUCH_BROKEN:.0%}, look at the files named above"


def labels_of(images: ImageDataset) -> list[int]:
    """The labels of a data set, without reading its images."""
    return images.labels.tolist()


def in_memory(images: ImageDataset, num_workers: int = 0) -> ImageDataset:
    """The same images in memory if they take at most MEMORY_LIMIT bytes, else the data set itself.

    num_workers: processes that read. Shows a progress bar.
    """
    height, width = sides(images.img_size)
    size = images.channels * height * width * len(images)
    if isinstance(images, MemoryDataset) or size > MEMORY_LIMIT:
        return images
    pixels = torch.empty(len(images), images.channels, height, width, dtype=torch.uint8)
    labels = torch.empty(len(images), dtype=torch.long)
    with tqdm(total=len(images), unit="image", desc="reading", leave=False) as progress:
        loader = DataLoader(images, batch_size=64, num_workers=dist.num_loading(num_workers))
        for batch, batch_labels, indices in loader:
            pixels[indices], labels[indices] = batch, batch_labels
            progress.update(len(batch))
    return MemoryDataset(pixels, labels, images.classes, images.flip)


def build_digits(*, data_path=None, img_size=None, split="train", download=True, reading=None) -> MemoryDataset:
    """scikit-learn's 1,797 scanned digits (1, 8, 8); there is one split, "train"; ValueError for another or size."""
    from sklearn.datasets import load_digits

    _check_native_size("digits", img_size, 8)
    if data_path:
        raise ValueError(f"--data_path {data_path} has no meaning for the data set digits, which needs no folder")
    if split != "train":
        raise ValueError(f"digits has no {split!r} split, only 'train'")
    digits = load_digits()
    images = torch.from_numpy(np.round(digits.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    return MemoryDataset(images, digits.target, [str(name) for name in digits.target_names], flip=False)


def build_canvases(*, data_path=None, img_size=None, split="train", download=True, reading=None) -> MemoryDataset:
    """Canvases of digits: 1,797 (1, 8, 8) of one, or (1, 8, 16) of two side by side, or (1, 16, 8) one above the other.

    A canvas of two counts on: its class is the first digit, the second one is a scan of the next, 0 after 9. Each scan
    comes first on one canvas of a size. Other sizes, and what `build_digits` refuses, raise ValueError.
    """
    size = 8 if img_size is None else img_size
    if size not in CANVASES:
        raise ValueError(f"img_size is {size}, but canvases have {', '.join(map(str, CANVASES))}")
    digits = build_digits(data_path=data_path, split=split)
    if size == 8:
        return digits
    places, rng = {d: (digits.labels == d).nonzero()[:, 0].numpy() for d in range(10)}, np.random.default_rng(0)
    second = np.empty(len(digits), dtype=np.int64)
    for digit, own in places.items():
        following = rng.permutation(places[(digit + 1) % 10])
        second[own] = np.resize(following, len(own))
    pair = (digits.images, digits.images[torch.from_numpy(second)])
    return MemoryDataset(torch.cat(pair, dim=CANVASES[size]), digits.labels, digits.classes, flip=False)


class Source(NamedTuple):
    """A data set of torchvision."""

    name: str
    size: int  # pixels of a side
    flip: bool
    layout: str  # its files below data_path, for the error


def build_torchvision(
    source: Source, *, data_path=None, img_size=None, split="train", download=True, reading=DEFAULT
) -> MemoryDataset:
    """torchvision's data set `source` in `data_path` (./data), downloaded if missing.

    ValueError when it can neither be read nor downloaded. CIFAR-10's files are pickles, the only ones that this
    repository loads: torchvision unpickles a file only if it has the published MD5, so its content is known.
    """
    import torchvision

    name, size, flip, layout = source
    _check_native_size(name, img_size, size)
    root = Path(data_path or "./data").expanduser()
    try:
        raw = getattr(torchvision.datasets, name)(str(root), train=split == "train", download=download)
    except Exception as error:  # no network, full disk, half-extracted files: all the same to the user
        action = "download or read" if download else "read"
        remedy = f"put torchvision's files at {root / layout}, or give the folder that holds {layout} as data_path"
        raise ValueError(f"cannot {action} {name} in {root} ({_one_line(error)}): {remedy}") from error
    images = torch.as_tensor(raw.data)
    images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2)  # (N, C, H, W)
    return MemoryDataset(images, raw.targets, raw.classes, flip and reading.flip)


def build_cifar10(*, data_path=None, img_size=None, split="train", download=True, reading=DEFAULT) -> ImageDataset:
    """torchvision's CIFAR-10; or, of a folder with `<split>/` and none of its files, the pictures in that."""
    source = Source("CIFAR10", 32, True, "cifar-10-batches-py/*")
    folder = Path(data_path or "./data").expanduser()
    if not (folder / split).is_dir() or (folder / "cifar-10-batches-py").exists():
        options = dict(split=split, download=download, reading=reading)
        return build_torchvision(source, data_path=data_path, img_size=img_size, **options)
    _check_native_size(source.name, img_size, source.size)
    return build_imagefolder(data_path=folder, img_size=source.size, split=split, reading=reading)


def build_imagefolder(*, data_path=None, img_size=None, split="train", download=True, reading=DEFAULT) -> FolderDataset:
    """Images below `data_path/<split>/<class>/`, or `data_path/<class>/` for train; img_size in pixels (256).

    A folder with images directly inside and none in sub-folders is one class. Empty class folders are named in a
    warning and are no class. ValueError: no such folder, no image, no readable image, splits in the place of classes.
    """
    img_size = 256 if img_size is None else img_size
    if min(sides(img_size)) < 1:
        raise ValueError(f"img_size is {img_size}, expected at least 1")
    if not data_path:
        raise ValueError("imagefolder needs data_path: a folder with train/<class>/*, <class>/* or plain images")
    folder, beside = training_folder(Path(data_path).expanduser(), split, reading.split_dir)
    is_split = folder != Path(data_path).expanduser()
    images = find_images(folder, splits_are_classes=reading.split_dir is not None, is_split=is_split)
    images.beside = beside
    dataset = FolderDataset(folder, images.samples, images.classes, img_size, reading)
    dataset.layout = images.layout()
    dataset.ranges = find_ranges([path for path, _ in images.samples], reading, shown([folder]))
    _ = dataset[0]  # without a readable image this raises one line; a DataLoader worker would add a traceback
    return dataset


DATASETS = {
    "digits": build_digits,
    "canvases": build_canvases,
    "cifar10": build_cifar10,
    "mnist": partial(build_torchvision, Source("MNIST", 28, False, "MNIST/raw/*-ubyte")),
    "fashion_mnist": partial(build_torchvision, Source("FashionMNIST", 28, True, "FashionMNIST/raw/*-ubyte")),
    "imagefolder": build_imagefolder,
}


def build_dataset(
    name: str, *, data_path=None, img_size=None, split="train", download=True, reading: Reading = DEFAULT
) -> ImageDataset:
    """The dataset `name` of DATASETS at img_size pixels (None: its own size); anything unusable raises ValueError."""
    if name not in DATASETS:
        raise ValueError(f"unknown dataset {name!r}, expected one of {', '.join(DATASETS)}")
    if split not in ("train", "val"):
        raise ValueError(f"unknown split {split!r}, expected train or val")
    return DATASETS[name](data_path=data_path, img_size=img_size, split=split, download=download, reading=reading)


@dataclass(frozen=True)
class ImagesArgs(Reading):
    """Flags of the scripts that read the images of a data set in order."""

    data: str = flag("imagefolder", "data set", choices=DATASETS)
    data_path: str | None = flag(None, "folder of the data: DIR/train/<class>/* for imagefolder")
    img_size: int | None = flag(None, "pixels of a side (default: the data set's own; 256 for imagefolder)", low=1)
    batch_size: int = flag(64, "images at a time", low=1)
    device: str = flag("auto", "auto, cuda, mps, cpu")

    def images(self, split: str = "train") -> ImageDataset:
        """The data set; errors as in `build_dataset`."""
        self.check(self.data)
        where = dict(data_path=self.data_path, img_size=self.img_size, split=split)
        return build_dataset(self.data, **where, reading=self.reading)

    @property
    def place(self) -> str:
        """Name and folder of the data set, for people."""
        return " ".join(filter(None, (self.data, self.data_path)))


class EpochSampler(Sampler):
    """Batches of `batch_size` indices for one of `world_size` ranks; all ranks together walk one permutation an epoch.

    The permutation depends on (seed, epoch) only, so that runs resume and one process with the same global batch sees
    the same batches. An incomplete last batch is dropped; fewer samples than one global batch: ValueError.

    counts: of samples of several sizes, one size after the other, how many each has. A global batch is then of one
    size, filled with those of it in the order of the permutation; the batches of all sizes come in a random order,
    which depends on (seed, epoch) too. Each size drops its own incomplete batch, and needs at least one.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, counts=None):
        assert 0 <= rank < world_size
        if batch_size < 1 or seed < 0:
            raise ValueError(f"batch_size is {batch_size} and seed {seed}, expected at least 1 and 0")
        self.global_batch = batch_size * world_size
        self.counts = (num_samples,) if counts is None else tuple(counts)
        assert sum(self.counts) == num_samples
        if (least := min(self.counts)) < self.global_batch:
            need = f"{self.global_batch} ({batch_size} x {world_size} processes)"
            raise ValueError(f"{least} images do not fill one global batch of {need}: lower --batch_size")
        self.num_samples, self.batch_size, self.seed, self.rank = num_samples, batch_size, seed, rank
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the epoch to iterate next, from its batch `start_batch` in [0, len(self)]."""
        if not 0 <= start_batch <= len(self):
            raise ValueError(f"start_batch is {start_batch}, expected 0 to {len(self)}, the batches of an epoch")
        self.epoch, self.start_batch = epoch, start_batch

    def __len__(self) -> int:
        return num_batches(self.counts, self.global_batch)

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order, batches, end = rng.permutation(self.num_samples), [], 0
        for count in self.counts:
            start, end = end, end + count
            own = order[(start <= order) & (order < end)]
            batches += own[: count // self.global_batch * self.global_batch].reshape(-1, self.global_batch).tolist()
        if len(self.counts) > 1:
            batches = [batches[i] for i in rng.permutation(len(batches))]
        first = self.rank * self.batch_size
        for batch in batches[self.start_batch :]:
            yield batch[first : first + self.batch_size]


def num_batches(counts: tuple[int, ...], batch_size: int) -> int:
    """Whole batches of one size each in an epoch of so many images of each size."""
    return sum(count // batch_size for count in counts)


def _check_native_size(name: str, img_size: Size | None, native: int) -> None:
    if img_size not in (None, native):
        raise ValueError(f"img_size is {img_size}, but {name} images are {native} pixels wide: use {native}")


def _reason(error: Exception, path: str) -> str:
    """What an error about a file says, but for its path."""
    text = str(error).replace(repr(path), "").replace(path, "")
    return " ".join(f"{type(error).__name__}: {text}".split()).rstrip(": ")


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
