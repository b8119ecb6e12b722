"""What the tests of the sampling loop and of its rules share: short runs of three images of 3×3 tokens, states."""

from dataclasses import replace

import torch

from heads.policy import build_rules
from heads.step import StepState
from sampling.loop import generate

SIDE, STEPS, BATCH = 3, 5, 3
LENGTH = SIDE**2
LABELS = torch.tensor([0, 2, -1])
SEEDS = [11, 12, 13]
SCHEDULE = '{"cfg": [2.5, 1.5, 1.0], "group": [0.25, 0.5, 1.0], "profile": [0.0, 1.0, 0.5], "tau": [1.0, 0.9, 0.75]}'


def rules_of(**kwargs):
    return build_rules("baseline", **kwargs)


def run(mar, rules, num_iter, labels=LABELS, seeds=SEEDS, **kwargs):
    """Tokens (B, L, C) of generate(); clipped, since x₀ from pure noise by untrained weights runs to 10⁴."""
    out = generate(mar, labels, rules, num_iter, seeds=seeds, **dict(num_steps=STEPS, clip=(-2.0, 2.0)) | kwargs)
    assert out.isfinite().all()
    return mar.patchify(out)


def recorded(mar, rules, num_iter, *args, **kwargs):
    """As `run`, and [(step, rows)] of the callback."""
    steps = []
    out = run(mar, rules, num_iter, *args, callback=lambda step, rows, *_: steps.append((step, rows)), **kwargs)
    return out, steps


def check_decode(steps, unknown, num_iter):
    """Each unknown token once, some of every unfinished image a step, the rest at the last; rows in row-major order."""
    unknown = unknown.clone()
    assert [step for step, _ in steps] == list(range(len(steps))) and len(steps) <= num_iter
    for step, rows in steps:
        assert rows.dtype == torch.long and rows.device.type == "cpu" and rows.shape[1] == 2
        flat = rows[:, 0] * unknown.shape[1] + rows[:, 1]
        assert (flat.diff() > 0).all()
        assert unknown[rows[:, 0], rows[:, 1]].all()
        revealed = torch.bincount(rows[:, 0], minlength=len(unknown))
        assert (revealed[unknown.any(1)] >= 1).all()
        unknown[rows[:, 0], rows[:, 1]] = False
        assert step < num_iter - 1 or not unknown.any()
    assert not unknown.any()


def state(num_unknown, step=0, num_iter=4, num_start=None, length=16, seed=0):
    """A StepState of images with these numbers of unknown tokens, at the end of each row."""
    n = torch.as_tensor(num_unknown, dtype=torch.float32).reshape(-1)
    mask = torch.arange(length) >= length - n.unsqueeze(1)
    gumbel = -(-torch.rand(len(n), length, generator=torch.Generator().manual_seed(seed)).log()).log()
    start = n if num_start is None else torch.as_tensor(num_start, dtype=torch.float32).reshape(-1)
    return StepState(step, num_iter, mask, n, start, gumbel, None, torch.arange(len(n)))


def ragged_rules(sizes, **kwargs):
    """Baseline rules whose group size is sizes[image]."""
    return replace(rules_of(**kwargs), group=lambda state: sizes[state.images])


class Stop(Exception):
    pass
