"""Speed on this device: sampling, with published settings in float32 and with each lever added in turn; and training.

    python scripts/bench.py                 # MAR-B, random weights, batch 8, 16 steps: under 20 minutes on 2 CPU cores
    python scripts/bench.py --quick         # batch 1, 8 steps, one repeat, nothing compiled: under 3 minutes

Seconds are medians of up to --repeats runs (none starts after ROW_SECONDS), ratios compare rows of this run. FLOPs are
counted on the meta device; "of peak" is their rate as a share of that of large matrix products of the same dtype, timed
in the same run. On a CPU 100 diffusion steps are timed as 5 and multiplied: every step is the same work; and a row that
differs from an earlier one in diffusion settings only has its transformer's seconds and does not run it. On a GPU every
row is run whole, after two runs that capture CUDA graphs, and has GPU_COLUMNS as well: the share of the time in
which a kernel runs, kernels an autoregressive step, and what these two took more than the later ones. The tables of
training, of ids and of scales are those of bench_training.py, bench_ids.py and bench_scales.py.

    python scripts/bench.py --only sampling,training --batch_size 64 --num_iter 64 --train_batch_size 64  # GPU; and 256
"""

import json
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from diffusion.schedule import step_range
from heads.policy import PolicyHeads, build_rules
from models.diffusion_sampler import DiffusionSampler
from models.low_precision import fast_dtype, is_exact, prepared
from models.mar import MAR
from models.mar_cache import FeatureCache
from sampling.loop import generate
from sampling.settings import FAST
from training.config import resolve
from training.presets import PRESETS
from util import dist
from util.args import flag, make_parser
from util.door import run_main
from util.graphs import release
from util.timing import PeakMemory, Stopwatch, device_work, matmul_rate, print_table, run_seconds, short_number

TIMED_STEPS = 5  # diffusion steps that stand for a constant number above 20
ROW_SECONDS = 45
QUICK = dict(batch_size=1, train_batch_size=1, num_iter=8, repeats=1, only="sampling,training")
PUBLISHED = dict(dtype="fp32", mode="baseline", solver="ddpm", num_sampling_steps="100", refresh_every=1, compile=False)
FEW = dict(solver=FAST["solver"], num_sampling_steps=str(step_range(FAST["num_sampling_steps"])[0]))
# name: the settings that differ from the row above; dtype None is that of --fast on this machine
SAMPLING = {
    "published settings, fp32": {},
    "the same, bf16": dict(dtype="bf16"),
    "the same, int8": dict(dtype="int8"),
    f"fp32, solver {FEW['solver']}, {FEW['num_sampling_steps']} steps": {**FEW, "dtype": "fp32"},
    f"+ annealing, {FAST['num_sampling_steps']} steps": dict(num_sampling_steps=FAST["num_sampling_steps"]),
    f"+ feature cache, a whole pass in {FAST['refresh_every']}": dict(refresh_every=FAST["refresh_every"]),
    "+ the fastest dtype: --fast": dict(dtype=None),
    "--fast, heads in mode both": dict(mode="both"),
    "--fast, --compile": dict(mode="baseline", compile=True),
}
ON_GPUS = {"published settings, bf16, --compile": PUBLISHED | dict(dtype="bf16", compile=True)}  # too slow on a CPU

GPU_COLUMNS = ["images/s", "busy", "kernels a step", "first two runs, s more"]


@dataclass(frozen=True)
class BenchArgs:
    """The flags."""

    preset: str = flag("mar_base", "model and settings", choices=PRESETS)
    batch_size: int = flag(8, "images sampled together", low=1)
    train_batch_size: int = flag(4, "images a training step", low=1)
    num_iter: int = flag(16, "autoregressive steps", low=1)
    cfg: float = flag(2.9, "guidance scale, linear schedule", low=0)
    repeats: int = flag(3, "repeats, their median counts", low=1)
    only: str = flag("sampling,training,scaling", "comma list of sampling, training, ids, scales, scaling, fast")
    quick: bool = flag(False, "batch 1, 8 steps, one repeat, nothing compiled, no scaling")
    device: str = flag("auto", "auto, cuda, mps, cpu")
    dry_run: bool = flag(False, "print the rows and stop")


@contextmanager
def without_transformer(num_images: int, config, device):
    """In this context FeatureCache returns zeros for z instead of running the transformer."""
    zeros = torch.zeros(num_images, config.seq_len, config.decoder_embed_dim, device=device)
    flat = zeros.flatten(0, 1)

    def look(cache, step, tokens, unknown, images):
        return zeros[: len(images)], None

    def at(cache, step, tokens, unknown, rows, guided):
        return flat[: len(rows)], flat[: len(guided)] if len(guided) else None

    with patch.object(FeatureCache, "look", look), patch.object(FeatureCache, "at", at):
        yield


