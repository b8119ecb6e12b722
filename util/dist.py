"""Processes: who this one is, and the few things they do together. One process without a launcher is rank 0 of 1."""

import contextlib
import datetime
import itertools
import os
import sys
import threading

import torch
import torch.distributed as dist
from torch import nn

WORKERS = dict(help="processes that load images, at most one a core", low=0, high=1024)  # of a flag
WAIT_SECONDS = 5  # for other processes, before the waiting one says so


def init(device: torch.device, dist_url: str = "env://", dist_on_itp: bool = False) -> None:
    """Join the process group that torchrun, SLURM or (with dist_on_itp) Open MPI describes in the environment.

    NCCL on CUDA, gloo elsewhere. Without a launcher nothing happens.
    """
    env = os.environ
    if dist_on_itp:
        keys = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
        if keys[0] not in env:
            raise ValueError("--dist_on_itp needs Open MPI's environment (OMPI_COMM_WORLD_RANK is not set)")
        dist_url = f"tcp://{env['MASTER_ADDR']}:{env['MASTER_PORT']}" if dist_url == "env://" else dist_url
    elif "RANK" in env and "WORLD_SIZE" in env:
        keys = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", 1)) > 1 and "MASTER_ADDR" in env:
        keys = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    else:
        return
    rank, size, local = int(env[keys[0]]), int(env[keys[1]]), int(env.get(keys[2], 0))
    if device.type == "cuda":
        if keys[0] == "SLURM_PROCID" and torch.cuda.device_count() == 1:  # SLURM shows each process its own only
            local = 0
        check_local_rank(local, torch.cuda.device_count())
        torch.cuda.set_device(local)
    # Read before there is a group, which its functions else have as a default: its threads would outlive shutdown.
    from torch.distributed.nn import functional  # noqa: F401

    place = f"{env.get('MASTER_ADDR', '')}:{env.get('MASTER_PORT', '')}" if dist_url == "env://" else dist_url
    with said_after(WAIT_SECONDS, waiting_for(rank, size, place, keys[0])):
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=dist_url,
            rank=rank,
            world_size=size,
            timeout=datetime.timedelta(minutes=30),
        )


def num_loading(num_workers: int) -> int:
    """How many processes load images where so many are asked for: at most one for each core that may be used."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(num_workers, cores)


def check_local_rank(local_rank: int, num_devices: int) -> None:
    """Raise ValueError for a process without a GPU of its own."""
    if local_rank >= num_devices:
        raise ValueError(
            f"process {local_rank} of this machine has no GPU of its own, there are {num_devices}: --nproc_per_node "
            f"must be at most {num_devices}, or use --device cpu"
        )


def waiting_for(rank: int, size: int, place: str, variable: str) -> str:
    """What a process that waits for its peers has to say."""
    return (
        f"waiting for the other {size - 1} of {size} processes at {place} (this is number {rank}); to run alone unset "
        f"{variable}"
    )


@contextlib.contextmanager
def said_after(seconds: float, line: str):
    """The line goes to stderr if the block takes longer than this."""
    timer = threading.Timer(seconds, lambda: print(line, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def rank() -> int:
    """This process's number, 0 is the one that prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def all_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor summed over processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def main_first():
    """The block runs on the first process before it runs on the others, for downloads and new folders."""
    if not is_main():
        barrier()
    try:
        yield
    finally:  # on an error too, else the others would wait 30 minutes
        if is_main():
            barrier()


def shutdown() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA, else Apple's MPS, else CPU. A device that this machine lacks raises ValueError."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device_type for device_type, usable in available.items() if usable)
    device_type = name.split(":")[0]
    if not available.get(device_type, False):
        valid = ", ".join(["auto", *(device_type for device_type, usable in available.items() if usable)])
        raise ValueError(f"device {name!r} is not available; valid on this machine: {valid}")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name!r} is not a device; valid: auto, cuda, cuda:N, mps, cpu") from None
    if device_type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


def check_devices(device: torch.device, **modules) -> None:
    """Raise RuntimeError unless the tensors of all modules, None among them or not, are on the device.

    For what is made of them: a forgotten `.to(device)` is found there and not in its first step.
    """
    for name, module in modules.items():
        tensors = itertools.chain(module.parameters(), module.buffers()) if isinstance(module, nn.Module) else ()
        other = next((x.device for x in tensors if x.device.type != device.type), None)
        if other is not None:
            raise RuntimeError(f"{name} is on {other}, what it works with is on {device}")


FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES = FLOATS | {"int8": torch.int8}  # for sampling, see models/low_precision.py


def pick_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """What to compute in; None is bf16 on CUDA that supports it, else fp32.

    fp16 anywhere but on CUDA, and int8 anywhere but on the CPU, raise ValueError.
    """
    if name is None:
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}; valid: {', '.join(DTYPES)}")
    only_on = {"fp16": "cuda", "int8": "cpu"}
    if only_on.get(name, device.type) != device.type:
        valid = ", ".join(other for other in FLOATS if only_on.get(other, device.type) == device.type)
        raise ValueError(f"dtype {name} needs the device {only_on[name]}, this is {device}; valid here: {valid}")
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype on the command line."""
    return next(name for name, value in DTYPES.items() if value == dtype)


def is_half(dtype: torch.dtype) -> bool:
    """Is it a float of 16 bits?"""
    return dtype in (torch.bfloat16, torch.float16)


def set_deterministic(on: bool) -> None:
    """Let torch compute the same bits every time on the same machine, or, switched off, as fast as it can.

    Must be called before anything runs on a GPU. An operation without a deterministic version raises RuntimeError.
    """
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once, when it starts
    if on or torch.are_deterministic_algorithms_enabled():  # the call imports torch's compiler, a second
        torch.use_deterministic_algorithms(on)
    torch.backends.cudnn.deterministic = on


@contextlib.contextmanager
def tf32(on: bool):
    """In this context CUDA rounds the factors of float32 products and convolutions to 10 bits (TF32), or to none.

    Where somebody has set torch's `fp32_precision`, which has these flags' place, that counts.
    """
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    try:
        before = [backend.allow_tf32 for backend in backends]
    except RuntimeError:
        yield
        return
    try:
        for backend in backends:
            backend.allow_tf32 = on
        yield
    finally:
        for backend, value in zip(backends, before):
            backend.allow_tf32 = value


PINNED_FROM = 1 << 16  # bytes; less is copied at once, whatever memory it is in


def send(tensor: torch.Tensor, device) -> torch.Tensor:
    """A copy on the device, without waiting for its queue; the CPU tensor must not be written to afterwards."""
    to_gpu = torch.device(device).type == "cuda" and tensor.device.type == "cpu"
    if to_gpu and tensor.nbytes >= PINNED_FROM:  # from other memory CUDA waits for all that is queued
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def autocast(device: torch.device, dtype: torch.dtype):
    """Autocast at this dtype where it is a float of 16 bits, else none."""
    return torch.autocast(device.type, dtype=dtype if is_half(dtype) else None, enabled=is_half(dtype))
