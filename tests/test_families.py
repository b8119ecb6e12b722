"""The loop drives families it does not know: causal in random order, next-scale; against a loop without any store."""

import contextlib
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


def scales_of_w(guided):
    """w of each step and image: rising with the step where `guided` says so, (step, image) -> bool, else 1."""
    return lambda step, image: 1.4 + 0.4 * step if guided(step, image) else 1.0


def rule_of(scale):
    """A guidance rule from scale(step, image)."""
    return lambda state, after: torch.tensor([[scale(state.step, i)] for i in state.images.tolist()])


# when guidance acts, by step and image
GUIDED = {
    "always": lambda step, image: True,
    "late": lambda step, image: step >= 2,
    "never": lambda step, image: False,
    "on, off, on": lambda step, image: step != 1,
    "in some images": lambda step, image: (step + image) % 3 != 0,
    "in one image": lambda step, image: image == step % 4,
}


def causal(guided):
    rules = build_rules("baseline", temperature=0.9)
    return Causal(6), replace(rules, group=one_at_a_time, cfg=rule_of(scales_of_w(guided))), 6


def next_scale(guided):
    rules = build_rules("baseline", temperature=0.9)
    return NextScale(len(SCALES)), replace(rules, group=whole_scale, cfg=rule_of(scales_of_w(guided))), 3


def naive(model, guided, num_iter, scale_of, known=None):
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
                group = [p for p in range(length) if scale_of[p] == step and unknown[p]]
            w = scales_of_w(guided)(step, row)
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


@pytest.mark.parametrize("guided", GUIDED)
@torch.no_grad()
def test_a_causal_family_in_random_order(guided):
    """Where guidance joins late, or comes back, the keys without label have holes to fill."""
    model, rules, num_iter = causal(GUIDED[guided])
    made = generate(model, LABELS, rules, num_iter, 1, seeds=SEEDS)
    torch.testing.assert_close(made, naive(model, GUIDED[guided], num_iter, None))


@torch.no_grad()
def test_a_causal_family_keeps_known_tokens():
    model, rules, num_iter = causal(GUIDED["on, off, on"])
    tokens = torch.linspace(-1, 1, 24).reshape(4, 6, 1)
    mask = torch.tensor([[1, 0, 1, 1, 0, 1]]).expand(4, -1).bool()
    made = generate(model, LABELS, rules, num_iter, 1, seeds=SEEDS, tokens=tokens, mask=mask)
    torch.testing.assert_close(made, naive(model, GUIDED["on, off, on"], num_iter, None, known=(tokens, mask)))
    assert torch.equal(made[~mask], tokens[~mask])


@pytest.mark.parametrize("guided", GUIDED)
@torch.no_grad()
def test_a_next_scale_family(guided):
    model, rules, num_iter = next_scale(GUIDED[guided])
    groups = []
    made = generate(
        model, LABELS, rules, num_iter, 1, seeds=SEEDS, callback=lambda s, rows, *_: groups.append(len(rows))
    )
    assert groups == [4 * 1, 4 * 4, 4 * 9]
    torch.testing.assert_close(made, naive(model, GUIDED[guided], num_iter, SCALES.tolist()))


@pytest.mark.parametrize("given", [SCALES == 0, SCALES == 1, (SCALES == 1) | (torch.arange(14) % 3 == 0)])
@torch.no_grad()
def test_a_next_scale_family_keeps_known_tokens(given):
    """Scales of which all or some tokens are given; in the second image none, so that steps differ between images."""
    model, rules, num_iter = next_scale(GUIDED["in some images"])
    tokens = torch.linspace(-1, 1, 4 * 14).reshape(4, 14, 1)
    mask = torch.stack([~given, torch.ones(14).bool(), ~given, ~given])
    made = generate(model, LABELS, rules, num_iter, 1, seeds=SEEDS, tokens=tokens, mask=mask)
    torch.testing.assert_close(made, naive(model, GUIDED["in some images"], num_iter, SCALES.tolist(), (tokens, mask)))
    assert torch.equal(made[~mask], tokens[~mask])


@torch.no_grad()
def test_a_scale_that_is_given_in_all_images_draws_nothing():
    model, rules, num_iter = next_scale(GUIDED["always"])
    tokens, mask = torch.full((4, 14, 1), 0.3), (SCALES != 1).expand(4, -1)
    steps = []
    generate(
        model, LABELS, rules, num_iter, 1, seeds=SEEDS, tokens=tokens, mask=mask, callback=lambda s, *_: steps.append(s)
    )
    assert steps == [0, 2]


@pytest.mark.parametrize("group, sizes", [("cosine", [1, 4, 9]), ("half", [1, 2, 4])])
@torch.no_grad()
def test_rules_see_z_of_the_positions_that_there_are_and_guidance_the_tokens_left(group, sizes):
    """Group rules that ask for more than a scale has get the scale; z of other positions is 0."""
    model, rules, num_iter = next_scale(GUIDED["never"])
    seen = []

    def half(state):
        return (state.mask.sum(dim=1) / 2).ceil()

    def order(state):
        expected, places = model.conditions(LABELS).look(state.step, known["tokens"], None, state.images)
        at = places.unsqueeze(-1).expand(-1, -1, expected.shape[-1])
        assert torch.equal(state.z.gather(1, at), expected)
        assert state.z.count_nonzero() == expected.count_nonzero() > 0
        return state.gumbel

    def cfg(state, after):
        seen.append((state.num_unknown - after).tolist())
        return 1.0

    known = {"tokens": torch.zeros(4, 14, 1)}

    def keep(step, rows, plan, tokens):
        known["tokens"] = tokens

    chosen = build_rules("baseline", group="cosine").group if group == "cosine" else half
    rules = replace(rules, order=order, cfg=cfg, group=chosen)
    enough = group == "cosine"
    with contextlib.nullcontext() if enough else pytest.raises(ValueError, match="num_iter 3 is too small"):
        generate(model, LABELS, rules, num_iter, 1, seeds=SEEDS, callback=keep)
    assert seen[:2] == [[float(size)] * 4 for size in sizes[:2]]


def test_steps_that_do_not_suffice_are_refused():
    model, rules, _ = causal(GUIDED["never"])
    with pytest.raises(ValueError, match="num_iter 3 is too small: 12 tokens are left"):
        generate(model, LABELS, rules, 3, 1, seeds=SEEDS)


@pytest.mark.parametrize("family", [causal, next_scale])
def test_decode_is_differentiable_in_toys(family):
    model, rules, num_iter = family(GUIDED["late"])
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
