"""Images a second of a training step: what each head and each kind of training mask costs.

    python scripts/bench_training.py                                    # the digits preset, on random images
    python scripts/bench_training.py --preset mar_base --batch_size 4   # MAR-B with random weights on random latents

A figure is the median over the rounds, a ratio compares rows of this run.
"""

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tqdm import tqdm

from build import new_state
from config import PRESETS, TrainConfig, mar_config, resolve
from models.mar import MAR
from models.tokenizers import build_tokenizer
from train_state import TrainState
from train_step import forward_backward, optimizer_step
from util import dist
from util.args import flag, make_parser, pick, run_main

SECOND_STAGE = dict(mask_ratio_min=0.0, mask_ratio_per_image=True)  # the masks that heads are trained on
FROZEN = dict(freeze_backbone=True, train_diffloss=False, **SECOND_STAGE)
NEXT = dict(order="halton", train_targets="next")
# name: flags of main_mar.py
ROWS = {
    "random masks": {},
    "random masks of every ratio": SECOND_STAGE,
    "+ order head": SECOND_STAGE | dict(learn="order"),
    "+ group head": SECOND_STAGE | dict(learn="group"),
    "+ tau head": SECOND_STAGE | dict(learn="tau"),
    "+ cfg head": SECOND_STAGE | dict(learn="cfg"),
    "+ all four": SECOND_STAGE | dict(learn="order,group,tau,cfg"),
    "all four, all else frozen": FROZEN | dict(learn="order,group,tau,cfg"),
    "visited masks": dict(train_masks="visited", order="halton"),
    "visited masks, next targets": dict(train_masks="visited", **NEXT),
    "policy masks, 1 pass, order and group": dict(train_masks="policy", train_targets="next", learn="order,group"),
    "policy masks, 4 passes, order and group": dict(
        train_masks="policy", train_targets="next", learn="order,group", policy_passes=4
    ),
}


@dataclass(frozen=True)
class BenchArgs:
    """What is timed."""

    preset: str = flag("digits", "model and training settings", choices=PRESETS)
    batch_size: int | None = flag(None, "images a step (default: the preset's)", low=1)
    rounds: int = flag(5, "rounds, the median counts", low=1)
    steps: int = flag(8, "steps of a row in each round", low=1)
    device: str = flag("auto", "auto, cuda, mps, cpu")
    dtype: str | None = flag(None, "arithmetic (default: bf16 where CUDA has it, else fp32)", choices=dist.DTYPES)
    dry_run: bool = flag(False, "print the rows and stop")


def build(flags: dict, device, dtype) -> tuple[TrainState, TrainConfig]:
    """A state that trains with these flags of main_mar.py."""
    values = resolve(flags)
    args = pick(TrainConfig, values)
    torch.manual_seed(0)
    mar = MAR(mar_config(values)).to(device)
    heads = args.heads(mar.config.decoder_embed_dim)
    heads = heads.to(device) if heads is not None else None
    tokenizer = build_tokenizer("pixel", channels=mar.config.vae_embed_dim)
    state = new_state(values, mar, tokenizer, heads, device, dtype)
    state.module.train()
    return state, args


def seconds(state: TrainState, args: TrainConfig, num_steps: int) -> float:
    """Time of some steps on random images, or latents, of the model's size."""
    config = state.mar.config
    side = config.img_size // config.vae_stride
    shape = (args.batch_size, config.vae_embed_dim, side, side)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(args.batch_size) % config.class_num
    began = time.perf_counter()
    for _ in range(num_steps):
        terms = forward_backward(state, images, labels, torch.arange(args.batch_size), args, False)
        state.scaler.unscale_(state.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(state.module.parameters(), args.grad_clip)
        _ = terms["loss"].item()
        optimizer_step(state, norm.item())
    return time.perf_counter() - began


def main(argv=None) -> int:
    """Time the rows, print the table; returns the exit code."""
    args = BenchArgs(**vars(make_parser("bench_training.py", __doc__.splitlines()[0], BenchArgs).parse_args(argv)))
    if args.dry_run:
        print("\n".join(ROWS))
        return 0
    device = dist.pick_device(args.device)
    dtype = dist.pick_dtype(args.dtype, device)
    size = {} if args.batch_size is None else {"batch_size": args.batch_size}
    times = {name: [] for name in ROWS}
    with tqdm(total=args.rounds * len(ROWS), desc="timing", leave=False) as progress:
        for name, flags in ROWS.items():  # one model at a time: several large ones do not fit
            state, config = build({"preset": args.preset, **size, **flags}, device, dtype)
            seconds(state, config, 1)  # warm up
            for _ in range(args.rounds):
                times[name].append(seconds(state, config, args.steps))
                progress.update()
    print(f"{args.preset}, batch {config.batch_size}, {device.type}, {str(dtype).removeprefix('torch.')}\n")
    print("| training step | images/s | time against random masks |\n| --- | ---: | ---: |")
    first = statistics.median(times["random masks"])
    for name, found in times.items():
        middle = statistics.median(found)
        print(f"| {name} | {args.steps * config.batch_size / middle:.1f} | {middle / first:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
