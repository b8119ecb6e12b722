"""The best of a sweep: scripts/best_settings.py ranks, `sample.py --settings_of` samples them again, the whole in
scripts/search_grid.sh; and that figures by another classifier's features stand apart."""

import json
import re
import subprocess
from pathlib import Path

import pytest

import sample
from sampling.grid import settings_of
from sampling.settings import SampleConfig
from scripts import best_settings, make_table, train_classifier
from tests.helpers import untrained
from tests.test_cli import refused
from tests.test_sample import draw, pngs, rows
from util.evaluation.features import FEATURES, build_extractor
from util.evaluation.protocol import EvalConfig, protocol
from util.images.datasets import build_dataset


def line(fid, pixels, seed=0, features="digits", **settings):
    settings = dict(SampleConfig(**settings).resolved().__dict__, seed=seed, features=features)
    return dict(settings=settings, metrics=dict(fid=fid, frechet_pixels=pixels), weights="w", reference="r")


def written(path, lines):
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    return path


# ---------------------------------------------------------------------------------------------------------- choosing


def test_the_best_have_the_smallest_geometric_mean_of_the_means_over_seeds(tmp_path, capsys):
    lines = [line(1.0, 9.0, cfg=1.0), line(2.0, 2.0, cfg=2.0), line(8.0, 1.0, cfg=3.0)]
    lines += [line(1.0, 9.0, seed=1, cfg=1.0), line(4.0, 4.0, seed=1, cfg=2.0), line(8.0, 1.0, seed=1, cfg=3.0)]
    results, out = written(tmp_path / "results.jsonl", lines), tmp_path / "best.jsonl"
    command = [str(results), "--by", "fid,frechet_pixels", "--top", "2", "--out", str(out)]
    assert best_settings.main(command) == 0
    assert [row["settings"]["cfg"] for row in rows_of(out)] == [3.0, 1.0]  # √8, √9, and √(3·3) after it
    assert capsys.readouterr().out.startswith("1. score 2.828")
    assert best_settings.main(command) == 0  # its own file may be replaced
    assert best_settings.main([str(results), "--top", "1", "--out", str(out)]) == 0
    assert [row["settings"]["cfg"] for row in rows_of(out)] == [1.0]


def test_the_front_is_what_no_other_setting_beats(tmp_path):
    points = [(1, 9), (2, 2), (2, 3), (9, 1), (9, 9), (2, 2)]  # the last is as good as the second
    lines = [line(fid, pixels, cfg=float(number)) for number, (fid, pixels) in enumerate(points, start=1)]
    results, out = written(tmp_path / "results.jsonl", lines), tmp_path / "front.jsonl"
    assert best_settings.main([str(results), "--by", "fid,frechet_pixels", "--front", "--out", str(out)]) == 0
    assert sorted(row["settings"]["cfg"] for row in rows_of(out)) == [1.0, 2.0, 4.0, 6.0]
    assert best_settings.main([str(results), "--front", "--out", str(out)]) == 0  # of one figure: the smallest
    assert [row["settings"]["cfg"] for row in rows_of(out)] == [1.0]


def rows_of(path):
    return [json.loads(text) for text in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "lines, flags, shown",
    [
        ([line(1, 1), line(1, 1, features="cifar10", cfg=2.0)], [], "measured in 2 ways"),
        ([line(1, 1), line(1, 1, cfg=2.0)], ["--by", "kid_mean"], "without 'kid_mean'; they have: fid, frechet_pixels"),
        ([line(0, 1)], [], "fid must be above 0"),
        ([line(1, 1)], ["--top", "0"], "--top must be at least 1"),
        ([], [], "holds no results"),
    ],
)
def test_what_cannot_be_ranked_is_one_line(lines, flags, shown, tmp_path, capsys):
    results = written(tmp_path / "results.jsonl", lines)
    assert shown in refused(best_settings.main, [str(results), "--out", str(tmp_path / "b.jsonl"), *flags], capsys)
    assert not (tmp_path / "b.jsonl").exists()


def test_no_other_file_is_replaced(tmp_path, capsys):
    results, other = written(tmp_path / "results.jsonl", [line(1, 1)]), tmp_path / "notes.txt"
    other.write_text("mine")
    assert "not of the kind" in refused(best_settings.main, [str(results), "--out", str(other)], capsys)
    assert "is an input" in refused(best_settings.main, [str(results), "--out", str(results)], capsys)


