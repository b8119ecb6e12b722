"""The learned heads: what they say untrained, the soft top-k, their losses and who learns from which."""

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine_mar import generate
from heads.losses import HeadLossConfig, budget_loss, comparable, guidance_loss
from heads.policy import HEADS, INFER_MODES, PolicyHeads, bounded, build_rules
from heads.rules import CFGS, GROUPS, RuleOptions, StepState
from heads.soft_topk import soft_topk_frac
from heads.training import TrainingLoss, base_group, training_state
from models.masking import training_draws
from tests.helpers import tiny_mar

SCOPES = ("global", "token")


def trained(dim=16, scale=1.0, **options) -> PolicyHeads:
    """Heads whose every weight is random, so that they say different things about different tokens."""
    heads = PolicyHeads(dim, **options)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in heads.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * scale)
    return heads


def state_of(mask, z, step=1, num_iter=4, seed=0) -> StepState:
    g = torch.Generator().manual_seed(seed)
    return StepState(
        step=step,
        num_iter=num_iter,
        mask=mask,
        num_unknown=mask.sum(1).float(),
        num_start=torch.full((len(mask),), float(mask.shape[1])),
        gumbel=torch.randn(mask.shape, generator=g),
        z=z,
        images=torch.arange(len(mask)),
    )


# ------------------------------------------------------------------------------------------------- untrained heads


@pytest.mark.parametrize("cfg, num_iter", [(1.0, 4), (2.5, 4), (2.5, 7)])
@pytest.mark.parametrize("tau_mode, cfg_mode", [("global", "token"), ("token", "global")])
@pytest.mark.parametrize("mode", INFER_MODES)
def test_untrained_heads_are_the_baseline_bit_for_bit(mode, cfg, num_iter, tau_mode, cfg_mode):
    mar = tiny_mar()
    heads = PolicyHeads(16, tau_mode=tau_mode, cfg_mode=cfg_mode)
    labels, options = torch.tensor([0, 2, -1]), dict(num_iter=num_iter, num_steps=3, seeds=[4, 5, 6], clip=(-1, 1))
    base = generate(mar, labels, build_rules("baseline", cfg=cfg, temperature=0.97), **options)
    assert torch.equal(generate(mar, labels, build_rules(mode, heads, cfg=cfg, temperature=0.97), **options), base)


def test_untrained_heads_keep_a_base_outside_their_bounds():
    """Bounds are widened to contain the hand-made value: w up to 4, but a schedule that goes to 6."""
    mar, heads = tiny_mar(), PolicyHeads(16, tau=(0.9, 1.05), cfg=(0, 4))
    options = dict(num_iter=3, num_steps=2, seeds=[1, 2], clip=(-1, 1))
    rules = [build_rules(m, heads, cfg=6.0, temperature=1.5) for m in ("baseline", "both")]
    a, b = (generate(mar, torch.tensor([0, 1]), r, **options) for r in rules)
    assert torch.equal(a, b)


@pytest.mark.parametrize("mode", ["policy", "guidance", "both"])
def test_trained_heads_change_the_images(mode):
    mar, heads = tiny_mar(), trained()
    options = dict(num_iter=4, num_steps=3, seeds=[4, 5], clip=(-1, 1))
    base = generate(mar, torch.tensor([0, 2]), build_rules("baseline", cfg=2.0), **options)
    assert not torch.equal(generate(mar, torch.tensor([0, 2]), build_rules(mode, heads, cfg=2.0), **options), base)


def test_learned_heads_generate_every_token_once_and_ragged_equals_alone():
    """Images choose different k, so they see different numbers of tokens; each must be what it is alone."""
    mar, heads = tiny_mar(), trained(scale=0.2)
    labels, seeds = torch.tensor([0, 1, 2, -1]), [3, 1, 4, 15]
    for num_iter in (1, 3, 70):
        revealed, sizes = torch.zeros(4, 64, dtype=torch.long), []

        def count(step, rows, *_, revealed=revealed, sizes=sizes):
            revealed[rows[:, 0], rows[:, 1]] += 1
            sizes.append(torch.bincount(rows[:, 0], minlength=4))

        options = dict(num_iter=num_iter, num_steps=2, clip=(-1, 1))
        rules = build_rules("both", heads, cfg=2.0)
        together = generate(mar, labels, rules, seeds=seeds, callback=count, **options)
        assert (revealed == 1).all() and len(sizes) <= num_iter
        if num_iter == 3:
            assert len({tuple(s.tolist()) for s in torch.stack(sizes).T}) > 1  # the images do differ
        for i in range(4):
            alone = generate(mar, labels[i : i + 1], rules, seeds=seeds[i : i + 1], **options)
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)


