"""One file and one row make a family: training, heads, evaluation, resuming, sampling, loading, refusals."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import main_mar
import sample
from models import families
from models.loading import load_mar, load_model
from scripts import export_weights
from tests import helpers_family
from tests.test_cli import refused
from util.checkpoint import load_checkpoint

pytestmark = pytest.mark.on_cpu("runs are compared bit for bit, which a GPU promises with --deterministic alone")

TRAIN = "--data digits --model mean_small --tokenizer pixel --img_size 8 --batch_size 256 --blr 0.01".split()
TRAIN += "--num_iter 3 --num_images 20 --metrics none --eval_freq 100 --num_workers 0".split()
SAMPLE = "--num_images 4 --metrics none --num_iter 3 --cfg 1.5".split()


@pytest.fixture(autouse=True)
def row(monkeypatch):
    helpers_family.add_family(monkeypatch)


@pytest.fixture
def run(tmp_path):
    words = [*TRAIN, "--learn", "group,tau,cfg", "--output_dir", str(tmp_path / "run")]
    assert main_mar.main([*words, "--epochs", "1"]) == 0
    return words, tmp_path / "run"


def test_it_trains_resumes_evaluates_samples_and_loads(run, tmp_path):
    words, folder = run
    first = load_checkpoint(folder)
    assert first["config"]["family"] == "mean" and first["config"]["mean"]["hidden"] == 12
    assert first["config"]["mean"]["class_num"] == 10 and first["config"]["sample"]["order"] == "raster"
    assert main_mar.main([*words, "--epochs", "2", "--resume", str(folder)]) == 0
    second = load_checkpoint(folder)
    assert second["step"] == 2 * first["step"]
    losses = [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    assert main_mar.main([*words, "--resume", str(folder), "--evaluate"]) == 0
    assert sample.main(["--checkpoint", str(folder), "--output_dir", str(tmp_path / "out"), *SAMPLE]) == 0
    assert (
        sample.main(
            ["--checkpoint", str(folder), "--output_dir", str(tmp_path / "out"), *SAMPLE, "--infer_mode", "both"]
        )
        == 0
    )
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [row["settings"]["order"] for row in rows] == ["raster", "raster"]
    model, _, config = load_model(folder)
    assert isinstance(model, helpers_family.MeanModel) and torch.equal(
        model.mix.weight, second["model_ema"]["mix.weight"]
    )
    with pytest.raises(ValueError, match="family mean, not mar"):
        load_mar(folder)


def test_a_new_stage_starts_from_its_frozen_weights(run, tmp_path):
    """Those that are sampled with."""
    words, folder = run
    stage = [*TRAIN, "--output_dir", str(tmp_path / "stage"), "--epochs", "1", "--freeze_backbone"]
    assert main_mar.main([*stage, "--init_from", str(folder)]) == 0
    assert load_checkpoint(tmp_path / "stage")["model"]["mix.weight"].equal(
        load_checkpoint(folder)["model_ema"]["mix.weight"]
    )


def test_heads_are_trained_on_its_images(run, tmp_path):
    """By the other objective: through the loop and the token head."""
    _, folder = run
    words = "--objective image --learn tau,cfg --bank 300 --epochs 1 --cfg 1.5 --num_sampling_steps 1".split()
    stage = [*TRAIN, *words, "--features", "digits", "--output_dir", str(tmp_path / "image")]
    assert main_mar.main([*stage, "--init_from", str(folder)]) == 0
    heads = load_checkpoint(tmp_path / "image")["heads"]
    assert any(value.abs().max() > 0 for name, value in heads.items() if name.endswith("values"))


def test_export_editing_traces_and_visited_masks(run, tmp_path):
    words, folder = run
    assert (
        main_mar.main([*TRAIN, "--epochs", "1", "--train_masks", "visited", "--output_dir", str(tmp_path / "v")]) == 0
    )
    exported = str(tmp_path / "x.safetensors")
    assert export_weights.main(["--checkpoint", str(folder), "--output", exported]) == 0
    picture = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "picture.png")
    Image.fromarray(np.repeat(np.uint8([[255, 0]]), 4, axis=1).repeat(8, axis=0)).save(tmp_path / "mask.png")
    place = ["--checkpoint", exported, "--output_dir", str(tmp_path / "out"), *SAMPLE]
    edit = ["--edit_image", str(tmp_path / "picture.png"), "--edit_mask", str(tmp_path / "mask.png")]
    assert sample.main([*place, *edit]) == 0 and sample.main([*place, "--save_trace", "2", "--seed", "4"]) == 0
    (made,) = (tmp_path / "out").glob("*_edit*/0.png")
    assert np.array_equal(np.asarray(Image.open(made))[:, 4:].squeeze(), picture[:, 4:])


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--diffloss_d 3", "--diffloss_d 3 has no meaning for --model mean_small"),
        ("--order random", "--order random does not fit mean_small, which needs raster"),
        ("--noise -1", "--noise: invalid value '-1'"),
    ],
)
def test_flags_that_do_not_fit_it_are_refused(flags, message, capsys, tmp_path):
    line = refused(main_mar.main, [*TRAIN, *flags.split(), "--output_dir", str(tmp_path)], capsys)
    assert message in line


def test_checkpoints_of_other_families_and_rules_are_refused(run, capsys, tmp_path):
    _, folder = run
    line = refused(
        main_mar.main, ["--data", "digits", "--init_from", str(folder), "--output_dir", str(tmp_path / "x")], capsys
    )
    assert "the checkpoint is of the family mean, the model that --model names of mar" in line
    place = ["--checkpoint", str(folder), "--output_dir", str(tmp_path / "out")]
    assert "--order random does not fit the model, which needs raster" in refused(
        sample.main, [*place, "--order", "random"], capsys
    )
    assert "--diffloss_d 3 has no meaning" in refused(sample.main, [*place, "--diffloss_d", "3"], capsys)
    line = refused(sample.main, [*place, "--model", "mean_large"], capsys)
    assert f"--model mean_large does not fit {folder}, which has hidden 12" in line
    assert "--model mar_tiny does not fit" in refused(sample.main, [*place, "--model", "mar_tiny"], capsys)


def test_a_tokenizer_of_other_tokens_is_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(families.FAMILIES, "mean", helpers_family.ROW._replace(tokens=("discrete",)))
    line = refused(main_mar.main, [*TRAIN, "--output_dir", str(tmp_path)], capsys)
    assert "the tokenizer pixel makes continuous tokens, the family mean takes discrete ones" in line


def test_its_sizes_keep_their_own_values(capsys):
    for size, hidden, noise in (("mean_small", 12, 0.2), ("mean_large", 24, 0.3)):
        assert main_mar.main(["--data", "digits", "--model", size, "--dry_run"]) == 0
        shown = json.loads(capsys.readouterr().out)
        assert shown["mean"]["hidden"] == hidden and shown["noise"] == shown["mean"]["noise"] == noise
        assert "mar" not in shown
        assert shown["mean"]["label_drop_prob"] == 0.2 and shown["mean"]["diffusion_batch_mul"] == 5  # no preset's
