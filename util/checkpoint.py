"""Checkpoints: `checkpoint-last.pth`, in the published layout with a few keys of our own.

    model, model_ema, optimizer, epoch, scaler, args     as in MAR (args a plain dict; published files have a Namespace)
    heads, heads_ema, config, rng, step                  ours; a published file has none of them

Files are read with weights_only=True, so nothing in them is executed, and written to a temporary name first. Those that
`training.keeping` writes have their checksums in `checkpoints.sha256` beside them. Checkpoints of other makers and
`.safetensors` files are read into the same keys (`util.foreign`, `util.exported`). What is in `model` and `config` is
for `models.loading` to judge: this module knows no family of models.
"""

import argparse
import hashlib
import os
import zipfile
from pathlib import Path

import torch

from util.exported import SUFFIX, is_safetensors, read_exported
from util.foreign import as_checkpoint, what_is, why

FILE_NAME = "checkpoint-last.pth"
SUMS_NAME = "checkpoints.sha256"  # lines "<sha256>  <file>", for `sha256sum -c`


def checkpoint_path(place: str | Path) -> Path:
    """The checkpoint file for a folder or a file."""
    place = Path(place)
    named = place.suffix in (".pth", SUFFIX) and not place.is_dir()
    return place if place.is_file() or named else place / FILE_NAME


def save_checkpoint(place: str | Path, content: dict) -> Path:
    """Write atomically: temporary file, fsync, rename. An interrupted save leaves the old file whole."""
    path = checkpoint_path(place)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        write_content(temporary, content)
    return path


def write_content(path: Path, content: dict) -> str:
    """torch.save and fsync; returns the sha256 of the file. A disk that refuses the write raises OSError."""
    with open(path, "wb") as raw:
        file = _HashedFile(raw)
        try:
            torch.save(content, file)
        except RuntimeError:  # how torch reports a write that failed, without the disk's reason
            if file.error is None:
                raise
            raise file.error from None
        raw.flush()
        os.fsync(raw.fileno())
    return file.digest.hexdigest()


class _HashedFile:
    """A file for torch.save that hashes the bytes written to it and keeps the error of a failed write."""

    def __init__(self, file):
        self.file, self.digest, self.error = file, hashlib.sha256(), None

    def write(self, data) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()


