"""Measuring a device: seconds of parts of a program, peak memory, and the rate of matrix products to compare with."""

import os
import statistics
import time
from pathlib import Path
from unittest.mock import patch

import torch

from util import dist


class Stopwatch:
    """Seconds spent in methods of classes, while they are watched."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, {}

    def now(self) -> float:
        """The time when all that was asked of the device is done."""
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
        """Bytes; nan where they cannot be known."""
        if self.cuda:
            return torch.cuda.max_memory_allocated()
        status = Path("/proc/self/status")
        lines = status.read_text().splitlines() if status.is_file() else []
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), float("nan"))


def fast_dtype(device: torch.device) -> str:
    """bf16 or fp32, whichever this device multiplies matrices faster in; all processes get the first one's answer.

    Known of GPUs; CPUs are measured, since many that have bf16 do it at half the speed of float32.
    """
    if device.type != "cpu":
        return "bf16" if dist.pick_dtype(None, device) == torch.bfloat16 else "fp32"
    faster = torch.zeros(())
    if dist.is_main():
        rates = [matmul_rate(device, dtype, size=1024) for dtype in (torch.bfloat16, torch.float32)]
        faster += rates[0] > 1.2 * rates[1]
    return "bf16" if dist.all_sum(faster) else "fp32"


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int = 4096) -> float:
    """FLOP/s of a product of two square matrices, median of 5."""
    watch, times = Stopwatch(device), []
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(6):  # the first warms up
        began = watch.now()
        torch.mm(a, b)
        times.append(watch.now() - began)
    return 2 * size**3 / statistics.median(times[1:])
