"""Checkpoints of other programs: those that work, and one line that says what a file is where it is none."""

import argparse
import pathlib
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import main_mar
import sample
from heads.policy import load_heads
from models.loading import load_mar
from models.mar import MAR_CONFIGS
from models.tokenizers import build_tokenizer
from scripts import export_weights, train_tokenizer
from tests.helpers import untrained
from tests.test_cli import TINY, files, refused
from util.checkpoint import FILE_NAME, load_checkpoint, read_file
from util.foreign import unwrapped

ADVICE = ("weights_only", "Weights only", "add_safe_globals", "arbitrary code", "trust", "Traceback", "pickle")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return untrained(tmp_path_factory.mktemp("checkpoint"), "--learn", "order,tau")


@pytest.fixture(scope="module")
def content(checkpoint):
    """Of the checkpoint, its averages other than its weights."""
    content = load_checkpoint(checkpoint)
    content["model_ema"] = {name: value + 0.01 for name, value in content["model"].items()}
    return content


def readers(place, out) -> dict:
    """name -> (program, arguments) of everything that reads a checkpoint."""
    sampling = ["--checkpoint", str(place), "--output_dir", str(out)]
    training = [word.format(out=out) for word in TINY]
    return {
        "sample": (sample.main, sampling),
        "sample raw": (sample.main, [*sampling, "--no_ema"]),
        "resume": (main_mar.main, [*training, "--resume", str(place)]),
        "init_from": (main_mar.main, [*training, "--init_from", str(place)]),
        "evaluate": (main_mar.main, [*training, "--evaluate", "--resume", str(place)]),
        "export": (export_weights.main, ["--checkpoint", str(place), "--output", f"{out}.safetensors"]),
    }


READERS = list(readers("", ""))


# ------------------------------------------------------------------------------------------------ what a file is


def written(data: bytes):
    return lambda path, content: path.write_bytes(data)


def saved(change):
    return lambda path, content: torch.save(change(content), path)


def numpy_archive(path, content):
    with open(path, "wb") as file:
        np.savez(file, a=np.zeros(3))


def torchscript(path, content):
    torch.jit.script(nn.Linear(2, 2)).save(str(path))


def cut_safetensors(path, content):
    save_file({"a": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:-10])


