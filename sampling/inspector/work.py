"""One worker that computes, jobs that wait for it, and what it has computed last.

A job's events go to whoever asked for it; it ends when that one has left.
"""

import queue
import threading
import traceback
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress

from util.door import explain

MOST_BYTES = 512 * 2**20  # of recordings that are kept


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
    return " ".join(line.split())


class Worker:
    """A thread that does one job after the other; at most `most` wait."""

    def __init__(self, most: int):
        self.jobs, self.current = queue.Queue(maxsize=most), None
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def submit(self, work: Callable) -> Job:
        """The job that was put at the end of the queue; Busy where that is full."""
        job = Job(work)
        job.emit({"waiting": self.jobs.qsize() + 1})
        try:
            self.jobs.put_nowait(job)
        except queue.Full:
            raise Busy(f"{self.jobs.maxsize} requests wait already: try again later") from None
        return job

    def stop(self) -> None:
        """Drop what waits, and end the thread after the step that it is at."""
        with suppress(queue.Empty):
            while True:
                self.jobs.get_nowait().cancelled.set()
        self.jobs.put(None)
        if self.current is not None:
            self.current.cancelled.set()
        self.thread.join(timeout=10)

    def _work(self):
        while (job := self.jobs.get()) is not None:
            self.current = job
            job.run()


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
