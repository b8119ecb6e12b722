"""Runs of training that meet a full disk, a kill, or flags that would spoil them; and the best of their checkpoints."""

import errno
import json
import os
import shutil
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image

import engine_mar
import main_mar
from tests.helpers import tiny_mar
from tests.helpers_keeping import names, sums_are_right
from training import build, keeping
from training import step as step_module
from training.checkpoints import check_resume
from training.config import LaunchConfig
from util.checkpoint import load_checkpoint, save_checkpoint
from util.door import run_main
from util.evaluation.protocol import EvalConfig

pytestmark = pytest.mark.on_cpu("runs are compared bit for bit, which a GPU promises with --deterministic alone")

TRAIN = "--model mar_tiny --data imagefolder --tokenizer pixel --img_size 4 --buffer_size 2 --proj_dropout 0".split()
TRAIN += "--diffloss_w 16 --diffloss_d 1 --diffusion_batch_mul 1 --batch_size 4 --attn_dropout 0.1 --blr 0.02".split()
TRAIN += "--num_sampling_steps 2 --num_iter 1 --warmup_epochs 1 --eval_freq 100 --num_workers 0".split()
TRAIN += "--save_last_freq 1".split()
STEPS = 3  # an epoch


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder, draws = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name in "ab":
        (folder / name).mkdir()
        for i in range(6):
            Image.fromarray(draws.integers(0, 256, (4, 4, 3), np.uint8)).save(folder / name / f"{i}.png")
    return folder


def command(pictures, folder, *flags):
    return [
        *TRAIN,
        "--data_path",
        str(pictures),
        "--output_dir",
        str(folder),
        "--resume",
        str(folder),
        *map(str, flags),
    ]


class Killed(BaseException):
    """Nothing catches it."""


def test_a_run_on_a_full_disk_that_is_killed_ends_as_if_nothing_had_been(pictures, tmp_path, monkeypatch, capsys):
    """The save after epoch 1 fails; that after epoch 2 does not; the run dies within epoch 3."""
    assert main_mar.main(command(pictures, tmp_path / "whole", "--epochs", 4)) == 0
    write, step = keeping.write_content, step_module.optimizer_step
    bars = []

    def full(path, saved):
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def killing(state, grad_norm):
        step(state, grad_norm)
        monkeypatch.setattr(keeping, "write_content", full if state.step <= STEPS else write)
        if state.step == 3 * STEPS - 1:
            raise Killed

    def counted(*args, **kwargs):
        bars.append(bar(*args, **kwargs))
        return bars[-1]

    bar = engine_mar.tqdm
    counted.write = bar.write
    monkeypatch.setattr(engine_mar, "tqdm", counted)
    folder = tmp_path / "parts"
    with monkeypatch.context() as patch:
        patch.setattr(step_module, "optimizer_step", killing)
        with pytest.raises(Killed):
            main_mar.main(command(pictures, folder, "--epochs", 4))
    said = capsys.readouterr()
    assert said.out.count("could not be saved") + said.err.count("could not be saved") == 1
    assert load_checkpoint(folder)["step"] == 2 * STEPS
    assert len((folder / "log.jsonl").read_text().splitlines()) == 3 * STEPS - 2  # after the checkpoint's

    assert main_mar.main(command(pictures, folder, "--epochs", 4)) == 0
    assert (folder / "log.jsonl").read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()
    a, b = load_checkpoint(tmp_path / "whole"), load_checkpoint(folder)
    for key in ("model", "model_ema"):
        assert all(torch.equal(a[key][name], b[key][name]) for name in a[key])
    assert names(folder) == names(tmp_path / "whole") and sums_are_right(folder)
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 4 * STEPS + 1))
    assert {"loss", "mse", "vb", "lr", "grad_norm"} <= rows[0].keys() and "images_per_second" not in rows[0]
    assert (bars[-1].n, bars[-1].initial, bars[-1].total) == (4 * STEPS, 2 * STEPS, 4 * STEPS)

    # two epochs of two steps more: the bar counts what was and what will be done
    assert main_mar.main(command(pictures, folder, "--epochs", 6, "--batch_size", 6)) == 0
    assert (bars[-1].n, bars[-1].total) == (4 * STEPS + 4, 4 * STEPS + 4)
    said = capsys.readouterr().out
    assert "--epochs 4 -> 6" in said and "--batch_size 4 -> 6" in said and "--seed" not in said

    # the last save of a run that cannot be made is an error, of one line
    with monkeypatch.context() as patch:
        patch.setattr(keeping, "write_content", full)
        assert run_main(main_mar.main, command(pictures, folder, "--epochs", 7, "--batch_size", 6)) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(error) == 1 and "No space left" in error[0] and load_checkpoint(folder)["epoch"] == 5


