"""Seconds of sampling ids: a causal model with its cache and without, MAR with cross-entropy, MaskGIL.

    python scripts/bench_ids.py                     # B of LlamaGen, MAR and MaskGIL, random weights, 256 tokens
    python scripts/bench_ids.py --models causal_gpt_tiny --mar mar_tiny --maskgil maskgil_tiny --img_size 64

A ratio is the median of --repeats turns, in which both sides take turns too: the machine's speed drifts. Without the
cache each token needs the whole sequence before it; every STRIDE-th is drawn so, between the others, and stands for its
neighbours. Nothing is guided: guidance doubles all rows but that of what is drawn.
"""

import statistics
import sys
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tqdm import tqdm

from heads.policy import build_rules
from models.families import FAMILIES, SIZES
from models.kv_cache import KeyValueCache
from models.low_precision import prepare
from models.mar_cache import FeatureCache
from models.maskgil import OF_CLASSES, WholePasses
from sampling.loop import generate
from util import dist
from util.args import flag, make_parser
from util.door import run_main
from util.timing import Stopwatch, print_table, run_seconds, short_number

STRIDE = 16
CAUSAL_SIZES = [size for size, family in SIZES.items() if family in ("mar_ar", "causal_gpt")]


@dataclass(frozen=True)
class BenchIdsArgs:
    """The flags."""

    models: str = flag("llamagen_ar_b", "comma list of sizes of the causal families")
    mar: str = flag("mar_base", "size of MAR", choices=FAMILIES["mar"].sizes)
    maskgil: str = flag("maskgil_b", "size of MaskGIL", choices=OF_CLASSES)
    img_size: int = flag(256, "pixels of a side; a token has 16", low=16)
    vocab_size: int = flag(16384, "entries of the codebook", low=2)
    batch_sizes: str = flag("1,4", "comma list of images sampled together")
    num_iter: int = flag(16, "autoregressive steps of MAR and MaskGIL", low=1)
    repeats: int = flag(3, "repeats, their median counts", low=1)
    only: str = flag("causal,mar,maskgil", "comma list of causal, mar, maskgil")
    device: str = flag("auto", "auto, cuda, mps, cpu")
    dtype: str = flag("fp32", "arithmetic", choices=dist.FLOATS)
    dry_run: bool = flag(False, "print the rows and stop")


def build(size: str, args: BenchIdsArgs):
    """A model of ids of this size, with random weights, in eval mode."""
    family = FAMILIES[SIZES[size]]
    changes = dict(vocab_size=args.vocab_size, img_size=args.img_size, vae_stride=16)
    changes |= dict(loss="ce") if "loss" in {field.name for field in fields(family.config)} else {}
    torch.manual_seed(0)
    model = family.model(replace(family.sizes[size], **changes))
    model = model.to(dist.pick_device(args.device)).eval().requires_grad_(False)
    prepare(model, dist.DTYPES[args.dtype])
    return model


def sample(
    model, batch_size: int, args: BenchIdsArgs, num_iter: int | None = None, mode: str = "baseline", callback=None
) -> None:
    """The images of a batch. num_iter None: the model's own; mode: a row of INFER_MODES; callback: see `decode`."""
    rules = build_rules(mode, **model.fixed_rules)
    labels = torch.arange(batch_size) % model.config.class_num
    with dist.autocast(dist.pick_device(args.device), dist.DTYPES[args.dtype]):
        generate(model, labels, rules, num_iter, seeds=range(batch_size), callback=callback)


@torch.no_grad()
def draw_from_prefix(model, batch_size: int, length: int, args: BenchIdsArgs) -> None:
    """One token of each image of a batch, from all of the `length` inputs before it."""
    device, num_tokens = dist.pick_device(args.device), model.config.seq_len
    ids = torch.zeros(batch_size, num_tokens, dtype=torch.long, device=device)
    orders = torch.arange(num_tokens, device=device).expand(batch_size, -1)
    cache = KeyValueCache(batch_size, num_tokens)
    extension = cache.extend(torch.arange(batch_size), torch.full((batch_size,), length), device)
    labels = torch.zeros(batch_size, dtype=torch.long, device=device)
    sampler = model.token_head.sampler()
    with dist.autocast(device, dist.DTYPES[args.dtype]):
        z = model.extend(ids, orders, labels, extension).squeeze(1)
        rows = torch.stack([torch.arange(batch_size), torch.full((batch_size,), length - 1)], dim=1)
        noise = sampler.noise([torch.Generator().manual_seed(i) for i in range(batch_size)], rows, 1)
        sampler.draw(z, None, 1.0, 1.0, noise, 1)


