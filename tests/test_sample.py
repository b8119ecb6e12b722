"""Sampling from a checkpoint on disk: the files, what is skipped, what is made again.

One tiny checkpoint, trained for a handful of steps with --online_eval, serves the whole module.
"""

import argparse
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from main_mar import main as train_main
from models.tokenizers import build_tokenizer
from sampling.run import sample_images
from sampling.settings import FAST, SampleConfig
from tests.helpers import each_rank, on_cpu, tiny_mar
from util import dist
from util.checkpoint import load_checkpoint, save_checkpoint
from util.door import run_main

pytestmark = pytest.mark.on_cpu("runs are compared bit for bit, which a GPU promises with --deterministic alone")

SMALL = "--preset digits --epochs 1 --batch_size 256 --diffloss_w 16 --diffloss_d 1 --diffusion_batch_mul 1".split()
SMALL += "--buffer_size 2 --warmup_epochs 0 --num_iter 2".split()
METRICS = {"fid", "is_mean", "is_std", "kid_mean", "kid_std", "precision", "recall", "svc_accuracy", "frechet_pixels"}
NUM_EVAL = 30


def train_tiny(folder, *flags) -> Path:
    """A checkpoint of a few thousand parameters in folder, made by the training command."""
    assert train_main([*SMALL, "--output_dir", str(folder), *map(str, flags)]) == 0
    return folder


def draw(checkpoint, out, *flags) -> int:
    """sample.py without metrics, for 24 images unless flags say otherwise."""
    usual = "--num_images 24 --eval_bsz 8 --num_iter 3 --num_sampling_steps 3 --metrics none".split()
    return sample.main(["--checkpoint", str(checkpoint), "--output_dir", str(out), *usual, *map(str, flags)])


def rows(out) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def folder_of(out, row=-1) -> Path:
    return out / rows(out)[row]["name"]


def pngs(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if re.fullmatch(r"\d+\.png", p.name)}


def arrays(folder) -> tuple[np.ndarray, np.ndarray]:
    return tuple(sample.load_samples(folder).values())


def assert_alike(a, b):
    """Within one grey level in at least 99.9 % of the pixels, as DESIGN.md section 3 allows."""
    assert a.shape == b.shape and a.dtype == b.dtype == np.uint8
    assert (np.abs(a.astype(int) - b.astype(int)) <= 1).mean() >= 0.999


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    return train_tiny(folder, "--online_eval", "--num_images", NUM_EVAL, "--eval_bsz", 16, "--cfg", 2)


@pytest.fixture(scope="module")
def sampled(checkpoint, tmp_path_factory):
    """OUT of one run of 24 images with three of the ten classes and unconditional images between them."""
    out = tmp_path_factory.mktemp("sampled")
    flags = ["--class_labels", "3,-1,7,0", "--metrics", "fid,isc,kid,prc", "--features", "digits"]
    assert draw(checkpoint, out, *flags) == 0
    return out


# ------------------------------------------------------------------------------------------------ what is written


def test_picture_row_and_label_n_belong_together(sampled):
    folder = folder_of(sampled)
    images, labels = arrays(folder)
    assert images.shape == (24, 8, 8, 1) and images.dtype == np.uint8
    assert labels.tolist() == [3, -1, 7, 0] * 6
    assert pngs(folder).keys() == {f"{i}.png" for i in range(24)}
    for i, image in enumerate(images):
        assert np.array_equal(np.asarray(Image.open(folder / f"{i}.png")), image[:, :, 0])
    assert len(np.unique(images, axis=0)) == 24  # every image has its own draws


def test_the_grid_shows_the_first_images_in_order(sampled):
    folder = folder_of(sampled)
    images, _ = arrays(folder)
    sheet = np.asarray(Image.open(folder / "grid.png").convert("L"))
    zoom, gap, top = 8, 4, 16
    for i in range(20):  # five rows of four classes
        x, y = gap + i % 4 * (64 + gap), gap + i // 4 * (64 + top + gap) + top
        assert np.array_equal(sheet[y : y + 64 : zoom, x : x + 64 : zoom], images[i, :, :, 0])
    assert sheet.shape == (5 * (64 + top + gap) + gap, 4 * (64 + gap) + gap)


