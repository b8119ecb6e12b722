"""Draws of the next step that a thread makes: the same as without it, in whatever order, and their errors."""

import itertools
import threading

import pytest
import torch

import main_mar
from tests.helpers import SMALLEST
from training import state as states
from training.ahead import Ahead, with_next
from training.objectives import token as objective
from util.checkpoint import load_checkpoint


def test_each_item_comes_with_the_next():
    assert list(with_next("abc")) == [("a", "b"), ("b", "c"), ("c", None)]
    assert list(with_next("a")) == [("a", None)] and list(with_next("")) == []


def test_what_was_begun_is_computed_once_in_the_thread_and_what_was_not_at_once():
    ahead, calls = Ahead(True), []

    def function(name):
        calls.append((name, threading.current_thread() is threading.main_thread()))
        return name

    for name in "abc":
        ahead.begin(name, lambda name=name: function(name))
    assert ahead.value("b", lambda: function("again")) == "b"
    assert ahead.value("x", lambda: function("x")) == "x"
    assert ahead.value("c", lambda: function("again")) == "c" and ahead.value("a", lambda: function("again")) == "a"
    assert not ahead.begun
    assert sorted(calls) == [("a", False), ("b", False), ("c", False), ("x", True)]
    ahead.begin("e", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ahead.value("e", lambda: 0)
    quiet = Ahead(False)
    quiet.begin("a", lambda: 1 / 0)
    assert quiet.value("a", lambda: "now") == "now"


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--accum_iter 2", "--train_masks visited --learn group"])
def test_a_run_with_draws_made_ahead_is_the_run_without(flags, tmp_path, monkeypatch):
    """To the bit; all but the first step of an epoch find them made."""
    where, made = itertools.count(), []
    original = objective.training_draws

    def watched(seed, step, samples, *args):
        made.append((step, threading.current_thread() is threading.main_thread()))
        return original(seed, step, samples, *args)

    def run(active):
        monkeypatch.setattr(states, "Ahead", lambda _: Ahead(active))
        folder = tmp_path / str(next(where))
        words = f"{SMALLEST} {flags} --batch_size 600 --epochs 2 --output_dir {folder}".split()
        assert main_mar.main(words) == 0
        return load_checkpoint(folder)["model"]

    monkeypatch.setattr(objective, "training_draws", watched)
    expected, at_once = run(False), list(made)
    made.clear()
    weights = run(True)
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert sorted(step for step, _ in made) == sorted(step for step, _ in at_once) and all(now for _, now in at_once)
    in_thread = {step for step, now in made if not now}
    steps = {step for step, _ in made}
    assert len(steps - in_thread) == 2 and min(steps) not in in_thread
