"""Train a small autoencoder, KL, with --vq a VQModel, or with --multiscale VAR's, for main_mar.py --tokenizer.

    python scripts/train_tokenizer.py --data_path IMAGES --img_size 32 --stride 4 --latent_channels 8 --output_dir OUT
    python scripts/train_tokenizer.py --data digits --stride 1 --multiscale --patch_nums 1,2,3,4,6,8 --output_dir OUT

Every tenth image is held out of training, to measure PSNR, SSIM and (with --features) rFID on. OUT gets autoencoder/
(diffusers' own format, its latents centred and their scale in its config; --tokenizer diffusers:OUT/autoencoder) or
tokenizer.pth (VAR's tensor names; --tokenizer var_vq --vae_path OUT/tokenizer.pth), reconstructions.png (originals
above their reconstructions), with --multiscale scales.png (images that grow scale by scale), a line of kind
"reconstruction" in results.jsonl, and checkpoint-last.pth for --resume.

Loss: mean absolute error + perceptual_weight · perceptual distance + a penalty, which is kl_weight · KL (both summed
over an image, as in LDM, then divided by its number of values), or codebook + 0.25 · commitment (VQ-VAE; with scales
the mean of both over them); with --adversarial_weight that of a discriminator too. Entries that no latent chooses any
more are moved to latents, as many to those of a scale of few tokens as to others, and --partial_share of the
images is decoded from a part of their scales, so that the coarse ones say more; which share of the codebook is used, by
each scale, is measured with the rest.
"""

import math
import re
import shlex
import shutil
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

from models.tokenizers import Tokenizer, build_tokenizer
from models.tokenizers.measuring import measure_latents
from models.tokenizers.multiscale import save_multiscale
from training.autoencoders import LOSSES, centre_latents
from training.tokenizer_run import HOLD_OUT, ROW, Run, optimize
from util import dist
from util.args import flag, pick, run_with
from util.checkpoint import checkpoint_path, read_file
from util.door import run_main
from util.evaluation.features import FEATURES, build_extractor
from util.evaluation.metrics import metrics_line
from util.evaluation.perceptual import PERCEPTUAL
from util.evaluation.protocol import EvalConfig, protocol, protocol_line, reconstruction_row
from util.evaluation.reconstruction import ReconstructionFID, scales_lines, warn_of_usage
from util.evaluation.results import append_result, find_result, git_commit, read_results
from util.images.datasets import ImagesArgs, broken_note, in_memory, labels_of
from util.images.folders import check_output_folder
from util.images.reading import MARS_WAY, Reading

FILE = "tokenizer.pth"  # of a multi-scale tokenizer
SAVE_EVERY = 500  # steps, besides the end of each epoch
NUM_MEASURED = 10000  # images for mean and scale of the latents


def scale_list(text: str) -> str:
    """Rising whole numbers with commas between them, at least two; anything else raises ValueError."""
    if not re.fullmatch(r"[1-9]\d{0,3}(,[1-9]\d{0,3})+", text):
        raise ValueError(f"expected numbers like 1,2,3,4, got {text!r}")
    sides = [int(part) for part in text.split(",")]
    if any(a >= b for a, b in zip(sides, sides[1:])):
        raise ValueError(f"expected each number to be above the last, got {text!r}")
    return text


