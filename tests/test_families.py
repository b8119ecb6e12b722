"""The loop drives families it does not know: causal in random order, next-scale; against a loop without any store."""

from dataclasses import replace

import pytest
import torch

from heads.policy import build_rules
from models.families import FAMILIES, SIZES, family_of
from sampling.loop import decode, generate
from tests.helpers import tiny_mar
from tests.helpers_toys import SCALES, Causal, NextScale, before
from util.rng import generator

LABELS, SEEDS = torch.tensor([0, 2, -1, 1]), [5, 6, 7, 8]


def one_at_a_time(state):
    return torch.ones_like(state.num_unknown)


def whole_scale(state):
    return state.mask.sum(dim=1).float()


def guided_from(step):
    """w, rising; 1 in the steps before this one."""
    return lambda state, after: 1.0 + 0.4 * state.step if state.step >= step else 1.0


def causal(first_guided):
    rules = replace(build_rules("baseline", temperature=0.9), group=one_at_a_time, cfg=guided_from(first_guided))
    return Causal(6), rules, 6


def next_scale(first_guided):
    rules = replace(build_rules("baseline", temperature=0.9), group=whole_scale, cfg=guided_from(first_guided))
    return NextScale(len(SCALES)), rules, 3


def naive(model, rules, num_iter, scale_of, known=None):
    """Tokens (B, L, 1), each from all tokens before it, with noise in the order of drawing; scale_of: of a position."""
    images = []
    for row, (label, seed) in enumerate(zip(LABELS.tolist(), SEEDS)):
        g = generator(seed)
        length = model.config.seq_len
        order = (-torch.empty(length).exponential_(generator=g).log()).argsort(descending=True).tolist()
        tokens, mask = known if known is not None else (torch.zeros(1, length, 1), torch.ones(1, length))
        tokens, unknown = tokens[min(row, len(tokens) - 1)].clone(), mask[min(row, len(mask) - 1)].bool().tolist()
        seen = [p for p in order if not unknown[p]]
        for step in range(num_iter):
            if scale_of is None:
                left = [p for p in order if p not in seen]
                group = left[:1]
            else:
                group = [p for p in range(length) if scale_of[p] == step]
            if not group:
                break
            w = guided_from(rules)(type("S", (), {"step": step}), None)
            noise = torch.randn(len(group), 1, generator=g)
            drawn = []
            for position, draw in zip(group, noise):
                keys = [(p, tokens[p]) for p in seen] if scale_of is None else before(position, tokens)
                z, free = (model.z(which, position, keys) for which in (label % 4, 3))
                z = z if w == 1 else free + w * (z - free)
                drawn.append(torch.tanh(z.sum()) + 0.1 * 0.9 * draw)
            for position, token in zip(group, drawn):
                tokens[position] = token
            seen += group
        images.append(tokens)
    return torch.stack(images)


@pytest.mark.parametrize("first_guided", [0, 1, 3, 99])
@torch.no_grad()
def test_a_causal_family_in_random_order(first_guided):
    """99: never guided; 3: the unconditional half joins late, and its keys with it."""
    model, rules, num_iter = causal(first_guided)
    made = generate(model, LABELS, rules, num_iter, 1, seeds=SEEDS)
    torch.testing.assert_close(made, naive(model, first_guided, num_iter, None))


@torch.no_grad()
def test_a_causal_family_keeps_known_tokens():
    model, rules, num_iter = causal(1)
    tokens = torch.linspace(-1, 1, 24).reshape(4, 6, 1)
    mask = torch.tensor([[1, 0, 1, 1, 0, 1]]).expand(4, -1).bool()
    made = generate(model, LABELS, rules, num_iter, 1, seeds=SEEDS, tokens=tokens, mask=mask)
    torch.testing.assert_close(made, naive(model, 1, num_iter, None, known=(tokens, mask)))
    assert torch.equal(made[~mask], tokens[~mask])


@pytest.mark.parametrize("first_guided", [0, 1, 99])
@torch.no_grad()
def test_a_next_scale_family_without_guidance_in_the_first_group(first_guided):
    model, rules, num_iter = next_scale(first_guided)
    groups = []
    made = generate(
        model, LABELS, rules, num_iter, 1, seeds=SEEDS, callback=lambda s, rows, *_: groups.append(len(rows))
    )
    assert groups == [4 * 1, 4 * 4, 4 * 9]
    torch.testing.assert_close(made, naive(model, first_guided, num_iter, SCALES.tolist()))


def test_steps_that_do_not_suffice_are_refused():
    model, rules, _ = causal(99)
    with pytest.raises(ValueError, match="num_iter 3 is too small: 12 tokens are left"):
        generate(model, LABELS, rules, 3, 1, seeds=SEEDS)


@pytest.mark.parametrize("family", [causal, next_scale])
def test_decode_is_differentiable_in_toys(family):
    model, rules, num_iter = family(1)
    out = decode(model, LABELS, rules, num_iter, 1, seeds=SEEDS).square().sum()
    gradient = torch.autograd.grad(out, model.weight)[0]
    with torch.no_grad():
        direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(1))
        ends = []
        for sign in (1, -1):
            model.weight.add_(sign * 1e-2 * direction)
            ends.append(generate(model, LABELS, rules, num_iter, 1, seeds=SEEDS).square().sum())
            model.weight.sub_(sign * 1e-2 * direction)
    assert (ends[0] - ends[1]) / 2e-2 == pytest.approx(float((gradient * direction).sum()), rel=2e-2)


@pytest.mark.parametrize("refresh_every", [1, 2])
@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpmpp_sde"])
def test_decode_is_differentiable_in_a_mar(refresh_every, solver):
    """In w, τ and the weights, through tokens of earlier steps: against differences."""
    mar = tiny_mar(img_size=3)
    w, tau = (torch.tensor(value, requires_grad=True) for value in (2.0, 0.9))

    def total(w, tau):
        rules = replace(
            build_rules("baseline"),
            tau=lambda state: tau.reshape(1, 1).expand(len(state.mask), 1),
            cfg=lambda state, after: w.reshape(1, 1).expand(len(state.mask), 1),
        )
        options = dict(solver=solver, clip=(-3.0, 3.0), refresh_every=refresh_every)
        return decode(mar, LABELS[:3], rules, 3, 2, seeds=SEEDS[:3], **options).square().sum()

    value = total(w, tau)
    gradients = torch.autograd.grad(value, [w, tau, mar.mask_token])
    assert all(gradient.isfinite().all() and gradient.abs().sum() > 0 for gradient in gradients)
    with torch.no_grad():
        assert total(w, tau) == pytest.approx(float(value), rel=1e-5)
        for i, gradient in enumerate(gradients[:2]):
            ends = [total(w + sign * 1e-2 * (i == 0), tau + sign * 1e-2 * (i == 1)) for sign in (1, -1)]
            assert (ends[0] - ends[1]) / 2e-2 == pytest.approx(float(gradient), rel=5e-2, abs=2e-2)


def test_every_size_names_its_family():
    assert SIZES["mar_base"] == "mar" and family_of({}) == family_of({"family": "mar"}) == "mar"
    assert sum(len(family.sizes) for family in FAMILIES.values()) == len(SIZES)
    with pytest.raises(ValueError, match="family 'rnn'; valid: mar"):
        family_of({"family": "rnn"})
