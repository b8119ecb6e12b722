"""The evaluation protocol: references, splits, what is refused before sampling, the words for it, its commands."""

import json

import numpy as np
import pytest

import engine_mar
import main_mar
import sample
from scripts import download_weights, make_fid_stats, measure_reconstruction
from tests.helpers import image_folder
from tests.test_cli import ROOT, commands_in, refused, shell_lines
from tests.test_sample import SMALL, draw, folder_of, rows, train_tiny
from util.checkpoint import load_checkpoint, save_checkpoint
from util.evaluation.classifiers import DIGITS_WEIGHTS
from util.evaluation.fid_stats import FIDStats, load_fid_stats, save_fid_stats
from util.evaluation.protocol import EvalConfig, build_reference, class_balance, protocol, protocol_line, reference_hash
from util.images.datasets import build_dataset
from util.images.pictures import PNGFolder, save_png


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return train_tiny(tmp_path_factory.mktemp("checkpoint"), "--batch_size", 600, "--num_sampling_steps", 2)


# ---------------------------------------------------------------------------------------------- sampling and measuring


def test_sampling_against_statistics_is_sampling_against_their_images(checkpoint, stats_file, tmp_path, capsys):
    flags = "--features digits --num_images 40 --no_ema --dtype fp32".split()  # its own --metrics none comes first
    for name, metric_flags in (("images", ["--metrics", "fid,isc"]), ("stats", ["--fid_stats", stats_file])):
        metric_flags = [*metric_flags] if name == "images" else [*metric_flags, "--metrics", "fid,isc"]
        assert draw(checkpoint, tmp_path / name, *flags, *metric_flags) == 0
    (images,), (stats,) = rows(tmp_path / "images"), rows(tmp_path / "stats")
    assert stats["metrics"] == pytest.approx({k: images["metrics"][k] for k in ("fid", "is_mean", "is_std")}, rel=1e-3)
    assert images["reference"] != stats["reference"] == load_fid_stats(stats_file).hash()
    record = dict(kind="generation", num_images=40, balance="4 of each of 10 classes", ema=False, dtype="fp32")
    record |= dict(split="train", num_reference=1797, features="digits")
    assert images["protocol"] == record | dict(reference="digits") and images["kind"] == "generation"
    assert stats["protocol"] == record | dict(reference=f"statistics in {stats_file}")
    start = "generation of 40 images (4 of each of 10 classes, raw weights, fp32) against 1797 images of "
    printed = [text for text in capsys.readouterr().out.splitlines() if text.startswith("generation")]
    assert printed == [
        f"{start}{what} (split: train), features: digits" for what in ("digits", f"statistics in {stats_file}")
    ]
    assert draw(checkpoint, tmp_path / "stats", *flags, "--fid_stats", stats_file, "--metrics", "fid,isc") == 0
    assert len(rows(tmp_path / "stats")) == 1 and start in capsys.readouterr().out  # also where it is there already


def test_a_judge_is_refused_where_there_are_statistics_only(checkpoint, stats_file, tmp_path):
    """They are of other features than the judge's, whose distance to them would mean nothing."""
    flags = ["--features", "digits", "--metrics", "fid", "--num_images", 4, "--fid_stats", stats_file]
    for judge in (DIGITS_WEIGHTS, "efficientnet_lite0"):
        with pytest.raises(ValueError, match="^--judge .* needs reference images: --fid_stats are of other features"):
            draw(checkpoint, tmp_path, *flags, "--judge", judge)
    assert not list(tmp_path.iterdir())


def test_the_default_metrics_follow_the_reference(checkpoint, stats_file, tmp_path):
    base = ["--checkpoint", str(checkpoint), "--num_images", "4", "--num_sampling_steps", "2"]
    assert sample.main([*base, "--output_dir", str(tmp_path), "--fid_stats", str(stats_file)]) == 0
    (row,) = rows(tmp_path)
    assert row["settings"]["metrics"] == "fid,isc" and row["metrics"].keys() == {"fid", "is_mean", "is_std"}


