"""What programs write does not lie among the images that they read (util/images/folders.py, check_output_folder)."""

import shutil

import pytest

import main_mar
import sample
from scripts import cache_latents, measure_reconstruction, train_tokenizer
from tests.helpers_latents import CACHE, SMALL, TRAIN, cache, content, refused
from tests.test_data import save
from tests.test_reading_settings import train
from util.images.folders import check_output_folder

TOKENIZER = "--img_size 8".split()
PROGRAMS = {
    "main_mar": (main_mar.main, [*SMALL, *TRAIN], "output_dir"),
    "log_dir": (main_mar.main, [*SMALL, *TRAIN, "--output_dir", "elsewhere"], "log_dir"),
    "cache_latents": (cache_latents.main, CACHE, "cached_path"),
    "train_tokenizer": (train_tokenizer.main, TOKENIZER, "output_dir"),
    "measure_reconstruction": (measure_reconstruction.main, [*TOKENIZER, "--tokenizer", "pixel"], "output_dir"),
}


@pytest.mark.parametrize("below", [".", "train", "train/7", "train/a b/new/deep"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_writes_nothing_among_the_images_it_reads(program, below, some, tmp_path, monkeypatch, capsys):
    main, flags, name = PROGRAMS[program]
    monkeypatch.chdir(tmp_path)
    before = content(tmp_path)
    place = some / below
    line = refused(main, capsys, *flags, "--data_path", "some", f"--{name}", place)
    assert line.startswith(f"error: --{name} {place} is in ") and "choose a folder outside" in line
    assert content(tmp_path) == before and not (some / "train/a b/new").exists()


def test_sampling_writes_nothing_among_the_images_of_its_checkpoint_or_flag(some, tmp_path, capsys):
    run, other = train(some, tmp_path / "run"), tmp_path / "other"
    shutil.copytree(some / "train", other)  # classes without a split
    before = content(some), content(other)
    flags = "--metrics none --num_images 2 --num_iter 1 --num_sampling_steps 1 --checkpoint".split()
    for place in (some, some / "train" / "7" / "new"):
        assert f"{place} is in {some}" in refused(sample.main, capsys, *flags, run, "--output_dir", place)
    for place in (other, other / "new"):
        argv = [*flags, run, "--output_dir", place, "--data_path", other]
        assert f"{place} is in {other}" in refused(sample.main, capsys, *argv)
    place = some / "train" / "7" / "new"  # what was trained on, though something else is measured with
    argv = [*flags, run, "--output_dir", place, "--data_path", other]
    assert f"{place} is in {some}" in refused(sample.main, capsys, *argv)
    assert (content(some), content(other)) == before
    assert sample.main([*map(str, [*flags, run, "--output_dir", some / "samples"])]) == 0  # beside train: not read


def test_training_writes_nothing_among_the_latents_it_reads(pictures, tmp_path, capsys):
    made = cache(pictures, tmp_path / "c", "--format", "npz")
    before = content(made)
    for place in (made, made / "7", made / "run"):
        flags = ["--use_cached", "--cached_path", made, "--output_dir", place]
        assert f"--output_dir {place} is in {made}" in refused(main_mar.main, capsys, *SMALL, *TRAIN, *flags)
    assert content(made) == before


def test_which_folders_are_read(tmp_path):
    """Splits, the folder of --split_dir, links to classes; beside them, and in data sets without folders, all goes."""
    for name in ("data/train/a/0.png", "data/val/a/0.png", "data/Other/a/0.png", "store/b/0.png"):
        save(tmp_path / name)
    (tmp_path / "data" / "train" / "b").symlink_to(tmp_path / "store" / "b")
    data = tmp_path / "data"

    def may(place, split_dir=None, name="imagefolder", data_path=data):
        try:
            check_output_folder("output_dir", str(tmp_path / place), name, data_path and str(data_path), split_dir)
        except ValueError as error:
            assert "\n" not in str(error)
            return False
        return True

    assert not any(may(place) for place in ("data", "data/train/x", "data/val/a/x", "store/b/x", "data/Other/../train"))
    assert all(may(place) for place in ("data/x", "data/Other/x", "store/x", ".", "data2"))
    assert may("data/train/x", "Other") and not may("data/Other/x", "Other") and not may("data/x", ".")
    assert may("data/x", "missing") and may("x/y", data_path=tmp_path / "x")  # refused when it is to be read
    assert may("data/train", name="cifar10") and may("data/train", data_path=None)
    (tmp_path / "link").symlink_to(data / "train")
    assert not may("link/x")
    (tmp_path / "file").write_text("x")
    assert not may("file/x", data_path=None)  # as check_folder has it
