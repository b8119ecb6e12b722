"""Relative paths in a checkpoint's config are looked for as they are, in the checkpoint's folder, and beside it."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from models.loading import load_mar
from models.mar import MAR, MARConfig
from tests.helpers import named_weights, untrained
from tests.helpers_tokenizers import ldm_tensors
from tests.test_cli import refused
from util.checkpoint import find_stored, load_checkpoint, save_checkpoint
from util.evaluation.fid_stats import FIDStats, save_fid_stats

QUICK = "--num_images 4 --num_iter 2 --num_sampling_steps 2".split()


def pictures(folder):
    for i, name in enumerate("abab"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 255, (8, 8)).astype(np.uint8)
        Image.fromarray(pixels).convert("RGB").save(folder / name / f"{i}.png")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The folder of a run on colour pictures in `data/pictures`; the program is started elsewhere."""
    folder = tmp_path / "project" / "run"
    content = load_checkpoint(untrained(folder))
    content["config"]["data"] |= {"name": "imagefolder", "path": "./data/pictures"}
    content["config"]["eval"] |= {"features": "digits", "metrics": "fid"}
    save_checkpoint(folder, content)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return folder


def sampling(place, tmp_path, *flags):
    return ["--checkpoint", str(place), "--output_dir", str(tmp_path / "out"), *QUICK, *flags]


@pytest.mark.parametrize("where", ["elsewhere", "project/run", "project"])
@pytest.mark.parametrize("by_file", [True, False])
def test_the_data_are_found(where, by_file, run, tmp_path, capsys):
    pictures(tmp_path / where / "data" / "pictures")
    place = run / "checkpoint-last.pth" if by_file else run
    assert sample.main(sampling(place, tmp_path)) == 0
    assert "against 4 images of" in capsys.readouterr().out


def test_data_that_are_nowhere_name_both_places(run, tmp_path, capsys):
    line = refused(sample.main, sampling(run, tmp_path), capsys)
    for place in ("data/pictures", run / "data" / "pictures", run.parent / "data" / "pictures"):
        assert str(place) in line
    assert len(line) < 500 and not (tmp_path / "out").exists()


def test_what_is_not_needed_is_not_looked_for(run, tmp_path):
    assert sample.main(sampling(run, tmp_path, "--metrics", "none")) == 0


def test_a_path_given_by_hand_is_taken_as_it_is(run, tmp_path, capsys):
    pictures(run / "mine")
    line = refused(sample.main, sampling(run, tmp_path, "--data_path", "mine"), capsys)
    assert "mine" in line and str(run) not in line


def test_statistics_are_found_too(run, tmp_path, capsys):
    content = load_checkpoint(run)
    content["config"]["eval"]["fid_stats"] = "stats.npz"
    save_checkpoint(run, content)
    line = refused(sample.main, sampling(run, tmp_path), capsys)
    assert "stats.npz" in line and str(run / "stats.npz") in line
    save_fid_stats(run.parent / "stats.npz", FIDStats(np.zeros(64), np.eye(64)))
    assert sample.main(sampling(run, tmp_path)) == 0


@pytest.fixture
def on_kl16(tmp_path, monkeypatch, small):
    """A run on the latents of an autoencoder at `vae/kl16.ckpt`."""
    folder = tmp_path / "project" / "run"
    sizes = dict(img_size=32, vae_stride=16, vae_embed_dim=16, class_num=10)
    content = load_checkpoint(untrained(folder))
    config = MARConfig(**content["config"]["mar"] | sizes)
    weights = named_weights(MAR(config)).state_dict()
    content |= {"model": weights, "model_ema": weights}
    content["config"] |= {"tokenizer": "kl16", "vae_path": "vae/kl16.ckpt", "latents": None}
    content["config"]["mar"] |= sizes
    save_checkpoint(folder, content)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return folder


@pytest.mark.parametrize("where", ["elsewhere", "project/run", "project"])
def test_the_autoencoder_is_found(where, on_kl16, tmp_path):
    file = tmp_path / where / "vae" / "kl16.ckpt"
    file.parent.mkdir()
    torch.save({"model": ldm_tensors("kl16", False)}, file)
    content = load_checkpoint(on_kl16)
    for options in (dict(checkpoint=on_kl16), dict(checkpoint=content, place=on_kl16)):
        _, tokenizer, config = load_mar(**options)
        assert tokenizer.kind == "kl16"
        assert config["vae_path"] == ("vae/kl16.ckpt" if where == "elsewhere" else str(file))
    shutil.copytree(file.parent, on_kl16 / "other")
    load_mar(on_kl16, vae_path=str(on_kl16 / "other" / "kl16.ckpt"))


def test_an_autoencoder_that_is_nowhere_names_both_places(on_kl16, tmp_path, capsys):
    line = refused(sample.main, sampling(on_kl16, tmp_path), capsys)
    for place in ("vae/kl16.ckpt", on_kl16 / "vae" / "kl16.ckpt", on_kl16.parent / "vae" / "kl16.ckpt"):
        assert str(place) in line
    with pytest.raises(ValueError, match="--vae_path"):
        load_mar(load_checkpoint(on_kl16))


def test_the_folder_of_a_diffusers_autoencoder_is_found(on_kl16, tmp_path, capsys):
    content = load_checkpoint(on_kl16)
    content["config"] |= {"tokenizer": "diffusers:out/deep/vae", "vae_path": None}
    save_checkpoint(on_kl16, content)
    line = refused(sample.main, sampling(on_kl16, tmp_path), capsys)
    assert "no folder out/deep/vae" in line and str(on_kl16 / "out" / "deep" / "vae") in line
    (on_kl16.parent / "out" / "deep" / "vae").mkdir(parents=True)
    line = refused(sample.main, sampling(on_kl16, tmp_path), capsys)
    assert "config.json" in line and str(on_kl16.parent / "out" / "deep" / "vae") in line


def test_absolute_paths_and_contents_without_a_place_stay(tmp_path):
    for path, place in ((str(tmp_path / "x"), tmp_path), ("~/x", tmp_path), ("x", None)):
        assert find_stored(path, place) == (path, "")
