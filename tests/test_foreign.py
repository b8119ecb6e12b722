"""Checkpoints of others: what a file is; wrappers, bare weights, half precision; export; other classes and places."""

import argparse
import json
import pathlib
from pathlib import Path

import numpy as np
import pytest
import torch

import main_mar
import sample
from engine_mar import generate
from heads.policy import build_rules, load_heads
from models.loading import load_mar
from scripts import export_weights
from tests.helpers import SMALLEST, image_folder, tiny_mar, untrained
from util.checkpoint import load_checkpoint, save_checkpoint
from util.door import run_main

LABELS = torch.tensor([0, 1, 2, -1])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return untrained(tmp_path_factory.mktemp("checkpoint"), "--learn", "tau,cfg")


def refused(main, argv, capsys) -> str:
    """The one line of a command that ends with code 2."""
    capsys.readouterr()
    assert run_main(main, [*map(str, argv)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("no checkpoint")]
    assert len(lines) == 1 and "weights_only" not in lines[0] and "Traceback" not in lines[0]
    return lines[0]


FILES = {
    "a web page": (b"<!DOCTYPE html><html><body>404</body></html>", "is a web page"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n", "git lfs pull"),
    "nothing": (b"", "is empty"),
    "JSON": (b'{"error": "not found"}', "is a JSON text"),
    "a text": (b"Access denied. Please log in first.", "is a text"),
}


@pytest.mark.parametrize("content, words", FILES.values(), ids=FILES)
def test_a_file_of_something_else_is_named(content, words, tmp_path, capsys):
    (file := tmp_path / "x.pth").write_bytes(content)
    out = ["--output_dir", tmp_path / "out"]
    assert words in refused(sample.main, ["--checkpoint", file, *out], capsys)
    for flag in ("--resume", "--init_from"):
        assert words in refused(main_mar.main, [*SMALLEST.split(), flag, file, *out], capsys)
    with pytest.raises(ValueError, match=words):
        load_mar(file)


@pytest.mark.parametrize(
    "value", [np.float64(3.0), pathlib.PurePosixPath("x"), np.arange(3)], ids=lambda v: type(v).__name__
)
def test_objects_in_a_file_are_named_without_advice_to_load_them(value, checkpoint, tmp_path, capsys):
    content = torch.load(checkpoint / "checkpoint-last.pth", weights_only=True)
    torch.save({**content, "best": value}, tmp_path / "x.pth")
    line = refused(sample.main, ["--checkpoint", tmp_path / "x.pth", "--output_dir", tmp_path / "out"], capsys)
    assert "holds Python objects (" in line and "weights_only" not in line


@pytest.mark.parametrize("config", [None, "mar_base", [1, 2], argparse.Namespace(mar=1)], ids=repr)
def test_a_config_of_another_kind_says_nothing(config, checkpoint, tmp_path, capsys):
    """Then the file is like a published one, which --model describes."""
    content = load_checkpoint(checkpoint) | {"config": config}
    save_checkpoint(tmp_path / "x", content)
    assert "--model" in refused(sample.main, ["--checkpoint", tmp_path / "x", "--output_dir", tmp_path / "o"], capsys)
    assert load_heads(tmp_path / "x") is None
    words = [*SMALLEST.split(), "--init_from", tmp_path / "x", "--output_dir", tmp_path / "run", "--epochs", "1"]
    assert main_mar.main([*map(str, [*words, "--num_images", "20", "--metrics", "none"])]) == 0


def same_weights(file, expected, **options):
    mar, _, _ = load_mar(file, **options)
    assert all(torch.equal(value, expected[name]) for name, value in mar.state_dict().items())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_taken_off(prefix, checkpoint, tmp_path):
    content = load_checkpoint(checkpoint)
    expected = content["model_ema"]
    for part in ("model", "model_ema"):
        content[part] = {prefix + name: value for name, value in content[part].items()}
    save_checkpoint(tmp_path / "whole", content)
    same_weights(tmp_path / "whole", expected)
    inner = {name.replace("diffloss.", "diffloss._orig_mod."): value for name, value in expected.items()}
    save_checkpoint(tmp_path / "inner", content | {"model_ema": inner})
    same_weights(tmp_path / "inner", expected)


def test_bare_and_averaged_weights_and_halves(checkpoint, tmp_path):
    content = load_checkpoint(checkpoint)
    expected, config = content["model_ema"], content["config"]
    for name, other in {
        "averages": {"model_ema": expected, "config": config},
        "ema": {"ema": expected, "config": config},
        "state dict": {"state_dict": expected, "model_ema": expected, "config": config},
    }.items():
        torch.save(other, tmp_path / f"{name}.pth")
        same_weights(tmp_path / f"{name}.pth", expected)
    torch.save(expected, tmp_path / "bare.pth")  # says nothing of its sizes, as published files do not
    assert load_checkpoint(tmp_path / "bare.pth")["model"].keys() == expected.keys()
    for dtype in (torch.float16, torch.bfloat16):
        half = {name: value.to(dtype) for name, value in expected.items()}
        torch.save({"model_ema": half, "config": config}, tmp_path / "half.pth")
        same_weights(tmp_path / "half.pth", {name: value.float() for name, value in half.items()})


def test_an_exported_file_samples_and_starts_as_the_checkpoint(checkpoint, tmp_path, capsys):
    file = tmp_path / "weights.safetensors"
    argv = ["--checkpoint", str(checkpoint), "--output", str(file)]
    assert export_weights.main([*argv, "--dry_run"]) == 0 and not file.exists()
    assert export_weights.main(argv) == 0
    content = load_checkpoint(checkpoint)
    same_weights(file, content["model_ema"])
    heads = load_heads(file)
    assert all(torch.equal(value, content["heads_ema"][name]) for name, value in heads.state_dict().items())
    flags = (
        "--infer_mode guidance --num_images 4 --num_iter 2 --num_sampling_steps 2 --metrics none --device cpu".split()
    )
    pictures = []
    for name, place in (("a", checkpoint), ("b", file)):
        assert sample.main(["--checkpoint", str(place), "--output_dir", str(tmp_path / name), *flags]) == 0
        (npz,) = (tmp_path / name).glob("*/samples.npz")
        with np.load(npz) as stored:
            pictures.append(stored[stored.files[0]])
    assert np.array_equal(*pictures)
    words = [*SMALLEST.split(), "--init_from", file, "--output_dir", tmp_path / "run", "--epochs", "1", "--lr", "0"]
    assert main_mar.main([*map(str, [*words, "--num_images", "20", "--metrics", "none"])]) == 0
    model = load_checkpoint(tmp_path / "run")["model"]
    assert all(torch.equal(value, content["model_ema"][name]) for name, value in model.items())

    before = file.read_bytes()
    assert "--force" in refused(export_weights.main, argv, capsys) and file.read_bytes() == before
    assert export_weights.main([*argv, "--force"]) == 0
    wrong = [*argv[:2], "--output", tmp_path / "x.pth"]
    assert ".safetensors" in refused(export_weights.main, wrong, capsys)


def test_a_file_without_config_is_not_exported(checkpoint, tmp_path, capsys):
    content = {k: v for k, v in load_checkpoint(checkpoint).items() if k != "config"}
    save_checkpoint(tmp_path / "published", content)
    argv = ["--checkpoint", tmp_path / "published", "--output", tmp_path / "x.safetensors"]
    assert "no config" in refused(export_weights.main, argv, capsys) and not (tmp_path / "x.safetensors").exists()


# ------------------------------------------------------------------------------------------------- classes and places

OWN = "--data imagefolder --tokenizer pixel --img_size 8 --batch_size 2 --num_workers 0 --num_sampling_steps 2".split()


def train(folder, data, *flags):
    words = [*SMALLEST.split(), *OWN, "--vae_embed_dim", "3", "--data_path", data, "--output_dir", folder]
    words += ["--epochs", "1", "--num_images", "4", "--metrics", "none", "--lr", "0", *flags]
    return run_main(main_mar.main, [*map(str, words)])


def test_another_number_of_classes_starts_their_embeddings_anew(tmp_path, capsys):
    two, three = (image_folder(tmp_path / name, {"train": 4}) for name in ("two", "three"))
    (three / "train" / "blue").mkdir()
    for file in (three / "train" / "dark").iterdir():
        (three / "train" / "blue" / file.name).write_bytes(file.read_bytes())
    assert train(tmp_path / "base", two) == 0
    base = load_checkpoint(tmp_path / "base")["model"]
    capsys.readouterr()
    assert train(tmp_path / "anew", three, "--init_from", tmp_path / "base") == 0
    assert "of 3 class embeddings 0 are kept by name, 3 start anew" in capsys.readouterr().out
    assert train(tmp_path / "kept", three, "--init_from", tmp_path / "base", "--keep_classes") == 0
    assert "of 3 class embeddings 2 are kept by name, 1 start anew" in capsys.readouterr().out
    kept = load_checkpoint(tmp_path / "kept")
    for part in ("model", "model_ema"):
        rows = kept[part]["class_emb.weight"]  # blue, dark, light
        assert torch.equal(rows[1:], base["class_emb.weight"]) and not torch.equal(rows[0], rows[1])
    anew = load_checkpoint(tmp_path / "anew")["model"]
    for name, value in anew.items():
        assert len(value) == 3 if name == "class_emb.weight" else torch.equal(value, base[name])
    assert train(tmp_path / "base", three, "--resume", tmp_path / "base", "--epochs", "2") == 2  # that run has two


def test_relative_places_are_looked_for_beside_the_run_too(tmp_path, monkeypatch, capsys):
    data = image_folder(tmp_path / "run" / "pictures", {"train": 4})
    assert train(tmp_path / "run" / "out", data) == 0
    content = load_checkpoint(tmp_path / "run" / "out")
    content["config"]["data"]["path"] = "pictures"
    save_checkpoint(tmp_path / "run" / "moved.pth", content)
    flags = "--num_images 4 --num_iter 2 --features digits --metrics fid --device cpu".split()
    monkeypatch.chdir(tmp_path)
    argv = ["--checkpoint", "run/moved.pth", "--output_dir", "samples", *flags]
    capsys.readouterr()
    run_main(sample.main, argv)  # they are not grey, as digits' features want them, but they are there
    assert "names pictures" not in capsys.readouterr().err
    content["config"]["data"]["path"] = "gone"
    save_checkpoint(tmp_path / "run" / "gone.pth", content)
    line = refused(sample.main, ["--checkpoint", "run/gone.pth", "--output_dir", "samples", *flags], capsys)
    assert "names gone" in line and "run/gone" in line and "--data_path" in line
    content["config"] |= {"vae_path": "kl.ckpt", "tokenizer": "kl16"}
    save_checkpoint(tmp_path / "run" / "kl.pth", content)
    line = refused(sample.main, ["--checkpoint", "run/kl.pth", "--output_dir", "samples", *flags], capsys)
    assert "names kl.ckpt" in line and "run/kl.ckpt" in line and "--vae_path" in line


# ------------------------------------------------------------------------------------------------- generate()


def pictures(model, labels, **options):
    rules = build_rules("baseline", cfg=2.0)
    usual = dict(num_iter=3, num_steps=4, seeds=[1, 2, 3, 4], clip=(-1.0, 1.0))
    return generate(model, labels, rules, **usual | options)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_labels_of_any_whole_number_type(dtype):
    mar = tiny_mar()
    expected = pictures(mar, LABELS)
    assert torch.equal(pictures(mar, LABELS.to(dtype)), expected)
    assert torch.equal(pictures(mar, LABELS.tolist()), expected)
    assert torch.equal(pictures(mar, LABELS[:3].to(torch.uint8), seeds=[1, 2, 3]), expected[:3])


@pytest.mark.parametrize(
    "labels", [LABELS.float(), LABELS > 0, 1, torch.tensor(1), [0.5, 1.5], [[0, 1]], [], [3, 0, 0, 0]]
)
def test_other_labels_are_refused(labels):
    with pytest.raises(ValueError, match="labels must be"):
        pictures(tiny_mar(), labels)


@pytest.mark.parametrize("refresh_every", [1, 2])
@pytest.mark.parametrize("name, tolerance", [("double", 1e-4), ("bfloat16", 0.2), ("half", 0.05)])
def test_a_model_of_another_dtype_samples_in_it(name, tolerance, refresh_every):
    expected = pictures(tiny_mar(), LABELS, refresh_every=refresh_every)
    made = pictures(getattr(tiny_mar(), name)(), LABELS, refresh_every=refresh_every)
    assert made.dtype == torch.float32 and (made - expected).abs().mean() < tolerance
    if name != "double":
        assert not torch.equal(made, expected)


def test_config_is_json(checkpoint):
    json.dumps(load_checkpoint(checkpoint)["config"])
    assert Path(checkpoint).is_dir()
