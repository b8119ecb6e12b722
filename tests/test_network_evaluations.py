"""What sampling costs: the network evaluations said are those made, and those of the closed form."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffusion.schedule import cosine_schedule
from heads.policy import PolicyHeads, build_rules
from models.tokenizers import build_tokenizer
from sampling.loop import generate
from sampling.run import sample_images
from sampling.settings import SampleConfig
from tests.helpers import named_weights, on_cpu, tiny_mar


def tiny_heads() -> PolicyHeads:
    """Heads that disagree between images: ragged groups, a w for each token."""
    return named_weights(PolicyHeads(16, cfg_mode="token", rho=(0.05, 0.6), tau=(0.5, 1.5)), scale=0.1).eval()


def counted(mar, **kwargs) -> tuple[Counter, Counter]:
    """(what generate() says, what the networks saw), for four images of which two have known tokens already."""
    mask = torch.ones(4, mar.config.seq_len, dtype=torch.bool)
    mask[1, 5:], mask[2, 20:] = False, False  # these finish early
    said, seen = Counter(), Counter()
    encode_decode, net = mar.encode_decode, mar.diffloss.net.forward

    def transformer(tokens, *args):
        seen["mar"] += len(tokens)
        return encode_decode(tokens, *args)

    def mlp(x, *args):
        seen["mlp"] += len(x)
        return net(x, *args)

    mar.encode_decode, mar.diffloss.net.forward = transformer, mlp
    try:
        tokens = torch.zeros(*mask.shape, mar.config.token_dim)
        generate(mar, [0, 1, 2, 0], seeds=range(4), evals=said, tokens=tokens, mask=mask, **kwargs)
    finally:
        del mar.encode_decode, mar.diffloss.net.forward
    return said, seen


@pytest.mark.parametrize("schedule", ["constant", "linear", "interval"])
@pytest.mark.parametrize("num_iter, num_steps, cfg", [(1, 2, 1.0), (1, 2, 2.0), (4, 3, 2.0), (70, 1, 2.0), (5, 2, 1.0)])
def test_evaluations_said_are_those_made(schedule, num_iter, num_steps, cfg):
    rules = build_rules("baseline", cfg=cfg, cfg_schedule=schedule, cfg_interval="0.2,0.7")
    said, seen = counted(tiny_mar(), rules=rules, num_iter=num_iter, num_steps=num_steps)
    assert said == seen and seen["mlp"] >= num_steps * 89  # 64 + 5 + 20 tokens at least


@pytest.mark.parametrize(
    "interval, spacing", [("0,1", None), ("0.3,0.7", None), ("0,0", "uniform"), ("0.999,1", "uniform")]
)
@pytest.mark.parametrize("schedule", ["constant", "interval"])
def test_a_profile_is_counted_by_the_timesteps_where_guidance_acts(schedule, interval, spacing):
    """All 64 + 5 + 20 + 64 tokens are guided with a constant schedule, at the timesteps inside the interval."""
    options = dict(
        cfg=2.0, cfg_schedule=schedule, cfg_interval="0.2,0.7", cfg_profile="interval", cfg_t_interval=interval
    )
    settings = dict(num_iter=5, num_steps=6, spacing=spacing)
    said, seen = counted(tiny_mar(), rules=build_rules("baseline", **options), **settings)
    assert said == seen
    low, high = map(float, interval.split(","))
    shares = cosine_schedule(6, spacing or "uniform").timesteps / 1000
    inside = ((shares >= low) & (shares <= high)).sum()
    if schedule == "constant":
        assert seen["mlp"] == 153 * (6 + inside)


def test_guidance_is_computed_for_the_images_and_tokens_it_acts_on():
    """Image 0 has w = 1, in image 1 one token alone has another; the counts are those in closed form."""

    def cfg(state, unknown_after):
        w = torch.tensor([1.0, 1.0, 2.0, 3.0])[state.images].unsqueeze(1).repeat(1, state.mask.shape[1])
        w[state.images == 1, 3] = 2.0
        return w

    def group(state):  # all at the second step
        return torch.full_like(state.num_unknown, 2.0)

    rules = replace(build_rules("baseline", order="raster", cfg=2.0), cfg=cfg, group=group)
    said, seen = counted(tiny_mar(), rules=rules, num_iter=2, num_steps="4:3")
    assert said == seen
    # unknown: 64, 5, 20 and 64 tokens; token 3 of image 1 comes at the second step
    assert seen["mar"] == (4 + 2) + (4 + 3)
    assert seen["mlp"] == 4 * (8 + 4) + 3 * (62 + 3 + 18 + 62 + 1 + 18 + 62)


def test_annealed_steps_are_counted():
    """5, 4, 3 and 2 diffusion steps, each for a quarter of the unknown tokens (64, 5, 20, 64), twice for guidance."""
    rules = replace(build_rules("baseline", cfg=2.0, cfg_schedule="constant"), group=lambda state: state.num_start // 4)
    said, seen = counted(tiny_mar(), rules=rules, num_iter=4, num_steps="5:2")
    assert said == seen
    assert seen["mlp"] == 2 * sum(steps * tokens for steps, tokens in zip((5, 4, 3, 2), (38, 38, 38, 39)))


@pytest.mark.parametrize("mode", ["policy", "guidance", "both"])
def test_evaluations_with_learned_rules_are_those_made_too(mode):
    said, seen = counted(tiny_mar(), rules=build_rules(mode, tiny_heads(), cfg=2.0), num_iter=6, num_steps=2)
    assert said == seen and seen["mlp"] >= 2 * 89


def per_image(tmp_path, num_iter, num_steps, **options) -> tuple[float, float]:
    """(mar_evals, mlp_evals) that sampling reports."""
    sampling = SampleConfig(num_iter=num_iter, num_sampling_steps=num_steps, **options)
    parts = on_cpu(tiny_mar(), build_tokenizer("pixel", channels=1))
    found, again = (sample_images(parts, sampling, [0, 1, 2, 0, 1], 3, tmp_path, batch_size=2) for _ in range(2))
    assert again["num_made"] == 0 and again["mar_evals"] is again["mlp_evals"] is None
    return found["mar_evals"], found["mlp_evals"]


@pytest.mark.parametrize("num_iter, num_steps", [(1, 2), (6, 2), (9, 1)])
def test_evaluations_an_image_in_closed_form(num_iter, num_steps, tmp_path):
    """L = 64: cfg 1 is one pass a step, guidance two; an interval guides the steps in it, with their tokens."""
    length, unknown, guided = 64, [64], []
    for step in range(num_iter):
        after = math.floor(length * math.cos(math.pi / 2 * (step + 1) / num_iter)) if step < num_iter - 1 else 0
        unknown.append(min(unknown[-1] - 1, max(after, 1)) if step < num_iter - 1 else 0)
        guided.append(0.25 <= (length - max(unknown[-1], 1)) / length <= 0.75)
    groups = -np.diff(unknown)
    runs = {
        "off": ({}, (num_iter, length * num_steps)),
        "constant": (dict(cfg=2.0, cfg_schedule="constant"), (2 * num_iter, 2 * length * num_steps)),
        "linear": (dict(cfg=2.0), (2 * num_iter, 2 * length * num_steps)),  # v > 0 from the first step on
        "interval": (
            dict(cfg=2.0, cfg_schedule="interval", cfg_interval="0.25,0.75"),
            (num_iter + sum(guided), (length + groups[guided].sum()) * num_steps),
        ),
    }
    for name, (options, expected) in runs.items():
        assert per_image(tmp_path / name, num_iter, num_steps, **options) == expected, name
