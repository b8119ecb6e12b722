"""What batches of MAR-B ask of a GPU in bf16: a line of JSON for each, of sizes that are real and values that are not.

The first batch is eager but for its draws, the second captures its passes, later ones replay.
"""

import argparse
import json
import os

os.environ.setdefault("VALUES", "70000")  # those that rules decide with; products are not computed

import torch  # noqa: E402

from heads.policy import build_rules  # noqa: E402
from models.low_precision import prepare  # noqa: E402
from models.mar import MAR, MAR_CONFIGS  # noqa: E402
from sampling.loop import generate  # noqa: E402
from sampling.settings import FAST  # noqa: E402
from tests.null_gpu import counts, emulation  # noqa: E402, F401

PUBLISHED = dict(solver="ddpm", num_sampling_steps="100", refresh_every=1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--num_iter", type=int, default=64)
    parser.add_argument("--num_batches", type=int, default=4)
    parser.add_argument("--fast", action="store_true")
    args = parser.parse_args()
    settings = FAST if args.fast else PUBLISHED
    options = dict(solver=settings["solver"], refresh_every=settings["refresh_every"])
    with torch.device("meta"):
        model = MAR(MAR_CONFIGS["mar_base"])
    model = model.to_empty(device="cuda").eval()
    prepare(model, torch.bfloat16)
    labels = torch.arange(args.batch_size) % model.config.class_num
    for _ in range(args.num_batches):
        counts()
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16):
            rules, seeds = build_rules("baseline", cfg=2.9), range(args.batch_size)
            generate(model, labels, rules, args.num_iter, settings["num_sampling_steps"], seeds=seeds, **options)
        memory = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        peak, reserved = (round(x / 1e9, 2) for x in memory)
        print(json.dumps(counts() | dict(peak_gb=peak, reserved_gb=reserved)), flush=True)


if __name__ == "__main__":
    main()
