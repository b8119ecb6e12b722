"""The sampling loop: what holds for every combination of rules, for editing, callbacks, annealed steps and modes."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from heads.orders import ORDERS
from heads.schedules import CFGS, GROUPS, MIN_STEPS, PROFILES, TAUS
from sampling.loop import generate
from tests.helpers import randn, tiny_mar
from tests.helpers_generate import (
    BATCH,
    LABELS,
    LENGTH,
    SCHEDULE,
    SEEDS,
    SIDE,
    STEPS,
    Stop,
    check_decode,
    recorded,
    rules_of,
    run,
)

# ------------------------------------------------------------------------------------- invariants of the whole loop

ITERATIONS = (1, 4, LENGTH, LENGTH + 3)


PAIRS = [(order, "cosine") for order in ORDERS]
PAIRS += [("random", name) for name in GROUPS if name not in ("cosine", "scale")]  # a scale here is all tokens


@pytest.mark.parametrize("order, group", PAIRS)
def test_every_combination_decodes_each_token_once(mar, order, group):
    """All orders and groups, each with every pair of what decides τ, w and its profile; every three occur with some."""
    iterations = [number for number in ITERATIONS if number >= MIN_STEPS.get(group, 1)]
    number, taus = PAIRS.index((order, group)), list(TAUS)
    for i, (cfg, profile) in enumerate(product(CFGS, PROFILES)):
        tau = taus[(i // len(PROFILES) + i + number) % len(taus)]  # a Latin square, another one for each pair of rules
        rules = rules_of(
            order=order,
            group=group,
            tau_schedule=tau,
            cfg_schedule=cfg,
            cfg_profile=profile,
            cfg=2.0,
            temperature=0.9,
            cfg_interval="0.2,0.8",
            cfg_t_interval="0.2,0.8",
            schedule=SCHEDULE,
        )
        num_iter = iterations[i // len(PROFILES) % len(iterations)]
        tokens, steps = recorded(mar, rules, num_iter)
        check_decode(steps, torch.ones(BATCH, LENGTH, dtype=torch.bool), num_iter)
        assert (tokens != 0).all()
        # a share of the tokens, rounded, may leave the last steps without any
        assert len(steps) <= min(num_iter, LENGTH) if group.startswith("step_") else len(steps) == min(num_iter, LENGTH)


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


# ------------------------------------------------------------------------------------ diffusion steps, modes, arguments


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
