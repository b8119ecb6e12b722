"""How images are read, from the flags to training, metrics, caches and checkpoints (util/images/reading.py)."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image

import main_mar
import sample
from scripts import cache_latents
from tests.helpers_latents import CACHE, FORMATS, NAMES, SMALL, TRAIN, cache, content, losses, refused
from training.build import as_cached
from training.config import resolve
from util.checkpoint import load_checkpoint, save_checkpoint
from util.evaluation import protocol
from util.images.datasets import broken_note, build_dataset
from util.images.latents import open_latents
from util.images.reading import MARS_WAY, Reading

OTHER = {"--value_range": "0,4095", "--no_exif": None, "--background": "1,2,3"}
FLAGS = [text for pair in OTHER.items() for text in pair if text]
READ = Reading(value_range="0,4095", exif=False, background="1,2,3")


def train(data, out, *flags):
    argv = [*SMALL, *TRAIN, "--epochs", "1", "--data_path", str(data), "--output_dir", str(out), *map(str, flags)]
    assert main_mar.main(argv) == 0
    return out


@pytest.fixture
def readings(monkeypatch):
    """The settings with which the metrics' references are read."""
    noted, build = [], build_dataset

    def noting(*args, reading, **kwargs):
        noted.append(reading)
        return build(*args, reading=reading, **kwargs)

    monkeypatch.setattr(protocol, "build_dataset", noting)
    return noted


def measure(run, out, *flags):
    argv = "--metrics fid --features digits --num_images 4 --num_iter 1 --num_sampling_steps 1".split()
    assert sample.main(["--checkpoint", str(run), "--output_dir", str(out), *argv, *map(str, flags)]) == 0
    (line,) = (out / "results.jsonl").read_text().splitlines()
    return json.loads(line)


def test_sampling_reads_its_reference_as_training_read_it(some, tmp_path, readings):
    (some / "train").rename(some / "Train")
    run = train(some, tmp_path / "run", *FLAGS, "--split_dir", "Train", "--no_flip")
    expected = asdict(READ) | {"split_dir": "Train", "flip": False}
    assert load_checkpoint(run)["config"]["data"]["reading"] == expected
    measure(run, tmp_path / "one")
    (some / "Train").rename(some / "train")  # as another folder may have it
    measure(run, tmp_path / "two", "--data_path", some)
    assert [asdict(reading) for reading in readings] == [expected, expected | {"split_dir": None}]


def test_old_checkpoints_keep_their_reference(some, tmp_path, readings):
    """They were read in MAR's way, and so is the reference; its hash is the one that old results have."""
    run = train(some, tmp_path / "run")
    before = measure(run, tmp_path / "new")["reference"]
    stored = load_checkpoint(run)
    del stored["config"]["data"]["reading"]
    save_checkpoint(tmp_path / "copy", stored)
    images = build_dataset("imagefolder", data_path=some, img_size=8, reading=MARS_WAY)
    row = measure(tmp_path / "copy", tmp_path / "old")
    assert readings == [Reading(), MARS_WAY]
    assert row["reference"] == protocol.reference_hash(images) != before
    stored["config"]["data"]["reading"] = {"exif": "yes"}
    save_checkpoint(tmp_path / "copy", stored)
    with pytest.raises(ValueError, match="damaged: its exif is 'yes'"):
        measure(tmp_path / "copy", tmp_path / "bad")


def test_settings_as_words():
    assert Reading().flags() == [] and MARS_WAY.flags() == ["--no_exif", "--background", "none"]
    config = resolve({"data_path": "x", "split_dir": "a b", "flip": False})
    assert config.data.reading.flags() == ["--split_dir", "a b", "--no_flip"]


def test_a_run_that_goes_on_says_what_is_read_differently(some, tmp_path, capsys):
    content, old = load_checkpoint(train(some, tmp_path / "run")), load_checkpoint(tmp_path / "run")
    for name in asdict(READ):
        del old["args"][name]
    for stored, flags, line in (
        (old, [], "changed since the checkpoint: --exif False -> True, --background none -> white"),
        (old, ["--no_exif", "--background", "none"], None),
        (content, [], None),
        (content, ["--background", "black"], "changed since the checkpoint: --background white -> black"),
    ):
        save_checkpoint(tmp_path / "copy", stored)
        capsys.readouterr()
        train(some, tmp_path / "out", "--resume", tmp_path / "copy", *flags)
        said = [text for text in capsys.readouterr().out.splitlines() if text.startswith("changed")]
        assert said == ([line] if line else [])


