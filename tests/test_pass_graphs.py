"""Captured passes of MAR and MaskGIL are the eager ones: plain calls on a CPU, under the rules of captures."""

from dataclasses import replace

import pytest
import torch

from heads.policy import build_rules
from sampling.loop import decode, generate
from tests.helpers import tiny_mar
from tests.helpers_causal import tiny_ar, tiny_gpt
from tests.helpers_diffusion import CLIP
from tests.helpers_graphs import CPU, eagerly
from tests.helpers_maskgil import tiny_maskgil
from util.dist import autocast
from util.graphs import release

LABELS, BATCHES = torch.tensor([0, 2, -1]), ([4, 5, 6], [7, 8, 9], [10, 11, 12])
# (model, settings, captures: passes with label at each of 4 steps, 16 of causal models, without label where w ≠ 1)
FAMILIES = {
    "mar": (lambda: tiny_mar(img_size=8), dict(cfg=2.0, cfg_schedule="linear"), 8),
    "mar_ce": (lambda: tiny_mar(img_size=8, loss="ce", vocab_size=16), dict(cfg=2.0, cfg_schedule="constant"), 8),
    # steps 0 and 2 whole, with label and without; what lies between in one pass for both
    "cache": (lambda: tiny_mar(img_size=8), dict(cfg=2.0, cfg_schedule="constant", refresh_every=2), 6),
    "cache, unguided": (lambda: tiny_mar(img_size=8), dict(cfg=1.0, refresh_every=2), 4),
    "cache, no guidance at first": (
        lambda: tiny_mar(img_size=8),
        dict(cfg=2.0, cfg_schedule="interval", cfg_interval="0.3,1", refresh_every=2),
        5,
    ),
    "causal": (lambda: tiny_gpt(), dict(cfg=2.0, cfg_schedule="constant", order="raster", group="one"), 32),
    "causal, random": (lambda: tiny_ar(), dict(cfg=1.0, group="one"), 16),
    "causal, no guidance at first": (
        lambda: tiny_ar(),
        dict(cfg=2.0, cfg_schedule="interval", cfg_interval="0.3,1", group="one"),
        28,
    ),
    "unguided": (lambda: tiny_mar(img_size=8), dict(cfg=1.0), 4),
    # all tokens at every step: two shapes in all
    "maskgil": (tiny_maskgil, dict(cfg=2.0, cfg_schedule="constant", order="confidence", group="step_arccos"), 2),
}


def sample(model, settings, seeds=BATCHES[0], labels=LABELS, call=generate, **given):
    rules = {name: value for name, value in settings.items() if name != "refresh_every"}
    given = dict(refresh_every=settings.get("refresh_every", 1), clip=CLIP) | given
    num_iter = 16 if settings.get("group") == "one" else 4
    return call(model, labels[: len(seeds)], build_rules("baseline", **rules), num_iter, 4, seeds=seeds, **given)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_comes_again_is_captured_and_computes_the_same(name, captured, monkeypatch):
    """Nothing at the first batch, which may be the only one of its size; from the second on every pass is a replay."""
    make, settings, passes = FAMILIES[name]
    model, counts = make(), []
    for seeds, labels in zip(BATCHES, (LABELS, LABELS.flip(0), LABELS.roll(1))):
        made = sample(model, settings, seeds, labels)
        expected = eagerly(monkeypatch, lambda s=seeds, c=labels: sample(model, settings, s, c))
        torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)
        counts.append(len(model.graphs.captures))
    assert counts == ([0, passes, passes] if name != "maskgil" else [passes, passes, passes])
    fewer = sample(model, settings, BATCHES[0][:2])
    torch.testing.assert_close(fewer, eagerly(monkeypatch, lambda: sample(model, settings, BATCHES[0][:2])))
    release(model)
    assert not model.graphs.captures


def replays(model) -> int:
    """How often a pass of the model was one, of the captures that it has."""
    return sum(capture.replays for capture, _ in model.graphs.captures.values())


@pytest.mark.parametrize("name", ["mar", "cache"])
def test_images_with_different_numbers_of_known_tokens(name, captured, monkeypatch):
    model, settings, passes = tiny_mar(img_size=8), *FAMILIES[name][1:]
    length = model.config.seq_len
    known = torch.zeros(3, length, dtype=torch.bool)
    known[1, :3], known[2, : length // 2] = True, True
    given = dict(tokens=torch.rand(3, length, model.config.token_dim), mask=~known)
    expected = eagerly(monkeypatch, lambda: sample(model, settings, **given))
    replayed = []
    for _ in range(3):
        torch.testing.assert_close(sample(model, settings, **given), expected, rtol=1e-5, atol=1e-5)
        replayed.append(replays(model))
    assert len(model.graphs.captures) <= passes and replayed[2] - replayed[1] == passes


@pytest.mark.parametrize("name", ["mar", "cache"])
@pytest.mark.parametrize("even_first", [True, False])
def test_even_and_padded_batches_have_captures_of_their_own(even_first, name, captured, monkeypatch):
    """16 known tokens of each image, and at most 16 of images that differ: tensors of the same shapes."""
    model, settings = tiny_mar(img_size=8), FAMILIES[name][1]
    place, tokens = torch.arange(model.config.seq_len), torch.rand(3, model.config.seq_len, model.config.token_dim)
    batches = [dict(tokens=tokens, mask=place >= torch.tensor(most)[:, None]) for most in ([16] * 3, [3, 9, 16])]
    expected = [eagerly(monkeypatch, lambda b=batch: sample(model, settings, **b)) for batch in batches]
    for i in (0, 0, 1, 1, 0) if even_first else (1, 1, 0, 0, 1):
        torch.testing.assert_close(sample(model, settings, **batches[i]), expected[i], rtol=1e-5, atol=1e-5)
    assert replays(model)


@pytest.mark.parametrize("refresh_every, passes", [(1, 12), (3, 8)])
def test_groups_of_learned_sizes_share_a_few_captures(refresh_every, passes, captured, monkeypatch):
    """Images are padded, whole passes to 0, 16, 24, 32, 48 or 64 tokens, so that batches of other counts find them."""
    model, sizes, replayed = tiny_mar(img_size=8), set(), []
    rules = build_rules("baseline", cfg=2.0, cfg_schedule="constant")
    rules = replace(rules, group=lambda state: (state.num_unknown * state.gumbel[:, 0].sigmoid() / 2).round())

    def count(step, rows, plan, tokens):
        sizes.add(tuple(rows[:, 0].bincount(minlength=3).tolist()))

    for batch in range(12):
        options = dict(num_iter=6, num_steps=2, seeds=[3 * batch, 3 * batch + 1, 3 * batch + 2])
        options |= dict(refresh_every=refresh_every, clip=CLIP)
        before = replays(model)
        made = generate(model, LABELS.roll(batch), rules, **options, callback=count)
        replayed.append(replays(model) - before)
        expected = eagerly(monkeypatch, lambda b=batch, o=options: generate(model, LABELS.roll(b), rules, **o))
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)
    assert len(sizes) > 50, "the groups should vary"
    assert len(model.graphs.captures) <= 2 * 6 and sum(replayed[2:]) > 0.8 * 10 * passes


