"""Sizes of images in pixels: a number, the sides of a square, or a text such as 256x384, height x width."""

import math
import re

Size = int | str
CELL = 16  # pixels that the sides of a size of a ratio are multiples of: the stride of the published tokenizers
SIZE = r"[1-9]\d{0,5}(x[1-9]\d{0,5})?"
RATIO = r"[1-9]\d{0,2}:[1-9]\d{0,2}"


def image_size(text: str) -> Size:
    """The size that a text names; one that names none raises ValueError."""
    return size_of(*sides(text))


def size_of(height: int, width: int) -> Size:
    """The size of so many pixels: a number where both are equal."""
    return height if height == width else f"{height}x{width}"


def sides(size: Size) -> tuple[int, int]:
    """(height, width); a text that is no size raises ValueError."""
    if isinstance(size, int):
        return size, size
    if not re.fullmatch(SIZE, size):
        valid = "a whole number from 1 to 999999, or HEIGHTxWIDTH like 256x384"
        raise ValueError(f"invalid value {size!r}: must be {valid}")
    height, _, width = size.partition("x")
    return int(height), int(width or height)


def grid_of(size: Size, stride: int) -> tuple[int, int] | None:
    """(h, w), the cells of stride pixels in a column and in a row; None where they do not fill the image."""
    height, width = sides(size)
    if height < stride or width < stride or height % stride or width % stride:
        return None
    return height // stride, width // stride


def shape_of(config) -> tuple[int, int]:
    """(h, w), the tokens in a column and in a row of images of a model of this configuration; of its finest scale."""
    return getattr(config, "shape", (config.grid, config.grid))  # without a shape images are square


def check_counts(config, names: str) -> None:
    """Raise ValueError where one of these fields of a configuration is below 1; None is no number."""
    for name in names.split():
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def check_square(size: Size | None, of: str) -> None:
    """Raise ValueError for a size that is no square, where images are squares only; of: of what they are."""
    if isinstance(size, str):
        raise ValueError(f"img_size {size} must be one number, the pixels of a side: images of {of} are square")


def bucket_sizes(text: str) -> str:
    """The text, if it is a comma list of two or more different sizes, or ratios W:H; else ValueError."""
    parts = text.split(",")
    valid = all(re.fullmatch(SIZE, part) or re.fullmatch(RATIO, part) for part in parts)
    if not valid or not 2 <= len(parts) == len(set(parts)):
        wanted = "two or more different sizes like 256x384, or ratios W:H like 3:2 (below 1000), with commas between"
        raise ValueError(f"invalid value {text!r}: must be {wanted}")
    return text


def sizes_of(text: str, img_size: Size) -> tuple[Size, ...]:
    """The sizes in the list of `bucket_sizes`; a ratio W:H has that of `size_of_ratio` with the area of img_size.

    Two that are the same raise ValueError.
    """
    area = math.prod(sides(img_size))
    sizes = []
    for part in text.split(","):
        if ":" in part:
            width, height = map(int, part.split(":"))
            sizes.append(size_of_ratio(width / height, area, part))
        else:
            sizes.append(image_size(part))
    if len(set(sizes)) < len(sizes):
        raise ValueError(f"--buckets {text} names a size twice: {', '.join(map(str, sizes))}")
    return tuple(sizes)


def size_of_ratio(ratio: float, area: int, name: str) -> Size:
    """The size of a ratio, width by height, of whole cells of CELL x CELL, about as many as have the area in pixels.

    Of the shorter side they are those of that ratio, rounded, of the longer one as many as the area then has: at least
    95 % of it from 16 x 16 cells on. An area that has none of this ratio raises ValueError.
    """
    cells = area // CELL**2
    short = round(math.sqrt(cells * min(ratio, 1 / ratio)))
    if not short:
        raise ValueError(f"--buckets {name}: an image of {area} pixels has no cells of {CELL}x{CELL} in this ratio")
    pair = (short, cells // short) if ratio >= 1 else (cells // short, short)
    return size_of(*(CELL * side for side in pair))
