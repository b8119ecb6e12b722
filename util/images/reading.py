"""Reading a picture file of any kind as 8-bit RGB, and the settings that say how.

Modes: `I`, `I;16`, `F` are Pillow's names for grey values of more than 8 bits; `deep` below means such pictures, and
colour with 16 bits a channel.
"""

import functools
import math
import warnings
from dataclasses import asdict, dataclass, fields, replace

import numpy as np
import torch
from PIL import Image, ImageColor

from util.args import flag, parse_range, pick
from util.sizes import Size, sides

# Pillow knows their names, but reads them not at all (a library of its own is missing) or through another program
NO_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "PDF", "WMF"}
SAMPLED = 100  # files of a folder that are looked at for the range of their values
BITS = (8, 10, 12, 14, 16)  # of cameras and scanners, whose files have 16
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF orientation -> what undoes it
LYING = (5, 6, 7, 8)  # those that exchange height and width


@dataclass(frozen=True)
class Reading:
    """How the images of a folder are found and read; other data sets have `flip` alone."""

    split_dir: str | None = flag(
        None, "folder inside --data_path to train on (default: train, where there is one; . for --data_path itself)"
    )
    value_range: str | None = flag(
        None,
        "values that become black and white in pictures of more than 8 bits (default: by mode and values)",
        metavar="LO,HI",
    )
    exif: bool = flag(True, "turn pictures upright as their EXIF orientation says; without it as in MAR")
    background: str = flag(
        "white",
        "what is behind transparent pictures: R,G,B or a colour's name; none: their hidden colours, as in MAR",
        metavar="COLOUR",
    )
    flip: bool = flag(True, "mirror half of the images, in data sets that may be mirrored")

    def __post_init__(self):
        self.range(), self.colour()

    @property
    def reading(self) -> "Reading":
        """These settings alone, of a dataclass that has them among others."""
        return pick(Reading, vars(self))

    def range(self) -> tuple[float, float] | None:
        """value_range as two numbers, None for none; another text raises ValueError."""
        if self.value_range is None:
            return None
        low, high = parse_range("value_range", self.value_range, float, low=-(2**31), high=2**32)
        if low == high:
            raise ValueError(f"--value_range must be LO,HI with LO below HI, got {self.value_range!r}")
        return low, high

    def colour(self) -> tuple[int, int, int] | None:
        """background as (R, G, B), None for none; an unknown colour raises ValueError."""
        if self.background == "none":
            return None
        try:
            numbers = [int(part) for part in self.background.split(",")]
            if len(numbers) == 3 and all(0 <= number <= 255 for number in numbers):
                return tuple(numbers)
        except ValueError:
            try:
                return ImageColor.getrgb(self.background)[:3]
            except ValueError:
                pass
        raise ValueError(
            f"--background must be R,G,B of 0 to 255, a colour's name such as white, or none; got {self.background!r}"
        )

    def flags(self) -> list[str]:
        """The words of a command line that say these settings."""
        changed = [(f.name, getattr(self, f.name)) for f in fields(Reading) if getattr(self, f.name) != f.default]
        return [word for k, v in changed for word in ([f"--no_{k}"] if v is False else [f"--{k}", v])]

    def check(self, data: str | None) -> None:
        """Raise ValueError where these settings have no meaning for the data set of this name."""
        words = replace(self.reading, flip=True).flags()
        if words and data != "imagefolder":
            raise ValueError(f"{' '.join(words)} has no meaning for the data set {data}, only for imagefolder")


DEFAULT = Reading()
MARS_WAY = Reading(exif=False, background="none")  # also that of checkpoints and caches which do not say theirs


def stored_reading(stored: dict | None) -> Reading:
    """The settings as a checkpoint or a cache has them; those that it does not have are MAR's."""
    return pick(Reading, {**asdict(MARS_WAY), **(stored or {})})


@functools.cache
def extensions() -> frozenset[str]:
    """Endings, in small letters, of the files that Pillow reads."""
    names = Image.registered_extensions()
    return frozenset(ending for ending, name in names.items() if name in Image.OPEN and name not in NO_PICTURES)


def read_rgb(path: str, reading: Reading = DEFAULT, ranges: dict | None = None) -> Image.Image:
    """Read an image file of any mode as 8-bit RGB, of several frames the first.

    Grey and colour values of more than 8 bits are scaled from reading.value_range, else from `ranges` (of `find_ranges`
    for the files beside it), else from what the file's own values suggest. Raises what PIL raises on damaged files, and
    ValueError on values that make no sense and on a decompression bomb (above 179 million pixels, twice
    Image.MAX_IMAGE_PIXELS).
    """
    with open_picture(path) as image:
        deep = _deep_values(image, path, reading)
        image.load()
        turn = TURNS.get(_orientation(image)) if reading.exif else None
        if deep is not None:
            image = _shallow(deep, reading.range(), ranges or {})
        colour = reading.colour()
        see_through = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
        if see_through and (colour is not None or image.mode == "P"):
            image = image.convert("RGBA")  # the same colours; PIL warns about each file converted directly to RGB
            if colour is not None:
                image = Image.alpha_composite(Image.new("RGBA", image.size, colour), image)
        image = image.convert("RGB")
        return image if turn is None else image.transpose(turn)


def picture_sides(path: str, reading: Reading = DEFAULT) -> tuple[int, int]:
    """(height, width) of a picture as `read_rgb` would give it, from its header. Raises what PIL raises."""
    with open_picture(path) as image:
        turned = reading.exif and _orientation(image) in LYING
        return image.size if turned else image.size[::-1]


def open_picture(path: str) -> Image.Image:
    """A picture of which only the head is read yet; ValueError for a decompression bomb."""
    try:
        return Image.open(path)
    except Image.DecompressionBombError as error:
        raise ValueError(str(error).rstrip(".")) from None


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(0x0112)
    except Exception:  # damaged notes about a picture are no damage to the picture
        return None


# --------------------------------------------------------------------------------------------- more than 8 bits


def _deep_values(image: Image.Image, path: str, reading: Reading) -> np.ndarray | None:
    """The values (H, W) or (H, W, C) of a picture of more than 8 bits, None for any other. Loads such a picture."""
    if image.mode.startswith("I") or image.mode == "F":
        image.load()
        return np.asarray(image)
    if not any(";16" in str(tile[3]) for tile in image.tile):
        return None
    image.load()  # 8 of the 16 bits of each colour
    if image.format == "PNG":
        import torchvision.io as io

        data = torch.from_numpy(np.fromfile(path, dtype=np.uint8))
        return io.decode_png(data, io.ImageReadMode.UNCHANGED).permute(1, 2, 0).numpy()  # (H, W, C)
    pinned = reading.range() or (0, 65535)
    if pinned != (0, 65535) or max(high for _, high in image.convert("RGB").getextrema()) < 64:
        raise ValueError("16-bit colours that use a part of their range only, or --value_range: make it a 16-bit PNG")
    return None


