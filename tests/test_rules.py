"""The hand-made rules: group sizes and temperatures against their formulas, and how build_rules puts rules together."""

import math
from dataclasses import replace
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch

import sample
from heads.orders import ORDERS
from heads.policy import INFER_MODES, RULES, build_rules, choices
from heads.rules import whole_group
from heads.schedules import CFGS, GROUPS, PROFILES, TAUS, RuleOptions
from heads.step import StepState
from sampling.settings import SampleConfig
from tests.helpers_generate import rules_of, run, state

# ------------------------------------------------------------------------------------------------------ group rules


def unknown_after(name, n, start, u, a=1.0, p=2.0):
    """DESIGN section 3, in numpy float64."""
    share = {
        "cosine": np.cos(np.pi / 2 * u),
        "constant": 1 - u,
        "exp": 1 - (np.exp(a * u) - 1) / (np.exp(a) - 1) if a else 1 - u,
        "power": 1 - u**p,
    }[name]
    return max(1, min(n - 1, math.floor(start * share)))


def sizes_of(name, num_iter, length=256, **options):
    """Group sizes of one image by the rule itself and by the formula."""
    got, expected, n = [], [], length
    for step in range(num_iter):
        if n == 0:
            break
        u = (step + 1) / num_iter
        current = StepState(
            step, num_iter, None, torch.tensor([n * 1.0]), torch.tensor([length * 1.0]), None, None, None
        )
        got.append(int(GROUPS[name](current, RuleOptions(**options))))
        names = {"group_a": "a", "group_p": "p"}
        after = unknown_after(name, n, length, u, **{names[k]: v for k, v in options.items()})
        expected.append(n if step == num_iter - 1 or n == 1 else n - after)
        if step == num_iter - 1:
            got[-1] = n  # Rules takes the rest at the last step, whatever the group rule says
        n -= expected[-1]
    assert n == 0
    return got, expected


@pytest.mark.parametrize("num_iter", [3, 4, 5, 8, 16, 24, 32, 64, 250])
@pytest.mark.parametrize("length", [16, 64, 256])
def test_staged_group_sizes(num_iter, length):
    """A quarter of the tokens, a quarter, half; each even within about 3/4, 3/16, 1/16 of the steps (GtR)."""
    second, third = max(1, round(num_iter * 3 / 16)), max(1, round(num_iter / 16))
    steps = [num_iter - second - third, second, third]
    assert min(steps) >= 1
    shares = [Fraction(1, 4) / steps[0]] * steps[0] + [Fraction(1, 4) / steps[1]] * steps[1]
    shares += [Fraction(1, 2) / steps[2]] * steps[2]
    n, left = length, Fraction(1)
    for step, share in enumerate(shares):
        left -= share
        current = state([n], step, num_iter, num_start=[length], length=length)
        after = n - int(whole_group(partial(GROUPS["staged"], options=RuleOptions()), current))
        assert after == (max(1, min(n - 1, math.floor(length * left))) if n > 1 and step < num_iter - 1 else 0)
        n = after
        if not n:
            break
    assert not n


@pytest.mark.parametrize("num_iter", [1, 2])
def test_staged_groups_need_three_steps(num_iter):
    rules = rules_of(group="staged")
    with pytest.raises(ValueError, match=f"staged needs at least 3 steps, got num_iter {num_iter}"):
        rules(state([16], num_iter=3)) and rules.group(state([16], num_iter=num_iter))
    with pytest.raises(ValueError, match=f"staged.*num_iter {num_iter}"):
        SampleConfig(group="staged", num_iter=num_iter).rules()


def test_cosine_group_sizes_for_every_number_of_steps():
    for num_iter in range(1, 257):
        got, expected = sizes_of("cosine", num_iter)
        assert got == expected, num_iter
        assert min(got) >= 1 and sum(got) == 256 and len(got) == num_iter


@pytest.mark.parametrize(
    "name, options",
    [
        ("constant", {}),
        ("exp", dict(group_a=1.0)),
        ("exp", dict(group_a=-3.0)),
        ("exp", dict(group_a=5.0)),
        ("power", dict(group_p=2.0)),
        ("power", dict(group_p=0.5)),
    ],
)
def test_other_group_sizes(name, options):
    for num_iter in (1, 2, 7, 16, 64, 255, 256, 300):
        got, expected = sizes_of(name, num_iter, **options)
        assert got == expected, num_iter


def test_group_sizes_that_can_be_said_without_a_formula():
    assert sizes_of("constant", 8)[0] == [32] * 8
    assert sizes_of("cosine", 256)[0][0] == 1 and sizes_of("cosine", 4)[0] == [20, 55, 84, 97]
    assert sizes_of("exp", 16, group_a=0.0)[0] == sizes_of("constant", 16)[0]
    assert sizes_of("power", 16, group_p=1.0)[0] == sizes_of("constant", 16)[0]
    for rising in (sizes_of("exp", 16, group_a=3.0)[0], sizes_of("power", 16, group_p=3.0)[0]):
        assert rising == sorted(rising) and rising[0] < rising[-1]
    falling = sizes_of("exp", 16, group_a=-3.0)[0]
    assert falling == sorted(falling, reverse=True) and falling[0] > falling[-1]


@pytest.mark.parametrize("a, expected", [(-1e4, 15), (1e4, 1)])
def test_extreme_curvature_of_the_exp_schedule_is_a_limit(a, expected):
    """All but one token at once, or one at a time; not an overflow."""
    assert GROUPS["exp"](state([16], step=0), RuleOptions(group_a=a)).tolist() == [expected]


