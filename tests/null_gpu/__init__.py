"""A GPU that any machine has: PyTorch's own CUDA code over a runtime that launches nothing, and values from the CPU.

`runtime.cpp` stands in for CUDA's runtime, driver and cuBLAS. Streams, events, PyTorch's allocator, pinned memory,
captures and what they forbid are as on a GPU; kernels are counted. `emulation.py` computes, on the CPU and in the
device's memory, what each operation would have. So tests of CUDA run, values included, and large models are counted:

    python -m tests.null_gpu python -m pytest -p tests.null_gpu.emulation -n 0 -m gpu
    python -m tests.null_gpu python -m tests.null_gpu.batches

What it cannot show: the seconds and rounding of real kernels, cuDNN, NCCL, Triton, the profiler's view of a GPU.
"""

import ctypes
import importlib.util
import os
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
COUNTS = ("kernels", "replays", "kernels_in_replays", "copies", "waits", "allocations", "captures")


def build(folder: Path) -> Path:
    """The library, made in a folder; without a compiler or the headers that come with Triton an OSError."""
    triton = importlib.util.find_spec("triton")
    if triton is None:
        raise OSError("no Triton, whose headers of CUDA it needs")
    headers = Path(triton.origin).parent / "backends" / "nvidia" / "include"
    library, source = folder / "libnull_gpu.so", HERE / "runtime.cpp"
    # of this name, so that PyTorch does not load another driver
    options = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{headers}"]
    made = subprocess.run(["g++", *options, "-o", str(library), str(source)], capture_output=True, text=True)
    if made.returncode:
        raise OSError(f"it does not compile: {made.stderr.strip().splitlines()[-1]}")
    return library


def environment(library: Path) -> dict[str, str]:
    """That of a process which has the GPU."""
    return os.environ | {"LD_PRELOAD": str(library), "NULL_GPU": str(library)}


def counts() -> dict[str, int]:
    """What this process asked of the GPU since the last call: see COUNTS; kernels are those outside of replays."""
    numbers = (ctypes.c_long * len(COUNTS))()
    ctypes.CDLL(os.environ["NULL_GPU"]).null_gpu_counts(numbers)
    return dict(zip(COUNTS, numbers))
