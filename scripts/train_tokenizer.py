"""Train a small autoencoder, KL or with --vq a VQModel, for `main_mar.py --tokenizer diffusers:OUT/autoencoder`.

    python scripts/train_tokenizer.py --data_path IMAGES --img_size 32 --stride 4 --latent_channels 8 --output_dir OUT

Every tenth image is held out of training, to measure PSNR, SSIM and (with --features) rFID on. OUT gets autoencoder/
(diffusers' own format, its latents centred and their scale in its config), reconstructions.png (originals above their
reconstructions), a line of kind "reconstruction" in results.jsonl, and checkpoint-last.pth for --resume.

Loss: mean absolute error + perceptual_weight · perceptual distance + a penalty, which is kl_weight · KL (both summed
over an image, as in LDM, then divided by its number of values), or codebook + 0.25 · commitment (VQ-VAE). Entries that
no latent chooses any more are moved to latents; which share of the codebook is used is measured with the rest.
"""

import copy
import math
import shlex
import shutil
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

from models.tokenizers import build_tokenizer
from models.tokenizers.autoencoder import AutoencoderTokenizer
from models.tokenizers.measuring import measure_latents
from training.autoencoders import LOSSES, centre_latents, make_autoencoder, revive, start_codebook, watched
from training.optim import lr_at
from util import dist
from util.args import flag, pick, run_with
from util.checkpoint import checkpoint_path, load_weights, read_file, save_checkpoint
from util.door import run_main
from util.evaluation.features import FEATURES, build_extractor
from util.evaluation.metrics import metrics_line
from util.evaluation.perceptual import PERCEPTUAL, build_perceptual
from util.evaluation.protocol import EvalConfig, protocol, protocol_line, reconstruction_row
from util.evaluation.reconstruction import ReconstructionFID, score_reconstructions, warn_of_usage
from util.evaluation.results import append_result, find_result, git_commit, read_results
from util.foreign import are_weights, type_of
from util.images.datasets import EpochSampler, ImagesArgs, broken_note, in_memory, labels_of
from util.images.folders import check_output_folder
from util.images.pictures import make_grid, save_png, to_uint8
from util.images.reading import MARS_WAY, Reading
from util.rng import generator, seed_of

SAVE_EVERY = 500  # steps, besides the end of each epoch
HOLD_OUT = 10  # every tenth image
WARMUP = 0.02  # share of the run
REVIVE_UNTIL = 0.9  # share of the run after which entries of the codebook stay where they are
NUM_PICTURES = 8
NUM_MEASURED = 10000  # images for mean and scale of the latents
# flags that must be the same with --resume
FIXED = "data data_path img_size stride latent_channels width vq codebook_size batch_size seed".split()
FIXED += [field.name for field in fields(Reading)]


@dataclass(frozen=True)
class TokenizerArgs(ImagesArgs):
    """The flags: autoencoder, data, loss, length of the run, and the folder of its files."""

    stride: int = flag(4, "pixels of a latent's side", choices=(2, 4, 8, 16))
    latent_channels: int = flag(8, "channels of a latent", low=1)
    width: int = flag(
        32, "channels at full resolution, a multiple of 4; deeper levels have up to 4 times as many", low=4
    )
    vq: bool = flag(False, "train a VQModel instead of an AutoencoderKL")
    codebook_size: int = flag(1024, "codes of the VQModel", low=2)
    epochs: float = flag(10.0, "passes over the images, which may be a fraction", low=0)
    max_minutes: float | None = flag(None, "minutes after which training stops, if the epochs take longer", low=0)
    batch_size: int = flag(32, "images a step", low=1)
    lr: float = flag(1e-3, "peak learning rate of Adam; it falls to 0 along a cosine", low=0)
    kl_weight: float = flag(1e-6, "weight of the KL divergence", low=0)
    perceptual: str = flag("none", "network of the perceptual distance", choices=PERCEPTUAL)
    perceptual_weights: str | None = flag(None, "file with the weights of vgg16 (torchvision's, .pth or .safetensors)")
    perceptual_weight: float = flag(0.1, "weight of the perceptual distance", low=0)
    features: str | None = flag(None, "features of the rFID (default: PSNR and SSIM only)", choices=FEATURES)
    fid_weights: str | None = flag(None, "file with the weights of the features, for machines without network")
    num_eval: int = flag(5000, "held-out images to measure on, at most", low=2)
    num_workers: int = flag(0, "processes that load images", low=0)
    seed: int = flag(0, "seed of weights, order, mirroring and the posterior's noise", low=0, high=2**63 - 1)
    dtype: str | None = flag(None, "arithmetic (default: bf16 where CUDA has it, else fp32)", choices=("fp32", "bf16"))
    output_dir: str = flag("output_dir/tokenizer", "folder to write to")
    resume: bool = flag(False, "continue the run in --output_dir, if it has one")
    dry_run: bool = flag(False, "print the resolved configuration and stop")

    @property
    def class_name(self) -> str:
        """The autoencoder's class in diffusers, a row of LOSSES."""
        return "VQModel" if self.vq else "AutoencoderKL"


