"""Caches of ids: what they hold, that training on them is training on the images, and what is refused."""

import json

import numpy as np
import pytest
import torch

import main_mar
from models import tokenizers
from models.tokenizers import build_tokenizer
from scripts import cache_latents, measure_latents
from tests.helpers_ids import GreyIds
from tests.helpers_latents import NUM, SMALL, TRAIN, cache, losses, refused
from util.images.datasets import build_dataset
from util.images.latents import open_latents
from util.images.pictures import read_png

CE = ["--loss", "ce"]


@pytest.fixture(autouse=True)
def grey(monkeypatch):
    """--tokenizer greyV: ids alone, V grey levels, of coloured images."""
    for entries in (16, 32, 70000):
        row = {f"grey{entries}": lambda entries=entries, **options: GreyIds(entries, image_channels=3)}
        monkeypatch.setitem(tokenizers.TOKENIZERS, *row.popitem())


@pytest.fixture
def vq(saved):
    return ["--tokenizer", f"diffusers:{saved / 'VQModel'}"]


def test_it_holds_the_ids_of_all_images_and_their_mirror_images(pictures, tmp_path, vq, capsys):
    folder = cache(pictures, tmp_path / "c", *vq, "--tokens", "discrete")
    assert f"ids of {NUM} images" in capsys.readouterr().out
    ids, images = open_latents(folder), build_dataset("imagefolder", data_path=pictures, img_size=8)
    tokenizer = build_tokenizer(vq[1])
    assert (len(ids), ids.shape, ids.codebook_size, ids.flip) == (NUM, (4, 4), 7, True)
    for (pair, label, i), (image, expected, j) in zip(ids, images, strict=True):
        pixels = torch.stack([image, image.flip(-1)]).float() / 127.5 - 1
        assert (label, i) == (expected, j) and pair.dtype == torch.long
        assert torch.equal(pair, tokenizer.encode_ids(pixels))
    assert np.load(folder / "shard-00000.npy").dtype == np.uint16
    ids.check(tokenizer, "vq", discrete=True)
    assert cache_latents.main(["--cached_path", str(folder), "--verify"]) == 0
    before = (folder / "shard-00000.npy").stat().st_mtime_ns
    (folder / "shard-00001.npy").write_bytes(b"damaged")
    cache(pictures, folder, *vq, "--tokens", "discrete")  # goes on: makes what is damaged, and nothing else
    assert (folder / "shard-00000.npy").stat().st_mtime_ns == before and len(open_latents(folder)) == NUM


def test_large_codebooks_have_larger_numbers_and_ids_alone_need_no_flag(pictures, tmp_path):
    for entries, dtype in ((16, "uint16"), (70000, "uint32")):
        folder = cache(pictures, tmp_path / dtype, "--tokenizer", f"grey{entries}")
        assert np.load(folder / "shard-00000.npy").dtype == dtype
        index = json.loads((folder / "index.json").read_text())
        assert (index["codebook_size"], index["shape"], index["dtype"]) == (entries, [4, 4], dtype)
        image = build_dataset("imagefolder", data_path=pictures, img_size=8)[2][0].float() / 127.5 - 1
        expected = GreyIds(entries, image_channels=3).encode_ids(torch.stack([image, image.flip(-1)]))
        assert torch.equal(open_latents(folder)[2][0], expected) and expected.max() > entries / 2


