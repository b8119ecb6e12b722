"""Seconds of a training step on this device: the published one, then each lever; the cost of heads and their masks.

    python scripts/bench_training.py                           # MAR-B, random weights, batch 4
    python scripts/bench_training.py --only heads --preset digits
    python scripts/bench_training.py --trace trace.json        # of the loop: what loads, draws and computes when

Seconds are medians of --repeats steps after one that warms up, ratios compare rows of this run. FLOPs are counted on
the meta device; "of peak" is their rate as a share of that of large matrix products of the same dtype, also timed. A
GPU has GPU_COLUMNS as well, and a compiled row. --trace writes a file that chrome://tracing and ui.perfetto.dev show:
the threads of TRACED_STEPS steps of main_mar.py's loop, with a data loader, and on a GPU its kernels.
"""

import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.profiler import ProfilerActivity, _ExperimentalConfig, profile
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from engine_mar import train_one_epoch
from heads.policy import HEADS
from models.mar import MAR
from models.tokenizers import Tokenizer
from training.build import new_state
from training.config import TrainConfig, resolve
from training.objectives import OBJECTIVES
from training.objectives.token import Batch, TokenObjective
from training.presets import PRESETS
from training.state import TrainState
from training.step import foresee, training_step
from util import dist
from util.args import check_output_file, flag, make_parser
from util.checkpoint import atomic_file
from util.door import run_main
from util.images.folders import check_output_folder
from util.rng import generator
from util.timing import PeakMemory, Stopwatch, device_work, matmul_rate, print_table, short_number

WARM_UPS = 10  # on a GPU; each step knows another number of tokens
NUM_STEPS = 8  # of a turn in the table of heads
TRACED_STEPS = 6
# name: (flags of main_mar.py, does the diffusion MLP compute all tokens instead of the masked ones?)
TRAINING = {
    "all rows, fp32": (dict(dtype="fp32"), True),
    "masked rows, fp32": (dict(dtype="fp32"), False),
    "masked rows, bf16": (dict(dtype="bf16"), False),
    "masked rows, bf16, --compile": (dict(dtype="bf16", compile=True), False),  # on a GPU
}
GPU_COLUMNS = ["images/s", "busy", "kernels a step"]
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
    trace: str | None = flag(None, "write a trace of the training loop to this file, and measure nothing")
    device: str = flag("auto", "auto, cuda, mps, cpu")
    dry_run: bool = flag(False, "print the rows and stop")


def training_state(preset: str, device, flags: dict) -> tuple[TrainState, TrainConfig]:
    """A state that trains with these flags of main_mar.py."""
    config = resolve({"preset": preset, **flags})
    torch.manual_seed(0)
    mar = MAR(config.model.build()).to(device)
    if config.launch.compile:
        mar.compile_parts()
    heads = config.build_heads(mar.width)
    heads = heads.to(device) if heads is not None else None
    c = mar.config
    tokenizer = Tokenizer("cached", stride=c.vae_stride, channels=c.vae_embed_dim, image_channels=3, gaussian=True)
    tokenizer = tokenizer.to(device)
    objective = OBJECTIVES[config.train.objective].build(mar, heads, config.for_objective(flip=True))
    state = new_state(objective, tokenizer, config.train, dist.pick_dtype(config.launch.dtype, device))
    state.wrapped.train()
    return state, config.train


def random_batch(config, batch_size):
    """(moments of latents and of their mirror images, as from a cache, labels, indices)."""
    side = config.img_size // config.vae_stride
    moments = torch.randn((batch_size, 2, 2 * config.vae_embed_dim, side, side), generator=generator(0))
    return moments, torch.arange(batch_size) % config.class_num, torch.arange(batch_size)


def training_seconds(device, state: TrainState, args: TrainConfig, num_steps: int = 1) -> float:
    """Time of some steps of the loop on random images, without loading them."""
    batch, watch = random_batch(state.model.config, args.batch_size), Stopwatch(device)
    began = watch.now()
    for _ in range(num_steps):
        foresee(state, batch[0], batch[2], args.accum_iter)
        training_step(state, *batch, lr=args.lr, config=args)
    return watch.now() - began


def all_tokens(draws, encode, device, epoch):
    """Replaces `Visits`: the published masks, with every token a target of the diffusion MLP."""
    return draws.with_mask(draws.mask, None, torch.ones_like(draws.mask))


def training_flops(state: TrainState, args: TrainConfig, step: int) -> int:
    """FLOPs of forward and backward pass of a step, whose number decides the masks, counted on the meta device."""
    state = replace(state, step=step)
    prepared = state.objective.prepare(state, *random_batch(state.model.config, args.batch_size))
    twin = TokenObjective(MAR(state.model.config).to("meta")).train()
    batch = Batch(prepared.tokens.to("meta"), prepared.labels.to("meta"), prepared.draws.to("meta"))
    with FlopCounterMode(display=False) as counter:
        twin(batch, torch.ones((), device="meta"))["loss"].backward()
    return counter.get_total_flops()


