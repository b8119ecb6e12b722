"""MAR over ids: every rule, batches, editing, the order confidence, gradients by the score function."""

import itertools
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from heads.orders import ORDERS
from heads.policy import build_rules
from heads.schedules import CFGS, GROUPS, TAUS
from models.mar import MAR, MARConfig
from sampling.loop import decode, generate
from tests.helpers import tiny_mar
from tests.helpers_ids import ENTRIES, tiny_ids
from training.objectives.draws import DrawSettings, training_draws
from training.objectives.token import Batch, TokenObjective

LABELS, SEEDS, LENGTH = torch.tensor([0, 3, -1, 1]), [5, 6, 7, 8], 16


@pytest.fixture(scope="module")
def mar():
    return tiny_ids()


def recorded(mar, rules, num_iter=4, **options):
    """(ids (B, h, w), how many times each token was drawn (B, L), evaluations) of a run."""
    times, evals = torch.zeros(len(LABELS), LENGTH, dtype=torch.long), Counter()

    def count(step, rows, plan, tokens):
        times[rows[:, 0], rows[:, 1]] += 1
        assert plan.select.sum() == len(rows)

    ids = generate(mar, LABELS, rules, num_iter, seeds=SEEDS, callback=count, evals=evals, **options)
    return ids, times, evals


@pytest.mark.parametrize("order", [*ORDERS, "confidence"])
def test_every_rule_draws_each_token_once(mar, order):
    names = list(itertools.zip_longest(GROUPS, TAUS, CFGS))
    for group, tau, cfg in names:
        if "schedule" in (group, tau, cfg):
            continue
        rules = build_rules(
            "baseline", order=order, group=group, tau_schedule=tau, cfg_schedule=cfg, cfg=2.0, temperature=0.8
        )
        ids, times, _ = recorded(mar, rules)
        assert ids.shape == (4, 4, 4) and ids.dtype == torch.long and 0 <= ids.min() and ids.max() < ENTRIES
        assert times.eq(1).all()


@pytest.mark.parametrize("order", ["random", "confidence"])
def test_images_do_not_depend_on_their_batch(mar, order):
    rules = build_rules("baseline", order=order, cfg=2.0)
    together = generate(mar, LABELS, rules, 4, seeds=SEEDS, top_k=9, top_p=0.95)
    for i, (label, seed) in enumerate(zip(LABELS, SEEDS)):
        assert generate(mar, label[None], rules, 4, seeds=[seed], top_k=9, top_p=0.95).equal(together[i : i + 1])


def test_a_scale_of_one_runs_no_second_half(mar):
    plain, _, evals = recorded(mar, build_rules("baseline"))
    same, *_ = recorded(mar, replace(build_rules("baseline"), cfg=lambda state, after: torch.ones(len(state.mask), 1)))
    assert plain.equal(same) and evals["mar"] == 4 * 4 and evals["mlp"] == 4 * LENGTH
    guided, _, evals = recorded(mar, build_rules("baseline", cfg=3.0, cfg_schedule="constant"))
    assert not plain.equal(guided) and evals["mlp"] == 2 * 4 * LENGTH


def test_as_many_steps_as_tokens_reveal_one_a_step(mar):
    sizes = []
    generate(
        mar,
        LABELS[:1],
        build_rules("baseline"),
        LENGTH,
        seeds=[1],
        callback=lambda s, rows, *_: sizes.append(len(rows)),
    )
    assert sizes == [1] * LENGTH


