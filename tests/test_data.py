"""Datasets and image reading of util/images/datasets.py (its epoch sampler: test_sampler.py)."""

import multiprocessing.reduction
import os
import pickle
import struct
import types
import urllib.error
import warnings

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader

from tests.helpers import image_folder
from util.evaluation.protocol import reference_hash
from util.images.datasets import DATASETS, build_dataset

RNG = np.random.default_rng(0)


def save(path, size=(8, 8), color=(10, 20, 30), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)


def folder(path, **kwargs):
    return build_dataset("imagefolder", data_path=path, **{"img_size": 8, **kwargs})


@pytest.fixture
def broken_folder(tmp_path):
    """Classes a (0 good, 1 not an image, 2 truncated) and b (3 good, 4 not an image)."""
    save(tmp_path / "a" / "0.png", color=(100, 0, 0))
    (tmp_path / "a" / "1.png").write_bytes(b"no image")
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "a" / "2.jpg")
    (tmp_path / "a" / "2.jpg").write_bytes((tmp_path / "a" / "2.jpg").read_bytes()[:1000])
    save(tmp_path / "b" / "3.png", color=(200, 0, 0))
    (tmp_path / "b" / "4.png").write_bytes(b"")
    return tmp_path


# ---------------------------------------------------------------- in-memory sets


def test_digits():
    ds = build_dataset("digits")
    image, label, i = ds[3]
    raw = load_digits()
    assert (len(ds), ds.num_classes, ds.channels, ds.img_size, ds.flip, ds.num_broken) == (1797, 10, 1, 8, False, 0)
    assert ds.classes == [str(k) for k in range(10)]
    assert image.dtype == torch.uint8 and image.shape == (1, 8, 8) and (type(label), i) == (int, 3)
    assert torch.equal(ds.images[:, 0], torch.from_numpy(np.round(raw.images * 255 / 16)).to(torch.uint8))
    assert ds.images.max() == 255 and [ds[k][1] for k in range(50)] == raw.target[:50].tolist()
    assert sum(1 for _ in ds) == 1797  # iteration ends
    images, labels, index = next(iter(DataLoader(ds, batch_size=4)))
    assert images.shape == (4, 1, 8, 8) and labels.dtype == index.dtype == torch.long


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"name": "imagenet"}, ["imagenet", *DATASETS]),
        ({"name": "digits", "img_size": 16}, ["16", "8"]),
        ({"name": "cifar10", "img_size": 64}, ["64", "32"]),
        ({"name": "digits", "split": "test"}, ["test", "train", "val"]),
        ({"name": "digits", "split": "val"}, ["val", "train"]),
        ({"name": "imagefolder"}, ["data_path"]),
        ({"name": "imagefolder", "data_path": "/no/such"}, ["/no/such"]),
        ({"name": "imagefolder", "data_path": "/", "img_size": 0}, ["img_size", "0"]),
    ],
)
def test_bad_arguments_are_one_line(kwargs, words):
    with pytest.raises(ValueError) as error:
        build_dataset(**kwargs)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words)


def write_idx(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">I{values.ndim}I", 0x800 + values.ndim, *values.shape) + values.tobytes())


@pytest.mark.parametrize(
    ("name", "source", "flip"), [("mnist", "MNIST", False), ("fashion_mnist", "FashionMNIST", True)]
)
def test_mnist_files(tmp_path, name, source, flip):
    raw = tmp_path / source / "raw"
    images = {part: RNG.integers(0, 256, (n, 28, 28), dtype=np.uint8) for part, n in (("train", 5), ("t10k", 3))}
    for part, values in images.items():
        write_idx(raw / f"{part}-images-idx3-ubyte", values)
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(len(values), dtype=np.uint8))
    for split, part in (("train", "train"), ("val", "t10k")):
        ds = build_dataset(name, data_path=tmp_path, split=split)
        assert (ds.channels, ds.img_size, ds.num_classes, ds.flip) == (1, 28, 10, flip)
        assert np.array_equal(ds.images[:, 0], images[part]) and ds[2][1:] == (2, 2)

    (raw / "train-images-idx3-ubyte").write_bytes(b"")  # as an interrupted extraction leaves it
    with pytest.raises(ValueError, match=source):
        build_dataset(name, data_path=tmp_path)


def test_cifar10_layout(monkeypatch, tmp_path):
    data = RNG.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    calls = []

    def fake(root, train, download):
        calls.append((root, train, download))
        return types.SimpleNamespace(data=data, targets=[7, 0, 1], classes=[f"c{k}" for k in range(10)])

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fake)
    ds = build_dataset("cifar10", data_path=tmp_path, split="val", download=False)
    assert calls == [(str(tmp_path), False, False)]
    assert (ds.channels, ds.img_size, ds.num_classes, ds.flip) == (3, 32, 10, True)
    image, label, _ = ds[0]
    assert label == 7 and image.dtype == torch.uint8 and np.array_equal(image, data[0].transpose(2, 0, 1))