@dataclass(frozen=True)
class TokenizerArgs(ImagesArgs):
    """The flags: autoencoder, data, loss, length of the run, and the folder of its files."""

    stride: int = flag(4, "pixels of a latent's side", choices=(1, 2, 4, 8, 16))
    latent_channels: int = flag(8, "channels of a latent", low=1)
    width: int = flag(
        32, "channels at full resolution, a multiple of 4; deeper levels have up to 4 times as many", low=4
    )
    vq: bool = flag(False, "train a VQModel instead of an AutoencoderKL")
    multiscale: bool = flag(False, "train VAR's multi-scale tokenizer instead, for next-scale models")
    patch_nums: str = flag(
        "1,2,3,4,6,8", "sides of its scales, the last one that of its latents", metavar="P,P,...", type=scale_list
    )
    partial_share: float = flag(
        0.1, "share of the images that are decoded from a random part of their scales", low=0, high=1
    )
    codebook_size: int = flag(1024, "codes of either", low=2)
    epochs: float = flag(10.0, "passes over the images, which may be a fraction", low=0)
    max_minutes: float | None = flag(None, "minutes after which training stops, if the epochs take longer", low=0)
    batch_size: int = flag(32, "images a step", low=1)
    lr: float = flag(1e-3, "peak learning rate of Adam; it falls to 0 along a cosine", low=0)
    kl_weight: float = flag(1e-6, "weight of the KL divergence", low=0)
    perceptual: str = flag("none", "network of the perceptual distance", choices=PERCEPTUAL)
    perceptual_weights: str | None = flag(None, "file with the weights of vgg16 (torchvision's, .pth or .safetensors)")
    perceptual_weight: float = flag(0.1, "weight of the perceptual distance", low=0)
    adversarial_weight: float = flag(0.0, "weight of the adversarial loss; 0: train without a discriminator", low=0)
    adversarial_start: float = flag(0.3, "share of the run after which it begins", low=0, high=1)
    features: str | None = flag(None, "features of the rFID (default: PSNR and SSIM only)", choices=FEATURES)
    fid_weights: str | None = flag(None, "file with the weights of the features, for machines without network")
    num_eval: int = flag(5000, "held-out images to measure on, at most", low=2)
    num_workers: int = flag(0, **dist.WORKERS)
    seed: int = flag(0, "seed of weights, order, mirroring and the posterior's noise", low=0, high=2**63 - 1)
    dtype: str | None = flag(None, "arithmetic (default: bf16 where CUDA has it, else fp32)", choices=("fp32", "bf16"))
    output_dir: str = flag("output_dir/tokenizer", "folder to write to")
    resume: bool = flag(False, "continue the run in --output_dir, if it has one")
    dry_run: bool = flag(False, "print the resolved configuration and stop")

    @property
    def class_name(self) -> str:
        """The autoencoder's class, a row of LOSSES."""
        return "MultiScaleVQ" if self.multiscale else "VQModel" if self.vq else "AutoencoderKL"

    @property
    def has_codebook(self) -> bool:
        """Does it quantise?"""
        return LOSSES[self.class_name].quantised is not None

    @property
    def scales(self) -> tuple[int, ...]:
        """Sides of the scales."""
        return tuple(int(part) for part in self.patch_nums.split(","))