def test_group_counts_from_what_was_unknown_at_the_start():
    """Editing 10 of 256 tokens is decoding an image of 10 tokens; the images of a batch do not see each other."""
    current = state([10, 200, 1], step=0, num_iter=4, num_start=[10, 256, 30], length=256)
    k = GROUPS["cosine"](current, RuleOptions())
    after = [unknown_after("cosine", n, m, 0.25) for n, m in ((10, 10), (200, 256))]
    assert k.tolist() == [10 - after[0], 200 - after[1], 1]


@pytest.mark.parametrize("wanted, expected", [(0.0, 1), (-3.0, 1), (5.0, 5), (99.0, 6)])
def test_rules_keep_any_group_between_1_and_what_there_is(wanted, expected):
    rules = replace(rules_of(), group=lambda state: torch.full((1,), wanted))
    assert rules(state([6], step=0)).select.sum() == expected
    assert rules(state([6], step=3)).select.sum() == 6


# ------------------------------------------------------------------------------------------------------------------ tau


def test_tau_schedules():
    options = dict(temperature=1.2, temperature_end=0.8)
    constant, linear = (rules_of(tau_schedule=name, **options) for name in ("constant", "linear"))
    assert list(TAUS) == ["constant", "linear", "schedule"]
    for step, expected in enumerate((1.1, 1.0, 0.9, 0.8)):
        current = state([4, 3], step)
        for plan, value in ((constant(current), 1.2), (linear(current), expected)):
            assert plan.tau.shape == (2, 16) and plan.tau.dtype == torch.float32
            np.testing.assert_allclose(plan.tau, value, rtol=1e-6)


# ------------------------------------------------------------------------------------------------------- build_rules


def test_build_rules_takes_the_named_functions():
    rules = rules_of(order="halton", group="power", tau_schedule="linear", cfg_schedule="interval", group_p=3.0)
    assert rules.order is ORDERS["halton"]
    for rule, expected in ((rules.group, GROUPS["power"]), (rules.tau, TAUS["linear"]), (rules.cfg, CFGS["interval"])):
        assert rule.func is expected and rule.keywords["options"] == RuleOptions(group_p=3.0)
    baseline = rules_of()
    assert baseline.order is ORDERS["random"] and baseline.group.func is GROUPS["cosine"]
    assert baseline.tau.func is TAUS["constant"] and baseline.cfg.func is CFGS["linear"]


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(mode="nobody"), f"unknown infer_mode 'nobody'.*{', '.join(INFER_MODES)}"),
        (dict(order="spiral"), f"unknown order rule 'spiral'.*{', '.join(ORDERS)}"),
        (dict(group="sine"), f"unknown group rule 'sine'.*{', '.join(GROUPS)}"),
        (dict(tau_schedule="warm"), f"unknown tau rule 'warm'.*{', '.join(TAUS)}"),
        (dict(cfg_schedule="steep"), f"unknown cfg rule 'steep'.*{', '.join(CFGS)}"),
        (dict(cfg_profile="steep"), f"unknown profile rule 'steep'; valid: {', '.join(PROFILES)}, learned$"),
        (dict(cfg_profile="learned"), "profile head"),
        (dict(mode="policy"), "policy.*order head"),
        (dict(mode="policy", order="random"), "policy.*group head"),
        (dict(mode="guidance"), "guidance.*tau head"),
        (dict(mode="guidance", tau_schedule="constant"), "guidance.*cfg head"),
        (dict(mode="both"), "both.*order head"),
        (dict(order="learned"), "order head"),
        *[(dict(cfg_interval=text), "cfg_interval must be lo,hi.*0 <= lo") for text in ("", "0.5", "0.6,0.2", "a,b")],
        *[
            ({name: text}, f"{name} must be lo,hi.*0 <= lo")
            for text in ("-1,0.5", "0,2", "0,nan", "0,1,1")
            for name in ("cfg_interval", "cfg_t_interval")
        ],
    ],
)
def test_build_rules_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        build_rules(**{"mode": "baseline", **kwargs})


def test_a_mode_without_its_learned_rules_is_the_baseline(mar):
    """Overriding every learned cell leaves nothing that needs a head."""
    both = build_rules("both", order="random", group="cosine", tau_schedule="constant", cfg_schedule="linear", cfg=2.0)
    assert torch.equal(run(mar, both, 3), run(mar, rules_of(cfg=2.0), 3))


def test_help_names_every_rule(capsys):
    with pytest.raises(SystemExit):
        sample.main(["--help"])
    shown = capsys.readouterr().out
    for kind in RULES:
        assert "{" + ",".join(choices(kind)) + "}" in shown.replace("\n", "").replace(" ", ""), kind


@pytest.mark.parametrize("length", [10, 100, 144])
@pytest.mark.parametrize("num_iter", [4, 5, 10, 20, 25])
def test_constant_groups_are_those_of_fractions(num_iter, length):
    """Of 100 · (1 − 4/5) too, which rounding leaves just below 20."""
    left, expected = length, []
    for step in range(num_iter):
        if left:
            after = max(1, min(left - 1, length * (num_iter - step - 1) // num_iter)) if step < num_iter - 1 else 0
            expected.append(left - after if left > 1 else 1)
            left -= expected[-1]
    sizes, n = [], length
    while n:
        current = state(n, step=len(sizes), num_iter=num_iter, num_start=length, length=length)
        sizes.append(int(whole_group(partial(GROUPS["constant"], options=RuleOptions()), current)))
        n -= sizes[-1]
    assert sizes == expected
    if length % num_iter == 0:
        assert expected == [length // num_iter] * num_iter