def test_a_reference_by_hand_replaces_the_checkpoints(checkpoint, tmp_path, capsys):
    """Trained with --fid_stats, then compared with images, and trained with --eval_split val, then with statistics."""
    stored = load_checkpoint(checkpoint)

    def reference(evaluation, *flags):
        stored["config"]["eval"] = {"features": "digits", "metrics": None, **evaluation}
        save_checkpoint(tmp_path, stored)
        assert sample.main(["--checkpoint", str(tmp_path), "--dry_run", *flags]) == 0
        shown = json.loads(capsys.readouterr().out)
        return shown["fid_stats"], shown["eval_split"], shown["metrics"]

    capsys.readouterr()
    assert reference({"fid_stats": "a.npz"}) == ("a.npz", "train", "fid,isc")
    for flags in (["--eval_split", "train"], ["--data_path", "images"]):
        assert reference({"fid_stats": "a.npz"}, *flags) == (None, "train", "fid,isc,kid,prc")
    assert reference({"eval_split": "val"}) == (None, "val", "fid,isc,kid,prc")
    assert reference({"eval_split": "val"}, "--fid_stats", "b.npz") == ("b.npz", "train", "fid,isc")


def test_the_split_is_the_reference(tmp_path, capsys):
    """Against train and against val images: other references, each found again, each said."""
    folder = image_folder(tmp_path / "images", {"train": 12, "val": 5})
    flags = f"--data imagefolder --data_path {folder} --tokenizer pixel --img_size 8 --model mar_tiny --batch_size 12"
    run, out = train_tiny(tmp_path / "run", *flags.split()), tmp_path / "out"
    for split in ("train", "val", "val"):
        assert draw(run, out, "--metrics", "fid", "--features", "digits", "--num_images", 6, "--eval_split", split) == 0
    train, val = rows(out)
    assert [r["protocol"]["num_reference"] for r in (train, val)] == [24, 10]
    assert [r["protocol"]["split"] for r in (train, val)] == ["train", "val"]
    assert train["reference"] != val["reference"] and train["metrics"]["fid"] != val["metrics"]["fid"]
    assert f"against 10 images of imagefolder {folder} (split: val), features: digits" in capsys.readouterr().out
    expected = build_dataset("imagefolder", data_path=folder, img_size=8, split="val")
    assert val["reference"] == reference_hash(expected)

    evaluate = [*SMALL, *flags.split(), "--evaluate", "--resume", str(run), "--output_dir", str(tmp_path / "evaluated")]
    evaluate += (
        "--features digits --metrics fid --num_images 6 --eval_split val --num_sampling_steps 2 --dtype fp32".split()
    )
    assert main_mar.main(evaluate) == 0
    printed = capsys.readouterr().out
    assert "(3 of each of 2 classes, EMA weights, fp32) against 10 images of imagefolder" in printed
    assert "FID" in printed