def test_metrics_during_training_read_as_training_reads(some, tmp_path, readings):
    flags = "--online_eval --metrics fid --features digits --num_images 4 --eval_split val --cfg 1".split()
    (some / "train").rename(some / "data")
    for name in ("train", "val"):
        (some / name).symlink_to(some / "data")
    train(some, tmp_path / "run", *FLAGS, *flags)
    assert readings and set(readings) == {READ}


# ---------------------------------------------------------------- caches


@pytest.mark.parametrize("flags", [["--value_range", "0,9"], ["--no_exif"], ["--background", "none"], ["--no_flip"]])
def test_a_cache_read_in_another_way_is_refused(pictures, tmp_path, capsys, flags):
    made = cache(pictures, tmp_path / "c")
    before = content(made)
    line = refused(cache_latents.main, capsys, *CACHE, "--data_path", pictures, "--cached_path", made, *flags)
    name = flags[0].removeprefix("--").removeprefix("no_")
    assert f"other latents ({name} " in line and content(made) == before


def as_old(folder):
    """A cache as it was before these settings."""
    images = build_dataset("imagefolder", data_path=folder.parent / "some", img_size=8, reading=MARS_WAY)
    for name in ("settings.json", "index.json"):
        stored = json.loads((folder / name).read_text())
        del stored["reading"]
        stored["images"] = protocol.reference_hash(images)
        (folder / name).write_text(json.dumps(stored))


def save_rgba(path, rng):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (8, 8, 4), dtype=np.uint8)).save(path)


@pytest.mark.parametrize("style", FORMATS)
def test_an_old_cache_opens_and_goes_on_in_mars_way(some, tmp_path, capsys, style):
    made = cache(some, tmp_path / "c", "--format", style)
    as_old(made)
    assert open_latents(made).reading == MARS_WAY and open_latents(made).flip
    stored, argv = content(made), [*CACHE, "--data_path", some, "--cached_path", made, "--format", style]
    argv = [*map(str, argv)]
    for flag, line in (("--exif", "exif False instead of True"), ("--background=white", "'none' instead of 'white'")):
        assert line in refused(cache_latents.main, capsys, *argv, flag)
    assert content(made) == stored and "MAR's way" not in capsys.readouterr().out
    for flags in ([], ["--no_exif", "--background", "none"]):
        assert cache_latents.main([*argv, *flags, "--dry_run"]) == 0
        shown = json.loads(capsys.readouterr().out)
        assert (shown["exif"], shown["background"]) == (False, "none")
        assert cache_latents.main([*argv, *flags]) == 0
        said = f"{made} does not say how its images were read: it goes on in MAR's way, --no_exif --background none\n"
        assert said in capsys.readouterr().out


def test_what_is_left_of_an_old_cache_is_read_in_mars_way(tmp_path):
    """A transparent picture has its hidden colours in the file that is made anew, as in the others."""
    data, rng = tmp_path / "some", np.random.default_rng(0)
    for i in range(12):
        save_rgba(data / "train" / "a" / f"{i}.png", rng)
    made = cache(data, tmp_path / "c", "--no_exif", "--background", "none")
    whole = content(made)
    as_old(made)
    (made / "shard-00001.npy").unlink()
    (made / "index.json").unlink()
    cache(data, made)
    for name in ("shard-00001.npy", "index.json"):
        assert content(made)[name] == whole[name]
    assert content(cache(data, tmp_path / "new"))["shard-00001.npy"] != whole["shard-00001.npy"]


@pytest.mark.parametrize("value", [["exif"], {"exif": 3}])
def test_a_damaged_note_about_reading_continues_nothing(pictures, tmp_path, capsys, value):
    made = cache(pictures, tmp_path / "c")
    stored = json.loads((made / "settings.json").read_text()) | {"reading": value}
    (made / "settings.json").write_text(json.dumps(stored))
    line = refused(cache_latents.main, capsys, *CACHE, "--data_path", pictures, "--cached_path", made)
    assert "settings.json is damaged" in line


