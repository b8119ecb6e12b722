"""The checkpoints that a run keeps: the newest ones, each under its step, the best, and the checksums of all.

    checkpoint-last.pth           the newest
    checkpoint-00012345.pth       with --keep_last above 1: the newest and those before it, a file a step
    checkpoint-best.pth, .json    with --online_eval: the one with the lowest FID, and that FID
    checkpoints.sha256            `sha256sum -c` checks them; so does loading

The first of a run's processes is the only writer.
"""

import json
import os
import re
import shutil
from pathlib import Path

from util.checkpoint import FILE_NAME, SUMS_NAME, atomic_file, read_sums, write_content
from util.lock import remove_left

BEST_NAME = "checkpoint-best.pth"
NUMBERED = r"checkpoint-\d{8,}\.pth"


def keep_checkpoint(folder: str | Path, content: dict, keep_last: int) -> Path:
    """Save content, which has a step, as the newest checkpoint; remove all but the newest `keep_last`.

    An interruption at any moment leaves a whole checkpoint-last.pth with its checksum. A disk that refuses the write
    raises OSError and keeps the previous checkpoint-last.pth.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    remove_left(folder.glob(".checkpoint*.tmp"))
    step = content["step"]
    last, named = folder / FILE_NAME, folder / f"checkpoint-{step:08d}.pth"
    with atomic_file(last) as temporary:
        digest = write_content(temporary, content)
        sums = [(old, name) for old, name in read_sums(folder) if name != named.name]
        new = [(digest, FILE_NAME)]
        if keep_last > 1:
            new.append((digest, named.name))
        named.unlink(missing_ok=True)  # of an earlier run in this folder
        write_sums(folder, [*sums, *new])  # checkpoint-last.pth has its old or its new sum until the file is renamed
        if keep_last > 1:
            link(temporary, named)
    numbered = {int(file.stem[11:]): file for file in folder.iterdir() if re.fullmatch(NUMBERED, file.name)}
    past = sorted(number for number in numbered if number <= step)  # later ones are from before a resume
    kept = past[-keep_last:] if keep_last > 1 else []
    for number in numbered.keys() - set(kept):
        numbered[number].unlink()
    sums = [(old, name) for old, name in sums if name != FILE_NAME and (folder / name).is_file()]
    write_sums(folder, [*sums, *new])
    return last


def keep_best(folder: str | Path, fid: float, step: int) -> bool:
    """Let checkpoint-best.pth be checkpoint-last.pth, which is of this step, if no earlier one had a lower FID."""
    folder = Path(folder)
    before = read_best(folder)
    if before is not None and not fid <= before["fid"]:
        return False
    # Written first: a run that is interrupted before the link is made measures this step again, and then makes it.
    with atomic_file(folder / "checkpoint-best.json") as temporary:
        temporary.write_text(json.dumps({"fid": fid, "step": step}) + "\n")
    sums = read_sums(folder)
    others = [(digest, name) for digest, name in sums if name != BEST_NAME]
    new = [(digest, BEST_NAME) for digest, name in sums if name == FILE_NAME]
    write_sums(folder, [*sums, *new])  # checkpoint-best.pth has its old or its new sum until the link is made
    link(folder / FILE_NAME, folder / BEST_NAME)
    write_sums(folder, [*others, *new])
    return True


def read_best(folder: Path) -> dict | None:
    """{fid, step} of the best checkpoint so far; None without one."""
    try:
        best = json.loads((folder / "checkpoint-best.json").read_text())
        return {"fid": float(best["fid"]), "step": int(best["step"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def forget_best_after(folder: str | Path, step: int) -> None:
    """Remove the record of a best checkpoint of a later step: a run that starts at this step measures it anew."""
    best = read_best(Path(folder))
    if best is not None and best["step"] > step:
        Path(folder, "checkpoint-best.json").unlink()


def link(source: Path, target: Path) -> None:
    """Give a file a second name, replacing the file that has it; a copy on disks without links."""
    with atomic_file(target) as temporary:
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def write_sums(folder: Path, sums) -> None:
    """Write checkpoints.sha256 from (sha256, file name) pairs."""
    with atomic_file(folder / SUMS_NAME) as temporary, open(temporary, "w") as file:
        file.writelines(f"{digest}  {name}\n" for digest, name in dict.fromkeys(sums))
        file.flush()
        os.fsync(file.fileno())