# ------------------------------------------------------------------------------------------------- sampling them again


def test_the_settings_of_lines_are_sampled_again(tmp_path):
    checkpoint, few = untrained(tmp_path / "c"), ["--num_images", "4"]
    assert draw(checkpoint, tmp_path / "a", *few, "--cfg", "1,2", "--seed", "0,1", "--group", "power") == 0
    again = ["--settings_of", tmp_path / "a" / "results.jsonl"]
    assert draw(checkpoint, tmp_path / "b", *few, *again, "--seed", "1,5") == 0
    first, second = (rows(tmp_path / name) for name in "ab")
    assert [(row["settings"]["cfg"], row["settings"]["seed"]) for row in second] == [(1, 1), (1, 5), (2, 1), (2, 5)]
    assert all(row["settings"]["group"] == "power" for row in second)
    same = next(row for row in first if row["name"] == second[0]["name"])
    assert same["settings"] == second[0]["settings"]
    assert pngs(tmp_path / "a" / same["name"]) == pngs(tmp_path / "b" / same["name"])
    assert draw(checkpoint, tmp_path / "c2", *few, *again, "--cfg", "3", "--temperature", "0.5") == 0
    (row,) = rows(tmp_path / "c2")  # flags given win
    assert (row["settings"]["cfg"], row["settings"]["temperature"], row["settings"]["group"]) == (3, 0.5, "power")


def test_a_file_without_settings_is_one_line(tmp_path):
    assert settings_of(None) == [{}]
    for content, message in (("", "holds no results"), ('{"settings": {"cfg": "x"}}', "is damaged: its cfg is 'x'")):
        (tmp_path / "r.jsonl").write_text(content)
        with pytest.raises(ValueError, match=message):
            settings_of(str(tmp_path / "r.jsonl"))
    with pytest.raises(ValueError, match="holds no results"):
        settings_of(str(tmp_path / "none.jsonl"))


# -------------------------------------------------------------------------------------------------------------- judges


def test_another_classifier_judges_by_features_of_its_own(tmp_path):
    judge = tmp_path / "judge.npz"
    assert train_classifier.main(["--seed", "1", "--epochs", "1", "--output", str(judge)]) == 0
    assert build_extractor("digits", judge)[1] == judge and build_extractor("digits")[1] != judge
    checkpoint, out = untrained(tmp_path / "c"), tmp_path / "out"
    common = ["--num_images", "20", "--metrics", "fid", "--features", "digits"]
    assert draw(checkpoint, out, *common) == draw(checkpoint, out, *common, "--fid_weights", judge) == 0
    own, judged = rows(out)
    assert own["name"] == judged["name"] and judged["num_made"] == 0  # the same pictures
    assert own["metrics"]["fid"] != judged["metrics"]["fid"]
    assert own["metrics"]["frechet_pixels"] == judged["metrics"]["frechet_pixels"]
    assert judged["protocol"]["features"] == f"digits of {judge}" and own["protocol"]["features"] == "digits"
    groups = make_table.by_protocol(make_table.group_seeds(rows(out)))
    assert len(groups) == 2
    lines = (out / "results.jsonl").read_text()
    (out / "results.jsonl").write_text(lines.replace('"judge": null, ', ""))  # as before there was the flag
    assert draw(checkpoint, out, *common) == 0 and len(rows(out)) == 2
    assert draw(checkpoint, out, *common, "--judge", judge) == 0  # both in one line
    (_, _, beside) = rows(out)
    assert beside["num_made"] == 0 and beside["protocol"]["judge"] == f"digits of {judge}"
    assert beside["metrics"] == own["metrics"] | {"judge_fid": judged["metrics"]["fid"]}


@pytest.mark.parametrize("flag", ["--judge", "--fid_weights"])
def test_a_classifier_whose_file_was_replaced_measures_anew(flag, tmp_path):
    checkpoint, out, file = untrained(tmp_path / "c"), tmp_path / "out", tmp_path / "other.npz"
    common = ["--num_images", "20", "--metrics", "fid", "--features", "digits", flag, file]
    for seed in (1, 2, 2):
        assert train_classifier.main(["--seed", str(seed), "--epochs", "1", "--output", str(file)]) == 0
        assert draw(checkpoint, out, *common) == 0
    first, second = rows(out)
    figure = {"--judge": "judge_fid", "--fid_weights": "fid"}[flag]
    assert first["metrics"][figure] != second["metrics"][figure] and second["num_made"] == 0
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    before = [{k: v for k, v in line.items() if not k.endswith("s_content") and k != "judge_content"} for line in lines]
    (out / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in before[1:]))
    assert draw(checkpoint, out, *common) == 0 and len(rows(out)) == 1  # a line of before is not doubted


