"""Which files below a folder are images and which folders classes: util/images/folders.py."""

import os
import shutil

import pytest

import main_mar
from scripts import cache_latents
from tests.helpers_latents import CACHE, SMALL, TRAIN, cache, refused
from tests.test_data import folder, save
from util.images.folders import find_images, looks_like_split, walk
from util.images.latents import open_latents
from util.images.reading import Reading

# ---------------------------------------------------------------- hidden and system files

SYSTEM_FOLDERS = ["__MACOSX", "@eaDir", ".ipynb_checkpoints", ".thumbnails", ".@__thumb", "$RECYCLE.BIN", ".git"]


@pytest.mark.parametrize("below", ["", "train"])
@pytest.mark.parametrize("place", [".", "a", "a/deep", "a/deep/er"])
def test_what_systems_leave_are_no_images_and_no_classes(tmp_path, below, place):
    root = tmp_path / below
    for name in ("a/0.png", "a/deep/1.png", "a/deep/er/2.png", "b/3.png"):
        save(root / name)
    for name in SYSTEM_FOLDERS:
        save(root / place / name / "a" / "0.png")
        save(root / place / name / "0.png")
    for name in ("._0.png", ".hidden.png", ".DS_Store", "Thumbs.db", "desktop.ini"):
        (root / place / name).write_bytes(b"x")
    ds = folder(tmp_path)
    assert ds.classes == ["a", "b"]
    assert [os.path.relpath(path, root) for path, _ in ds.samples] == ["a/0.png", "a/deep/1.png", "a/deep/er/2.png",
                                                                      "b/3.png"]  # fmt: skip
    assert "skipped" not in ds.layout and ds.num_broken == 0


def test_twins_of_a_mac_beside_plain_images(tmp_path):
    for i in range(5):
        save(tmp_path / f"{i}.png")
        (tmp_path / f"._{i}.png").write_bytes(b"\0\5\x16\7")
    assert len(folder(tmp_path)) == 5 and folder(tmp_path).classes == ["all"]


@pytest.mark.parametrize("target", [".", "..", "../..", "../b", "deep"])
def test_links_that_lead_back_are_no_images_and_no_classes(tmp_path, target):
    root = tmp_path / "data"
    for name in ("a/0.png", "a/deep/1.png", "b/2.png"):
        save(root / name)
    (root / "a" / "back").symlink_to(target)
    (root / "back").symlink_to(root / "a" / target)
    ds = folder(root)
    assert ds.classes == ["a", "b"] and len(ds) == 3


