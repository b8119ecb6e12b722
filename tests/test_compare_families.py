"""scripts/compare_families.py: its commands are valid, and both tables come out of a tiny budget."""

import json
import shlex
from dataclasses import replace

import pytest

import main_mar
from models.families import FAMILIES
from scripts import compare_families
from scripts.compare_families import ROWS


def test_a_dry_run_prints_commands_that_training_takes(tmp_path, monkeypatch, capsys):
    out = tmp_path / "o"
    assert compare_families.main(["--out", str(out), "--dry_run"]) == 0
    lines = [shlex.split(line)[1:] for line in capsys.readouterr().out.splitlines()]
    trained = [words[1:] for words in lines if words[0] == "main_mar.py" and "--init_from" not in words]
    assert len(trained) == 3 * len(ROWS) and not out.exists()
    assert sum("--init_from" in words for words in lines) == 3 * sum(bool(row.learn) for row in ROWS)
    families = set()
    for words in trained[::3]:
        assert main_mar.main([*words, "--dry_run"]) == 0
        families.add(json.loads(capsys.readouterr().out)["model"].split("_")[0])
    assert families == {"mar", "causal", "var", "maskgil"} and len(FAMILIES) == 5  # mar_ar: of scripts/table1.py


@pytest.mark.slow
def test_both_tables_of_a_tiny_budget(tmp_path, monkeypatch):
    """Every family is trained, chosen and measured, and so are its heads."""
    small = [replace(row, grid="--cfg 2 --temperature 1", training=f"{row.training} --batch_size 512") for row in ROWS]
    few = "--num_iter 3 --num_sampling_steps 2 --solver dpmpp_sde"
    small = [replace(row, steps=few) if "group" in row.learn else row for row in small]
    monkeypatch.setattr(compare_families, "ROWS", small)
    monkeypatch.setattr(compare_families, "HEADS", compare_families.HEADS.replace("--bank 1024", "--bank 512"))
    monkeypatch.setattr(compare_families, "VQ_EPOCHS", dict.fromkeys(compare_families.VQ_EPOCHS, 1))
    monkeypatch.setattr(compare_families, "TRAIN_SCALES", f"{compare_families.TRAIN_SCALES} --epochs 1")
    flags = ["--out", str(tmp_path / "t"), "--seeds", "1", "--epochs", "1", "--few", "20", "--num_images", "20"]
    assert compare_families.main(flags) == 0
    first = (tmp_path / "t" / "families.md").read_text().splitlines()
    heads = (tmp_path / "t" / "heads.md").read_text().splitlines()
    assert len(first) == 2 + 4 and all(line.endswith("| 1 |") for line in first[2:])
    assert [line.split(" | ")[0].strip("| ") for line in heads[2:]] == [
        *("MAR: guidance", "MAR: both", "MAR, cross-entropy: guidance", "MAR, cross-entropy: both"),
        *("VAR: guidance", "MaskGIL: guidance", "MaskGIL: both"),
    ]