def test_a_result_is_one_line_that_says_what_was_measured_on_what(sampled, checkpoint):
    (row,) = rows(sampled)
    assert row["metrics"].keys() == METRICS and all(np.isfinite(v) for v in row["metrics"].values())
    settings = row["settings"]
    assert settings["class_labels"] == [3, -1, 7, 0] and settings["ema"] is True and settings["seed"] == 1
    assert settings["num_iter"] == 3 and settings["cfg"] == 2.0  # a flag; and what the checkpoint was trained with
    assert row["device"] == dist.pick_device("auto").type and row["images_per_second"] > 0 and row["num_made"] == 24
    for key in ("weights", "reference"):
        assert re.fullmatch("[0-9a-f]{16}", row[key])
    assert row["git_commit"] is None or re.fullmatch("[0-9a-f]{40}", row["git_commit"])
    assert Path(row["checkpoint"]).is_file() and Path(row["checkpoint"]).parent == checkpoint


def test_all_classes_in_turn_by_default(checkpoint, tmp_path):
    assert draw(checkpoint, tmp_path) == 0
    assert arrays(folder_of(tmp_path))[1].tolist() == [i % 10 for i in range(24)]


def test_no_metrics_need_neither_images_nor_a_reference(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("util.evaluation.protocol.build_dataset", lambda *a, **k: pytest.fail("the reference was read"))
    assert draw(checkpoint, tmp_path, "--num_images", 1) == 0
    (row,) = rows(tmp_path)
    assert row["metrics"] == {} and row["reference"] is None and len(pngs(folder_of(tmp_path))) == 1


# --------------------------------------------------------------------------------- what an image does not depend on


def test_the_batch_size_does_not_change_the_images(checkpoint, tmp_path):
    for size in (7, 40):
        assert draw(checkpoint, tmp_path / str(size), "--eval_bsz", size, "--num_images", 120) == 0
    seven, forty = (arrays(folder_of(tmp_path / name))[0] for name in ("7", "40"))
    assert_alike(seven, forty)


def test_an_image_depends_on_its_own_label_and_number_only(checkpoint, tmp_path):
    """Image 5 of ten classes in turn is image 5 of class 5 alone, whatever stands around it."""
    assert draw(checkpoint, tmp_path / "all", "--num_images", 120) == 0
    assert draw(checkpoint, tmp_path / "five", "--num_images", 120, "--class_labels", 5) == 0
    everything, five = (arrays(folder_of(tmp_path / name))[0] for name in ("all", "five"))
    assert_alike(everything[5::10], five[5::10])
    assert not np.array_equal(everything, five)  # and the label does count


def test_two_processes_make_together_the_files_of_one(tmp_path, monkeypatch):
    mar, tokenizer = tiny_mar(), build_tokenizer("pixel", channels=1)
    sampling = SampleConfig(cfg=2.0, num_iter=4, num_sampling_steps=3)
    labels = [i % 3 for i in range(22)]

    def run(folder):
        return sample_images(on_cpu(mar, tokenizer), sampling, labels, 5, folder, batch_size=4)["num_made"]

    assert run(tmp_path / "one") == 22
    made = []
    for _ in each_rank(monkeypatch):
        made.append(run(tmp_path / "two"))
        assert len(pngs(tmp_path / "two")) == sum(made)  # each its own share, none of the other's
    assert made == [12, 10]
    assert pngs(tmp_path / "one") == pngs(tmp_path / "two")


# -------------------------------------------------------------------------------------- what is there is not redone


def state_of(out):
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in out.rglob("*") if p.is_file()}


def test_a_result_that_is_there_is_skipped(checkpoint, tmp_path, monkeypatch, capsys):
    assert draw(checkpoint, tmp_path) == 0
    before = state_of(tmp_path)
    monkeypatch.setattr(sample, "evaluate", lambda *a, **k: pytest.fail("sampled again"))
    assert draw(checkpoint, tmp_path) == 0
    assert state_of(tmp_path) == before and "already in" in capsys.readouterr().out


