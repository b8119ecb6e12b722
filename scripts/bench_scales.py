"""Sampling scale by scale on this device, with keys and values kept and without; seconds and memory of training.

    python scripts/bench_scales.py                     # VAR-d16, random weights, ten scales, batch 1, not guided
    python scripts/bench_scales.py --only training --batch_size 4

Without them each scale has a pass over all scales up to it. The two ways of sampling take turns, --repeats times, and a
ratio is the median of the turns: the machine's speed drifts. Counted in tokens, the ten scales of 256 pixels have 680
and their prefixes 1,728: 2.5 times is the most. Guidance doubles both.
A training step reads ids, as from a cache: of the tokenizer only the quantiser runs. The first step, which makes the
optimizer's moments, is not timed. The peak memory, allocated on a GPU or resident in the process, is that of all steps.
"""

import statistics
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from heads.policy import build_rules
from models.families import FAMILIES
from models.low_precision import prepare
from models.next_scale import NextScaleConditions
from models.tokenizers.multiscale import MultiScaleTokenizer
from models.tokenizers.multiscale_vq import MultiScaleVQ, MultiScaleVQConfig
from sampling.loop import generate
from training.build import new_state
from training.config import TrainConfig, resolve
from training.objectives import OBJECTIVES
from training.presets import PRESETS
from training.state import TrainState
from training.step import training_step
from util import dist
from util.args import flag, run_with
from util.door import run_main
from util.timing import PeakMemory, print_table, run_seconds, short_number


@dataclass(frozen=True)
class BenchScalesArgs:
    """The flags."""

    model: str = flag("var_d16", "size of VAR", choices=FAMILIES["var"].sizes)
    only: str = flag("sampling", "comma list of sampling, training")
    batch_size: int = flag(1, "images sampled together, or of a training step", low=1)
    cfg: float = flag(1.0, "guidance scale, 1 = off", low=0)
    repeats: int = flag(3, "repeats, their median counts", low=1)
    device: str = flag("auto", "auto, cuda, mps, cpu")
    dtype: str = flag("fp32", "arithmetic", choices=dist.FLOATS)
    grad_checkpointing: bool = flag(False, "recompute activations in the backward pass of training")
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
    """(model, tokenizer) with random weights on the device; of the tokenizer only the quantiser has its full size."""
    torch.manual_seed(0)
    device, family = dist.pick_device(args.device), FAMILIES["var"]
    model = family.model(family.sizes[args.model]).to(device).eval()
    sizes = model.config
    config = MultiScaleVQConfig(
        vocab_size=sizes.vocab_size, z_channels=sizes.vae_embed_dim, v_patch_nums=sizes.patch_nums, ch=32
    )
    return model, MultiScaleTokenizer("var_vq", MultiScaleVQ(config)).to(device)


def sample(model, tokenizer, args: BenchScalesArgs, conditions=NextScaleConditions) -> torch.Tensor:
    """Ids (B, L) of a batch, by these conditions."""
    rules = build_rules("baseline", cfg=args.cfg, **model.fixed_rules)
    labels = torch.arange(args.batch_size) % model.config.class_num
    with patch("models.var.NextScaleConditions", conditions):
        with dist.autocast(dist.pick_device(args.device), dist.DTYPES[args.dtype]):
            return generate(model, labels, rules, seeds=range(args.batch_size), tokenizer=tokenizer)


def sampling(args: BenchScalesArgs) -> None:
    """The table of both ways of sampling, timed in turns."""
    model, tokenizer = parts(args)
    prepare(model, dist.DTYPES[args.dtype])
    kinds = {"with the cache": NextScaleConditions, "with a pass over each prefix": WholePrefix}
    calls = [partial(sample, model, tokenizer, args, kind) for kind in kinds.values()]
    turns = [[run_seconds(dist.pick_device(args.device), call) for call in calls] for _ in range(args.repeats)]
    seconds = [short_number(statistics.median(column) / args.batch_size) for column in zip(*turns)]
    ratios = [whole / kept for kept, whole in turns]
    row = [args.model, *seconds, f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}"]
    title = f"{model.config.seq_len} tokens in {len(model.config.patch_nums)} scales, batch {args.batch_size}"
    print_table(f"{title}, seconds an image", ["", *kinds, "faster by", "lowest to highest"], [row])


def training_state(args: BenchScalesArgs) -> tuple[TrainState, TrainConfig]:
    """A state that trains with the settings of the model's preset."""
    preset = next(name for name, row in PRESETS.items() if row["model"] == args.model)
    config = resolve({"preset": preset, "batch_size": args.batch_size, "dtype": args.dtype})
    model, tokenizer = parts(args)
    model.config = replace(model.config, grad_checkpointing=args.grad_checkpointing)
    objective = OBJECTIVES[config.train.objective].build(model, None, config.for_objective(flip=False))
    state = new_state(objective, tokenizer, config.train, dist.DTYPES[args.dtype])
    state.wrapped.train()
    return state, config.train


def training(args: BenchScalesArgs) -> None:
    """The table of a training step: its seconds and the peak memory."""
    device = dist.pick_device(args.device)
    peak = PeakMemory(device)
    peak.reset()
    state, config = training_state(args)
    sizes = state.model.config
    ids = torch.randint(sizes.vocab_size, (args.batch_size, 2, sizes.seq_len))  # twice, as a cache has mirror images
    rest = torch.arange(args.batch_size) % sizes.class_num, torch.arange(args.batch_size)
    step = partial(training_step, state, ids, *rest, config.lr, config)
    seconds = [run_seconds(device, step) for _ in range(args.repeats + 1)][1:]
    row = [args.model, short_number(statistics.median(seconds)), f"{peak.read() / 1e9:.1f}"]
    recomputed = ", activations recomputed" if args.grad_checkpointing else ""
    title = f"Training: batch {args.batch_size}, {args.dtype}{recomputed}"
    print_table(title, ["", "seconds a step", "peak memory, GB"], [row])


SECTIONS = {"sampling": sampling, "training": training}


def check(args: BenchScalesArgs) -> None:
    """Raise ValueError for a section that there is none of."""
    for name in args.only.split(","):
        if name not in SECTIONS:
            raise ValueError(f"--only {name!r} is not a section; valid: {', '.join(SECTIONS)}")


def run(args: BenchScalesArgs) -> int:
    """Run the sections asked for; returns the exit code."""
    for name in args.only.split(","):
        SECTIONS[name](args)
    return 0


def main(argv=None) -> int:
    """Parse and run; returns the exit code."""
    return run_with(run, BenchScalesArgs, "bench_scales.py", __doc__.splitlines()[0], argv, check)


if __name__ == "__main__":
    sys.exit(run_main(main))