class Bench:
    """A model with random weights, its twin for FLOPs, and the rate and memory of the device."""

    def __init__(self, args: BenchArgs):
        self.args, self.device = args, dist.pick_device(args.device)
        self.config = resolve({"preset": args.preset}).model.build()
        self.peak = PeakMemory(self.device)
        self.forget()

    @property
    def has_int8(self) -> bool:
        """Can this device sample in int8?"""
        return self.device.type == "cpu" and is_exact()

    @property
    def on_gpu(self) -> bool:
        """Are rows run whole, and GPU_COLUMNS filled?"""
        return self.device.type == "cuda"

    @cached_property
    def fast(self) -> dict:
        """The settings of --fast."""
        return {**PUBLISHED, **FAST, "dtype": fast_dtype(self.device, self.config.decoder_embed_dim)}

    def build(self) -> None:
        """Make the model and its twin on the meta device."""
        torch.manual_seed(0)
        self.mar = MAR(self.config).to(self.device).eval()
        self.heads = PolicyHeads(self.config.decoder_embed_dim).to(self.device).eval()
        for head in self.heads.heads.values():  # so that images differ in how many tokens they draw
            torch.nn.init.normal_(head.out.weight, std=0.02)
        self.meta = MAR(self.config).to("meta").eval()

    def forget(self) -> None:
        """Free the models' memory."""
        self.mar = self.narrow = self.meta = None

    def model(self, dtype: str) -> MAR:
        """The model to sample in this dtype, which shares its parameters with that of float32; one other is kept."""
        if self.mar is None:
            self.build()
        if dtype == "fp32":
            return self.mar
        if self.narrow is None or self.narrow[0] != dtype:
            self.narrow = dtype, prepared(self.mar, dist.DTYPES[dtype])
        return self.narrow[1]

    def sample(self, row: dict, batch_size=None, num_iter=None, stub=False) -> tuple[dict, list]:
        """({transformer, diffusion, total}: seconds of a batch, [(rows, which of them are guided, T) of each step]).

        stub: the transformer is not run.
        """
        mar = self.model(row["dtype"])
        batch_size, num_steps = batch_size or self.args.batch_size, row["num_sampling_steps"]
        shortened = not self.on_gpu and ":" not in num_steps and int(num_steps) > 4 * TIMED_STEPS
        rules = build_rules(row["mode"], self.heads, cfg=self.args.cfg)
        watch, steps = Stopwatch(self.device), []

        def record(step, rows, plan, tokens):
            steps.append((rows, plan))  # looked at later: a GPU would be waited for

        with ExitStack() as stack:
            stack.enter_context(dist.autocast(self.device, dist.DTYPES[row["dtype"]]))
            stack.enter_context(without_transformer(batch_size, self.config, self.device) if stub else nullcontext())
            stack.enter_context(watch.watch(FeatureCache, "look", "transformer"))
            stack.enter_context(watch.watch(FeatureCache, "at", "transformer"))
            stack.enter_context(watch.watch(DiffusionSampler, "draw", "diffusion"))
            began = watch.now()
            generate(
                mar,
                torch.arange(batch_size) % self.config.class_num,
                rules,
                num_iter or self.args.num_iter,
                TIMED_STEPS if shortened else num_steps,
                seeds=range(batch_size),
                solver=row["solver"],
                refresh_every=row["refresh_every"],
                callback=record,
            )
            total = watch.now() - began
        seconds = {**watch.seconds, "total": total}
        if shortened:
            left_out = seconds["diffusion"] * (int(num_steps) / TIMED_STEPS - 1)
            seconds = {**seconds, "diffusion": seconds["diffusion"] + left_out, "total": total + left_out}
        guided = [(plan.cfg != 1).expand_as(plan.select)[plan.select].nonzero().squeeze(1).cpu() for _, plan in steps]
        many = [num_steps if shortened else plan.num_steps for _, plan in steps]
        return seconds, [(rows, *rest) for (rows, _), *rest in zip(steps, guided, many)]

    def sampling_flops(self, steps: list, refresh_every: int) -> dict:
        """FLOPs of {transformer, diffusion} for a batch, counted on the twin with tensors of the same shapes."""
        size, length = self.args.batch_size, self.config.seq_len
        tokens = torch.zeros(size, length, self.config.token_dim, device="meta")
        unknown, flops = torch.ones(size, length, dtype=torch.bool), {}
        labels = torch.zeros(size, dtype=torch.long, device="meta")
        features = FeatureCache(self.meta, labels, refresh_every)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            for step, (rows, guided, _) in enumerate(steps):
                features.look(step, tokens, unknown, rows[:, 0].unique())
                features.at(step, tokens, unknown, rows, guided)
                unknown[rows[:, 0], rows[:, 1]] = False
        flops["transformer"] = counter.get_total_flops()
        flops["diffusion"] = 0
        for rows, guided, num_steps in steps:
            one, two = (self._diffusion_flops(len(rows), guided, few) for few in (1, 2))
            flops["diffusion"] += one + (int(num_steps) - 1) * (two - one)
        return flops

    def _diffusion_flops(self, num_rows: int, guided, num_steps: int) -> int:
        z = torch.zeros(num_rows, self.config.decoder_embed_dim, device="meta")
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            if len(guided):
                self.meta.diffloss.sample(z, z[: len(guided)], cfg=2.0, num_steps=num_steps, guided=guided.to("meta"))
            else:
                self.meta.diffloss.sample(z, num_steps=num_steps)
        return counter.get_total_flops()


