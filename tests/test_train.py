"""Training as a whole: resuming, stopping, processes, skipped steps. In process but for torchrun itself."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import engine_mar
import main_mar
from main_mar import main
from tests.helpers import torchrun
from training import step as step_module
from training.objectives.token import TokenObjective
from util.checkpoint import load_checkpoint, save_checkpoint
from util.door import run_main
from util.images.pictures import read_png

# a small model on a folder of small pictures, four steps an epoch
SMALL = "--model mar_tiny --data imagefolder --tokenizer pixel --img_size 8 --buffer_size 2 --attn_dropout 0".split()
SMALL += "--diffloss_w 16 --diffloss_d 1 --diffusion_batch_mul 1 --batch_size 16 --proj_dropout 0 --blr 0.02".split()
SMALL += "--num_sampling_steps 2 --num_iter 2 --warmup_epochs 1 --eval_freq 100 --num_workers 0".split()
STEPS_PER_EPOCH = 4


@pytest.fixture(scope="module", autouse=True)
def pictures(tmp_path_factory):
    """65 digits as PNG files in ten class folders; the commands above are given this folder."""
    images, labels = load_digits(return_X_y=True)
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(65):
        path = folder / "train" / str(labels[i]) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((images[i].reshape(8, 8) * 15.9).astype(np.uint8)).save(path)
    SMALL.extend(["--data_path", str(folder)])
    yield folder
    del SMALL[-2:]


def train(folder, *flags):
    assert main([*SMALL, "--output_dir", str(folder), "--resume", str(folder), *map(str, flags)]) == 0
    return load_checkpoint(folder)


def assert_same(a, b, skip=("args",)):
    """Bitwise equality of nested dicts, lists and tensors."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a.keys() - set(skip):
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def test_resuming_is_exact(tmp_path):
    """4 epochs == 2 epochs, stop, 2 more: weights, averages, optimizer, learning rate, everything in the file."""
    whole = train(tmp_path / "whole", "--epochs", 4, "--lr_schedule", "constant", "--attn_dropout", 0.1)
    flags = ("--lr_schedule", "constant", "--attn_dropout", 0.1)
    train(tmp_path / "parts", "--epochs", 2, *flags)
    parts = train(tmp_path / "parts", "--epochs", 4, *flags)
    assert whole["step"] == parts["step"] == 4 * STEPS_PER_EPOCH and whole["epoch"] == 3
    assert_same(whole, parts)


@pytest.mark.parametrize("number, at", [(signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGINT, 2)])
def test_a_signal_finishes_the_step_and_saves_and_the_run_continues_exactly(tmp_path, monkeypatch, capsys, number, at):
    """The request is read before the optimizer steps, so at most one step follows: at 2 that is the epoch's last."""
    whole = train(tmp_path / "whole", "--epochs", 2)
    step = step_module.optimizer_step

    def interrupted(state, grad_norm):
        if state.step == STEPS_PER_EPOCH + at:
            os.kill(os.getpid(), number)
        return step(state, grad_norm)

    before = signal.getsignal(number)
    monkeypatch.setattr(step_module, "optimizer_step", interrupted)
    folder = tmp_path / "parts"
    code = main([*SMALL, "--output_dir", str(folder), "--resume", str(folder), "--epochs", "2"])
    assert code == 128 + number and signal.getsignal(number) == before
    assert f"--resume {folder}" in capsys.readouterr().out
    saved = load_checkpoint(folder)
    assert saved["step"] == STEPS_PER_EPOCH + at + 2 and saved["epoch"] == saved["step"] // STEPS_PER_EPOCH - 1
    monkeypatch.setattr(step_module, "optimizer_step", step)
    assert_same(whole, train(folder, "--epochs", 2))


