"""scripts/make_leaderboard.py: which hand-made rule a row is compared with, and that its own figures judge nothing."""

import json

import pytest

from sampling.settings import SampleConfig
from scripts import make_leaderboard
from tests.test_cli import refused
from util.evaluation.rivals import HEADINGS, rules_of


def lines(seeds, features, pixels, judge, num_iter=4, **settings):
    """What sample.py --judge writes of a setting for these seeds; judge may be a list, None leaves its figure out."""
    shared = SampleConfig(num_iter=num_iter, **settings).resolved().__dict__ | dict(solver="dpmpp_sde")
    made = dict(num_made=8, mar_evals=8.0, mlp_evals=1024.0, images_per_second=2.0)
    rows = []
    for i, seed in enumerate(seeds):
        judged = judge[i] if isinstance(judge, list) else judge
        metrics = dict(fid=features, frechet_pixels=pixels, **({} if judged is None else dict(judge_fid=judged)))
        rows.append(dict(settings=shared | dict(seed=seed), metrics=metrics, **made))
    return rows


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def table(capsys, *flags):
    """{name of the rules: cells of its row} of what is printed."""
    assert make_leaderboard.main(list(flags)) == 0
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    return {row[0]: dict(zip(HEADINGS, row)) for row in rows}


def test_a_row_meets_the_best_hand_made_rule_of_no_larger_pixel_distance(tmp_path, capsys):
    hand = lines([1, 2], 1.0, 1.0, [0.8, 0.6], cfg=1.2) + lines([1, 2], 1.0, 1.2, [0.5, 0.5], cfg=1.5)
    hand += lines([1, 2], 1.0, 0.9, [0.9, 0.9], cfg=1.1) + lines([1, 2], 1.0, 0.5, [0.1, 0.1], num_iter=8, cfg=3.0)
    learned = lines([1, 2], 0.5, 1.1, [0.4, 0.3])
    flags = (
        "--hand",
        written(tmp_path / "hand.jsonl", hand),
        "--row",
        f"mine={written(tmp_path / 'r.jsonl', learned)}",
    )
    rows = table(capsys, *flags)
    mine = rows["mine"]
    assert mine["best hand-made judge"].startswith("0.700 ± 0.141 (cfg 1.2 linear") and mine["difference"] == "-50 %"
    assert mine["beyond"] == "2.2"  # 0.35 over the root of 0.0707² + 0.1414²
    assert (mine["judge"], mine["reward: features"], mine["seeds"]) == ("0.350 ± 0.071", "0.500 ± 0.000", "2")
    assert (mine["transformer evals"], mine["MLP evals"], mine["images/s"]) == ("8", "1024", "2")
    assert rows["cfg 1.5 linear, τ 1"]["best hand-made judge"] == "none"  # the best itself


def test_a_row_that_is_hand_made_is_not_its_own_rival(tmp_path, capsys):
    hand = written(tmp_path / "hand.jsonl", lines([1, 2], 1.0, 1.2, [0.5, 0.6], cfg=1.5))
    worse = written(tmp_path / "worse.jsonl", lines([1, 2], 1.0, 1.1, [0.7, 0.9], cfg=1.2))
    rows = table(capsys, "--hand", hand, "--hand", worse, "--row", f"best={hand}", "--row", f"other={worse}")
    assert rows["best"]["best hand-made judge"] == rows["other"]["best hand-made judge"] == "none"


def test_a_hand_made_rule_that_two_files_have_stands_once(tmp_path, capsys):
    one, same = lines([1, 2], 1.0, 1.2, [0.5, 0.6], cfg=1.5), lines([1, 2], 1.0, 1.2, [0.5, 0.6], cfg=1.5)
    other = lines([1, 2], 1.0, 1.2, [0.5, 0.6], cfg=1.5, num_iter=8)
    files = [written(tmp_path / f"{i}.jsonl", rows) for i, rows in enumerate((one, same + other, one))]
    assert make_leaderboard.main(["--hand", files[0], "--hand", files[1], "--row", f"mine={files[2]}"]) == 0
    assert capsys.readouterr().out.count("| cfg 1.5 linear, τ 1 |") == 2  # at 4 steps and at 8


def test_a_row_that_beats_all_on_pixels_meets_the_nearest_of_them(tmp_path, capsys):
    hand = lines([1], 1.0, 1.1, [0.8], cfg=1.2) + lines([1], 1.0, 1.2, [0.5], cfg=1.5)
    hand += lines([1], 1.0, 1.05, [0.1], num_iter=8, cfg=1.2)  # of another number of steps
    learned = written(tmp_path / "r.jsonl", lines([1], 0.5, 1.0, [0.4]))
    mine = table(capsys, "--hand", written(tmp_path / "hand.jsonl", hand), "--row", f"mine={learned}")["mine"]
    assert mine["best hand-made judge"].startswith("0.800") and "cfg 1.2 linear" in mine["best hand-made judge"]
    assert mine["best hand-made judge"].endswith(", pixels 1.1)") and mine["difference"] == "-50 %"


def test_what_has_no_judge_is_no_row(tmp_path, capsys):
    hand = written(tmp_path / "hand.jsonl", lines([1], 1.0, 1.0, 1.0))
    other = written(tmp_path / "other.jsonl", lines([1], 1.0, 1.0, None))
    assert "other.jsonl has no setting" in refused(
        make_leaderboard.main, ["--hand", hand, "--row", f"a={other}"], capsys
    )
    assert "there is no file a" in refused(make_leaderboard.main, ["--hand", hand, "--row", "a"], capsys)


def test_rows_without_a_name_have_that_of_their_mode(tmp_path, capsys):
    hand = written(tmp_path / "hand.jsonl", lines([1], 1.0, 1.0, 1.0))
    modes = written(tmp_path / "m.jsonl", lines([1], 1, 1, 1, infer_mode="both") + lines([1], 1, 1, 1, cfg=1.5))
    assert {"both", "cfg 1.5 linear, τ 1"} <= table(capsys, "--hand", hand, "--row", modes).keys()


def test_under_a_name_the_seeds_of_training_are_repeats(tmp_path, capsys):
    hand = written(tmp_path / "hand.jsonl", lines([1], 1.0, 1.0, 1.0))
    rows = []
    for seed, judge in ((1, 0.2), (2, 0.4)):
        made = lines([seed], 0.5, 1.1, judge, infer_mode="guidance")
        rows += [row | dict(checkpoint=f"heads/seed{seed}", weights=f"hash {seed}") for row in made]
    path = written(tmp_path / "rows.jsonl", rows)
    row = table(capsys, "--hand", hand, "--row", f"heads={path}")["heads"]
    assert (row["judge"], row["seeds"]) == ("0.300 ± 0.141", "2")


@pytest.mark.parametrize("settings, words", [
    (dict(order="checkerboard", group="staged"), "cfg 1 linear, τ 1, checkerboard, staged"),
    (dict(cfg_schedule="interval", cfg_interval="0.33,1"), "cfg 1 interval, τ 1, w from 0.33,1"),
])  # fmt: skip
def test_hand_made_rules_in_words(settings, words):
    assert rules_of(SampleConfig(**settings).resolved().__dict__) == words
