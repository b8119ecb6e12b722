"""Captured passes of MAR and MaskGIL are the eager ones: plain calls on a CPU, under the rules of captures."""

import pytest
import torch

from heads.policy import build_rules
from sampling.loop import decode, generate
from tests.helpers import tiny_mar
from tests.helpers_graphs import CPU, eagerly
from tests.helpers_maskgil import tiny_maskgil
from util.dist import autocast
from util.graphs import release

LABELS, BATCHES = torch.tensor([0, 2, -1]), ([4, 5, 6], [7, 8, 9], [10, 11, 12])
# (model, settings, captures: passes with label at each of 4 steps, without label where w ≠ 1)
FAMILIES = {
    "mar": (lambda: tiny_mar(img_size=8), dict(cfg=2.0, cfg_schedule="linear"), 8),
    "mar_ce": (lambda: tiny_mar(img_size=8, loss="ce", vocab_size=16), dict(cfg=2.0, cfg_schedule="constant"), 8),
    "unguided": (lambda: tiny_mar(img_size=8), dict(cfg=1.0), 4),
    # all tokens at every step: two shapes in all
    "maskgil": (tiny_maskgil, dict(cfg=2.0, cfg_schedule="constant", order="confidence", group="step_arccos"), 2),
}


def sample(model, settings, seeds=BATCHES[0], labels=LABELS, call=generate, **given):
    return call(model, labels[: len(seeds)], build_rules("baseline", **settings), 4, 4, seeds=seeds, **given)


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


def test_images_with_different_numbers_of_known_tokens_are_computed_eagerly(captured, monkeypatch):
    model, settings = tiny_mar(img_size=8), FAMILIES["mar"][1]
    length = model.config.seq_len
    known = torch.zeros(3, length, dtype=torch.bool)
    known[1, :3], known[2, : length // 2] = True, True
    given = dict(tokens=torch.rand(3, length, model.config.token_dim), mask=~known)
    expected = eagerly(monkeypatch, lambda: sample(model, settings, **given))
    for _ in range(3):
        torch.testing.assert_close(sample(model, settings, **given), expected, rtol=1e-5, atol=1e-5)
    assert not model.graphs.captures


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