def test_a_signal_while_sampling_stops_at_once_and_loses_nothing(tmp_path, monkeypatch, capsys):
    whole = train(tmp_path / "whole", "--epochs", 2)
    folder = tmp_path / "parts"
    command = [*SMALL, "--output_dir", str(folder), "--resume", str(folder), "--epochs", "2", "--eval_freq", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(engine_mar, "sample_images", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
        assert main([*command, "--save_last_freq", "100"]) == 128 + signal.SIGTERM
    assert f"--resume {folder}" in capsys.readouterr().out
    assert load_checkpoint(folder)["epoch"] == 0
    assert main(command) == 0
    assert_same(whole, load_checkpoint(folder))


NEXT = ("--train_masks", "mix", "--train_targets", "next", "--order", "halton", "--mask_ratio_per_image")


@pytest.mark.on_cpu("sums of float32, which bf16 and TF32 round")
@pytest.mark.parametrize("masks", [("--mask_ratio_per_image",), NEXT], ids=["random", "mix"])
def test_accumulated_batches_equal_one_large_batch(tmp_path, masks):
    """Also where the micro-batches differ in how many tokens they mask, and in how many of these are targets."""
    one = train(tmp_path / "one", "--epochs", 1, "--lr", 1e-3, *masks)
    four = train(tmp_path / "four", "--epochs", 1, "--batch_size", 4, "--accum_iter", 4, "--lr", 1e-3, *masks)
    for name, value in one["model"].items():
        torch.testing.assert_close(four["model"][name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.on_cpu("sums of float32, which bf16 and TF32 round")
@pytest.mark.parametrize("masks", [(), ("--train_masks", "policy")], ids=["random", "policy"])
def test_what_heads_learn_is_a_mean_over_micro_batches(tmp_path, masks):
    """Their losses, and what is logged of them: not a sum, which would grow with --accum_iter."""
    learn = ("--epochs", 1, "--learn", "order,group,tau,cfg", "--train_num_iter", "2,4", *masks)
    train(tmp_path / "one", *learn)
    train(tmp_path / "four", *learn, "--batch_size", 4, "--accum_iter", 4)
    one, four = (json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[0]) for name in ("one", "four"))
    same = ["cfg", "budget", "tau_mean", "w_mean", "k_over_cosine_mean", "rho_mean", *([] if masks else ["order"])]
    for name in same:
        assert four[name] == pytest.approx(one[name], rel=0.2 if masks else 0.02, abs=1e-4), name
    assert four["grad_norm"] < 2 * one["grad_norm"]


@pytest.mark.parametrize("masks", ["visited", "mix"])
def test_heads_that_rest_change_nothing_and_learn_afterwards(tmp_path, masks):
    """Until --heads_from the run is the one without heads, on the states of the rules that the heads start from."""
    usual = ("--train_targets", "next", "--order", "halton", "--mask_ratio_per_image", "--lr", 1e-3)
    alone = train(tmp_path / "alone", "--epochs", 1, "--train_masks", masks, *usual)
    policy = "policy" if masks == "visited" else masks
    learn = ("--train_masks", policy, "--learn", "group,tau", "--order_base", "halton", "--heads_from", 1, *usual)
    first = train(tmp_path / "heads", "--epochs", 1, *learn)
    assert_same(first["model"], alone["model"])
    assert_same(first["model_ema"], alone["model_ema"])
    outputs = [name for name in first["heads"] if not first["heads"][name].any()]
    then = train(tmp_path / "heads", "--epochs", 2, "--lr_schedule", "constant", *learn)
    assert len(outputs) >= 2 and all(then["heads"][name].any() for name in outputs)


def test_masks_that_have_not_begun_to_fade_are_random(tmp_path):
    faded = train(tmp_path / "faded", "--epochs", 1, "--train_masks", "visited")
    start = train(tmp_path / "random", "--epochs", 1, "--train_masks", "mix", "--mix_random", 1)
    first = train(tmp_path / "first", "--epochs", 1, "--train_masks", "visited", "--mix_anneal", 10**9)
    assert_same(first["model"], start["model"])
    assert not faded["model"]["z_proj.weight"].equal(start["model"]["z_proj.weight"])


@pytest.mark.slow
@pytest.mark.on_cpu("two processes need two devices, and sums of float32 are compared")
def test_two_processes_equal_one(tmp_path):
    """torchrun with gloo against one process at the same global batch (DESIGN.md section 7), ragged masks included."""
    one = train(tmp_path / "one", "--epochs", 2, "--lr", 1e-3, *NEXT)
    folder = tmp_path / "two"
    flags = ["--output_dir", folder, "--epochs", 2, "--batch_size", 8, "--lr", 1e-3, *NEXT]
    torchrun("main_mar.py", *SMALL, *flags)
    two = load_checkpoint(folder)
    assert two["step"] == one["step"]
    for key in ("model", "model_ema"):
        for name, value in one[key].items():
            torch.testing.assert_close(two[key][name], value, rtol=1e-4, atol=1e-4)
    # the pictures made after the last epoch, by two processes there and one here, are of the same draws
    for i in range(40):
        a, b = (read_png(tmp_path / n / "samples" / "epoch0002" / "grid" / f"{i}.png") for n in ("one", "two"))
        assert np.abs(a.astype(int) - b).max() <= 1


def test_the_number_of_workers_changes_nothing(tmp_path):
    none = train(tmp_path / "none", "--epochs", 1)
    assert_same(none["model"], train(tmp_path / "two", "--epochs", 1, "--num_workers", 2)["model"])


def test_a_published_checkpoint_continues(tmp_path):
    """Same names, sizes and optimizer order; `args` is a Namespace, and nothing of ours is in the file."""
    import argparse

    ours = train(tmp_path / "ours", "--epochs", 1)
    published = {k: ours[k] for k in ("model", "model_ema", "optimizer", "epoch", "scaler")}
    save_checkpoint(tmp_path / "published", {**published, "args": argparse.Namespace(lr=1.0)})
    assert_same(train(tmp_path / "published", "--epochs", 2)["model"], train(tmp_path / "ours", "--epochs", 2)["model"])


def test_a_published_checkpoint_is_tuned_on_the_states_of_a_policy(tmp_path):
    ours = train(tmp_path / "ours", "--epochs", 1)
    save_checkpoint(tmp_path / "published", {k: ours[k] for k in ("model", "model_ema", "optimizer", "epoch")})
    flags = ("--train_masks", "policy", "--train_targets", "next", "--learn", "order,group", "--policy_passes", 2)
    tuned = train(tmp_path / "tuned", "--init_from", tmp_path / "published", "--epochs", 1, *flags)
    assert tuned["step"] == STEPS_PER_EPOCH and tuned["config"]["heads"]["learn"] == ["order", "group"]
    moved = {name for name, value in tuned["model"].items() if not torch.equal(value, ours["model"][name])}
    assert any(name.startswith("decoder_blocks") for name in moved) and any("diffloss" in name for name in moved)
    assert any(value.any() for name, value in tuned["heads"].items() if name.endswith("out.weight"))


def test_gradient_checkpointing_changes_nothing(tmp_path):
    plain = train(tmp_path / "plain", "--epochs", 1, "--proj_dropout", 0.1)
    saving = train(tmp_path / "saving", "--epochs", 1, "--proj_dropout", 0.1, "--grad_checkpointing")
    for name, value in plain["model"].items():
        torch.testing.assert_close(saving["model"][name], value, rtol=1e-5, atol=1e-6)


def test_bf16_trains_close_to_fp32(tmp_path):
    full = train(tmp_path / "fp32", "--epochs", 2, "--lr", 1e-3, "--dtype", "fp32")
    half = train(tmp_path / "bf16", "--epochs", 2, "--lr", 1e-3, "--dtype", "bf16")
    for name, value in full["model"].items():
        assert half["model"][name].dtype == torch.float32
        torch.testing.assert_close(half["model"][name], value, rtol=0, atol=2 * STEPS_PER_EPOCH * 1e-3)
    assert any(not torch.equal(half["model"][name], value) for name, value in full["model"].items())


@pytest.mark.on_cpu("which tensors of the optimizer are whose is the same everywhere")
def test_a_run_continues_as_fast_as_it_would_start_whatever_the_checkpoint_was_trained_with(tmp_path, monkeypatch):
    """`fused` of the optimizer is this machine's, and what is fused has its count of steps beside the weights."""
    content = train(tmp_path, "--epochs", 1)
    for group in content["optimizer"]["param_groups"]:
        assert group["fused"]
        group.update(fused=None, foreach=None)
    save_checkpoint(tmp_path / "checkpoint-last.pth", content)
    (tmp_path / "checkpoints.sha256").unlink()
    seen, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self, *args: seen.append([group["fused"] for group in self.param_groups]) or step(self, *args),
    )
    train(tmp_path, "--epochs", 2)
    assert seen and all(flags == [True, True] for flags in seen)


def test_init_from_takes_weights_and_averages_only(tmp_path):
    first = train(tmp_path / "first", "--epochs", 1)
    folder = tmp_path / "second"
    flags = ["--output_dir", str(folder), "--init_from", str(tmp_path / "first"), "--epochs", "1", "--lr", "0"]
    assert main([*SMALL, *flags]) == 0
    second = load_checkpoint(folder)
    assert second["epoch"] == 0 and second["step"] == STEPS_PER_EPOCH
    assert_same(first["model"], second["model"])  # learning rate 0


@pytest.mark.on_cpu("runs are compared bit for bit, which a GPU promises with --deterministic alone")
def test_a_second_stage_that_was_stopped_continues_with_the_same_command(tmp_path):
    """--resume and --init_from together: the checkpoint of the stage itself wins where there is one."""
    train(tmp_path / "first", "--epochs", 1)
    flags = ("--init_from", tmp_path / "first", "--freeze_backbone", "--learn", "order,group,tau,cfg")
    whole = train(tmp_path / "whole", "--epochs", 2, *flags, "--lr_schedule", "constant")
    train(tmp_path / "parts", "--epochs", 1, *flags)
    parts = train(tmp_path / "parts", "--epochs", 2, *flags)
    assert whole["step"] == parts["step"] == 2 * STEPS_PER_EPOCH
    assert_same(whole, parts)
    first = load_checkpoint(tmp_path / "first")["model_ema"]
    changed = {name for name, value in whole["model"].items() if not torch.equal(value, first[name])}
    assert changed and all(name.startswith("diffloss.") for name in changed)  # the backbone is frozen, the MLP is not
    assert whole["config"]["heads"]["learn"] == ["order", "group", "tau", "cfg"] and whole["heads_ema"]


@pytest.mark.parametrize("frozen", ["backbone", "token head", "both"])
def test_what_is_frozen_stays_what_was_sampled_with(frozen, tmp_path):
    """The averaged weights: an average of the raw ones would become these in ten steps."""
    first = train(tmp_path / "first", "--epochs", 1, "--lr", 1e-2)
    flags = {"backbone": ["--freeze_backbone"], "token head": ["--no-train_diffloss"]}
    flags["both"] = [*flags["backbone"], *flags["token head"]]
    learn = ("--init_from", tmp_path / "first", "--epochs", 1, "--learn", "tau,cfg", "--lr", 1e-2, *flags[frozen])
    second = train(tmp_path / "second", *learn)
    for name, value in first["model_ema"].items():
        stays = frozen == "both" or name.startswith("diffloss.") == (frozen == "token head")
        assert value.equal(second["model_ema"][name]) == stays, name
        assert not stays or value.equal(second["model"][name])
    assert not all(first["model"][name].equal(value) for name, value in first["model_ema"].items())


def test_a_second_stage_takes_over_the_heads_that_it_has(tmp_path, capsys):
    """Those of the same name and form; the others start at zero, and a line says which."""
    first = train(tmp_path / "first", "--epochs", 1, "--learn", "group,tau", "--lr", 1e-2)
    flags = ("--epochs", 1, "--init_from", tmp_path / "first", "--learn", "tau,cfg", "--lr", 0)
    second = train(tmp_path / "second", *flags)
    assert f"heads of {tmp_path / 'first'}: tau; that start at zero: cfg" in capsys.readouterr().out
    tau = [name for name in second["heads"] if name.startswith("heads.tau.")]
    assert tau and all(second["heads"][name].equal(first["heads"][name]) for name in tau)
    assert second["heads"]["heads.tau.out.weight"].any() and not second["heads"]["heads.cfg.out.weight"].any()


def test_non_finite_gradients_are_skipped_and_twenty_in_a_row_stop_the_run(tmp_path, monkeypatch, capsys):
    terms = TokenObjective.forward
    bad = {"steps": {2, 3}}

    def poisoned(self, *args):
        poisoned.calls += 1
        result = terms(self, *args)
        return {k: v * float("nan") for k, v in result.items()} if poisoned.calls in bad["steps"] else result

    poisoned.calls = 0
    monkeypatch.setattr(TokenObjective, "forward", poisoned)
    content = train(tmp_path / "a", "--epochs", 1)
    assert "2 steps without a finite gradient were skipped" in capsys.readouterr().out
    assert all(v.isfinite().all() for v in content["model"].values())

    poisoned.calls, bad["steps"] = 0, set(range(1, 1000))
    code = run_main(main, [*SMALL, "--output_dir", str(tmp_path / "b"), "--epochs", "10"])
    assert code == 1 and "20 steps in a row" in capsys.readouterr().err


def test_loss_falls(tmp_path):
    """In 40 steps the error must leave the level of a network that says nothing (1, the variance of the noise)."""
    train(tmp_path, "--epochs", 10)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    loss = [e.value for e in events.Scalars("train/mse")]
    assert len(loss) == 10 * STEPS_PER_EPOCH
    assert loss[0] == pytest.approx(1.0, abs=0.1) and np.mean(loss[-8:]) < 0.85


def test_class_count_mismatch_is_one_line(tmp_path, pictures, capsys):
    train(tmp_path / "ten", "--epochs", 1)
    capsys.readouterr()
    one_class = pictures / "train" / "3"
    flags = ["--data_path", str(one_class), "--batch_size", "2", "--resume", str(tmp_path / "ten")]
    code = run_main(main, [*SMALL, *flags, "--output_dir", str(tmp_path / "o")])
    captured = capsys.readouterr()
    assert code == 2 and "10 classes" in captured.err and captured.err.count("\n") == 1
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_a_group_signal_with_loading_processes_saves_too(tmp_path):
    """A scheduler signals every process of a job: the loading ones must not die before the step is finished."""
    import time

    command = [sys.executable, "main_mar.py", *SMALL, "--epochs", "100000", "--num_workers", "2"]
    run = subprocess.Popen(
        [*command, "--output_dir", str(tmp_path), "--eval_freq", "100000", "--save_last_freq", "1"],
        cwd=Path(__file__).parent.parent,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "checkpoint-last.pth").exists() and time.monotonic() < deadline and run.poll() is None:
        time.sleep(0.2)
    os.killpg(run.pid, signal.SIGTERM)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGTERM, err[-2000:]
    assert f"--resume {tmp_path}" in out
    assert f"after step {load_checkpoint(tmp_path)['step']}," in out


def test_another_batch_size_on_resume_skips_nothing(tmp_path):
    """Twelve images an epoch in threes, then in fours: the next epoch is whole, the one before it not repeated."""
    train(tmp_path, "--epochs", 3, "--batch_size", 13)  # 5 steps an epoch
    after = train(tmp_path, "--epochs", 4, "--batch_size", 16)  # 4
    assert after["step"] == 3 * 5 + 4 and after["epoch"] == 3


def test_samples_missed_by_a_stop_are_made_on_resume(tmp_path, monkeypatch):
    command = [*SMALL, "--output_dir", str(tmp_path), "--resume", str(tmp_path), "--epochs", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(engine_mar, "sample_images", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
        assert main(command) == 128 + signal.SIGINT
    picture = tmp_path / "samples" / "epoch0001.png"
    assert not picture.exists()
    assert main(command) == 0 and picture.exists()
    made = picture.stat().st_mtime_ns
    assert main(command) == 0 and picture.stat().st_mtime_ns == made


def scalars(folder, name):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [e.value for e in events.Scalars(f"train/{name}")]


@pytest.mark.slow
def test_the_group_head_keeps_the_budget_and_collapses_without(tmp_path):
    """Fewer tokens are always easier: only the budget term keeps the mean group size at the cosine schedule's."""
    flags = ("--learn", "order,group", "--mask_ratio_min", 0, "--mask_ratio_per_image", "--epochs", 40, "--lr", 3e-3)
    means = {}
    for budget in (10, 0):
        folder = tmp_path / str(budget)
        train(folder, *flags, "--lambda_budget", budget)
        means[budget] = np.mean(scalars(folder, "k_over_cosine_mean")[-40:])
    assert abs(means[10] - 1) < 0.1 and np.mean(scalars(tmp_path / "10", "k_over_cosine_std")[-40:]) > 0
    assert means[0] < 0.9


@pytest.mark.slow
def test_the_group_head_keeps_the_budget_on_the_digits_preset(tmp_path):
    flags = ("--learn", "order,group,tau,cfg", "--mask_ratio_min", "0", "--mask_ratio_per_image", "--epochs", "8")
    flags += ("--warmup_epochs", "0", "--num_images", "20", "--output_dir", str(tmp_path))
    assert main_mar.main(["--preset", "digits", *flags]) == 0
    assert abs(np.mean(scalars(tmp_path, "k_over_cosine_mean")[-56:]) - 1) < 0.1
    assert np.mean(scalars(tmp_path, "k_over_cosine_std")[-56:]) > 0.001
