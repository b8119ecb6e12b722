"""Two checkpoints sampled into one folder: neither takes the other's pictures, finished or not."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

import sample
from main_mar import main as train_main
from sampling import run as run_module
from sampling.run import SamplingRun, claim_folder
from tests.test_sample import SMALL, draw, folder_of, pngs, rows, state_of, train_tiny
from util.checkpoint import FILE_NAME, load_checkpoint, save_checkpoint
from util.images import pictures


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return train_tiny(tmp_path_factory.mktemp("checkpoint"), "--batch_size", 600)


def interrupted(checkpoint, out, monkeypatch, *flags) -> Path:
    """The folder of a setting whose sampling ended after its second batch of three."""
    drawn = []

    def stop(run, *arguments):
        drawn.append(run)
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return draw_batch(run, *arguments)

    draw_batch, before = SamplingRun.draw_batch, set(out.glob("*"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SamplingRun, "draw_batch", stop)
        draw(checkpoint, out, *flags)
    (folder,) = (path for path in out.glob("*") if path.is_dir() and path not in before)
    assert len(pngs(folder)) == 16 and not (out / "results.jsonl").exists()
    return folder


def changed(checkpoint, place, by=0.5) -> Path:
    """The checkpoint with other weights, elsewhere."""
    content = load_checkpoint(checkpoint)
    for weights in (content["model"], content["model_ema"]):
        weights["diffloss.net.final_layer.linear.bias"] += by
    save_checkpoint(place, content)
    return place


def planned(checkpoint, out, capsys, *flags) -> list[str]:
    """The names of the folders as a dry run has them."""
    capsys.readouterr()
    assert draw(checkpoint, out, *flags, "--dry_run") == 0
    return json.loads(capsys.readouterr().out)["settings"]


def test_an_unfinished_run_of_another_checkpoint_keeps_its_pictures(checkpoint, tmp_path, monkeypatch, capsys):
    """Either run goes on in its own folder, which the dry run names, and draws what it lacks."""
    out, other = tmp_path / "out", changed(checkpoint, tmp_path / "other")
    first = interrupted(checkpoint, out, monkeypatch)
    before = pngs(first)
    (name,) = planned(other, out, capsys)
    second = interrupted(other, out, monkeypatch)
    assert second.name == name and name.startswith(f"{first.name}_weights") and pngs(first) == before
    for place, folder in ((other, second), (checkpoint, first)):
        before = state_of(folder)
        assert planned(place, out, capsys) == [folder.name]
        assert draw(place, out) == 0 and rows(out)[-1]["num_made"] == 8
        assert folder_of(out) == folder and before.items() <= state_of(folder).items()
    assert draw(checkpoint, tmp_path / "alone") == 0 and pngs(folder_of(tmp_path / "alone")) == pngs(first)


def test_a_checkpoint_trained_on_replaces_its_own_unfinished_pictures(checkpoint, tmp_path, monkeypatch, capsys):
    place, out = changed(checkpoint, tmp_path / "place"), tmp_path / "out"
    folder = interrupted(place, out, monkeypatch)
    changed(place, place)
    assert planned(place, out, capsys) == [folder.name]
    assert draw(place, out) == 0 and folder_of(out) == folder and rows(out)[0]["num_made"] == 24


def test_a_copied_checkpoint_goes_on_where_the_first_was_interrupted(checkpoint, tmp_path, monkeypatch):
    folder = interrupted(checkpoint, tmp_path / "out", monkeypatch)
    shutil.copytree(checkpoint, tmp_path / "copy")
    assert draw(tmp_path / "copy", tmp_path / "out") == 0
    assert folder_of(tmp_path / "out") == folder and rows(tmp_path / "out")[0]["num_made"] == 8


@pytest.mark.parametrize("same", [True, False])
def test_an_unfinished_run_of_before_goes_on_with_its_own_weights_only(checkpoint, tmp_path, monkeypatch, same):
    """Its run.json does not say which checkpoint it is of."""
    out, place = tmp_path / "out", checkpoint if same else changed(checkpoint, tmp_path / "other")
    folder = interrupted(checkpoint, out, monkeypatch)
    run, before = json.loads((folder / "run.json").read_text()), pngs(folder)
    del run["checkpoint"]
    (folder / "run.json").write_text(json.dumps(run))
    assert draw(place, out) == 0
    assert before.items() <= pngs(folder).items() and (folder_of(out) == folder) == same
    assert rows(out)[0]["num_made"] == (8 if same else 24)


def evaluated(place, out, capsys, *flags) -> Path:
    """The folder of main_mar.py --evaluate."""
    words = [*SMALL, "--num_sampling_steps", 2, "--num_images", 10, "--metrics", "none", *flags]
    assert train_main([*map(str, words), "--evaluate", "--resume", str(place), "--output_dir", str(out)]) == 0
    return Path(capsys.readouterr().out.rsplit("10 images in ")[1].rsplit(": ")[0])


def test_evaluations_of_two_checkpoints_keep_apart(checkpoint, tmp_path, capsys):
    """main_mar.py --evaluate in one --output_dir; a checkpoint goes on in its own folder, and replaces what it was."""
    other = changed(checkpoint, tmp_path / "other")
    first = evaluated(checkpoint, tmp_path, capsys)
    assert json.loads((first / "run.json").read_text())["checkpoint"] == str((checkpoint / FILE_NAME).resolve())
    before = state_of(first)
    second = evaluated(other, tmp_path, capsys)
    assert second.parent == first.parent and second.name.startswith(f"{first.name}_weights")
    assert state_of(first) == before and pngs(first) != pngs(second)
    made = {path: state for path, state in before.items() if path.suffix == ".png" and path.stem.isdecimal()}
    assert evaluated(checkpoint, tmp_path, capsys) == first and made.items() <= state_of(first).items()
    assert evaluated(other, tmp_path, capsys) == second
    assert evaluated(other, tmp_path / "alone", capsys).name == first.name
    changed(other, other)
    assert evaluated(other, tmp_path / "alone", capsys).name == first.name  # it replaces its own


def test_an_evaluation_of_before_is_known_by_its_weights(checkpoint, tmp_path, capsys):
    """Its run.json does not say which checkpoint it is of."""
    folder = evaluated(checkpoint, tmp_path, capsys)
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**run, "checkpoint": None}))
    assert evaluated(changed(checkpoint, tmp_path / "other"), tmp_path, capsys) != folder
    assert evaluated(checkpoint, tmp_path, capsys) == folder


def parts_of(place) -> SimpleNamespace:
    return SimpleNamespace(checkpoint=f"/{place}.pth", weights_hash=lambda: f"{place}-weights")


def test_of_processes_that_begin_at_once_the_first_has_the_folder(tmp_path, monkeypatch):
    """However late the other one comes between looking for the folder and taking it."""
    folder, begin = tmp_path / "out" / "setting", run_module.begin_folder

    def late(place, run):
        with monkeypatch.context() as patch:
            patch.setattr(run_module, "begin_folder", begin)
            assert claim_folder(folder, parts_of("a")) == folder
        begin(place, run)

    monkeypatch.setattr(run_module, "begin_folder", late)
    taken = claim_folder(folder, parts_of("b"))
    assert taken.name == "setting_weightsb-weight"
    assert [json.loads((f / "run.json").read_text())["checkpoint"] for f in (folder, taken)] == ["/a.pth", "/b.pth"]
    assert claim_folder(folder, parts_of("b")) == taken and claim_folder(folder, parts_of("a")) == folder
    assert not [file for file in tmp_path.rglob("*") if file.name.endswith(".tmp")]


def test_run_json_is_whole_and_the_first_ones(tmp_path, monkeypatch):
    """Also where the note appears while it is written, and on file systems without links."""
    pictures.begin_folder(tmp_path / "a", {"checkpoint": "first"})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_file", lambda path: False)  # as if looked for a moment before
        pictures.begin_folder(tmp_path / "a", {"checkpoint": "second"})
    assert pictures.read_run(tmp_path / "a") == {"checkpoint": "first"}

    def refuse(*places):
        raise PermissionError("no links here")

    monkeypatch.setattr("os.link", refuse)
    pictures.begin_folder(tmp_path / "b", {"checkpoint": "third"})
    assert pictures.read_run(tmp_path / "b") == {"checkpoint": "third"}
    assert sorted(file.name for file in tmp_path.rglob("*.*")) == ["run.json", "run.json"]


def test_a_sweep_finds_a_folder_taken_since_it_began(checkpoint, tmp_path, monkeypatch):
    """By another process, after the names were given; neither loses a picture."""
    out, other = tmp_path / "out", changed(checkpoint, tmp_path / "other")
    before, begun = {}, sample.run_setting

    def meanwhile(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(sample, "run_setting", begun)
            assert draw(other, out) == 0
        before.update(pngs(folder_of(out)))
        return begun(*arguments)

    monkeypatch.setattr(sample, "run_setting", meanwhile)
    assert draw(checkpoint, out) == 0
    first, second = rows(out)
    assert second["name"] == f"{first['name']}_weights{second['weights'][:8]}" and second["num_made"] == 24
    assert pngs(out / first["name"]) == before and len(pngs(out / second["name"])) == 24
