"""A run that trains an autoencoder: its state, its checkpoint, one step, and the pictures of what it does."""

import copy
import math
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Subset

from models.tokenizers import Tokenizer
from models.tokenizers.autoencoder import AutoencoderTokenizer
from models.tokenizers.multiscale import MultiScaleTokenizer
from training.autoencoders import LOSSES, make_autoencoder, revive, start_codebook, watched
from training.discriminator import LR, Discriminator
from training.optim import lr_at
from util import dist
from util.checkpoint import load_weights, save_checkpoint
from util.evaluation.perceptual import build_perceptual
from util.evaluation.reconstruction import ReconstructionFID, score_reconstructions
from util.foreign import are_weights, type_of
from util.images.datasets import EpochSampler
from util.images.pictures import make_grid, save_png, to_uint8
from util.images.reading import MARS_WAY, Reading
from util.rng import generator, seed_of

HOLD_OUT = 10  # every tenth image
WARMUP = 0.02  # share of the run
REVIVE_UNTIL = 0.9  # share of the run after which entries of the codebook stay where they are
NUM_PICTURES = 8
ROW = "var_vq"  # of TOKENIZERS, for a multi-scale one
# flags that must be the same with --resume
FIXED = "data data_path img_size stride latent_channels width vq multiscale patch_nums partial_share".split()
FIXED += "codebook_size adversarial_weight batch_size seed".split() + [field.name for field in fields(Reading)]


