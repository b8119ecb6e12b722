"""A step's noise is made while the device computes z, wherever the host knows how many tokens come; it is the same."""

import pytest
import torch

from heads.orders import ORDERS
from heads.policy import HEADS, PolicyHeads, build_rules
from heads.rules import Rules
from heads.schedules import GROUPS, MIN_STEPS
from models.diffusion_sampler import DiffusionSampler
from sampling.canvas import Canvas
from sampling.loop import generate
from tests.helpers import randn
from tests.helpers_generate import BATCH, LABELS, LENGTH, SCHEDULE, SEEDS, ragged_rules, rules_of, run
from tests.helpers_ids import tiny_ids

RULES = [dict(order=order) for order in ORDERS] + [dict(group=group, schedule=SCHEDULE) for group in GROUPS]


@pytest.fixture
def events(monkeypatch):
    """ "noise" and "wait" as they happen."""
    happened = []

    def watched(name, method):
        def call(*args):
            happened.append(name)
            return method(*args)

        return call

    monkeypatch.setattr(DiffusionSampler, "noise", watched("noise", DiffusionSampler.noise))
    monkeypatch.setattr(Canvas, "select", watched("wait", Canvas.select))
    return happened


@pytest.mark.parametrize("options", RULES, ids=lambda options: next(iter(options.values())))
def test_noise_is_made_before_the_wait_and_is_the_noise_made_after_it(mar, options, events, monkeypatch):
    """Of edited images too, one complete from the start, and of steps without any token."""
    tokens, mask = randn(BATCH, LENGTH, 1), torch.ones(BATCH, LENGTH, dtype=torch.bool)
    mask[0], mask[1, 2:5] = False, False
    num_iter = MIN_STEPS.get(options.get("group"), LENGTH - 2)
    runs = [dict(num_iter=num_iter), dict(num_iter=num_iter, tokens=tokens, mask=mask, refresh_every=2)]
    made = [run(mar, rules_of(**options, cfg=2.0), **settings) for settings in runs]
    waits = "".join(event[0] for event in events).split("w")
    assert waits[-1] == "" and set(waits[:-1]) == {"n"}  # all noise, and nothing after a wait
    monkeypatch.setattr(Rules, "num_selected", lambda self, on_host: None)
    events.clear()
    assert all(torch.equal(run(mar, rules_of(**options, cfg=2.0), **settings), x) for settings, x in zip(runs, made))
    assert events[:2] == ["wait", "noise"]


@pytest.mark.parametrize("kind", HEADS)
def test_only_a_learned_group_size_makes_the_noise_wait(mar, kind, events):
    names = dict(order="order", group="group", tau="tau_schedule", cfg="cfg_schedule")
    rules = build_rules("baseline", PolicyHeads(mar.width), cfg=2.0, **{names[kind]: "learned"})
    run(mar, rules, 2)
    assert events[:2] == (["wait", "noise"] if kind == "group" else ["noise", "wait"])


def test_sizes_of_a_rule_of_ones_own_are_not_foreseen(mar, events):
    run(mar, ragged_rules(torch.tensor([1.0, 2.0, 3.0])), 4)
    assert events[:2] == ["wait", "noise"]


@pytest.mark.parametrize("order", ["random", "confidence"])
def test_ids_are_the_same(order, monkeypatch):
    model, rules = tiny_ids(), build_rules("baseline", order=order, cfg=2.0)
    ids = generate(model, LABELS, rules, 4, seeds=SEEDS)
    monkeypatch.setattr(Rules, "num_selected", lambda self, on_host: None)
    assert torch.equal(generate(model, LABELS, rules, 4, seeds=SEEDS), ids)


def test_counts_that_differ_are_an_error(mar, monkeypatch):
    """Of one image too many and of another too few, so that their sum is right."""
    counts = Rules.num_selected
    wrong = torch.tensor([1, -1, 0])
    monkeypatch.setattr(Rules, "num_selected", lambda self, on_host: counts(self, on_host) + wrong)
    with pytest.raises(RuntimeError, match=r"each image: \[3, 1, 2\] by the group rule on the host, \[2, 2, 2\]"):
        run(mar, rules_of(), 3)
