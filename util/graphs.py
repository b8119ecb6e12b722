"""Functions of tensors that are captured once and replayed: on a GPU thousands of kernels become one launch.

A captured function reads its arguments from buffers that stay in one place. A call copies its tensors into their first
rows, replays, and copies the result out, so that no replay overwrites what an earlier one gave. What else the function
reads, weights and tables, is as it was when captured: it must stay in its place, where it may change. Of numbers and
shapes the capture keeps those of its first call, so whatever they depend on belongs to the key.

CAPTURES says on which devices this is done, and by which class: `CudaGraph` on GPUs. Tests on a CPU add one of plain
calls, which keeps to the same rules. CUDA_GRAPHS=0 in the environment switches all captures off.
"""

import contextlib
import gc
import os
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from functools import cache

import torch
from torch import nn
from tqdm import tqdm

MOST_CAPTURES = 128  # of one module; 64 autoregressive steps with 64 different numbers of diffusion steps need 64
IDLE_ROUNDS = 4  # calls, in numbers of all captures kept, that one of them is kept without being used
SMALLEST_BUCKET = 16
# types of device that have autocast; torch.compile (2.11) cannot look that up in a function that it traces
AUTOCASTS = {name for name in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(name)}
_one = threading.RLock()  # between copying in and copying out nobody else may replay, or capture


def bucket(num_rows: int) -> int:
    """The rows that a buffer for num_rows has: the next of 16, 24, 32, 48, 64, 96, …; 0 for none."""
    if num_rows == 0:
        return 0
    power = max(SMALLEST_BUCKET, 1 << (num_rows - 1).bit_length())
    return power * 3 // 4 if num_rows <= power * 3 // 4 and power > SMALLEST_BUCKET else power


