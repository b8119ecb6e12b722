"""Measuring a device: seconds of parts of a program, peak memory, the rate of matrix products, and tables of them."""

import os
import statistics
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from unittest.mock import patch

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


class Stopwatch:
    """Seconds spent in methods of classes, while they are watched.

    On CUDA they are those of the device, between events in its queue: nothing waits for it meanwhile.
    """

    def __init__(self, device: torch.device):
        self.device, self.marks = device, []  # (name, begin, end) of each call

    def now(self) -> float:
        """The time, in seconds, at which the device has finished its queue."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()

    def _mark(self):
        if self.device.type != "cuda":
            return self.now()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def watch(self, owner, method: str, name: str):
        """A context in which the time of owner.method is added to seconds[name]."""
        original = getattr(owner, method)

        def timed(*args, **kwargs):
            began = self._mark()
            try:
                return original(*args, **kwargs)
            finally:
                self.marks.append((name, began, self._mark()))

        return patch.object(owner, method, timed)

    @property
    def seconds(self) -> dict[str, float]:
        """{name: seconds of all its calls so far}."""
        self.now()
        totals = {}
        for name, began, ended in self.marks:
            took = began.elapsed_time(ended) / 1e3 if self.device.type == "cuda" else ended - began
            totals[name] = totals.get(name, 0.0) + took
        return totals


class PeakMemory:
    """Largest memory since the last reset: of a CUDA device what torch has taken, captures included, else what is
    resident in this process (Linux)."""

    def __init__(self, device: torch.device):
        self.device, self.cuda = device, device.type == "cuda"

    def reset(self) -> None:
        """Forget the peak."""
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        elif os.access("/proc/self/clear_refs", os.W_OK):
            Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> float:
        """Bytes; nan on systems that do not report them."""
        if self.cuda:
            return torch.cuda.max_memory_reserved(self.device)
        status = Path("/proc/self/status")
        lines = status.read_text().splitlines() if status.is_file() else []
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), float("nan"))


def run_seconds(device: torch.device, run) -> float:
    """Seconds that run() takes."""
    watch = Stopwatch(device)
    began = watch.now()
    run()
    return watch.now() - began


def device_work(device: torch.device, run) -> tuple[int, float]:
    """(number of kernels, seconds in which at least one of them ran) of run(), by the profiler.

    Copies and fills of memory count as kernels, and those in a CUDA graph one by one. On a CPU they are operators.
    """
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        run_seconds(device, run)
    # `profiler.events()` makes an object of Python of each of a million.
    events = profiler.profiler.kineto_results.events()
    wanted = DeviceType.CUDA if cuda else DeviceType.CPU
    spans = [(e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.device_type() == wanted]
    return len(spans), union_length(spans) / 1e9


def union_length(spans: Iterable[tuple[float, float]]) -> float:
    """The length of what intervals (begin, end) cover together."""
    covered, reached = 0, float("-inf")
    for begin, end in sorted(spans):
        covered += max(end - max(begin, reached), 0)
        reached = max(reached, end)
    return covered


@cache
def matmul_rate(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """Operations a second in products of square matrices, median of 5, measured once in a process.

    size: None is 4096, on CUDA 8192, of which ten are timed together: else launching one would count.
    """
    num = 10 if device.type == "cuda" else 1
    size = size or (8192 if device.type == "cuda" else 4096)
    a, b = (torch.randint(-9, 10, (size, size), device=device).to(dtype) for _ in range(2))
    multiply = torch._int_mm if dtype == torch.int8 else torch.mm
    times = [run_seconds(device, lambda: [multiply(a, b) for _ in range(num)]) / num for _ in range(6)]
    return 2 * size**3 / statistics.median(times[1:])  # the first warms up


def print_table(title: str, head: list, rows: list[list]) -> None:
    """Print a title and a Markdown table whose first column is aligned to the left."""
    print(f"\n{title}\n")
    print("| " + " | ".join(head) + " |")
    print("| --- |" + " ---: |" * (len(head) - 1))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |", flush=True)


def short_number(value: float) -> str:
    """A number with two decimals, or three digits where it is below 1."""
    return f"{value:.2f}" if value >= 1 else f"{value:.3g}"
