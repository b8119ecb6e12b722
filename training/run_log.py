"""Logs of a training run, step by step: log.jsonl, exact and cut back on resume, and TensorBoard's files."""

import itertools
import json
import os
import sys
from pathlib import Path

from tqdm import tqdm

from util.checkpoint import SUMS_NAME

FILE_NAME = "log.jsonl"


class StepLog:
    """One JSON line a training step in folder/log.jsonl; a kill at any moment costs at most the line being written.

    Opening it at a step removes the lines of later steps and an incomplete line, so that a run which continues from its
    checkpoint ends with the file of a run that was never stopped. Where a run starts from its beginning, a file that is
    no such log, or is of a run that had checkpoints, is renamed to log-1.jsonl, -2, … While the disk is full, lines
    wait in memory.
    """

    def __init__(self, folder: str | Path, step: int):
        self.path = Path(folder) / FILE_NAME
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if step == 0 and self.path.is_file() and self._is_anothers():
            numbered = (self.path.with_name(f"{self.path.stem}-{i}{self.path.suffix}") for i in itertools.count(1))
            self.path.rename(next(path for path in numbered if not path.exists()))
        self.file = open(self.path, "a+b", buffering=0)
        self.file.seek(0)
        self.file.truncate(_end_of_step(self.file, step))
        self.pending, self.complained = b"", False

    def _is_anothers(self) -> bool:
        """Is the file there of somebody else, or of a run that went farther than to its first checkpoint?"""
        with open(self.path, "rb") as file:
            first = file.readline()
            file.seek(0)
            no_log = bool(first) and _end_of_step(file, sys.maxsize) == 0 and first.endswith(b"\n")
        folder = self.path.parent  # where a first checkpoint was being written, there is its sum and a temporary file
        had_checkpoints = (folder / SUMS_NAME).is_file() and not any(folder.glob(".checkpoint*.tmp"))
        return no_log or (bool(first) and had_checkpoints)

    def write(self, step: int, record: dict[str, float]) -> None:
        """Add the line of a step."""
        self.pending += json.dumps({"step": step, **record}).encode() + b"\n"
        try:
            while self.pending:  # write() on a nearly full disk writes a part
                self.pending = self.pending[self.file.write(self.pending) :]
        except OSError as error:
            if not self.complained:
                tqdm.write(f"warning: {self.path} cannot be written ({error.strerror}): its lines wait in memory")
            self.complained = True
        else:
            self.complained = False

    def sync(self) -> None:
        """fsync, before a checkpoint of the same step."""
        try:
            os.fsync(self.file.fileno())
        except OSError:  # a full network disk, which the checkpoint reports
            pass

    def close(self) -> None:
        self.file.close()


def _end_of_step(file, step: int) -> int:
    """Bytes of the whole lines up to this step."""
    end = 0
    for line in file:
        try:
            later = json.loads(line)["step"] > step
        except (ValueError, KeyError, TypeError):
            break
        if later or not line.endswith(b"\n"):
            break
        end += len(line)
    return end


class RunLog:
    """The step log and TensorBoard's files of a run that is at this step. Only the first process has one."""

    def __init__(self, output_dir: str | Path, log_dir: str | Path, step: int):
        from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

        self.steps = StepLog(output_dir, step)
        self.board = SummaryWriter(log_dir, purge_step=step)

    def step(self, step: int, record: dict[str, float], **speed: float) -> None:
        """Log a training step; speed, which differs from run to run, goes to TensorBoard only."""
        self.steps.write(step, record)
        for name, value in {**record, **speed}.items():
            self.scalar(f"train/{name}", value, step)

    def scalar(self, name: str, value: float, step: int) -> None:
        self._to_board(lambda board: board.add_scalar(name, value, step))

    def image(self, name: str, image, step: int) -> None:
        """image: uint8 (H, W, C)."""
        self._to_board(lambda board: board.add_image(name, image, step, dataformats="HWC"))

    def sync(self) -> None:
        self.steps.sync()

    def close(self) -> None:
        self.steps.close()
        self._to_board(lambda board: board.close())

    def _to_board(self, write) -> None:
        """write(board), until a full disk ends TensorBoard's thread: the run goes on without it."""
        if self.board is None:
            return
        try:
            write(self.board)
        except OSError as error:
            self.board = None
            tqdm.write(f"warning: TensorBoard's files end here ({error.strerror}); log.jsonl goes on")
