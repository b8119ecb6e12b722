"""What must survive a kill, a full disk and a damaged file: checkpoints, their checksums, log.jsonl."""

import errno
import json
import multiprocessing
import os
import random
import resource
import shutil
import subprocess

import pytest
import torch

from tests.helpers import tiny_mar
from tests.helpers_keeping import names, sums_are_right
from training import keeping
from training.keeping import keep_best, keep_checkpoint
from training.run_log import StepLog
from util.checkpoint import FILE_NAME, load_checkpoint

WEIGHTS = tiny_mar().state_dict()


def content(step):
    return {"model": {**WEIGHTS, "step": torch.full((1000,), float(step))}, "step": step}


def step_of(place):
    loaded = load_checkpoint(place)
    assert loaded["model"]["step"].unique().tolist() == [loaded["step"]]
    return loaded["step"]


# ---------------------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("keep_last, kept", [(1, []), (2, [30, 40]), (3, [20, 30, 40])])
def test_the_last_ones_are_kept_with_their_checksums(tmp_path, keep_last, kept):
    for step in (10, 20, 30, 40):
        keep_checkpoint(tmp_path, content(step), keep_last)
        assert step_of(tmp_path) == step and sums_are_right(tmp_path)
    assert names(tmp_path) == [*(f"checkpoint-{step:08d}.pth" for step in kept), FILE_NAME]
    assert [step_of(tmp_path / name) for name in names(tmp_path)] == [*kept, 40]


def test_after_a_step_back_what_was_later_is_forgotten(tmp_path):
    """A run that continues from 20 is not the one that was at 40."""
    for step in (10, 20, 40, 30):
        keep_checkpoint(tmp_path, content(step), 3)
    assert names(tmp_path) == [*(f"checkpoint-{step:08d}.pth" for step in (10, 20, 30)), FILE_NAME]
    assert sums_are_right(tmp_path)


def test_a_disk_without_links_gets_copies(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links here")))
    keep_checkpoint(tmp_path, content(10), 2)
    keep_best(tmp_path, 1.0, 10)
    keep_checkpoint(tmp_path, content(20), 2)
    assert [step_of(tmp_path / name) for name in names(tmp_path)] == [10, 20, 10, 20] and sums_are_right(tmp_path)


def test_the_best_is_the_one_with_the_lowest_fid(tmp_path):
    best = []
    for step, fid in ((10, 5.0), (20, 3.0), (30, 4.0), (40, float("nan")), (50, 3.0)):
        keep_checkpoint(tmp_path, content(step), 1)
        keep_best(tmp_path, fid, step)
        best.append(step_of(tmp_path / keeping.BEST_NAME))
        assert sums_are_right(tmp_path)
    assert best == [10, 20, 20, 20, 50]  # of equals the last: an interruption repeats the measurement
    keeping.forget_best_after(tmp_path, 50)
    assert keeping.read_best(tmp_path) == {"fid": 3.0, "step": 50}
    keeping.forget_best_after(tmp_path, 49)
    assert keeping.read_best(tmp_path) is None


# ---------------------------------------------------------------------------------------------- damage


def damaged(place):
    with pytest.raises(ValueError) as error:
        load_checkpoint(place)
    assert "\n" not in str(error.value) and str(place) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_named(tmp_path, damage):
    for step in (10, 20):
        keep_checkpoint(tmp_path, content(step), 2)
    newest, before = tmp_path / "checkpoint-00000020.pth", tmp_path / "checkpoint-00000010.pth"
    whole = bytearray((tmp_path / FILE_NAME).read_bytes())
    whole[len(whole) // 2] ^= 1
    bad = {"flip": whole, "truncate": whole[:-1], "empty": b""}[damage]
    newest.write_bytes(bad)  # the same file under two names
    assert str(before) in damaged(tmp_path / FILE_NAME)
    assert step_of(before) == 10
    before.write_bytes(bad)
    assert str(before) not in damaged(tmp_path / FILE_NAME)


def test_no_flipped_bit_changes_what_is_loaded(tmp_path):
    """Without checkpoints.sha256, as when only the file was copied, its own checksums must do."""
    path = tmp_path / "copy.pth"
    torch.save(content(7), path)
    whole, draws = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(60):
        position, bit = draws.randrange(len(whole)), draws.randrange(8)
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << bit]) + whole[position + 1 :])
        try:
            loaded = load_checkpoint(path)
        except ValueError:
            refused += 1
        else:  # between the parts of the file
            assert all(torch.equal(loaded["model"][k], v) for k, v in content(7)["model"].items())
    assert refused > 30