def test_settings_of_the_checkpoint_given_by_hand_are_the_same_settings(checkpoint, tmp_path, capsys):
    """Whatever stands in a results line can be spelled out as flags without becoming another setting."""
    base = ["--checkpoint", str(checkpoint), "--output_dir", str(tmp_path)]
    base += "--num_images 4 --metrics none".split()
    assert sample.main(base) == 0
    settings = rows(tmp_path)[0]["settings"]
    known = {k: v for k, v in settings.items() if v is not None and k not in ("ema", "class_labels", "dtype")}
    assert known["num_sampling_steps"] and known["cfg"] and known["num_iter"]
    spelled = [text for k, v in known.items() if v is not False for text in (f"--{k}", str(v))]
    labels = ",".join(map(str, settings["class_labels"]))
    capsys.readouterr()
    assert sample.main([*base, *spelled, "--class_labels", labels]) == 0
    assert len(rows(tmp_path)) == 1
    (picture,) = re.findall("^picture: (.+)$", capsys.readouterr().out, flags=re.M)
    assert Path(picture).is_file()


@pytest.mark.parametrize("flags", [["--seed", "2"], ["--no_ema"], ["--cfg", "1"], ["--order", "raster"]])
def test_another_setting_is_another_line_in_another_folder(sampled, checkpoint, tmp_path, flags):
    assert draw(checkpoint, tmp_path) == 0
    first = pngs(folder_of(tmp_path))
    assert draw(checkpoint, tmp_path, *flags) == 0
    assert len(rows(tmp_path)) == 2 and folder_of(tmp_path, 0) != folder_of(tmp_path, 1)
    assert pngs(folder_of(tmp_path, 0)) == first
    assert pngs(folder_of(tmp_path, 1)) != first


def test_changed_weights_in_the_same_place_replace_the_stale_pictures(checkpoint, tmp_path):
    place, out = tmp_path / "checkpoint", tmp_path / "out"
    content = load_checkpoint(checkpoint)
    save_checkpoint(place, content)
    assert draw(place, out) == 0
    stale = pngs(folder_of(out))
    content["model_ema"] = {k: 1.5 * v for k, v in content["model_ema"].items()}
    save_checkpoint(place, content)
    assert draw(place, out) == 0
    first, second = rows(out)
    assert first["weights"] != second["weights"] and first["settings"] == second["settings"]
    assert second["num_made"] == 24
    assert draw(place, tmp_path / "fresh") == 0
    assert pngs(folder_of(out)) == pngs(folder_of(tmp_path / "fresh")) != stale


def test_no_ema_samples_the_raw_weights(checkpoint, tmp_path):
    content = load_checkpoint(checkpoint)
    assert any(not torch.equal(v, content["model"][k]) for k, v in content["model_ema"].items())
    content["model_ema"] = {k: content["model"][k] for k in content["model_ema"]}
    save_checkpoint(tmp_path / "swapped", content)
    assert draw(tmp_path / "swapped", tmp_path / "a") == 0
    assert draw(checkpoint, tmp_path / "b", "--no_ema") == 0
    assert pngs(folder_of(tmp_path / "a")) == pngs(folder_of(tmp_path / "b"))


def test_int8_is_another_setting_of_the_same_weights(checkpoint, tmp_path, capsys):
    assert draw(checkpoint, tmp_path) == 0
    first = pngs(folder_of(tmp_path))
    assert draw(checkpoint, tmp_path, "--dtype", "int8") == 0
    plain, row = rows(tmp_path)
    assert row["weights"] == plain["weights"] and row["settings"] == plain["settings"] | {"dtype": "int8"}
    assert row["name"] == f"{plain['name']}_int8"
    assert pngs(folder_of(tmp_path, 0)) == first != pngs(folder_of(tmp_path, 1))
    capsys.readouterr()
    assert draw(checkpoint, tmp_path, "--dtype", "int8") == 0
    assert "already in" in capsys.readouterr().out and len(rows(tmp_path)) == 2


