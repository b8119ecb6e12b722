"""A GPU that any machine has: PyTorch's own CUDA code over a runtime that launches nothing, and values from the CPU.

`runtime.cpp`, `driver.cpp` and `cublas.cpp` stand in for CUDA's runtime, its driver and cuBLAS. Streams, events,
PyTorch's allocator, pinned memory, captures and what they forbid are as on a GPU; kernels are counted, those that
Inductor and Triton compile too. `emulation.py` computes, on the CPU and in the device's memory, what each operation
would have. So tests of CUDA run, values included, and large models are counted:

    python -m tests.null_gpu python -m pytest -p tests.null_gpu.emulation -n 0 -m gpu
    python -m tests.null_gpu python -m tests.null_gpu.batches

What it cannot show: the seconds and rounding of real kernels, what compiled ones compute, cuDNN, NCCL, the profiler's
view of a GPU.
"""

import ctypes
import os
import subprocess
from pathlib import Path

import torch

HERE = Path(__file__).parent
COUNTS = ("kernels", "replays", "kernels_in_replays", "copies", "waits", "allocations", "captures")


def build(folder: Path) -> Path:
    """The library, made in a folder; without a compiler or the headers of CUDA 13 an OSError.

    They come with a PyTorch for it, but for some of Triton's, whose others may be of another release.
    """
    packages = Path(torch.__file__).parents[1]
    headers = packages / "nvidia" / "cu13" / "include", packages / "triton" / "backends" / "nvidia" / "include"
    library = folder / "libcuda.so.1"  # the driver's name, so that PyTorch and Triton load no other
    options = ["-std=c++17", "-O1", "-shared", "-fPIC", f"-Wl,-soname,{library.name}"]
    options += [f"-I{place}" for place in headers]
    call = ["g++", *options, "-o", str(library), *sorted(map(str, HERE.glob("*.cpp")))]
    made = subprocess.run(call, capture_output=True, text=True)
    if made.returncode:
        raise OSError(f"it does not compile: {made.stderr[:1000]}")
    return library


def environment(library: Path) -> dict[str, str]:
    """That of a process which has the GPU; what it compiles is kept beside the library."""
    folder = library.parent
    names = dict(LD_PRELOAD=library, NULL_GPU=library, TRITON_LIBCUDA_PATH=folder)
    names |= dict(TRITON_CACHE_DIR=folder / "triton", TORCHINDUCTOR_CACHE_DIR=folder / "inductor")
    return os.environ | {name: str(path) for name, path in names.items()}


def counts() -> dict[str, int]:
    """What this process asked of the GPU since the last call: see COUNTS; kernels are those outside of replays."""
    numbers = (ctypes.c_long * len(COUNTS))()
    ctypes.CDLL(os.environ["NULL_GPU"]).null_gpu_counts(numbers)
    return dict(zip(COUNTS, numbers))
