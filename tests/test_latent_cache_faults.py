"""Caches of latents that are interrupted, shared between processes, damaged, or of something else."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main_mar
from scripts import cache_latents
from tests.helpers import torchrun
from tests.helpers_latents import CACHE, FORMATS, NAMES, NUM, SMALL, TRAIN, TinyKL, cache, content, refused, write_image
from training import build
from util import dist
from util.door import run_main
from util.images import latent_files
from util.images.latents import open_latents


@pytest.mark.parametrize("format", FORMATS)
def test_an_interrupted_run_goes_on_and_ends_with_the_same_files(pictures, tmp_path, monkeypatch, capsys, format):
    whole = content(cache(pictures, tmp_path / "whole", "--format", format))
    folder, calls = tmp_path / "c", []

    def interrupted(save):
        def saving(file, *arrays, **named):
            calls.append(file)
            if len(calls) == 2:
                file.write(b"half")
                raise KeyboardInterrupt
            save(file, *arrays, **named)

        return saving

    argv = [*CACHE, "--data_path", str(pictures), "--cached_path", str(folder), "--format", format]
    with monkeypatch.context() as patch:
        for name in ("save", "savez"):
            patch.setattr(latent_files.np, name, interrupted(getattr(np, name)))
        assert run_main(cache_latents.main, argv) == 130
    assert not (folder / "index.json").exists()
    assert content(folder).items() < whole.items()  # what is there is whole
    assert "not complete" in refused(main_mar.main, capsys, *SMALL, "--use_cached", "--cached_path", folder)

    (folder / ".left behind.99999999.tmp").write_text("by a process that was killed")
    encoded, encode = [], cache_latents.encode
    monkeypatch.setattr(
        cache_latents, "encode", lambda t, images, *a: encoded.append(len(images)) or encode(t, images, *a)
    )
    assert cache_latents.main(argv) == 0 and content(folder) == whole
    assert sum(encoded) == (NUM - 6 if format == "packed" else NUM)  # npz: the first batch was not whole
    encoded.clear()
    assert cache_latents.main(argv) == 0 and content(folder) == whole and not encoded


@pytest.mark.parametrize("format", FORMATS)
def test_processes_share_the_work(pictures, tmp_path, monkeypatch, format):
    """Two processes one after the other; the exchange between them is left out."""
    whole = content(cache(pictures, tmp_path / "whole", "--format", format))
    argv = [*CACHE, "--data_path", str(pictures), "--cached_path", str(tmp_path / "c"), "--format", format]
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    written = []
    for rank in (1, 0):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        before = set(content(tmp_path / "c")) if written else set()
        assert cache_latents.main(argv) == 0
        written.append({name for name in set(content(tmp_path / "c")) - before if name.endswith((".npy", ".npz"))})
    assert content(tmp_path / "c") == whole and all(written)


@pytest.mark.slow
def test_torchrun_makes_the_same_cache(some, tmp_path):
    (some / "train" / NAMES[8]).write_text("no picture")  # read by the second process
    with pytest.warns(UserWarning, match="broken image skipped"):
        whole = cache(some, tmp_path / "whole")
    argv = [*CACHE, "--data_path", str(some), "--cached_path", str(tmp_path / "two")]
    torchrun(cache_latents.__file__, *argv)
    assert content(tmp_path / "two") == content(whole)


OTHER = {
    "image size": (["--img_size", "16"], "img_size 8 instead of 16"),
    "tokenizer": (["--tokenizer", "tiny:1"], "fingerprint"),
    "numbers": (["--cache_dtype", "float16"], "'float16'"),
    "format": (["--format", "npz"], "'npz'"),
    "file size": (["--shard_size", "7"], "shard_size 6 instead of 7"),
}


@pytest.mark.parametrize("flags, shown", OTHER.values(), ids=OTHER)
def test_a_cache_of_something_else_is_refused(some, tmp_path, tiny_kl, capsys, flags, shown):
    folder = cache(some, tmp_path / "c", "--tokenizer", "tiny:0")
    before = content(folder)
    argv = [*CACHE, "--data_path", some, "--cached_path", folder, "--tokenizer", "tiny:0", *flags]
    assert shown in refused(cache_latents.main, capsys, *argv)
    assert content(folder) == before


def test_a_cache_of_other_images_is_refused(some, tmp_path, capsys):
    folder = cache(some, tmp_path / "c")
    before = content(folder)
    argv = [*CACHE, "--data_path", some, "--cached_path", folder]
    write_image(some / "train" / "new" / "0.png", 99)
    assert "1 classes of the data are not in it, 0 are only in it, the first is 'new'" in refused(
        cache_latents.main, capsys, *argv
    )
    shutil.rmtree(some / "train" / "new")
    shutil.rmtree(some / "train" / "7")
    assert "0 classes of the data are not in it, 1 are only in it, the first is '7'" in refused(
        cache_latents.main, capsys, *argv
    )
    shutil.copytree(some / "train" / "Été ☀", some / "train" / "7")  # as many images would be needed, at least
    assert f"num_images {NUM} instead of {NUM + 1}" in refused(cache_latents.main, capsys, *argv)
    shutil.rmtree(some / "train" / "7" / "deep")
    write_image(some / "train" / "7" / "0.png", 5, (9, 9))
    assert "images" in refused(cache_latents.main, capsys, *argv)
    assert content(folder) == before


def test_a_folder_of_something_else_is_left_alone(pictures, tmp_path, tiny_kl, capsys):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "letter.txt").write_text("mine")
    argv = [*CACHE, "--data_path", pictures, "--cached_path"]
    assert "not empty" in refused(cache_latents.main, capsys, *argv, tmp_path / "c")
    assert content(tmp_path / "c") == {"letter.txt": b"mine"}
    assert "letter.txt" in refused(cache_latents.main, capsys, *argv, tmp_path / "c" / "letter.txt")
    assert "--cached_path" in refused(cache_latents.main, capsys, *CACHE, "--data_path", pictures)
    missing = ["--data_path", tmp_path / "missing", "--cached_path", tmp_path / "new"]
    assert "missing" in refused(cache_latents.main, capsys, *CACHE, *missing)
    bad = ["--data_path", pictures, "--cached_path", tmp_path / "new", "--vae_embed_dim", 4]
    assert "--vae_embed_dim 4" in refused(cache_latents.main, capsys, *CACHE, *bad)
    odd = ["--data_path", pictures, "--cached_path", tmp_path / "new", "--tokenizer", "tiny:0", "--img_size", 7]
    assert "--img_size 7 must be a multiple of the tokenizer's 2" in refused(cache_latents.main, capsys, *CACHE, *odd)
    assert not (tmp_path / "new").exists()


def test_numbers_that_do_not_fit_are_refused(pictures, tmp_path, monkeypatch, capsys):
    class Loud(TinyKL):
        def _moments(self, images):
            return super()._moments(images) * 1e6

    monkeypatch.setattr(build, "tokenizer_of", lambda *_: Loud())
    flags = ["--data_path", pictures, "--cached_path", tmp_path / "c", "--cache_dtype", "float16"]
    flags += ["--vae_stride", 2, "--vae_embed_dim", 2]
    assert "float16" in refused(cache_latents.main, capsys, *CACHE, *flags)
    assert not list((tmp_path / "c").glob("shard*"))


@pytest.mark.parametrize("before", [False, True])
def test_images_replaced_by_others_of_the_same_size_are_other_images(tmp_path, capsys, before):
    """A cache of before the contents were compared is known by names and sizes."""
    for i in range(3):
        write_bmp(tmp_path / "data" / "train" / "a" / f"{i}.bmp", i)
    folder = cache(tmp_path / "data", tmp_path / "c")
    if before:
        stored = json.loads((folder / "settings.json").read_text())
        del stored["content"]
        (folder / "settings.json").write_text(json.dumps(stored))
    assert content(cache(tmp_path / "data", folder)) == content(folder)
    write_bmp(tmp_path / "data" / "train" / "a" / "1.bmp", 9)
    argv = [*CACHE, "--data_path", tmp_path / "data", "--cached_path", folder]
    if before:
        assert cache_latents.main([*map(str, argv)]) == 0
    else:
        assert "other latents (of files with the same names and sizes)" in refused(cache_latents.main, capsys, *argv)


def write_bmp(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-300] ^= 1
    path.write_bytes(data)


def zeros(path):
    np.save(path, np.zeros((6, 2, 3, 4, 4), np.float32))


# of the packed format: file, what happens to it, is it seen without reading everything?
DAMAGES = [
    ("shard-00001.npy", truncate, True),
    ("shard-00001.npy", Path.unlink, True),
    ("shard-00001.npy", zeros, True),
    ("shard-00001.npy", lambda path: path.write_bytes(b""), True),
    ("shard-00001.npy", lambda path: path.write_text("hello"), True),
    ("shard-00001.npy", flip_a_bit, False),
    ("index.json", truncate, True),
    ("index.json", lambda path: path.write_text("{}"), True),
    ("index.json", lambda path: path.write_bytes(b"\xff\xfe"), True),
]


@pytest.mark.parametrize("name, damage, at_once", DAMAGES)
def test_a_damaged_file_is_one_line_and_is_made_anew(pictures, tmp_path, capsys, name, damage, at_once):
    folder = cache(pictures, tmp_path / "c")
    before = content(folder)
    damage(folder / name)
    assert name in refused(cache_latents.main, capsys, "--cached_path", folder, "--verify")
    if at_once:
        flags = ["--use_cached", "--cached_path", folder, "--output_dir", tmp_path / "out"]
        assert name in refused(main_mar.main, capsys, *SMALL, *TRAIN, *flags)
        assert not (tmp_path / "out").exists()
    assert content(cache(pictures, folder)) == before
    assert cache_latents.main(["--cached_path", str(folder), "--verify"]) == 0


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lambda path: np.savez(path, moments=np.zeros(3))])
def test_a_damaged_npz_file_is_skipped_in_training_and_made_anew(pictures, tmp_path, capsys, damage):
    folder = cache(pictures, tmp_path / "c", "--format", "npz")
    before = content(folder)
    damage(folder / f"{NAMES[4]}.npz")
    latents = open_latents(folder)
    at = [path for path, _ in latents.samples].index(str(folder / f"{NAMES[4]}.npz"))
    with pytest.warns(UserWarning, match="broken image skipped"):
        pair, label, i = latents[at]
    others = [k for k, (_, other) in enumerate(latents.samples) if other == label and k != at]
    assert latents.samples[at][1] == label and i == at and latents.num_broken == 1
    assert any(torch.equal(pair, latents[k][0]) for k in others)
    assert NAMES[4] in refused(cache_latents.main, capsys, "--cached_path", folder, "--verify")
    assert content(cache(pictures, folder, "--format", "npz")) == before


def test_files_that_are_missing_or_too_many_are_refused(pictures, tmp_path, capsys):
    folder = cache(pictures, tmp_path / "c", "--format", "npz")
    flags = [*SMALL, *TRAIN, "--use_cached", "--cached_path", folder, "--output_dir", tmp_path / "out"]
    shutil.copytree(folder / "7", folder / "8")
    line = refused(main_mar.main, capsys, *flags)
    assert "0 files that index.json names are missing and 4 are not in it" in line and "8/0.png.npz" in line
    shutil.rmtree(folder / "8")
    shutil.rmtree(folder / "7")
    line = refused(main_mar.main, capsys, *flags)
    assert "4 files that index.json names are missing" in line and "7/0.png.npz" in line
    assert not (tmp_path / "out").exists()
