"""Heads of the form knots, and the gradient of what is sampled with them."""

import pytest
import torch

from heads.policy import LEARNABLE, PolicyHeads, build_rules, load_heads
from heads.schedules import interpolate
from sampling.loop import decode, generate
from tests.helpers import named_weights, tiny_mar, untrained
from tests.helpers_heads import state_of
from util.checkpoint import load_checkpoint

LEARN = ("tau", "cfg", "profile")
SAMPLING = dict(num_iter=3, num_steps=3, seeds=[4, 5], solver="dpmpp_sde", clip=(-3.0, 3.0))
LABELS = torch.tensor([0, 2])


def knots(scale=0.0, learn=LEARN, **options) -> PolicyHeads:
    """Heads of this objective, all weights random at this scale but for the norms'."""
    heads = PolicyHeads(16, learn, form="knots", tau=(0.4, 1.6), cfg=(0, 8), **options)
    return named_weights(heads, scale) if scale else heads


def rules_of(heads, **options):
    return build_rules("guidance", heads, **dict(cfg=2.0, temperature=0.9) | options)


# --------------------------------------------------------------------------------------------------------- the heads


@pytest.mark.parametrize("cfg", [1.0, 2.5, 9.0])
@pytest.mark.parametrize("mode", ["token", "global"])
@pytest.mark.parametrize("infer_mode", ["baseline", "policy", "guidance", "both"])
def test_untrained_heads_are_the_baseline_bit_for_bit(infer_mode, mode, cfg):
    mar, heads = tiny_mar(), knots(learn=LEARNABLE, tau_mode=mode, cfg_mode=mode)
    options = dict(cfg=cfg, temperature=0.97)
    base = generate(mar, LABELS, build_rules("baseline", **options), **SAMPLING)
    assert torch.equal(generate(mar, LABELS, build_rules(infer_mode, heads, **options), **SAMPLING), base)


def test_what_knots_say():
    """r = v(u) with v linear between 16 knots, τ = base·exp(tanh(r) / 2), w = base + 3·tanh(r) ≥ 0, m = 1 + tanh(k)."""
    heads = knots()
    values = torch.linspace(-2, 1, 16)
    for name in ("tau", "cfg"):
        heads.heads[name].values.data = values.clone()
    heads.heads["profile"].values.data = torch.arange(8.0)
    for step in range(4):
        state = state_of(torch.ones(2, 64, dtype=torch.bool), torch.zeros(2, 64, 16), step=step)
        r = torch.tensor(-2 + 3 * (step + 1) / 4)
        tau, w = heads.temperature(state, torch.full((2, 1), 0.9), 2.0), heads.guidance(state, torch.ones(2, 1), 2.0)
        torch.testing.assert_close(tau, (0.9 * torch.exp(torch.tanh(r) / 2)).expand(2, 1))
        torch.testing.assert_close(w, (1 + 3 * torch.tanh(r)).clamp(min=0).expand(2, 1))
    profile = heads.profile(None)
    assert profile(0.5).item() == pytest.approx(1 + torch.tanh(torch.tensor(3.5)).item())
    assert heads.profile(lambda share: 0.5)(0.5).item() == pytest.approx(profile(0.5).item() / 2)
    assert interpolate(values, 1.0) == values[-1] and interpolate(values, 0.0) == values[0]


def test_values_are_clipped_to_bounds_that_contain_the_base():
    heads = knots()
    for name, value in (("tau", 9.0), ("cfg", 9.0)):
        heads.heads[name].values.data.fill_(value)
    state = state_of(torch.ones(1, 64, dtype=torch.bool), torch.zeros(1, 64, 16))
    assert heads.temperature(state, torch.tensor([[1.5]]), 1.0).item() == pytest.approx(1.6)
    assert heads.temperature(state, torch.tensor([[2.0]]), 1.0).item() == 2.0
    assert heads.guidance(state, torch.tensor([[6.0]]), 1.0).item() == 8.0


def test_a_checkpoint_knows_the_form_of_its_heads(tmp_path):
    flags = "--objective image --learn tau,cfg,profile".split()
    content = load_checkpoint(untrained(tmp_path / "new", *flags))
    assert load_heads(content).form == "knots" and load_heads(content).bounds["cfg"] == (0.0, 8.0)
    old = load_checkpoint(untrained(tmp_path / "old", "--learn", "tau,cfg"))
    del old["config"]["heads"]["form"]  # as those before it
    assert load_heads(old).form == "bounded"
    alone = load_checkpoint(untrained(tmp_path / "alone", *flags[:2], "--learn", "profile"))
    assert load_heads(alone).learn == ("profile",)


