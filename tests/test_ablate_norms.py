"""scripts/ablate_norms.py: what it measures, what it writes, what it refuses."""

import csv
import math

import pytest
import torch

from scripts import ablate_norms
from scripts.ablate_norms import NORMS, AblateArgs, Largest, train
from tests.helpers_ids import add_tokenizers
from tests.helpers_maskgil import ENTRIES, LENGTH, shrink, tiny_maskgil
from tests.test_cli import refused

FLAGS = "--data digits --tokenizer grey16 --steps 3 --batch_size 64 --seeds 1,2".split()


@pytest.fixture(autouse=True)
def prepared(monkeypatch):
    add_tokenizers(monkeypatch)
    shrink(monkeypatch)


@torch.no_grad()
def test_the_largest_logit_is_that_of_all_layers_and_what_is_computed_stays():
    model, watched = tiny_maskgil(qk_norm=False), Largest()
    ids, mask = torch.arange(LENGTH).expand(2, -1), torch.arange(LENGTH).expand(2, -1) % 3 > 0
    seen = []

    def by_hand(query, key, value):
        logits = query.transpose(1, 2) @ key.transpose(1, 2).transpose(2, 3) / query.shape[-1] ** 0.5
        seen.append(logits.max())
        return (logits.softmax(dim=-1) @ value.transpose(1, 2)).transpose(1, 2)

    z = model.encode_decode(ids, mask)
    torch.testing.assert_close(model.encode_decode(ids, mask, attend=watched), z)
    torch.testing.assert_close(model.encode_decode(ids, mask, attend=by_hand), z, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(watched.read(), max(seen))
    assert len(seen) == 2 and watched.read() is None


def test_a_run_learns_and_ends_where_it_is_no_longer_finite():
    config = tiny_maskgil().config
    ids, labels = torch.zeros(8, LENGTH).long(), torch.zeros(8).long()
    args = AblateArgs(steps=6, batch_size=4, lr=1e-2, warmup_steps=0)
    curves = train(config, ids, labels, args, seed=1)
    assert curves[0]["loss"] == pytest.approx(math.log(ENTRIES + 1), rel=1e-5) and curves[-1]["loss"] < 2.5
    assert train(config, ids, labels, args, seed=1) == curves != train(config, ids, labels, args, seed=2)
    broken = train(config, ids, labels, AblateArgs(steps=6, batch_size=4, lr=1e30, warmup_steps=0), seed=1)
    assert 1 <= len(broken) < 6


def test_it_writes_a_table_and_curves_of_all_combinations(tmp_path, capsys):
    assert ablate_norms.main([*FLAGS, "--output_dir", str(tmp_path)]) == 0
    text = (tmp_path / "table.md").read_text()
    assert text in capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert [row[0] for row in rows[2:]] == list(NORMS) and {row[-1] for row in rows[2:]} == {"2 of 2"}
    lines = list(csv.DictReader((tmp_path / "curves.csv").open()))
    assert len(lines) == 4 * 2 * 3 and (tmp_path / "curves.png").stat().st_size > 1000
    # the first step has the same weights, ids and masks: with the output at zero it has the same loss
    first = {float(line["loss"]) for line in lines if line["step"] == "0"}
    assert max(first) - min(first) < 1e-5
    last = [line["attention_logit"] for line in lines if (line["seed"], line["step"]) == ("1", "2")]
    assert len(set(last)) == 4


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--seeds 1,x", "--seeds must be whole numbers with commas between, got '1,x'"),
        ("--tokenizer pixel", "--tokenizer pixel makes continuous tokens, it must be of ids"),
        ("--model mar_tiny", "--model: invalid value 'mar_tiny': must be one of maskgil_tiny"),
        ("--output_dir /proc/x", "--output_dir /proc/x"),
    ],
)
def test_what_cannot_be_is_one_line(flags, message, capsys):
    assert message in refused(ablate_norms.main, [*FLAGS, *flags.split()], capsys)
    line = refused(ablate_norms.main, ["--data", "digits"], capsys)
    assert "--tokenizer is missing" in line