def train(run: Run) -> None:
    """Train to the end, saving on the way and reporting after each epoch."""
    epoch_steps = len(run.sampler)
    loader = DataLoader(run.kept, batch_sampler=run.sampler, num_workers=dist.num_loading(run.args.num_workers))
    bar_format = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}{postfix}]"
    with tqdm(total=1.0, initial=run.done, desc="training", bar_format=bar_format) as progress:
        while run.done < 1:
            epoch, batch = divmod(run.step, epoch_steps)
            run.sampler.set_epoch(epoch, batch)
            run.images.set_epoch(run.args.seed, epoch)
            began, totals, count = time.monotonic(), Counter(), 0
            for pixels, *_ in loader:
                terms = optimize(run, pixels)
                now = time.monotonic()
                run.minutes += (now - began) / 60
                began = now
                run.step += 1
                count += 1
                totals.update(terms)
                progress.set_postfix({name: f"{term:.4f}" for name, term in terms.items()}, refresh=False)
                progress.update(min(run.done, 1.0) - progress.n)
                if run.step % SAVE_EVERY == 0:
                    run.save()
                if run.done >= 1:
                    break
            run.save()
            tokenizer = run.tokenizer()
            run.draw(tokenizer)
            means = ", ".join(f"{name} {total / count:.4f}" for name, total in totals.items())
            quality = metrics_line(run.scores(tokenizer, run.held_out[:: max(1, len(run.held_out) // 500)]))
            progress.write(f"epoch {run.step / epoch_steps:.2f}, step {run.step}: {means}; held-out images {quality}")
            if run.args.multiscale:
                usage = run.autoencoder.quantize.usage(run.args.batch_size).tolist()
                shares = ", ".join(f"{p}×{p} {share:.0%}" for p, share in zip(run.args.scales, usage))
                progress.write(f"codebook used by scale, of the training images: {shares}")


def publish(run: Run) -> Tokenizer:
    """Write OUT/tokenizer.pth, or OUT/autoencoder with its latents measured and normalised, and load that."""
    if run.args.multiscale:
        path = Path(run.args.output_dir, FILE)
        save_multiscale(path, run.autoencoder)
        return build_tokenizer(ROW, vae_path=path).to(run.device)
    args, folder = run.args, Path(run.args.output_dir, "autoencoder")
    tokenizer = run.tokenizer()
    options = dict(num_images=NUM_MEASURED, seed=args.seed, batch_size=args.batch_size, device=run.device)
    mean, variance = measure_latents(tokenizer, run.kept, num_workers=args.num_workers, **options)
    if not variance.mean() > 0:
        raise ValueError("the latents of these images are all the same: nothing was learned; raise --lr or --epochs")
    autoencoder = tokenizer.autoencoder.to("cpu", memory_format=torch.contiguous_format)
    centre_latents(autoencoder, torch.from_numpy(mean).float())
    autoencoder.register_to_config(scaling_factor=float(variance.mean() ** -0.5))
    new, old = (folder.with_name(f".autoencoder.{name}.tmp") for name in ("new", "old"))
    for path in (new, old):
        shutil.rmtree(path, ignore_errors=True)
    autoencoder.save_pretrained(new)
    if folder.exists():
        folder.rename(old)  # a folder cannot replace one that has files in it
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    return build_tokenizer(f"diffusers:{folder}").to(run.device)


def flags_of(args: TokenizerArgs) -> list[str]:
    """The flags of main_mar.py for the tokenizer that was written."""
    if args.multiscale:
        model = "var_tiny" if args.stride == 1 else "var_mini"
        return ["--tokenizer", ROW, "--vae_path", str(Path(args.output_dir, FILE)), "--model", model]
    return ["--tokenizer", f"diffusers:{Path(args.output_dir, 'autoencoder')}"]


def measure(run: Run, tokenizer: Tokenizer) -> dict:
    """The line of results.jsonl about the held-out images, which is measured and appended unless it is there."""
    args, results = run.args, Path(run.args.output_dir, "results.jsonl")
    dtype = dist.dtype_name(run.dtype)
    evaluation = EvalConfig(num_images=len(run.held_out), features=args.features, fid_weights=args.fid_weights)
    settings = dict(tokenizer=flags_of(args)[1], data=args.data, img_size=run.images.img_size, dtype=dtype)
    wanted = reconstruction_row(tokenizer.fingerprint, settings, evaluation, run.images)
    row = find_result(read_results(results), wanted)
    if row is None:
        labels = labels_of(run.images)
        labels = [labels[i] for i in run.held_out]
        record = protocol("reconstruction", evaluation, labels, run.held_out, args.place, ema=None, dtype=dtype)
        record["split"] = f"every {HOLD_OUT}th of train, not trained on"
        fid = ReconstructionFID(args.features, args.fid_weights) if args.features else None
        metrics = run.scores(tokenizer, run.held_out, fid, verbose=True)
        training = dict(asdict(args), steps=run.step, minutes=run.minutes)
        row = dict(wanted, metrics=metrics, protocol=record, training=training, git_commit=git_commit())
        append_result(results, row)
    return row


def report(run: Run, tokenizer: Tokenizer) -> None:
    """Measure on the held-out images; print the result, and how to train on the tokenizer."""
    args, row = run.args, measure(run, tokenizer)
    print(protocol_line(row["protocol"]))
    print(f"{run.step} steps, {run.minutes:.1f} minutes: {metrics_line(row['metrics'])}")
    for line in scales_lines(row["metrics"]):
        print(line)
    if args.has_codebook:
        num_tokens = len(run.held_out) * math.prod(tokenizer.ids_shape(run.images.img_size))
        warn_of_usage(row["metrics"]["usage"], num_tokens, args.codebook_size)
    shape = f"{tokenizer.channels} channels at stride {tokenizer.stride}"
    if args.multiscale:
        shape, tokens = f"{shape}, scales {args.patch_nums}", "ids"
    else:
        shape = f"{shape}, scale {tokenizer.scale:.4f}"
        tokens = "latents, or with --loss ce on its ids" if args.vq else "latents"
    print(f"{shape}; picture: {Path(args.output_dir, 'reconstructions.png')}. To train on its {tokens}:")
    flags = ["--data", args.data]
    if args.data_path:
        flags += ["--data_path", args.data_path]
    flags += [*args.reading.flags(), "--img_size", str(run.images.img_size), *flags_of(args)]
    print(f"    main_mar.py {shlex.join(flags)}")


def as_begun(args: TokenizerArgs, content) -> TokenizerArgs:
    """The flags, those about reading images in MAR's way where none is given and the run's checkpoint has none."""
    settings = content.get("settings") if isinstance(content, dict) else None
    if args.data != "imagefolder" or not isinstance(settings, dict):
        return args
    left = {name for name, value in asdict(Reading()).items() if name not in settings and getattr(args, name) == value}
    before = {name: value for name, value in asdict(MARS_WAY).items() if name in left}
    words = pick(Reading, before).flags()
    if words:
        print(f"{args.output_dir} does not say how its images were read: it goes on in MAR's way, {' '.join(words)}")
    return replace(args, **before)


NEEDS = {  # flag: the one without which it has no meaning
    "patch_nums": "multiscale",
    "partial_share": "multiscale",
    "perceptual_weight": "perceptual",
    "adversarial_start": "adversarial_weight",
    "fid_weights": "features",
}


def check_args(args: TokenizerArgs) -> None:
    """Raise ValueError where the autoencoder cannot or must not be written, and for flags wrong by themselves."""
    check_output_folder("output_dir", args.output_dir, args.data, args.data_path, args.split_dir)
    path = checkpoint_path(args.output_dir)
    if path.exists() and not args.resume:
        raise ValueError(f"{path} is there already: continue it with --resume, or choose another --output_dir")
    stored = Path(args.output_dir, FILE if args.multiscale else "autoencoder")
    if stored.exists() and not path.exists():
        raise ValueError(f"{stored} is not of a run in this folder, and would be replaced: choose another --output_dir")
    for name in ("epochs", "max_minutes", "lr"):
        if getattr(args, name) == 0:
            raise ValueError(f"--{name} must be above 0, got 0")
    if args.multiscale and args.codebook_size < len(args.scales):
        raise ValueError(
            f"--codebook_size {args.codebook_size} must be at least {len(args.scales)}, the scales of --patch_nums "
            f"{args.patch_nums}"
        )
    for name, needed in NEEDS.items():
        off = getattr(args, needed) in (False, 0, None, "none")
        if off and getattr(args, name) != getattr(TokenizerArgs, name):
            raise ValueError(f"--{name} {getattr(args, name)} has no meaning without --{needed}")
    if args.has_codebook and args.kl_weight != TokenizerArgs.kl_weight:
        raise ValueError(f"--kl_weight {args.kl_weight:g} has no meaning for ids, which have no KL divergence")
    if args.vq and args.multiscale:
        raise ValueError("--vq and --multiscale are two kinds of autoencoder: choose one")
    if args.width % 4:
        raise ValueError(f"--width must be a multiple of 4, got {args.width}")


def run_training(args: TokenizerArgs) -> int:
    """Check everything else, train, publish, measure."""
    path = checkpoint_path(args.output_dir)
    content = read_file(path) if path.exists() else None
    args = as_begun(args, content)
    images = args.images()
    if images.img_size % args.stride:
        raise ValueError(f"images of {images.img_size} pixels are not divisible by --stride {args.stride}")
    if args.multiscale and args.scales[-1] != (side := images.img_size // args.stride):
        raise ValueError(
            f"--patch_nums {args.patch_nums} must end with {side}, the side of the latents of {images.img_size} pixels "
            f"at --stride {args.stride}"
        )
    if args.adversarial_weight and images.img_size < 8:
        raise ValueError(f"--adversarial_weight needs images of at least 8 pixels, these have {images.img_size}")
    if len(images) <= HOLD_OUT:
        raise ValueError(f"{len(images)} images are too few, expected at least {HOLD_OUT + 1}: one in ten is held out")
    run = Run(args, images)
    if args.features:  # images that do not fit the features are refused before training
        extractor, _ = build_extractor(args.features, args.fid_weights)
        extractor(images[0][0][None].expand(-1, 3, -1, -1))
    if path.exists():
        run.load(path, content)
        print(f"continuing at step {run.step} of {run.num_steps}")
    if getattr(images, "layout", ""):
        print(images.layout)
    run.images = in_memory(images, args.num_workers)
    run.kept.dataset = run.images
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    train(run)
    if images.num_broken:
        print(broken_note(images.num_broken, len(images)))
    tokenizer = publish(run)
    run.draw(tokenizer)
    report(run, tokenizer)
    return 0


def main(argv=None) -> int:
    """Parse, train; returns the exit code."""
    return run_with(run_training, TokenizerArgs, "train_tokenizer.py", __doc__.splitlines()[0], argv, check_args)


if __name__ == "__main__":
    sys.exit(run_main(main))
