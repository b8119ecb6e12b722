"""Captions: their cleaning, and where they come from: files beside images, a table of images, lines of prompts.

    beside          IMAGE.txt beside IMAGE.png, each line a caption
    FILE.csv        columns image and caption, named in the first line
    FILE.jsonl      an object with image and caption a line
    FILE.txt        a caption a line, of no image: prompts

An image is named by its path below the data set's folder, or <class>/<number> where there is no folder
(`util.images.latent_files.image_names`); it may have several captions, one of which is drawn at each step.
"""

import csv
import html
import json
import re
from collections.abc import Iterator
from pathlib import Path

from util.images.datasets import FolderDataset
from util.images.folders import shown

BESIDE = "beside"
_MARKUP = re.compile(r"<[^<>]*>")
_URL = re.compile(r"(https?://|www\.)\S+")
_REPEATED = re.compile(r"([^\w\s])\1+")


def clean(caption: str) -> str:
    """A caption in small letters without addresses, markup, repeated punctuation and line breaks."""
    text = _URL.sub(" ", _MARKUP.sub(" ", html.unescape(caption)))
    return " ".join(_REPEATED.sub(r"\1", text).lower().split())


def check_source(source: str) -> None:
    """Raise ValueError unless captions can come from --captions."""
    if source == BESIDE:
        return
    if Path(source).suffix not in (".csv", ".jsonl", ".txt"):
        raise ValueError(f"--captions {source} must be {BESIDE}, or a file .csv, .jsonl or .txt")
    if not Path(source).is_file():
        raise ValueError(f"--captions: there is no file {source}")


def captions_of_images(source: str, dataset, names: list[str]) -> list[list[str]]:
    """The captions, cleaned, of each image of a data set with these names; an image without one raises ValueError."""
    if source == BESIDE:
        if not isinstance(dataset, FolderDataset):
            raise ValueError(f"--captions {BESIDE} needs --data imagefolder: other data sets have no files")
        result = [_of_file(Path(path).with_suffix(".txt")) for path, _ in dataset.samples]
    else:
        table = {}
        for image, caption in _rows(Path(source)):
            table.setdefault(image, []).append(caption)
        result = [table.get(name, []) for name in names]
    missing = [name for name, captions in zip(names, result) if not captions]
    if missing:
        raise ValueError(f"--captions {source}: {len(missing)} of {len(names)} images have none: {shown(missing)}")
    return result


def read_lines(flag: str, path: Path) -> list[str]:
    """The captions, cleaned, of a file with one a line; a file without any, or that is no text, raises ValueError."""
    captions = [text for line in _text(path, flag).splitlines() if (text := clean(line))]
    if not captions:
        raise ValueError(f"--{flag} {path} has no line with a text")
    return captions


def _of_file(path: Path) -> list[str]:
    if not path.is_file():
        return []
    return [text for line in _text(path).splitlines() if (text := clean(line))]


def _text(path: Path, flag: str = "captions") -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--{flag}: {path} cannot be read as text ({error})") from None


def _rows(path: Path) -> Iterator[tuple[str, str]]:
    """(image, caption) of the entries of a table; one that lacks either raises ValueError."""
    lines = [line for line in _text(path).splitlines() if line.strip()]
    try:
        entries = [*csv.DictReader(lines, strict=True)] if path.suffix == ".csv" else [_object(line) for line in lines]
    except csv.Error as error:
        raise ValueError(f"--captions {path} is no table ({error})") from None
    for number, entry in enumerate(entries, start=1):
        image, caption = (entry.get(key) for key in ("image", "caption"))
        if not isinstance(image, str) or not isinstance(caption, str) or not clean(caption):
            raise ValueError(f"--captions {path}: entry {number} needs an image and a caption (columns, or keys)")
        yield image, clean(caption)


def _object(line: str) -> dict:
    """The object of a line of JSON; {} for another thing."""
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
