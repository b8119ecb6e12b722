"""Editing: a picture of which a part is kept and the rest is generated.

The mask is a picture too: white (128 or more) is to be generated, black is kept. A token is unknown as soon as one of
its pixels is to be generated, so what is generated is the white area grown to whole tokens.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sampling.trace import GREY
from util.images.datasets import read_rgb
from util.images.pictures import make_grid

MODES = {1: "L", 3: "RGB"}  # channels -> PIL's name
WHITE = 128  # grey levels from here on are to be generated


@dataclass(frozen=True)
class Edit:
    """source uint8 (H, W, C), and which tokens are unknown, a grid (g, g) bool."""

    source: np.ndarray
    unknown: np.ndarray

    @property
    def pixels(self) -> np.ndarray:
        """The pixels of the unknown tokens, (H, W, 1) bool."""
        cell = len(self.source) // len(self.unknown)
        return np.kron(self.unknown, np.ones((cell, cell), dtype=bool))[:, :, None]

    @property
    def hashes(self) -> dict[str, str]:
        """What identifies the edit among the settings of a run: 16 hex digits of the picture, 16 of the tokens."""
        arrays = dict(edit_image=self.source, edit_mask=self.unknown)
        return {k: hashlib.blake2b(v.tobytes(), digest_size=8).hexdigest() for k, v in arrays.items()}

    def images(self) -> torch.Tensor:
        """The source as a batch (1, C, H, W) in [−1, 1]."""
        return torch.from_numpy(self.source).permute(2, 0, 1)[None].float() / 127.5 - 1

    def paste(self, images: np.ndarray) -> np.ndarray:
        """uint8 images (n, H, W, C) with the source wherever no token was unknown: an autoencoder would change it."""
        return np.where(self.pixels, images, self.source)

    def grid(self, images: np.ndarray, captions: list[str], columns: int) -> np.ndarray:
        """Images (n, H, W, C) with captions, in rows of `columns`, after the source and what is kept of it."""
        columns = min(columns, len(images))
        kept = np.where(self.pixels, np.uint8(GREY), self.source)
        before, names, shown, titles = [self.source, kept], ["source", "kept"], [], []
        for start in range(0, len(images), columns):
            shown += [*before, *images[start : start + columns]]
            titles += [*names, *captions[start : start + columns]]
            before, names = [np.full_like(kept, 255)] * 2, ["", ""]
        return make_grid(np.stack(shown), titles, columns + 2)


def read_edit(image: str, mask: str, *, img_size: int, channels: int, cell: int) -> Edit:
    """The edit that two picture files describe, for a model of img_size pixels whose tokens have sides of cell pixels.

    Any mode is converted to the channels (1 or 3). ValueError: a file that is no picture or of another size, a mask
    without anything to generate.
    """
    source = _read("edit_image", image, MODES[channels], img_size)
    wanted = _read("edit_mask", mask, "L", img_size)[:, :, 0] >= WHITE
    if not wanted.any():
        raise ValueError(f"--edit_mask {mask} has no pixel of at least {WHITE} (white): there is nothing to generate")
    g = img_size // cell
    return Edit(source, wanted.reshape(g, cell, g, cell).any(axis=(1, 3)))


def _read(flag: str, path: str, mode: str, size: int) -> np.ndarray:
    """uint8 (size, size, C) of a picture file."""
    if not Path(path).is_file():
        raise ValueError(f"--{flag}: there is no file {path}")
    try:
        picture = read_rgb(path).convert(mode)
    except Exception as error:  # damaged files make PIL leak almost any type
        raise ValueError(f"--{flag} {path} cannot be read as a picture: {error or type(error).__name__}") from None
    if picture.size != (size, size):
        here = f"{picture.width}x{picture.height}"
        raise ValueError(f"--{flag} {path} has {here} pixels, the model makes pictures of {size}x{size}")
    pixels = np.array(picture)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels
