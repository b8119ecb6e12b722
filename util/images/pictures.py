"""Pictures: between tensors in [−1, 1], uint8 arrays and PNG files; sample grids."""

import errno
import functools
import json
import math
import os
import re
import warnings
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import Dataset

from util.checkpoint import atomic_file
from util.lock import remove_left

SAMPLES = "samples.npz"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of a disk without space for this user or file
MADE = r"(\d+|grid)\.png|(samples|trace)\.npz"  # names of a sampling run's files
MIN_SIDE = 64  # rows of pixels of an image in a grid, at least
MAX_ZOOMED = 128  # columns of pixels, up to which small images are enlarged for the sake of their captions
FONT_SIZE, LINE, GAP = 11, 14, 4  # pixels: letters, from line to line, between images
CAPTION_LINES = 4  # at most
PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_END = b"IEND\xaeB`\x82"  # every whole PNG's last bytes


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """Images (B, C, H, W) in [−1, 1], clamped, as uint8 (B, H, W, C)."""
    grey = ((images.float() + 1) * 127.5).round().clamp(0, 255)
    return grey.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()  # bytes on the way to the host


def image_path(folder: Path, index: int) -> Path:
    """Where image number `index` of a sampling run is."""
    return folder / f"{index}.png"


def is_png(path: Path) -> bool:
    """Does the file begin as a PNG does?"""
    with open(path, "rb") as file:
        return file.read(len(PNG_START)) == PNG_START


def save_png(path: Path, image: np.ndarray) -> None:
    """Write uint8 (H, W, 1 or 3) atomically."""
    with atomic_file(path) as temporary:
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(temporary, format="png")


class Writer:
    """Writes PNG files in threads, a batch of them while the next one is computed.

    What goes wrong with a file is raised by the next call, or where the `with` block ends.
    """

    def __init__(self):
        self.pool, self.writing = ThreadPoolExecutor(min(16, os.cpu_count() or 1)), []

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind, error, trace) -> None:
        with self.pool:
            if kind is None:
                self.wait()

    def save(self, paths: list[Path], images: Iterable[np.ndarray]) -> None:
        """Begin to write images uint8 (H, W, 1 or 3), once those of the last call are written."""
        self.wait()
        self.writing = [self.pool.submit(save_png, path, image) for path, image in zip(paths, images)]

    def wait(self) -> None:
        """Return when all files are there."""
        writing, self.writing = self.writing, []
        for file in writing:
            file.result()


