"""scripts/export_weights.py: a file that every program takes for the checkpoint it was made of."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import main_mar
import sample
from heads.policy import load_heads
from models.loading import load_mar
from scripts import export_weights
from tests.helpers import untrained
from tests.test_cli import TINY, files, refused
from util.checkpoint import load_checkpoint, save_checkpoint, weights_hash

LEARN = "--learn", "order,group,tau,cfg"
QUICK = "--num_images 10 --metrics none --num_iter 2 --num_sampling_steps 2".split()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Its averages are other than its weights, those of the heads too."""
    folder = untrained(tmp_path_factory.mktemp("checkpoint"), *LEARN)
    content = load_checkpoint(folder)
    for key in ("model", "heads"):
        content[f"{key}_ema"] = {name: value + 0.01 for name, value in content[key].items()}
    save_checkpoint(folder, content)
    return folder


def export(checkpoint, path, *flags):
    assert export_weights.main(["--checkpoint", str(checkpoint), "--output", str(path), *flags]) == 0
    return path


@pytest.mark.parametrize("flags, ema", [([], True), (["--no_ema"], False)])
def test_what_is_written_is_the_models_names_the_heads_and_the_config(flags, ema, checkpoint, tmp_path):
    path, content = export(checkpoint, tmp_path / "new" / "w.safetensors", *flags), load_checkpoint(checkpoint)
    end = "_ema" if ema else ""
    expected = content[f"model{end}"] | {f"heads.{name}": value for name, value in content[f"heads{end}"].items()}
    tensors = load_file(path)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in tensors)
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["config"]) == json.loads(json.dumps(content["config"]))
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert path.stat().st_mode & 0o044  # others may read it, as they may the checkpoint


@pytest.mark.parametrize("flags, ema", [([], True), (["--no_ema"], False)])
def test_it_loads_as_the_checkpoint_does(flags, ema, checkpoint, tmp_path):
    path = export(checkpoint, tmp_path / "w.safetensors", *flags)
    for place in (path, str(path)):
        (model, tokenizer, config), (model_0, tokenizer_0, config_0) = (
            load_mar(p, ema=ema) for p in (place, checkpoint)
        )
        assert weights_hash(model.state_dict()) == weights_hash(model_0.state_dict())
        assert config == config_0 and tokenizer.describe() == tokenizer_0.describe()
        heads = [load_heads(p, ema=ema) for p in (place, checkpoint)]
        assert weights_hash(heads[0].state_dict()) == weights_hash(heads[1].state_dict())
        assert heads[0].settings() == heads[1].settings()
    with pytest.raises(ValueError, match="leave out --no_ema" if ema else "has no averaged weights; --no_ema"):
        load_mar(path, ema=not ema)


def test_it_samples_the_same_images(checkpoint, tmp_path):
    path, made = export(checkpoint, tmp_path / "w.safetensors"), []
    for i, place in enumerate((checkpoint, path)):
        argv = ["--checkpoint", str(place), "--output_dir", str(tmp_path / str(i)), "--infer_mode", "both", *QUICK]
        assert sample.main(argv) == 0
        (npz,) = (tmp_path / str(i)).glob("*/samples.npz")
        made.append(npz.read_bytes())
    assert made[0] == made[1]
    rows = [json.loads((tmp_path / name / "results.jsonl").read_text()) for name in "01"]
    assert rows[0]["weights"] == rows[1]["weights"] and rows[1]["checkpoint"] == str(path)


def test_a_new_run_starts_from_it_with_its_heads(checkpoint, tmp_path, monkeypatch):
    path, content, seen = export(checkpoint, tmp_path / "w.safetensors"), load_checkpoint(checkpoint), []
    monkeypatch.setattr("main_mar.train", lambda state, *a: seen.append(state) or 0)
    argv = [*(word.format(out=tmp_path / "out") for word in TINY), "--init_from", str(path), *LEARN]
    assert main_mar.main(argv) == 0
    (state,) = seen
    for weights, key in ((state.model.state_dict(), "model_ema"), (state.ema.weights, "model_ema")):
        assert weights_hash(weights) == weights_hash(content[key])
    for weights in (state.heads.state_dict(), state.heads_ema.weights):
        assert weights_hash(weights) == weights_hash(content["heads_ema"])