def _shallow(values: np.ndarray, pinned: tuple | None, ranges: dict) -> Image.Image:
    """An 8-bit picture of deep values."""
    values, alpha = _without_alpha(values)
    low, high = float(values.min()), float(values.max())
    if not math.isfinite(low + high):
        raise ValueError(f"float image with values in [{low:g}, {high:g}]: some are no numbers")
    kind = values.dtype.kind
    chosen = pinned or ranges.get(kind)
    if chosen is None:
        chosen = _guess(kind, low, high)
        if _is_doubtful(kind, chosen):
            _say(f"a picture of more than 8 bits is read with {chosen[0]:g} as black and {chosen[1]:g} as white")
    elif pinned is None and not chosen[0] <= low <= high <= chosen[1]:
        if kind == "f":
            raise ValueError(f"float image with values in [{low:g}, {high:g}], others have {chosen}: --value_range")
        _say(f"pictures with values beyond {chosen[0]:g} to {chosen[1]:g}, the range of the others, are clipped")
    scaled = _scaled(values, *chosen).astype(np.uint8)
    if pinned is None and kind != "f" and high > 0 and not scaled.any():
        _say(f"some pictures turn black: others reach {chosen[1]:g}, they less than 1/256 of it")
    picture = Image.fromarray(scaled)
    if alpha is not None:
        picture.putalpha(Image.fromarray((alpha // 256).astype(np.uint8)))
    return picture


def _without_alpha(values: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """(values, alpha) of an array (H, W) or (H, W, C), alpha None for one without; grey is (H, W)."""
    if values.ndim == 2 or values.shape[2] == 3:
        return values, None
    return (values[:, :, 0] if values.shape[2] == 2 else values[:, :, :3]), values[:, :, -1]


def _scaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values with low as 0 and high as 255; whole numbers fall into 256 equal parts, as in a division by 256."""
    if values.dtype.kind == "f":
        scaled = ((values - low) * (255 / (high - low))).round()
    else:
        scaled = np.floor((values.astype(np.float64) - low) * (256 / (high - low + 1)))
    return scaled.clip(0, 255)


def _guess(kind: str, low: float, high: float) -> tuple[float, float]:
    """The range that values from low to high suggest; kind: of their numpy type, f for floats."""
    if kind == "f":
        if not 0 <= low <= high <= 255:  # true for NaN
            raise ValueError(
                f"float image with values in [{low:g}, {high:g}], expected 0..1 or 0..255; --value_range LO,HI pins it"
            )
        return (0.0, 1.0) if high <= 1 else (0.0, 255.0)
    if low < 0:
        return low, max(high, low + 1)
    return 0.0, next((2.0**bits - 1 for bits in BITS if high < 2**bits), high)


def _is_doubtful(kind: str, chosen: tuple[float, float]) -> bool:
    """Is a range another than that of the mode, which needs no word?"""
    return kind != "f" and chosen != (0.0, 65535.0)


def _say(what: str) -> None:
    warnings.warn(f"{what}; --value_range LO,HI pins it", stacklevel=2)


def find_ranges(paths: list[str], reading: Reading, folder: str) -> dict[str, tuple[float, float]]:
    """The range of the deep pictures among the files of a folder, from the values of SAMPLED of them; said if doubtful.

    Keys are those of `_guess`. Nothing is looked at where value_range says it.
    """
    if reading.value_range is not None:
        return {}
    extremes = {}
    for i in range(0, len(paths), max(1, len(paths) // SAMPLED)):
        try:
            with open_picture(paths[i]) as image:
                values = _deep_values(image, paths[i], reading)
        except Exception:  # named when it is read
            continue
        if values is not None:
            values, _ = _without_alpha(values)
            low, high = extremes.get(values.dtype.kind, (math.inf, -math.inf))
            extremes[values.dtype.kind] = (min(low, float(values.min())), max(high, float(values.max())))
    ranges = {}
    for kind, (low, high) in extremes.items():
        try:
            ranges[kind] = _guess(kind, low, high)
        except ValueError:
            continue  # each such file is named when it is read
        if _is_doubtful(kind, ranges[kind]):
            first, last = ranges[kind]
            what = f"pictures of more than 8 bits in {folder} with values from {low:g} to {high:g}"
            _say(f"{what} are read with {first:g} as black and {last:g} as white")
    return ranges


# -------------------------------------------------------------------------------------------------------- cropping


def center_crop(image: Image.Image, size: Size) -> Image.Image:
    """Scale an image until it just covers a size, and cut out its centre of that size (of squares as ADM does)."""
    high, wide = sides(size)
    while image.width >= 2 * wide and image.height >= 2 * high:  # box filters halve it: bicubic would leave aliasing
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(wide / image.width, high / image.height)
    width, height = round(image.width * scale), round(image.height * scale)
    left, top = (width - wide) // 2, (height - high) // 2
    # Only the cropped part of the (width, height) image is computed: of a 1 x 10,000 strip the whole has gigabytes.
    sx, sy = image.width / width, image.height / height
    box = (left * sx, top * sy, min((left + wide) * sx, image.width), min((top + high) * sy, image.height))
    return image.resize((wide, high), Image.Resampling.BICUBIC, box=box)