def test_old_caches_of_other_data_go_on(tmp_path):
    flags = ["--batch_size", "512", "--cached_path", str(tmp_path / "c")]
    assert cache_latents.main(flags) == 0 and open_latents(tmp_path / "c").reading is None
    for name in ("settings.json", "index.json"):
        stored = json.loads((tmp_path / "c" / name).read_text())
        del stored["reading"]
        (tmp_path / "c" / name).write_text(json.dumps(stored))
    assert cache_latents.main(flags) == 0


@pytest.mark.parametrize("style", FORMATS)
def test_a_cache_remembers_how_it_was_read_and_whether_it_may_be_mirrored(pictures, tmp_path, readings, style):
    made = cache(pictures, tmp_path / "c", "--format", style, "--no_flip", *FLAGS)
    assert not open_latents(made).flip and open_latents(made).reading == Reading(**asdict(READ) | {"flip": False})
    run = train(pictures, tmp_path / "run", "--use_cached", "--cached_path", made, "--online_eval", "--metrics", "fid",
                "--features", "digits", "--num_images", 4, "--cfg", 1)  # fmt: skip
    assert {reading.background for reading in readings} == {"1,2,3"}
    assert load_checkpoint(run)["config"]["data"]["reading"]["background"] == "1,2,3"


def test_flags_that_a_cache_contradicts_are_refused(pictures, tmp_path, capsys):
    made = cache(pictures, tmp_path / "c")
    flags = ["--use_cached", "--cached_path", made, "--output_dir", tmp_path / "out"]
    line = refused(main_mar.main, capsys, *SMALL, *TRAIN, *flags, "--background", "red")
    assert f"{made} were made with --background white, not red" in line and not (tmp_path / "out").exists()
    given = resolve({"use_cached": True, "cached_path": str(made), "flip": False})
    assert not as_cached(given.data, open_latents(made), 8).flip


def test_a_damaged_note_about_reading_is_one_line(pictures, tmp_path, capsys):
    made = cache(pictures, tmp_path / "c")
    for value in (["exif"], {"exif": 3}, {"background": "blueish"}):
        index = json.loads((made / "index.json").read_text()) | {"reading": value}
        (made / "index.json").write_text(json.dumps(index))
        refused(cache_latents.main, capsys, "--cached_path", made, "--verify")


# ---------------------------------------------------------------- mirroring, broken images


def test_without_mirroring_images_are_trained_on_as_they_are(tmp_path, monkeypatch):
    """Pictures that are their own mirror images give the same losses either way, others do not."""
    rng = np.random.default_rng(0)
    for kind in ("same", "other"):
        for i in range(8):
            half = rng.integers(0, 256, (8, 4, 3), dtype=np.uint8)
            other = half[:, ::-1] if kind == "same" else 255 - half
            (tmp_path / kind).mkdir(exist_ok=True)
            Image.fromarray(np.concatenate([half, other], axis=1)).save(tmp_path / kind / f"{i}.png")
    found = {}
    for kind in ("same", "other"):
        for flag in ("--flip", "--no_flip"):
            flags = ["--data_path", tmp_path / kind, "--epochs", 1, flag]
            found[kind, flag] = losses(monkeypatch, tmp_path / f"{kind}{flag}", *flags)
    assert found["same", "--flip"] == found["same", "--no_flip"]
    assert found["other", "--flip"] != found["other", "--no_flip"]


def test_what_is_said_of_broken_images():
    assert broken_note(0, 100) == ""
    assert broken_note(1, 100) == "1 of 100 images are broken: 1.00% of the draws were of others of their class"
    assert broken_note(2, 100).startswith("warning: 2 of 100 images are broken: 2.00% ") and "1%" in broken_note(2, 100)


@pytest.mark.filterwarnings("ignore:broken image skipped")
def test_a_run_with_broken_images_is_the_same_whoever_reads_them(some, tmp_path, monkeypatch, capsys):
    for name in NAMES[1:4]:
        (some / "train" / name).write_text("no picture")
    one = losses(monkeypatch, tmp_path / "one", "--data_path", some)
    out = capsys.readouterr().out  # after the first epoch and after the last
    assert out.count("warning: 3 of 13 images are broken: 23.08% of the draws") == 2
    assert losses(monkeypatch, tmp_path / "two", "--data_path", some, "--num_workers", 2) == one