class CudaGraph:
    """A function of buffers, captured as a CUDA graph in a memory pool; what cannot be captured raises RuntimeError."""

    new_pool = staticmethod(torch.cuda.graph_pool_handle)

    @staticmethod
    def warm_up(function: Callable, buffers: list[torch.Tensor]) -> torch.Tensor:
        """Its result; by this call libraries set themselves up and tables are made, which no capture may contain."""
        device = buffers[0].device
        current, side = torch.cuda.current_stream(device), _side_stream(device)
        side.wait_stream(current)
        try:
            with torch.cuda.stream(side):
                return function(*buffers)
        finally:  # after an error too: the buffers are freed for the current stream
            current.wait_stream(side)

    def __init__(self, function: Callable, buffers: list[torch.Tensor], pool):
        device = buffers[0].device
        self.function = function  # what it refers to must live as long as the graph, which has addresses only
        self.graph = torch.cuda.CUDAGraph()
        options = dict(pool=pool, stream=_side_stream(device), capture_error_mode="thread_local")
        with torch.cuda.stream(torch.cuda.current_stream(device)):  # a capture that fails leaves its own behind
            try:
                with torch.cuda.graph(self.graph, **options):
                    self.result = function(*buffers)
            except RuntimeError:  # where CUDA has ended the capture, torch 2.11 leaves its allocator in it
                end = getattr(torch._C, "_cuda_endAllocateToPool", lambda index, pool: None)
                with contextlib.suppress(RuntimeError):
                    end(device.index, pool)
                raise

    def replay(self) -> torch.Tensor:
        """The result, in a place that the next replay in this pool may overwrite."""
        self.graph.replay()
        return self.result


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that functions are warmed up and captured on; one, since cuBLAS has a workspace for each."""
    return torch.cuda.Stream(device)


CAPTURES = {"cuda": CudaGraph}  # by type of device


def switched_on() -> bool:
    """Does the environment allow captures? CUDA_GRAPHS is 0 or 1, or not set for 1; others raise ValueError."""
    value = os.environ.get("CUDA_GRAPHS", "1")
    if value not in ("0", "1"):
        raise ValueError(f"CUDA_GRAPHS must be 0 or 1, got {value!r}")
    return value == "1"


class Graphs:
    """The captures of a module's functions, at most `most` of them.

    Beyond these the one not used for longest goes, if that is long: where more come in turn than there is room for,
    each would go before it comes again, so those that come too late stay eager. A copy of the module starts with none.
    """

    def __init__(self, most: int = MOST_CAPTURES):
        self.most, self.failed = most, False
        self.captures = OrderedDict()  # key: (capture, its buffers), the last used at the end
        self.calls, self.used = 0, {}  # calls of `run`, and for each key the number of its last one
        self.pool = None  # the memory that they share
        self.results = {}  # (shape, dtype): the one place that captures write such results to
        self.read = []  # what they read, see `_parts_of`
        self.state = self.kind = None  # what captured functions keep from one replay to the next, see `lend`
        self.user = None  # a weak reference to who has it
        self.asked = set()  # keys that `run_again` was asked for

    def __reduce__(self):
        return Graphs, (self.most,)

    def clear(self) -> None:
        """Drop all captures, their memory and the state."""
        self.captures.clear()
        self.used.clear()
        self.results.clear()
        self.read = []
        self.pool = self.state = self.kind = self.user = None

    def usable(self, module: nn.Module, device: torch.device) -> bool:
        """May functions of this module be run by `run`? Not with gradients, nor after a capture has failed.

        Weights that have moved since, as `module.to` moves them, and other modules in it make it forget what it has.
        """
        if self.failed or device.type not in CAPTURES or torch.is_grad_enabled() or not switched_on():
            return False
        if not _unchanged(self.read):
            self.clear()
        if not self.read:
            self.read = _parts_of(module)
        return True

    def lend(self, module: nn.Module, user: object, device: torch.device, kind: Hashable, make: Callable):
        """The state of this kind, which `user` has while it lives; None where nothing is captured or another has it.

        That of another kind, or of another dtype of autocast, is dropped with its captures, and a new one made.
        """
        if not self.usable(module, device) or (self.user is not None and self.user() is not None):
            return None
        kind = kind, autocast_state(device)
        if self.kind != kind:
            self.clear()
            self.state, self.kind = make(), kind
        self.user = weakref.ref(user)
        return self.state

    def run_again(self, key: Hashable, function: Callable, tensors: list[torch.Tensor]) -> torch.Tensor:
        """function(*tensors); from the second time on that the key comes with tensors of these shapes, by `run`.

        For what may come only once: a capture costs two calls more.
        """
        shapes = [x.shape for x in tensors]
        asked = key, tuple(shapes), tuple(x.dtype for x in tensors), autocast_state(tensors[0].device)
        if asked in self.asked:
            return self.run(key, function, tensors, shapes)
        self.asked.add(asked)
        return function(*tensors)

    def run(self, key: Hashable, function: Callable, tensors: Iterable, shapes: Iterable) -> torch.Tensor:
        """function(*tensors), a tensor, of buffers of these shapes, whose first rows are the tensors.

        Rows beyond those of the tensors hold what an earlier call left in them, at first 0; so do they in the result.
        A call whose capture fails, and that says so in one line, has no such rows.
        """
        tensors, shapes = list(tensors), [tuple(shape) for shape in shapes]
        key = key, tuple((shape, x.dtype) for shape, x in zip(shapes, tensors)), autocast_state(tensors[0].device)
        with _one:
            self.calls += 1
            if key not in self.captures:
                if self.failed or not self._has_room() or not self._capture(key, function, tensors, shapes):
                    return function(*tensors)
            self.captures.move_to_end(key)
            self.used[key] = self.calls
            capture, buffers = self.captures[key]
            _fill(buffers, tensors)
            return capture.replay().clone()

    def _has_room(self) -> bool:
        """May there be one more, in the place of one that is not used any more?"""
        if len(self.captures) < self.most:
            return True
        return self.calls - self.used[next(iter(self.captures))] > IDLE_ROUNDS * self.most

    def _capture(self, key, function, tensors, shapes) -> bool:
        """Capture, and drop what is too much; False where that fails."""
        backend = CAPTURES[tensors[0].device.type]
        buffers = [torch.zeros(shape, dtype=x.dtype, device=x.device) for shape, x in zip(shapes, tensors)]
        _fill(buffers, tensors)
        try:
            self.pool = backend.new_pool() if self.pool is None else self.pool
            place = self._place(backend.warm_up(function, buffers))
            with _undisturbed():
                self.captures[key] = backend(lambda *args: place.copy_(function(*args)), buffers, self.pool), buffers
        except RuntimeError as error:  # running out of memory is one
            self.failed, self.pool = True, None
            self.captures.clear()
            self.used.clear()
            self.results.clear()
            self.read = []
            reason = str(error.__context__ or error).strip().partition("\n")[0]  # what CUDA says last is not why
            tqdm.write(f"warning: no more CUDA graphs, since one could not be captured: {reason}", file=sys.stderr)
            return False
        while len(self.captures) > self.most:  # the capture has waited for the device: no replay is under way
            del self.used[self.captures.popitem(last=False)[0]]
        return True

    def _place(self, result: torch.Tensor) -> torch.Tensor:
        """Where captures write results like this one."""
        kind = result.shape, result.dtype
        if kind not in self.results:
            self.results[kind] = torch.empty_like(result)
        return self.results[kind]


def _parts_of(module: nn.Module) -> list[tuple[dict, list]]:
    """[(a dictionary of parameters, buffers or modules of a module, [(name, what it was, its place in memory)])].

    Kept since to collect them takes milliseconds where there are hundreds, to compare them half of one. What it was is
    a weak reference: the memory of weights that others stand for is free.
    """
    every = [of for part in module.modules() for of in (part._parameters, part._buffers, part._modules)]
    return [(of, [(name, x if x is None else weakref.ref(x), _place_of(x)) for name, x in of.items()]) for of in every]


def _unchanged(parts: list[tuple[dict, list]]) -> bool:
    for of, was in parts:
        if len(of) != len(was):
            return False
        for name, kept, place in was:
            x = of.get(name)
            if x is not (kept and kept()) or _place_of(x) != place:
                return False
    return True


def _place_of(x) -> int | None:
    return x.data_ptr() if isinstance(x, torch.Tensor) else None


@contextlib.contextmanager
def _undisturbed():
    """No garbage is collected, since an older graph that is freed would end a capture, and autocast remembers nothing.

    The weights that autocast has cast are freed when it ends; a graph casts its own, once a replay.
    """
    collecting = gc.isenabled()
    gc.disable()
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        if collecting:
            gc.enable()


def _fill(buffers: list, tensors: list) -> None:
    for buffer, x in zip(buffers, tensors):
        buffer[tuple(slice(size) for size in x.shape)].copy_(x)


def autocast_state(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast computes in on this device; None where it is off."""
    if device.type not in AUTOCASTS or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def release(module: nn.Module) -> None:
    """Drop the captures of a module and of all in it, with their memory."""
    for part in module.modules():
        graphs = getattr(part, "graphs", None)
        if isinstance(graphs, Graphs):
            graphs.clear()
