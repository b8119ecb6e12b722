"""Captures of functions: their buffers, keys and number, what drops them, and what happens where one fails."""

import contextlib
import gc
import pickle
import weakref
from copy import deepcopy

import pytest
import torch
from torch import nn

from tests.helpers import randn
from tests.helpers_diffusion import CHANNELS, CLIP, WIDTH
from tests.helpers_graphs import CPU, Fails, PlainCalls, eagerly
from util import graphs
from util.dist import autocast
from util.graphs import CudaGraph, Graphs, bucket, release


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
    assert captured[0].result is captured[1].result, "results of one shape stand in one place"
    assert len(some.results) == 4  # of (4, 3) in two dtypes, (5, 3), and (4, 4) in bf16
    some.clear()
    assert not some.results


def test_the_least_recently_used_capture_goes_with_its_buffers(captured):
    some, x = Graphs(most=2), randn(2, 3)

    def call(key):
        return some.run(key, lambda a: a + 1, [x], [(2, 3)])

    call("a"), call("b")
    for _ in range(2 * graphs.IDLE_ROUNDS):
        call("a")
    buffers = [weakref.ref(watched.buffers[0]) for watched in captured]
    captured.clear()
    call("c")
    gc.collect()
    assert buffers[0]() is not None and buffers[1]() is None and len(some.captures) == 2
    captured.clear()
    call("a"), call("c")
    assert not captured


def test_where_more_come_in_turn_than_there_is_room_for_some_stay_eager(captured):
    """Else each would be captured anew each time, which costs two calls more."""
    some, x = Graphs(most=3), randn(2, 3)
    for number in [*range(5)] * 20:
        assert some.run(number, lambda a, n=number: a + n, [x], [(2, 3)]).equal(x + number)
    assert len(captured) == len(some.captures) == 3
    for number in [*range(10, 13)] * 20:
        assert some.run(number, lambda a, n=number: a + n, [x], [(2, 3)]).equal(x + number)
    assert len(captured) == 6 and set(some.used) == set(some.captures)


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


def test_a_cuda_graph_is_warmed_up_and_captured_on_one_side_stream(monkeypatch):
    """With a CUDA that only notes what is asked of it; also where the capture fails."""
    told, current = [], ["main"]

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            told.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def on(stream):
        before, current[0] = current[0], stream.name
        yield
        current[0] = before  # not where the block fails, as in a real capture

    @contextlib.contextmanager
    def setting(stream):
        before, current[0] = current[0], stream.name
        try:
            yield
        finally:
            current[0] = before

    @contextlib.contextmanager
    def graph(made, pool, stream, capture_error_mode):
        told.append(f"capture into {pool}, {capture_error_mode}")
        with on(stream):
            yield

    class CUDAGraph:
        def replay(self):
            told.append(f"replay on {current[0]}")

    def ended(index, pool):
        told.append(f"memory of device {index} is no longer {pool}'s")

    side = Stream("side")
    fake = dict(current_stream=lambda device: Stream(current[0]), Stream=lambda device: side, stream=setting)
    for name, value in dict(fake, graph=graph, CUDAGraph=CUDAGraph).items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(CudaGraph, "new_pool", lambda: "the pool")
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", ended, raising=False)
    monkeypatch.setitem(graphs.CAPTURES, "cpu", CudaGraph)
    graphs._side_stream.cache_clear()

    def function(x, fails=False):
        told.append(f"call on {current[0]}")
        if fails and told.count("call on side") == 2 and current[0] == "side":
            raise RuntimeError("not permitted")
        return 2 * x

    some, x = Graphs(), randn(2, 3)
    with torch.no_grad():
        assert some.run("key", function, [x], [(2, 3)]).equal(2 * x) and some.run("key", function, [x], [(2, 3)])[0, 0]
        begun = ["side waits for main", "call on side", "main waits for side", "capture into the pool, thread_local"]
        assert told == [*begun, "call on side", "replay on main", "replay on main"]
        told.clear()
        some.run("other", lambda x: function(x, fails=True), [x], [(2, 3)])
    graphs._side_stream.cache_clear()
    assert told == [*begun, "call on side", "memory of device None is no longer the pool's", "call on main"]
    assert some.failed


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
