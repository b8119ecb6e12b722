"""What MAR-B in bf16 asks of a GPU: kernels, waits and memory, of sizes that are real and values that are not.

    python -m tests.null_gpu python -m tests.null_gpu.batches

The first batch is eager but for its draws, the second captures its passes, later ones replay. What is compiled is made
by Inductor and Triton as for an H200, and the first batch waits for it.
"""

import gc
import os

os.environ.setdefault("VALUES", "70000")  # those that rules decide with; products are not computed

import torch  # noqa: E402
from torch._dynamo.utils import clear_compilation_metrics, get_compilation_metrics  # noqa: E402

from heads.policy import LEARNABLE, PolicyHeads, build_rules  # noqa: E402
from models.low_precision import prepare  # noqa: E402
from models.mar import MAR, MAR_CONFIGS  # noqa: E402
from sampling.loop import generate  # noqa: E402
from sampling.settings import FAST  # noqa: E402
from scripts.bench_training import random_batch, training_state  # noqa: E402
from tests.null_gpu import counts, emulation  # noqa: E402, F401
from training.step import foresee, training_step  # noqa: E402
from util.timing import PeakMemory, print_table  # noqa: E402

PUBLISHED = dict(solver="ddpm", num_sampling_steps="100", refresh_every=1)
SAMPLING = {  # name: (settings, images, compiled, mode)
    "published settings, batch 64": (PUBLISHED, 64, False, "baseline"),
    "published settings, batch 64, --compile": (PUBLISHED, 64, True, "baseline"),
    "--fast, batch 64": (FAST, 64, False, "baseline"),
    "--fast, batch 64, --compile": (FAST, 64, True, "baseline"),
    "--fast, batch 64, heads in mode both": (FAST, 64, False, "both"),
    "--fast, batch 256": (FAST, 256, False, "baseline"),
}
STEPS = 64


class QuietHeads(PolicyHeads):
    """Heads that are computed and say nothing, since there are no values that they could read."""

    def raw(self, name, state, base_cfg):
        """r = 0, of the shape that it has."""
        return torch.zeros_like(super().raw(name, state, base_cfg))


def sampling(settings: dict, batch_size: int, num_iter: int, compiled: bool = False, mode: str = "baseline") -> list:
    """What each of four batches asks for: see `asked`."""
    with torch.device("meta"):
        model = MAR(MAR_CONFIGS["mar_base"])
    model = model.to_empty(device="cuda").eval()
    prepare(model, torch.bfloat16)
    if compiled:
        model.compile_parts()
    labels, heads = torch.arange(batch_size) % model.config.class_num, QuietHeads(model.width, LEARNABLE, form="knots")
    rules = build_rules(mode, heads.to("cuda"), cfg=2.9)
    options = dict(num_steps=settings["num_sampling_steps"], seeds=range(batch_size))
    options |= {name: settings[name] for name in ("solver", "refresh_every")}

    def batch():
        with torch.autocast("cuda", torch.bfloat16):
            generate(model, labels, rules, num_iter, **options)

    return [asked(batch, empty=i < 3) for i in range(4)]


def training(dtype: str, batch_size: int, compiled: bool = False) -> list[dict]:
    """The same of three training steps."""
    flags = dict(batch_size=batch_size, dtype=dtype, compile=compiled)
    state, config = training_state("mar_base", torch.device("cuda"), flags)
    batch = random_batch(state.model.config, batch_size)

    def step():
        foresee(state, batch[0], batch[2], config.accum_iter)
        training_step(state, *batch, lr=config.lr, config=config)

    return [asked(step, empty=i < 2) for i in range(3)]


def asked(run, empty: bool) -> dict:
    """What a call asks for: `counts`, gigabytes at its peak, programs that it compiles and the seconds of this CPU.

    empty: does PyTorch give back first what it keeps for later? Else the call may need no memory of the driver.
    """
    peak = PeakMemory(torch.device("cuda"))
    gc.collect()  # of an earlier model, whose captures refer to themselves
    if empty:
        peak.reset()
    counts()
    clear_compilation_metrics()
    run()
    gb, seconds = peak.read() / 1e9, [x.duration_us / 1e6 for x in get_compilation_metrics()]
    return counts() | dict(gb=gb, programs=len(seconds), seconds=sum(seconds))


def main() -> None:
    """Print both tables."""
    table, of_all = [], ["peak memory, GB", "programs compiled", "in s on this CPU"]
    for name, (settings, batch_size, compiled, mode) in SAMPLING.items():
        batches = sampling(settings, batch_size, STEPS, compiled, mode)
        last, captures = batches[-1], sum(batch["captures"] for batch in batches)
        per_step = [last["kernels_in_replays"], last["kernels"] + last["copies"], last["waits"]]
        table.append([name, captures, *(f"{x / STEPS:.0f}" for x in per_step), *_of_all(batches)])
    head = ["", "captures", "kernels a step, in replays", "others and copies", "waits", *of_all]
    print_table(f"Sampling: mar_base, {STEPS} steps, cfg 2.9, bf16", head, table)
    table = []
    for dtype, compiled in (("bf16", False), ("bf16", True), ("fp32", False)):
        steps = training(dtype, 64, compiled)
        last, name = steps[-1], dtype + compiled * ", --compile"
        table.append([name, last["kernels"] + last["copies"], last["waits"], *_of_all(steps)])
    print_table("Training: mar_base, batch 64", ["", "kernels and copies", "waits", *of_all], table)


def _of_all(runs: list[dict]) -> list[str]:
    programs, seconds = (sum(run[name] for run in runs) for name in ("programs", "seconds"))
    return [f"{max(run['gb'] for run in runs):.1f}", str(programs or ""), f"{seconds:.0f}" if programs else ""]


if __name__ == "__main__":
    main()
