"""Captures of functions: their buffers, keys and number, what drops them, and what happens where one fails."""

import gc
import pickle
import weakref
from copy import deepcopy

import pytest
import torch
from torch import nn

from tests.helpers import randn
from tests.helpers_diffusion import CHANNELS, CLIP, WIDTH
from tests.helpers_graphs import CPU, Fails, eagerly
from util import graphs
from util.dist import autocast
from util.graphs import Graphs, PlainCalls, bucket, release


def test_buckets_are_few_and_waste_less_than_half():
    sizes = [bucket(n) for n in range(1, 5001)]
    assert bucket(0) == 0 and sizes == sorted(sizes) and len(set(sizes)) == 18
    assert all(n <= size <= max(16, 1.5 * n) for n, size in enumerate(sizes, start=1))
    assert {bucket(size) for size in sizes} == set(sizes)


def test_results_are_not_overwritten_and_a_function_is_captured_once_a_key(captured):
    some = Graphs()
    x = [randn(n, 3, seed=n) for n in (2, 4, 3)]
    with torch.no_grad():
        made = [some.run("double", lambda a: 2 * a, [each], [(4, 3)])[: len(each)] for each in x]
        assert len(captured) == 1 and captured[0].replays == 3
        for each, result in zip(x, made):
            assert result.equal(2 * each)
        made[0].zero_()  # nor does what becomes of them come back
        assert some.run("double", lambda a: 2 * a, [x[0]], [(4, 3)])[:2].equal(2 * x[0])
        for key, shape, dtype in (("other", 4, None), ("double", 5, None), ("double", 4, torch.float64)):
            assert some.run(key, lambda a: 3 * a, [x[0].to(dtype)], [(shape, 3)])[:2].equal(3 * x[0].to(dtype))
        with autocast(CPU, torch.bfloat16):
            some.run("double", lambda a: a @ a.T, [x[0]], [(4, 3)])
    assert len(captured) == 5


def test_the_least_recently_used_capture_goes_with_its_buffers(captured):
    some, x = Graphs(most=2), randn(2, 3)

    def call(key):
        return some.run(key, lambda a: a + 1, [x], [(2, 3)])

    call("a"), call("b"), call("a")
    buffers = [weakref.ref(watched.buffers[0]) for watched in captured]
    captured.clear()
    call("c")
    gc.collect()
    assert buffers[0]() is not None and buffers[1]() is None and len(some.captures) == 2
    captured.clear()
    call("a"), call("c")
    assert not captured
    assert call("b").equal(x + 1) and len(captured) == 1


def test_a_failed_capture_is_one_line_and_what_follows_is_eager(monkeypatch, capsys, diffloss):
    z, noise = randn(20, WIDTH), randn(3, 20, CHANNELS, seed=1)
    head = deepcopy(diffloss)
    expected = head.sample(z, num_steps=2, noise=noise, clip=CLIP)
    monkeypatch.setattr(Fails, "tries", 0)
    monkeypatch.setitem(graphs.CAPTURES, "cpu", Fails)
    for solver in ("ddpm", "ddpm", "ddim"):
        made = head.sample(z, num_steps=2, noise=noise, clip=CLIP, solver=solver)
        assert solver == "ddim" or made.equal(expected)
    assert Fails.tries == 1 and gc.isenabled()
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["warning: no more CUDA graphs, since one could not be captured: operation not permitted"]


def test_an_error_of_the_function_itself_is_not_hidden(monkeypatch):
    monkeypatch.setitem(graphs.CAPTURES, "cpu", PlainCalls)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        Graphs().run("key", lambda a: a @ a, [randn(2, 3)], [(2, 3)])


def test_copies_of_a_module_have_no_captures(captured, diffloss):
    head = deepcopy(diffloss)
    head.sample(randn(3, WIDTH), num_steps=2, clip=CLIP)
    assert len(head.graphs.captures) == 1
    assert not deepcopy(head).graphs.captures and not pickle.loads(pickle.dumps(head.graphs)).captures
    release(nn.Sequential(head))
    assert not head.graphs.captures


def test_captures_of_weights_that_moved_are_dropped_and_new_values_are_read(captured, monkeypatch, diffloss):
    head, z, noise = deepcopy(diffloss), randn(20, WIDTH), randn(3, 20, CHANNELS, seed=1)

    def sample():
        return head.sample(z, num_steps=2, noise=noise, clip=CLIP)

    first = sample()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(1.5)  # as an optimizer or an average changes them
    assert not sample().allclose(first) and len(captured) == 1
    torch.testing.assert_close(sample(), eagerly(monkeypatch, sample), rtol=1e-5, atol=1e-5)
    head.net.input_proj = nn.Linear(CHANNELS, 16)
    torch.testing.assert_close(sample(), eagerly(monkeypatch, sample), rtol=1e-5, atol=1e-5)
    assert len(captured) == 2 and len(head.graphs.captures) == 1
    head.double()
    sample()
    assert len(captured) == 3


def test_what_is_captured_by_default(monkeypatch, diffloss):
    """On CUDA only; nothing with CUDA_GRAPHS=0."""
    assert list(graphs.CAPTURES) == ["cuda"]
    head = deepcopy(diffloss)
    head.sample(randn(3, WIDTH), num_steps=2, clip=CLIP)
    assert not head.graphs.captures
    monkeypatch.setitem(graphs.CAPTURES, "cpu", PlainCalls)
    for value, captures in (("0", 0), ("1", 1)):
        monkeypatch.setenv("CUDA_GRAPHS", value)
        head.sample(randn(3, WIDTH), num_steps=2, clip=CLIP)
        assert len(head.graphs.captures) == captures
    monkeypatch.setenv("CUDA_GRAPHS", "yes")
    with pytest.raises(ValueError, match="CUDA_GRAPHS must be 0 or 1, got 'yes'"):
        head.sample(randn(3, WIDTH), num_steps=2, clip=CLIP)