def test_each_dtype_of_autocast_has_captures_of_its_own(captured):
    model, settings, counts = tiny_mar(img_size=8), FAMILIES["unguided"][1], []
    for dtype in (torch.float32, torch.bfloat16) * 2:
        with autocast(CPU, dtype):
            sample(model, settings)
        counts.append(len(model.graphs.captures))
    assert counts == [0, 0, 4, 8]


def test_passes_with_gradients_are_eager(captured):
    model, settings = tiny_mar(img_size=8), FAMILIES["mar"][1]
    for recompute in (False, True, False):
        sample(model, settings, call=decode, recompute=recompute)
    assert not captured


def features(model):
    """The shape of the keys and values that captured passes have, and the captures."""
    kept = model.graphs.state
    return kept.room, {len(x) for pair in kept.stores.values() for x in pair}, len(model.graphs.captures)


def test_keys_and_values_stay_in_one_place_and_grow_with_guidance(captured, monkeypatch):
    """What comes first without guidance has room for the labels; the captures that read it end when it grows."""
    model, (guided, unguided) = tiny_mar(img_size=8), (FAMILIES[name][1] for name in ("cache", "cache, unguided"))
    seen = []
    for settings in (unguided, unguided, guided, guided, unguided, unguided):
        made = sample(model, settings)
        seen.append(features(model))
        expected = eagerly(monkeypatch, lambda s=settings: sample(model, s))
        torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)
    assert seen[1] == (3, {3}, 4) and [room for room, *_ in seen] == [3, 3, 6, 6, 6, 6]
    assert all(sizes == {room} for room, sizes, _ in seen)
    kept = model.graphs.state
    sample(model, guided, BATCHES[0][:2])
    assert model.graphs.state is not kept and features(model) == (4, {4}, 0)


def test_of_two_batches_that_take_turns_the_second_has_its_own(captured, monkeypatch):
    model, images = tiny_mar(img_size=8), torch.arange(3)
    length = model.config.seq_len
    tokens = torch.rand(3, length, model.config.token_dim, generator=torch.Generator().manual_seed(0))

    def looks(turns):
        both = [model.conditions(labels, refresh_every=3) for labels in (LABELS, LABELS.flip(0))]
        steps, looked = [0, 0], [[], []]
        for which in turns:
            step, conditions = steps[which], both[which]
            unknown = torch.arange(length).expand(3, -1) >= 2 * step
            conditions.look(step, tokens, unknown, images)
            rows = unknown.nonzero()
            looked[which] += conditions.at(step, tokens, unknown, rows, torch.arange(len(rows)))
            steps[which] += 1
        return looked, [conditions.static is not None for conditions in both]

    turns = [0, 1, 1, 0, 0, 1, 0, 1]
    with torch.no_grad():
        expected, none = eagerly(monkeypatch, lambda: looks(turns))
        for _ in range(3):
            made, own = looks(turns)
            assert own == [True, False]
            for here, there in zip(sum(made, []), sum(expected, [])):
                torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-5)
    assert none == [False, False] and captured


def test_what_an_earlier_batch_left_does_not_matter(captured, monkeypatch):
    """Not even where it was not finite: what is masked is multiplied by 0."""
    model, settings = tiny_mar(img_size=8), FAMILIES["cache"][1]
    expected = eagerly(monkeypatch, lambda: sample(model, settings))
    for _ in range(3):
        torch.testing.assert_close(sample(model, settings), expected, rtol=1e-5, atol=1e-5)
        for pair in model.graphs.state.stores.values():
            for kept in pair:
                kept.fill_(torch.nan)


@pytest.mark.parametrize("name", ("mar", "cache", "causal", "causal, random", "maskgil"))
def test_what_was_captured_before_parts_are_compiled_is_dropped(name, captured, monkeypatch):
    """Else it would be replayed in place of them."""
    make, settings, _ = FAMILIES[name]
    model = make()
    for seeds in BATCHES:
        sample(model, settings, seeds)
    some = [module.graphs for module in (model, model.token_head) if hasattr(module, "graphs")]
    assert all(graphs.captures for graphs in some)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, dynamic: None)
    model.compile_parts()
    assert not any(graphs.captures for graphs in some)