def test_another_batch_size_is_the_same_setting(tmp_path):
    checkpoint, out = untrained(tmp_path / "c"), tmp_path / "out"
    common = ["--num_images", "20", "--metrics", "none"]
    assert draw(checkpoint, out, *common, "--eval_bsz", "8") == 0
    made = (out / "results.jsonl").read_bytes()
    assert draw(checkpoint, out, *common, "--eval_bsz", "5") == 0 and (out / "results.jsonl").read_bytes() == made
    (row,) = rows(out)
    (out / "results.jsonl").unlink()
    (out / row["name"] / "7.png").unlink()
    assert draw(checkpoint, out, *common, "--eval_bsz", "5") == 0 and rows(out)[0]["num_made"] == 5


def test_other_features_judge_by_their_name(tmp_path, monkeypatch):
    monkeypatch.setitem(FEATURES, "others", FEATURES["digits"])
    checkpoint, out = untrained(tmp_path / "c"), tmp_path / "out"
    common = ["--num_images", "20", "--metrics", "fid", "--features", "digits", "--judge"]
    assert draw(checkpoint, out, *common, "others") == 0
    (row,) = rows(out)
    assert row["metrics"]["judge_fid"] == row["metrics"]["fid"] and row["protocol"]["judge"] == "others"
    with pytest.raises(ValueError, match="--judge digits must be other features than --features"):
        draw(checkpoint, out, *common, "digits")


def test_a_classifier_that_is_none_is_one_line(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"no")
    for name, message in (("x.npz", "x.npz refused"), ("none.npz", "no digits weights at .*none.npz")):
        with pytest.raises(ValueError, match=message):
            build_extractor("digits", tmp_path / name)


def test_published_weights_in_another_place_are_the_same_features():
    config = EvalConfig(num_images=4, features="inception", fid_weights="/a/b.pth", metrics="fid")
    said = protocol("generation", config, [0] * 4, build_dataset("digits"), "digits", ema=True, dtype="fp32")
    assert said["features"] == "inception"


# -------------------------------------------------------------------------------------------------------- the script


@pytest.mark.parametrize("num_iter", ["2", "4", "16"])
def test_the_grid_has_more_than_60_settings_of_every_sort(num_iter, tmp_path, capsys):
    """The commands that the script shows, given to sample.py with --dry_run."""
    script = Path(sample.__file__).parent / "scripts" / "search_grid.sh"
    checkpoint = untrained(tmp_path / "c")
    environment = dict(PATH="/usr/bin:/bin", CHECKPOINT=str(checkpoint), OUT=str(tmp_path / "out"), NUM_ITER=num_iter)
    command = ["bash", str(script), "--dry_run"]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    names, texts = [], [text for text in shown if re.search(r"sample\.py.*--output_dir \S+/grid ", text)]
    for text in texts:
        assert sample.main([*text.split()[2:], "--dry_run"]) == 0
        names += json.loads(capsys.readouterr().out)["settings"]
    assert len(names) == len(set(names)) >= 60
    rules = ("checkerboard", "group-power", "group-exp", "cfg_schedule-constant", "cfg_schedule-interval")
    for part in (*rules, "temperature-0.85", "cfg_profile-interval"):
        assert any(part in name for name in names), part
    assert any("group-staged" in name for name in names) == (int(num_iter) >= 3)


@pytest.mark.parametrize("variables, shown", [(dict(PRESET="x"), "'x'"), (dict(NUM_ITER="few"), "'few'")])
def test_a_wrong_variable_is_one_line(variables, shown):
    script = Path(sample.__file__).parent / "scripts" / "search_grid.sh"
    done = subprocess.run(
        ["bash", str(script), "--dry_run"], env=dict(PATH="/usr/bin:/bin", **variables), capture_output=True, text=True
    )
    assert done.returncode == 2 and shown in done.stderr and len(done.stderr.splitlines()) == 1
