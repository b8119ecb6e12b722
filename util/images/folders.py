"""Finding the image files below a folder: which folders are classes, which files are images, which are neither."""

import itertools
import os
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from util.args import check_folder
from util.images.reading import extensions

# what systems and programs leave among images, in small letters; besides names that start with a dot
SYSTEM = {
    "thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
    "__macosx",
    "__pycache__",
    "@eadir",
    "@tmp",
    "@recycle",
    "#recycle",
}
SYSTEM |= {"#snapshot", "@recently-snapshot", "$recycle.bin", "system volume information", "lost+found"}
_WORDS = "train|training|trainval|val|valid|validation|test|testing|eval|evaluation|dev"
_ABOUT = "images?|imgs?|pictures?|photos?|data|dataset|set|split"
_SPLIT = re.compile(rf"(({_ABOUT})[-_. ]*)?({_WORDS})[-_. ]*({_ABOUT})?[-_. ]*\d*", re.IGNORECASE)
NUM_NAMED = 5  # names that a line shows of a longer list


def is_system(name: str) -> bool:
    """Is a file or folder hidden, or one that a system made for itself?"""
    return name.startswith(".") or name.lower() in SYSTEM


def looks_like_split(name: str) -> bool:
    """Is a folder's name that of a part of a data set, not of a class: Train, validation, images_test, val2017?"""
    return _SPLIT.fullmatch(name) is not None


def shown(names) -> str:
    """The first of some names with commas between, printable on one line whatever is in them."""
    names = [str(name) for name in names]
    texts = ["".join(c if c.isprintable() else ascii(c)[1:-1] for c in name) for name in names[:NUM_NAMED]]
    return ", ".join([*texts, f"{len(names) - NUM_NAMED} more"] if len(names) > NUM_NAMED else texts)


def walk(folder: Path, system: bool = False) -> Iterator[tuple[str, list[str], list[str]]]:
    """(place, names of its folders, names of its files), sorted, of a folder and all folders below, as os.walk does.

    Links are followed, but for those to folders that hold the link or are visited anyway. Hidden and system files are
    left out unless system is true. A link to nothing counts as a file. Folders below that cannot be read are named in a
    warning.
    """
    root = os.path.realpath(folder)
    waiting = [(os.fspath(folder), (root,))]  # with the real places of the folders that it is in
    while waiting:
        place, above = waiting.pop()
        try:
            with os.scandir(place) as listed:
                entries = sorted((e for e in listed if system or not is_system(e.name)), key=lambda entry: entry.name)
        except OSError as error:
            if len(above) == 1:
                raise
            warnings.warn(f"folder skipped: {shown([place])} ({error.strerror})", stacklevel=2)
            continue
        folders, files = {}, []
        for entry in entries:
            if entry.is_symlink():
                if not os.path.isdir(entry.path):
                    files.append(entry.name)
                elif not _leads_back(target := os.path.realpath(entry.path), root, above):
                    folders[entry.name] = target
            elif entry.is_dir():
                folders[entry.name] = os.path.join(above[-1], entry.name)
            elif entry.is_file():
                files.append(entry.name)
        yield place, list(folders), files
        waiting += [(os.path.join(place, name), (*above, real)) for name, real in reversed(folders.items())]


def _leads_back(target: str, root: str, above: tuple[str, ...]) -> bool:
    """Does a link to the folder target, met below the folders above, end where the walk has been or will come?"""
    if any(os.path.commonpath([target, place]) == target for place in above):
        return True
    inside = os.path.commonpath([target, root]) == root
    return inside and not any(is_system(part) for part in Path(target).relative_to(root).parts)


