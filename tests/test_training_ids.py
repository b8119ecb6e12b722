"""Runs over ids: training, resuming, two processes, heads, sampling, traces, editing, and what is refused."""

import json

import numpy as np
import pytest
from PIL import Image

import main_mar
import sample
from models.loading import load_mar
from sampling.run import sample_images
from sampling.settings import SampleConfig
from tests import helpers_family
from tests.helpers import each_rank, on_cpu
from tests.helpers_ids import ENTRIES, GreyIds, add_tokenizers, in_two_processes
from tests.test_cli import refused
from util.checkpoint import load_checkpoint

pytestmark = pytest.mark.on_cpu("runs are compared bit for bit, which a GPU promises with --deterministic alone")

TRAIN = """
    --data digits --model mar_tiny --tokenizer grey16 --loss ce --img_size 8 --buffer_size 2 --batch_size 256 --blr 0.01
    --warmup_epochs 0 --lr_schedule constant --num_iter 3 --num_images 20 --metrics none --eval_freq 100
    --num_workers 0
""".split()
SAMPLE = "--num_images 6 --metrics none --num_iter 3 --cfg 1.5 --eval_bsz 6".split()


@pytest.fixture(autouse=True)
def tokenizers(monkeypatch):
    add_tokenizers(monkeypatch)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two epochs with order, group and cfg heads."""
    folder = tmp_path_factory.mktemp("ids") / "run"
    with pytest.MonkeyPatch.context() as patch:
        add_tokenizers(patch)
        assert main_mar.main([*TRAIN, "--learn", "order,group,cfg", "--epochs", "2", "--output_dir", str(folder)]) == 0
    return folder


def records(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_it_trains_with_heads_and_says_what_it_is(run):
    config, log = load_checkpoint(run)["config"], records(run)
    assert config["mar"]["loss"] == "ce" and config["mar"]["vocab_size"] == ENTRIES
    assert log[0]["ce"] == pytest.approx(np.log(ENTRIES), rel=0.05) and log[-1]["ce"] < 0.9 * log[0]["ce"]
    assert {"order", "size", "budget", "cfg", "w_mean"} <= log[-1].keys() and "mse" not in log[-1]
    mar, tokenizer, _ = load_mar(run)
    assert mar.config.loss == "ce" and tokenizer.codebook_size == ENTRIES
    heads = load_checkpoint(run)["heads"]
    for name in ("order", "group", "cfg"):
        assert any(v.any() for k, v in heads.items() if k.startswith(f"heads.{name}.") and k.endswith("weight"))


def test_a_run_that_stops_and_goes_on_is_the_run_that_never_stopped(run, tmp_path):
    words = [*TRAIN, "--learn", "order,group,cfg", "--output_dir", str(tmp_path), "--keep_last", "5"]
    assert main_mar.main([*words, "--epochs", "1"]) == 0
    assert main_mar.main([*words, "--epochs", "2", "--resume", str(tmp_path)]) == 0
    whole, parts = load_checkpoint(run), load_checkpoint(tmp_path)
    for key in ("model", "model_ema", "heads", "heads_ema"):
        assert all(parts[key][name].equal(value) for name, value in whole[key].items())


@pytest.mark.slow
def test_two_processes_train_like_one(run, tmp_path):
    """torchrun with gloo against one process at the same global batch, to rounding."""
    words = [*TRAIN, "--learn", "order,group,cfg", "--output_dir", str(tmp_path / "two"), "--batch_size", "128"]
    in_two_processes(tmp_path, [*words, "--epochs", "2"])
    one, two = (records(folder) for folder in (run, tmp_path / "two"))
    assert len(one) == len(two)
    for before, after in zip(one, two):
        assert after["ce"] == pytest.approx(before["ce"], rel=2e-3)


def outputs(folder, out, *flags):
    assert sample.main(["--checkpoint", str(folder), "--output_dir", str(out), *SAMPLE, *flags]) == 0
    (made,) = [path for path in out.iterdir() if path.is_dir()]
    return {path.name: np.asarray(Image.open(path)) for path in made.glob("?.png")}


def test_images_are_the_same_at_any_batch_size(run, tmp_path):
    whole = outputs(run, tmp_path / "whole", "--infer_mode", "policy", "--order", "confidence", "--top_k", "9")
    parts = outputs(
        run, tmp_path / "parts", "--infer_mode", "policy", "--order", "confidence", "--top_k", "9", "--eval_bsz", "2"
    )
    assert len(whole) == 6 and all(np.array_equal(parts[name], image) for name, image in whole.items())
    assert len({image.tobytes() for image in whole.values()}) > 1
    # cells of 2×2 pixels, of the codebook's levels
    assert all(np.array_equal(image, image[::2, ::2].repeat(2, axis=0).repeat(2, axis=1)) for image in whole.values())


def test_two_processes_make_the_same_images(run, tmp_path, monkeypatch):
    mar, tokenizer, _ = load_mar(run)
    parts = on_cpu(mar, tokenizer)
    sampling, labels = SampleConfig(num_iter=3, cfg=2.0, top_p=0.9), [0, 1, 2, 3, 4, 5]
    sample_images(parts, sampling, labels, 3, tmp_path / "one", batch_size=2)
    for _ in each_rank(monkeypatch):
        sample_images(parts, sampling, labels, 3, tmp_path / "two", batch_size=2)
    for i in range(6):
        one, two = (np.asarray(Image.open(tmp_path / name / f"{i}.png")) for name in ("one", "two"))
        assert np.array_equal(one, two)


def test_traces_and_editing(run, tmp_path):
    outputs(run, tmp_path / "trace", "--save_trace", "3", "--order", "confidence")
    (made,) = (tmp_path / "trace").glob("*/trace.npz")
    trace = np.load(made)
    assert trace["order_step"].min() == 0 and (trace["group_size"].sum(axis=1) == 16).all()
    assert np.array_equal(trace["frames"][0, -1].squeeze(), np.asarray(Image.open(made.parent / "0.png")))
    picture = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "picture.png")
    Image.fromarray(np.repeat(np.uint8([[255, 0]]), 4, axis=1).repeat(8, axis=0)).save(tmp_path / "mask.png")
    edit = ["--edit_image", str(tmp_path / "picture.png"), "--edit_mask", str(tmp_path / "mask.png")]
    for name, image in outputs(run, tmp_path / "edit", *edit).items():
        assert np.array_equal(image.squeeze()[:, 4:], picture[:, 4:]), name


def test_heads_learn_tau_and_w_from_images(run, tmp_path):
    words = "--objective image --learn tau,cfg --bank 300 --epochs 1 --cfg 1.5 --features digits".split()
    stage = [*TRAIN, *words, "--output_dir", str(tmp_path), "--init_from", str(run)]
    assert main_mar.main(stage) == 0
    heads = load_checkpoint(tmp_path)["heads"]
    for name in ("tau", "cfg"):
        assert any(value.abs().max() > 0 for key, value in heads.items() if key == f"heads.{name}.values")
    before, after = load_checkpoint(run), load_checkpoint(tmp_path)
    assert all(after["model_ema"][name].equal(value) for name, value in before["model_ema"].items())


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--tokenizer pixel", "makes continuous tokens, --loss ce takes discrete ones: choose --loss diffusion or"),
        ("--loss diffusion", "makes discrete tokens, --loss diffusion takes continuous ones: choose --loss ce or"),
        ("--vocab_size 32", "--vocab_size 32 does not fit the tokenizer grey16, which has 16"),
        ("--learn tau", "--learn tau: --objective token learns it by the noise of a diffusion loss"),
        ("--train_masks visited --order confidence", "--order confidence looks at tokens that the model draws"),
        ("--train_masks policy --learn order --order_base confidence", "--order_base confidence looks at tokens that"),
        ("--cfg_profile interval", "--cfg_profile must be constant"),
        ("--label_smoothing 1.5", "--label_smoothing: invalid value '1.5'"),
        ("--patch_size 2", "--patch_size 2 must be 1 with --loss ce"),
    ],
)
def test_what_does_not_fit_ids_is_refused(flags, message, capsys, tmp_path):
    line = refused(main_mar.main, [*TRAIN, *flags.split(), "--output_dir", str(tmp_path)], capsys)
    assert message in line


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--top_k 4", "--top_k 4 must be 0: this model draws tokens that are no ids (--loss ce)"),
        ("--top_p 0.5", "--top_p 0.5 must be 1"),
        ("--order confidence", "--order confidence needs the probability of a token"),
    ],
)
def test_what_only_ids_have_is_refused_elsewhere(flags, message, capsys, tmp_path):
    words = "--preset digits --buffer_size 2".split()
    line = refused(main_mar.main, [*words, *flags.split(), "--output_dir", str(tmp_path)], capsys)
    assert message in line


def test_another_codebook_is_refused(run, tmp_path, capsys, monkeypatch):
    words = [*TRAIN, "--learn", "order,group,cfg", "--output_dir", str(tmp_path), "--tokenizer", "grey32"]
    for where in (["--resume", str(run)], ["--init_from", str(run)]):
        line = refused(main_mar.main, [*words, *where], capsys)
        assert "the checkpoint is for a codebook of 16 entries, the tokenizer grey32 has 32" in line
    monkeypatch.setattr(GreyIds, "__init__", lambda self, entries=8, init=GreyIds.__init__: init(self, entries))
    line = refused(sample.main, ["--checkpoint", str(run), "--output_dir", str(tmp_path), *SAMPLE], capsys)
    assert "is for a codebook of 16 entries, the tokenizer grey8 has 8" in line


def test_a_family_without_the_flag_refuses_it(monkeypatch, capsys, tmp_path):
    helpers_family.add_family(monkeypatch)
    words = "--data digits --model mean_small --tokenizer pixel --loss ce".split()
    line = refused(main_mar.main, [*words, "--output_dir", str(tmp_path)], capsys)
    assert "--loss ce has no meaning for --model mean_small" in line
