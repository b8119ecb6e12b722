"""samples.npz: the form that ADM's evaluator reads, of any size, and its loader; the captions of grids."""

import errno
import json
import re
import resource
import threading
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from numpy.lib.format import read_array_header_1_0, read_magic

import sample
from util.images import pictures as module
from util.images.pictures import (
    PNGFolder,
    Writer,
    caption_font,
    caption_lines,
    image_path,
    is_whole,
    load_samples,
    make_grid,
    read_png,
    save_png,
)

ROOT = Path(__file__).resolve().parents[1]


def pictures(folder, num=5, side=6, channels=3) -> np.ndarray:
    images = np.random.default_rng(0).integers(0, 256, (num, side, side + 1, channels), dtype=np.uint8)
    for i, image in enumerate(images):
        save_png(image_path(folder, i), image)
    return images


@pytest.mark.parametrize("channels", [1, 3])
def test_it_is_what_adms_evaluator_reads_and_has_the_labels(tmp_path, channels):
    images, labels = pictures(tmp_path, channels=channels), [3, -1, 0, 999, 3]
    PNGFolder(tmp_path, 5).save_npz(labels)
    path = tmp_path / "samples.npz"
    with np.load(path) as file:
        assert sorted(file.files) == ["arr_0", "labels"] and np.array_equal(file["arr_0"], images)
        assert (
            file["arr_0"].dtype == np.uint8 and file["labels"].dtype == np.int64 and file["labels"].tolist() == labels
        )
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:  # the way of evaluator.py
        assert archive.testzip() is None and read_magic(file) == (1, 0)
        assert read_array_header_1_0(file) == (images.shape, False, np.uint8)
        assert file.read(images[0].nbytes) == images[0].tobytes()
    assert path.stat().st_size < images.nbytes + 1000  # the images once
    for place in (path, str(tmp_path)):
        found = sample.load_samples(place)
        assert np.array_equal(found["images"], images) and found["labels"].tolist() == labels
    assert {file.name for file in tmp_path.iterdir()} == {*(f"{i}.png" for i in range(5)), "samples.npz"}


def test_no_more_than_a_picture_is_in_memory(tmp_path):
    num, side = 60, 128
    images = pictures(tmp_path, num=num, side=side)
    folder = PNGFolder(tmp_path, num)
    folder[0]  # libraries are imported
    tracemalloc.start()
    folder.save_npz([0] * num)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * images[0].nbytes and np.array_equal(load_samples(tmp_path)["images"], images)


@pytest.mark.parametrize("key", ["arr_0", "images"])
@pytest.mark.parametrize("name", [".", "samples.npz"])
def test_the_documented_line_reads_files_of_now_and_of_before(tmp_path, key, name):
    images, values = pictures(tmp_path), {}
    if key == "arr_0":
        PNGFolder(tmp_path, 5).save_npz(range(5))
    else:
        np.savez(tmp_path / "samples.npz", images=images, labels=np.arange(5))
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "evaluation.md").read_text(), flags=re.DOTALL)
    exec(code.replace("FOLDER", str(tmp_path / name)), values)
    assert np.array_equal(values["images"], images) and values["labels"].tolist() == [*range(5)]
    assert values["labels"].dtype == np.int64


def test_a_limit_leaves_the_pictures_alone(tmp_path):
    images = pictures(tmp_path)
    PNGFolder(tmp_path, 5).save_npz([0] * 5, limit=images.nbytes - 1)
    assert not (tmp_path / "samples.npz").exists()
    PNGFolder(tmp_path, 5).save_npz([0] * 5, limit=images.nbytes)
    assert (tmp_path / "samples.npz").exists()


def test_pictures_are_written_while_the_next_are_made(tmp_path, monkeypatch):
    """But not before those of the call before are there; all are when the block ends."""
    seen, go = [], threading.Event()

    def slow(path, image):
        assert go.wait(60)
        save_png(path, image)

    monkeypatch.setattr(module, "save_png", slow)
    images = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)
    with Writer() as writer:
        writer.save([image_path(tmp_path, i) for i in range(3)], images[:3])
        seen.append(len(list(tmp_path.iterdir())))
        go.set()
        writer.save([image_path(tmp_path, i) for i in range(3, 6)], images[3:])
        seen.append(all(image_path(tmp_path, i).is_file() for i in range(3)))
    assert seen == [0, True]
    assert all(np.array_equal(read_png(image_path(tmp_path, i)), image) for i, image in enumerate(images))


@pytest.mark.parametrize("more", [True, False])
def test_a_full_disk_ends_the_writing(more, tmp_path, monkeypatch):
    """At the next batch, or at the end; what was written is whole."""

    def full(path, image):
        if path.name == "1.png":
            raise OSError(errno.ENOSPC, "no space left")
        save_png(path, image)

    monkeypatch.setattr(module, "save_png", full)
    images = np.zeros((4, 5, 4, 3), dtype=np.uint8)
    with pytest.raises(OSError, match="no space left"), Writer() as writer:
        writer.save([image_path(tmp_path, i) for i in range(3)], images[:3])
        if more:
            writer.save([image_path(tmp_path, 3)], images[3:])
            pytest.fail("the second call should raise")
    assert {path.name for path in tmp_path.iterdir()} == {"0.png", "2.png"}


