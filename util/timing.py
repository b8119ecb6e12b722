"""Measuring a device: seconds of parts of a program, peak memory, and the rate of matrix products to compare with."""

import os
import statistics
import time
from copy import deepcopy
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn

from models.int8 import Int8Linear, is_exact
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


def fast_dtype(device: torch.device, width: int) -> str:
    """The dtype in which this device computes a model of this width fastest; all processes get the first one's answer.

    Known of GPUs; CPUs are measured, since many that have bf16 do it at half the speed of float32, and small layers
    gain nothing from int8. Anything but fp32 has to be faster than it by a fifth.
    """
    if device.type != "cpu":
        return "bf16" if dist.pick_dtype(None, device) == torch.bfloat16 else "fp32"
    names, choice = list(dist.DTYPES), torch.zeros(())
    if dist.is_main():
        seconds = layer_seconds(width)
        seconds["fp32"] /= 1.2
        choice += names.index(min(seconds, key=seconds.get))
    return names[int(dist.all_sum(choice))]


@torch.no_grad()
def layer_seconds(width: int) -> dict[str, float]:
    """Seconds that a linear layer (width, 4·width) takes on the CPU for 256 rows, in each dtype that is there."""
    x, layer = torch.randn(256, width), nn.Linear(width, 4 * width)
    runs = {"fp32": (layer, x), "bf16": (deepcopy(layer).bfloat16(), x.bfloat16())}
    if is_exact():
        runs["int8"] = Int8Linear(layer), x
    return {name: median_seconds(torch.device("cpu"), lambda run=run: run[0](run[1]), 20) for name, run in runs.items()}


def median_seconds(device: torch.device, run, repeats: int) -> float:
    """How long run() takes; the first time warms up."""
    watch, times = Stopwatch(device), []
    for _ in range(repeats + 1):
        began = watch.now()
        run()
        times.append(watch.now() - began)
    return statistics.median(times[1:])


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int = 4096) -> float:
    """Operations a second in a product of two square matrices, median of 5."""
    a, b = (torch.randint(-9, 10, (size, size), device=device).to(dtype) for _ in range(2))
    multiply = torch._int_mm if dtype == torch.int8 else torch.mm
    return 2 * size**3 / median_seconds(device, lambda: multiply(a, b), 5)
