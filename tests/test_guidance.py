"""Guidance in the sampling loop: the cfg schedules against their formulas, and which images and tokens it acts on."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from heads.schedules import CFGS, RuleOptions
from tests.helpers_generate import BATCH, LABELS, LENGTH, SEEDS, STEPS, ragged_rules, rules_of, run, state

# ------------------------------------------------------------------------------------------------------------ schedules


def test_published_linear_cfg_values():
    """Published: 1 + (cfg − 1)·(L − mask_len)/L, with mask_len = max(1, min(unknown − 1, ⌊L·cos⌋)) after the step."""
    for num_iter in (1, 3, 16, 64, 256):
        rules, n = rules_of(cfg=3.2), 256
        for step in range(num_iter):
            mask_len = max(1, min(n - 1, math.floor(256 * np.cos(np.pi / 2 * (step + 1) / num_iter))))
            plan = rules(state([n], step, num_iter, num_start=[256], length=256))
            expected = 1 + 2.2 * (256 - mask_len) / 256
            assert plan.cfg.shape == (1, 256) and plan.cfg.dtype == torch.float32
            np.testing.assert_allclose(plan.cfg, expected, rtol=1e-6)
            n -= int(plan.select.sum())
        assert n == 0


def test_cfg_formulas():
    current, after = state([16, 8], num_start=[16, 10]), torch.tensor([12.0, 0.0])
    v = np.array([4 / 16, 9 / 10])  # at the end m' counts as 1

    def value(name, **options):
        return np.broadcast_to(np.ravel(CFGS[name](current, after, RuleOptions(cfg=3.0, **options))), 2)

    np.testing.assert_allclose(value("constant"), [3.0, 3.0])
    np.testing.assert_allclose(value("linear"), 1 + 2 * v, rtol=1e-6)
    for p in (1.0, 0.5, 2.75):
        np.testing.assert_allclose(
            value("power_cosine", cfg_power=p), 1 + 2 * (1 - np.cos(np.pi * v**p)) / 2, rtol=1e-5
        )
    for interval, expected in (("0,1", [3, 3]), ("0,0.5", [3, 1]), ("0.25,0.25", [3, 1]), ("0.3,0.8", [1, 1])):
        np.testing.assert_array_equal(value("interval", cfg_interval=interval), expected)


@pytest.mark.parametrize("name", [name for name in CFGS if name != "schedule"])  # which has scales of its own
def test_every_cfg_schedule_is_exactly_1_at_w_1(name):
    rules = rules_of(cfg=1.0, cfg_schedule=name)
    for step in range(4):
        assert (rules(state([5, 16], step, num_start=[16, 16])).cfg == 1.0).all()


# ------------------------------------------------------------------------------------------------- what a step computes


def count_encodes(mar, monkeypatch):
    """A list of the labels of each call of encode_decode, "none" for the unconditional ones."""
    calls, original = [], mar.encode_decode

    def encode_decode(tokens, mask, labels=None, num_visible=None):
        calls.append("none" if labels is None else "labels")
        return original(tokens, mask, labels, num_visible)

    monkeypatch.setattr(mar, "encode_decode", encode_decode)
    return calls


def test_unconditional_half_is_skipped_where_all_cfg_are_1(mar, monkeypatch):
    calls = count_encodes(mar, monkeypatch)
    rows = []
    hook = mar.diffloss.net.register_forward_hook(lambda net, args, out: rows.append(len(out)))
    pair = ["labels", "none"]
    # group of 1 a step; guidance within [0.3, 0.6] of what is known afterwards: 3, 4 and 5 of 9 tokens
    some = ["labels"] * 2 + pair * 3 + ["labels"] * 4
    try:
        for kwargs, expected in (
            (dict(cfg=1.0), ["labels"] * LENGTH),
            (dict(cfg=2.0), pair * LENGTH),
            (dict(cfg=1.0, cfg_schedule="constant"), ["labels"] * LENGTH),
            (dict(cfg=0.5, cfg_schedule="constant"), pair * LENGTH),
            (dict(cfg=2.0, cfg_schedule="interval", cfg_interval="0.3,0.6"), some),
        ):
            calls.clear(), rows.clear()
            run(mar, rules_of(**kwargs), LENGTH)
            assert calls == expected
            guided = expected.count("none")
            assert sorted(rows) == [BATCH] * STEPS * (LENGTH - guided) + [2 * BATCH] * STEPS * guided
    finally:
        hook.remove()


def test_guided_rows_are_as_where_all_are_guided(mar):
    """Leaving out the unconditional half of other images and tokens changes nothing; here counts are ragged as well."""
    sizes, w = torch.tensor([2.0, 4.0, 1.0]), torch.tensor([2.0, 1.0, 3.0])

    def sample(unguided):
        def cfg(state, unknown_after):
            scale = w[state.images].unsqueeze(1).repeat(1, LENGTH)
            scale[:, 4] = 1.0
            return torch.where(scale == 1.0, unguided, scale)

        return run(mar, replace(ragged_rules(sizes), cfg=cfg), 4)

    some, all_rows = sample(1.0), sample(1.0 + 1e-7)  # guided in name only
    torch.testing.assert_close(some, all_rows, rtol=1e-3, atol=1e-4)


def test_rows_without_guidance_are_as_in_an_unguided_run(mar):
    """A batch in which one image has w = 1 and another w = 3: the first is what it is alone."""
    w = torch.tensor([[1.0], [3.0]])
    rules = replace(rules_of(), cfg=lambda state, unknown_after: w[state.images])
    mixed = run(mar, rules, 3, LABELS[:2], SEEDS[:2])
    plain = run(mar, rules_of(cfg=1.0), 3, LABELS[:2], SEEDS[:2])
    torch.testing.assert_close(mixed[0], plain[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(mixed[1], plain[1], atol=1e-3)


def test_per_token_tau_and_cfg_reach_their_token(mar):
    """Changing one token's tau (or cfg) in the only step changes that token and no other."""
    base = torch.full((BATCH, LENGTH), 1.0), torch.full((BATCH, LENGTH), 2.0)

    def with_rules(tau, cfg):
        rules = replace(rules_of(), tau=lambda state: tau, cfg=lambda state, unknown_after: cfg)
        return run(mar, rules, 1)[..., 0]

    expected = with_rules(*base)
    assert expected[1, 5].abs() < 1.9  # not clipped
    for which, value in ((0, 0.3), (1, 4.0)):
        changed = [x.clone() for x in base]
        changed[which][1, 5] = value
        moved = (with_rules(*changed) - expected).abs() > 1e-4
        assert moved.nonzero().tolist() == [[1, 5]]
