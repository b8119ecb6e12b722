"""Odd but valid input simply works: few, small and strange images with strange names, in every program that reads some.

What single modes and sizes become is tested in test_data.py, test_editing.py and test_latent_cache.py.
"""

import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import main_mar
import sample
from sampling.editing import read_edit
from scripts import cache_latents, make_fid_stats
from tests.test_cli import TINY, files, refused
from util.checkpoint import load_checkpoint
from util.evaluation.fid_stats import load_fid_stats
from util.images.datasets import build_dataset
from util.images.latents import open_latents

LONG = "長" * 83 + "xy"  # 251 bytes; with .png a name as long as may be
CLASSES = ["Été ☀ 'quoted' $HOME", "x" * 255, "line\nbreak", "-rf", "%s{}", os.fsdecode(b"not utf-8 \xff")]
# file name -> mode, size (width, height)
IMAGES = {
    "grey.png": ("L", (9, 9)),
    "alpha.png": ("RGBA", (8, 8)),
    "grey and alpha.png": ("LA", (8, 10)),
    "cmyk.tif": ("CMYK", (8, 8)),
    "16 bit.png": ("I;16", (12, 8)),
    "two colours.png": ("1", (16, 8)),
    "palette.png": ("P", (8, 8)),
    "pixel.png": ("RGB", (1, 1)),
    "strip.png": ("RGB", (1, 3000)),
    LONG + ".png": ("RGB", (8, 8)),
    "UPPER.JPEG": ("RGB", (33, 7)),
    os.fsdecode(b"not utf-8 \xfe.png"): ("RGB", (8, 8)),
}


