"""The losses of the learned heads, the draws and states they are computed on, and who learns from which."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from heads.policy import PolicyHeads, build_rules
from heads.schedules import CFGS, GROUPS, RuleOptions
from models.diffloss import Denoised, DiffLoss
from tests.helpers import tiny_mar
from tests.helpers_heads import SCOPES, state_of, trained
from tests.helpers_training import terms_of
from training.objectives.draws import DrawSettings, training_draws
from training.objectives.head_losses import HeadLossConfig, budget_loss, guidance_loss
from training.objectives.states import base_group, training_state
from training.objectives.token import TokenObjective

# ---------------------------------------------------------------------------------------------------------- losses


def draws_for(mar, **settings):
    usual = dict(seq_len=mar.config.seq_len, mask_ratio_min=0.3, label_drop_prob=0.0, mask_ratio_per_image=True)
    return training_draws(0, 0, [1, 2, 3, 4], mar.diffloss, DrawSettings(**usual | settings))


HEADS = dict(num_iter=(2, 16), cfg_max=3.0)


def test_draws_of_the_backbone_are_the_same_with_and_without_heads():
    mar = tiny_mar(diffusion_batch_mul=2)
    with_heads, without = draws_for(mar, **HEADS), draws_for(mar)
    for name in ("flip", "drop", "mask"):
        assert torch.equal(getattr(with_heads, name), getattr(without, name))
    assert torch.equal(with_heads.tokens.rows, without.tokens.rows)
    for name, value in with_heads.tokens.draws.items():
        assert torch.equal(value, without.tokens.draws[name])
    num_iter = with_heads.policy.num_iter
    assert without.policy is None and num_iter.min() >= 2 and num_iter.max() <= 16


@pytest.mark.parametrize("num_iter", [1, 2, 5, 16])
def test_training_meets_the_states_that_sampling_meets(num_iter):
    """The unknown counts a cosine schedule visits lead back to its steps, with the same inputs and the same k."""
    heads, length, n = trained(), 64, 64.0
    for step in range(num_iter):
        mask = (torch.arange(length) < n).unsqueeze(0)
        sampling = state_of(mask, torch.zeros(1, length, 16), step, num_iter)
        draws = SimpleNamespace(step=None, num_iter=torch.tensor([num_iter]), gumbel=sampling.gumbel)
        training = training_state(draws, mask, sampling.z)
        assert training.step.tolist() == [step]
        k = sampling.num_unknown if sampling.is_last else GROUPS["cosine"](sampling, RuleOptions())
        assert torch.equal(base_group(training), k)
        a, b = heads.logits(sampling, 2.0), heads.logits(training, torch.tensor([2.0]))
        torch.testing.assert_close(a, b)
        w = build_rules("baseline", cfg=2.0)(sampling).cfg[:, :1]
        options = RuleOptions(cfg=torch.tensor([[2.0]]))
        torch.testing.assert_close(CFGS["linear"](training, training.num_unknown - k, options), w)
        n -= float(k)
    assert n == 0


def test_guidance_loss_is_the_squared_error_of_the_guided_prediction():
    """Against a naive loop; and its minimum is the closed-form optimum, so it cannot run away to −∞."""
    g = torch.Generator().manual_seed(0)
    eps_c, eps_u, noise = (torch.randn(50, 4, generator=g) for _ in range(3))
    keep = torch.rand(50, generator=g) < 0.7
    best = -((eps_c - eps_u) * (eps_u - noise))[keep].sum() / (eps_c - eps_u)[keep].square().sum()
    w = torch.full((50,), 0.3, requires_grad=True)
    naive = sum(((eps_u[i] + 0.3 * (eps_c[i] - eps_u[i]) - noise[i]) ** 2).mean() for i in range(50) if keep[i]) / int(
        keep.sum()
    )
    head = DiffLoss(4, 1, depth=1, width=2)
    cond, uncond = (Denoised(noise, eps, noise) for eps in (eps_c, eps_u))

    def loss(w):
        return guidance_loss(head.fit(head.guided(cond, uncond, w), None, {"noise": noise}), keep)

    torch.testing.assert_close(loss(w).detach(), naive)
    at = [loss(torch.full((50,), float(best) + d)) for d in (-0.1, 0.0, 0.1)]
    assert at[1] < at[0] and at[1] < at[2] and at[1] >= 0


def test_budget_allows_a_spread_but_not_fewer():
    base = torch.tensor([4.0, 4.0])
    assert budget_loss(torch.tensor([2.0, 6.0]), base) == 0
    assert budget_loss(torch.tensor([2.0, 2.0]), base) == pytest.approx(0.25)


def test_comparable_losses_do_not_depend_on_the_timestep():
    g = torch.Generator().manual_seed(0)
    t = torch.randint(0, 1000, (20000,), generator=g)
    hard = torch.rand(20000, generator=g) < 0.5
    loss = torch.where(hard, 2.0, 1.0) * (1 + t // 100)  # ten times as loud at one end
    done = DiffLoss(1, 1, depth=1, width=2).comparable(loss, {"t": t})
    assert done[hard].std() < 0.05 and done[~hard].std() < 0.05
    assert done[hard].mean() / done[~hard].mean() == pytest.approx(2.0, rel=0.02)


# --------------------------------------------------------------------------------------------------------- routing

LOSSES = {"order": "lambda_order", "size": "lambda_size", "budget": "lambda_budget", "cfg": "lambda_cfg"}
RECEIVERS = {  # loss -> who receives gradient from it (DESIGN.md section 4)
    "diffusion": {"backbone", "diffloss", "tau"},
    "order": {"order", "group"},
    "size": {"order"},
    "budget": {"group"},
    "cfg": {"cfg"},
}
UNMOVED = {"heads.heads.order.out.bias"}  # the same number on all logits ranks nothing


def owner(name: str) -> str:
    """The part that a parameter of TokenObjective belongs to."""
    parts = name.split(".")
    return parts[2] if parts[0] == "heads" else "diffloss" if parts[1] == "diffloss" else "backbone"


@pytest.mark.parametrize("loss", RECEIVERS)
@pytest.mark.parametrize("freeze_backbone, train_diffloss", itertools.product([False, True], repeat=2))
@pytest.mark.parametrize("scope", SCOPES)
def test_gradient_routing(loss, freeze_backbone, train_diffloss, scope):
    """Every parameter of the parts that learn from a loss has a gradient from it, and no other parameter has one."""
    mar = tiny_mar()
    heads = trained(scale=0.3, tau_mode=scope, cfg_mode=scope)
    for name, p in mar.named_parameters():
        p.requires_grad_(train_diffloss if name.startswith("diffloss.") else not freeze_backbone)
    draws = draws_for(mar, **HEADS)
    tokens = torch.rand(4, 64, 1, generator=torch.Generator().manual_seed(3)) * 2 - 1
    labels = torch.tensor([0, 1, 2, -1])

    def gradients(**weights):
        weights = dict.fromkeys(LOSSES.values(), 0.0) | weights
        module = TokenObjective(mar, heads, HeadLossConfig(**weights)).train()
        found = terms_of(module, tokens, labels, draws, float(len(draws.tokens.rows)))["loss"]
        learned = {name: p for name, p in module.named_parameters() if p.requires_grad}
        values = torch.autograd.grad(found, list(learned.values()), allow_unused=True)
        return {name: torch.zeros_like(p) if v is None else v for (name, p), v in zip(learned.items(), values)}

    found = gradients()
    if loss != "diffusion":  # what this loss adds to the gradient
        with_it = gradients(**{LOSSES[loss]: 1.0})
        found = {name: with_it[name] - found[name] for name in found}
    expected = {name for name in found if owner(name) in RECEIVERS[loss]} - UNMOVED
    assert {name for name, value in found.items() if value.abs().max() > 1e-7} == expected
    assert {owner(name) for name in expected} == RECEIVERS[loss] - (
        ({"backbone"} if freeze_backbone else set()) | (set() if train_diffloss else {"diffloss"})
    )


def test_dropped_labels_are_left_out_of_the_guidance_loss():
    mar, heads = tiny_mar(), trained(learn=("cfg",))
    draws = draws_for(mar, **HEADS)
    tokens = torch.rand(4, 64, 1, generator=torch.Generator().manual_seed(3)) * 2 - 1
    module = TokenObjective(mar, heads)
    assert terms_of(module, tokens, torch.full((4,), -1), draws, 10.0)["cfg"] == 0
    assert terms_of(module, tokens, torch.tensor([0, 1, 2, 0]), draws, 10.0)["cfg"] > 0


def test_the_unconditional_pass_is_made_for_the_guidance_head_only(monkeypatch):
    mar = tiny_mar()
    calls = []
    encode_decode = mar.encode_decode
    monkeypatch.setattr(mar, "encode_decode", lambda *a, **k: calls.append(1) or encode_decode(*a, **k))
    draws = draws_for(mar, **HEADS)
    tokens = torch.zeros(4, 64, 1)
    for learn, expected in ((("order", "group", "tau"), 1), (("cfg",), 2)):
        calls.clear()
        terms_of(TokenObjective(mar, trained(learn=learn)), tokens, torch.zeros(4, dtype=torch.long), draws, 10.0)
        assert len(calls) == expected


def test_frozen_parts_stay_in_eval_mode():
    mar = tiny_mar(proj_dropout=0.1)
    for name, p in mar.named_parameters():
        p.requires_grad_(name.startswith("diffloss."))
    module = TokenObjective(mar, PolicyHeads(16)).train()
    assert not mar.encoder_blocks.training and mar.diffloss.training and module.heads.training
    assert module.eval() is module and not mar.diffloss.training


def test_tau_of_a_token_scales_that_tokens_noise_only():
    """τ reaches x_t of its own rows: the others' losses are bitwise the same."""
    mar = tiny_mar()
    g = torch.Generator().manual_seed(0)
    target, z, noise = torch.randn(6, 1, generator=g), torch.randn(6, 16, generator=g), torch.randn(6, 1, generator=g)
    t, tau = torch.randint(0, 1000, (6,), generator=g), torch.ones(6)
    plain = mar.diffloss.token_loss(target, z, t, noise, tau)
    tau[2] = 1.05
    moved = mar.diffloss.token_loss(target, z, t, noise, tau)
    assert [i for i in range(6) if plain[i] != moved[i]] == [2]
