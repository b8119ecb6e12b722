"""Measure the latents of a tokenizer on a data set, and print the --vae_scale and --vae_mean that normalise them.

    python scripts/measure_latents.py --data_path IMAGENET --tokenizer kl16 --vae_path pretrained_models/vae/kl16.ckpt

MAR needs latents of mean 0 and standard deviation 1. The posterior is sampled, as it is in training.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

from models.tokenizers.measuring import MeasuringArgs, measure_latents
from util import dist
from util.args import flag, make_parser
from util.door import run_main


@dataclass(frozen=True)
class MeasureArgs(MeasuringArgs):
    """The flags."""

    num_images: int = flag(10000, "images to measure, drawn at random; all of a smaller data set", low=1)
    num_workers: int = flag(4, **dist.WORKERS)
    seed: int = flag(0, "seed of the choice of images and of the posterior's noise", low=0, high=2**63 - 1)


def main(argv=None) -> int:
    """Measure and print; returns the exit code."""
    given = make_parser("measure_latents.py", __doc__.splitlines()[0], MeasureArgs).parse_args(argv)
    args = MeasureArgs(**vars(given))
    device = dist.pick_device(args.device)
    if args.data_path and Path(args.data_path, "settings.json").is_file():
        raise ValueError(f"--data_path {args.data_path} is a cache of latents or ids: give the images it was made of")
    unnormalised = {} if args.tokenizer == "pixel" else dict(vae_scale=1.0, vae_mean=0.0)
    dataset = args.images()
    tokenizer = args.build(dataset.channels, **unnormalised).to(device)
    if "continuous" not in tokenizer.tokens:
        raise ValueError(f"the tokenizer {args.tokenizer} makes ids alone, which have no mean and no scale to measure")
    mean, variance = measure_latents(
        tokenizer,
        dataset,
        num_images=args.num_images,
        seed=args.seed,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        device=device,
    )
    if not variance.mean() > 0:
        raise ValueError("the latents of these images are all the same: there is no scale to measure")
    print(f"{'channel':>8} {'mean':>10} {'std':>10}")
    for channel, (m, v) in enumerate(zip(mean, variance)):
        print(f"{channel:>8} {m:>10.5f} {v**0.5:>10.5f}")
    scale = variance.mean() ** -0.5  # 1/std of all values about the means of their channels
    scale_alone = (variance.mean() + mean.var()) ** -0.5  # about the mean of all, as LDM measures it
    images = min(args.num_images, len(dataset))
    means = ",".join(f"{m:.5g}" for m in mean)
    print(
        f"{images} images, latents of stride {tokenizer.stride} with {tokenizer.channels} channels. Pass to main_mar.py"
    )
    print(f"    --vae_scale {scale:.5g} --vae_mean {means}")
    print(f"or, to leave the means as they are,\n    --vae_scale {scale_alone:.5g}")
    if args.tokenizer == "pixel":
        print("(pixel itself takes neither: its latents are the images as they are)")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
