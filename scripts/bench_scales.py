"""Seconds of sampling scale by scale on this device: with keys and values kept, and with a pass over each prefix.

    python scripts/bench_scales.py                     # VAR-d16, random weights, ten scales, batch 1, not guided

The two take turns, --repeats times, and a ratio is the median of the turns: the machine's speed drifts. Counted in
tokens, the ten scales of 256 pixels have 680 and their prefixes 1,728: 2.5 times is the most. Guidance doubles both.
"""

import statistics
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from heads.policy import build_rules
from models.families import FAMILIES
from models.next_scale import NextScaleConditions
from models.tokenizers.multiscale_quantizer import MultiScaleQuantizer
from models.tokenizers.multiscale_vq import MultiScaleVQConfig
from sampling.loop import generate
from util import dist
from util.args import flag, run_with
from util.door import run_main
from util.timing import print_table, run_seconds


@dataclass(frozen=True)
class BenchScalesArgs:
    """The flags."""

    model: str = flag("var_d16", "size of VAR", choices=FAMILIES["var"].sizes)
    batch_size: int = flag(1, "images sampled together", low=1)
    cfg: float = flag(1.0, "guidance scale, 1 = off", low=0)
    repeats: int = flag(3, "repeats, their median counts", low=1)
    device: str = flag("auto", "auto, cuda, mps, cpu")
    dtype: str = flag("fp32", "arithmetic", choices=dist.FLOATS)
    dry_run: bool = flag(False, "print the resolved configuration and stop")


class WholePrefix(NextScaleConditions):
    """The same conditions without a cache: a pass over all scales so far for each one."""

    def _extend(self, step: int, images, labelled: bool) -> torch.Tensor:
        index = images.to(self.labels.device)
        inputs = self.inputs
        if inputs is None:
            inputs = torch.zeros(len(self.labels), 0, self.model.config.vae_embed_dim, device=index.device)
        z = self.model.outputs(self.labels[index] if labelled else None, inputs[index])
        return z[:, self.starts[step] :]


def parts(args: BenchScalesArgs):
    """(model, tokenizer) with random weights on the device; of the tokenizer there is the quantiser alone."""
    torch.manual_seed(0)
    device, family = dist.pick_device(args.device), FAMILIES["var"]
    model = family.model(family.sizes[args.model]).to(device).eval().requires_grad_(False)
    sizes = model.config
    config = MultiScaleVQConfig(
        vocab_size=sizes.vocab_size, z_channels=sizes.vae_embed_dim, v_patch_nums=sizes.patch_nums
    )
    return model, SimpleNamespace(quantize=MultiScaleQuantizer(config).to(device).requires_grad_(False))


def sample(model, tokenizer, args: BenchScalesArgs, conditions=NextScaleConditions) -> torch.Tensor:
    """Ids (B, L) of a batch, by these conditions."""
    rules = build_rules("baseline", cfg=args.cfg, **model.fixed_rules)
    labels = torch.arange(args.batch_size) % model.config.class_num
    with patch("models.var.NextScaleConditions", conditions):
        with dist.autocast(dist.pick_device(args.device), dist.DTYPES[args.dtype]):
            return generate(model, labels, rules, seeds=range(args.batch_size), tokenizer=tokenizer)


def run(args: BenchScalesArgs) -> int:
    """Time both in turns, print the table; returns the exit code."""
    model, tokenizer = parts(args)
    kinds = {"with the cache": NextScaleConditions, "with a pass over each prefix": WholePrefix}
    calls = [partial(sample, model, tokenizer, args, kind) for kind in kinds.values()]
    turns = [[run_seconds(dist.pick_device(args.device), call) for call in calls] for _ in range(args.repeats)]
    seconds = [f"{statistics.median(column) / args.batch_size:.2f}" for column in zip(*turns)]
    ratios = [whole / kept for kept, whole in turns]
    row = [args.model, *seconds, f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}"]
    title = f"{model.config.seq_len} tokens in {len(model.config.patch_nums)} scales, batch {args.batch_size}"
    print_table(f"{title}, seconds an image", ["", *kinds, "faster by", "lowest to highest"], [row])
    return 0


def main(argv=None) -> int:
    """Parse and run; returns the exit code."""
    return run_with(run, BenchScalesArgs, "bench_scales.py", __doc__.splitlines()[0], argv)


if __name__ == "__main__":
    sys.exit(run_main(main))
