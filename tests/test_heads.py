"""The learned heads: what they say untrained and trained, and the bounds and scopes of what they say."""

from dataclasses import replace

import pytest
import torch

from heads.forms import FORMS, bounded
from heads.orders import ORDERS
from heads.policy import HEADS, PolicyHeads, build_rules
from heads.schedules import FREE_GROUPS
from sampling.loop import generate
from tests.helpers import tiny_mar
from tests.helpers_heads import OF_LATENTS, SCOPES, state_of, trained


@pytest.mark.parametrize("cfg, num_iter", [(1.0, 4), (2.5, 4), (2.5, 7)])
@pytest.mark.parametrize("tau_mode, cfg_mode", [("global", "token"), ("token", "global")])
@pytest.mark.parametrize("mode", OF_LATENTS)
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


@pytest.mark.parametrize("base", ORDERS)
def test_an_untrained_order_head_gives_the_order_that_it_moves(base):
    state = state_of(torch.rand(5, 64, generator=torch.Generator().manual_seed(1)) < 0.6, torch.zeros(5, 64, 16))
    plans = [
        build_rules("baseline", order=base),
        build_rules("baseline", PolicyHeads(16), order="learned", order_base=base),
    ]
    plain, learned = (rules(state).select for rules in plans)
    assert torch.equal(plain, learned)
    with pytest.raises(ValueError, match="unknown order_base 'x'; valid: random"):
        build_rules("baseline", order_base="x")


@pytest.mark.parametrize("base", FREE_GROUPS)
def test_an_untrained_group_head_gives_the_group_sizes_that_it_moves(base):
    state = state_of(torch.ones(5, 64, dtype=torch.bool), torch.zeros(5, 64, 16))
    for form in FORMS:
        heads = PolicyHeads(16, learn=["group"], form=form)
        plain, learned = (
            build_rules("baseline", group=base),
            build_rules("policy", heads, order="random", group_base=base),
        )
        assert torch.equal(plain(state).select, learned(state).select)
    with pytest.raises(ValueError, match="unknown group_base 'scale'; valid: cosine"):
        build_rules("baseline", group_base="scale")


@pytest.mark.parametrize("missing", HEADS)
def test_a_mode_without_its_head_is_one_clear_error(missing):
    heads = PolicyHeads(16, learn=[name for name in HEADS if name != missing])
    with pytest.raises(ValueError, match=f"learned {missing} head.*--learn {missing}"):
        build_rules("both", heads)
    names = {"order": "random", "group": "cosine", "tau_schedule": "constant", "cfg_schedule": "linear"}
    key = next(k for k in names if k.startswith(missing))
    build_rules("both", heads, **{key: names[key]})  # with that cell hand-made it works


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(learn=("x",)), "unknown head 'x'"),
        (dict(tau_mode="x"), "unknown tau_mode 'x'"),
        (dict(rho=(0.5, 0.1)), "bounds of rho .* got \\(0.5, 0.1\\)"),
        (dict(rho=(0, 2)), "bounds of rho .* <= 1, got \\(0, 2\\)"),
        (dict(tau=(-1, 1)), "bounds of tau .* got \\(-1, 1\\)"),
        (dict(cfg=(3, 1)), "bounds of cfg .* got \\(3, 1\\)"),
    ],
)
def test_bad_settings_of_heads(options, said):
    with pytest.raises(ValueError, match=said):
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