# ---------------------------------------------------------------------------------------------- full disks


@pytest.fixture
def file_limit():
    """Call it with the largest size in bytes that a file may grow to."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_where_no_more_fits_the_old_checkpoint_stays_whole(tmp_path, file_limit):
    keep_checkpoint(tmp_path, content(10), 2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for size in (0, 100, 5_000, (tmp_path / FILE_NAME).stat().st_size - 1):
        file_limit(size)
        with pytest.raises(OSError) as error:
            keep_checkpoint(tmp_path, content(20), 2)
        assert error.value.errno == errno.EFBIG
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    file_limit(resource.RLIM_INFINITY)
    keep_checkpoint(tmp_path, content(20), 2)
    assert step_of(tmp_path) == 20 and sums_are_right(tmp_path)


def test_a_full_disk_for_real(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        keep_checkpoint(tmp_path, content(10), 1)
        (tmp_path / "filler").write_bytes(bytes(shutil.disk_usage(tmp_path).free))
        log = StepLog(tmp_path, 0)
        for step in range(1, 2000):
            log.write(step, {"loss": 0.5})
        assert log.pending
        with pytest.raises(OSError) as error:
            keep_checkpoint(tmp_path, content(20), 1)
        assert error.value.errno == errno.ENOSPC and step_of(tmp_path) == 10 and sums_are_right(tmp_path)
        (tmp_path / "filler").unlink()
        keep_checkpoint(tmp_path, content(20), 1)
        log.write(2000, {"loss": 0.5})
        assert step_of(tmp_path) == 20
        lines = [json.loads(line) for line in log.path.read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, 2001))
        log.close()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


# ---------------------------------------------------------------------------------------------- log.jsonl


def test_the_log_is_cut_back_to_the_step_it_is_opened_at(tmp_path):
    def write(start, stop, value):
        log = StepLog(tmp_path, start)
        for step in range(start + 1, stop + 1):
            log.write(step, {"loss": value(step)})
        log.close()
        return log.path

    whole = write(0, 9, float).read_bytes()
    for start, torn in ((4, b""), (6, b'{"step": 7, "lo'), (9, b"\x00\xff"), (9, b'{"step": 10}'), (0, b"[]\n")):
        path = write(start, 9, float)
        assert path.read_bytes() == whole
        path.write_bytes(whole + torn)
        write(9, 9, float)
        assert path.read_bytes() == whole
    assert write(3, 5, lambda step: -1.0).read_bytes().splitlines()[:3] == whole.splitlines()[:3]
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [1, 2, 3, -1, -1]


# ---------------------------------------------------------------------------------------------- kills


def _endless_run(folder):
    """What training writes, without the training: a line a step, a checkpoint every second step."""
    try:
        first = load_checkpoint(folder)["step"]
    except ValueError as error:
        first = 0
        assert "no checkpoint" in str(error)
    log = StepLog(folder, first)
    for step in range(first + 1, 10**9):
        log.write(step, {"loss": step / 3})
        if step % 2 == 0:
            log.sync()
            keep_checkpoint(folder, content(step), 3)
            keep_best(folder, 1 / step, step)


def test_a_kill_at_any_moment_leaves_whole_checkpoints_and_their_log(tmp_path):
    draws, at = random.Random(1), 0
    for _ in range(6):
        process = multiprocessing.get_context("fork").Process(target=_endless_run, args=(tmp_path,))
        process.start()
        while process.is_alive() and not any(f.stat().st_mtime_ns > at for f in tmp_path.glob(FILE_NAME)):
            process.join(0.001)
        process.join(draws.uniform(0, 0.03))
        assert process.is_alive()
        process.kill()
        process.join()
        at = (tmp_path / FILE_NAME).stat().st_mtime_ns
        last = step_of(tmp_path)
        for name in names(tmp_path):
            assert step_of(tmp_path / name) <= last
        lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()[:last]]
        assert lines == [{"step": step, "loss": step / 3} for step in range(1, last + 1)]
    keep_checkpoint(tmp_path, content(last + 1), 3)
    keep_best(tmp_path, 0.0, last + 1)
    assert sums_are_right(tmp_path) and not list(tmp_path.glob(".checkpoint-*.tmp"))
