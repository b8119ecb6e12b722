"""Two processes and one folder: the second is refused, and what the first is writing stays."""

import contextlib
import os
import signal
import subprocess
import sys

import pytest

import main_mar
import sample
from tests.test_cli import TINY, files, refused
from util.lock import remove_left, written_by_one


@contextlib.contextmanager
def locked_elsewhere(folder):
    """Another process writes to the folder inside."""
    code = "import sys; from util.lock import written_by_one\n"
    code += "with written_by_one(sys.argv[1]): print('in', flush=True); sys.stdin.read()"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", code, str(folder)], **pipes) as other:
        assert other.stdout.readline() == b"in\n"
        yield
        other.stdin.close()


def test_one_process_at_a_time(tmp_path):
    folder = tmp_path / "new" / "folder"
    with written_by_one(folder):
        with pytest.raises(ValueError, match=f"another process is writing to {folder}"):
            subprocess_enters(folder)
        with written_by_one(folder):  # the same process may ask again
            pass
        with pytest.raises(ValueError, match="another process"):
            subprocess_enters(folder)
        with written_by_one(tmp_path / "other"):
            pass
    with pytest.raises(KeyError), written_by_one(folder):
        raise KeyError
    with written_by_one(folder):
        assert not list(folder.iterdir())  # the lock leaves nothing


def test_a_lock_ends_with_its_process(tmp_path):
    code = "import os, sys; from util.lock import written_by_one\n"
    code += "held = written_by_one(sys.argv[1]); held.__enter__(); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=os.getcwd()).returncode == 9
    with written_by_one(tmp_path):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that are forked")
def test_a_worker_does_not_keep_the_lock_of_a_process_that_is_gone(tmp_path):
    """As a DataLoader's does for five seconds after its process was killed."""
    code = "import os, sys, time; from util.lock import written_by_one\n"
    code += "held = written_by_one(sys.argv[1]); held.__enter__()\n"
    code += "if os.fork() == 0: print('forked', flush=True); time.sleep(60)\nelse: time.sleep(60)"
    owner = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert owner.stdout.readline() == b"forked\n"
        with pytest.raises(ValueError, match="another process"), written_by_one(tmp_path):
            pytest.fail("let in")
        owner.kill()
        owner.wait()
        with written_by_one(tmp_path):
            pass
    finally:
        os.killpg(owner.pid, signal.SIGKILL)


def test_the_lock_is_taken_before_the_checkpoint_is_read(tmp_path, monkeypatch):
    """Else a run that waits for another would go on from what was there before that ended."""
    run, seen = tmp_path / "run", []
    run.mkdir()

    def looked(launch):
        with pytest.raises(ValueError, match="another process"):
            subprocess_enters(run)
        seen.append(launch)
        raise ValueError("far enough")

    monkeypatch.setattr(main_mar, "find_checkpoint", looked)
    with pytest.raises(ValueError, match="far enough"):
        main_mar.main([*TINY, "--output_dir", str(run), "--resume", str(run)])
    assert seen


def subprocess_enters(folder) -> None:
    """Ask for a folder from another process; what it is told is raised."""
    code = "import sys; from util.lock import written_by_one; written_by_one(sys.argv[1]).__enter__()"
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(done.stderr.splitlines()[-1])


def test_what_a_living_process_is_writing_stays(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    stays = {f".b.png.{os.getppid()}.tmp", ".mine.tmp", "c.png"}
    for name in (f".a.png.{gone.pid}.tmp", f".d.png.{os.getpid()}.tmp", ".e.png.20261130120000000000000.tmp", *stays):
        (tmp_path / name).write_text("")
    remove_left(tmp_path.iterdir())
    assert {path.name for path in tmp_path.iterdir()} == stays


def test_a_second_training_and_a_second_sampling_are_refused(tmp_path, capsys):
    run = tmp_path / "run"
    command = [*TINY, "--output_dir", str(run), "--resume", str(run), "--eval_freq", "100"]
    with locked_elsewhere(run):
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
    with locked_elsewhere(folder):
        assert str(folder) in refused(sample.main, words, capsys) and files(tmp_path / "out") == before
    assert sample.main(words) == 0 and (folder / "0.png").is_file()
