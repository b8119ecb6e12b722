"""Two checkpoints sampled into one folder: neither takes the other's pictures, finished or not."""

import json
import shutil
from pathlib import Path

import pytest

from sampling.run import SamplingRun
from tests.test_sample import draw, folder_of, pngs, rows, state_of, train_tiny
from util.checkpoint import load_checkpoint, save_checkpoint


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
