"""Captured passes of scales are those without: plain calls on a CPU, under the rules of captures."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from heads.policy import build_rules
from models.next_scale import NextScaleConditions
from models.tokenizers.multiscale_vq import SCALES as PUBLISHED
from sampling.loop import decode, generate
from tests.helpers_graphs import CPU, Fails, eagerly
from tests.helpers_var import tokenizer as scales_tokenizer
from tests.test_var import tiny as tiny_var
from util import graphs
from util.dist import autocast
from util.graphs import release

LABELS, SEEDS = torch.tensor([0, 3, -1]), [4, 5, 6]


def scales(model, schedule="ramp", labels=LABELS, seeds=SEEDS, **options):
    rules = build_rules("baseline", order="raster", group="scale", cfg=2.5, cfg_schedule=schedule, cfg_interval="0.2,1")
    return generate(model, labels, rules, seeds=seeds, tokenizer=scales_tokenizer(), **options)


@pytest.mark.parametrize("block", ["l2", "plain_shared"])
@pytest.mark.parametrize("schedule, passes", [("constant", 8), ("ramp", 7), ("interval", 6)])
def test_scales_are_those_of_the_eager_passes_and_each_is_one_capture(schedule, passes, block, captured, monkeypatch):
    """Four with label, the others without, of which the first catches up; later batches capture nothing."""
    model = tiny_var(block)
    for seeds, labels in ((SEEDS, LABELS), ([7, 8, 9], LABELS.flip(0)), (SEEDS, LABELS)):
        made = scales(model, schedule, labels, seeds)
        assert made.equal(eagerly(monkeypatch, lambda s=seeds, c=labels: scales(model, schedule, c, s)))
    assert len(captured) == passes and {watched.replays for watched in captured} == {3}


def test_ten_scales_are_ten_graphs_and_those_without_label(captured, monkeypatch):
    sides = PUBLISHED["var_vq"]
    model, tok = tiny_var(patch_nums=sides), scales_tokenizer(v_patch_nums=sides)
    rules = build_rules("baseline", order="raster", group="scale", cfg=2.5, cfg_schedule="ramp")

    def sample():
        return generate(model, LABELS, rules, seeds=SEEDS, tokenizer=tok)

    expected = eagerly(monkeypatch, sample)
    assert sample().equal(expected) and sample().equal(expected)
    assert len(captured) == 10 + 9 and {watched.replays for watched in captured} == {2}


def looks(model, tok, labels):
    """(z of each scale with and without label, the passes that it took), all ids being 5."""
    conditions, looked = model.conditions(labels, tokenizer=tok), []
    tokens, images = torch.full((3, 30), 5, device=labels.device), torch.arange(3)
    for step in range(4):
        looked.append(conditions.look(step, tokens, None, images)[0])
        rows = torch.cartesian_prod(images, torch.arange(conditions.starts[step], conditions.stops[step]))
        looked.append(conditions.at(step, tokens, None, rows, torch.arange(len(rows)))[1])
    return looked, conditions.passes


def test_z_of_scales_is_that_of_the_eager_passes(captured, monkeypatch):
    """And stays what it was when the next batch has been looked at."""
    model, tok = tiny_var(), scales_tokenizer()
    with torch.no_grad():
        expected = [eagerly(monkeypatch, lambda c=labels: looks(model, tok, c)) for labels in (LABELS, LABELS.flip(0))]
        made = [looks(model, tok, labels) for labels in (LABELS, LABELS.flip(0))]
    assert len(captured) == 8
    for (here, passes), (there, others) in zip(made, expected):
        assert passes == others
        for a, b in zip(here, there):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fewer", [False, True])
def test_scales_with_known_tokens_and_guidance_that_comes_and_goes(fewer, captured, monkeypatch):
    """Where an image has left the batch, or only some are guided, passes are eager, over the same keys and values."""
    model, known = tiny_var(), torch.zeros(3, 30, dtype=torch.bool)
    known[1, 10:20], known[2, 5 if fewer else 14 :] = True, True
    rules = build_rules("baseline", order="raster", group="scale")
    rules = replace(
        rules, cfg=lambda state, after: torch.tensor([[1.0 + (state.step + i) % 2] for i in state.images.tolist()])
    )

    def sample():
        given = dict(tokens=torch.full((3, 30), 5), mask=~known, seeds=SEEDS, tokenizer=scales_tokenizer())
        return generate(model, LABELS, rules, 4, **given)

    expected = eagerly(monkeypatch, sample)
    assert sample().equal(expected) and 0 < len(captured) < 8 and sample().equal(expected)
    assert scales(model).equal(eagerly(monkeypatch, lambda: scales(model)))


def test_one_batch_at_a_time_has_the_static_cache(captured, monkeypatch):
    """Two that take turns on one model: the second has a cache of its own. Of batch sizes the last one is kept."""
    model, tok, images = tiny_var(), scales_tokenizer(), torch.arange(3)
    tokens = torch.randint(64, (3, 30), generator=torch.Generator().manual_seed(0))

    def looks(turns):
        kinds = [model.conditions(labels, tokenizer=tok) for labels in (LABELS, LABELS.flip(0))]
        looked = [[], []]
        for which in turns:
            looked[which].append(kinds[which].look(len(looked[which]), tokens, None, images)[0])
        return [torch.cat(z, dim=1) for z in looked], [each.static is not None for each in kinds]

    turns = [0, 1, 1, 0, 0, 1, 0, 1]
    with torch.no_grad():
        made, static = looks(turns)
        expected, none = eagerly(monkeypatch, lambda: looks(turns))
    assert static == [True, False] and none == [False, False] and len(captured) == 4
    for a, b in zip(made, expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    static = weakref.ref(model.graphs.state)
    captured.clear()
    two = scales(model, labels=LABELS[:2], seeds=SEEDS[:2])
    gc.collect()
    assert static() is None and model.graphs.state.size == 2 and len(model.graphs.captures) == 7
    assert two.equal(eagerly(monkeypatch, lambda: scales(model, labels=LABELS[:2], seeds=SEEDS[:2])))
    release(model)
    assert model.graphs.state is None and not model.graphs.captures


def test_scales_under_autocast_have_their_own_captures(captured, monkeypatch):
    model = tiny_var()

    def sample(dtype):
        with autocast(CPU, dtype):
            return scales(model)

    for dtype in (torch.float32, torch.bfloat16, torch.bfloat16, torch.float32):  # a batch that overflows is redone
        expected = eagerly(monkeypatch, lambda dtype=dtype: sample(dtype))
        assert (sample(dtype) == expected).float().mean() > 0.9
    assert len(captured) == 21


def test_scales_learn_by_eager_passes(captured):
    """log p has a gradient: nothing is captured where one may be asked for."""
    rules = build_rules("baseline", order="raster", group="scale", cfg=2.5)
    decode(tiny_var(), LABELS, rules, seeds=SEEDS, tokenizer=scales_tokenizer())
    assert not captured


def test_after_a_failed_capture_passes_are_eager(monkeypatch, capsys):
    """Though the warm-up of the one that failed has written keys and values."""
    model, expected = tiny_var(), scales(tiny_var())
    monkeypatch.setattr(Fails, "tries", 0)
    monkeypatch.setitem(graphs.CAPTURES, "cpu", Fails)
    assert scales(model).equal(expected) and scales(model).equal(expected)
    assert Fails.tries == 1 and len(capsys.readouterr().err.splitlines()) == 1


def test_conditions_are_freed_at_the_end_of_their_batch(captured):
    """Without a collection of garbage: the next batch is to have the static cache."""
    model = tiny_var()
    with torch.no_grad():
        conditions = model.conditions(LABELS, tokenizer=scales_tokenizer())
        conditions.look(0, torch.zeros(3, 30, dtype=torch.long), None, torch.arange(3))
        user = weakref.ref(conditions)
        assert isinstance(user(), NextScaleConditions)
        gc.disable()
        try:
            del conditions
            assert user() is None and model.conditions(LABELS, tokenizer=scales_tokenizer()).static is not None
        finally:
            gc.enable()
