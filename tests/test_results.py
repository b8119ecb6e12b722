"""results.jsonl: what is appended can be read by anyone, and what others left in it loses no line."""

import json
import math

import pytest

from util.evaluation.metrics import metrics_line
from util.evaluation.results import append_result, find_result, numbered_results, read_results
from util.evaluation.tables import group_seeds


def strict(text: str):
    """As a reader does that keeps to JSON, which has no NaN."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_a_figure_that_is_not_finite_is_written_as_null(tmp_path):
    row = dict(settings=dict(cfg=1.5), metrics=dict(fid=math.nan, kid_mean=math.inf, is_mean=2.0), list=(1, -math.inf))
    append_result(tmp_path / "r.jsonl", row)
    assert strict((tmp_path / "r.jsonl").read_text()) == dict(
        settings=dict(cfg=1.5), metrics=dict(fid=None, kid_mean=None, is_mean=2.0), list=[1, None]
    )
    (stored,) = read_results(tmp_path / "r.jsonl")
    assert find_result([stored], dict(settings=row["settings"])) == stored


def test_a_line_of_before_the_contents_of_files_were_compared_counts():
    new, old = dict(weights="a", reference="b", reference_content="c"), dict(weights="a", reference="b")
    assert find_result([old], new) == old and find_result([new], new) == new
    assert (
        find_result([new | dict(reference_content="d")], new) is None
        and find_result([old | dict(weights="x")], new) is None
    )


def test_a_line_of_before_a_flag_has_its_default():
    old, unset = dict(settings=dict(cfg=1.5)), dict(cfg=1.0, judge=None)
    assert find_result([old], dict(settings=dict(cfg=1.5, judge=None)), unset) == old
    for other in (dict(cfg=1.5, judge="j.npz"), dict(cfg=1.0, judge=None)):
        assert find_result([old], dict(settings=other), unset) is None


def test_a_result_with_null_is_reported():
    assert metrics_line(dict(fid=None, is_mean=2.0, is_std=None)) == "FID nan  IS 2.00±nan"
    assert metrics_line(dict(fid=math.nan)) == "FID nan"


@pytest.mark.parametrize("before", [b"", b'{"a": 1}', b'{"a": 1}\n', b'\xef\xbb\xbf{"a": 1}\r\n', b'{"a": 1}\n{"b": '])
def test_a_line_is_appended_after_whatever_is_there(before, tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(before)
    append_result(path, {"c": 3})
    assert read_results(path) == ([{"a": 1}] if before else []) + [{"c": 3}]
    assert path.read_bytes().startswith(before)


@pytest.mark.parametrize("dtype, found", [("fp32", True), ("bf16", True), ("int8", False)])
def test_a_line_of_another_batch_size_counts_but_in_int8(dtype, found):
    """Where an image depends on its batch."""
    row = {"settings": {"cfg": 2.0, "dtype": dtype, "eval_bsz": 64}, "weights": "w"}
    wanted = {"settings": {"cfg": 2.0, "dtype": dtype, "eval_bsz": 32}, "weights": "w"}
    assert (find_result([row], wanted) is row) == found
    assert find_result([row], {**wanted, "settings": {**row["settings"], "cfg": 3.0}}) is None


def test_what_is_no_file_of_results_is_named_before_the_work(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for name, what in (("folder", "is a folder"), ("link", "is a link to nothing")):
        with pytest.raises(ValueError, match=f"{name} {what}: results are lines of a file"):
            read_results(tmp_path / name)
    assert read_results(tmp_path / "none") == []


def test_lines_are_counted_as_an_editor_counts_them(tmp_path):
    """A line separator inside a text ends no line."""
    path = tmp_path / "r.jsonl"
    path.write_text('{"a": "x\u2028y"}\n\n[1]\nnonsense\n{"b": 2}\n' + "[" * 100000, encoding="utf-8")
    assert numbered_results(path) == [(1, {"a": "x\u2028y"}), (5, {"b": 2})]
    assert numbered_results(tmp_path / "missing") == []


def test_seeds_are_averaged_unless_a_classifiers_file_was_replaced_between_them():
    """A line of before the bytes were known belongs to the others, while there is one content only."""

    def line(seed, content=None, judge="j.npz", eval_bsz=64, dtype="fp32"):
        settings = dict(seed=seed, cfg=1.5, judge=judge, eval_bsz=eval_bsz, dtype=dtype)
        known = {} if content is None else dict(judge_content=content)
        return dict(settings=settings, weights="w", reference="r", metrics=dict(judge_fid=float(seed)), **known)

    def repeats(*lines):
        return sorted(count for *_, count in group_seeds(list(lines)))

    assert repeats(line(1), line(2, "a"), line(3, "a")) == [3]
    assert repeats(line(1, "a"), line(2, "b"), line(3, "b")) == [1, 2]
    assert repeats(line(1), line(2, "a"), line(3, "b")) == [1, 1, 1]
    assert repeats(line(1, "a"), line(2, "a"), line(3, "b", judge="other.npz")) == [1, 2]
    assert repeats(line(1, eval_bsz=8), line(2)) == [2] and repeats(line(1, eval_bsz=8, dtype="int8"), line(2)) == [
        1,
        1,
    ]
    assert repeats(line(1, eval_bsz=8, dtype="int8"), line(2, dtype="int8")) == [1, 1]