def test_an_error_elsewhere_is_not_hidden_by_that_of_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "save_png", lambda path, image: 1 / 0)
    with pytest.raises(KeyboardInterrupt), Writer() as writer:
        writer.save([image_path(tmp_path, 0)], np.zeros((1, 5, 4, 3), dtype=np.uint8))
        raise KeyboardInterrupt


def test_pictures_of_several_sizes_are_one_line(tmp_path):
    pictures(tmp_path)
    save_png(image_path(tmp_path, 3), np.zeros((2, 2, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"3.png is \(2, 2, 3\), the image before it \(6, 7, 3\)"):
        PNGFolder(tmp_path, 5).save_npz([0] * 5)
    assert not list(tmp_path.glob("*.npz")) and not list(tmp_path.glob(".*"))


def test_a_full_disk_costs_the_file_and_not_the_run(tmp_path):
    """What it lacks is made by the next run, which takes a folder without it for unfinished."""
    module.prepare_folder(tmp_path, dict(weights="aa", labels=[0] * 5))
    pictures(tmp_path)
    save_png(tmp_path / "grid.png", np.zeros((2, 2, 3), dtype=np.uint8))

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    try:
        with pytest.warns(UserWarning, match="samples.npz not written, the pictures are: File too large"):
            PNGFolder(tmp_path, 5).save_npz([0] * 5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.glob("*.npz")) and not list(tmp_path.glob(".*")) and not is_whole(tmp_path, "aa", 5)
    PNGFolder(tmp_path, 5).save_npz([0] * 5)
    assert is_whole(tmp_path, "aa", 5)


@pytest.mark.parametrize("content", [None, b"", b"PK", "objects"])
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, content):
    path = tmp_path / "samples.npz"
    if content == "objects":
        np.savez(path, arr_0=np.array([{}], dtype=object), labels=np.zeros(1))
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot read the samples in .*samples.npz") as error:
        load_samples(path)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------------- captions


def sheet(*captions, side=8) -> np.ndarray:
    """A grid of black pictures with these captions, in one row."""
    return make_grid(np.zeros((len(captions), side, side, 1), dtype=np.uint8), list(captions), len(captions))


def test_letters_beyond_ascii_are_not_all_the_same_box():
    assert len({sheet(f"cat {letter}").tobytes() for letter in "äöØжκ…"}) == 6


@pytest.mark.parametrize("side", [8, 64, 256])
def test_what_a_prompt_asks_for_is_readable_to_its_last_word(side):
    """Small pictures are enlarged for it, to whole multiples of their size."""
    six, seven = (sheet(f"this image is showing the number {word} written in ink", side=side) for word in "67")
    height, width = six.shape[0], six.shape[1] - 8
    assert width % side == 0 and 64 <= width <= max(128, side) and height > width + 16 + 8
    assert six.shape == seven.shape and not np.array_equal(six, seven)
    assert not np.array_equal(six, sheet("this image is showing the number 6 written in", side=side))


def test_short_captions_enlarge_nothing_and_a_row_is_as_high_as_it_needs():
    assert sheet(*"0123456789").shape == (4 + 16 + 64 + 4, 4 + 10 * (64 + 4), 3)
    captions = ["one", "two", "three", "a photograph of two cats that look at a bird"]
    grid = make_grid(np.zeros((4, 128, 128, 1), dtype=np.uint8), captions, 2)
    lines = len(caption_lines(captions[-1], 128))
    assert lines > 1 and grid.shape[0] == 4 + (16 + 128 + 4) + (2 + 14 * lines + 128 + 4)


@pytest.mark.parametrize("caption", ["word " * 80, "n01440764_" * 9, "the " + "long" * 30, "a\nb\udce4" * 60])
def test_a_caption_that_is_cut_says_so_and_fits(caption):
    lines = caption_lines(caption, 100)
    assert any(line.endswith("…") for line in lines) and len(lines) <= 4
    assert all(caption_font().getlength(line) <= 100 for line in lines)
    assert caption_lines("a  b\nc", 100) == ["a b c"] and caption_lines(" ", 100) == []
    assert sheet(caption).shape[1] == 128 + 8


@pytest.mark.parametrize("dtype, kept", [("torch.float32", True), ("torch.bfloat16", True), ("torch.int8", False)])
def test_images_of_another_batch_size_are_kept_but_in_int8(dtype, kept, tmp_path):
    """Where they depend on their batch."""
    run = dict(labels=[0, 1], seed=1, batch_size=8, dtype=dtype, checkpoint="a")
    module.prepare_folder(tmp_path, run)
    (tmp_path / "0.png").write_bytes(b"")
    module.prepare_folder(tmp_path, run | dict(batch_size=4, checkpoint="b"))
    assert (tmp_path / "0.png").exists() == kept and json.loads((tmp_path / "run.json").read_text())["batch_size"] == 4
    module.prepare_folder(tmp_path, run | dict(seed=2))
    assert not (tmp_path / "0.png").exists()
