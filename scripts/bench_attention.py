"""Kernels for attention under a mask, where this project needs one: seconds, and whether they agree.

    python scripts/bench_attention.py --batch_size 2          # the shapes of MAR-B and VAR-d16 on this device
    python scripts/bench_attention.py --dtype bf16            # batch 64, for a GPU

`whole` is the encoder's pass over images that know different numbers of tokens, `partial` that of a step between whole
passes, few queries and all that is known as keys, `training` VAR's with gradients, each scale before the later ones.
`bool` is the mask of scaled_dot_product_attention, which the models call; `none` leaves it out, to show what it costs.
`cudnn` is cuDNN's kernel under that mask, which the models do not use, since it is built anew for each shape: `first
call` are its seconds, or those of a compiler.
`flex` is torch's flex_attention, compiled, `nested` sequences without padding: making its block mask, or taking padding
out, is not timed, since one serves all blocks. Kernels take turns, and a ratio is the median of the turns. A kernel
that a device lacks has no figures, and the reason goes to stderr.
"""

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from models.families import FAMILIES
from util import dist
from util.args import flag, run_with
from util.door import run_main
from util.timing import print_table, run_seconds, short_number

KNOWN = (0.25, 0.75)  # shares of an image's tokens that are known, from one image of a batch to the last


@dataclass(frozen=True)
class BenchAttentionArgs:
    """The flags."""

    mar: str = flag("mar_base", "size of MAR", choices=FAMILIES["mar"].sizes)
    var: str = flag("var_d16", "size of VAR", choices=FAMILIES["var"].sizes)
    only: str = flag("whole,partial,training", "comma list of whole, partial, training")
    kernels: str = flag("none,bool,cudnn,flex,nested", "comma list of none, bool, cudnn, flex, nested")
    batch_size: int = flag(64, "images in a batch", low=2)
    calls: int = flag(10, "calls of a kernel that are timed together", low=1)
    repeats: int = flag(5, "repeats, their median counts", low=1)
    device: str = flag("auto", "auto, cuda, mps, cpu")
    dtype: str = flag("fp32", "arithmetic", choices=dist.FLOATS)
    dry_run: bool = flag(False, "print the resolved configuration and stop")


@dataclass(frozen=True)
class Place:
    """Attention of `inputs`, queries (B, H, Q, D / H), keys and values (B, H, K, D / H), under a mask.

    mask: bool, (B or 1, 1, Q or 1, K). counted: of which queries (B, Q) bool the result is read.
    """

    inputs: tuple
    mask: torch.Tensor
    counted: torch.Tensor
    gradients: bool = False


def seen_by(args: BenchAttentionArgs, config) -> torch.Tensor:
    """(B, S + L) bool: the buffer and the first tokens of each image, more of each than of the one before."""
    length, device = config.seq_len, dist.pick_device(args.device)
    counts = torch.linspace(KNOWN[0] * length, KNOWN[1] * length, args.batch_size, device=device).long()
    return torch.arange(config.buffer_size + length, device=device) < config.buffer_size + counts[:, None]


