"""Two processes and one folder: the second is refused, and what the first is writing stays."""

import os
import subprocess
import sys

import pytest

import main_mar
import sample
from tests.test_cli import TINY, files, refused
from util.lock import remove_left, written_by_one


def test_one_process_at_a_time(tmp_path):
    folder = tmp_path / "new" / "folder"
    with written_by_one(folder):
        with pytest.raises(ValueError, match=f"another process is writing to {folder}"), written_by_one(folder):
            pytest.fail("let in")
        with written_by_one(tmp_path / "other"):
            pass
    with pytest.raises(KeyError), written_by_one(folder):
        raise KeyError
    with written_by_one(folder):
        assert not list(folder.iterdir())  # the lock leaves nothing


def test_a_lock_ends_with_its_process(tmp_path):
    code = "import os, sys; from util.lock import written_by_one; written_by_one(sys.argv[1]).__enter__(); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=os.getcwd()).returncode == 9
    with written_by_one(tmp_path):
        pass


def test_what_a_living_process_is_writing_stays(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for name in (f".a.png.{gone.pid}.tmp", f".b.png.{os.getpid()}.tmp", ".mine.tmp", "c.png"):
        (tmp_path / name).write_text("")
    remove_left(tmp_path.iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {f".b.png.{os.getpid()}.tmp", ".mine.tmp", "c.png"}


def test_a_second_training_and_a_second_sampling_are_refused(tmp_path, capsys):
    run = tmp_path / "run"
    command = [*TINY, "--output_dir", str(run), "--resume", str(run), "--eval_freq", "100"]
    with written_by_one(run):
        line = refused(main_mar.main, [*command, "--seed", "5"], capsys)
        assert "another process is writing to" in line and str(run) in line and not files(run)
    assert main_mar.main(command) == 0
    words = ["--checkpoint", str(run), "--output_dir", str(tmp_path / "out"), "--num_images", "4", "--metrics", "none"]
    words += ["--num_iter", "2", "--num_sampling_steps", "2"]
    assert sample.main(words) == 0
    folder = next(path for path in (tmp_path / "out").iterdir() if path.is_dir())
    (tmp_path / "out/results.jsonl").unlink()
    (folder / "0.png").unlink()
    before = files(tmp_path / "out")
    with written_by_one(folder):
        assert str(folder) in refused(sample.main, words, capsys) and files(tmp_path / "out") == before
    assert sample.main(words) == 0 and (folder / "0.png").is_file()