@pytest.mark.parametrize("infer_mode", ["guidance", "both"])
def test_a_profile_belongs_to_the_modes_with_learned_guidance_where_there_is_a_head(infer_mode):
    heads, rest = knots(0.3), dict(order="random", group="cosine") if infer_mode == "both" else {}
    assert build_rules(infer_mode, heads, **rest).profile(None)(0.3) != 1
    assert build_rules(infer_mode, heads, cfg_profile="constant", **rest).profile(None) is None
    without = PolicyHeads(16, ("tau", "cfg"), form="knots")
    assert build_rules(infer_mode, without, **rest).profile(None) is None
    assert build_rules("baseline", heads).profile(None) is None
    with pytest.raises(ValueError, match="learned profile head"):
        build_rules(infer_mode, without, cfg_profile="learned", **rest)


# ------------------------------------------------------------------------------------------------------ the gradient


def gradient(mar, heads, rules=None, **options):
    """Of a fixed function of the tokens in the heads' parameters, by name."""
    tokens = mar.patchify(decode(mar, LABELS, rules or rules_of(heads), **SAMPLING | options))
    loss = (tokens * torch.linspace(-1, 1, tokens.numel()).view(tokens.shape)).sum()
    grads = torch.autograd.grad(loss, list(heads.parameters()), allow_unused=True)
    return {name: g for (name, _), g in zip(heads.named_parameters(), grads)}


@pytest.fixture
def frozen():
    return tiny_mar(img_size=4).requires_grad_(False)


@pytest.mark.parametrize("cfg", [1.0, 2.0])
@pytest.mark.parametrize("mode", ["global", "token"])
def test_the_gradient_through_sampling_is_that_of_finite_differences(frozen, mode, cfg):
    """At w = 1 too, where sampling leaves guidance out. Heads see z detached: what they say about it is constant."""
    heads = knots(0.1 if cfg > 1 else 0.0, tau_mode=mode, cfg_mode=mode)
    for name in ("tau", "cfg"):
        heads.heads[name].out.weight.data.zero_()
    grads = gradient(frozen, heads, rules_of(heads, cfg=cfg))

    def loss():
        with torch.no_grad():
            tokens = frozen.patchify(decode(frozen, LABELS, rules_of(heads, cfg=cfg), **SAMPLING)).double()
        return (tokens * torch.linspace(-1, 1, tokens.numel()).view(tokens.shape)).sum().item()

    for name in ("heads.tau.values", "heads.cfg.values", "heads.profile.values", "heads.cfg.out.bias"):
        if name == "heads.profile.values" and cfg == 1.0:
            continue  # (w − 1)·m is 0 whatever m is
        parameter, direction = heads.get_parameter(name), torch.sign(grads[name])
        ends = []
        for sign in (1, -1):
            parameter.data += sign * 1e-2 * direction
            ends.append(loss())
            parameter.data -= sign * 1e-2 * direction
        expected = (ends[0] - ends[1]) / 2e-2
        assert grads[name].abs().sum().item() == pytest.approx(expected, rel=0.03), name


def test_computing_again_changes_no_gradient(frozen):
    heads = knots(0.1)
    plain, again = gradient(frozen, heads), gradient(frozen, heads, recompute=True)
    for name, value in plain.items():
        torch.testing.assert_close(again[name], value, rtol=0, atol=0)


def test_the_local_gradient_is_that_of_a_steps_own_tokens(frozen):
    """It is the full one with later steps held at what they saw; with one step there is nothing later."""
    heads = knots(0.1)
    one = dict(num_iter=1)
    for name, value in gradient(frozen, heads, **one).items():
        torch.testing.assert_close(gradient(frozen, heads, local=True, **one)[name], value, rtol=0, atol=0)
    local, full = gradient(frozen, heads, local=True), gradient(frozen, heads)
    assert not torch.allclose(local["heads.tau.values"], full["heads.tau.values"], rtol=1e-3)
    last = dict.fromkeys(("heads.tau.values", "heads.cfg.values"), 15)
    for name, knot in last.items():  # the last knot speaks at the last step alone, after which nothing comes
        torch.testing.assert_close(local[name][knot], full[name][knot])
        assert full[name][knot] != 0