def test_order_noise_zero_ranks_by_logits_alone():
    mar, heads = tiny_mar(), trained(learn=("order",))
    orders = []
    for seeds in ([1], [2]):
        first = {}
        generate(
            mar,
            torch.tensor([1]),
            build_rules("baseline", heads, order="learned", order_noise=0.0),
            num_iter=4,
            num_steps=1,
            seeds=seeds,
            clip=(-1, 1),
            callback=lambda step, rows, *_, first=first: first.setdefault(step, rows[:, 1].tolist()),
        )
        orders.append(first[0])
    assert orders[0] == orders[1]  # nothing is known at the first step, so the logits are the same, whatever the seed


@pytest.mark.parametrize("missing", HEADS)
def test_a_mode_without_its_head_is_one_clear_error(missing):
    heads = PolicyHeads(16, learn=[name for name in HEADS if name != missing])
    with pytest.raises(ValueError, match=f"learned {missing} head.*--learn {missing}"):
        build_rules("both", heads)
    names = {"order": "random", "group": "cosine", "tau_schedule": "constant", "cfg_schedule": "linear"}
    key = next(k for k in names if k.startswith(missing))
    build_rules("both", heads, **{key: names[key]})  # with that cell hand-made it works


@pytest.mark.parametrize(
    "options",
    [
        dict(learn=("x",)),
        dict(tau_mode="x"),
        dict(rho=(0.5, 0.1)),
        dict(rho=(0, 2)),
        dict(tau=(-1, 1)),
        dict(cfg=(3, 1)),
    ],
)
def test_bad_settings_of_heads(options):
    with pytest.raises(ValueError):
        PolicyHeads(16, **options)


@pytest.mark.parametrize("scale", [0.2, 10.0])
@pytest.mark.parametrize("scope", SCOPES)
def test_values_stay_within_bounds_and_have_their_scope(scope, scale):
    heads = trained(scale=scale, tau_mode=scope, cfg_mode=scope)
    mask = torch.rand(5, 64, generator=torch.Generator().manual_seed(1)) < 0.6
    state = state_of(mask, torch.randn(5, 64, 16, generator=torch.Generator().manual_seed(2)))
    tau = heads.temperature(state, torch.ones(5, 1), 2.0)
    w = heads.guidance(state, torch.full((5, 1), 1.5), 2.0)
    k = heads.group_size(state, torch.full((5,), 7.0), 2.0)
    assert tau.shape == w.shape == ((5, 64) if scope == "token" else (5, 1)) and k.shape == (5,)
    assert 0.9 - 1e-6 <= tau.min() and tau.max() <= 1.05 + 1e-6 and -1e-6 <= w.min() and w.max() <= 4 + 1e-6
    assert (k >= 1).all() and (k <= mask.sum(1)).all()
    assert scale > 1 or min(tau.std(), w.std(), k.std()) > 0  # large ones all lie at their bounds


def test_bounded_closed_form():
    base, r = torch.tensor([1.0, 1.0, 5.0]), torch.tensor([100.0, -100.0, 100.0])
    assert bounded(base, r, 0.0, 4.0).tolist() == [4.0, 0.0, 5.0]


def test_heads_see_progress_number_of_steps_and_guidance():
    """The step's numbers must matter (a constant step 0 would leave them out), and they are the true ones."""
    heads = trained()
    z = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(2)).expand(2, -1, -1)
    mask = torch.ones(2, 64, dtype=torch.bool)
    mask[1, :40] = False
    state = state_of(mask, z)
    a, b = heads.logits(state, 2.0)
    assert not torch.allclose(a, b)
    assert not torch.allclose(heads.logits(state, 3.0), heads.logits(state, 2.0))
    assert not torch.allclose(heads.logits(replace(state, num_iter=16), 2.0), heads.logits(state, 2.0))


# ------------------------------------------------------------------------------------------------------ soft top-k


