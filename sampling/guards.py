"""What can be wrong with numbers and pictures that a model has made, seen before anybody measures them."""

import sys

import numpy as np
import torch
from tqdm import tqdm

from util.dist import is_half


def draw_finite(draw, num_images: int, dtype) -> tuple[torch.Tensor, list[int], list[int]]:
    """(latents (B, c, h, w), rows drawn twice, rows that are still not finite) of draw(rows, dtype) for all B rows.

    In floats of 16 bits a token may overflow. Its image is then drawn once more in float32, for which draw has to use
    the same seed. One look at the finished batch tells: nothing waits between the steps.
    """
    latents = draw(range(num_images), dtype)
    bad = _not_finite(latents)
    if not bad or not is_half(dtype):
        return latents, [], bad
    latents[bad] = again = draw(bad, torch.float32)
    return latents, bad, [bad[i] for i in _not_finite(again)]


def _not_finite(latents) -> list[int]:
    return (~torch.isfinite(latents).flatten(1).all(dim=1)).nonzero().squeeze(1).tolist()


def is_plain(image: np.ndarray) -> bool:
    """Have all pixels of an image (H, W, C), of more than one, the same colour?"""
    return image.size > image.shape[-1] and bool((image == image[:1, :1]).all())


def complain(what: str, images: list[int], total: int) -> None:
    """One line on stderr, above a progress bar, that names the first of the images; nothing where there are none."""
    if images:
        shown = ", ".join(map(str, images[:20])) + (", ..." if len(images) > 20 else "")
        tqdm.write(f"warning: {len(images)} of {total} images {what}: {shown}", file=sys.stderr)