def read_png(path: Path) -> np.ndarray:
    """uint8 (H, W, C). A file that is not a whole picture raises ValueError."""
    try:
        with Image.open(path) as image:
            array = np.asarray(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    return array[:, :, None] if array.ndim == 2 else array


def is_readable(path: Path) -> bool:
    """Does path hold a whole picture, to the last byte?"""
    try:
        read_png(path)
    except ValueError:
        return False
    return path.read_bytes().endswith(PNG_END)  # PIL reads a file that ends after the last pixel


def read_run(folder: Path) -> dict:
    """What run.json says of the run whose pictures a folder holds; {} where it cannot be read."""
    try:
        run = json.loads((folder / "run.json").read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return run if isinstance(run, dict) else {}


def begin_folder(folder: Path, run: dict) -> None:
    """Make the folder of a sampling run, with run.json unless it has one; of processes at once the first one's stays.

    Files of a run's names in a folder without run.json are nobody's of ours: ValueError, and nothing is touched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / "run.json"
    if note.is_file():
        return
    made = next((file for file in folder.iterdir() if re.fullmatch(MADE, file.name)), None)
    if made is not None and not note.is_file():
        raise ValueError(f"{folder} holds {made.name} and no run.json: not ours, choose another folder")
    temporary = folder / f".run.json.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(run))
    try:
        os.link(temporary, note)  # whole or not at all, and never over another one
    except (FileExistsError, FileNotFoundError):  # another process was quicker, or has tidied up
        pass
    except OSError:  # a file system without links
        temporary.replace(note)
    finally:
        temporary.unlink(missing_ok=True)


def prepare_folder(folder: Path, run: dict) -> None:
    """`begin_folder`; if the run.json there describes another run, remove that run's files.

    The place of the checkpoint, the key `checkpoint`, makes no other run, nor but in int8 does the `batch_size`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_left(folder.glob(".*.tmp"))
    begin_folder(folder, run)
    note = folder / "run.json"
    text = json.dumps(run)
    if note.read_bytes() != text.encode():
        made = [file for file in folder.iterdir() if re.fullmatch(MADE, file.name)]
        same = dict.fromkeys(["checkpoint"] if run.get("dtype") == "torch.int8" else ["checkpoint", "batch_size"])
        if read_run(folder) | same != json.loads(text) | same:
            for file in made:
                file.unlink()
        with atomic_file(note) as temporary:
            temporary.write_text(text)
    for file in folder.iterdir():  # images beyond the last one of this run
        if re.fullmatch(r"\d+\.png", file.name) and int(file.stem) >= len(run["labels"]):
            file.unlink()


def is_whole(folder: Path, weights: str, num_images: int) -> bool:
    """Does the folder hold all that a run with these weights writes? It reads run.json and file names only."""
    if read_run(folder).get("weights") != weights:
        return False
    stored = {file.name for file in folder.iterdir()}
    return {"grid.png", SAMPLES, *(image_path(folder, i).name for i in range(num_images))} <= stored


class PNGFolder(Dataset):
    """The images 0…n−1 of a sampling run as uint8 tensors (C, H, W). Fewer or more files than n raise ValueError."""

    def __init__(self, folder: Path, num_images: int):
        num_stored = sum(1 for file in folder.iterdir() if re.fullmatch(r"\d+\.png", file.name))
        if num_stored != num_images:
            raise ValueError(f"{folder} holds {num_stored} images, expected {num_images}")
        self.folder, self.num_images = folder, num_images

    def __len__(self):
        return self.num_images

    def __getitem__(self, i):
        return torch.from_numpy(read_png(image_path(self.folder, i)).copy()).permute(2, 0, 1)

    def grid(self, captions: list[str], columns: int, draw=None) -> np.ndarray:
        """The first images as one picture, one for each caption; draw: a function with make_grid's parameters."""
        images = np.stack([self[i].permute(1, 2, 0).numpy() for i in range(len(captions))])
        return (draw or make_grid)(images, captions, columns)

    def save_npz(self, labels, limit: int | None = None) -> None:
        """Write samples.npz beside the pictures: arr_0 (n, H, W, C) uint8, as ADM's evaluator reads it, labels (n,).

        A picture at a time is in memory. Images of more than `limit` bytes are left as pictures. A full disk is a
        warning: the pictures are there, and what is measured on them matters more.
        """
        shape = self[0].permute(1, 2, 0).shape
        if limit is not None and len(self) * shape.numel() > limit:
            return
        try:
            with atomic_file(self.folder / SAMPLES) as temporary, zipfile.ZipFile(temporary, "w") as archive:
                with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                    header = dict(descr="|u1", fortran_order=False, shape=(len(self), *shape))
                    np.lib.format.write_array_header_1_0(file, header)
                    for i in range(len(self)):
                        image = self[i].permute(1, 2, 0)
                        if image.shape != shape:
                            path = image_path(self.folder, i)
                            raise ValueError(f"{path} is {tuple(image.shape)}, the image before it {tuple(shape)}")
                        file.write(image.contiguous().numpy())
                with archive.open("labels.npy", "w") as file:
                    np.lib.format.write_array(file, np.asarray(labels, dtype=np.int64), allow_pickle=False)
        except OSError as error:
            if error.errno not in FULL:
                raise
            warnings.warn(f"{self.folder / SAMPLES} not written, the pictures are: {error.strerror}", stacklevel=2)


def load_samples(place: str | Path) -> dict[str, np.ndarray]:
    """{images (n, H, W, C) uint8, labels (n,)} of a samples.npz or the folder that has it, arr_0 being the images.

    Files from before they were named arr_0 are read as well. A missing or damaged file raises ValueError.
    """
    path = Path(place) / SAMPLES if Path(place).is_dir() else Path(place)
    try:
        with np.load(path, allow_pickle=False) as file:
            images = file["arr_0" if "arr_0" in file else "images"]
            return {"images": images, "labels": file["labels"]}
    except Exception as error:  # numpy, zipfile and zlib raise many types
        reason = " ".join(str(error).split())[:100]
        raise ValueError(f"cannot read the samples in {path}: {reason}") from None


@functools.cache
def caption_font() -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib; the font that comes with PIL lacks letters beyond ASCII."""
    import matplotlib  # takes half a second

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size=FONT_SIZE)


def _fitted(line: str, width: int, ending: str = "") -> str:
    """The line with its ending, in so many pixels: one that is too wide is cut and ends with "…"."""
    font = caption_font()
    if font.getlength(line + ending) <= width:
        return line + ending
    while line and font.getlength(f"{line}…") > width:
        line = line[:-1]
    return f"{line.rstrip()}…"


def caption_lines(caption: str, width: int) -> list[str]:
    """A caption as lines of at most so many pixels, broken between words; "…" stands where something is left out.

    There are CAPTION_LINES at most. A caption of nothing but spaces has none.
    """
    font, lines = caption_font(), []
    for word in caption.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    endings = [""] * len(lines)
    if len(lines) > CAPTION_LINES:
        endings[CAPTION_LINES - 1] = "…"
    return [_fitted(line, width, ending) for line, ending in zip(lines[:CAPTION_LINES], endings)]


def _fit_captions(captions: list[str], shape: tuple[int, int]) -> tuple[int, list[list[str]]]:
    """(zoom, lines of each caption) of images of shape (H, W): the least zoom of at least MIN_SIDE rows that cuts none.

    Where that would be more than MAX_ZOOMED columns, the largest zoom that is not; at least that of MIN_SIDE rows.
    """
    captions = [" ".join(caption.split()) for caption in captions]  # a folder's name may hold a line break
    zoom = max(1, math.ceil(MIN_SIDE / shape[0]))
    while True:
        lines = [caption_lines(caption, shape[1] * zoom) for caption in captions]
        whole = all(" ".join(part) == caption for part, caption in zip(lines, captions))
        if whole or shape[1] * (zoom + 1) > MAX_ZOOMED:
            return zoom, lines
        zoom += 1


def make_grid(images: np.ndarray, captions: list[str], columns: int) -> np.ndarray:
    """A picture (H', W', 3) of uint8 images (n, H, W, C) in rows of `columns`, each with its caption above it.

    Images are enlarged to whole multiples of their size. A row is as high as its longest caption needs.
    """
    zoom, lines = _fit_captions(captions, images.shape[1:3])
    h, w = images.shape[1] * zoom, images.shape[2] * zoom
    starts = range(0, len(images), columns)
    tops = [2 + LINE * max(1, *map(len, lines[start : start + columns])) for start in starts]
    sheet = Image.new("RGB", (columns * (w + GAP) + GAP, sum(tops) + len(starts) * (h + GAP) + GAP), "white")
    draw, y = ImageDraw.Draw(sheet), GAP
    for start, top in zip(starts, tops):
        for i, image in enumerate(images[start : start + columns]):
            x = GAP + i * (w + GAP)
            for number, line in enumerate(reversed(lines[start + i]), start=1):  # the last one is next to the image
                draw.text((x, y + top - 2 - number * LINE), line, fill="black", font=caption_font())
            picture = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).convert("RGB")
            sheet.paste(picture.resize((w, h), Image.Resampling.NEAREST), (x, y + top))
        y += top + h + GAP
    return np.asarray(sheet)