@dataclass
class ImageFiles:
    """The images below a folder: (path, label) of each, the names of the classes, and what else is there."""

    folder: Path
    classes: list[str] = field(default_factory=list)
    samples: list[tuple[str, int]] = field(default_factory=list)
    skipped: Counter = field(default_factory=Counter)  # files of other kinds, by their ending
    beside: list[str] = field(default_factory=list)  # folders that are not read

    def layout(self) -> str:
        """What was recognised, as one line for people."""
        counts = Counter(label for _, label in self.samples).values()
        least, most = min(counts), max(counts)
        each = f"{least}" if least == most else f"{least} to {most}"
        number = f"{len(self.classes)} class{'es' if len(self.classes) > 1 else ''}"
        line = f"{len(self.samples)} images in {shown([self.folder])}: {number} ({shown(self.classes)}), {each} each"
        if self.skipped:
            endings = sorted(self.skipped.items(), key=lambda item: (-item[1], item[0]))
            line += f"; skipped: {shown(f'{count} {ending}' for ending, count in endings)}"
        return f"{line}; not read: {shown(self.beside)}" if self.beside else line


def find_images(folder: Path, splits_are_classes: bool = False, is_split: bool = False) -> ImageFiles:
    """The images below <folder>/<class>/, or those in a folder without such as one class.

    Empty class folders and images beside class folders are named in a warning and left out. ValueError: no image, or
    (unless splits_are_classes) folders that look like the splits of a data set in the place of classes.
    """
    result, by_class, loose, below = ImageFiles(folder), {}, [], {}
    depth = len(os.path.join(folder, ""))
    for place, folders, files in walk(folder):
        inside = place[depth:].split(os.sep)
        images = [os.path.join(place, name) for name in files if os.path.splitext(name)[1].lower() in extensions()]
        result.skipped.update(
            os.path.splitext(name)[1].lower() or "without ending" for name in files
            if os.path.splitext(name)[1].lower() not in extensions()
        )  # fmt: skip
        if place == os.fspath(folder):
            by_class, loose = {name: [] for name in folders}, images
        else:
            by_class[inside[0]].append((place, images))
            if len(inside) == 1:
                below[inside[0]] = folders
    files_of = {name: [path for _, paths in sorted(parts) for path in paths] for name, parts in by_class.items()}
    result.classes = [name for name in by_class if files_of[name]]
    if result.classes:
        if not splits_are_classes:
            _check_splits(folder, result.classes, below, is_split)
        result.samples = [(path, label) for label, name in enumerate(result.classes) for path in files_of[name]]
        empty = [name for name in by_class if not files_of[name]]
        if empty:
            warnings.warn(
                f"class folders without images are ignored in {shown([folder])}: {shown(empty)}", stacklevel=3
            )
        if loose:
            warnings.warn(
                f"{len(loose)} images outside the class folders are ignored in {shown([folder])}", stacklevel=3
            )
    elif loose:
        result.classes, result.samples = ["all"], [(path, 0) for path in loose]
    else:
        others = f" (only {shown(result.skipped)} files)" if result.skipped else ""
        raise ValueError(f"no images in {folder}{others}, expected <class>/* or plain files that Pillow reads")
    return result


def _check_splits(folder: Path, classes: list[str], below: dict[str, list[str]], is_split: bool) -> None:
    """Raise ValueError where the folders in the place of classes are, or hold, the splits of a data set."""
    splits = [name for name in classes if looks_like_split(name)]
    for name in classes:
        inner = [f"{name}/{inside}" for inside in below.get(name, ()) if looks_like_split(inside)]
        splits += inner if len(inner) > 1 else []
    if splits:
        training = [name for name in splits if "train" in name.lower()]
        prefix, whole = (f"{folder.name}/", folder.name) if is_split else ("", ".")
        examples = training or ([] if is_split else splits)
        example = f", such as --split_dir {prefix}{examples[0]}" if examples else ""
        raise ValueError(
            f"{shown(splits)} in {folder} look like splits of a data set, not like classes: name the folder to train "
            f"on with --split_dir{example} (--split_dir {whole} takes all as classes), or rename it to train"
        )


