"""Checkpoints: round trips, interrupted saves, published and damaged files, weights that do not fit, the hash."""

import argparse
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers import Malicious, tiny_mar
from tests.helpers_training import CHANNELS, batch, draws, terms_of
from training.objectives.token import TokenObjective
from training.optim import EMA, make_optimizer
from util.checkpoint import FILE_NAME, load_checkpoint, load_weights, save_checkpoint, weights_hash


@pytest.fixture
def mar():
    return tiny_mar(img_size=4, vae_embed_dim=CHANNELS)  # L = 16


def content(mar):
    """A checkpoint as a run writes it, with optimizer moments and random state."""
    optimizer = make_optimizer(mar, mar.token_head, 1e-3, 0.02)
    tokens, labels = batch()
    d = draws([0, 1, 2])
    terms_of(TokenObjective(mar), tokens, labels, d, len(d.tokens.rows))["loss"].backward()
    optimizer.step()
    ema = EMA(mar, 0.9).weights
    state = {"model": mar.state_dict(), "model_ema": ema, "optimizer": optimizer.state_dict(), "epoch": 3, "scaler": {}}
    return {
        **state,
        "args": {"lr": 1e-3, "resume": "", "lists": [1, None, True]},
        "rng": torch.get_rng_state(),
        "step": 7,
    }


