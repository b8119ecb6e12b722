"""Measuring a device: seconds of parts of a program, peak memory, the rate of matrix products, and tables of them."""

import os
import statistics
import time
from functools import cache
from pathlib import Path
from unittest.mock import patch

import torch


class Stopwatch:
    """Seconds spent in methods of classes, while they are watched."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, {}

    def now(self) -> float:
        """The time, in seconds, at which the device has finished its queue."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()

    def watch(self, owner, method: str, name: str):
        """A context in which the time of owner.method is added to seconds[name]."""
        original = getattr(owner, method)

        def timed(*args, **kwargs):
            began = self.now()
            try:
                return original(*args, **kwargs)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - began

        return patch.object(owner, method, timed)


class PeakMemory:
    """Largest memory since the last reset: allocated on a CUDA device, else resident in this process (Linux)."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"

    def reset(self) -> None:
        """Forget the peak."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        elif os.access("/proc/self/clear_refs", os.W_OK):
            Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> float:
        """Bytes; nan on systems that do not report them."""
        if self.cuda:
            return torch.cuda.max_memory_allocated()
        status = Path("/proc/self/status")
        lines = status.read_text().splitlines() if status.is_file() else []
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), float("nan"))


def run_seconds(device: torch.device, run) -> float:
    """Seconds that run() takes."""
    watch = Stopwatch(device)
    began = watch.now()
    run()
    return watch.now() - began


@cache
def matmul_rate(device: torch.device, dtype: torch.dtype, size: int = 4096) -> float:
    """Operations a second in a product of two square matrices, median of 5, measured once in a process."""
    a, b = (torch.randint(-9, 10, (size, size), device=device).to(dtype) for _ in range(2))
    multiply = torch._int_mm if dtype == torch.int8 else torch.mm
    times = [run_seconds(device, lambda: multiply(a, b)) for _ in range(6)]
    return 2 * size**3 / statistics.median(times[1:])  # the first warms up


def print_table(title: str, head: list, rows: list[list]) -> None:
    """Print a title and a Markdown table whose first column is aligned to the left."""
    print(f"\n{title}\n")
    print("| " + " | ".join(head) + " |")
    print("| --- |" + " ---: |" * (len(head) - 1))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |", flush=True)