def sampling(bench: Bench) -> None:
    """The levers of sampling, one added after the other."""
    args, settings, table, transformers, totals = bench.args, PUBLISHED, [], {}, []
    rows = SAMPLING | (ON_GPUS if bench.on_gpu else {})
    for name, change in tqdm(rows.items(), desc="sampling", leave=False):
        settings = {**settings, **change}
        settings["dtype"] = settings["dtype"] or bench.fast["dtype"]
        if (settings["dtype"] == "int8" and not bench.has_int8) or (settings["compile"] and args.quick):
            continue
        # all settings that the transformer's seconds depend on
        passes = tuple(settings[k] for k in ("dtype", "mode", "refresh_every", "compile"))
        stub = passes in transformers and not bench.on_gpu
        if settings["compile"]:
            try:
                bench.model(settings["dtype"]).compile_parts()
            except ValueError as error:  # the other rows need no compiler
                tqdm.write(f"warning: no row {name!r}: {error}", file=sys.stderr)
                continue
        warm_ups, runs = timed_runs(bench, settings, stub)
        seconds = {k: statistics.median(run[k] for run, _ in runs) for k in runs[0][0]}
        memory = "=" if stub else f"{bench.peak.read() / 1e9:.1f}"
        if stub:
            seconds["transformer"], all_but_diffusion = transformers[passes]
            seconds["total"] = all_but_diffusion + seconds["diffusion"]
        transformers[passes] = seconds["transformer"], seconds["total"] - seconds["diffusion"]
        flops = bench.sampling_flops(runs[0][1], settings["refresh_every"])
        totals.append(seconds["total"])
        if name.endswith("--fast"):
            name += f" ({settings['dtype']})"
        if "both" in name:
            name += f" ({totals[-1] / totals[-2] - 1:+.1%})"
        per_image = [short_number(seconds[k] / args.batch_size) for k in ("total", "transformer", "diffusion")]
        peak = matmul_rate(bench.device, dist.DTYPES[settings["dtype"]])
        of_peak = [f"{flops[k] / seconds[k] / peak:.0%}" for k in ("transformer", "diffusion")]
        work = f"{sum(flops.values()) / args.batch_size / 1e12:.2f}"
        row = [name, *per_image, f"{totals[0] / totals[-1]:.2f}", work, *of_peak, memory, len(runs)]
        table.append(row + (gpu_cells(bench, settings, seconds["total"], warm_ups) if bench.on_gpu else []))
    bench.forget()  # the compiled model
    head = ["", "seconds", "transformer", "diffusion", "faster by", "TFLOPs", "transformer, of peak"]
    head += ["diffusion, of peak", "peak memory, GB", "runs", *(GPU_COLUMNS if bench.on_gpu else [])]
    sizes = f"{args.num_iter} steps, batch {args.batch_size}, cfg {args.cfg:g}"
    print_table(f"Sampling: {args.preset}, {sizes}, seconds an image", head, table)


def timed_runs(bench: Bench, settings: dict, stub: bool) -> tuple[list[float], list]:
    """([seconds of each run before], [what `Bench.sample` gives] of up to --repeats runs after these).

    With --compile one run is made before. On a GPU two: the first captures what draws tokens, the second what comes
    again of the transformer's passes.
    """
    num_before = 2 if bench.on_gpu else int(settings["compile"])
    if bench.on_gpu:  # where captures of other rows would count
        release(bench.model(settings["dtype"]))
        bench.peak.reset()
    warm_ups = [run_seconds(bench.device, lambda: bench.sample(settings)) for _ in range(num_before)]
    if not bench.on_gpu:
        bench.peak.reset()
    runs, began = [], time.perf_counter()
    while len(runs) < bench.args.repeats and time.perf_counter() - began < ROW_SECONDS:
        runs.append(bench.sample(settings, stub=stub))
    return warm_ups, runs


