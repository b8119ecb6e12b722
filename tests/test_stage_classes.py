"""--init_from on data with other classes: which rows of the class embedding a new stage starts with."""

import pytest
import torch

import main_mar
from tests.helpers import untrained
from tests.test_cli import TINY, refused
from util.checkpoint import load_checkpoint, save_checkpoint

NAME = "class_emb.weight"
DIGITS = [str(digit) for digit in range(10)]


def stored(folder, classes):
    """The folder of a checkpoint with classes of these names, its averages other than its weights."""
    content = load_checkpoint(untrained(folder))
    rows = torch.arange(len(classes)).reshape(-1, 1) + 100.0
    content["model"][NAME] = rows.expand(-1, content["model"][NAME].shape[1]).clone()
    content["model_ema"] = {name: value + 1 for name, value in content["model"].items()}
    content["config"]["mar"]["class_num"] = len(classes)
    content["config"]["data"]["classes"] = classes
    save_checkpoint(folder, content)
    return content


def start(tmp_path, monkeypatch, *flags):
    """The state that a run on the digits starts with."""
    seen = []
    monkeypatch.setattr("main_mar.train", lambda state, *a: seen.append(state) or 0)
    argv = [word.format(out=tmp_path / "out") for word in TINY]
    assert main_mar.main([*argv, *map(str, flags)]) == 0
    return seen[0]


def rows_of(weights) -> list[float | None]:
    """For each class the stored row's number, None for a fresh one."""
    return [row[0].item() if row[0] >= 50 else None for row in weights[NAME]]


FEWER = ["zero", "7", "3"]
MORE = [*DIGITS, "ten", "eleven"]
# classes of the checkpoint, flags -> rows that are kept, by class; the line
CASES = {
    "fewer": (FEWER, [], [None] * 10, "has 3 classes, the data 10: the class embedding starts anew"),
    "more": (MORE, [], [None] * 10, "has 12 classes, the data 10: the class embedding starts anew"),
    "kept of fewer": (
        FEWER, ["--keep_classes"], [None, None, None, 102, None, None, None, 101, None, None],
        "2 of the same name are kept, 8 start anew",
    ),
    "kept of more": (MORE[::-1], ["--keep_classes"], [111 - i for i in range(10)], "10 of the same name are kept, 0"),
    "none alike": (["a"], ["--keep_classes"], [None] * 10, "0 of the same name are kept, 10 start anew"),
    "same number": (DIGITS[::-1], [], [100 + i for i in range(10)], None),
    "same number, kept": (DIGITS[::-1], ["--keep_classes"], [109 - i for i in range(10)], "10 of the same name"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_rows_of_classes(case, tmp_path, monkeypatch, capsys):
    classes, flags, kept, line = CASES[case]
    content = stored(tmp_path / "in", classes)
    fresh = start(tmp_path, monkeypatch)
    state = start(tmp_path, monkeypatch, "--init_from", tmp_path / "in", *flags)
    out = [text for text in capsys.readouterr().out.splitlines() if "classes, the data" in text]
    assert len(out) == (line is not None) and (line is None or (line in out[0] and str(tmp_path / "in") in out[0]))
    raw, averaged = state.model.state_dict(), state.ema.weights
    assert rows_of(raw) == kept
    assert rows_of(averaged) == [row if row is None else row + 1 for row in kept]
    for i, row in enumerate(kept):
        if row is None:
            assert torch.equal(raw[NAME][i], fresh.model.state_dict()[NAME][i])
            assert torch.equal(averaged[NAME][i], raw[NAME][i])
    for name in content["model"].keys() - {NAME}:
        assert torch.equal(raw[name].cpu(), content["model"][name])
        assert torch.equal(averaged[name].cpu(), content["model_ema"][name])


def test_a_resume_needs_the_same_number(tmp_path, monkeypatch, capsys):
    stored(tmp_path / "in", FEWER)
    argv = [word.format(out=tmp_path / "out") for word in TINY]
    for flags in ([], ["--keep_classes", "--init_from", str(tmp_path / "in")], ["--allow_mismatch"]):
        line = refused(main_mar.main, [*argv, "--resume", str(tmp_path / "in"), *flags], capsys)
        assert "has 3 classes" in line and "have 10" in line and "--init_from" in line


def test_a_file_without_names_starts_anew_and_keeps_none(tmp_path, monkeypatch, capsys):
    content = stored(tmp_path / "in", FEWER)
    torch.save({"model": content["model"]}, tmp_path / "published.pth")
    state = start(tmp_path, monkeypatch, "--init_from", tmp_path / "published.pth")
    assert rows_of(state.model.state_dict()) == [None] * 10 and "starts anew" in capsys.readouterr().out
    argv = [word.format(out=tmp_path / "out2") for word in TINY]
    line = refused(main_mar.main, [*argv, "--init_from", str(tmp_path / "published.pth"), "--keep_classes"], capsys)
    assert "--keep_classes" in line and "published.pth" in line


def test_classes_that_nothing_would_train_are_refused(tmp_path, monkeypatch, capsys):
    stored(tmp_path / "in", MORE)
    argv = [*(word.format(out=tmp_path / "out") for word in TINY), "--init_from", str(tmp_path / "in")]
    assert "--freeze_backbone" in refused(main_mar.main, [*argv, "--freeze_backbone"], capsys)
    start(tmp_path, monkeypatch, "--init_from", tmp_path / "in", "--freeze_backbone", "--keep_classes")


@pytest.mark.slow
def test_a_stage_with_other_classes_trains_and_continues(tmp_path):
    """Its checkpoint is one of ten classes, which --resume continues with the same command."""
    stored(tmp_path / "in", FEWER)
    argv = [word.format(out=tmp_path / "out") for word in TINY]
    argv += ["--init_from", str(tmp_path / "in"), "--keep_classes", "--resume", str(tmp_path / "out")]
    quick = "--metrics none --num_images 10".split()
    assert main_mar.main([*argv, *quick]) == 0
    content = load_checkpoint(tmp_path / "out")
    assert len(content["model"][NAME]) == 10 and content["config"]["data"]["classes"] == DIGITS
    assert main_mar.main([*argv, *quick, "--epochs", "2"]) == 0
    assert load_checkpoint(tmp_path / "out")["epoch"] == 1
