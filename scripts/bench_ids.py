"""Seconds an image of models of ids, sampled with their family's own rules and random weights, in each dtype.

    python scripts/bench_ids.py --models maskgil_b,llamagen_ar_b --batch_size 4

Seconds are medians of --repeats runs after one that warms up. A model that draws one token a step takes as many steps
as an image has tokens, another one --num_iter, by default those of its family.
"""

import statistics
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

import torch
from tqdm import tqdm

from models.families import FAMILIES, SIZES
from sampling.loop import generate
from sampling.settings import SampleConfig
from util import dist
from util.args import flag, run_with
from util.door import run_main
from util.timing import PeakMemory, Stopwatch, print_table

MODELS = [name for name, family in SIZES.items() if FAMILIES[family].tokens == ("discrete",)]


@dataclass(frozen=True)
class BenchIdsArgs:
    """The flags."""

    models: str = flag("maskgil_b", "comma list of models of ids")
    dtypes: str = flag("fp32,bf16", "comma list of fp32, bf16")
    batch_size: int = flag(4, "images sampled together", low=1)
    num_iter: int | None = flag(None, "autoregressive steps (default: the family's)", low=1)
    cfg: float = flag(4.0, "guidance scale", low=0)
    repeats: int = flag(3, "repeats, their median counts", low=1)
    device: str = flag("auto", "auto, cuda, mps, cpu")
    dry_run: bool = flag(False, "print the resolved configuration and stop")


def settings_of(name: str, args: BenchIdsArgs) -> SampleConfig:
    """How images of this model are sampled."""
    family = FAMILIES[SIZES[name]]
    sampling = replace(SampleConfig(**family.sampling).fitted(family.model.fixed_rules, name), cfg=args.cfg)
    steps = family.sizes[name].seq_len if sampling.group == "one" else args.num_iter or sampling.num_iter
    return replace(sampling, num_iter=steps)


def row_of(model, sampling: SampleConfig, dtype: str, args: BenchIdsArgs, device) -> list[str]:
    """The cells of a row: dtype, steps, seconds an image, passes of the transformer an image, peak memory."""
    labels, seeds = torch.arange(args.batch_size) % model.config.class_num, range(args.batch_size)
    watch, peak, seconds = Stopwatch(device), PeakMemory(device), []
    peak.reset()
    with dist.autocast(device, dist.DTYPES[dtype]):
        for _ in range(args.repeats + 1):
            evals, began = Counter(), watch.now()
            generate(model, labels, sampling.rules(), sampling.num_iter, seeds=seeds, evals=evals)
            seconds.append(watch.now() - began)
    time = statistics.median(seconds[1:]) / args.batch_size
    passes = evals["mar"] / args.batch_size
    return [dtype, str(sampling.num_iter), f"{time:.3g}", f"{passes:g}", f"{peak.read() / 1e9:.1f}"]


def check(args: BenchIdsArgs) -> None:
    """Raise ValueError for names that are none."""
    for flag_name, given, valid in (("models", args.models, MODELS), ("dtypes", args.dtypes, ("fp32", "bf16"))):
        for name in given.split(","):
            if name not in valid:
                raise ValueError(f"--{flag_name}: unknown {name!r}; valid: {', '.join(valid)}")


def run(args: BenchIdsArgs) -> int:
    """Time all models in all dtypes, print the table."""
    device, rows = dist.pick_device(args.device), []
    for name in tqdm(args.models.split(","), desc="models", leave=False):
        family = FAMILIES[SIZES[name]]
        torch.manual_seed(0)
        model = family.model(family.sizes[name]).to(device).eval().requires_grad_(False)
        rows += [
            [name, *row_of(model, settings_of(name, args), dtype, args, device)] for dtype in args.dtypes.split(",")
        ]
        del model  # before the next one is made
    head = ["model", "dtype", "steps", "seconds an image", "passes an image", "peak memory, GB"]
    title = f"Sampling ids: batch {args.batch_size}, cfg {args.cfg:g}, {device.type}, {torch.get_num_threads()} threads"
    print_table(title, head, rows)
    return 0


def main(argv=None) -> int:
    """Parse, time, print; returns the exit code."""
    return run_with(run, BenchIdsArgs, "bench_ids.py", __doc__.splitlines()[0], argv, check)


if __name__ == "__main__":
    sys.exit(run_main(main))
