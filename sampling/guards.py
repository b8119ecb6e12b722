"""Checks of sampled latents and pictures, before they are measured: not finite, of one colour."""

import sys

import numpy as np
import torch
from tqdm import tqdm

from util.dist import is_half


def draw_finite(draw, num_images: int, dtype) -> tuple[torch.Tensor, list[int], list[int]]:
    """(latents or ids (B, …), images drawn twice, images that are still not finite) of draw(images, dtype), B images.

    In floats of 16 bits a token may overflow. Its image is then drawn again in float32; draw must use the same seed.
    The finished batch is checked, so that the host does not wait for the device between the steps.
    """
    latents = draw(range(num_images), dtype)
    overflowed = _not_finite(latents)
    if not overflowed or not is_half(dtype):
        return latents, [], overflowed
    redrawn = draw(overflowed, torch.float32)
    latents[overflowed] = redrawn
    return latents, overflowed, [overflowed[i] for i in _not_finite(redrawn)]


def _not_finite(latents) -> list[int]:
    """The images in the batch that have a number which is not finite, or an id that is none."""
    wrong = ~torch.isfinite(latents) if latents.is_floating_point() else latents < 0
    return wrong.flatten(1).any(dim=1).nonzero().squeeze(1).tolist()


def is_plain(image: np.ndarray) -> bool:
    """Is an image (H, W, C) of one colour? One of a single pixel does not count."""
    return image.size > image.shape[-1] and bool((image == image[:1, :1]).all())


def complain(fault: str, images: list[int], total: int) -> None:
    """One line on stderr, above a progress bar, that names the first 20 of the images; nothing for no images."""
    if images:
        shown = ", ".join(map(str, images[:20]))
        if len(images) > 20:
            shown += ", ..."
        tqdm.write(f"warning: {len(images)} of {total} images {fault}: {shown}", file=sys.stderr)
