"""Speed of reading training data: images/s from JPEG files, from .npz files of latents, and from packed latents.

    python scripts/bench_loader.py --num_images 4000 --num_workers 2

The data are random: JPEGs with the spectrum of photographs, and moments of KL-16's shape. One epoch warms up, then
each source is read once per repeat, in turn and in shuffled order; the table has medians. Files are in the page cache.
"""

import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from util import dist
from util.args import flag, make_parser
from util.door import run_main
from util.images.datasets import EpochSampler, build_dataset, labels_of
from util.images.latent_files import WRITERS, begin, image_names, write_json
from util.images.latents import VERSION, open_latents

SHAPE = (32, 16, 16)  # mean and log-variance of KL-16 at 256 pixels


@dataclass(frozen=True)
class BenchArgs:
    """The flags."""

    num_images: int = flag(2000, "random images to make", low=1)
    img_size: int = flag(256, "pixels of an image's side", low=16)
    batch_size: int = flag(64, "images a batch", low=1)
    num_workers: int = flag(0, "processes that load", low=0, high=dist.WORKERS["high"])
    repeats: int = flag(5, "timed epochs of each source", low=1)


def make_images(folder: Path, args: BenchArgs) -> None:
    """JPEG files in ten class folders: random fields with the spectrum of photographs, a few octaves each."""
    g = torch.Generator().manual_seed(0)
    for i in tqdm(range(args.num_images), desc="making images", leave=False):
        image = torch.zeros(1, 3, args.img_size, args.img_size)
        for side in (4, 8, 16, 32, 64, 128):
            octave = torch.randn(1, 3, side, side, generator=g) / side
            image += F.interpolate(octave, size=args.img_size, mode="bicubic")
        pixels = (128 + 400 * image[0]).clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
        path = folder / "train" / f"class{i % 10}" / f"{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=90)


def make_latents(folder: Path, file_format: str, images, size: int = 1024) -> None:
    """A cache of random moments for a data set of images."""
    names, rng = image_names(images), np.random.default_rng(0)
    settings = dict(
        version=VERSION,
        format=file_format,
        dtype="float32",
        shard_size=size,
        img_size=images.img_size,
        shape=list(SHAPE),
        fingerprint="none",
        images="none",
        classes=images.classes,
        num_images=len(images),
    )
    begin(folder, settings)
    writer = WRITERS[file_format](folder, settings, names)
    for start in range(0, len(images), size):
        unit = range(start, min(start + size, len(images)))
        writer.write(unit, list(unit), rng.standard_normal((len(unit), 2, *SHAPE), dtype=np.float32))
    about = dict(tokenizer="none", channels=3, flip=True, broken=[], names=names, labels=labels_of(images))
    write_json(folder / "index.json", {**settings, **about, **writer.index()})


def images_per_second(dataset, args: BenchArgs, epoch: int) -> float:
    """Rate of one epoch without its first batch, whose time is that of starting the workers."""
    sampler = EpochSampler(len(dataset), args.batch_size, seed=0)
    sampler.set_epoch(epoch)
    loaded = iter(DataLoader(dataset, batch_sampler=sampler, num_workers=args.num_workers))
    next(loaded)
    began = time.perf_counter()
    num_read = sum(len(batch) for batch, _, _ in loaded)
    return num_read / (time.perf_counter() - began)


def main(argv=None) -> int:
    """Make the data in a temporary folder, read them, print the table."""
    args = BenchArgs(**vars(make_parser("bench_loader.py", __doc__.splitlines()[0], BenchArgs).parse_args(argv)))
    if args.num_images < 2 * args.batch_size:
        raise ValueError(f"--num_images {args.num_images} must be at least two batches of {args.batch_size}")
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        make_images(root / "folder", args)
        images = build_dataset("imagefolder", data_path=root / "folder", img_size=args.img_size)
        sources = {"folder": images}
        for file_format in ("npz", "packed"):
            make_latents(root / file_format, file_format, images)
            sources[file_format] = open_latents(root / file_format)
        rates = {name: [] for name in sources}
        for epoch in tqdm(range(args.repeats + 1), desc="reading", leave=False):
            for name, dataset in sources.items():
                rates[name].append(images_per_second(dataset, args, epoch))
        print("| read from | files | MB | images/s, median | lowest to highest |\n| --- | --: | --: | --: | --: |")
        for name, (_, *timed) in rates.items():  # the first epoch warms up
            sizes = [file.stat().st_size for file in (root / name).rglob("*") if file.is_file()]
            spread = f"{min(timed):,.0f} to {max(timed):,.0f}"
            median = statistics.median(timed)
            print(f"| {name} | {len(sizes)} | {sum(sizes) / 1e6:,.0f} | {median:,.0f} | {spread} |")
    print(f"{args.num_images} images, batches of {args.batch_size}, {args.num_workers} workers, {args.repeats} repeats")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