def turn(model, batch_size: int, args: BenchIdsArgs) -> tuple[float, float]:
    """Seconds of a batch with the cache, and without: both are timed token by token, in the same minute."""
    device, length, whole = dist.pick_device(args.device), model.config.seq_len, []
    stride = min(STRIDE, length)

    def draw_again(step, rows, plan, tokens):
        if step % stride == stride // 2:
            whole.append(run_seconds(device, partial(draw_from_prefix, model, batch_size, step + 1, args)))

    total = run_seconds(device, partial(sample, model, batch_size, args, callback=draw_again))
    return total - sum(whole), statistics.mean(whole) * length


def causal(args: BenchIdsArgs) -> None:
    """Each causal model with its cache, and with a pass over the whole prefix for each token."""
    table = []
    for size in args.models.split(","):
        model = build(size, args)
        for batch_size in batches(args):
            progress = tqdm(range(args.repeats), desc=f"{size}, batch {batch_size}", leave=False)
            turns = [turn(model, batch_size, args) for _ in progress]
            table.append([size, batch_size, *seconds_and_ratio(turns, batch_size)])
    head = ["", "batch", "with the cache", "without", "faster by", "lowest to highest"]
    print_table(f"Causal sampling, {num_tokens(args)} tokens, seconds an image", head, table)


def in_steps(family: str, conditions: type, args: BenchIdsArgs) -> None:
    """The model of a family that draws many tokens a step, and the part of its seconds that is its transformer's.

    conditions: what computes its z.
    """
    size, mode = getattr(args, family), FAMILIES[family].sampling.get("infer_mode", "baseline")
    device, model, table = dist.pick_device(args.device), build(size, args), []
    for batch_size in batches(args):
        turns = []
        for _ in tqdm(range(args.repeats), desc=f"{size}, batch {batch_size}", leave=False):
            watch = Stopwatch(device)
            with watch.watch(conditions, "look", "z"), watch.watch(conditions, "at", "z"):
                total = run_seconds(device, partial(sample, model, batch_size, args, args.num_iter, mode))
            turns.append((watch.seconds["z"], total))
        table.append([size, batch_size, *seconds_and_ratio(turns, batch_size)])
    head = ["", "batch", "transformer", "whole", "ratio", "lowest to highest"]
    title = f"{size}, {num_tokens(args)} tokens of {args.vocab_size} entries in {args.num_iter} steps"
    print_table(f"{title}, seconds an image", head, table)


def seconds_and_ratio(turns: list[tuple[float, float]], batch_size: int) -> list[str]:
    """The medians of both seconds, an image, and median, lowest and highest of the second over the first."""
    ratios = [second / first for first, second in turns]
    seconds = [short_number(statistics.median(part) / batch_size) for part in zip(*turns)]
    return [*seconds, f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}"]


def num_tokens(args: BenchIdsArgs) -> int:
    """Tokens of an image."""
    return (args.img_size // 16) ** 2


def batches(args: BenchIdsArgs) -> list[int]:
    """The batch sizes as numbers; others raise ValueError."""
    try:
        sizes = [int(part) for part in args.batch_sizes.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise ValueError(f"--batch_sizes must be whole numbers of at least 1, got {args.batch_sizes!r}")
    return sizes


SECTIONS = {
    "causal": causal,
    "mar": partial(in_steps, "mar", FeatureCache),  # with cross-entropy
    "maskgil": partial(in_steps, "maskgil", WholePasses),
}


def main(argv=None) -> int:
    """Run the sections asked for, print their tables; returns the exit code."""
    args = BenchIdsArgs(**vars(make_parser("bench_ids.py", __doc__.splitlines()[0], BenchIdsArgs).parse_args(argv)))
    names, sizes = args.only.split(","), args.models.split(",")
    for given, valid, flag_name in ((names, list(SECTIONS), "only"), (sizes, CAUSAL_SIZES, "models")):
        for name in given:
            if name not in valid:
                raise ValueError(f"--{flag_name} {name!r} is not one; valid: {', '.join(valid)}")
    batches(args)
    if args.img_size % 16:
        raise ValueError(f"--img_size {args.img_size} must be a multiple of 16, the pixels of a token")
    if args.dry_run:
        print("\n".join(row for name in names for row in (sizes if name == "causal" else [getattr(args, name)])))
        return 0
    for name in names:
        SECTIONS[name](args)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