def training(args: BenchTrainingArgs, device) -> None:
    """The table of TRAINING: a step on all tokens, on the masked ones, and in bf16."""
    peak, table, medians, on_gpu = PeakMemory(device), [], [], is_gpu(device)
    for name, (flags, every_token) in tqdm(TRAINING.items(), desc="training", leave=False):
        if flags.get("compile") and not on_gpu:
            continue
        try:
            state, config = training_state(args.preset, device, {**flags, "batch_size": args.batch_size})
        except ValueError as error:  # the other rows need no compiler
            if not flags.get("compile"):
                raise
            tqdm.write(f"warning: no row {name!r}: {error}", file=sys.stderr)
            continue
        if every_token:
            preparation = state.objective.preparation
            draws = replace(preparation.draws, every_token=True)
            state.objective.preparation = replace(preparation, draws=draws, visits=all_tokens)
        peak.reset()
        for _ in range(WARM_UPS if on_gpu else 1):
            training_seconds(device, state, config)
        first = state.step
        medians.append(statistics.median(training_seconds(device, state, config) for _ in range(args.repeats)))
        memory = peak.read() / 1e9
        flops = statistics.mean(training_flops(state, config, step) for step in range(first, state.step))
        with dist.tf32(True):  # as training does
            peak_rate = matmul_rate(device, dist.DTYPES[flags["dtype"]])
        of_peak = flops / medians[-1] / peak_rate
        times_faster = [short_number(medians[-1]), f"{medians[0] / medians[-1]:.2f}"]
        table.append([name, *times_faster, f"{flops / 1e12:.2f}", f"{of_peak:.0%}", f"{memory:.1f}"])
        table[-1] += gpu_cells(device, state, config, medians[-1]) if on_gpu else []
        del state  # before the next one is made: memory holds one large model
    head = ["", "seconds", "faster by", "TFLOPs", "of peak", "peak memory, GB", *(GPU_COLUMNS if on_gpu else [])]
    print_table(f"Training: {args.preset}, batch {args.batch_size}, seconds a step", head, table)


def is_gpu(device: torch.device) -> bool:
    """Is there a compiled row, and are GPU_COLUMNS filled?"""
    return device.type == "cuda"


def gpu_cells(device, state: TrainState, config: TrainConfig, seconds: float) -> list[str]:
    """The cells of GPU_COLUMNS for a step that takes so many seconds; the profiler watches one more."""
    kernels, busy = device_work(device, lambda: training_seconds(device, state, config))
    return [short_number(config.batch_size / seconds), f"{busy / seconds:.0%}", str(kernels)]


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


def write_trace(args: BenchTrainingArgs, device) -> None:
    """The trace of one epoch of the loop, after another one that warms up, to the file --trace."""
    state, config = training_state(args.preset, device, dict(batch_size=args.batch_size))
    images, labels, indices = random_batch(state.model.config, TRACED_STEPS * args.batch_size)
    loader = DataLoader(
        TensorDataset(images, labels, indices), args.batch_size, num_workers=2, pin_memory=device.type == "cuda"
    )
    Path(args.trace).parent.mkdir(parents=True, exist_ok=True)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    try:
        threads = _ExperimentalConfig(profile_all_threads=True)
    except TypeError:
        threads = _ExperimentalConfig()
        tqdm.write("warning: the trace has no draws ahead, this torch follows the main thread alone", file=sys.stderr)
    with tqdm(total=2 * TRACED_STEPS, desc="tracing", unit="step", leave=False) as progress:
        train_one_epoch(state, loader, 0, config, progress, None)
        with profile(activities=activities, experimental_config=threads) as profiler:
            train_one_epoch(state, loader, 1, config, progress, None)
    with atomic_file(Path(args.trace)) as temporary:
        profiler.export_chrome_trace(str(temporary))
    print(f"{TRACED_STEPS} steps: {args.trace}")


def is_trace(path: Path) -> bool:
    """Does a file begin as a trace does?"""
    with open(path, "rb") as file:
        return b'"schemaVersion"' in file.read(100)


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
    if args.trace is not None:
        if not args.trace.endswith(".json"):
            raise ValueError(f"--trace {args.trace} must end with .json")
        check_output_file("trace", args.trace, is_trace)
        check_output_folder("trace", Path(args.trace).parent)
    if args.dry_run:
        print("\n".join([*TRAINING, *HEAD_COSTS]))
        return 0
    if args.trace is not None:
        write_trace(args, dist.pick_device(args.device))
        return 0
    for name in names:
        SECTIONS[name](args, dist.pick_device(args.device))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