class Run:
    """The state of a training run, its images and the loss network."""

    def __init__(self, args, images):
        """args: the flags of scripts/train_tokenizer.py; images: an ImageDataset."""
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
        sizes = {
            name: getattr(args, name) for name in ("stride", "latent_channels", "width", "codebook_size", "scales")
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(args.seed)
            autoencoder = make_autoencoder(
                args.class_name, **sizes, image_channels=images.channels, img_size=images.img_size
            )
            discriminator = Discriminator(images.channels) if args.adversarial_weight else None
        self.autoencoder = autoencoder.to(self.device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.Adam(self.autoencoder.parameters(), lr=args.lr, betas=(0.9, 0.99))
        self.discriminator = self.discriminator_optimizer = None
        if discriminator is not None:
            self.discriminator = discriminator.to(self.device)
            self.discriminator_optimizer = torch.optim.Adam(discriminator.parameters(), lr=LR, betas=(0.5, 0.9))
        self.step, self.minutes = 0, 0.0  # trained so far
        self.idle = torch.zeros(args.codebook_size if args.has_codebook else 0, dtype=torch.long)  # see `revive`

    @property
    def done(self) -> float:
        """The share of the run that is done, by steps or by time."""
        return max(self.step / self.num_steps, self.minutes / (self.args.max_minutes or math.inf))

    @property
    def adversarial(self) -> bool:
        """Does this step train with the discriminator?"""
        return self.discriminator is not None and self.done >= self.args.adversarial_start

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
        if self.discriminator is not None:
            content["discriminator"] = self.discriminator.state_dict()
            content["discriminator_optimizer"] = self.discriminator_optimizer.state_dict()
        save_checkpoint(self.args.output_dir, content)

    def load(self, path: Path, content) -> None:
        """Continue from the content of a checkpoint; one that is damaged or of another run raises ValueError."""
        keys = {"autoencoder", "optimizer", "step", "minutes", "settings"}
        if not isinstance(content, dict) or not keys <= content.keys():
            raise ValueError(f"{path}, {type_of(content)}, is no checkpoint of train_tokenizer.py")
        types = dict(autoencoder=dict, optimizer=dict, settings=dict, step=int, minutes=float | int)
        wrong = [key for key, value_type in types.items() if not isinstance(content[key], value_type)]
        if wrong:
            raise ValueError(f"{path} is damaged: its {wrong[0]!r} is {type_of(content[wrong[0]])}")
        defaults = {field.name: field.default for field in fields(self.args)}  # those of before a flag was there
        settings = {
            **defaults,
            **asdict(MARS_WAY if self.args.data == "imagefolder" else Reading()),
            **content["settings"],
        }
        for name in FIXED:
            stored, given = settings.get(name), getattr(self.args, name)
            if stored != given:
                raise ValueError(f"{path} was trained with --{name} {stored}, not {given}: choose another --output_dir")
        _restore(self.autoencoder, self.optimizer, content, "autoencoder", "optimizer", path)
        if self.discriminator is not None:
            names = "discriminator", "discriminator_optimizer"
            _restore(self.discriminator, self.discriminator_optimizer, content, *names, path)
        idle = content.get("idle", self.idle)  # none in a checkpoint of before entries were revived
        if not torch.is_tensor(idle) or idle.shape != self.idle.shape:
            raise ValueError(f"{path} is damaged: its 'idle' does not fit the codebook")
        self.step, self.minutes, self.idle = content["step"], content["minutes"], idle

    def tokenizer(self) -> Tokenizer:
        """A frozen copy of the autoencoder as it is now."""
        autoencoder = copy.deepcopy(self.autoencoder)
        if self.args.multiscale:
            return MultiScaleTokenizer(ROW, autoencoder).to(self.device)
        return AutoencoderTokenizer(self.args.class_name, autoencoder).to(self.device)

    def scores(self, tokenizer, indices, fid: ReconstructionFID | None = None, verbose=False) -> dict[str, float]:
        """`score_reconstructions` of the tokenizer on the images at these indices; without fid no rfid."""
        options = dict(batch_size=self.args.batch_size, device=self.device, dtype=self.dtype, verbose=verbose)
        return score_reconstructions(tokenizer, Subset(self.images, indices), fid, **options)

    def draw(self, tokenizer: Tokenizer) -> None:
        """Write reconstructions.png: held-out images above their reconstructions.

        With scales, scales.png too: each image in a row, growing by a scale a column.
        """
        indices = self.held_out[:: max(1, len(self.held_out) // NUM_PICTURES)][:NUM_PICTURES]
        originals = torch.stack([self.images[i][0] for i in indices])
        images = originals.to(self.device).float() / 127.5 - 1
        originals, count = originals.permute(0, 2, 3, 1).numpy(), len(indices)
        if tokenizer.scales:
            grown = tokenizer.decode_scales(tokenizer.encode_ids(images))  # (S, n, C, H, W)
            rows = np.stack([*map(to_uint8, grown), originals], axis=1)  # (n, S + 1, H, W, C)
            captions = [f"{p} x {p}" for p in tokenizer.scales] + ["original"]
            self._save_grid("scales.png", rows.reshape(-1, *rows.shape[2:]), captions * count, len(captions))
            decoded = grown[-1]
        else:
            decoded = tokenizer.decode(tokenizer.encode(images, sample=False))
        pictures = np.concatenate([originals, to_uint8(decoded)])
        self._save_grid("reconstructions.png", pictures, ["original"] * count + ["decoded"] * count, count)

    def _save_grid(self, name: str, pictures: np.ndarray, captions: list[str], columns: int) -> None:
        save_png(Path(self.args.output_dir, name), make_grid(pictures, captions, columns))


def _restore(network, optimizer, content: dict, name: str, optimizer_name: str, path: Path) -> None:
    """Give a network and its optimizer what a checkpoint has under these names; ValueError where it does not fit."""
    if not are_weights(content.get(name)):
        raise ValueError(f"{path} is damaged: its {name!r} is {type_of(content.get(name))}")
    load_weights(network, content[name], path)
    try:
        optimizer.load_state_dict(content[optimizer_name])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: its {optimizer_name} does not fit ({str(error)[:120]})") from None


def optimize(run: Run, pixels: torch.Tensor) -> dict[str, float]:
    """One step on uint8 images (B, C, H, W); the loss terms. A loss or gradient that is not finite raises."""
    args, draws = run.args, generator(seed_of("tokenizer", run.args.seed, run.step))
    if run.images.flip:
        flip = torch.rand(len(pixels), generator=draws) < 0.5
        pixels = torch.where(flip[:, None, None, None], pixels.flip(-1), pixels)
    images = pixels.to(run.device).float() / 127.5 - 1
    images = images.contiguous(memory_format=torch.channels_last)
    if args.has_codebook and run.step == 0:
        start_codebook(run.autoencoder, images, draws)
    kind, adversarial = LOSSES[args.class_name], run.adversarial
    with dist.autocast(run.device, run.dtype), watched(run.autoencoder) as quantised:
        decoded, penalty = kind.terms(run.autoencoder, images, draws, args.partial_share)
        terms = {"l1": F.l1_loss(decoded.float(), images), kind.penalty: penalty}
        if run.perceptual is not None:
            terms["perceptual"] = run.perceptual(decoded, images)
        if adversarial:
            terms["adversarial"] = run.discriminator.of_generator(decoded)
    weights = {name: getattr(args, f"{name}_weight") for name in ("kl", "perceptual", "adversarial")}
    loss = sum(weights.get(name, 1.0) * term for name, term in terms.items())
    run.optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(run.autoencoder.parameters(), 1.0)
    if not torch.isfinite(norm):
        raise FloatingPointError(f"the gradient is not finite at step {run.step}: lower --lr, or use --dtype fp32")
    progress = max(run.done, (run.step + 0.5) / run.num_steps)
    for group in run.optimizer.param_groups:
        group["lr"] = lr_at(progress, lr=args.lr, min_lr=0.0, schedule="cosine", warmup_epochs=WARMUP, epochs=1.0)
    run.optimizer.step()
    if adversarial:
        terms["discriminator"] = _train_discriminator(run, images, decoded)
    if args.multiscale:
        run.autoencoder.quantize.count([ids for _, ids in quantised[0]], run.step)
    if args.has_codebook and run.done < REVIVE_UNTIL:
        revive(run.autoencoder, run.idle, quantised[0], draws)
    return {name: term.item() for name, term in terms.items()}


def _train_discriminator(run: Run, images: torch.Tensor, decoded: torch.Tensor) -> torch.Tensor:
    """A step of the discriminator on images and their reconstructions; its loss ()."""
    with dist.autocast(run.device, run.dtype):
        loss = run.discriminator.loss(images, decoded)
    run.discriminator_optimizer.zero_grad()
    loss.backward()
    run.discriminator_optimizer.step()
    return loss