def equal(a, b):
    """Bitwise, through containers."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def refused(place):
    """The one line that load_checkpoint says about a bad file."""
    with pytest.raises(ValueError) as error:
        load_checkpoint(place)
    message = str(error.value)
    assert str(place) in message and "\n" not in message and len(message) < 400
    return message


def test_checkpoint_round_trip(mar, tmp_path):
    saved = content(mar)
    folder = tmp_path / "new" / "run"
    path = save_checkpoint(folder, saved)
    assert path == folder / FILE_NAME and [p.name for p in folder.iterdir()] == [FILE_NAME]
    for place in (folder, str(folder), path, str(path)):
        assert equal(load_checkpoint(place), saved)
    save_checkpoint(folder, {**saved, "epoch": 4})
    assert load_checkpoint(folder)["epoch"] == 4 and len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("exists", [True, False])
def test_interrupted_save_leaves_the_old_file_whole(tmp_path, monkeypatch, error, exists):
    if exists:
        save_checkpoint(tmp_path, {"model": {"a": torch.arange(3.0)}})
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def failing(content, file):
        file.write(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(type(error)):
        save_checkpoint(tmp_path, {"model": {}})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before and len(before) == exists


def test_published_file_loads(mar, tmp_path):
    """MAR writes args as a Namespace, model_ema as an OrderedDict, and none of our own keys."""
    saved = content(mar)
    published = {k: saved[k] for k in ("model", "model_ema", "optimizer", "epoch", "scaler")}
    published["model_ema"] = OrderedDict(published["model_ema"])
    published["args"] = argparse.Namespace(lr=None, batch_size=64, output_dir="./out", cfg=2.9, pin_mem=True)
    torch.save(published, tmp_path / FILE_NAME)
    loaded = load_checkpoint(tmp_path)
    assert loaded["args"] == published["args"]
    assert equal({k: v for k, v in loaded.items() if k != "args"}, {k: v for k, v in published.items() if k != "args"})
    other = tiny_mar(img_size=4, vae_embed_dim=CHANNELS)
    load_weights(other, loaded["model"], tmp_path)
    assert weights_hash(other.state_dict()) == weights_hash(mar.state_dict())


@pytest.mark.parametrize("legacy", [False, True])
def test_truncated_file(mar, tmp_path, legacy):
    path = tmp_path / FILE_NAME
    torch.save(content(mar), path, _use_new_zipfile_serialization=not legacy)
    assert load_checkpoint(tmp_path)["step"] == 7
    whole = path.read_bytes()
    for size in [0, 1, 2, 20, 50, 100, 500, *(len(whole) * k // 16 for k in range(1, 16)), len(whole) - 1]:
        path.write_bytes(whole[:size])
        refused(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_garbage_file(tmp_path):
    path = tmp_path / FILE_NAME
    rng = np.random.default_rng(0)
    texts = [
        b"version https://git-lfs.github.com/spec/v1\n",
        b"<html>404</html>",
        b"PK\x03\x04" + bytes(50),
        bytes(500),
    ]
    pickles = [b"\x80\x02]q\x00.", b"\x80\x02(.", b"\x80\x02.", b"\x80\x02K", b"\x80\x02a.", b"\x80\x02}K\x00K\x00s."]
    for garbage in texts + pickles + [rng.bytes(rng.integers(1, 60)) for _ in range(200)]:
        path.write_bytes(garbage)
        refused(path)


@pytest.mark.parametrize("file_format", ["zip", "legacy", "pickle"])
def test_nothing_in_a_file_is_executed(tmp_path, file_format):
    victim, path = tmp_path / "victim", tmp_path / FILE_NAME
    bad = {"model": {}, "args": Malicious(victim)}
    if file_format == "pickle":
        path.write_bytes(pickle.dumps(bad, protocol=2))
        pickle.loads(path.read_bytes())
        victim.rmdir()  # it does what it should not, where it is allowed to
    else:
        torch.save(bad, path, _use_new_zipfile_serialization=file_format == "zip")
    refused(path)
    assert not victim.exists()


def test_missing_and_foreign_files(tmp_path):
    assert "no checkpoint" in refused(tmp_path)
    assert "no checkpoint" in refused(tmp_path / "nowhere" / "x.pth")
    tensor = torch.zeros(3)
    for foreign in ({"state_dict": {}}, [1, 2], tensor, {"model": {}}, {"model": [tensor]}, {"model": {"a": 1}}):
        torch.save(foreign, tmp_path / FILE_NAME)
        assert refused(tmp_path).endswith(" is not a checkpoint of this project: it has no 'model' with tensors")
    torch.save({"model": {"a": tensor}, "config": [1]}, tmp_path / FILE_NAME)
    assert "'config'" in refused(tmp_path)


def test_the_weights_may_be_of_any_family(tmp_path):
    """What must be in `model` is for models/loading.py to say."""
    save_checkpoint(tmp_path, {"model": {"anything": torch.zeros(3)}, "config": {"family": "other"}})
    assert set(load_checkpoint(tmp_path)["model"]) == {"anything"}


def test_load_weights_names_what_differs():
    def mismatch(weights, *words):
        model = nn.Linear(2, 3)
        before = weights_hash(model.state_dict())
        with pytest.raises(ValueError) as error:
            load_weights(model, weights, "some/place")
        message = str(error.value)
        assert "\n" not in message and all(word in message for word in ("some/place", *words)), message
        assert weights_hash(model.state_dict()) == before

    good = nn.Linear(2, 3).state_dict()
    mismatch({"weight": good["weight"]}, "bias")
    mismatch({**good, "extra.bias": good["bias"]}, "extra.bias")
    mismatch({**good, "weight": torch.zeros(3, 5)}, "weight", "(3, 5)", "(3, 2)")
    model = nn.Linear(2, 3)
    load_weights(model, dict(reversed(good.items())), "some/place")
    assert all(torch.equal(model.state_dict()[name], good[name]) for name in good)


def test_buffers_may_be_lacking_all_together_as_in_averaged_weights():
    model = nn.Linear(1, 1)
    for name in ("one", "two"):
        model.register_buffer(name, torch.ones(1))
    whole = model.state_dict()
    averaged = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    load_weights(model, averaged, "file")
    assert model.weight.item() == 0 and model.one.item() == 1
    with pytest.raises(ValueError, match="two"):
        load_weights(model, {name: value for name, value in whole.items() if name != "two"}, "file")
    with pytest.raises(ValueError, match="bias"):
        load_weights(model, {"weight": torch.zeros(1, 1)}, "file")


def test_weights_hash():
    weights = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(2)}
    base = weights_hash(weights)
    assert len(base) == 16 and int(base, 16) >= 0
    assert weights_hash(dict(reversed(weights.items()))) == base
    assert weights_hash({k: v.clone().requires_grad_() for k, v in weights.items()}) == base
    assert weights_hash({**weights, "a": weights["a"].t().contiguous().t()}) == base  # memory layout is not content
    changed = weights["a"].clone()
    changed[1, 2] = torch.nextafter(changed[1, 2], torch.tensor(9.0))
    others = [
        {**weights, "a": changed},
        {**weights, "a": weights["a"].reshape(3, 2)},
        {"a": weights["a"], "c": weights["b"]},
        {"a": weights["a"]},
        {"b": weights["a"], "a": weights["b"]},
    ]
    assert len({base, *map(weights_hash, others)}) == 6