def drawn(args: BenchAttentionArgs, heads: int, width: int, *lengths: int) -> tuple:
    """Tensors (B, H, length, D / H), one for each length."""
    device, dtype = dist.pick_device(args.device), dist.DTYPES[args.dtype]
    shapes = [(args.batch_size, heads, length, width // heads) for length in lengths]
    return tuple(torch.randn(shape, device=device, dtype=dtype) for shape in shapes)


def whole(args: BenchAttentionArgs) -> Place:
    """The encoder over buffer and known tokens, as many as the fullest image has."""
    config = FAMILIES["mar"].sizes[args.mar]
    seen = seen_by(args, config)
    seen = seen[:, : int(seen.sum(dim=1).max())]
    inputs = drawn(args, config.encoder_num_heads, config.encoder_embed_dim, *[seen.shape[1]] * 3)
    return Place(inputs, seen[:, None, None], seen)


def partial_pass(args: BenchAttentionArgs) -> Place:
    """The encoder's new tokens, a tenth of all, looking at the buffer and at all known tokens."""
    config = FAMILIES["mar"].sizes[args.mar]
    seen, num_new = seen_by(args, config), max(config.seq_len // 10, 1)
    inputs = drawn(args, config.encoder_num_heads, config.encoder_embed_dim, num_new, *[seen.shape[1]] * 2)
    return Place(inputs, seen[:, None, None], seen.new_ones(len(seen), num_new))


def training(args: BenchAttentionArgs) -> Place:
    """VAR's scales, each of which sees itself and those before it; forward and backward."""
    config, device = FAMILIES["var"].sizes[args.var], dist.pick_device(args.device)
    scale = torch.cat([torch.full((side * side,), i, device=device) for i, side in enumerate(config.patch_nums)])
    inputs = drawn(args, config.num_heads, config.embed_dim, *[len(scale)] * 3)
    counted = scale.new_ones(args.batch_size, len(scale), dtype=torch.bool)
    return Place(inputs, (scale[:, None] >= scale)[None, None], counted, gradients=True)


PLACES = {"whole": whole, "partial": partial_pass, "training": training}


def no_mask(place: Place):
    return F.scaled_dot_product_attention, place.inputs


def bool_mask(place: Place):
    return partial(F.scaled_dot_product_attention, attn_mask=place.mask), place.inputs


def cudnn(place: Place):
    def by_cudnn(*inputs):
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(*inputs, attn_mask=place.mask)

    return by_cudnn, place.inputs


def flex(place: Place):
    query, key, _ = place.inputs
    mask = place.mask.expand(-1, 1, query.shape[2], -1)

    def sees(image, head, query, key):
        return mask[image if len(mask) > 1 else 0, 0, query, key]

    blocks = create_block_mask(sees, len(mask), None, query.shape[2], key.shape[2], device=key.device)
    return partial(compiled_flex(), block_mask=blocks), place.inputs


@cache
def compiled_flex():
    return torch.compile(flex_attention, dynamic=False)


def nested(place: Place):
    if place.mask.shape[2] > 1:
        raise ValueError("the queries of an image see different keys")
    query, key, value = place.inputs
    keys = place.mask[:, 0, 0]
    key_starts = starts(keys)
    query_starts = key_starts if place.counted.equal(keys) else starts(place.counted)  # one structure where it is one
    packed = [(query, place.counted, query_starts), (key, keys, key_starts), (value, keys, key_starts)]
    return F.scaled_dot_product_attention, [
        torch.nested.nested_tensor_from_jagged(x.transpose(1, 2)[kept], offsets).transpose(1, 2)
        for x, kept, offsets in packed
    ]


def starts(kept: torch.Tensor) -> torch.Tensor:
    """Where each sequence begins, (B + 1,), in a row of all that are kept (B, L) bool."""
    return F.pad(kept.sum(dim=1).cumsum(dim=0), (1, 0))


# place -> (function of queries, keys and values, these as it takes them)
KERNELS = {"none": no_mask, "bool": bool_mask, "cudnn": cudnn, "flex": flex, "nested": nested}


def attend(place: Place, function: Callable, inputs) -> torch.Tensor:
    """What a kernel gives, and where the place has gradients those too, which are not kept."""
    if not place.gradients:
        with torch.no_grad():
            return function(*inputs)
    inputs = [x.detach().requires_grad_() for x in inputs]
    result = function(*inputs)
    torch.autograd.grad(result, inputs, torch.ones_like(result))
    return result.detach()


def counted_rows(place: Place, result) -> torch.Tensor:
    """(N, H, D / H) of what a kernel gave, those that are read."""
    rows = result.transpose(1, 2)
    return rows.values() if result.is_nested else rows[place.counted]


def usable(place: Place, names: list[str], device) -> tuple[dict[str, tuple], dict[str, float]]:
    """({name: (function, inputs)} of the kernels that run here, seconds of their first calls).

    A line to stderr about each other one.
    """
    kernels, first = {}, {}
    for name in names:
        try:
            kernel = KERNELS[name](place)
            first[name] = run_seconds(device, partial(attend, place, *kernel))
        except Exception as error:  # a compiler's or a kernel's own, of many types
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            print(f"{name} does not run: {reason}", file=sys.stderr)
        else:
            kernels[name] = kernel
    return kernels, first


def measure(args: BenchAttentionArgs, place: Place) -> list[list]:
    """A row of each kernel asked for."""
    device, names = dist.pick_device(args.device), args.kernels.split(",")
    kernels, first = usable(place, names, device)

    def seconds(kernel) -> float:
        return run_seconds(device, lambda: [attend(place, *kernel) for _ in range(args.calls)]) / args.calls

    turns = [{name: seconds(kernel) for name, kernel in kernels.items()} for _ in range(args.repeats)]
    wanted = counted_rows(place, attend(place, *bool_mask(place)))
    rows = [[name, "", "", "", ""] for name in names]
    for row in rows:
        name = row[0]
        if name in kernels:
            row[1] = short_number(statistics.median(turn[name] for turn in turns))
            if "bool" in kernels:
                row[2] = short_number(statistics.median(turn["bool"] / turn[name] for turn in turns))
            apart = counted_rows(place, attend(place, *kernels[name])) - wanted
            row[3:] = [f"{apart.abs().max().item():.1e}", short_number(first[name])]
    return rows


def run(args: BenchAttentionArgs) -> int:
    """A table of each place; returns the exit code."""
    for name in args.only.split(","):
        torch.manual_seed(0)
        place = PLACES[name](args)
        query, key, _ = place.inputs
        sizes = f"{len(query)} images, {query.shape[1]} heads, {query.shape[2]} queries, {key.shape[2]} keys"
        head = ["", "seconds", "times as fast as bool", "largest difference", "first call"]
        print_table(f"{name}: {sizes}, {args.dtype}", head, measure(args, place))
    return 0


def check(args: BenchAttentionArgs) -> None:
    """Raise ValueError for a place or a kernel that there is none of."""
    for name, table in (("only", PLACES), ("kernels", KERNELS)):
        for word in getattr(args, name).split(","):
            if word not in table:
                raise ValueError(f"--{name} {word!r} is not known; valid: {', '.join(table)}")


def main(argv=None) -> int:
    """Parse and run; returns the exit code."""
    return run_with(run, BenchAttentionArgs, "bench_attention.py", __doc__.splitlines()[0], argv, check)


if __name__ == "__main__":
    sys.exit(run_main(main))