def test_fast_says_what_it_computes_in(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sample.fast_dtype", lambda device, width: "bf16")
    for flags, dtype in (((), "bf16"), (("--dtype", "fp32"), "fp32")):
        assert draw(checkpoint, tmp_path, "--fast", *flags) == 0
        assert ("--fast computes in bf16 here" in capsys.readouterr().out) == (dtype == "bf16")
        settings = rows(tmp_path)[-1]["settings"]
        assert settings["dtype"] == dtype and settings["num_sampling_steps"] == 3  # by hand
        assert all(settings[name] == FAST[name] for name in ("solver", "refresh_every"))


@pytest.mark.parametrize("keep", [0, 0.5])
def test_an_unfinished_run_continues_bit_for_bit(checkpoint, tmp_path, keep):
    """Of three batches the first lost a picture, the last has a damaged one; the whole batches are redone."""
    assert draw(checkpoint, tmp_path) == 0
    folder = folder_of(tmp_path)
    before = pngs(folder)
    (tmp_path / "results.jsonl").unlink()
    (folder / "samples.npz").unlink()
    (folder / "2.png").unlink()
    (folder / "17.png").write_bytes(before["17.png"][: int(keep * len(before["17.png"]))])
    times = {i: (folder / f"{i}.png").stat().st_mtime_ns for i in range(8, 16)}
    assert draw(checkpoint, tmp_path) == 0
    assert pngs(folder) == before
    assert times == {i: (folder / f"{i}.png").stat().st_mtime_ns for i in range(8, 16)}
    assert rows(tmp_path)[0]["num_made"] == 16
    assert arrays(folder)[0].shape[0] == 24


def test_a_line_cut_short_by_a_crash_costs_that_line_only(checkpoint, tmp_path):
    assert draw(checkpoint, tmp_path) == 0
    file = tmp_path / "results.jsonl"
    whole = file.read_text()
    file.write_text(whole + whole[: len(whole) // 2])
    assert draw(checkpoint, tmp_path) == 0  # the whole line counts
    assert file.read_text() == whole + whole[: len(whole) // 2]
    assert draw(checkpoint, tmp_path, "--seed", 2) == 0
    first, torn, new = file.read_text().splitlines()
    assert first + "\n" == whole and whole.startswith(torn)
    assert json.loads(new)["settings"]["seed"] == 2


def test_a_metric_that_is_not_finite_is_stored_as_null_and_found_again(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("engine_mar.score", lambda *args: {"fid": float("nan"), "is_mean": 2.0, "is_std": 0.5})
    assert draw(checkpoint, tmp_path) == 0
    assert rows(tmp_path)[0]["metrics"] == {"fid": None, "is_mean": 2.0, "is_std": 0.5}
    capsys.readouterr()
    assert draw(checkpoint, tmp_path) == 0
    assert "already in" in (said := capsys.readouterr().out) and "FID nan  IS 2.00±0.50" in said
    (tmp_path / "results.jsonl").write_bytes((tmp_path / "results.jsonl").read_text().encode("utf-8-sig"))
    assert draw(checkpoint, tmp_path) == 0
    assert "already in" in capsys.readouterr().out


# -------------------------------------------------------------------------------------- other checkpoints and data


def test_a_published_checkpoint_needs_the_model_named(checkpoint, tmp_path, capsys):
    ours = load_checkpoint(checkpoint)
    published = {k: ours[k] for k in ("model", "model_ema", "optimizer", "epoch", "scaler")}
    save_checkpoint(tmp_path / "published", {**published, "args": argparse.Namespace(model="mar_tiny")})
    flags = ["--checkpoint", str(tmp_path / "published"), "--output_dir", str(tmp_path / "out")]
    capsys.readouterr()
    assert run_main(sample.main, flags) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "--model" in lines[0]
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    """Two classes of twelve 8 x 8 RGB images."""
    root, draws = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name in ("dark", "light"):
        (root / "train" / name).mkdir(parents=True)
        for i in range(12):
            pixels = draws.integers(0, 128, (8, 8, 3)) + 127 * (name == "light")
            Image.fromarray(pixels.astype(np.uint8)).save(root / "train" / name / f"{i}.png")
    return root


def test_an_image_folder_is_trained_on_sampled_and_measured(image_folder, tmp_path):
    data = "--data imagefolder --tokenizer pixel --img_size 8 --features digits".split()
    flags = [*data, "--data_path", str(image_folder), "--model", "mar_tiny", "--batch_size", "12"]
    train_tiny(tmp_path / "run", *flags)
    out = tmp_path / "out"
    measured = ("--metrics", "fid", "--features", "digits", "--num_images", 6)
    assert draw(tmp_path / "run", out, *measured) == 0
    images, labels = arrays(folder_of(out))
    assert images.shape == (6, 8, 8, 3) and labels.tolist() == [0, 1] * 3
    assert draw(tmp_path / "run", out, *measured) == 0
    assert len(rows(out)) == 1
    # another reference is another measurement
    other = tmp_path / "other"
    shutil.copytree(image_folder, other)
    (other / "train" / "dark" / "0.png").unlink()
    assert draw(tmp_path / "run", out, *measured, "--data_path", other) == 0
    first, second = rows(out)
    assert first["reference"] != second["reference"]


def test_a_present_result_gets_its_own_pictures_back(checkpoint, tmp_path, capsys):
    """Another checkpoint has its own folder; pictures that were replaced or deleted are made again, bit for bit."""
    out = tmp_path / "out"
    flags = ["--output_dir", str(out), "--num_images", "5", "--metrics", "none"]
    assert sample.main(["--checkpoint", str(checkpoint), *flags]) == 0
    (folder,) = (f for f in out.iterdir() if f.is_dir())
    first = {f.name: f.read_bytes() for f in folder.glob("*.png")}
    content = load_checkpoint(checkpoint)
    for weights in (content["model"], content["model_ema"]):
        weights["diffloss.net.final_layer.linear.bias"] += 0.5
    save_checkpoint(tmp_path / "other", content)
    capsys.readouterr()
    other = ["--checkpoint", str(tmp_path / "other"), *flags]
    assert sample.main([*other, "--dry_run"]) == 0
    (name,) = json.loads(capsys.readouterr().out)["settings"]
    assert sample.main(other) == 0
    assert {f.name: f.read_bytes() for f in folder.glob("*.png")} == first
    apart = {f.name: f.read_bytes() for f in (out / name).glob("*.png")}
    assert name.startswith(f"{folder.name}_weights") and apart.keys() == first.keys() and apart != first
    assert [row["name"] for row in rows(out)] == [folder.name, name]
    assert sample.main(other) == 0 and len(rows(out)) == 2
    run = json.loads((folder / "run.json").read_text())  # as of a time when checkpoints shared a folder
    (folder / "run.json").write_text(json.dumps(run | {"weights": "another's"}))
    (folder / "0.png").write_bytes(first["1.png"])
    assert sample.main(["--checkpoint", str(checkpoint), *flags]) == 0
    assert {f.name: f.read_bytes() for f in folder.glob("*.png")} == first
    (folder / "2.png").unlink()
    (folder / "grid.png").unlink()
    (folder / "99.png").write_bytes(first["1.png"])
    assert sample.main(["--checkpoint", str(checkpoint), *flags]) == 0
    assert {f.name: f.read_bytes() for f in folder.glob("*.png")} == first
    assert len((out / "results.jsonl").read_text().splitlines()) == 2


def test_naming_a_default_rule_is_the_same_setting(checkpoint, tmp_path):
    out = tmp_path / "out"
    flags = ["--checkpoint", str(checkpoint), "--output_dir", str(out), "--num_images", "3", "--metrics", "none"]
    assert sample.main(flags) == 0
    assert sample.main([*flags, "--order", "random", "--cfg_schedule", "linear"]) == 0
    (line,) = (out / "results.jsonl").read_text().splitlines()
    settings = json.loads(line)["settings"]
    assert (settings["order"], settings["group"], settings["cfg_schedule"]) == ("random", "cosine", "linear")
