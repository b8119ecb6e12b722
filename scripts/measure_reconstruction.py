"""Measure what a tokenizer loses: rFID, PSNR and SSIM of the images that it encodes and decodes.

    python scripts/measure_reconstruction.py --tokenizer kl16 --vae_path pretrained_models/vae/kl16.ckpt \\
        --data imagefolder --data_path IMAGENET --split val --output_dir OUT

Adds one line of kind "reconstruction" to OUT/results.jsonl. scripts/make_table.py never puts it beside a generation's.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

from torch.utils.data import Subset

from models.tokenizers.measuring import MeasuringArgs
from util import dist
from util.args import flag, run_with
from util.door import run_main
from util.evaluation.features import FEATURES
from util.evaluation.fid_stats import load_fid_stats
from util.evaluation.metrics import metrics_line
from util.evaluation.protocol import EvalConfig, protocol, protocol_line, reconstruction_row
from util.evaluation.reconstruction import ReconstructionFID, scales_lines, score_reconstructions
from util.evaluation.results import append_result, find_result, git_commit, read_results
from util.images.datasets import labels_of
from util.images.folders import check_output_folder


@dataclass(frozen=True)
class ReconstructionArgs(MeasuringArgs):
    """The flags: tokenizer, images, features of the rFID, and the folder of the result."""

    split: str = flag("train", "images of the data set; published rFIDs are those of val", choices=("train", "val"))
    num_images: int | None = flag(None, "images to measure, spread evenly over the data set (default: all)", low=2)
    features: str = flag("inception", "features of the rFID", choices=FEATURES)
    fid_weights: str | None = flag(None, "file with the weights of the features, for machines without network")
    fid_stats: str | None = flag(None, "file (.npz with mu and sigma) to compare with instead of the same images")
    no_rfid: bool = flag(False, "PSNR and SSIM only, which need no features")
    dtype: str | None = flag(None, "arithmetic (default: bf16 where CUDA has it, else fp32)", choices=dist.FLOATS)
    output_dir: str = flag("output_dir/reconstruction", "folder of results.jsonl")
    dry_run: bool = flag(False, "print the resolved configuration and stop")


def check_args(args: ReconstructionArgs) -> None:
    """Raise ValueError where the result cannot or must not be written."""
    check_output_folder("output_dir", args.output_dir, args.data, args.data_path, args.split_dir)


def run(args: ReconstructionArgs) -> int:
    """Check everything else, measure unless results.jsonl has the result, append, print."""
    device = dist.pick_device(args.device)
    dtype = dist.pick_dtype(args.dtype, device)
    images = args.images(args.split)
    tokenizer = args.build(images.channels)
    if images.img_size % tokenizer.stride:
        raise ValueError(f"--img_size {images.img_size} is no multiple of the tokenizer's stride, {tokenizer.stride}")
    count = args.num_images or len(images)
    if not 2 <= count <= len(images):
        raise ValueError(f"--num_images {count} must be from 2 to {len(images)}, the size of the data set")
    chosen = Subset(images, [i * len(images) // count for i in range(count)])
    features, stats = None if args.no_rfid else args.features, None
    if features and args.fid_stats:
        stats = load_fid_stats(args.fid_stats)
        stats.check(features, images.img_size)

    dtype_name = dist.dtype_name(dtype)
    evaluation = EvalConfig(num_images=count, features=features, eval_split=args.split, fid_stats=args.fid_stats)
    evaluation = replace(evaluation, fid_weights=args.fid_weights if features else None)
    settings = dict(tokenizer=args.tokenizer, data=args.data, img_size=images.img_size, dtype=dtype_name)
    wanted = reconstruction_row(tokenizer.fingerprint, settings, evaluation, images if stats is None else stats)
    results = Path(args.output_dir) / "results.jsonl"
    row = find_result(read_results(results), wanted)
    if row is None:
        metrics = score_reconstructions(
            tokenizer.eval().to(device),
            chosen,
            ReconstructionFID(features, args.fid_weights, stats) if features else None,
            batch_size=args.batch_size,
            num_workers=args.num_workers,
            device=device,
            dtype=dtype,
            verbose=True,
        )
        labels = labels_of(images)
        labels = [labels[i] for i in chosen.indices]
        reference = chosen if stats is None else stats
        record = protocol("reconstruction", evaluation, labels, reference, args.place, ema=None, dtype=dtype_name)
        row = dict(wanted, metrics=metrics, protocol=record, vae_path=args.weights_path, git_commit=git_commit())
        results.parent.mkdir(parents=True, exist_ok=True)
        append_result(results, row)
    else:
        print(f"already in {results}")
    print(protocol_line(row["protocol"]))
    print(f"{args.tokenizer}: {metrics_line(row['metrics'])}")
    for line in scales_lines(row["metrics"]):
        print(line)
    return 0


def main(argv=None) -> int:
    """Parse, measure; returns the exit code."""
    return run_with(run, ReconstructionArgs, "measure_reconstruction.py", __doc__.splitlines()[0], argv, check_args)


if __name__ == "__main__":
    sys.exit(run_main(main))