def test_it_is_evaluated_with_resume(checkpoint, tmp_path):
    path = export(checkpoint, tmp_path / "w.safetensors")
    argv = [*(word.format(out=tmp_path / "out") for word in TINY), "--evaluate", "--resume", str(path), *QUICK]
    assert main_mar.main(argv) == 0


def test_a_file_that_is_there_is_replaced_on_demand_only(checkpoint, tmp_path, capsys):
    path = tmp_path / "w.safetensors"
    path.write_text("mine")
    argv = ["--checkpoint", str(checkpoint), "--output", str(path)]
    line = refused(export_weights.main, argv, capsys)
    assert str(path) in line and "--force" in line and path.read_text() == "mine"
    export(checkpoint, path, "--force")
    assert len(load_file(path)) > 10


def test_an_interrupted_export_leaves_the_old_file(checkpoint, tmp_path, monkeypatch, capsys):
    path = export(checkpoint, tmp_path / "w.safetensors")
    before = path.read_bytes()

    def failing(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("util.exported.save_file", failing)
    argv = ["--checkpoint", str(checkpoint), "--output", str(path), "--force"]
    assert "disk full" in refused(export_weights.main, argv, capsys)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_dry_run_says_what_it_would_do(checkpoint, tmp_path, capsys):
    before = files(tmp_path)
    export(checkpoint, tmp_path / "new" / "w.safetensors", "--dry_run")
    shown = json.loads(capsys.readouterr().out)
    content = load_checkpoint(checkpoint)
    assert (shown["num_tensors"], shown["num_head_tensors"]) == (len(content["model_ema"]), len(content["heads_ema"]))
    assert shown["replaces"] is False and "config" in shown["metadata"] and shown["bytes"] > 1000
    assert files(tmp_path) == before


@pytest.mark.parametrize("changes, flags", [({"model_ema": None}, []), ({"model": None}, ["--no_ema"])])
def test_weights_that_are_not_there_are_one_line(changes, flags, checkpoint, tmp_path, capsys):
    torch.save({**load_checkpoint(checkpoint), **changes}, tmp_path / "c.pth")
    argv = ["--checkpoint", str(tmp_path / "c.pth"), "--output", str(tmp_path / "w.safetensors"), *flags]
    assert "--no_ema" in refused(export_weights.main, argv, capsys)


def test_tensors_that_share_memory_are_all_written(checkpoint, tmp_path):
    content = load_checkpoint(checkpoint)
    shared = torch.zeros(16, 16)
    content["model_ema"] = {"a": shared, "b": shared, "c": shared.t(), "d": shared[3:]}
    save_checkpoint(tmp_path, content)
    tensors = load_file(export(tmp_path, tmp_path / "w.safetensors"))
    assert {n: tuple(v.shape) for n, v in tensors.items() if "." not in n} == {
        "a": (16, 16), "b": (16, 16), "c": (16, 16), "d": (13, 16)
    }  # fmt: skip


@pytest.mark.parametrize("config", ["{", "[1]", "null", "3"])
def test_metadata_of_ours_is_checked_like_a_checkpoint(config, checkpoint, tmp_path, capsys):
    from safetensors.torch import save_file

    path = export(checkpoint, tmp_path / "w.safetensors")
    save_file(load_file(path), path, {"weights": "model_ema", "config": config})
    argv = ["--checkpoint", str(path), "--output_dir", str(tmp_path / "out")]
    line = refused(sample.main, argv, capsys)
    assert str(path) in line and "config" in line and len(line) < 400