# what stands where the checkpoint should be -> what the line must say
NO_CHECKPOINTS = {
    "empty": (written(b""), ["empty", "download"]),
    "html": (written(b"<!DOCTYPE html>\n<html><body>404</body></html>"), ["web page", "download"]),
    "html with a mark": (written(b"\xef\xbb\xbf \n<HTML>"), ["web page"]),
    "pointer": (written(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), ["git-lfs", "git lfs pull"]),
    "json": (written(b'{"message": "Not Found"}'), ["text", "Not Found"]),
    "long text": (written("Zugriff verweigert: ö. ".encode() * 400), ["text", "Zugriff"]),
    "npy": (written(b"\x93NUMPY\x01\x00"), ["numpy"]),
    "gzip": (written(b"\x1f\x8b\x08\x00" + bytes(50)), ["gzip", "unpack"]),
    "png": (written(b"\x89PNG\r\n\x1a\n" + bytes(50)), ["picture"]),
    "npz": (numpy_archive, ["zip archive", "torch.save"]),
    "noise": (written(bytes(range(200, 256)) * 9), ["no file of weights", "torch.save"]),
    "torchscript": (torchscript, ["TorchScript"]),
    "cut safetensors": (cut_safetensors, ["safetensors"]),
    "numpy number": (saved(lambda c: {**c, "loss": np.float64(3)}), ["numpy", "tensors, numbers, texts"]),
    "numpy array": (saved(lambda c: {**c, "losses": np.zeros(3)}), ["numpy"]),
    "path": (saved(lambda c: {**c, "args": argparse.Namespace(data=pathlib.PurePosixPath("x"))}), ["paths"]),
    "module": (saved(lambda c: {"model": nn.Linear(2, 2)}), ["module", "state_dict()"]),
    "config None": (saved(lambda c: {**c, "config": None}), ["'config'", "None", "a dict of sizes"]),
    "config text": (saved(lambda c: {**c, "config": "mar_tiny"}), ["'config'", "a str"]),
    "config list": (saved(lambda c: {**c, "config": [1]}), ["'config'", "a list"]),
    "config Namespace": (saved(lambda c: {**c, "config": argparse.Namespace(a=1)}), ["'config'", "a Namespace"]),
    "config of others": (saved(lambda c: {**c, "config": {"hidden_size": 3}}), ["not of this project", "'mar'"]),
    "config without sizes": (saved(lambda c: {**c, "config": {}}), ["not of this project", "'mar'"]),
    "family": (saved(lambda c: {**c, "config": {**c["config"], "family": ["mar"]}}), ["family", "valid: mar"]),
    "sizes": (saved(lambda c: {**c, "config": {**c["config"], "mar": [1]}}), ["'mar'"]),
    "heads": (saved(lambda c: {**c, "config": {**c["config"], "heads": ["order"]}}), ["heads", "a list"]),
    "tensor": (saved(lambda c: torch.zeros(3)), ["a Tensor", "no 'model' with tensors"]),
    "list": (saved(lambda c: [c["model"]]), ["a list", "no 'model' with tensors"]),
    "optimizer": (saved(lambda c: {"optimizer": {}, "step": 3}), ["'optimizer', 'step'", "no 'model' with tensors"]),
    "numbers": (saved(lambda c: {"model": {"a": 1}}), ["'model'", "no 'model' with tensors"]),
    "nameless": (saved(lambda c: {0: torch.zeros(3)}), ["no 'model' with tensors"]),
    "average": (saved(lambda c: {**c, "model_ema": [1]}), ["'model_ema'", "a list"]),
    "sparse": (saved(lambda c: {"model": {"a": torch.eye(3).to_sparse()}}), ["no 'model' with tensors"]),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:Detected pickle protocol", "ignore:Validating sparse")
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("what", NO_CHECKPOINTS)
def test_what_is_no_checkpoint_is_one_line_that_says_what_it_is(what, reader, content, tmp_path, capsys):
    write, shown = NO_CHECKPOINTS[what]
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / FILE_NAME
    write(path, content)
    before = files(tmp_path)
    line = refused(*readers(path.parent, tmp_path / "out")[reader], capsys)
    assert all(words in line for words in shown), line
    assert not [words for words in ADVICE if words in line], line
    assert len(line) < 400 and (what == "family" or str(path.parent) in line)
    assert files(tmp_path) == before


@pytest.mark.parametrize("config", [None, "mar", [1], argparse.Namespace(family="mar"), {}, {"family": 3}])
def test_a_content_is_checked_like_a_file(config, content):
    for load in (load_mar, load_heads):
        if not isinstance(config, dict) or load is load_mar:
            with pytest.raises(ValueError):
                load({**content, "config": config})


@pytest.mark.parametrize("key, value", [("optimizer", 3), ("epoch", "4"), ("step", None), ("rng", []), ("scaler", 1)])
def test_what_a_run_continues_with_is_checked(key, value, checkpoint, content, tmp_path, capsys):
    torch.save({**load_checkpoint(checkpoint), key: value}, tmp_path / FILE_NAME)
    program, argv = readers(tmp_path, tmp_path / "out")["resume"]
    line = refused(program, [*argv, "--learn", "order,tau"], capsys)
    assert repr(key) in line and str(tmp_path) in line and "--init_from" in line


@pytest.mark.parametrize("optimizer", [{}, {"state": {}, "param_groups": []}, {"state": 1, "param_groups": [{}]}])
def test_an_optimizer_of_another_program_is_one_line(optimizer, checkpoint, tmp_path, capsys):
    torch.save({**load_checkpoint(checkpoint), "optimizer": optimizer}, tmp_path / FILE_NAME)
    program, argv = readers(tmp_path, tmp_path / "out")["resume"]
    assert "optimizer" in refused(program, [*argv, "--learn", "order,tau"], capsys)


@pytest.mark.parametrize("what", ["empty", "html", "pointer", "numpy number", "path", "noise"])
def test_an_autoencoder_is_read_with_the_same_words(what, content, tmp_path):
    write, shown = NO_CHECKPOINTS[what]
    write(tmp_path / "kl16.ckpt", content)
    with pytest.raises(ValueError) as error:
        build_tokenizer("kl16", vae_path=tmp_path / "kl16.ckpt")
    line = str(error.value)
    assert all(words in line for words in [*shown, str(tmp_path)]) and not [word for word in ADVICE if word in line]


def test_a_folder_is_no_damaged_file(tmp_path):
    with pytest.raises(ValueError, match="Is a directory"):
        read_file(tmp_path)


# -------------------------------------------------------------------------------------------------- what is taken


def prefixed(prefix):
    return lambda weights: {prefix + name: value for name, value in weights.items()}


# how another program may have named and stored the weights
NAMES = {
    "plain": dict,
    "DataParallel": prefixed("module."),
    "compiled": prefixed("_orig_mod."),
    "compiled and parallel": prefixed("module._orig_mod."),
    "parallel and compiled": prefixed("_orig_mod.module."),
    "twice": prefixed("module.module._orig_mod."),
    "blocks compiled": lambda w: {n.replace("encoder_blocks.0", "encoder_blocks.0._orig_mod"): v for n, v in w.items()},
    "FSDP": prefixed("_fsdp_wrapped_module."),
    "AveragedModel": lambda w: {"n_averaged": torch.tensor(3), **prefixed("module.")(w)},
    "half": lambda w: {name: value.half() for name, value in w.items()},
    "bfloat16": lambda w: OrderedDict((name, value.bfloat16()) for name, value in w.items()),
    "double": lambda w: {name: value.double() for name, value in w.items()},
    "parameters": lambda w: {name: nn.Parameter(value) for name, value in w.items()},
}


def assert_loaded(weights, expected, tolerance=1e-2):
    assert weights.keys() == expected.keys()
    for name, value in weights.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.cpu(), expected[name], rtol=tolerance, atol=1e-3)


