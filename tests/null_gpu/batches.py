"""What MAR-B in bf16 asks of a GPU: kernels, waits and memory, of sizes that are real and values that are not.

    python -m tests.null_gpu python -m tests.null_gpu.batches

The first batch is eager but for its draws, the second captures its passes, later ones replay.
"""

import gc
import os

os.environ.setdefault("VALUES", "70000")  # those that rules decide with; products are not computed

import torch  # noqa: E402

from heads.policy import build_rules  # noqa: E402
from models.low_precision import prepare  # noqa: E402
from models.mar import MAR, MAR_CONFIGS  # noqa: E402
from sampling.loop import generate  # noqa: E402
from sampling.settings import FAST  # noqa: E402
from scripts.bench_training import random_batch, training_state  # noqa: E402
from tests.null_gpu import counts, emulation  # noqa: E402, F401
from training.step import foresee, training_step  # noqa: E402
from util.timing import print_table  # noqa: E402

PUBLISHED = dict(solver="ddpm", num_sampling_steps="100", refresh_every=1)
SAMPLING = {  # name: (settings, images)
    "published settings, batch 64": (PUBLISHED, 64),
    "--fast, batch 64": (FAST, 64),
    "--fast, batch 256": (FAST, 256),
}
STEPS = 64


def sampling(settings: dict, batch_size: int, num_iter: int, num_batches: int = 4) -> list[dict]:
    """What each of some batches asks for: `counts`, and gigabytes at its peak."""
    with torch.device("meta"):
        model = MAR(MAR_CONFIGS["mar_base"])
    model = model.to_empty(device="cuda").eval()
    prepare(model, torch.bfloat16)
    labels, rules = torch.arange(batch_size) % model.config.class_num, build_rules("baseline", cfg=2.9)
    options = dict(num_steps=settings["num_sampling_steps"], seeds=range(batch_size))
    options |= {name: settings[name] for name in ("solver", "refresh_every")}

    def batch():
        with torch.autocast("cuda", torch.bfloat16):
            generate(model, labels, rules, num_iter, **options)

    return [asked(batch) for _ in range(num_batches)]


def training(dtype: str, batch_size: int) -> list[dict]:
    """The same of three training steps."""
    device = torch.device("cuda")
    state, config = training_state("mar_base", device, dict(batch_size=batch_size, dtype=dtype))
    batch = random_batch(state.model.config, batch_size)

    def step():
        foresee(state, batch[0], batch[2], config.accum_iter)
        training_step(state, *batch, lr=config.lr, config=config)

    return [asked(step) for _ in range(3)]


def asked(run) -> dict:
    gc.collect()  # of an earlier model, whose captures refer to themselves
    counts()
    torch.cuda.reset_peak_memory_stats()
    run()
    return counts() | dict(gb=torch.cuda.max_memory_allocated() / 1e9)


def main() -> None:
    """Print both tables."""
    table = []
    for name, (settings, batch_size) in SAMPLING.items():
        batches = sampling(settings, batch_size, STEPS)
        last, captures = batches[-1], sum(batch["captures"] for batch in batches)
        per_step = [last["kernels_in_replays"], last["kernels"] + last["copies"], last["waits"]]
        most = max(batch["gb"] for batch in batches)
        table.append([name, captures, *(f"{x / STEPS:.0f}" for x in per_step), f"{most:.1f}"])
    head = ["", "captures", "kernels a step, in replays", "others and copies", "waits", "peak memory, GB"]
    print_table(f"Sampling: mar_base, {STEPS} steps, cfg 2.9, bf16", head, table)
    table = []
    for dtype in ("bf16", "fp32"):
        last = training(dtype, 64)[-1]
        table.append([dtype, last["kernels"] + last["copies"], last["waits"], f"{last['gb']:.1f}"])
    print_table("Training: mar_base, batch 64", ["", "kernels and copies", "waits", "peak memory, GB"], table)


if __name__ == "__main__":
    main()