def test_links_to_elsewhere_are_followed(tmp_path):
    save(tmp_path / "store" / "cats" / "0.png")
    save(tmp_path / "data" / ".store" / "1.png")  # as data managers keep files
    (tmp_path / "store" / "cats" / "again").symlink_to(tmp_path / "store" / "cats")
    for name, target in (("a", "store/cats"), ("b", "data/.store"), ("c", "store/cats")):
        (tmp_path / "data" / name).symlink_to(tmp_path / target)
    (tmp_path / "data" / "itself").symlink_to(tmp_path / "data" / "itself")
    ds = folder(tmp_path / "data")
    assert [label for _, label in ds.samples] == [0, 1, 2] and ds.classes == ["a", "b", "c"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX")
def test_a_pipe_is_no_image(tmp_path):
    save(tmp_path / "a" / "0.png")
    os.mkfifo(tmp_path / "a" / "1.png")
    assert len(folder(tmp_path)) == 1


def test_folders_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    save(tmp_path / "a" / "0.png")
    save(tmp_path / "b" / "0.png")
    scandir = os.scandir

    def refusing(place):
        if str(place).endswith("b"):
            raise PermissionError(13, "Permission denied")
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.warns(UserWarning, match="folder skipped: .*b .Permission denied"):
        assert len([files for *_, files in walk(tmp_path)]) == 2


def test_a_cache_that_a_mac_copied_opens(pictures, tmp_path):
    made = cache(pictures, tmp_path / "c", "--format", "npz")
    count = len(open_latents(made))
    for path in list(made.rglob("*.npz")):
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7")
    assert len(open_latents(made)) == count
    (made / "index.json").unlink()
    (made / "settings.json").unlink()  # now it is one of MAR's
    assert len(open_latents(made, 8)) == count


# ---------------------------------------------------------------- splits


@pytest.mark.parametrize(
    "name",
    "train Train TRAIN training val Val valid validation test Testing eval images_train train_images val2017 "
    "test_set trainset data-val images.test train-split test1".split(),
)
def test_names_of_splits(name):
    assert looks_like_split(name)


@pytest.mark.parametrize(
    "name", "trains trainer valley value tests_of_time contest evaluate images cat 7 train_cat".split()
)
def test_names_of_classes(name):
    assert not looks_like_split(name)


@pytest.mark.parametrize(
    "names",
    [("Train", "Val"), ("training", "validation", "test"), ("images_train", "images_val"), ("cat", "test"),
     ("images/train", "images/val"), ("cat/train", "cat/test", "dog/train", "dog/test")],
)  # fmt: skip
def test_splits_are_no_classes(tmp_path, names):
    for name in names:
        save(tmp_path / name / "x" / "0.png")
    with pytest.raises(ValueError, match="look like splits") as error:
        folder(tmp_path)
    text = str(error.value)
    assert "\n" not in text and "--split_dir" in text and "rename" in text and str(tmp_path) in text
    first = text.split("such as --split_dir ")[1].split(" ")[0]
    assert folder(tmp_path, reading=Reading(split_dir=first)).classes == ["x"]
    assert len(folder(tmp_path, reading=Reading(split_dir="."))) == len(names)


def test_a_split_folder_that_is_not_there_names_those_that_are(tmp_path):
    save(tmp_path / "Train" / "x" / "0.png")
    with pytest.raises(ValueError, match="--split_dir train2: no image folder .*train2; the folders .* are Train$"):
        folder(tmp_path, reading=Reading(split_dir="train2"))
    with pytest.raises(ValueError, match="no image folder .*val; the folders"):
        folder(tmp_path, split="val", reading=Reading(split_dir="Train"))


def test_one_nested_split_name_may_be_a_thing(tmp_path):
    for name in ("vehicles/train", "vehicles/bus", "animals/cat"):
        save(tmp_path / name / "0.png")
    assert folder(tmp_path).classes == ["animals", "vehicles"]


# ---------------------------------------------------------------- what was recognised


def test_the_layout_is_one_line(tmp_path):
    for name in ("train/a/0.png", "train/a/1.png", "train/line\nbreak/0.png", "val/a/0.png", "more/0.png"):
        save(tmp_path / name)
    for name in ("train/a/x.txt", "train/a/y.TXT", "train/z.json", "train/README"):
        (tmp_path / name).write_text("x")
    assert folder(tmp_path).layout == (
        f"3 images in {tmp_path}/train: 2 classes (a, line\\nbreak), 1 to 2 each; "
        "skipped: 2 .txt, 1 .json, 1 without ending; not read: more"
    )
    for i in range(6):
        save(tmp_path / "train" / f"c{i}" / "0.png")
    assert "8 classes (a, c0, c1, c2, c3, 3 more)" in find_images(tmp_path / "train").layout()
    with pytest.raises(ValueError, match=r"no images in .* \(only .md files\)"):
        (tmp_path / "e").mkdir()
        (tmp_path / "e" / "x.md").write_text("x")
        folder(tmp_path / "e")


def test_training_and_caching_print_it_once(pictures, tmp_path, capsys):
    copy = tmp_path / "data"
    shutil.copytree(pictures / "train", copy / "Train")
    shutil.copytree(pictures / "train", copy / "Val")
    flags = ["--data_path", copy, "--output_dir", tmp_path / "out"]
    assert "--split_dir Train" in refused(main_mar.main, capsys, *SMALL, *TRAIN, *flags)
    assert "--split_dir Train" in refused(
        cache_latents.main, capsys, *CACHE, *flags[:2], "--cached_path", tmp_path / "c"
    )
    assert not (tmp_path / "out").exists() and not (tmp_path / "c").exists()
    assert main_mar.main([*SMALL, *TRAIN, *map(str, flags), "--split_dir", "Train", "--epochs", "1"]) == 0
    assert capsys.readouterr().out.count(f"13 images in {copy / 'Train'}: 3 classes") == 1
    cache(copy, tmp_path / "c", "--split_dir", "Train")
    assert capsys.readouterr().out.count(f"13 images in {copy / 'Train'}: 3 classes") == 1


@pytest.mark.parametrize(
    "folders, said, not_said",
    [
        (("train/test", "train/other"), "(--split_dir train takes all as classes)", "such as"),
        (("training", "validation", "test"), "such as --split_dir training (", "such as --split_dir test"),
        (("train/train", "train/val"), "such as --split_dir train/train (", "--split_dir ."),
    ],
)
def test_the_way_out_of_splits_leads_to_the_images(folders, said, not_said, tmp_path):
    for name in folders:
        (tmp_path / name).mkdir(parents=True)
        save(tmp_path / name / "0.png")
    with pytest.raises(ValueError) as error:
        folder(tmp_path)
    assert said in str(error.value) and not_said not in str(error.value)
