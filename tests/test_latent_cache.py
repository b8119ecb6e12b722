"""Caches of latents on disk: what they hold in both formats, which images they leave out, the commands for them."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main_mar
from scripts import bench_loader, cache_latents
from tests.helpers_latents import FORMATS, NAMES, NUM, SMALL, TRAIN, TinyKL, cache, content, losses, refused
from util.images.datasets import MemoryDataset, build_dataset
from util.images.latent_files import image_names
from util.images.latents import npz_path, open_latents

# ------------------------------------------------------------------------------------------------------ what is on disk


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_cache_holds_the_moments_of_all_images_and_their_mirror_images(pictures, tmp_path, tiny_kl, format, workers):
    folder = cache(pictures, tmp_path / "c", "--format", format, "--tokenizer", "tiny:0", "--num_workers", workers)
    images, latents, tokenizer = (
        build_dataset("imagefolder", data_path=pictures, img_size=8),
        open_latents(folder),
        TinyKL(),
    )
    assert len(latents) == len(images) == NUM and latents.classes == images.classes
    assert (latents.img_size, latents.channels, latents.flip, latents.num_broken) == (8, 3, True, 0)
    for (pair, label, i), (image, expected, j) in zip(latents, images, strict=True):
        pixels = torch.stack([image, image.flip(-1)]).float() / 127.5 - 1
        assert (label, i) == (expected, j) and pair.dtype == torch.float32
        torch.testing.assert_close(pair, tokenizer.encode_moments(pixels))
        assert not torch.equal(pair[0], pair[1])
    latents.check(tokenizer, "tiny")
    index = json.loads((folder / "index.json").read_text())
    assert sorted(index["names"]) == sorted(NAMES) and not index["broken"]
    assert not [name for name in content(folder) if name.endswith(".tmp")]


def test_npz_is_mars_layout(pictures, tmp_path):
    """One file an image, in the class's folder, under the image's whole name."""
    folder = cache(pictures, tmp_path / "c", "--format", "npz")
    assert {name for name in content(folder) if name.endswith(".npz")} == {f"{name}.npz" for name in NAMES}
    for name in NAMES:
        image = np.asarray(Image.open(pictures / "train" / name)).transpose(2, 0, 1) / 127.5 - 1
        with np.load(folder / f"{name}.npz") as file:
            assert set(file) == {"moments", "moments_flip"} and file["moments"].dtype == np.float32
            np.testing.assert_allclose(file["moments"], image, atol=1e-6)
            np.testing.assert_allclose(file["moments_flip"], image[:, :, ::-1], atol=1e-6)


def test_a_cache_that_mar_wrote_is_read(pictures, tmp_path, monkeypatch, capsys):
    """Its folder has no index: classes are the sub-folders, and nobody can say which tokenizer made it."""
    ours = cache(pictures, tmp_path / "ours", "--format", "npz")
    mars = tmp_path / "mars"
    for name in NAMES:
        (mars / name).parent.mkdir(parents=True, exist_ok=True)
        with np.load(ours / f"{name}.npz") as file:
            np.savez(mars / f"{name}.npz", moments=file["moments"], moments_flip=file["moments_flip"])
    latents = open_latents(mars, 8)
    assert latents.classes == ["7", "a b", "Été ☀"] and len(latents) == NUM and latents.flip
    labels = {Path(path).relative_to(mars).as_posix(): label for path, label in latents.samples}
    assert labels == {f"{name}.npz": latents.classes.index(name.split("/")[0]) for name in NAMES}
    capsys.readouterr()
    assert len(losses(monkeypatch, tmp_path / "out", "--use_cached", "--cached_path", mars)) == 2 * (NUM // 4)
    assert "only their shape is checked" in capsys.readouterr().out
    damaged = mars / f"{NAMES[3]}.npz"
    whole = damaged.read_bytes()
    damaged.write_bytes(bytes(300))
    message = refused(cache_latents.main, capsys, "--cached_path", mars, "--verify")
    assert f"{NAMES[3]}.npz is damaged" in message and "main_cache.py" in message and "pickle" not in message
    damaged.write_bytes(whole)
    assert "(3, 8, 8)" in refused(main_mar.main, capsys, *SMALL, *TRAIN, "--use_cached", "--cached_path", mars,
                                  "--img_size", 16, "--output_dir", tmp_path / "no")  # fmt: skip


def test_half_precision_is_half_the_size(pictures, tmp_path):
    whole, half = (open_latents(cache(pictures, tmp_path / d, "--cache_dtype", d)) for d in ("float32", "float16"))
    assert half[3][0].dtype == torch.float16
    torch.testing.assert_close(half[3][0].float(), whole[3][0], rtol=1e-3, atol=1e-3)


def test_workers_that_do_not_fork_get_no_copy_of_the_files(pictures, tmp_path):
    """Pickled, a memory map is all its bytes."""
    import pickle

    latents = open_latents(cache(pictures, tmp_path / "c"))
    again = pickle.loads(pickle.dumps(latents))
    assert not again.open and torch.equal(again[NUM - 1][0], latents[NUM - 1][0])


def test_names_stay_inside_the_folder(tmp_path, pictures, capsys):
    for name in ("../x", "/x", "a/../../x", ""):
        with pytest.raises(ValueError, match="outside"):
            npz_path(tmp_path, name)
    fashion = MemoryDataset(
        torch.zeros(3, 1, 2, 2, dtype=torch.uint8), [0, 1, 0], ["T-shirt/top", "Ankle boot"], flip=True
    )
    assert image_names(fashion) == ["T-shirt%2Ftop/000000", "Ankle boot/000001", "T-shirt%2Ftop/000002"]
    folder = cache(pictures, tmp_path / "c", "--format", "npz")
    index = json.loads((folder / "index.json").read_text())
    index["names"][0] = "../../secret"
    (folder / "index.json").write_text(json.dumps(index))
    assert "secret" in refused(cache_latents.main, capsys, "--cached_path", folder, "--verify")


def test_data_sets_without_files_have_caches_too(tmp_path):
    flags = ["--batch_size", "512", "--cached_path", str(tmp_path / "c")]
    assert cache_latents.main(flags) == 0  # no data set named: the digits, as in main_mar.py
    latents, digits = open_latents(tmp_path / "c", 8), build_dataset("digits")
    assert not latents.flip and latents.channels == 1 and latents.classes == digits.classes
    assert latents.labels == digits.labels.tolist()
    torch.testing.assert_close(latents[5][0][0], digits[5][0].float() / 127.5 - 1)


@pytest.mark.parametrize("format", FORMATS)
def test_images_that_cannot_be_read_are_left_out_and_named(some, tmp_path, capsys, format):
    for name in (NAMES[1], NAMES[12]):  # the latter is a file of the packed format for itself
        (some / "train" / name).write_text("no picture")
    with pytest.warns(UserWarning, match="broken image skipped"):
        folder = cache(some, tmp_path / "c", "--format", format)
    assert "2 that could not be read" in capsys.readouterr().out
    index, latents = json.loads((folder / "index.json").read_text()), open_latents(folder)
    assert index["broken"] == [NAMES[1], NAMES[12]] and set(index["names"]) == set(NAMES) - set(index["broken"])
    images = build_dataset("imagefolder", data_path=some, img_size=8)
    for name, (pair, _, _) in zip(index["names"], latents, strict=True):
        at = [Path(path).relative_to(images.folder).as_posix() for path, _ in images.samples].index(name)
        torch.testing.assert_close(pair[0], images[at][0].float() / 127.5 - 1)
    before = content(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cache(some, folder, "--format", format)
    assert content(folder) == before


# --------------------------------------------------------------------------------------------------------- command line


def test_mars_caching_command_means_what_it_meant(capsys):
    command = """--img_size 256 --vae_path pretrained_models/vae/kl16.ckpt --vae_embed_dim 16 --batch_size 128
        --data_path IMAGENET --cached_path CACHED --num_workers 8 --pin_mem --device cpu --seed 1 --world_size 1
        --local_rank -1 --dist_url env:// --dry_run"""
    capsys.readouterr()
    assert cache_latents.main(command.split()) == 0
    values = json.loads(capsys.readouterr().out)
    expected = dict(img_size=256, vae_path="pretrained_models/vae/kl16.ckpt", vae_embed_dim=16, batch_size=128)
    expected |= dict(data_path="IMAGENET", cached_path="CACHED", tokenizer="kl16", data="imagefolder", format="packed")
    assert {key: values[key] for key in expected} == expected


def test_the_benchmark_prints_a_table(capsys):
    flags = "--num_images 8 --batch_size 4 --repeats 1 --img_size 16".split()
    assert bench_loader.main(flags) == 0
    rows = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert rows == ["read from", "---", "folder", "npz", "packed"]
    assert "--num_images" in refused(bench_loader.main, capsys, "--num_images", 2)