@pytest.mark.parametrize("change", NAMES.values(), ids=NAMES)
def test_names_and_types_of_other_programs_load(change, content, tmp_path):
    """With our config, since only that says that the buffer is smaller than MAR's."""
    stored = {key: change(content[key]) for key in ("model", "model_ema", "heads", "heads_ema")}
    torch.save({**content, **stored}, tmp_path / FILE_NAME)
    for ema, key in ((True, "model_ema"), (False, "model")):
        model, _, _ = load_mar(tmp_path, ema=ema)
        assert_loaded(model.state_dict(), content[key])
        assert_loaded(load_heads(tmp_path, ema=ema).state_dict(), content[key.replace("model", "heads")])


def test_a_module_that_is_called_module_stays():
    names = ["module.a.weight", "b.module.weight"]
    assert list(unwrapped(dict.fromkeys(names, torch.zeros(1)), "x")) == names
    inner = dict.fromkeys(["module.a.module.weight", "module.b"], torch.zeros(1))
    assert list(unwrapped(inner, "x")) == ["a.module.weight", "b"]
    with pytest.raises(ValueError, match="several models"):
        unwrapped(dict.fromkeys(["a", "_orig_mod.a"], torch.zeros(1)), "x")


@pytest.fixture
def small_buffer(monkeypatch):
    """mar_tiny is as the checkpoint has it, so that a file without config can name it."""
    sizes = dict(buffer_size=2, diffloss_d=1, diffloss_w=16, img_size=8, vae_stride=1, vae_embed_dim=1)
    monkeypatch.setitem(MAR_CONFIGS, "mar_tiny", replace(MAR_CONFIGS["mar_tiny"], **sizes))
    monkeypatch.setattr("models.loading.tokenizer_of", lambda *a: build_tokenizer("pixel", channels=1))


