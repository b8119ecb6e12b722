"""Seconds of a training step on this device: the published one, then each lever; the cost of heads and their masks.

    python scripts/bench_training.py                           # MAR-B, random weights, batch 4
    python scripts/bench_training.py --only heads --preset digits

Seconds are medians of --repeats steps after one that warms up, ratios compare rows of this run. FLOPs are counted on
the meta device; "of peak" is their rate as a share of that of large matrix products of the same dtype, also timed.
"""

import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from heads.policy import HEADS
from models.mar import MAR
from models.tokenizers import build_tokenizer
from training.build import new_state
from training.config import TrainConfig, resolve
from training.objectives import OBJECTIVES
from training.objectives.token import Batch, TokenObjective
from training.presets import PRESETS
from training.state import TrainState
from training.step import forward_backward, optimizer_step
from util import dist
from util.args import flag, make_parser
from util.door import run_main
from util.timing import PeakMemory, Stopwatch, matmul_rate, print_table, short_number

NUM_STEPS = 8  # of a turn in the table of heads
# name: (flags of main_mar.py, does the diffusion MLP compute all tokens instead of the masked ones?)
TRAINING = {
    "all rows, fp32": (dict(dtype="fp32"), True),
    "masked rows, fp32": (dict(dtype="fp32"), False),
    "masked rows, bf16": (dict(dtype="bf16"), False),
}
STAGE = dict(mask_ratio_min=0.0, mask_ratio_per_image=True)  # the masks that heads are trained on
NEXT = dict(order="halton", train_targets="next")
POLICY = dict(train_masks="policy", train_targets="next", learn="order,group")
HEAD_COSTS = {
    "random masks": {},
    "random masks of every ratio": STAGE,
    **{f"+ {head} head": dict(STAGE, learn=head) for head in HEADS},
    "+ all four": dict(STAGE, learn=",".join(HEADS)),
    "all four, all else frozen": dict(STAGE, learn=",".join(HEADS), freeze_backbone=True, train_diffloss=False),
    "visited masks": dict(train_masks="visited", order="halton"),
    "visited masks, next targets": dict(train_masks="visited", **NEXT),
    "policy masks, 1 pass, group on halton": dict(train_masks="policy", learn="group", order_base="halton", **NEXT),
    "policy masks, 1 pass, order and group": POLICY,
    "policy masks, 4 passes, order and group": dict(POLICY, policy_passes=4),
}


@dataclass(frozen=True)
class BenchTrainingArgs:
    """The flags."""

    preset: str = flag("mar_base", "model and settings", choices=PRESETS)
    batch_size: int = flag(4, "images a training step; --only heads has the preset's", low=1)
    repeats: int = flag(3, "repeats, their median counts", low=1)
    only: str = flag("training", "comma list of training, heads")
    device: str = flag("auto", "auto, cuda, mps, cpu")
    dry_run: bool = flag(False, "print the rows and stop")


def training_state(preset: str, device, flags: dict) -> tuple[TrainState, TrainConfig]:
    """A state that trains with these flags of main_mar.py."""
    config = resolve({"preset": preset, **flags})
    torch.manual_seed(0)
    mar = MAR(config.model.build()).to(device)
    heads = config.build_heads(mar.width)
    heads = heads.to(device) if heads is not None else None
    tokenizer = build_tokenizer("pixel", channels=mar.config.vae_embed_dim).to(device)
    objective = OBJECTIVES[config.train.objective].build(mar, heads, config.for_objective(flip=False))
    state = new_state(objective, tokenizer, config.train, dist.pick_dtype(config.launch.dtype, device))
    state.wrapped.train()
    return state, config.train


def random_batch(config, batch_size):
    """(images or latents of the model's size, labels, indices)."""
    side = config.img_size // config.vae_stride
    shape = (batch_size, config.vae_embed_dim, side, side)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return images, torch.arange(batch_size) % config.class_num, torch.arange(batch_size)


