"""A checkpoint of a run with heads, written before the code was laid out anew, still resumes, samples and evaluates.

fixtures/run_with_heads.pth.xz is a checkpoint of commit 6626e1e after one epoch, run_with_heads.json what that commit
then made of it: the losses of a second epoch, and every other pixel of pictures in two modes.
"""

import json
import lzma
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import main_mar
import sample
from models.mar import MAR_CONFIGS
from util.images.pictures import load_samples

pytestmark = pytest.mark.on_cpu("losses and pictures are compared with those that a CPU made")

FIXTURES = Path(__file__).parent / "fixtures"
EXPECTED = json.loads((FIXTURES / "run_with_heads.json").read_text())
SIZES = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in
         (("embed_dim", 4), ("depth", 1), ("num_heads", 2))}  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The folder of the run, whose model is smaller than any that --model names."""
    monkeypatch.setitem(MAR_CONFIGS, "mar_tiny", replace(MAR_CONFIGS["mar_tiny"], **SIZES))
    content = lzma.decompress((FIXTURES / "run_with_heads.pth.xz").read_bytes())
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint-last.pth").write_bytes(content)
    return tmp_path / "run"


def train(run, *flags):
    return main_mar.main([*EXPECTED["flags"].split(), "--output_dir", str(run), "--resume", str(run), *flags])


def assert_alike(folder, expected):
    """The pictures of a folder, up to a grey level: those of another processor may differ in a rounding."""
    made = load_samples(folder)["images"][:, ::2, ::2, 0].astype(int)
    assert np.abs(made - np.array(expected)).max() <= 1


def test_it_continues_with_the_losses_of_then(run, capsys):
    assert train(run, "--epochs", "2") == 0
    assert "changed since the checkpoint: --epochs 1 -> 2\n" in capsys.readouterr().out
    losses = [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(losses, EXPECTED["losses"], rtol=1e-4)


def test_it_evaluates_to_the_pictures_of_then(run):
    assert train(run, "--epochs", "1", "--evaluate", "--infer_mode", "policy", "--order", "halton") == 0
    assert_alike(run / "evaluation" / EXPECTED["evaluation"], EXPECTED["evaluated"])


def test_it_samples_the_pictures_of_then(run, tmp_path):
    """Named by their settings; the seed was 0 by default."""
    flags = "--infer_mode both --cfg_schedule linear --order random --cfg 1.5 --num_images 10 --seed 0"
    assert sample.main(["--checkpoint", str(run), "--output_dir", str(tmp_path / "out"), *flags.split()]) == 0
    assert_alike(tmp_path / "out" / EXPECTED["folder"], EXPECTED["images"])