def test_the_best_of_a_run_is_by_its_online_fid(pictures, tmp_path, monkeypatch):
    fids = iter([5.0, 2.0, 3.0])
    monkeypatch.setattr(engine_mar, "evaluate", lambda *_, **__: {"metrics": {"fid": next(fids)}})
    monkeypatch.setattr(main_mar, "find_reference", lambda *_: None)
    monkeypatch.setattr(EvalConfig, "check", lambda *_: None)
    flags = ("--online_eval", "--epochs", 3, "--eval_freq", 1, "--features", "digits", "--metrics", "fid")
    assert main_mar.main(command(pictures, tmp_path, *flags)) == 0
    assert load_checkpoint(tmp_path / keeping.BEST_NAME)["step"] == 2 * STEPS and sums_are_right(tmp_path)


def test_what_would_spoil_a_run_is_refused_unless_allowed(pictures, tmp_path, capsys):
    assert main_mar.main(command(pictures, tmp_path / "run", "--epochs", 1)) == 0
    other = tmp_path / "other"
    shutil.copytree(pictures, other)
    (other / "b").rename(other / "c")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    capsys.readouterr()
    flags = ("--epochs", 2)
    assert run_main(main_mar.main, command(other, tmp_path / "run", *flags)) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "'b', not 'c'" in line and "--allow_mismatch" in line
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    assert run_main(main_mar.main, command(other, tmp_path / "run", *flags, "--allow_mismatch")) == 0
    assert load_checkpoint(tmp_path / "run")["epoch"] == 1


@pytest.mark.parametrize(
    "key, value, shown", [("encoder_num_heads", 8, "encoder_num_heads 8, not 2"), ("attn_dropout", 0.5, None)]
)
def test_sizes_that_no_shape_shows_are_compared_too(tmp_path, key, value, shown, capsys):
    mar, tokenizer = tiny_mar(), build.tokenizer_of({"tokenizer": "pixel", "vae_scale": None, "vae_mean": None}, 1)
    config = {"mar": {**asdict(mar.config), key: value}, "latents": tokenizer.describe()}  # no family: as long ago
    saved = {"config": config, "args": {"attn_dropout": 0.1, "epochs": 3}}
    now = {"family": "mar", "mar": asdict(mar.config), "latents": tokenizer.describe()}
    stored = {"config": now, "args": {"attn_dropout": 0.2, "epochs": 3}}
    if shown is None:
        check_resume(LaunchConfig(resume="RUN"), stored, saved, [])
        assert capsys.readouterr().out == "changed since the checkpoint: --attn_dropout 0.1 -> 0.2\n"
        return
    with pytest.raises(ValueError, match=shown):
        check_resume(LaunchConfig(resume="RUN"), stored, saved, [])
    check_resume(LaunchConfig(resume="RUN", allow_mismatch=True), stored, saved, [])


def test_a_log_that_is_there_is_kept_under_another_name(pictures, tmp_path):
    """Somebody else's, or that of a run whose checkpoints were moved away."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "log.jsonl").write_text("mine\n")
    assert main_mar.main(command(pictures, folder, "--epochs", 1)) == 0
    first = (folder / "log.jsonl").read_text()
    assert (folder / "log-1.jsonl").read_text() == "mine\n" and len(first.splitlines()) == STEPS
    for file in folder.glob("checkpoint*.pth"):
        file.unlink()
    assert main_mar.main(command(pictures, folder, "--epochs", 1)) == 0
    assert (folder / "log-2.jsonl").read_text() == first and (folder / "log-1.jsonl").read_text() == "mine\n"
    assert main_mar.main(command(pictures, folder, "--epochs", 2)) == 0  # goes on in the same file
    assert len((folder / "log.jsonl").read_text().splitlines()) == 2 * STEPS and not (folder / "log-3.jsonl").exists()


def test_a_run_killed_before_its_first_checkpoint_leaves_no_second_log(pictures, tmp_path):
    """Its lines come again."""
    whole = tmp_path / "whole"
    assert main_mar.main(command(pictures, whole, "--epochs", 1)) == 0
    cut = (whole / "log.jsonl").read_text().splitlines(keepends=True)[:2]
    (tmp_path / "cut").mkdir()
    for started in (cut, [cut[0], cut[1][:5]], [cut[0][:5]], []):
        (tmp_path / "cut/log.jsonl").write_text("".join(started))
        assert main_mar.main(command(pictures, tmp_path / "cut", "--epochs", 1)) == 0
        assert not list((tmp_path / "cut").glob("log-*"))
        for file in (tmp_path / "cut").glob("checkpoint*"):
            file.unlink()


@pytest.mark.parametrize("key", ["epoch", "step"])
def test_a_checkpoint_of_before_the_beginning_is_damaged(key, pictures, tmp_path, capsys):
    assert main_mar.main(command(pictures, tmp_path, "--epochs", 1)) == 0
    save_checkpoint(tmp_path, load_checkpoint(tmp_path) | {key: -5})
    (tmp_path / "checkpoints.sha256").unlink()
    capsys.readouterr()
    assert run_main(lambda argv: main_mar.main(command(pictures, tmp_path, "--epochs", 2))) == 2
    assert f"is damaged: its {key} is -5" in capsys.readouterr().err