@pytest.mark.parametrize(
    "flags, shown",
    [
        ("--fid_stats {tmp}/missing.npz", "{tmp}/missing.npz"),
        ("--fid_stats {text}", "{text}"),
        ("--fid_stats {wide}", "2048"),
        ("--fid_stats {large}", "16"),
        ("--fid_stats {stats} --metrics fid,kid", "kid"),
        ("--fid_stats {stats} --eval_split val", "val"),
        ("--eval_split val", "'val'"),
        ("--eval_split test", "'test'"),
        ("--features vgg16 --fid_weights {text}", "{text}"),
        ("--features clip --metrics isc", "clip"),
    ],
)
def test_bad_references_are_one_line_before_anything_is_sampled(
    flags, shown, checkpoint, stats_file, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("sampling.run.generate", lambda *a, **k: pytest.fail("sampling had started"))
    places = {"tmp": tmp_path, "text": tmp_path / "text", "stats": stats_file}
    places["text"].write_text("hello")
    for name, d, img_size in (("wide", 2048, None), ("large", 64, 16)):
        places[name] = tmp_path / f"{name}.npz"
        save_fid_stats(places[name], FIDStats(np.zeros(d), np.eye(d), img_size=img_size))
    flags = flags.format(**places).split()
    base = ["--checkpoint", str(checkpoint), "--output_dir", str(tmp_path / "out")]
    assert shown.format(**places) in refused(sample.main, [*base, "--num_images", "8", *flags], capsys)
    base = [*SMALL, "--evaluate", "--resume", str(checkpoint), "--output_dir", str(tmp_path / "out"), *flags]
    assert shown.format(**places) in refused(main_mar.main, [*base, "--num_images", "8"], capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change, num_stored", [("missing", 3), ("one too many", 5)])
def test_another_number_of_images_than_asked_for_is_not_measured(change, num_stored, tmp_path, monkeypatch):
    def made(parts, sampling, labels, seed, folder, **options):
        folder.mkdir()
        for i in range(num_stored):
            save_png(folder / f"{i}.png", np.full((8, 8, 1), i, np.uint8))
        return {}

    monkeypatch.setattr(engine_mar, "sample_images", made)
    monkeypatch.setattr(engine_mar, "score", lambda *a: pytest.fail("measured"))
    with pytest.raises(ValueError, match=f"out holds {num_stored} images, expected 4$"):
        engine_mar.evaluate(None, None, EvalConfig(num_images=4), None, [0] * 4, 0, tmp_path / "out")
    with pytest.raises(ValueError, match=f"out holds {num_stored} images, expected 4$"):
        PNGFolder(tmp_path / "out", 4)


def test_a_truncated_picture_of_the_last_batch_only_is_made_again(checkpoint, tmp_path):
    """Cut by so little that all pixels are still there."""
    assert draw(checkpoint, tmp_path) == 0
    file = folder_of(tmp_path) / "23.png"
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    (tmp_path / "results.jsonl").unlink()
    assert draw(checkpoint, tmp_path) == 0
    assert file.read_bytes() == whole and rows(tmp_path)[0]["num_made"] == 8


@pytest.mark.parametrize(
    "labels, words",
    [
        ([0, 1, 2] * 4, "4 of each of 3 classes"),
        ([0, 1, 2, 0], "1 to 2 of each of 3 classes"),
        ([7] * 5, "5 of each of 1 class"),
        ([-1] * 5, "unconditional"),
        ([-1, 3], "1 of each of 2 classes (one of them unconditional)"),
    ],
)
def test_class_balance_in_words(labels, words):
    assert class_balance(labels) == words


def test_the_protocol_of_no_metrics_names_no_reference():
    config = EvalConfig(metrics="none")
    assert build_reference(config, "digits", None, 8) is None
    record = protocol("generation", config, [0, 1], None, "digits", ema=True, dtype="bf16")
    assert protocol_line(record) == "generation of 2 images (1 of each of 2 classes, EMA weights, bf16)"
    assert json.loads(json.dumps(record)) == record


# ------------------------------------------------------------------------------------------------- commands shown

SCRIPTS = {f"{m.__name__.split('.')[1]}.py": m.main for m in (make_fid_stats, measure_reconstruction, download_weights)}
SHOWN = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]


def test_commands_of_the_documents_are_valid(tmp_path, monkeypatch, capsys):
    """Those of these scripts; test_cli.py has the others."""
    monkeypatch.setattr("tests.test_cli.PROGRAMS", SCRIPTS)
    monkeypatch.chdir(tmp_path)
    names = []
    for path in SHOWN:
        for text in shell_lines(path) if path.is_file() else ():
            for program, arguments in commands_in(text.replace("sample.py", "-").replace("main_mar.py", "-")):
                assert SCRIPTS[program]([*arguments, "--dry_run"]) == 0
                json.loads(capsys.readouterr().out)
                names.append(program)
    assert {"make_fid_stats.py", "measure_reconstruction.py"} <= set(names) and not list(tmp_path.iterdir())
