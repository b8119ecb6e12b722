"""Editing: a picture of which a part is kept and the rest is generated.

The mask is a picture too: white pixels (at least WHITE) are generated, black ones kept. A token is unknown if any of
its pixels is white, so the generated area is the white one grown to whole tokens.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import UnidentifiedImageError

from models.kv_cache import check_prefix
from sampling.trace import GREY
from util.images.datasets import read_rgb
from util.images.pictures import make_grid
from util.images.reading import open_picture
from util.sizes import Size, grid_of, sides

MODES = {1: "L", 3: "RGB"}  # channels -> PIL's name
WHITE = 128  # least grey level of a pixel to generate


@dataclass(frozen=True)
class Edit:
    """source uint8 (H, W, C); unknown (h, w) bool, the tokens to generate as a grid."""

    source: np.ndarray
    unknown: np.ndarray

    def check(self, fixed_rules: dict[str, str]) -> None:
        """Raise ValueError for known tokens that a model with these rules of its own cannot keep."""
        if fixed_rules == {"order": "raster", "group": "one"}:
            check_prefix(torch.from_numpy(self.unknown).flatten()[None])

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
        """uint8 images (n, H, W, C) with the known tokens' pixels of the source, which an autoencoder changes."""
        return np.where(self.pixels, images, self.source)

    def grid(self, images: np.ndarray, captions: list[str], columns: int) -> np.ndarray:
        """Images (n, H, W, C) with captions, in rows of `columns`; to the left the source and its kept part."""
        columns = min(columns, len(images))
        kept = np.where(self.pixels, np.uint8(GREY), self.source)
        blank = np.full_like(kept, 255)
        shown, titles = [], []
        for start in range(0, len(images), columns):
            if start == 0:
                shown += [self.source, kept]
                titles += ["source", "kept"]
            else:
                shown += [blank, blank]
                titles += ["", ""]
            shown += [*images[start : start + columns]]
            titles += captions[start : start + columns]
        return make_grid(np.stack(shown), titles, columns + 2)


def editing_defaults(edit_image: str | None, edit_mask: str | None, given: dict, num_labels: int) -> dict:
    """What editing puts in the place of the checkpoint's settings: no metrics, a picture a label; {} without editing.

    Half of the two flags, or metrics asked for by hand, raise ValueError.
    """
    missing = [name for name, path in (("edit_image", edit_image), ("edit_mask", edit_mask)) if path is None]
    if len(missing) == 1:
        raise ValueError(f"--edit_image and --edit_mask go together: --{missing[0]} is missing")
    if missing:
        return {}
    if given.get("metrics", "none") != "none":
        raise ValueError(f"--metrics {given['metrics']} has no meaning for edited pictures, use none or leave it out")
    return dict(metrics="none", num_images=num_labels)


def open_edit(edit_image: str | None, edit_mask: str | None, model_config, channels: int, dry: bool) -> Edit | None:
    """What the two flags name to edit, for a model; None without them, and with dry where a picture is missing."""
    if edit_image is None or (dry and not (Path(edit_image).is_file() and Path(edit_mask).is_file())):
        return None
    cell = sides(model_config.img_size)[0] // model_config.grid
    return read_edit(edit_image, edit_mask, img_size=model_config.img_size, channels=channels, cell=cell)


def read_edit(image: str, mask: str, *, img_size: Size, channels: int, cell: int) -> Edit:
    """The edit of two picture files, for a model of images of this size whose tokens have sides of cell pixels.

    Pictures of any mode are converted to the channels (1 or 3). ValueError: a file that is no picture or of another
    size, a mask without a white pixel.
    """
    source = _read("edit_image", image, MODES[channels], img_size)
    white = _read("edit_mask", mask, "L", img_size)[:, :, 0] >= WHITE
    if not white.any():
        raise ValueError(f"--edit_mask {mask} has no pixel of at least {WHITE} (white): there is nothing to generate")
    h, w = grid_of(img_size, cell)
    return Edit(source, white.reshape(h, cell, w, cell).any(axis=(1, 3)))


def _read(flag: str, path: str, mode: str, img_size: Size) -> np.ndarray:
    """uint8 (H, W, C) of a picture file of this size."""
    if not Path(path).is_file():
        raise ValueError(f"--{flag}: there is no file {path}")
    return read_picture(f"--{flag} {path}", path, mode, img_size)


def _size_of(file) -> tuple[int, int]:
    """Width and height as a picture's head says them: nothing is unpacked, however many pixels there are."""
    with open_picture(file) as picture:
        size = picture.size
    if hasattr(file, "seek"):
        file.seek(0)
    return size


def read_picture(name: str, file, mode: str, img_size: Size) -> np.ndarray:
    """uint8 (H, W, C) of a picture of this size, a path or an open file; name: what an error calls it.

    mode: one of MODES. One that is no picture or has another size raises ValueError.
    """
    height, width = sides(img_size)
    try:
        shape = _size_of(file)
        if shape in ((width, height), (height, width)):  # which its notes may turn
            picture = read_rgb(file).convert(mode)
            shape = picture.size
    except UnidentifiedImageError:  # whose text names the object that an open file is
        raise ValueError(f"{name} cannot be read as a picture: its format is not known") from None
    except Exception as error:  # PIL raises almost any type for damaged files
        raise ValueError(f"{name} cannot be read as a picture: {error or type(error).__name__}") from None
    if shape != (width, height):
        has = "{}x{}".format(*shape)
        raise ValueError(f"{name} has {has} pixels (width x height), the model makes {width}x{height}")
    pixels = np.array(picture)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels
