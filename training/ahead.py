"""What the next step needs of the host, computed in a thread while the device is busy with this one."""

from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from torch.profiler import record_function


class Ahead:
    """Values of functions that depend on nothing but their key, begun before they are asked for.

    active: is there a thread? Without one a value is computed when it is asked for.
    """

    def __init__(self, active: bool):
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="ahead") if active else None
        self.begun = {}  # key: the future value

    def begin(self, key: Hashable, function: Callable) -> None:
        """Compute function() in the thread, if there is one."""
        if self.thread is not None:
            self.begun[key] = self.thread.submit(record_function("what the next step needs")(function))

    def value(self, key: Hashable, function: Callable):
        """function(), once: that which was begun under this key, an error of it included, else computed now."""
        future = self.begun.pop(key, None)
        return function() if future is None else future.result()


def with_next(items: Iterable) -> Iterator[tuple]:
    """(each item, the one after it, None at the end)."""
    waiting = []  # at most one
    for following in items:
        for item in waiting:
            yield item, following
        waiting = [following]
    for item in waiting:
        yield item, None