def gpu_cells(bench: Bench, settings: dict, total: float, warm_ups: list[float]) -> list[str]:
    """The cells of GPU_COLUMNS for a row that takes `total` seconds a batch; the profiler watches one more run."""
    kernels, busy = device_work(bench.device, lambda: bench.sample(settings))
    images, more = short_number(bench.args.batch_size / total), sum(warm_ups) - len(warm_ups) * total
    return [images, f"{busy / total:.0%}", f"{kernels / bench.args.num_iter:.0f}", f"{more:.1f}"]


def of_program(program: str, **names: str):
    """A section: the tables of another program of this folder, in a process of its own once the models here are gone.

    names: {a flag of it: of ours}. If it fails the section raises ValueError.
    """

    def section(bench: Bench) -> None:
        bench.forget()
        flags = dict(repeats="repeats", device="device") | names
        command = [sys.executable, str(Path(__file__).with_name(program))]
        done = subprocess.run([*command, *(f"--{name}={getattr(bench.args, ours)}" for name, ours in flags.items())])
        if done.returncode:
            raise ValueError(f"{program} ended with code {done.returncode}")

    return section


def scaling(bench: Bench) -> None:
    """--fast at other batch sizes and numbers of steps, and in two processes, which on GPUs need two; once each."""
    args, table = bench.args, []
    points = [(b, args.num_iter) for b in (1, 2, 4, 8, 16, 32)] + [(2, k) for k in (8, 32, 64)]
    for batch_size, num_iter in tqdm(points, desc="scaling", leave=False):
        for _ in range(3 if bench.on_gpu else 1):
            seconds = bench.sample(bench.fast, batch_size, num_iter)[0]["total"]
        table.append([batch_size, num_iter, 1, short_number(seconds / batch_size)])
    bench.forget()
    if not bench.on_gpu or torch.cuda.device_count() > 1:
        table.append([f"{args.batch_size} each", args.num_iter, 2, short_number(in_two_processes(args))])
    title = f"--fast: {args.preset}, cfg {args.cfg:g}, seconds an image, one run each"
    print_table(title, ["batch", "steps", "processes", "seconds"], table)


def in_two_processes(args: BenchArgs) -> float:
    """Seconds an image of --fast in two processes, the slower one's."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
    flags = {name: getattr(args, name) for name in ("device", "preset", "batch_size", "num_iter", "cfg")}
    command += ["--only=fast", *(f"--{name}={value}" for name, value in flags.items())]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("error:")] or ["see --only fast"]
        raise ValueError(f"the run in two processes ended with code {done.returncode}: {errors[0]}")
    seconds = max(json.loads(line)["total"] for line in done.stdout.splitlines() if line.startswith("{"))
    return seconds / args.batch_size / 2


def fast(bench: Bench) -> None:
    """--fast alone, as a line of JSON; `scaling` starts two processes that do this."""
    for _ in range(2 if bench.on_gpu else 1):  # on a GPU what is timed, since all of it is captured
        bench.sample(bench.fast, *(() if bench.on_gpu else (1, 1)))
    dist.barrier()
    seconds, _ = bench.sample(bench.fast)
    print(json.dumps({**seconds, "rank": dist.rank()}), flush=True)


SECTIONS = {
    **{section.__name__: section for section in (sampling, scaling, fast)},
    "training": of_program("bench_training.py", preset="preset", batch_size="train_batch_size"),
    **{name: of_program(f"bench_{name}.py") for name in ("ids", "scales")},
}


def main(argv=None) -> int:
    """Run the sections asked for, print their tables; returns the exit code."""
    given = vars(make_parser("bench.py", __doc__.splitlines()[0], BenchArgs).parse_args(argv))
    args = BenchArgs(**(QUICK if given.get("quick") else {}) | given)
    names = args.only.split(",")
    for name in names:
        if name not in SECTIONS:
            raise ValueError(f"--only {name!r} is not a section; valid: {', '.join(SECTIONS)}")
    if args.dry_run:
        print("\n".join([*SAMPLING, *(f"{name} (on GPUs)" for name in ON_GPUS)]))
        return 0
    try:
        dist.init(dist.pick_device(args.device))
        bench = Bench(args)
        if "fast" not in names:
            dtypes = ("fp32", "bf16", "int8") if bench.has_int8 else ("fp32", "bf16")
            rates = ", ".join(
                f"{matmul_rate(bench.device, dist.DTYPES[dtype]) / 1e9:.0f} GFLOP/s in {dtype}" for dtype in dtypes
            )
            print(f"{bench.device.type}, {torch.get_num_threads()} threads; large matrix products: {rates}")
        for name in names:
            SECTIONS[name](bench)
    finally:
        dist.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