def training_folder(data_path: Path, split: str, split_dir: str | None) -> tuple[Path, list[str]]:
    """The folder of a split below data_path, and those beside it that are neither read nor another split.

    train is data_path/<split_dir>, else data_path/train, else data_path itself. No such folder raises ValueError.
    """
    chosen = split_dir if split == "train" and split_dir is not None else split
    folder = data_path / chosen
    if split == "train" and split_dir is None and not folder.is_dir():
        folder = data_path
    if not folder.is_dir():
        names = [name for name in next(walk(data_path))[1]] if data_path.is_dir() else []
        flag = f"--split_dir {split_dir}: " if chosen is split_dir else ""
        others = f"; the folders in {data_path} are {shown(names)}" if names else ""
        raise ValueError(f"{flag}no image folder at {folder}{others}")
    if folder == data_path or folder.parent != data_path:
        return folder, []
    return folder, [name for name in next(walk(data_path))[1] if name != folder.name and not looks_like_split(name)]


# what settings.json and index.json of a cache of latents have near their start (util/images/latents.py)
_CACHE_KEYS = (b'"format"', b'"dtype"', b'"fingerprint"')
_CACHE_HEAD = 4096  # bytes
_NUM_LOOKED_AT = 20  # entries of a folder: one of MAR's layout has nothing but .npz files, or folders of such


def _is_own_cache(folder: Path) -> bool:
    """Does the folder have the settings.json or index.json of scripts/cache_latents.py?"""
    for path in (folder / "settings.json", folder / "index.json"):
        try:
            with open(path, "rb") as file:
                head = file.read(_CACHE_HEAD)
        except OSError:
            continue
        if all(key in head for key in _CACHE_KEYS):
            return True
    return False


def _first_entries(folder: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as listed:
            return list(itertools.islice((e for e in listed if not is_system(e.name)), _NUM_LOOKED_AT))
    except OSError:
        return []


def _has_mars_latents(folder: Path) -> bool:
    """Does the first .npz in the folder hold an image's latents, as MAR's main_cache.py writes them?"""
    path = next((e.path for e in _first_entries(folder) if e.name.endswith(".npz")), None)
    if path is None:
        return False
    try:
        with zipfile.ZipFile(path) as file:
            return {"moments.npy", "moments_flip.npy"} <= set(file.namelist())
    except (OSError, ValueError, zipfile.BadZipFile):
        return False


def find_cache(path: str | Path, itself: bool = True) -> Path | None:
    """The cache of latents that a place is in, known by its files: of scripts/cache_latents.py or of MAR's layout.

    itself: may the place itself be one? The place need not exist. None for a place outside of caches.
    """
    place = Path(path).resolve()
    around = [place, *place.parents] if itself else [*place.parents]
    for is_cache in (_is_own_cache, _has_mars_latents):
        for folder in around:
            if is_cache(folder):
                return folder
    for folder in [folder for folder in around if folder.is_dir()][:2]:  # of MAR's layout with its folders of classes
        classes = [Path(entry.path) for entry in _first_entries(folder) if os.path.isdir(entry.path)]
        if len(classes) > 1 and all(map(_has_mars_latents, classes)):  # a single one may be a cache beside other things
            return folder
    return None


def check_output_folder(
    name: str,
    path: str | Path,
    data: str | None = None,
    data_path: str | None = None,
    split_dir: str | None = None,
    *,
    is_cache: bool = False,
) -> None:
    """`check_folder`; and ValueError where what a program writes to --name would lie among what others read.

    That is a cache of latents, with is_cache another one than the folder itself; and of the data set imagefolder
    data_path itself, and every place in a folder of classes and in a class.
    """
    check_folder(name, str(path))
    cache = find_cache(path, itself=not is_cache)
    if cache is not None:
        raise ValueError(f"--{name} {path} is in {cache}, a cache of latents: choose a folder outside")
    if data != "imagefolder" or not data_path or not Path(data_path).expanduser().is_dir():
        return
    root, output = Path(data_path).expanduser(), Path(path).resolve()
    train = root / "train" if (root / "train").is_dir() else root
    folders = [train if split_dir is None else root / split_dir, root / "val"]
    folders = [folder for folder in folders if folder.is_dir()]
    links = [Path(e.path) for folder in folders for e in os.scandir(folder) if e.is_symlink() and e.is_dir()]
    within = next((place for place in folders + links if output.is_relative_to(place.resolve())), None)
    if within is not None or output == root.resolve():
        raise ValueError(f"--{name} {path} is in {within or root}, whose images are read: choose a folder outside")
