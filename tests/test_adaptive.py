"""Shares of the variance of what learned rules say, and heads without their adaptive part."""

from types import SimpleNamespace

import pytest
import torch

from heads.policy import PolicyHeads
from models.tokenizers import build_tokenizer
from sampling.adaptive import Spread, without_adaptive
from sampling.loop import generate
from sampling.run import sample_images
from sampling.settings import SampleConfig
from tests.helpers import named_weights, on_cpu, randn, tiny_mar

CPU = torch.device("cpu")
SETTINGS = SampleConfig(infer_mode="guidance", num_iter=3, num_sampling_steps=2, solver="dpmpp_sde", cfg=2.0)


def parts_of(scale=0.1, **options):
    heads = PolicyHeads(16, ("tau", "cfg", "profile"), form="knots", tau=(0.4, 1.6), cfg=(0, 8), **options)
    return on_cpu(tiny_mar(), build_tokenizer("pixel", channels=1), named_weights(heads, scale))


def plans(values):
    """Plans of values (K, B, L) that select all tokens."""
    return [SimpleNamespace(select=torch.ones_like(v, dtype=torch.bool), tau=v, cfg=1 - 2 * v) for v in values]


def test_shares_are_the_parts_of_the_variance_and_batches_add_up():
    """Of values with effects of steps, images and tokens, the parts are those of the law of total variance."""
    values = randn(4, 6, 5) + 3 * randn(4, 1, 1, seed=1) + 2 * randn(4, 6, 1, seed=2)
    spread = Spread(("tau", "w"))
    for half in (slice(0, 2), slice(2, 6)):
        for step, plan in enumerate(plans(values[:, half])):
            spread.record(step, plan)
        spread.end_batch()
    report, values = spread.report(4, CPU), values.double()
    total = report["tau_variance"]["total"]
    assert total == pytest.approx(values.var(correction=0).item(), rel=1e-5)
    expected = dict(steps=values.mean((1, 2)).var(correction=0), images=values.mean(2).var(1, correction=0).mean(),
                    tokens=values.var(2, correction=0).mean())  # fmt: skip
    for name, value in expected.items():
        assert report["tau_variance"][name] == pytest.approx(value.item() / total, abs=1e-4)
        assert report["w_variance"][name] == pytest.approx(value.item() / total, abs=1e-4)
    assert report["w_variance"]["total"] == pytest.approx(4 * total, rel=1e-5)


def test_tokens_that_are_not_drawn_do_not_count():
    value = torch.tensor([[1.0, 9.0], [3.0, 9.0]])
    plan = SimpleNamespace(select=torch.tensor([[True, False], [True, False]]), tau=value, cfg=value)
    spread = Spread(("tau",))
    spread.record(0, plan)
    spread.end_batch()
    assert spread.report(2, CPU) == {"tau_variance": {"total": 1.0, "steps": 0.0, "images": 1.0, "tokens": 0.0}}


@pytest.mark.parametrize("mode", ["global", "token"])
def test_heads_without_their_adaptive_part_say_its_mean_of_every_image(mode):
    parts = parts_of(tau_mode=mode, cfg_mode=mode)
    quiet = without_adaptive(parts, SETTINGS)
    said = []

    def listen(step, rows, plan, tokens):
        said.append([(x[plan.select].min().item(), x[plan.select].max().item()) for x in (plan.tau, plan.cfg)])

    options = dict(num_iter=3, num_steps=2, solver="dpmpp_sde", clip=(-1, 1), callback=listen)
    generate(parts.model, torch.tensor([0, 1, 2]), SETTINGS.rules(quiet), seeds=[1, 2, 3], **options)
    # cfg's hand-made schedule depends on the step alone, as random order and cosine groups reveal the same numbers
    assert all(low == pytest.approx(high, rel=1e-6) for step in said for low, high in step)
    generate(parts.model, torch.tensor([0, 1, 2]), SETTINGS.rules(parts.heads), seeds=[1, 2, 3], **options)
    assert all(low < high for step in said[3:] for low, high in step)
    again = without_adaptive(parts, SETTINGS)
    state = SimpleNamespace(step=1)
    assert torch.equal(quiet.adaptive("tau", state, torch.ones(2, 1)), again.adaptive("tau", state, torch.zeros(2, 1)))


def test_results_have_the_shares_of_what_is_learned(tmp_path):
    parts, labels = parts_of(), [0, 1, 2, 0]
    for name, settings in (("on", SETTINGS), ("off", SampleConfig(**vars(SETTINGS) | dict(heads_adaptive="off")))):
        result = sample_images(parts, settings, labels, 1, tmp_path / name, batch_size=3)
        shares = result["tau_variance"]
        assert shares["steps"] + shares["images"] + shares["tokens"] == pytest.approx(1, abs=1e-3)
        assert shares["tokens"] == 0 and (shares["images"] > 0) == (name == "on")
        assert "w_variance" in result and settings.name().count("heads_adaptive-off") == (name == "off")
    plain = SampleConfig(**vars(SETTINGS) | dict(infer_mode="baseline"))
    assert not [key for key in sample_images(parts, plain, labels, 1, tmp_path / "plain", batch_size=4) if "var" in key]


def test_untrained_heads_without_their_adaptive_part_are_the_baseline():
    parts = on_cpu(tiny_mar(), build_tokenizer("pixel", channels=1), PolicyHeads(16, form="bounded"))
    options = dict(num_iter=3, num_steps=2, seeds=[1, 2], clip=(-1, 1))
    both = SampleConfig(infer_mode="both", num_iter=3, num_sampling_steps=2, cfg=2.0)
    quiet = both.rules(without_adaptive(parts, both))
    plain = SampleConfig(num_iter=3, num_sampling_steps=2, cfg=2.0).rules(None)
    images = [generate(parts.model, torch.tensor([0, 1]), rules, **options) for rules in (quiet, plain)]
    assert torch.equal(*images)
