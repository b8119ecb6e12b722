"""Slow: long runs do not grow, and killed ones lose nothing (`pytest -m slow tests/test_long_runs.py`)."""

import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import engine_mar
import main_mar
from models.tokenizers import build_tokenizer
from sampling.run import sample_images
from sampling.settings import SampleConfig
from scripts import torture
from tests.helpers import on_cpu, tiny_mar
from tests.test_interrupted_training import TRAIN, pictures  # noqa: F401, a fixture
from training import step as step_module
from util.door import run_main

ROOT = Path(__file__).resolve().parents[1]
MEGABYTES = 8  # a leak of one image or one set of gradients a step would be hundreds


def open_files() -> int:
    """Of this process, without those that a thread has just open to write a picture: the least of several counts."""
    counts = []
    for _ in range(20):
        counts.append(len(os.listdir("/proc/self/fd")))
        time.sleep(0.005)
    return min(counts)


def usage() -> tuple[float, int]:
    """(resident megabytes, open files) of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, open_files()


def assert_flat(measured, what):
    """Every figure after the first quarter, in which caches fill, is the same to MEGABYTES and to the file."""
    memory, files = zip(*measured)
    print(f"{what}: {len(measured)} measurements, megabytes {memory}, open files {files}")
    settled = len(measured) // 4
    assert max(memory[settled:]) - memory[settled] < MEGABYTES
    assert len(set(files[settled:])) == 1


@pytest.mark.slow
def test_2000_training_steps_stay_in_their_memory(pictures, tmp_path, monkeypatch):  # noqa: F811
    step, measured = step_module.optimizer_step, []

    def measuring(state, grad_norm):
        step(state, grad_norm)
        if state.step % 200 == 0:
            measured.append(usage())

    monkeypatch.setattr(step_module, "optimizer_step", measuring)
    flags = ("--epochs", "667", "--eval_freq", "100", "--save_last_freq", "20")  # three steps an epoch
    assert main_mar.main([*TRAIN, "--data_path", str(pictures), "--output_dir", str(tmp_path), *flags]) == 0
    assert len(measured) == 10
    assert_flat(measured, "2,000 training steps")


@pytest.mark.slow
def test_500_sampling_batches_stay_in_their_memory(tmp_path, monkeypatch):
    mar, tokenizer = tiny_mar(), build_tokenizer("pixel", channels=1)
    make, measured, calls = engine_mar.generate, [], []

    def measuring(*args, **kwargs):
        calls.append(0)
        if len(calls) % 50 == 0:
            measured.append(usage())
        return make(*args, **kwargs)

    monkeypatch.setattr("sampling.run.generate", measuring)
    parts = on_cpu(mar, tokenizer)
    sampling = SampleConfig(cfg=2.0, num_iter=3, num_sampling_steps=2)
    sample_images(parts, sampling, [i % 3 for i in range(2000)], 0, tmp_path, batch_size=4)
    assert len(calls) == 500
    assert_flat(measured, "500 sampling batches")


@pytest.mark.slow
def test_torture(tmp_path):
    """Three kills of each kind; `python scripts/torture.py` makes twenty."""
    command = [sys.executable, "scripts/torture.py", "--kills", "3", "--epochs", "2", "--num_images", "80"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--work_dir", str(tmp_path)], cwd=ROOT, env=environment, capture_output=True)
    said = done.stdout.decode()
    assert done.returncode == 0, said + done.stderr.decode()
    assert said.count("3 kills survived") == said.count("bit for bit") == len(torture.SCENARIOS)


# ------------------------------------------------------------------------------ not slow: the judge can say no


def test_a_dry_run_shows_the_commands(capsys):
    assert torture.main(["--what", "train,cache", "--dry_run"]) == 0
    assert json.loads(capsys.readouterr().out)["commands"].keys() == {"train", "cache"}
    assert run_main(torture.main, ["--what", "train,nope"]) == 2 and "'nope'" in capsys.readouterr().err


def test_what_differs_by_one_bit_differs():
    a = {"model": {"w": torch.tensor([0.0, 1.0])}, "step": 3, "list": [1, None]}
    assert torture.differences(a, {"model": {"w": torch.tensor([0.0, 1.0])}, "step": 3, "list": [1, None]}) == []
    for key, other in (
        ("model", {"w": torch.tensor([-0.0, 1.0])}),
        ("model", {"w": torch.tensor([0.0, 1.0], dtype=torch.float64)}),
        ("model", {}),
        ("step", 3.0),
        ("list", [1]),
    ):
        assert len(torture.differences(a, {**a, key: other})) == 1
    nan = torch.tensor([float("nan")])
    assert torture.differences(nan, nan.clone()) == []


def test_pictures_and_rows_are_compared(tmp_path):
    for name in "ab":
        folder = tmp_path / name / "setting"
        folder.mkdir(parents=True)
        (folder / "0.png").write_bytes(b"picture")
        (tmp_path / name / "results.jsonl").write_text('{"seconds": 1, "name": "setting"}\n')
    a, b = tmp_path / "a", tmp_path / "b"
    (b / "results.jsonl").write_text('{"seconds": 2, "name": "setting"}\n')
    assert torture.compare_sampling(a, b) == []
    (b / "results.jsonl").write_text('{"seconds": 2, "name": "setting"}\n' * 2)
    assert len(torture.compare_sampling(a, b)) == 1  # a row twice
    (b / "setting" / "1.png").write_bytes(b"one too many")
    (b / "setting" / "0.png").write_bytes(b"another")
    assert len(torture.compare_sampling(a, b)) == 3
