"""The sampling loop and the hand-made rules: what holds for every combination, and each rule against its formula."""

import math
from dataclasses import replace
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch
from scipy.stats import chi2

import engine_mar
from engine_mar import generate
from heads.policy import INFER_MODES, build_rules
from heads.rules import CFGS, GROUPS, ORDERS, TAUS, RuleOptions, StepState, hard_topk
from tests.helpers import tiny_mar

SIDE, STEPS, BATCH = 3, 5, 3
LENGTH = SIDE**2
LABELS = torch.tensor([0, 2, -1])
SEEDS = [11, 12, 13]


@pytest.fixture(scope="module")
def mar():
    return tiny_mar(img_size=SIDE)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


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


# ------------------------------------------------------------------------------------- invariants of the whole loop

ITERATIONS = (1, 4, LENGTH, LENGTH + 3)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("group", GROUPS)
def test_every_combination_decodes_each_token_once(mar, order, group):
    for i, (tau, cfg) in enumerate(product(TAUS, CFGS)):
        rules = rules_of(
            order=order,
            group=group,
            tau_schedule=tau,
            cfg_schedule=cfg,
            cfg=2.0,
            temperature=0.9,
            cfg_interval="0.2,0.8",
        )
        num_iter = ITERATIONS[i % len(ITERATIONS)]
        tokens, steps = recorded(mar, rules, num_iter)
        check_decode(steps, torch.ones(BATCH, LENGTH, dtype=torch.bool), num_iter)
        assert (tokens != 0).all()
        assert len(steps) == min(num_iter, LENGTH)


@pytest.mark.parametrize("num_iter", [1, 2, LENGTH])
def test_editing_keeps_known_tokens(mar, num_iter):
    """Images with different numbers of known tokens, one of them without any, one complete from the start."""
    known = randn(4, LENGTH, 1, seed=1)
    mask = torch.zeros(4, LENGTH, dtype=torch.bool)
    mask[0, :] = True
    mask[1, 2:5] = True
    mask[3, ::2] = True
    before = known.clone(), mask.clone()
    rules = rules_of(cfg=2.0)
    out, steps = recorded(mar, rules, num_iter, torch.tensor([0, 1, 2, -1]), range(4), tokens=known, mask=mask)
    check_decode(steps, mask, num_iter)
    assert torch.equal(out[~mask], known[~mask])
    assert (out[mask] != known[mask]).all()
    assert torch.equal(known, before[0]) and torch.equal(mask, before[1])  # the caller's tensors are left alone


def test_nothing_to_do(mar):
    known, mask = randn(2, LENGTH, 1), torch.zeros(2, LENGTH, dtype=torch.bool)
    out, steps = recorded(mar, rules_of(), 3, LABELS[:2], SEEDS[:2], tokens=known, mask=mask)
    assert torch.equal(out, known) and steps == []


def test_what_stands_at_unknown_tokens_does_not_matter(mar):
    known, mask = randn(BATCH, LENGTH, 1), torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    mask[0, 1:], mask[1, 3:], mask[2, 7:] = True, True, True
    garbage = torch.where(mask.unsqueeze(-1), 1e4 * randn(BATCH, LENGTH, 1, seed=2), known)
    runs = [run(mar, rules_of(cfg=2.0), 3, tokens=t, mask=mask) for t in (known, garbage)]
    torch.testing.assert_close(*runs, rtol=1e-4, atol=1e-5)


def test_callback_sees_the_plan_of_unfinished_images_and_the_tokens(mar):
    mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    mask[1, 1:] = False  # finished after the first step
    seen = []

    def callback(step, rows, plan, tokens):
        images = rows[:, 0].unique()
        assert plan.select.shape == plan.tau.shape == plan.cfg.shape == (len(images), LENGTH)
        assert torch.equal(
            plan.select.nonzero(), torch.stack([torch.searchsorted(images, rows[:, 0].contiguous()), rows[:, 1]], 1)
        )
        assert (tokens[rows[:, 0], rows[:, 1]] != 0).all()
        seen.append(images.tolist())

    zeros = torch.zeros(BATCH, LENGTH, 1)
    run(mar, rules_of(), 3, callback=callback, tokens=zeros, mask=mask)
    assert seen == [[0, 1, 2], [0, 2], [0, 2]]


