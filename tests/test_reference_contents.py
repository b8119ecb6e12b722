"""References and data sets are known by the bytes of their files too, and what was made before still counts."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image

import sample
from tests.test_reading_settings import train
from util.evaluation import protocol
from util.evaluation.fid_stats import load_fid_stats
from util.evaluation.protocol import content_hash, reference_hash, reference_hashes
from util.evaluation.tables import by_protocol, group_seeds
from util.images.datasets import build_dataset
from util.images.reading import MARS_WAY


def bytes_of(root, contents) -> list[Path]:
    """Files 0.png… of a folder; the first byte says which they are."""
    root.mkdir(parents=True, exist_ok=True)
    paths = [root / f"{i}.png" for i in range(len(contents))]
    for path, content in zip(paths, contents):
        path.write_bytes(content)
    return paths


def reference_of(paths):
    return SimpleNamespace(samples=[(str(path), 0) for path in paths], reading=MARS_WAY)


def test_a_file_replaced_by_another_of_its_size_makes_another_reference(tmp_path):
    """Copies elsewhere, at another time, are the same; only `reference_content` tells, so old results stay valid."""
    first = reference_of(bytes_of(tmp_path / "a", [b"1x", b"2y"]))
    copy, other = (reference_of(bytes_of(tmp_path / n, c)) for n, c in (("b", [b"1x", b"2y"]), ("c", [b"1x", b"2z"])))
    assert reference_hashes(first) == reference_hashes(copy) != reference_hashes(other)
    assert reference_hash(first) == reference_hash(other)
    Path(first.samples[1][0]).unlink()
    assert content_hash(first) not in (None, content_hash(copy))  # a link to nothing is a broken image, no error


def test_of_a_large_folder_every_kth_file_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(protocol, "READ", 40)
    contents = [bytes([i]) * 10 for i in range(12)]
    before = content_hash(reference_of(bytes_of(tmp_path, contents)))
    for i in range(12):
        changed = (
            content_hash(reference_of(bytes_of(tmp_path, [*contents[:i], b"x" * 10, *contents[i + 1 :]]))) != before
        )
        assert changed == (i % 3 == 0)


def test_what_is_no_folder_has_no_contents_of_files(stats_file):
    assert reference_hashes(None) == {"reference": None, "reference_content": None}
    for reference in (build_dataset("digits"), load_fid_stats(stats_file)):
        assert content_hash(reference) is None and reference_hashes(reference)["reference"] == reference_hash(reference)


def test_results_are_measured_anew_where_a_file_was_replaced_but_not_those_of_before(tmp_path, capsys):
    data, rng = tmp_path / "data" / "train", np.random.default_rng(0)
    for name in "ab":
        (data / name).mkdir(parents=True)

    def write(i):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(data / "ab"[i % 2] / f"{i}.bmp")

    for i in range(4):
        write(i)
    run, out = train(tmp_path / "data", tmp_path / "run"), tmp_path / "out"
    flags = "--metrics fid --features digits --num_images 4 --num_iter 1 --num_sampling_steps 1".split()

    def lines():
        assert sample.main(["--checkpoint", str(run), "--output_dir", str(out), *flags]) == 0
        return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]

    assert len(lines()) == len(lines()) == 1
    write(2)
    first, second = lines()
    assert first["reference"] == second["reference"] and first["reference_content"] != second["reference_content"]
    assert second["num_made"] == 0 and first["metrics"] != second["metrics"]  # the images are the same
    del first["reference_content"]
    (out / "results.jsonl").write_text(json.dumps(first) + "\n")
    assert lines() == [first]


def test_a_table_averages_over_no_two_contents_of_the_same_names():
    """Lines of before go with those of any one content, and stand apart from several."""

    def line(seed, **content):
        return dict(
            settings=dict(seed=seed, features="digits"), weights="w", reference="r", metrics={"fid": 1.0}, **content
        )

    def sizes(*lines):
        groups = group_seeds(list(lines))
        assert len(by_protocol(groups)) == len(groups)
        return [count for *_, count in groups]

    one, two = dict(reference_content="x"), dict(reference_content="y")
    assert sizes(line(0), line(1, **one), line(2, **one)) == [3]
    assert sizes(line(0, **one), line(1, **one), line(2, **two), line(3), line(4)) == [2, 1, 2]
    assert sizes(line(0, reference_content=None), line(1)) == [2]
