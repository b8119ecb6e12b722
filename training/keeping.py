"""Which checkpoints of a run are kept: the last few, each under its step, the best, and the checksums of all.

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

BEST_NAME = "checkpoint-best.pth"
NUMBERED = r"checkpoint-\d{8,}\.pth"


def keep_checkpoint(folder: str | Path, content: dict, keep_last: int) -> Path:
    """Save content, which has a step, as the newest; older ones than the last `keep_last` are removed.

    An interruption at any moment leaves a whole checkpoint-last.pth with its checksum. What the disk has against
    writing is raised as OSError, and the file there before is still there.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob(".checkpoint*.tmp"):  # of a process that was killed
        file.unlink(missing_ok=True)
    step = content["step"]
    last, named = folder / FILE_NAME, folder / f"checkpoint-{step:08d}.pth"
    with atomic_file(last) as temporary:
        digest = write_content(temporary, content)
        sums = [(old, name) for old, name in read_sums(folder) if name != named.name]
        new = [(digest, FILE_NAME)] + [(digest, named.name)] * (keep_last > 1)
        named.unlink(missing_ok=True)  # of a run that was here before
        write_sums(folder, [*sums, *new])  # until the renaming is done, checkpoint-last.pth may have either sum
        if keep_last > 1:
            link(temporary, named)
    numbered = {int(file.stem[11:]): file for file in folder.iterdir() if re.fullmatch(NUMBERED, file.name)}
    past = sorted(number for number in numbered if number <= step)  # what is later was left behind on a resume
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
    with atomic_file(folder / "checkpoint-best.json") as temporary:  # first: an interruption now repeats the step's FID
        temporary.write_text(json.dumps({"fid": fid, "step": step}) + "\n")
    there = read_sums(folder)
    others = [(digest, name) for digest, name in there if name != BEST_NAME]
    new = [(digest, BEST_NAME) for digest, name in there if name == FILE_NAME]
    write_sums(folder, [*there, *new])  # until the link is made it may have either sum
    link(folder / FILE_NAME, folder / BEST_NAME)
    write_sums(folder, [*others, *new])
    return True


def read_best(folder: Path) -> dict | None:
    """{fid, step} of the best checkpoint so far; None where there is none."""
    try:
        found = json.loads((folder / "checkpoint-best.json").read_text())
        return {"fid": float(found["fid"]), "step": int(found["step"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def forget_best_after(folder: str | Path, step: int) -> None:
    """A run that starts at this step judges by itself what comes later."""
    best = read_best(Path(folder))
    if best is not None and best["step"] > step:
        Path(folder, "checkpoint-best.json").unlink()


def link(source: Path, target: Path) -> None:
    """Give a file a second name, which replaces what has it; a copy where the disk has no links."""
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