# what a file without our config may hold -> (is there an average?, are there raw weights?)
FORMS = {
    "bare": (lambda c: c["model"], True, True),
    "bare with prefixes": (lambda c: prefixed("module._orig_mod.")(c["model"]), True, True),
    "state_dict": (lambda c: {"state_dict": c["model"], "epoch": 3}, False, True),
    "model": (lambda c: {"model": c["model"], "lr": 0.1, "ema": 0.9999}, False, True),
    "model_ema": (lambda c: {"model_ema": c["model"]}, True, False),
    "ema": (lambda c: {"ema": c["model"], "steps": 5}, True, False),
    "model None": (lambda c: {"model": None, "model_ema": c["model"]}, True, False),
    "both": (lambda c: {"model": c["model"], "ema": c["model"]}, True, True),
    "VAR's trainer": (lambda c: {"epoch": 3, "trainer": {"config": {"lr": 1}, "var_wo_ddp": c["model"]}}, True, True),
}


@pytest.mark.parametrize(
    "form, file_format",
    [*((form, "pth") for form in FORMS), ("bare", "safetensors"), ("bare with prefixes", "safetensors")],
)
def test_weights_without_a_config_load_with_the_models_name(form, file_format, content, small_buffer, tmp_path):
    make, averaged, raw = FORMS[form]
    stored, path = make(content), tmp_path / f"w.{file_format}"
    (save_file if file_format == "safetensors" else torch.save)(stored, path)
    for ema, works in ((True, averaged), (False, raw)):
        if works:
            model, _, _ = load_mar(path, ema=ema, model="mar_tiny")
            assert_loaded(model.state_dict(), content["model"], 0)
        else:
            with pytest.raises(ValueError, match="no averaged weights; --no_ema" if ema else "leave out --no_ema"):
                load_mar(path, ema=ema, model="mar_tiny")
    with pytest.raises(ValueError, match="give --model"):
        load_mar(path, ema=averaged)


@pytest.mark.parametrize("form", FORMS)
def test_a_new_run_starts_from_any_form(form, content, tmp_path, monkeypatch):
    torch.save(FORMS[form][0](content), tmp_path / "w.pth")
    program, argv = readers(tmp_path / "w.pth", tmp_path / "out")["init_from"]
    seen = []
    monkeypatch.setattr("main_mar.train", lambda state, *a: seen.append(state) or 0)
    assert program(argv) == 0
    (state,) = seen
    assert_loaded(state.model.state_dict(), content["model"], 0)
    assert_loaded(state.ema.weights, content["model"], 0)


def test_integers_are_no_weights(content, tmp_path, capsys):
    """Of a quantised model, say: the values of float parameters would be nonsense."""
    name = "decoder_embed.weight"
    weights = {**content["model"], name: content["model"][name].to(torch.int8)}
    torch.save({**content, "model": weights, "model_ema": weights}, tmp_path / FILE_NAME)
    line = refused(*readers(tmp_path, tmp_path / "out")["sample"], capsys)
    assert f"{name} is int8" in line and "float32" in line


def test_a_foreign_config_without_some_sizes_takes_the_defaults(content, tmp_path, capsys):
    sizes = {k: v for k, v in content["config"]["mar"].items() if k not in ("class_num", "diffloss_d")}
    torch.save({**content, "config": {**content["config"], "mar": sizes}}, tmp_path / FILE_NAME)
    for reader in ("sample", "resume", "evaluate"):
        program, argv = readers(tmp_path, tmp_path / "out")[reader]
        refused(program, argv, capsys)
    with pytest.raises(ValueError, match="--diffloss_d 1 does not fit .*, which has 3"):
        load_mar(tmp_path, diffloss_d=1)
    with pytest.raises(ValueError, match="unknown model 'mar_nano'"):
        load_mar(tmp_path, model="mar_nano")


@pytest.mark.parametrize("key, value", [("autoencoder", {"a": 1}), ("settings", [1]), ("step", "3"), ("optimizer", {})])
def test_the_checkpoint_of_a_tokenizers_training_is_checked(key, value, tmp_path, capsys):
    parts = dict(autoencoder={"a": torch.zeros(1)}, optimizer={}, step=3, minutes=0.1, settings={})
    torch.save({**parts, key: value}, tmp_path / FILE_NAME)
    flags = f"--data digits --stride 2 --latent_channels 2 --width 4 --resume --output_dir {tmp_path}"
    assert str(tmp_path) in refused(train_tokenizer.main, flags.split(), capsys)
