"""One process at a time writes to a folder, and what a killed one has left is removed."""

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


@contextlib.contextmanager
def written_by_one(folder: str | Path) -> Iterator[None]:
    """In this context other runs are refused the folder, which is made: they raise ValueError.

    The first process of a run asks for all of them. A file system without locks refuses nobody. The lock is the
    folder's own and ends with the process.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    held = None
    if fcntl is not None and dist.is_main():
        held = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(held)
            raise ValueError(
                f"another process is writing to {folder}: wait until it has finished, or choose another folder"
            ) from None
        except OSError:  # no locks there
            pass
    try:
        yield
    finally:
        if held is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(held, fcntl.LOCK_UN)  # at once: processes that were forked inside have it open too
            os.close(held)


def remove_left(files: Iterable[Path]) -> None:
    """Remove those of the files that a process which is gone was writing; others stay."""
    for file in files:
        match = LEFT.fullmatch(file.name)
        if match and not _is_running(int(match[1])):
            file.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True