class Run:
    """The state of a training run, its images and the loss network."""

    def __init__(self, args: TokenizerArgs, images):
        self.args, self.images = args, images
        self.device = dist.pick_device(args.device)
        self.dtype = dist.pick_dtype(args.dtype, self.device)
        held_out = range(0, len(images), HOLD_OUT)
        count = min(args.num_eval, len(held_out))
        self.held_out = [held_out[i * len(held_out) // count] for i in range(count)]
        self.kept = Subset(images, [i for i in range(len(images)) if i % HOLD_OUT])
        self.sampler = EpochSampler(len(self.kept), args.batch_size, args.seed)
        self.num_steps = max(1, math.ceil(args.epochs * len(self.sampler)))
        self.perceptual = build_perceptual(args.perceptual, args.perceptual_weights, images.channels, images.img_size)
        if self.perceptual is not None:
            self.perceptual.to(self.device)
        sizes = {name: getattr(args, name) for name in ("stride", "latent_channels", "width", "codebook_size")}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(args.seed)
            autoencoder = make_autoencoder(
                args.class_name, **sizes, image_channels=images.channels, img_size=images.img_size
            )
        self.autoencoder = autoencoder.to(self.device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.Adam(self.autoencoder.parameters(), lr=args.lr, betas=(0.9, 0.99))
        self.step, self.minutes = 0, 0.0  # trained so far
        self.idle = torch.zeros(args.codebook_size if args.vq else 0, dtype=torch.long)  # see `revive`

    @property
    def done(self) -> float:
        """The share of the run that is done, by steps or by time."""
        return max(self.step / self.num_steps, self.minutes / (self.args.max_minutes or math.inf))

    def save(self) -> None:
        """Write the checkpoint."""
        content = dict(
            autoencoder=self.autoencoder.state_dict(),
            optimizer=self.optimizer.state_dict(),
            step=self.step,
            minutes=self.minutes,
            idle=self.idle,
            settings=asdict(self.args),
        )
        save_checkpoint(self.args.output_dir, content)

    def load(self, path: Path, content) -> None:
        """Continue from the content of a checkpoint; one that is damaged or of another run raises ValueError."""
        keys = {"autoencoder", "optimizer", "step", "minutes", "settings"}
        if not isinstance(content, dict) or not keys <= content.keys():
            raise ValueError(f"{path}, {type_of(content)}, is no checkpoint of train_tokenizer.py")
        types = dict(autoencoder=dict, optimizer=dict, settings=dict, step=int, minutes=float | int)
        wrong = [key for key, value_type in types.items() if not isinstance(content[key], value_type)]
        if wrong or not are_weights(content["autoencoder"]):
            key = wrong[0] if wrong else "autoencoder"
            raise ValueError(f"{path} is damaged: its {key!r} is {type_of(content[key])}")
        settings = {**asdict(MARS_WAY if self.args.data == "imagefolder" else Reading()), **content["settings"]}
        for name in FIXED:
            stored, given = settings.get(name), getattr(self.args, name)
            if stored != given:
                raise ValueError(f"{path} was trained with --{name} {stored}, not {given}: choose another --output_dir")
        load_weights(self.autoencoder, content["autoencoder"], path)
        try:
            self.optimizer.load_state_dict(content["optimizer"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged: its optimizer does not fit ({str(error)[:120]})") from None
        idle = content.get("idle", self.idle)  # none in a checkpoint of before entries were revived
        if not torch.is_tensor(idle) or idle.shape != self.idle.shape:
            raise ValueError(f"{path} is damaged: its 'idle' does not fit the codebook")
        self.step, self.minutes, self.idle = content["step"], content["minutes"], idle

    def tokenizer(self) -> AutoencoderTokenizer:
        """A frozen copy of the autoencoder as it is now."""
        return AutoencoderTokenizer(self.args.class_name, copy.deepcopy(self.autoencoder)).to(self.device)

    def scores(self, tokenizer, indices, fid: ReconstructionFID | None = None, verbose=False) -> dict[str, float]:
        """`score_reconstructions` of the tokenizer on the images at these indices; without fid no rfid."""
        options = dict(batch_size=self.args.batch_size, device=self.device, dtype=self.dtype, verbose=verbose)
        return score_reconstructions(tokenizer, Subset(self.images, indices), fid, **options)

    def draw(self, tokenizer) -> None:
        """Write reconstructions.png: held-out images above their reconstructions."""
        indices = self.held_out[:: max(1, len(self.held_out) // NUM_PICTURES)][:NUM_PICTURES]
        originals = torch.stack([self.images[i][0] for i in indices])
        decoded = tokenizer.decode(tokenizer.encode(originals.to(self.device).float() / 127.5 - 1, sample=False))
        pictures = np.concatenate([originals.permute(0, 2, 3, 1).numpy(), to_uint8(decoded)])
        count = len(indices)
        grid = make_grid(pictures, ["original"] * count + ["decoded"] * count, count)
        save_png(Path(self.args.output_dir, "reconstructions.png"), grid)


def optimize(run: Run, pixels: torch.Tensor) -> dict[str, float]:
    """One step on uint8 images (B, C, H, W); the loss terms. A loss or gradient that is not finite raises."""
    args, draws = run.args, generator(seed_of("tokenizer", run.args.seed, run.step))
    if run.images.flip:
        flip = torch.rand(len(pixels), generator=draws) < 0.5
        pixels = torch.where(flip[:, None, None, None], pixels.flip(-1), pixels)
    images = pixels.to(run.device).float() / 127.5 - 1
    images = images.contiguous(memory_format=torch.channels_last)
    if args.vq and run.step == 0:
        start_codebook(run.autoencoder, images, draws)
    loss_terms, penalty_name = LOSSES[args.class_name]
    with dist.autocast(run.device, run.dtype), watched(run.autoencoder) as quantised:
        decoded, penalty = loss_terms(run.autoencoder, images, draws)
        terms = {"l1": F.l1_loss(decoded.float(), images), penalty_name: penalty}
        if run.perceptual is not None:
            terms["perceptual"] = run.perceptual(decoded, images)
    weights = {"l1": 1.0, "vq": 1.0, "kl": args.kl_weight, "perceptual": args.perceptual_weight}
    loss = sum(weights[name] * term for name, term in terms.items())
    run.optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(run.autoencoder.parameters(), 1.0)
    if not torch.isfinite(norm):
        raise FloatingPointError(f"the gradient is not finite at step {run.step}: lower --lr, or use --dtype fp32")
    progress = max(run.done, (run.step + 0.5) / run.num_steps)
    for group in run.optimizer.param_groups:
        group["lr"] = lr_at(progress, lr=args.lr, min_lr=0.0, schedule="cosine", warmup_epochs=WARMUP, epochs=1.0)
    run.optimizer.step()
    if args.vq and run.done < REVIVE_UNTIL:
        revive(run.autoencoder, run.idle, *quantised[0], draws)
    return {name: term.item() for name, term in terms.items()}


def train(run: Run) -> None:
    """Train to the end, saving on the way and reporting after each epoch."""
    epoch_steps = len(run.sampler)
    loader = DataLoader(run.kept, batch_sampler=run.sampler, num_workers=run.args.num_workers)
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


def publish(run: Run) -> AutoencoderTokenizer:
    """Measure the latents, write OUT/autoencoder with them normalised, and load that."""
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


def report(run: Run, tokenizer: AutoencoderTokenizer) -> None:
    """Measure on the held-out images unless results.jsonl has the result, append a line, print it."""
    args, results = run.args, Path(run.args.output_dir, "results.jsonl")
    dtype = dist.dtype_name(run.dtype)
    evaluation = EvalConfig(num_images=len(run.held_out), features=args.features)
    folder = str(Path(args.output_dir, "autoencoder"))
    settings = dict(tokenizer=f"diffusers:{folder}", data=args.data, img_size=run.images.img_size, dtype=dtype)
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
    print(protocol_line(row["protocol"]))
    print(f"{run.step} steps, {run.minutes:.1f} minutes: {metrics_line(row['metrics'])}")
    if args.vq:
        num_tokens = len(run.held_out) * (run.images.img_size // args.stride) ** 2
        warn_of_usage(row["metrics"]["usage"], num_tokens, args.codebook_size)
    shape = f"{tokenizer.channels} channels at stride {tokenizer.stride}, scale {tokenizer.scale:.4f}"
    tokens = "latents, or with --loss ce on its ids" if args.vq else "latents"
    print(f"{shape}; picture: {Path(args.output_dir, 'reconstructions.png')}. To train on its {tokens}:")
    flags = ["--data", args.data]
    if args.data_path:
        flags += ["--data_path", args.data_path]
    flags += [*args.reading.flags(), "--img_size", str(run.images.img_size), "--tokenizer", f"diffusers:{folder}"]
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


def check_args(args: TokenizerArgs) -> None:
    """Raise ValueError where the autoencoder cannot or must not be written, and for flags wrong by themselves."""
    check_output_folder("output_dir", args.output_dir, args.data, args.data_path, args.split_dir)
    path = checkpoint_path(args.output_dir)
    if path.exists() and not args.resume:
        raise ValueError(f"{path} is there already: continue it with --resume, or choose another --output_dir")
    stored = Path(args.output_dir, "autoencoder")
    if stored.exists() and not path.exists():
        raise ValueError(f"{stored} is not of a run in this folder, and would be replaced: choose another --output_dir")
    for name in ("epochs", "max_minutes"):
        if getattr(args, name) == 0:
            raise ValueError(f"--{name} must be above 0, got 0")
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
    if len(images) <= HOLD_OUT:
        raise ValueError(f"{len(images)} images are too few, expected at least {HOLD_OUT + 1}: one in ten is held out")
    run = Run(args, images)
    if args.features:  # images that do not fit the features are refused before training
        extractor, _ = build_extractor(args.features, args.fid_weights, device=run.device)
        extractor(images[0][0][None].expand(-1, 3, -1, -1).to(run.device))
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