@pytest.mark.parametrize("order", ["random", "confidence"])
def test_known_ids_stay(mar, order):
    known = torch.randint(ENTRIES, (4, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.rand(4, LENGTH, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[1] = False
    ids, times, _ = recorded(mar, build_rules("baseline", order=order, cfg=1.5), tokens=known, mask=mask)
    assert ids.flatten(1)[~mask].equal(known[~mask]) and times.equal(mask.long())


def test_ids_under_the_mask_are_not_looked_at(mar):
    known = torch.randint(ENTRIES, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(LENGTH).expand(2, -1) % 3 > 0
    other = torch.where(mask, (known + 1) % ENTRIES, known)
    with torch.no_grad():
        assert mar.encode_decode(known, mask, LABELS[:2]).equal(mar.encode_decode(other, mask, LABELS[:2]))
        assert not mar.encode_decode((known + 1) % ENTRIES, mask).equal(mar.encode_decode(known, mask))


def test_stored_keys_and_values_do_not_change_much(mar):
    """With --refresh_every the ids of a step without a whole pass are near the exact ones; both are whole pictures."""
    rules = build_rules("baseline", cfg=1.5)
    ids, times, evals = recorded(mar, rules, num_iter=6, refresh_every=3)
    assert times.eq(1).all() and evals["mar"] < recorded(mar, rules, num_iter=6)[2]["mar"]


@torch.no_grad()
def test_the_confidence_order_keeps_the_surest(mar):
    """Without noise, at the first step: the tokens kept have the largest log p of all that were drawn."""
    seen = []
    rules = build_rules("baseline", order="confidence", confidence_noise=0.0, group="constant", temperature=0.7)

    def listen(step, rows, plan, tokens):
        if step == 0:
            seen.append((rows, tokens.clone()))

    generate(mar, LABELS[:1], rules, 4, seeds=[1], callback=listen)
    (rows, tokens), *_ = seen
    assert len(rows) == 4
    z = mar.encode_decode(torch.zeros(1, LENGTH, dtype=torch.long), torch.ones(1, LENGTH).bool(), LABELS[:1])[0]
    sampler = mar.token_head.sampler()
    g = torch.Generator().manual_seed(1)
    torch.empty(LENGTH).exponential_(generator=g)  # of the random order
    every = torch.stack([torch.zeros(LENGTH, dtype=torch.long), torch.arange(LENGTH)], dim=1)
    drawn = sampler.draw(z, None, 1.0, 0.7, sampler.noise([g], every, 1), 1)
    log_prob = sampler.log_prob(drawn, z, None, 1.0, 0.7)
    assert sorted(rows[:, 1].tolist()) == sorted(log_prob.topk(4).indices.tolist())
    assert tokens[0, rows[:, 1]].equal(drawn[rows[:, 1]])


def test_the_confidence_order_is_refused_for_a_diffusion_loss():
    with pytest.raises(ValueError, match="--order confidence needs the probability"):
        generate(tiny_mar(), torch.tensor([0]), build_rules("baseline", order="confidence"), 2, 2, seeds=[1])


@pytest.mark.parametrize("order, recompute", [("random", False), ("random", True), ("confidence", False)])
def test_log_p_of_a_picture_has_the_gradient_of_tau_and_w(mar, order, recompute):
    """The plan's log_prob, summed over steps and images, against difference quotients."""
    values = torch.tensor([0.8, 1.6], requires_grad=True)

    def total(tau, w):
        rules = build_rules("baseline", order=order)
        rules = replace(
            rules,
            tau=lambda state: tau.expand(len(state.mask), 1),
            cfg=lambda state, after: w.expand(len(state.mask), 1),
        )
        sums = []

        def listen(step, rows, plan, tokens):
            sums.append(plan.log_prob.sum())

        decode(mar, LABELS, rules, 3, seeds=SEEDS, callback=listen, recompute=recompute)
        return torch.stack(sums).sum()

    for parameter in mar.parameters():
        parameter.requires_grad_(False)
    whole = total(*values)
    gradient = torch.autograd.grad(whole, values)[0]
    for i, step in enumerate((1e-4, 1e-4)):  # so small that no other id is drawn
        ends = []
        for sign in (1, -1):
            moved = values.detach().clone()
            moved[i] += sign * step
            ends.append(total(*moved.requires_grad_()).detach().double())
        assert abs((ends[0] - ends[1]).item() / (2 * step) - gradient[i].item()) < 0.15 * max(
            1, abs(gradient[i].item())
        )


def test_it_learns_ids_and_the_published_names_stay():
    config = tiny_ids().config
    mar = MAR(config)
    assert {"token_emb.weight", "celoss.proj.weight", "celoss.proj.bias"} < set(mar.state_dict())
    assert not [name for name in mar.state_dict() if name.startswith(("diffloss", "z_proj."))]
    z = torch.randn(2, 3, mar.width)
    assert mar.head_logits(z).shape == (2, 3, ENTRIES)
    with torch.device("meta"):
        large = MAR(MARConfig(loss="ce", vocab_size=16384))
    count = sum(p.numel() for p in large.token_head.parameters())
    assert count == 1024 * 16384 + 16384 and large.token_emb.weight.shape == (16384, 1024)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(loss="mse"), "unknown loss 'mse'; valid: diffusion, ce"),
        (dict(patch_size=2), "--patch_size 2 must be 1 with --loss ce"),
        (dict(loss="diffusion"), "--vocab_size 16 has no meaning with --loss diffusion"),
        (dict(vocab_size=None), "--loss ce needs vocab_size"),
    ],
)
def test_configurations_that_contradict_themselves_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        tiny_ids(**changes)


def test_the_first_loss_is_ln_v():
    mar = tiny_ids()
    torch.nn.init.zeros_(mar.celoss.proj.weight)
    torch.nn.init.zeros_(mar.celoss.proj.bias)
    draws = training_draws(0, 0, [0, 1, 2, 3], mar.token_head, DrawSettings(LENGTH, 0.7, 0.1))
    batch = Batch(torch.randint(ENTRIES, (4, LENGTH)), LABELS, draws)
    terms = TokenObjective(mar)(batch, batch.num_targets)
    assert terms["loss"].item() == terms["ce"].item() == pytest.approx(math.log(ENTRIES), rel=1e-6)