def test_noise_fn_replaces_the_draws(mar):
    _, steps = recorded(mar, rules_of(), 4)
    asked = []

    def noise_fn(step, rows):
        asked.append((step, rows))
        return (rows[:, 0] + 1.0).reshape(1, -1, 1).expand(STEPS + 1, -1, 1)

    out = run(mar, rules_of(), 4, noise_fn=noise_fn)
    assert [s for s, _ in asked] == [s for s, _ in steps]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(asked, steps))
    assert torch.equal(out, run(mar, rules_of(), 4, noise_fn=noise_fn))
    assert not torch.allclose(out, run(mar, rules_of(), 4), atol=1e-3)


# --------------------------------------------------------------------------------------- ragged batches, batch size


@torch.no_grad()
@pytest.mark.parametrize("counts", [(0, 1, 5), (9, 0, 4), (8, 8, 2)])
def test_ragged_encode_decode_equals_each_image_alone(mar, counts):
    tokens, rank = randn(BATCH, LENGTH, 1), randn(BATCH, LENGTH, seed=1).argsort(1)
    mask = rank >= torch.tensor(counts).unsqueeze(1)
    garbage = torch.where(mask.unsqueeze(-1), 1e3 * randn(BATCH, LENGTH, 1, seed=2), tokens)
    for labels in (LABELS, None):
        expected = torch.cat(
            [
                mar.encode_decode(tokens[i, None], mask[i, None], None if labels is None else labels[i, None])
                for i in range(3)
            ]
        )
        for content in (tokens, garbage):
            z = mar.encode_decode(content, mask, labels)
            torch.testing.assert_close(z, expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(mar.encode_decode(content, mask, labels, list(counts)), z, rtol=0, atol=0)
    assert (expected[0] - expected[1]).abs().max() > 0.1  # the images do differ


@torch.no_grad()
def test_encode_decode_labels(mar):
    """−1 is None; and a visible token, the label and the position of a token all matter."""
    tokens, mask = randn(1, LENGTH, 1), torch.arange(LENGTH).unsqueeze(0) >= 4
    z = [
        mar.encode_decode(tokens, mask, None if label is None else torch.tensor([label])) for label in (None, -1, 0, 1)
    ]
    assert torch.equal(z[0], z[1]) and not torch.allclose(z[1], z[2]) and not torch.allclose(z[2], z[3])
    assert not torch.allclose(mar.encode_decode(tokens.flip(1), mask), z[0])


def ragged_rules(sizes, **kwargs):
    """Baseline rules whose group size is sizes[image]."""
    return replace(rules_of(**kwargs), group=lambda state: sizes[state.images])


def recorded_noise(monkeypatch):
    """A list to which every (images, noise) that generate() draws is added."""
    drawn, original = [], engine_mar._draw_noise

    def draw(generators, rows, *rest):
        noise = original(generators, rows, *rest)
        drawn.append((rows, noise))
        return noise

    monkeypatch.setattr(engine_mar, "_draw_noise", draw)
    return drawn


def by_image(drawn, first):
    """{image: [(positions, noise) of each step]}, images counted from first."""
    result = {}
    for rows, noise in drawn:
        for i in rows[:, 0].unique().tolist():
            mine = rows[:, 0] == i
            result.setdefault(first + i, []).append((rows[mine, 1], noise[:, mine]))
    return result


@pytest.mark.parametrize("ragged", [False, True])
def test_an_image_does_not_depend_on_its_batch(mar, monkeypatch, ragged):
    """The draws are the same bits in batches of 5, 3 and 1; the tokens agree within rounding."""
    labels, seeds, sizes = (
        torch.tensor([0, 1, 2, -1, 0]),
        [5, 3, 2**32 - 1, 7, 0],
        torch.tensor([1.0, 3.0, 9.0, 2.0, 4.0]),
    )
    drawn = recorded_noise(monkeypatch)
    results = {}
    for batch_size in (5, 3, 1):
        tokens, draws = [], {}
        for start in range(0, 5, batch_size):
            part = slice(start, start + batch_size)
            rules = ragged_rules(sizes[part], cfg=2.0) if ragged else rules_of(cfg=2.0)
            drawn.clear()
            out, steps = recorded(mar, rules, 7, labels[part], seeds[part])
            check_decode(steps, torch.ones(len(out), LENGTH, dtype=torch.bool), 7)
            draws |= by_image(drawn, start)
            tokens.append(out)
        results[batch_size] = torch.cat(tokens), draws
    whole, whole_draws = results.pop(5)
    assert [len(whole_draws[i]) for i in range(5)] == ([7, 3, 1, 5, 3] if ragged else [7] * 5)
    for tokens, draws in results.values():
        torch.testing.assert_close(tokens, whole, rtol=1e-4, atol=1e-4)
        for i, steps in whole_draws.items():
            assert len(draws[i]) == len(steps)
            for (positions, noise), (other_positions, other_noise) in zip(steps, draws[i]):
                assert torch.equal(positions, other_positions) and torch.equal(noise, other_noise)


def test_seeds(mar):
    runs = [run(mar, rules_of(), 3, LABELS[:2], seeds) for seeds in ([1, 2], [1, 2], [1, 3], [2, 1])]
    assert torch.equal(runs[0], runs[1])
    torch.testing.assert_close(runs[2][0], runs[0][0], rtol=1e-4, atol=1e-5)
    for other in runs[2:]:
        assert not torch.allclose(other[1], runs[0][1], atol=1e-2)
    same_label = run(mar, rules_of(), 3, torch.tensor([1, 1]), [1, 2])
    assert not torch.allclose(same_label[0], same_label[1], atol=1e-2)


def test_without_seeds_every_call_is_another(mar):
    first, second = (run(mar, rules_of(), 2, seeds=None) for _ in range(2))
    assert not torch.allclose(first, second, atol=1e-2)


def test_orders_reveal_their_last_entries_first(mar):
    orders = torch.stack([torch.randperm(LENGTH, generator=torch.Generator().manual_seed(i)) for i in range(BATCH)])
    for num_iter in (3, LENGTH):
        steps = recorded(mar, rules_of(), num_iter, orders=orders)[1]
        for i in range(BATCH):
            left = orders[i].tolist()
            for _, rows in steps:
                now = set(rows[rows[:, 0] == i, 1].tolist())
                assert now == set(left[-len(now) :])
                left = left[: -len(now)]
            assert not left


def test_orders_stay_with_their_image_when_others_are_finished(mar):
    """The first image is complete after one step; the third reveals its unknown tokens by its own order."""
    orders = torch.stack([torch.arange(LENGTH), torch.arange(LENGTH), torch.arange(LENGTH).flip(0)])
    mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    mask[0, 1:], mask[2, ::2] = False, False
    _, steps = recorded(mar, rules_of(), LENGTH, orders=orders, tokens=randn(BATCH, LENGTH, 1), mask=mask)
    revealed = [torch.cat([rows[rows[:, 0] == i, 1] for _, rows in steps]).tolist() for i in range(BATCH)]
    assert revealed == [[0], [8, 7, 6, 5, 4, 3, 2, 1, 0], [1, 3, 5, 7]]


# ------------------------------------------------------------------------------------------ what a step costs, modes


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


@pytest.mark.parametrize("num_iter, expected", [(1, [6]), (2, [6, 2]), (4, [6, 5, 3, 2])])
def test_annealed_diffusion_steps(mar, num_iter, expected):
    """6:2 asks for that many draws; the result is that of constant runs where T is theirs."""
    asked, states = [], []

    def noise_fn(step, rows, given=None):
        asked.append(given or expected[step])
        return randn(7, len(rows), 1, seed=step)[: asked[-1] + 1]

    plans = []
    annealed = run(
        mar,
        rules_of(cfg=2.0),
        num_iter,
        num_steps="6:2",
        noise_fn=noise_fn,
        callback=lambda step, rows, plan, tokens: plans.append(plan.num_steps) or states.append((rows, tokens.clone())),
    )
    assert plans == asked == expected and annealed.isfinite().all()
    first = []
    run(
        mar,
        rules_of(cfg=2.0),
        num_iter,
        num_steps="6",
        noise_fn=lambda step, rows: noise_fn(step, rows, 6),
        callback=lambda step, rows, plan, tokens: first.append(tokens.clone()),
    )
    assert torch.equal(states[0][1], first[0])  # the first step has 6 in both
    drawn = run(mar, rules_of(cfg=2.0), num_iter, num_steps="6:2")
    if num_iter == 1:
        assert torch.equal(drawn, run(mar, rules_of(cfg=2.0), 1, num_steps=6))
    with pytest.raises(ValueError, match="'6:0'"):
        run(mar, rules_of(), 2, num_steps="6:0")


def test_a_rule_for_diffusion_steps_replaces_the_hand_made_one(mar):
    rules = replace(rules_of(), num_steps=lambda state: 2 + state.step)
    plans = []
    run(mar, rules, 3, callback=lambda step, rows, plan, tokens: plans.append(plan.num_steps))
    assert plans == [2, 3, 4]


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


class Stop(Exception):
    pass


@pytest.mark.parametrize("training", [True, False])
def test_eval_mode_inside_and_the_old_mode_afterwards(training):
    mar = tiny_mar(img_size=SIDE, attn_dropout=0.5, proj_dropout=0.5).train(training)
    inside = []

    def callback(*_):
        inside.extend(module.training for module in mar.modules())
        if fail:
            raise Stop

    for fail in (False, True):
        with pytest.raises(Stop) if fail else torch.no_grad():
            generate(mar, LABELS, rules_of(), 2, STEPS, SEEDS, callback=callback)
        assert not any(inside) and all(module.training is training for module in mar.modules())
    runs = [generate(mar, LABELS, rules_of(), 2, STEPS, SEEDS) for _ in range(2)]
    assert torch.equal(*runs)  # no dropout
    assert not runs[0].requires_grad


def test_a_part_in_eval_mode_stays_there():
    mar = tiny_mar(img_size=SIDE).train()
    mar.diffloss.eval()  # frozen
    run(mar, rules_of(), 1)
    assert mar.training and not mar.diffloss.training


def test_clip_and_solver_are_passed_on(mar):
    assert run(mar, rules_of(), 2, clip=(-0.1, 0.1)).abs().max() <= 0.1 + 1e-6
    assert run(mar, rules_of(), 2).abs().max() > 0.2
    assert run(mar, rules_of(), 2, clip=None).abs().max() > 3
    with pytest.raises(ValueError, match="euler"):
        run(mar, rules_of(), 2, solver="euler")


def test_patches_and_channels():
    mar = tiny_mar(img_size=8, patch_size=2, vae_stride=2, vae_embed_dim=3)  # 2×2 tokens of 12 numbers
    assert generate(mar, LABELS, rules_of(cfg=2.0), 2, STEPS, SEEDS).shape == (3, 3, 4, 4)
    latents = randn(2, 3, 4, 4)
    tokens = mar.patchify(latents)
    assert tokens.shape == (2, 4, 12) and torch.equal(mar.unpatchify(tokens), latents)
    # token 1 is the upper right patch; channel first, then row and column
    assert torch.equal(tokens[0, 1], latents[0, :, 0:2, 2:4].flatten())
    mask = torch.tensor([[True, False, True, True]] * 2)
    edited = generate(mar, LABELS[:2], rules_of(), 2, STEPS, tokens=tokens, mask=mask)
    assert torch.equal(edited[:, :, 0:2, 2:4], latents[:, :, 0:2, 2:4])


def test_bad_input(mar):
    def raises(message, labels=LABELS, num_iter=2, seeds=None, **kwargs):
        with pytest.raises(ValueError, match=message):
            run(mar, rules_of(), num_iter, labels, seeds, **kwargs)

    tokens, mask = torch.zeros(BATCH, LENGTH, 1), torch.ones(BATCH, LENGTH, dtype=torch.bool)
    for label in (3, -2):
        raises(f"labels.*2, got {label}", labels=torch.tensor([0, label, 1]))
    for num_iter in (0, -1):
        raises(f"num_iter.*got {num_iter}", num_iter=num_iter)
    for seeds in ([1], [1, 2, 3, 4], []):
        raises("seeds", seeds=seeds)
    for half in (dict(tokens=tokens), dict(mask=mask)):
        raises("together", **half)
    for wrong in (dict(tokens=tokens[:2], mask=mask), dict(tokens=tokens, mask=mask[:, 1:])):
        raises("mask must be", **wrong)
    raises("noise", noise_fn=lambda step, rows: torch.zeros(STEPS, len(rows), 1))


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


# ------------------------------------------------------------------------------------------------------- tau and cfg


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


@pytest.mark.parametrize("name", CFGS)
def test_every_cfg_schedule_is_exactly_1_at_w_1(name):
    rules = rules_of(cfg=1.0, cfg_schedule=name)
    for step in range(4):
        assert (rules(state([5, 16], step, num_start=[16, 16])).cfg == 1.0).all()


def test_tau_schedules():
    options = dict(temperature=1.2, temperature_end=0.8)
    constant, linear = (rules_of(tau_schedule=name, **options) for name in TAUS)
    assert list(TAUS) == ["constant", "linear"]
    for step, expected in enumerate((1.1, 1.0, 0.9, 0.8)):
        current = state([4, 3], step)
        for plan, value in ((constant(current), 1.2), (linear(current), expected)):
            assert plan.tau.shape == (2, 16) and plan.tau.dtype == torch.float32
            np.testing.assert_allclose(plan.tau, value, rtol=1e-6)


# -------------------------------------------------------------------------------------------------------- order rules


def ranking(name, side, seed=0, batch=1):
    """Positions (B, L), first revealed first."""
    scores = ORDERS[name](state([side**2] * batch, length=side**2, seed=seed))
    assert scores.shape == (batch, side**2) and scores.isfinite().all()
    assert all(len(row.unique()) == side**2 for row in scores)  # no ties: a total order
    return scores.argsort(dim=1, descending=True)


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("side", [1, 2, 3, 7, 16])
def test_orders_rank_every_token_once(name, side):
    order = ranking(name, side, batch=3)
    assert torch.equal(order.sort(dim=1)[0], torch.arange(side**2).expand(3, -1))


@pytest.mark.parametrize("name", ORDERS)
def test_which_orders_are_random(name):
    first, other = ranking(name, 4, seed=1, batch=2), ranking(name, 4, seed=2, batch=2)
    fixed = name in ("raster", "halton")
    assert torch.equal(first, other) is fixed and torch.equal(first[0], first[1]) is fixed
    assert torch.equal(first, ranking(name, 4, seed=1, batch=2))


def test_raster_goes_row_by_row(mar):
    assert torch.equal(ranking("raster", 5)[0], torch.arange(25))
    _, steps = recorded(mar, rules_of(order="raster"), LENGTH)
    assert [rows[:, 1].tolist() for _, rows in steps] == [[i] * BATCH for i in range(LENGTH)]


@pytest.mark.parametrize("side", [2, 3, 8])
def test_center_goes_outwards(side):
    order = ranking("center", side)[0]
    middle = (side - 1) / 2
    distance = np.hypot(order // side - middle, order % side - middle)
    assert (np.diff(distance) >= -1e-6).all()


@pytest.mark.parametrize("side", [2, 3, 8, 16])
def test_multiscale_goes_from_coarse_to_fine(side):
    """Every grid of stride 2^k through the corner is complete before a point off it comes."""
    order = ranking("multiscale", side)[0]
    row, column = order // side, order % side
    stride = 1
    while stride < 2 * side:
        size = math.ceil(side / stride) ** 2
        assert ((row[:size] % stride == 0) & (column[:size] % stride == 0)).all()
        stride *= 2


@pytest.mark.parametrize("side", [3, 4, 6, 9, 12, 16])
def test_halton_follows_the_sequence(side):
    """Cells by the first point of the Halton sequence (bases 2 and 3, from point 1) in them, in exact arithmetic."""

    def radical_inverse(i, base):
        value, digit = Fraction(0), Fraction(1, base)
        while i:
            value, i, digit = value + i % base * digit, i // base, digit / base
        return value

    expected, i = {}, 1
    while len(expected) < side**2:
        cell = int(radical_inverse(i, 2) * side) * side + int(radical_inverse(i, 3) * side)
        expected.setdefault(cell, None)
        i += 1
    assert ranking("halton", side)[0].tolist() == list(expected)


def test_halton_spreads_out():
    """On 12×12, the first 6 cells lie in different cells of a 2×3 partition, the first 12 of a 4×3 one."""
    order = ranking("halton", 12)[0]
    for rows, columns in ((2, 3), (4, 3)):
        first = order[: rows * columns]
        coarse = (first // 12 // (12 // rows)) * columns + first % 12 // (12 // columns)
        assert len(coarse.unique()) == rows * columns


def test_random_order_is_uniform_over_positions_and_pairs(mar):
    """Chi-square of the first position, and of the first two together, over images with consecutive seeds."""
    num_images, seen = 9 * 8 * 40, []

    def callback(step, rows, plan, tokens):
        assert len(rows) == num_images
        seen.append(rows[:, 1])
        if step == 1:
            raise Stop

    with pytest.raises(Stop):
        generate(
            mar, torch.zeros(num_images, dtype=torch.long), rules_of(), LENGTH, 1, range(num_images), callback=callback
        )
    pairs = torch.bincount(seen[0] * LENGTH + seen[1], minlength=LENGTH**2).reshape(LENGTH, LENGTH)
    assert (pairs.diagonal() == 0).all()
    for counts in (pairs.sum(1), pairs.sum(0), pairs[~torch.eye(LENGTH, dtype=torch.bool)]):
        counts = counts.double()
        statistic = ((counts - counts.mean()) ** 2 / counts.mean()).sum().item()
        assert chi2.sf(statistic, len(counts) - 1) > 1e-4


# --------------------------------------------------------------------------------------------------------- hard_topk


@pytest.mark.parametrize("length", [1, 2, 7])
def test_hard_topk_against_a_loop(length):
    """Few distinct scores, so ties abound; −∞ is a score like any other."""
    rng = np.random.default_rng(length)
    scores = rng.choice(np.float32([-math.inf, -1.0, 0.0, 0.5, 3.0]), (300, length))
    valid = rng.random((300, length)) < rng.random((300, 1))
    k = rng.integers(0, valid.sum(1) + 1)
    got = hard_topk(*(torch.from_numpy(x) for x in (scores, k.astype(np.float32), valid)))
    for i in range(300):
        candidates = [j for j in range(length) if valid[i, j]]
        best = sorted(candidates, key=lambda j: (-scores[i, j], j))[: k[i]]
        assert got[i].nonzero().flatten().tolist() == sorted(best)


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
        (dict(mode="policy"), "policy.*order head"),
        (dict(mode="policy", order="random"), "policy.*group head"),
        (dict(mode="guidance"), "guidance.*tau head"),
        (dict(mode="guidance", tau_schedule="constant"), "guidance.*cfg head"),
        (dict(mode="both"), "both.*order head"),
        (dict(order="learned"), "order head"),
        *[(dict(cfg_interval=text), "cfg_interval must be lo,hi.*0 <= lo") for text in ("", "0.5", "0.6,0.2", "a,b")],
        *[
            (dict(cfg_interval=text), "cfg_interval must be lo,hi.*0 <= lo")
            for text in ("-1,0.5", "0,2", "0,nan", "0,1,1")
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