def test_cifar10_of_pictures_in_a_folder(monkeypatch, tmp_path):
    """A folder of the split; where torchvision's files are too, or only other folders, it is torchvision's."""
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", lambda *args, **kwargs: pytest.fail("torchvision's"))
    image_folder(tmp_path, {"train": 2})
    ds = build_dataset("cifar10", data_path=tmp_path)
    assert (len(ds), ds.img_size, ds.channels, ds.classes) == (4, 32, 3, ["dark", "light"])
    with pytest.raises(ValueError, match="img_size is 64"):
        build_dataset("cifar10", data_path=tmp_path, img_size=64)
    for split in ("val", "train"):
        with pytest.raises(pytest.fail.Exception):
            build_dataset("cifar10", data_path=tmp_path, split=split)
        (tmp_path / "cifar-10-batches-py").mkdir(exist_ok=True)


@pytest.mark.parametrize(
    "error", [urllib.error.URLError("no route"), RuntimeError("Error downloading:\nno route"), OSError("no route")]
)
def test_failed_download_is_one_line(monkeypatch, tmp_path, error):
    def fake(*args, **kwargs):
        raise error

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fake)
    with pytest.raises(ValueError) as caught:
        build_dataset("cifar10", data_path=tmp_path)
    text = str(caught.value)
    assert "\n" not in text and "Traceback" not in text
    assert all(word in text for word in ("CIFAR10", "no route", str(tmp_path), "cifar-10-batches-py", "data_path"))


# ---------------------------------------------------------------- image folders


@pytest.mark.parametrize("prefix", ["", "train"])
def test_class_folders(tmp_path, prefix):
    save(tmp_path / prefix / "b" / "deep" / "x.PNG", color=(0, 0, 255))
    save(tmp_path / prefix / "a" / "2.png")
    save(tmp_path / prefix / "a" / "1.jpg")
    save(tmp_path / prefix / "übung 猫" / "1.webp")
    (tmp_path / prefix / "a" / "notes.txt").write_text("not an image")
    ds = folder(tmp_path)
    assert ds.classes == ["a", "b", "übung 猫"] and ds.num_classes == 3
    assert (ds.channels, ds.img_size, ds.flip) == (3, 8, True)
    assert [ds[i][1:] for i in range(len(ds))] == [(0, 0), (0, 1), (1, 2), (2, 3)]
    image = ds[2][0]
    assert image.dtype == torch.uint8 and image.shape == (3, 8, 8) and image.is_contiguous()
    assert image[:, 0, 0].tolist() == [0, 0, 255]
    with pytest.raises(IndexError):
        ds[4]


@pytest.mark.parametrize("prefix", ["", "train"])
def test_flat_folder_is_one_class(tmp_path, prefix):
    save(tmp_path / prefix / "1.png")
    save(tmp_path / prefix / "0.png", color=(0, 0, 0))
    (tmp_path / prefix / "empty").mkdir()
    ds = folder(tmp_path)
    assert ds.num_classes == 1 and [ds[i][1:] for i in range(len(ds))] == [(0, 0), (0, 1)]
    assert ds[0][0].max() == 0  # sorted by name


def test_val_split(tmp_path):
    save(tmp_path / "train" / "a" / "0.png")
    with pytest.raises(ValueError, match="val"):
        folder(tmp_path, split="val")
    save(tmp_path / "val" / "b" / "0.png")
    assert folder(tmp_path, split="val").classes == ["b"]
    assert folder(tmp_path).classes == ["a"]
    assert folder(tmp_path, img_size=None).img_size == 256


def test_empty_classes_and_stray_images_are_named(tmp_path):
    save(tmp_path / "b" / "0.png")
    save(tmp_path / "stray.png")
    (tmp_path / "a").mkdir()
    (tmp_path / "c" / "d").mkdir(parents=True)
    with pytest.warns(UserWarning) as caught:
        ds = folder(tmp_path)
    texts = [str(w.message) for w in caught]
    assert len(texts) == 2 and texts[0].endswith(": a, c") and texts[1].startswith("1 images outside")
    assert ds.classes == ["b"] and ds[0][1] == 0 and len(ds) == 1


def test_nothing_usable_is_one_line(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="no images") as error:
        folder(tmp_path)
    assert str(tmp_path) in str(error.value)
    (tmp_path / "a" / "0.png").write_bytes(b"x")
    (tmp_path / "a" / "1.png").write_bytes(b"x")
    with pytest.warns(UserWarning, match="broken image"), pytest.raises(ValueError, match="all 2 files") as error:
        folder(tmp_path)
    assert str(tmp_path) in str(error.value)
    with pytest.raises(ValueError, match="no image folder"):
        folder(tmp_path / "a" / "0.png")


# ---------------------------------------------------------------- broken images


def test_broken_images_are_named_once_and_replaced(broken_folder):
    with pytest.warns(UserWarning) as caught:
        ds = folder(broken_folder)
        before = ds.num_broken
        first = [ds[i] for i in range(5)]
        second = [ds[i] for i in (4, 1, 2, 0, 3)]
    texts = [str(w.message) for w in caught]
    assert before == 0 and ds.num_broken == 3 and len(texts) == 3
    assert all(sum(name in text for text in texts) == 1 for name in ("a/1.png", "a/2.jpg", "b/4.png"))
    assert [label for _, label, _ in first] == [0, 0, 0, 1, 1] and [i for *_, i in first] == list(range(5))
    assert [int(image[0, 0, 0]) for image, *_ in first] == [100, 100, 100, 200, 200]
    for image, label, i in second:
        assert label == first[i][1] and torch.equal(image, first[i][0])


