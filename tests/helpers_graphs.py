"""Captures on a CPU: plain calls, with what CUDA forbids while it captures, and with what a graph must not lose."""

from collections.abc import Callable

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

CPU = torch.device("cpu")
READS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero"}
FROM_THE_HOST = {"lift_fresh", "lift_fresh_copy"}  # what torch.tensor and torch.as_tensor call


class Rules(TorchDispatchMode):
    """Inside, nothing is read to the host and nothing made of its numbers.

    `outside`: the memory that operations read and that none of them made.
    """

    def __init__(self):
        super().__init__()
        self.made, self.outside = set(), {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
        assert not by_mask and name not in READS | FROM_THE_HOST, f"{name} cannot be captured"
        for x in tree_flatten((args, kwargs))[0]:
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.made:
                self.outside.setdefault(x.untyped_storage()._cdata, StorageWeakRef(x.untyped_storage()))
        result = function(*args, **kwargs)
        storages = [x.untyped_storage() for x in tree_flatten(result)[0] if isinstance(x, torch.Tensor)]
        self.made |= {storage._cdata for storage in storages} - self.outside.keys()
        return result


class PlainCalls:
    """In place of a `CudaGraph`: calls the function of the first call on the buffers; has one place for results."""

    new_pool = staticmethod(lambda: None)

    @staticmethod
    def warm_up(function: Callable, buffers: list[torch.Tensor]) -> torch.Tensor:
        """Call it once."""
        return function(*buffers)

    def __init__(self, function: Callable, buffers: list[torch.Tensor], pool):
        self.function, self.buffers = function, buffers
        self.result = function(*buffers)

    def replay(self) -> torch.Tensor:
        """The result, in a place that the next replay overwrites."""
        return self.result.copy_(self.function(*self.buffers))


class Watched(PlainCalls):
    """Such calls, the first of which keeps the rules; the memory that it read must be there at every replay."""

    made = []  # all of a test's

    def __init__(self, function, buffers, pool):
        with Rules() as rules:
            super().__init__(function, buffers, pool)
        self.outside, self.replays = list(rules.outside.values()), 0
        self.made.append(self)

    def replay(self):
        assert not any(storage.expired() for storage in self.outside), "a graph would read memory that was freed"
        self.replays += 1
        return super().replay()


class Fails(PlainCalls):
    """Warms up, and then cannot capture."""

    tries = 0

    def __init__(self, function, buffers, pool):
        Fails.tries += 1
        raise RuntimeError("operation not permitted\nmany more lines")


def eagerly(monkeypatch, call):
    """call(), with nothing captured."""
    with monkeypatch.context() as patch:
        patch.setenv("CUDA_GRAPHS", "0")
        return call()