class atomic_file:
    """`with atomic_file(path) as temporary:` renames the temporary file to path at the end, or removes it on error."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        # 60 characters of at most 4 bytes, a process id and 6 more bytes: below the 255 that a file's name may have
        self.temporary = self.path.with_name(f".{self.path.name[:60]}.{os.getpid()}.tmp")

    def __enter__(self) -> Path:
        return self.temporary

    def __exit__(self, error_type, error, traceback):
        if error_type is None:
            os.replace(self.temporary, self.path)
        else:
            self.temporary.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno and error.filename is None:  # a full disk names no file
                error.filename = str(self.path)


def load_checkpoint(place: str | Path | dict) -> dict:
    """The content of a folder or file, or one that was loaded already, on the CPU, in the form of `as_checkpoint`.

    A missing, damaged or unsafe file, or one without tensors for weights, raises ValueError. Where the file is damaged,
    the message names the newest whole checkpoint beside it.
    """
    if isinstance(place, dict):
        return as_checkpoint(place, "the checkpoint")
    path = checkpoint_path(place)
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}")
    try:
        content = read_file(path)
    except ValueError as error:
        raise ValueError(f"{error}{_other_checkpoint(path)}") from None
    return as_checkpoint(content, path)


def read_file(path: str | Path):
    """What torch.save or safetensors wrote, on the CPU.

    A damaged file, or one that holds anything but data, raises ValueError, which says what it is.
    """
    path = Path(path)
    try:
        what = what_is(path)
        if what is None and is_safetensors(path):
            check_whole(path)
            return read_exported(path)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    if what is not None:
        raise ValueError(f"cannot read {path}: it is {what}")
    check_whole(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, pickle and zipfile raise many types, for garbage even IndexError
        raise ValueError(f"cannot read {path}: {why(error)}") from None


def find_stored(path: str, place: str | Path | None) -> tuple[str, str]:
    """(where a path is that a checkpoint's config has, "" or the words that say where it was looked for in vain).

    A relative path that is not there is looked for in the folder of the checkpoint, `place`, and beside that folder.
    """
    if place is None or os.path.isabs(os.path.expanduser(path)) or os.path.exists(path):
        return path, ""
    folder = checkpoint_path(place).absolute().parent
    others = [os.path.normpath(base / path) for base in (folder, folder.parent)]
    existing = [other for other in others if os.path.exists(other)]
    return (existing[0], "") if existing else (path, f"; nor is it by the checkpoint, at {' or '.join(others)}")


def read_sums(folder: Path) -> list[tuple[str, str]]:
    """(sha256, file name) of the lines of checkpoints.sha256; [] without one."""
    try:
        lines = (folder / SUMS_NAME).read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    return [(digest, name) for digest, _, name in (line.partition("  ") for line in lines) if name]


def check_whole(path: Path) -> None:
    """Raise ValueError unless a file has its checksum: the one in checkpoints.sha256, else those inside the file."""
    known = [digest for digest, name in read_sums(path.parent) if name == path.name]
    if known:
        with open(path, "rb") as file:
            whole = hashlib.file_digest(file, "sha256").hexdigest() in known
        reason = f"its checksum is not the one in {SUMS_NAME} (remove that file if you changed it yourself)"
    else:
        whole, reason = _crcs_are_right(path), "a checksum in it is wrong"
    if not whole:
        raise ValueError(f"{path} is damaged: {reason}")


def _crcs_are_right(path: Path) -> bool:
    """Does every part of a zip file (torch.save's format since 1.6) have its CRC? torch.load does not look at them."""
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"PK\x03\x04":  # another format, without checksums
                return True
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # zipfile raises many types
        return False


def _other_checkpoint(path: Path) -> str:
    """The end of a message about a damaged file: the newest whole checkpoint beside it, "" without one."""
    others = [other for other in path.parent.glob("checkpoint-*.pth") if other.name != path.name]
    for other in sorted(others, key=lambda file: file.stat().st_mtime, reverse=True):
        try:
            check_whole(other)
        except (ValueError, OSError):
            continue
        return f"; the newest whole one is {other}"
    return ""


def load_weights(model: torch.nn.Module, weights: dict, source) -> None:
    """model.load_state_dict(strict=True), whose mismatch becomes one line that names the first difference.

    Where the weights have none of the model's buffers, as averaged ones, these stay as the model made them.
    """
    own = model.state_dict()
    buffers = {name: own[name] for name, _ in model.named_buffers() if name in own}
    if not buffers.keys() & weights.keys():
        weights = buffers | weights
    missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = [k for k in own.keys() & weights.keys() if own[k].shape != weights[k].shape]
    # half precision is fine, 8-bit integers of a quantised file are not
    types = [k for k in own.keys() & weights.keys() if own[k].is_floating_point() != weights[k].is_floating_point()]
    if types and not (missing or extra or shapes):
        k = min(types)
        stored, wanted = (str(w[k].dtype).removeprefix("torch.") for w in (weights, own))
        raise ValueError(f"the weights in {source} do not fit the model ({k} is {stored} in the file, not {wanted})")
    if missing or extra or shapes:
        if shapes:
            k = min(shapes)
            first = f"{k} is {tuple(weights[k].shape)} in the file and {tuple(own[k].shape)} in the model"
        else:
            first = f"{len(missing)} names missing, {len(extra)} unknown, the first is {(missing + extra)[0]}"
        raise ValueError(f"the weights in {source} do not fit the model ({first}); check --model and its sizes")
    model.load_state_dict(weights, strict=True)


def weights_hash(weights: dict) -> str:
    """16 hex digits over the names, shapes and values of a state dict."""
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(weights):
        value = weights[name].detach().cpu().float().contiguous()
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()
