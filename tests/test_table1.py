"""scripts/table1.py: the commands of the eight rows are valid, and a whole table comes out of a tiny budget."""

import json
import shlex
from dataclasses import replace

import pytest

import main_mar
from scripts import table1
from scripts.table1 import PRESETS, rows_of
from tests.test_cli import refused

BUDGET = "epochs batch_size lr diffloss_d diffloss_w diffusion_batch_mul attn_dropout proj_dropout".split()


@pytest.mark.parametrize("preset", PRESETS)
def test_the_rows_are_those_of_the_paper(preset):
    rows = rows_of(PRESETS[preset])
    kinds = {(row.order, row.causal, row.several, row.loss) for row in rows}
    assert len(kinds) == 8 and len({row.name for row in rows}) == len(rows)
    assert len({row.model for row in rows}) == 3 * sum(map(len, PRESETS[preset].tokenizers.values()))


@pytest.mark.parametrize(
    "preset, data", [("digits", []), ("cifar10", ["--data_path", "x"]), ("mar_base", ["--data_path", "x"])]
)
def test_a_dry_run_prints_commands_that_training_takes(preset, data, tmp_path, capsys):
    out = tmp_path / "o"
    assert table1.main(["--preset", preset, *data, "--out", str(out), "--dry_run"]) == 0
    lines = [shlex.split(line)[1:] for line in capsys.readouterr().out.splitlines()]
    trained = [words[1:] for words in lines if words[0] == "main_mar.py"]
    assert len(trained) == 3 * len({row.model for row in rows_of(PRESETS[preset])}) and not out.exists()
    capsys.readouterr()
    budgets = set()
    for words in trained[::3]:
        assert main_mar.main([*words, "--dry_run"]) == 0
        config = json.loads(capsys.readouterr().out)
        budgets.add(tuple(config[name] for name in BUDGET))
    assert len(budgets) == 1  # what --preset says of MAR alone is said to all rows
    assert sum("--settings_of" in words for words in lines) == 2 * 3 * len(rows_of(PRESETS[preset]))


def test_odd_seeds_are_one_line(capsys):
    assert "'1,x'" in refused(table1.main, ["--seeds", "1,x"], capsys)


@pytest.mark.slow
def test_a_whole_table(tmp_path, monkeypatch, capsys):
    """Every row is trained, chosen, measured and printed."""
    preset = replace(PRESETS["digits"], training="--diffloss_w 16 --diffloss_d 1 --batch_size 512 --eval_freq 1000")
    preset = replace(preset, trained="--data digits --vq --codebook_size 256 --stride 2 --latent_channels 4 --epochs 1")
    monkeypatch.setitem(PRESETS, "digits", replace(preset, cfg="2", tau="1", diffusion="--num_sampling_steps 2"))
    flags = ["--out", str(tmp_path / "t"), "--seeds", "1", "--epochs", "1", "--few", "20", "--num_images", "20"]
    assert table1.main(flags) == 0
    table = (tmp_path / "t" / "table1.md").read_text()
    assert len(table.splitlines()) == 2 + 12 and all(line.endswith("| 1 |") for line in table.splitlines()[2:])