def write(folder: Path, images: dict) -> Path:
    rng = np.random.default_rng(0)
    for name, (mode, (width, height)) in images.items():
        folder.mkdir(parents=True, exist_ok=True)
        if mode == "I;16":
            image = Image.fromarray(rng.integers(0, 65536, (height, width)).astype(np.uint16))
        else:
            image = Image.fromarray(rng.integers(0, 255, (height, width, 3)).astype(np.uint8))
            image = image.convert("L").convert(mode) if mode == "LA" else image.convert(mode)
        assert image.mode == mode
        image.save(folder / name)
    return folder


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A class of all images, and classes of one image each, with names that few would give."""
    folder = tmp_path_factory.mktemp("odd")
    write(folder / "all", {**IMAGES, ".hidden but an image.png": ("RGB", (8, 8))})
    for name in CLASSES:
        write(folder / name, {"0.png": ("RGB", (8, 8))})
    return folder


FOLDER = "--data imagefolder --tokenizer pixel --img_size 8 --patch_size 4 --model mar_tiny --num_workers 0"
QUICK = "--num_iter 1 --num_sampling_steps 1 --metrics none --num_images 2".split()


def train(data, out, *flags):
    argv = [*TINY, *FOLDER.split(), "--data_path", str(data), "--output_dir", str(out), *QUICK, *map(str, flags)]
    assert main_mar.main(argv) == 0
    return load_checkpoint(out)["config"]["data"]["classes"]


def test_odd_images_are_trained_on_and_sampled(odd, tmp_path):
    with warnings.catch_warnings(action="error", category=UserWarning):  # none is skipped
        assert train(odd, tmp_path / "in", "--batch_size", len(IMAGES) + len(CLASSES)) == sorted(["all", *CLASSES])
    argv = ["--checkpoint", str(tmp_path / "in"), "--output_dir", str(tmp_path / "out"), *QUICK]
    assert sample.main(argv) == 0
    assert len(list((tmp_path / "out").glob("*/[01].png"))) == 2


@pytest.mark.filterwarnings("ignore:broken image skipped")
def test_links_to_nothing_do_not_keep_from_measuring_and_caching(odd, tmp_path, capsys):
    """Nor do names that are no UTF-8, which training takes too."""
    for i, name in enumerate(("dangling.png", os.fsdecode(b"\xff.png"))):
        place = shutil.copytree(odd, tmp_path / f"data{i}", symlinks=True)
        (place / "all" / name).symlink_to(tmp_path / "nothing.png")
        train(place, tmp_path / f"in{i}", "--batch_size", len(IMAGES) + len(CLASSES) + 1)
        assert "warning: 1 of 19 images are broken: 5.26% of the draws" in capsys.readouterr().out
        flags = ["--checkpoint", str(tmp_path / f"in{i}"), "--output_dir", str(tmp_path / f"out{i}"), *QUICK]
        assert sample.main([*flags, "--metrics", "fid", "--features", "digits"]) == 0
        assert "FID" in capsys.readouterr().out
        for style in ("packed", "npz"):
            argv = f"{FOLDER} --format {style}".replace("--patch_size 4 --model mar_tiny", "").split()
            argv += ["--data_path", str(place), "--cached_path", str(tmp_path / f"{style}{i}")]
            assert cache_latents.main(argv) == 0
            assert len(open_latents(tmp_path / f"{style}{i}")) == len(IMAGES) + len(CLASSES)


@pytest.mark.parametrize("below", [".", "train/one class"])
def test_a_single_image_is_a_data_set(below, tmp_path):
    write(tmp_path / "data" / below, {"0.png": ("1", (1, 1))})
    out = tmp_path / "出力 — very long " / ("é" * 120)
    assert train(tmp_path / "data", out, "--batch_size", 1) == ["all" if below == "." else "one class"]


def test_odd_images_are_a_reference(odd, tmp_path):
    out = tmp_path / f"{LONG}.npz"
    argv = ["--data_path", str(odd), *"--img_size 8 --features digits --out".split(), str(out)]
    assert make_fid_stats.main(argv) == 0
    assert load_fid_stats(out).num_images == len(IMAGES) + len(CLASSES)


@pytest.mark.parametrize("format", ["packed", "npz"])
def test_odd_images_are_cached(odd, format, tmp_path):
    images = build_dataset("imagefolder", data_path=odd, img_size=8)
    argv = f"{FOLDER} --format {format}".replace("--patch_size 4 --model mar_tiny", "").split()
    argv += ["--data_path", str(odd), "--cached_path", str(tmp_path / LONG)]
    for _ in range(2):  # the second time nothing is left to do
        assert cache_latents.main(argv) == 0
    latents = open_latents(tmp_path / LONG)
    assert len(latents) == len(images) and latents.classes == images.classes
    for (image, label, _), (moments, same, _) in zip(images, latents, strict=True):
        assert label == same and np.allclose(moments[0], image.float() / 127.5 - 1)


def test_an_edit_with_a_strange_name(tmp_path):
    file = write(tmp_path / "Été ☀", {f"{LONG}.png": ("I;16", (8, 8))}) / f"{LONG}.png"
    Image.new("CMYK", (8, 8)).save(tmp_path / "mask.tif")  # white
    edit = read_edit(str(file), str(tmp_path / "mask.tif"), img_size=8, channels=3, cell=4)
    assert edit.source.shape == (8, 8, 3) and edit.unknown.all()


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs the permissions of POSIX")
def test_a_folder_that_may_not_be_read_is_one_line(tmp_path, capsys):
    """Root may read everything: then the programs run as nobody."""
    closed, out = write(tmp_path / "closed", {"0.png": ("RGB", (8, 8))}), tmp_path / "out"
    closed.chmod(0)
    before, user = files(tmp_path), os.geteuid()
    for folder in (tmp_path, *tmp_path.parents):
        if user == 0 and folder.stat().st_uid == 0 and folder.is_relative_to("/tmp"):
            folder.chmod(folder.stat().st_mode | 0o55)
    argv = [*TINY, *FOLDER.split(), "--data_path", str(closed), "--batch_size", "1", "--output_dir", str(out)]
    try:
        if user == 0:
            os.seteuid(65534)
        lines = [refused(main_mar.main, [*argv, *more], capsys) for more in ([], ["--output_dir", str(tmp_path / "x")])]
        lines.append(refused(main_mar.main, [*TINY, "--output_dir", str(closed / "x")], capsys))
    finally:
        os.seteuid(user)
    assert all(str(closed) in line or "--output_dir" in line for line in lines), lines
    assert files(tmp_path) == before
