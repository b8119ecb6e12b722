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
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

from util.images.datasets import FolderDataset
from util.images.folders import shown

BESIDE = "beside"
TABLES = (".csv", ".jsonl")
_MARKUP = re.compile(r"<[a-zA-Z/!][^<>]*>")  # not what stands between two signs of comparison
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
    if Path(source).suffix not in (*TABLES, ".txt"):
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
    captions = [text for line in _lines(path, flag) if (text := clean(line))]
    if not captions:
        raise ValueError(f"--{flag} {path} has no line with a text")
    return captions


def read_prompts(flag: str, path: Path) -> list[str]:
    """The captions, cleaned, of a table .csv or .jsonl, of whatever image, or else of a file with one a line."""
    if path.suffix not in TABLES:
        return read_lines(flag, path)
    captions = []
    for number, entry in enumerate(_entries(path, flag), start=1):
        caption = entry.get("caption")
        if not isinstance(caption, str) or not clean(caption):
            raise ValueError(f"--{flag} {path}: entry {number} needs a caption (a column, or a key)")
        captions.append(clean(caption))
    if not captions:
        raise ValueError(f"--{flag} {path} has no entry")
    return captions


def _of_file(path: Path) -> list[str]:
    if not path.is_file():
        return []
    return [text for line in _lines(path, "captions") if (text := clean(line))]


def _lines(path: Path, flag: str) -> list[str]:
    """The lines of a file, which end where editors see an end: str.splitlines would end one at U+2028 too."""
    return _text(path, flag).split("\n")


def _text(path: Path, flag: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # a byte order mark is no part of the first column's name
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--{flag}: {path} cannot be read as text ({error})") from None


def _rows(path: Path) -> Iterator[tuple[str, str]]:
    """(image, caption) of the entries of a table; one that lacks either raises ValueError."""
    for number, entry in enumerate(_entries(path, "captions"), start=1):
        image, caption = (entry.get(key) for key in ("image", "caption"))
        if not isinstance(image, str) or not isinstance(caption, str) or not clean(caption):
            raise ValueError(f"--captions {path}: entry {number} needs an image and a caption (columns, or keys)")
        yield image, clean(caption)


def _entries(path: Path, flag: str) -> list[dict]:
    """The entries of a table, by their columns or keys; a text in quotes may have several lines."""
    if path.suffix == ".jsonl":
        return [_object(line) for line in _lines(path, flag) if line.strip()]
    try:
        reader = csv.reader(io.StringIO(_text(path, flag)), strict=True)
        columns, *rows = [row for row in reader if any(map(str.strip, row))] or [[]]
    except csv.Error as error:
        raise ValueError(f"--{flag} {path} is no table ({error})") from None
    return [dict(zip(columns, row)) for row in rows]


def _object(line: str) -> dict:
    """The object of a line of JSON; {} for another thing."""
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