def test_training_on_it_equals_training_on_the_images(pictures, tmp_path, monkeypatch, vq):
    """With mirror images, from the same seeds."""
    flags = [*vq, *CE, "--epochs", 2, "--lr", 0.03]
    folder = cache(pictures, tmp_path / "c", *vq, "--tokens", "discrete")
    images = losses(monkeypatch, tmp_path / "images", *flags, "--data_path", pictures)
    cached = losses(monkeypatch, tmp_path / "cached", *flags, "--use_cached", "--cached_path", folder)
    assert len(images) == 2 * (NUM // 4) and cached == pytest.approx(images, abs=1e-6)
    # the captions of mirror images have two lines
    assert read_png(tmp_path / "cached/cached.png").shape == (2 * (16 + 64 + 4) + 14 + 4, 8 * (64 + 4) + 4, 3)


def test_a_cache_of_something_else_is_one_line(pictures, tmp_path, vq, capsys):
    ids = cache(pictures, tmp_path / "ids", *vq, "--tokens", "discrete")
    latents = cache(pictures, tmp_path / "latents", *vq)
    grey = cache(pictures, tmp_path / "grey", "--tokenizer", "grey16")

    def said(folder, *flags) -> str:
        words = ["--use_cached", "--cached_path", folder, "--output_dir", tmp_path / "no", *flags]
        return refused(main_mar.main, capsys, *SMALL, *TRAIN, *words)

    assert "holds ids, this model takes latents" in said(ids, *vq)
    assert "holds latents, this model takes ids" in said(latents, *vq, *CE)
    line = said(grey, "--tokenizer", "grey32", *CE)
    assert "codebook of 16 entries, that of the tokenizer grey32 has 32: give the --tokenizer that made them" in line
    assert f"--cached_path {ids} are of a codebook of 7 entries" in said(ids, "--tokenizer", "grey16", *CE)
    grey16 = [grey, "--tokenizer", "grey16", *CE]
    assert "--vocab_size 32 does not fit the tokenizer grey16, which has 16" in said(*grey16, "--vocab_size", 32)
    shard = np.load(grey / "shard-00000.npy")
    shard[1, 0, 2, 3] = 16
    np.save(grey / "shard-00000.npy", shard)
    line = said(*grey16)
    assert f"{grey} is damaged: it holds the id 16, its codebook has the entries 0 to 15" in line
    assert "run scripts/cache_latents.py again" in line
    settings = [*SMALL, "--data_path", pictures, "--cached_path"]
    line = refused(cache_latents.main, capsys, *settings, latents, *vq, "--tokens", "discrete", "--shard_size", 6)
    assert "holds other latents (dtype 'float32' instead of 'uint16')" in line
    line = refused(cache_latents.main, capsys, *settings, ids, *vq, "--shard_size", 6)
    assert "holds other latents (dtype 'uint16' instead of 'float32')" in line


def test_the_same_entries_with_other_weights_are_another_codebook(pictures, tmp_path, vq, capsys):
    folder = cache(pictures, tmp_path / "c", *vq, "--tokens", "discrete")
    other = build_tokenizer(vq[1]).autoencoder
    other.quantize.embedding.weight += 0.1
    other.save_pretrained(tmp_path / "other")
    flags = ["--tokenizer", f"diffusers:{tmp_path / 'other'}", *CE, "--output_dir", tmp_path / "no"]
    line = refused(main_mar.main, capsys, *SMALL, *TRAIN, "--use_cached", "--cached_path", folder, *flags)
    assert "made by another tokenizer" in line


def test_ids_that_cannot_be_cached_and_what_has_no_scale_are_one_line(pictures, tmp_path, vq, capsys):
    flags = [*SMALL, "--data_path", pictures, "--cached_path", tmp_path / "c"]
    assert "packed" in refused(cache_latents.main, capsys, *flags, *vq, "--tokens", "discrete", "--format", "npz")
    assert "--tokens discrete does not fit" in refused(cache_latents.main, capsys, *flags, "--tokens", "discrete")
    of_ids = ["--tokenizer", "grey16"]
    assert "discrete ones" in refused(cache_latents.main, capsys, *flags, *of_ids, "--tokens", "continuous")
    words = "--data imagefolder --img_size 8 --num_workers 0 --data_path".split()
    assert "grey16 makes ids alone" in refused(measure_latents.main, capsys, *words, pictures, *of_ids)
    folder = cache(pictures, tmp_path / "c", *of_ids)
    assert f"{folder} is a cache" in refused(measure_latents.main, capsys, *words, folder, *vq)