def test_broken_images_over_workers(broken_folder, tmp_path, monkeypatch):
    log = tmp_path / "warnings.txt"

    def show(message, *args, **kwargs):
        with log.open("a") as file:
            file.write(f"{message}\n")

    ds = folder(broken_folder)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", show)  # forked workers inherit it
        # Worker 0 meets 1.png and 2.jpg, worker 1 meets 4.png: no file is first read by both at once.
        loader = DataLoader(ds, batch_sampler=[[0, 1, 2], [3, 4]], num_workers=2, multiprocessing_context="fork")
        epochs = [[labels.tolist() for _, labels, _ in loader] for _ in range(2)]
    assert epochs == [[[0, 0, 0], [1, 1]]] * 2
    assert ds.num_broken == 3 and len(log.read_text().splitlines()) == 3


def test_broken_count_crosses_spawn(broken_folder):
    ds = folder(broken_folder)
    # What spawn does to hand a dataset to a worker, without the seconds of starting one.
    other = pickle.loads(multiprocessing.reduction.ForkingPickler.dumps(ds))
    with pytest.warns(UserWarning, match="broken image"):
        other[1]
    assert ds.broken[1] and torch.equal(ds.broken, other.broken)
    ds.set_epoch(3, 5)
    assert other.when.tolist() == [3, 5]


@pytest.fixture
def half_broken(tmp_path):
    """Class a: 12 images, numbered by their red value, with a broken one before each; class b: 3 broken files."""
    for i in range(12):
        (tmp_path / "a" / f"{i:02d} 0.png").parent.mkdir(exist_ok=True)
        (tmp_path / "a" / f"{i:02d} 0.png").write_bytes(b"x")
        save(tmp_path / "a" / f"{i:02d} 1.png", color=(i, 0, 0))
    (tmp_path / "b").mkdir()
    for i in range(3):
        (tmp_path / "b" / f"{i}.png").write_bytes(b"x")
    return tmp_path


def draws(ds, epoch, order, seed=7):
    """{index: (red, label)} of the images, read in this order."""
    ds.set_epoch(seed, epoch)
    return {i: (int(ds[i][0][0, 0, 0]), ds[i][1]) for i in order}


@pytest.mark.filterwarnings("ignore:broken image skipped")
def test_stand_ins_spread_over_the_class_and_depend_on_seed_epoch_and_index_only(half_broken):
    ds = folder(half_broken)
    broken = range(0, 24, 2)
    seen = [draws(ds, epoch, broken) for epoch in range(20)]
    counts = np.bincount([red for epoch in seen for red, _ in epoch.values()], minlength=12)
    assert counts.min() >= 4 and counts.max() <= 40  # 240 draws over 12 images
    assert all(label == 0 for epoch in seen for _, label in epoch.values())
    # whatever was met before, in whatever order, in another process's copy
    assert draws(folder(half_broken), 4, reversed(range(24))) == seen[4] | draws(ds, 4, range(1, 24, 2))
    assert draws(ds, 4, broken, seed=8) != seen[4] != seen[5]
    ds.set_epoch(7, 5)
    still = ds.as_reference()
    assert [int(still[i][0][0, 0, 0]) for i in broken] == [red for red, _ in draws(ds, 0, broken, seed=0).values()]
    assert all(label == 0 for _, label in draws(ds, 0, range(24, 27)).values())  # b has nothing to read


@pytest.mark.filterwarnings("ignore:broken image skipped")
def test_workers_that_stay_hear_of_the_epoch(half_broken):
    ds = folder(half_broken)
    loader = DataLoader(ds, batch_size=6, num_workers=2, persistent_workers=True, multiprocessing_context="fork")
    for epoch in range(3):
        expected = list(draws(folder(half_broken), epoch, range(27)).values())
        ds.set_epoch(7, epoch)
        assert [(int(x[0, 0, 0]), int(y)) for images, labels, _ in loader for x, y in zip(images, labels)] == expected


def test_links_to_nothing_are_broken_images(tmp_path):
    """In class folders as beside each other, and counted in the hash as files of any other length are."""
    save(tmp_path / "x" / "0.png")
    (tmp_path / "x" / "dangling.png").symlink_to(tmp_path / "nothing.png")
    (tmp_path / "x" / os.fsdecode(b"\xff.png")).symlink_to("nothing.png")
    for place in (tmp_path, tmp_path / "x"):
        with pytest.warns(UserWarning, match="broken image skipped"):
            ds = folder(place)
            assert len(ds) == 3 == sum(1 for _ in ds) and ds.num_broken == 2
        hashed = reference_hash(ds)
        assert len(hashed) == 16 and hashed == reference_hash(folder(place))
