"""Seeds of all random draws, each a function of names and numbers, without any stored state.

torch's CPU generator keeps 32 bits of a seed. For training draws these are a hash; the images of a sampling run have
consecutive numbers, so that no two of a run share a seed.
"""

import hashlib
import math
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

DEFAULT_SEED = 1  # of training and of sampling; MAR's
THREADED_FROM = 1 << 20  # numbers; of fewer, threads wait for each other longer than they draw
NUM_THREADS = min(8, os.cpu_count() or 1)


def seed_of(*key) -> int:
    """A 32-bit seed from any ints and strings."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=4).digest(), "little")


def image_seeds(seed: int, indices) -> list[int]:
    """Seeds of the images `indices` of the sampling run `seed`; distinct within the run."""
    start = seed_of("image", seed)
    return [(start + int(i)) % 2**32 for i in indices]


def generator(seed: int) -> torch.Generator:
    """A CPU generator at this seed."""
    return torch.Generator().manual_seed(int(seed))


def gumbel(seeds: torch.Tensor, num: int) -> torch.Tensor:
    """Gumbel draws (N, num) float32, row i of seeds[i] alone; seeds (N,) int32 are whatever a generator draws.

    Made where the seeds are, since for a codebook of 16384 entries a host would take longer than a GPU for all the
    rest; in whole numbers, so that every device has the same uniform numbers.
    """
    places = _mixed(torch.arange(num, dtype=torch.int32, device=seeds.device))
    uniform = ((_mixed(seeds.unsqueeze(1) ^ places) >> 8) & 0xFFFFFF).float() * 2.0**-24  # in [0, 1)
    # minus the log of an exponential draw, which is −log(1 − u) or, that no draw is infinite, half a step of u
    return uniform.neg_().log1p_().neg_().clamp_(min=2.0**-25).log_().neg_()


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """int32 (…) to int32 (…), one to one, each bit of the result depending on all bits of x: "lowbias32", C. Wellons.

    Products wrap around; a shift to the right keeps the sign, so its upper bits are masked.
    """
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * (0x846CA68B - 2**32)
    return x ^ ((x >> 16) & 0xFFFF)


def draw_by_image(generators: list, rows: torch.Tensor, shape, dim: int) -> torch.Tensor:
    """Normal draws for rows (N, 2), (image, position) in row-major order, those of image i from generators[i].

    shape(k) is the shape of k rows' draws, dim the one that the images' parts are joined along. Many are drawn in
    threads, so that a GPU does not wait for one core.
    """
    images, counts = rows[:, 0].unique_consecutive(return_counts=True)
    pairs = list(zip(images.tolist(), counts.tolist()))

    def draw(some: list) -> list:
        return [torch.randn(shape(k), generator=generators[i]) for i, k in some]

    if math.prod(shape(len(rows))) < THREADED_FROM:
        return torch.cat(draw(pairs), dim=dim)
    size = math.ceil(len(pairs) / NUM_THREADS)
    shares = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    return torch.cat([part for parts in _threads().map(draw, shares) for part in parts], dim=dim)


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="draws")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.cache_clear)  # the child has none of these threads
