"""One run at a time writes to a folder, and what a killed process has left is removed."""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from util import dist

try:
    import fcntl
except ImportError:  # Windows has none, and no locks here
    fcntl = None

LEFT = re.compile(r"\..*\.(\d+)\.tmp")  # what `util.checkpoint.atomic_file` writes to, with the number of the process
_held = {}  # folder: the descriptor that has its lock


@contextlib.contextmanager
def written_by_one(folder: str | Path, make: bool = True) -> Iterator[None]:
    """In this context other runs are refused the folder: they raise ValueError.

    The first process of a run asks for all of them, and may ask again inside. A file system without locks refuses
    nobody. The lock is the folder's own, leaves nothing and ends with the process. make: a folder that is not there is
    made; without it nobody needs one that is not.
    """
    if make:
        Path(folder).mkdir(parents=True, exist_ok=True)
    place = str(Path(folder).resolve())
    if fcntl is None or not dist.is_main() or place in _held or not Path(folder).is_dir():
        yield
        return
    _held[place] = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # no locks there
            try:
                fcntl.flock(_held[place], fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"another process is writing to {folder}: wait until it has finished, or choose another folder"
                ) from None
        yield
    finally:
        os.close(_held.pop(place))


def _forget() -> None:
    """In a process that was forked: the lock is not its own, and must not outlive the one that has it."""
    while _held:
        os.close(_held.popitem()[1])


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def remove_left(files: Iterable[Path]) -> None:
    """Remove those of the files that a process which is gone was writing, or this one has left; others stay."""
    for file in files:
        match = LEFT.fullmatch(file.name)
        if match and not _is_another(int(match[1])):
            file.unlink(missing_ok=True)


def _is_another(process: int) -> bool:
    """Is another process of this number running?"""
    if process == os.getpid() or fcntl is None:  # on Windows to ask would be to stop it
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        return True
    return True