def training_seconds(device, state: TrainState, args: TrainConfig, num_steps: int = 1) -> float:
    """Time of some steps on random images."""
    batch, watch = random_batch(state.model.config, args.batch_size), Stopwatch(device)
    began = watch.now()
    for _ in range(num_steps):
        terms = forward_backward(state, *batch, args.accum_iter)
        state.scaler.unscale_(state.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(state.wrapped.parameters(), args.grad_clip)
        _ = terms["loss"].item()
        optimizer_step(state, norm.item())
    return watch.now() - began


def all_tokens(draws, encode, device, epoch):
    """Replaces `Visits`: the published masks, with every token a target of the diffusion MLP."""
    return draws.with_mask(draws.mask, None, torch.ones_like(draws.mask))


def training_flops(state: TrainState, args: TrainConfig) -> int:
    """FLOPs of forward and backward pass, counted on the meta device."""
    prepared = state.objective.prepare(state, *random_batch(state.model.config, args.batch_size))
    twin = TokenObjective(MAR(state.model.config).to("meta")).train()
    batch = Batch(prepared.tokens.to("meta"), prepared.labels.to("meta"), prepared.draws.to("meta"))
    with FlopCounterMode(display=False) as counter:
        twin(batch, torch.ones((), device="meta"))["loss"].backward()
    return counter.get_total_flops()


def training(args: BenchTrainingArgs, device) -> None:
    """The table of TRAINING: a step on all tokens, on the masked ones, and in bf16."""
    peak, table, medians = PeakMemory(device), [], []
    for name, (flags, every_token) in tqdm(TRAINING.items(), desc="training", leave=False):
        state, config = training_state(args.preset, device, {**flags, "batch_size": args.batch_size})
        if every_token:
            preparation = state.objective.preparation
            draws = replace(preparation.draws, every_token=True)
            state.objective.preparation = replace(preparation, draws=draws, visits=all_tokens)
        peak.reset()
        times = [training_seconds(device, state, config) for _ in range(args.repeats + 1)]
        medians.append(statistics.median(times[1:]))
        memory, flops = peak.read() / 1e9, training_flops(state, config)
        of_peak = flops / medians[-1] / matmul_rate(device, dist.DTYPES[flags["dtype"]])
        times_faster = [short_number(medians[-1]), f"{medians[0] / medians[-1]:.2f}"]
        table.append([name, *times_faster, f"{flops / 1e12:.2f}", f"{of_peak:.0%}", f"{memory:.1f}"])
        del state  # before the next one is made: memory holds one large model
    head = ["", "seconds", "faster by", "TFLOPs", "of peak", "peak memory, GB"]
    print_table(f"Training: {args.preset}, batch {args.batch_size}, seconds a step", head, table)


def heads(args: BenchTrainingArgs, device) -> None:
    """The table of HEAD_COSTS, at the preset's batch size.

    Each row takes turns with the first one, and the ratio is the median of the turns: the machine's speed drifts.
    """
    plain, table = training_state(args.preset, device, HEAD_COSTS["random masks"]), []
    for name, flags in tqdm(HEAD_COSTS.items(), desc="heads", leave=False):
        run = training_state(args.preset, device, flags)
        turns = [
            (training_seconds(device, *plain, NUM_STEPS), training_seconds(device, *run, NUM_STEPS))
            for _ in range(args.repeats + 1)
        ][1:]  # the first warms up
        rate = NUM_STEPS * run[1].batch_size / statistics.median(seconds for _, seconds in turns)
        ratios = [seconds / plain_seconds for plain_seconds, seconds in turns]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        table.append([name, f"{rate:.1f}", f"{statistics.median(ratios):.2f}", spread])
        del run  # before the next one is made
    head = ["training step", "images/s", "time against random masks", "lowest to highest"]
    print_table(f"Training: {args.preset}, batch {plain[1].batch_size}", head, table)


SECTIONS = {"training": training, "heads": heads}


def main(argv=None) -> int:
    """Run the sections asked for, print their tables; returns the exit code."""
    args = BenchTrainingArgs(
        **vars(make_parser("bench_training.py", __doc__.splitlines()[0], BenchTrainingArgs).parse_args(argv))
    )
    names = args.only.split(",")
    for name in names:
        if name not in SECTIONS:
            raise ValueError(f"--only {name!r} is not a section; valid: {', '.join(SECTIONS)}")
    if args.dry_run:
        print("\n".join([*TRAINING, *HEAD_COSTS]))
        return 0
    with dist.tf32(True):  # as main_mar.py
        for name in names:
            SECTIONS[name](args, dist.pick_device(args.device))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