def case(seed=0, batch=6, length=12, dtype=torch.float64):
    rng = np.random.default_rng(seed)
    scores = torch.from_numpy(rng.normal(size=(batch, length))).to(dtype)
    valid = torch.from_numpy(rng.random((batch, length)) < 0.7)
    valid[:, 0] = True
    return scores, valid, rng


@pytest.mark.parametrize("seed", range(5))
def test_soft_topk_becomes_the_hard_one(seed):
    scores, valid, rng = case(seed)
    n = valid.sum(1)
    n[0] += 1 - n[0]  # one image with k = 1
    k = torch.tensor([rng.integers(1, max(m, 2)) for m in n.tolist()], dtype=torch.float64)
    soft, penalty = soft_topk_frac(scores, k, valid, 1e-5)
    for i in range(len(scores)):
        best = scores[i].masked_fill(~valid[i], -math.inf).topk(int(k[i])).indices
        assert soft[i].sum() == pytest.approx(k[i].item()) and soft[i][best].min() > 0.999
    assert penalty < 1e-6 and (soft[~valid] == 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_soft_topk_follows_the_formula(seed):
    scores, valid, rng = case(seed)
    k = torch.tensor([rng.uniform(1, m) for m in valid.sum(1).tolist()], dtype=torch.float64)
    soft, penalty = soft_topk_frac(scores, k, valid, 0.3)
    for i in range(len(scores)):
        s = sorted(scores[i][valid[i]].tolist(), reverse=True)
        m = [None] + [(a + b) / 2 for a, b in itertools.pairwise(s)] + [s[-1] - 0.3]
        whole, f = int(k[i]), float(k[i]) - int(k[i])
        theta = (1 - f) * m[whole] + (f * m[whole + 1] if f else 0)
        expected = torch.sigmoid((scores[i] - theta) / 0.3) * valid[i]
        torch.testing.assert_close(soft[i], expected)
    torch.testing.assert_close(penalty, (soft.sum(1) - k).square().mean())


def test_soft_topk_is_permutation_equivariant():
    scores, valid, _ = case()
    k = torch.full((6,), 1.5, dtype=torch.float64).minimum(valid.sum(1).double())
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    soft, penalty = soft_topk_frac(scores, k, valid, 0.2)
    turned, other = soft_topk_frac(scores[:, order], k, valid[:, order], 0.2)
    torch.testing.assert_close(turned, soft[:, order])
    torch.testing.assert_close(other, penalty)


def test_soft_topk_gradients():
    scores, valid, _ = case(3)
    scores.requires_grad_()
    k = (valid.sum(1).double() * 0.37 + 0.63).clamp(min=1.01).minimum(valid.sum(1) - 0.01).requires_grad_()
    keep = valid.sum(1) > 2
    assert torch.autograd.gradcheck(lambda s, k: soft_topk_frac(s, k, valid, 0.5)[0], (scores, k))
    soft, penalty = soft_topk_frac(scores, k, valid, 0.5)
    (by_k,) = torch.autograd.grad(soft.sum(), k, retain_graph=True)
    assert (by_k[keep] > 0).all()  # a larger k lowers the threshold
    by_scores, by_k = torch.autograd.grad(penalty, (scores, k), allow_unused=True)
    assert by_scores.abs().sum() > 0 and (by_k is None or (by_k == 0).all())


def test_soft_topk_survives_infinite_invalid_scores_and_images_without_valid_tokens():
    scores = torch.tensor([[1.0, -math.inf, 0.5], [0.0, 0.0, 0.0]], requires_grad=True)
    valid = torch.tensor([[True, False, True], [False, False, False]])
    soft, penalty = soft_topk_frac(scores, torch.tensor([1.0, 1.0]), valid, 0.1)
    (soft[valid].sum() + 0.0 * penalty).backward()
    assert soft[valid].isfinite().all() and scores.grad[valid].isfinite().all() and (soft[1] == 0).all()
    with pytest.raises(ValueError, match="0"):
        soft_topk_frac(scores, torch.ones(2), valid, 0.0)


# ---------------------------------------------------------------------------------------------------------- losses


def draws_for(mar, step=0, samples=(1, 2, 3, 4), drop=0.0, per_image=True):
    c = mar.config
    return training_draws(
        0,
        step,
        list(samples),
        seq_len=c.seq_len,
        token_dim=c.token_dim,
        diffusion_batch_mul=2,
        mask_ratio_min=0.3,
        label_drop_prob=drop,
        mask_ratio_per_image=per_image,
        num_iter=(2, 16),
        cfg_max=3.0,
    )


def test_draws_of_the_backbone_are_the_same_with_and_without_heads():
    mar = tiny_mar()
    with_heads = draws_for(mar)
    c = mar.config
    sizes = dict(seq_len=c.seq_len, token_dim=c.token_dim, diffusion_batch_mul=2, mask_ratio_min=0.3)
    without = training_draws(0, 0, [1, 2, 3, 4], **sizes, label_drop_prob=0.0, mask_ratio_per_image=True)
    for name in ("flip", "drop", "mask", "rows", "t", "noise"):
        assert torch.equal(getattr(with_heads, name), getattr(without, name))
    assert without.gumbel is None and with_heads.num_iter.min() >= 2 and with_heads.num_iter.max() <= 16


@pytest.mark.parametrize("num_iter", [1, 2, 5, 16])
def test_training_meets_the_states_that_sampling_meets(num_iter):
    """The unknown counts a cosine schedule visits lead back to its steps, with the same inputs and the same k."""
    mar, heads = tiny_mar(), trained()
    length, n = 64, 64.0
    for step in range(num_iter):
        mask = (torch.arange(length) < n).unsqueeze(0)
        sampling = state_of(mask, torch.zeros(1, length, 16), step, num_iter)
        draws = SimpleNamespace(mask=mask, step=None, num_iter=torch.tensor([num_iter]), gumbel=sampling.gumbel)
        training = training_state(draws, sampling.z)
        assert training.step.tolist() == [step]
        k = sampling.num_unknown if sampling.is_last else GROUPS["cosine"](sampling, RuleOptions())
        assert torch.equal(base_group(training), k)
        a, b = heads.logits(sampling, 2.0), heads.logits(training, torch.tensor([2.0]))
        torch.testing.assert_close(a, b)
        w = build_rules("baseline", cfg=2.0)(sampling).cfg[:, :1]
        options = RuleOptions(cfg=torch.tensor([[2.0]]))
        torch.testing.assert_close(CFGS["linear"](training, training.num_unknown - k, options), w)
        n -= float(k)
    assert n == 0 and mar is not None


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
    torch.testing.assert_close(guidance_loss(w, eps_c, eps_u, noise, keep).detach(), naive)
    at = [guidance_loss(torch.full((50,), float(best) + d), eps_c, eps_u, noise, keep) for d in (-0.1, 0.0, 0.1)]
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
    done = comparable(loss, t)
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
    """The part that a parameter of TrainingLoss belongs to."""
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
    draws = draws_for(mar)
    tokens = torch.rand(4, 64, 1, generator=torch.Generator().manual_seed(3)) * 2 - 1
    labels = torch.tensor([0, 1, 2, -1])

    def gradients(**weights):
        weights = dict.fromkeys(LOSSES.values(), 0.0) | weights
        module = TrainingLoss(mar, heads, HeadLossConfig(**weights)).train()
        found = module(tokens, labels, draws, float(len(draws.rows)))["loss"]
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
    draws = draws_for(mar)
    tokens = torch.rand(4, 64, 1, generator=torch.Generator().manual_seed(3)) * 2 - 1
    module = TrainingLoss(mar, heads)
    assert module(tokens, torch.full((4,), -1), draws, 10.0)["cfg"] == 0
    assert module(tokens, torch.tensor([0, 1, 2, 0]), draws, 10.0)["cfg"] > 0


def test_the_unconditional_pass_is_made_for_the_guidance_head_only(monkeypatch):
    mar = tiny_mar()
    calls = []
    encode_decode = mar.encode_decode
    monkeypatch.setattr(mar, "encode_decode", lambda *a, **k: calls.append(1) or encode_decode(*a, **k))
    draws = draws_for(mar)
    tokens = torch.zeros(4, 64, 1)
    for learn, expected in ((("order", "group", "tau"), 1), (("cfg",), 2)):
        calls.clear()
        TrainingLoss(mar, trained(learn=learn))(tokens, torch.zeros(4, dtype=torch.long), draws, 10.0)
        assert len(calls) == expected


def test_frozen_parts_stay_in_eval_mode():
    mar = tiny_mar(proj_dropout=0.1)
    for name, p in mar.named_parameters():
        p.requires_grad_(name.startswith("diffloss."))
    module = TrainingLoss(mar, PolicyHeads(16)).train()
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
