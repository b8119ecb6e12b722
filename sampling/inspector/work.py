"""One worker that computes, jobs that wait for it, and what it has computed last.

A job's events go to whoever asked for it; it ends when that one has left.
"""

import os
import queue
import threading
import traceback
from collections import OrderedDict
from collections.abc import Callable

import torch

from util.door import explain

MOST_CHARACTERS = 300  # of an error's line
MOST_BYTES = 512 * 2**20  # of recordings that are kept


def share_cores() -> None:
    """Half of the cores for what draws, at least one; the other half is a measurement's, the page's and the browser's.

    Threads of torch that have no core of their own wait for each other: on two busy cores a step of the digits' model
    takes 40 ms of one thread and over a second of two.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(min(torch.get_num_threads(), max(1, cores // 2)))


class Cancelled(Exception):
    """Raised in a job whose client has left."""


class Busy(Exception):
    """Raised where too many jobs wait already."""


class Job:
    """One call of work(emit), whose events are read from `events`; None is the last."""

    def __init__(self, work: Callable):
        self.work, self.events, self.cancelled = work, queue.Queue(), threading.Event()

    def emit(self, event: dict) -> None:
        """Hand on an event; Cancelled where nobody wants it any more."""
        if self.cancelled.is_set():
            raise Cancelled
        self.events.put(event)

    def run(self) -> None:
        """Do the work; its error is its last event."""
        try:
            self.emit({"started": True})
            self.work(self.emit)
        except Cancelled:
            pass
        except Exception as error:
            self.events.put({"error": line_of(error)})
        finally:
            self.events.put(None)


def line_of(error: Exception) -> str:
    """The one line that a page shows of an error; one that is the code's own fault is printed whole besides."""
    line = str(error) if isinstance(error, Busy) else explain(error)[0]
    if line is None:
        traceback.print_exception(error)
        line = f"internal error, not your input: {type(error).__name__}"
    line = " ".join(line.split())
    return line if len(line) <= MOST_CHARACTERS else f"{line[:MOST_CHARACTERS]}…"  # of a long name, say


class Worker:
    """A thread that does one job after the other; at most `most` wait. One whose client has left does not count."""

    def __init__(self, most: int):
        self.most, self.waiting, self.current, self.ends = most, [], None, False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def submit(self, work: Callable) -> Job:
        """The job that was put at the end of the queue; Busy where that is full."""
        job = Job(work)
        with self.changed:
            if self.ends:
                raise Busy("the server is being stopped")
            self.waiting = [other for other in self.waiting if not other.cancelled.is_set()]
            if len(self.waiting) >= self.most:
                raise Busy(f"{self.most} requests wait already: try again later")
            job.emit({"waiting": len(self.waiting) + 1})
            self.waiting.append(job)
            self.changed.notify()
        return job

    def stop(self) -> None:
        """Drop what waits, and end the thread after the step that it is at."""
        with self.changed:
            for job in self.waiting:
                job.events.put(None)
            self.waiting, self.ends = [], True
            if self.current is not None:
                self.current.cancelled.set()
            self.changed.notify()
        self.thread.join(timeout=3)  # a step of a large model takes longer, and is not waited for

    def _work(self):
        while (job := self._next()) is not None:
            job.run()

    def _next(self) -> Job | None:
        """Wait for a job; None where there will be none."""
        with self.changed:
            self.changed.wait_for(lambda: self.waiting or self.ends)
            self.current = None if self.ends else self.waiting.pop(0)
            return self.current


class Recent:
    """The values that were made last, by key, of at most MOST_BYTES; each has a `size`. For one thread."""

    def __init__(self):
        self.values = OrderedDict()

    def get(self, key, make: Callable):
        """The value of a key, made if it is not there."""
        if key not in self.values:
            self.values[key] = make()
        self.values.move_to_end(key)
        while len(self.values) > 1 and sum(value.size for value in self.values.values()) > MOST_BYTES:
            self.values.popitem(last=False)
        return self.values[key]
