"""Seeds of all random draws, each a function of names and numbers, without any stored state.

torch's CPU generator keeps 32 bits of a seed. For training draws these are a hash; the images of a sampling run have
consecutive numbers, so that no two of a run share a seed.
"""

import hashlib

import torch

DEFAULT_SEED = 1  # of training and of sampling; MAR's


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


def draw_by_image(generators: list, rows: torch.Tensor, shape, dim: int) -> torch.Tensor:
    """Normal draws for rows (N, 2), (image, position) in row-major order, those of image i from generators[i].

    shape(k) is the shape of k rows' draws, dim the one that the images' parts are joined along.
    """
    images, counts = rows[:, 0].unique_consecutive(return_counts=True)
    parts = [torch.randn(shape(k), generator=generators[i]) for i, k in zip(images.tolist(), counts.tolist())]
    return torch.cat(parts, dim=dim)
