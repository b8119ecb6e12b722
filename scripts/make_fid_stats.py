"""Make the statistics of a data set, mean and covariance of its features, that --fid_stats compares with.

    python scripts/make_fid_stats.py --data imagefolder --data_path DIR --img_size 256 --out stats.npz

The images are cropped as in training. One batch of them is in memory at a time.
"""

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

from util import dist
from util.args import check_output_file, flag, run_with
from util.door import run_main
from util.evaluation.features import FEATURES
from util.evaluation.fid_stats import compute_fid_stats, has_arrays, save_fid_stats
from util.images.datasets import ImagesArgs, broken_note
from util.images.folders import check_output_folder


@dataclass(frozen=True)
class StatsArgs(ImagesArgs):
    """The flags: images, features, and the file to write."""

    split: str = flag("train", "images of the data set", choices=("train", "val"))
    features: str = flag("inception", "features", choices=FEATURES)
    fid_weights: str | None = flag(None, "file with the weights of the features, for machines without network")
    out: str = flag("fid_stats.npz", "file to write, an .npz")
    dry_run: bool = flag(False, "print the resolved configuration and stop")


def check_args(args: StatsArgs) -> None:
    """Raise ValueError where the file cannot or must not be written."""
    if not args.out.endswith(".npz"):
        raise ValueError(f"--out must be a file whose name ends in .npz, got {args.out}")
    check_output_file("out", args.out, partial(has_arrays, names={"mu", "sigma"}))
    check_output_folder("out", Path(args.out).parent, args.data, args.data_path, args.split_dir)


def run(args: StatsArgs) -> int:
    """Compute, write."""
    device = dist.pick_device(args.device)
    images = args.images(args.split)
    options = dict(weights=args.fid_weights, batch_size=args.batch_size, device=device, verbose=True)
    stats = compute_fid_stats(images, args.features, **options)
    save_fid_stats(args.out, replace(stats, img_size=images.img_size, split=args.split))
    if images.num_broken:
        print(broken_note(images.num_broken, len(images)))
    size = f"{images.img_size}x{images.img_size}"
    print(f"{args.out}: {args.features} features of {len(images)} {args.split} images of {args.data} at {size}")
    return 0


def main(argv=None) -> int:
    """Parse, compute, write; returns the exit code."""
    return run_with(run, StatsArgs, "make_fid_stats.py", __doc__.splitlines()[0], argv, check_args)


if __name__ == "__main__":
    sys.exit(run_main(main))
