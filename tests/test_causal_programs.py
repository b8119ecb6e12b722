"""Training, resuming, sampling and editing with causal models through the programs, and what these refuse."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import main_mar
import sample
from models.blocks import Llama
from models.causal_gpt import CausalGPT
from models.loading import load_model
from models.mar_ar import MARAR
from tests import helpers_ids
from tests.test_cli import refused
from tests.test_train import assert_same
from training.checkpoints import regrouped
from training.optim import make_optimizer
from util.checkpoint import load_checkpoint

pytestmark = pytest.mark.on_cpu("runs are compared bit for bit, which a GPU promises with --deterministic alone")

TRAIN = "--data digits --lr_schedule constant --img_size 8 --batch_size 512 --blr 0.01 --num_images 4".split()
TRAIN += "--metrics none --eval_freq 100 --num_workers 0 --warmup_epochs 0".split()
IDS = "--model mar_ar_tiny --tokenizer grey16 --loss ce".split()
LATENTS = "--model mar_ar_tiny --tokenizer pixel --patch_size 2 --diffloss_w 16 --diffloss_d 1".split()
GPT = "--model causal_gpt_tiny --tokenizer grey16".split()
KINDS = {"ids": [*IDS, "--ar_order", "random"], "latents": [*LATENTS, "--ar_order", "random"], "causal_gpt": GPT}
SAMPLE = "--num_images 4 --metrics none --cfg 1.5 --num_sampling_steps 2".split()


@pytest.fixture(autouse=True)
def tokenizers(monkeypatch):
    helpers_ids.add_tokenizers(monkeypatch)


def edit(folder, tmp_path, kept):
    """Words that keep the part of a picture for which kept (8, 8) bool says so."""
    picture = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "picture.png")
    Image.fromarray(np.where(kept, 0, 255).astype(np.uint8)).save(tmp_path / "mask.png")
    place = ["--checkpoint", str(folder), "--output_dir", str(tmp_path / "out"), *SAMPLE]
    return [*place, "--edit_image", str(tmp_path / "picture.png"), "--edit_mask", str(tmp_path / "mask.png")], picture


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("ids", "latents")]


@pytest.fixture(scope="module", params=[*SLOW, "causal_gpt"])
def trained(request, tmp_path_factory):
    """(kind, folder of a run of two epochs without a stop)."""
    folder = tmp_path_factory.mktemp(request.param.split()[0]) / "run"
    with pytest.MonkeyPatch.context() as patch:
        helpers_ids.add_tokenizers(patch)
        words = [*TRAIN, *KINDS[request.param], "--epochs", "2", "--ema_rate", "0.9", "--output_dir", str(folder)]
        assert main_mar.main(words) == 0
    return request.param, folder


def test_a_run_that_stops_and_goes_on_is_the_run_that_never_stopped(trained, tmp_path):
    """Weights, averages, moments, draws of dropout and orders: everything in the file."""
    kind, folder = trained
    words = [*TRAIN, *KINDS[kind], "--ema_rate", "0.9", "--output_dir", str(tmp_path), "--keep_last", "5"]
    assert main_mar.main([*words, "--epochs", "1"]) == 0
    assert main_mar.main([*words, "--epochs", "2", "--resume", str(tmp_path)]) == 0
    assert_same(load_checkpoint(folder), load_checkpoint(tmp_path))
    assert losses(folder) == losses(tmp_path) and losses(folder)[-1] < losses(folder)[0]


def test_both_weights_of_a_checkpoint_load(trained):
    """The raw ones and their average, each into the family's model."""
    kind, folder = trained
    stored = load_checkpoint(folder)
    assert stored["config"]["sample"]["num_iter"] == stored["args"]["num_iter"] == 16  # a token a step
    for ema, key in ((True, "model_ema"), (False, "model")):
        model, _, _ = load_model(folder, ema=ema)
        assert isinstance(model, CausalGPT if kind == "causal_gpt" else MARAR)
        own = model.state_dict()
        assert own.keys() == stored[key].keys() and all(own[name].equal(value) for name, value in stored[key].items())
    names = {name for name, value in stored["model"].items() if not value.equal(stored["model_ema"][name])}
    assert names == stored["model"].keys()  # all of them learn


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_like_one(kind, tmp_path):
    """torchrun with gloo against one process at the same global batch, to rounding; without dropout, which differs."""
    without = [f"--{name}_dropout_p=0" for name in ("token", "resid", "ffn")]
    without = without if kind == "causal_gpt" else ["--attn_dropout=0", "--proj_dropout=0"]
    words = [*TRAIN, *KINDS[kind], *without, "--epochs", "2", "--output_dir"]
    assert main_mar.main([*words, str(tmp_path / "one")]) == 0
    helpers_ids.in_two_processes(tmp_path, [*words, str(tmp_path / "two"), "--batch_size", "256"])
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=2e-3)


@pytest.mark.parametrize("kind", [IDS, LATENTS], ids=["ids", "latents"])
def test_a_random_model_samples_in_any_order_and_edits(kind, tmp_path):
    folder = tmp_path / "run"
    assert main_mar.main([*TRAIN, *kind, "--ar_order", "random", "--epochs", "1", "--output_dir", str(folder)]) == 0
    stored = load_checkpoint(folder)
    assert stored["config"]["family"] == "mar_ar" and stored["config"]["mar_ar"]["ar_order"] == "random"
    place = ["--checkpoint", str(folder), "--output_dir", str(tmp_path / "out"), *SAMPLE]
    for order in ("random", "raster"):
        assert sample.main([*place, "--order", order]) == 0
    rows = [json.loads(line)["settings"] for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [(row["order"], row["group"], row["num_iter"]) for row in rows] == [
        ("random", "one", 16), ("raster", "one", 16)
    ]  # fmt: skip
    kept = np.indices((8, 8))[1] >= 4
    words, picture = edit(folder, tmp_path, kept)
    assert sample.main(words) == 0
    if kind is LATENTS:
        (made,) = (tmp_path / "out").glob("*_edit*/0.png")
        assert np.array_equal(np.asarray(Image.open(made)).squeeze()[kept], picture[kept])


def test_a_raster_model_keeps_its_order_and_prefixes(tmp_path, capsys):
    folder = tmp_path / "run"
    words = [*TRAIN, *IDS, "--ar_order", "raster", "--epochs", "1", "--output_dir", str(folder)]
    assert main_mar.main(words) == 0
    place = ["--checkpoint", str(folder), "--output_dir", str(tmp_path / "out"), *SAMPLE]
    assert sample.main(place) == 0
    assert "--order random does not fit the model, which needs raster" in refused(
        sample.main, [*place, "--order", "random"], capsys
    )
    assert "--group cosine does not fit the model, which needs one" in refused(
        sample.main, [*place, "--group", "cosine"], capsys
    )
    words, _ = edit(folder, tmp_path, np.indices((8, 8))[0] < 4)  # the upper half: the first tokens
    assert sample.main(words) == 0
    words, _ = edit(folder, tmp_path, np.indices((8, 8))[0] >= 4)
    assert "a raster model keeps only the first tokens of an image" in refused(sample.main, words, capsys)


@pytest.mark.slow
def test_heads_are_learned_on_images(tmp_path, capsys):
    folder = tmp_path / "run"
    assert main_mar.main([*TRAIN, *IDS, "--epochs", "1", "--output_dir", str(folder)]) == 0
    stage = [*TRAIN, *IDS, "--init_from", str(folder), "--output_dir", str(tmp_path / "stage"), "--epochs", "1"]
    on_images = [*stage, *"--objective image --bank 300 --features digits --cfg 1.5".split()]
    assert main_mar.main([*on_images, "--learn", "tau,cfg"]) == 0
    heads, args = (load_checkpoint(tmp_path / "stage")[key] for key in ("heads", "args"))
    assert args["train_num_iter"] == "16,16"
    assert any(value.abs().max() > 0 for name, value in heads.items() if name.endswith("values"))
    line = refused(main_mar.main, [*on_images, "--learn", "order", "--output_dir", str(tmp_path / "order")], capsys)
    assert "--order must be known before the first token is drawn" in line
    line = refused(
        main_mar.main, [*stage, "--learn", "cfg", "--freeze_backbone", "--output_dir", str(tmp_path / "cfg")], capsys
    )
    assert "--learn cfg: --objective token learns heads on masks" in line and "use --objective image" in line


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--ar_order spiral", "--ar_order: invalid value 'spiral': must be one of random, raster"),
        ("--ar_order raster --order random", "--order random does not fit mar_ar_tiny, which needs raster"),
        ("--group cosine", "--group cosine does not fit mar_ar_tiny, which needs one"),
        ("--order confidence", "--order must be known before the first token is drawn"),
        ("--num_iter 15", "--num_iter 15 is too small: this model draws one token a step, an image has 16"),
        ("--mask_ratio_min 0.5", "--mask_ratio_min 0.5 has no meaning for --model mar_ar_tiny"),
        ("--train_masks visited", "--train_masks visited must be random: this model draws one token a step"),
        ("--model mar_tiny --ar_order raster", "--ar_order raster has no meaning for --model mar_tiny"),
    ],
)
def test_flags_that_do_not_fit_a_causal_model_are_refused(flags, message, capsys, tmp_path):
    words = [*TRAIN, *IDS, "--epochs", "1", *flags.split(), "--output_dir", str(tmp_path / "run")]
    assert message in refused(main_mar.main, words, capsys)


def test_a_run_of_before_the_output_had_weight_decay_goes_on(tmp_path):
    """Its moments stay with their parameters, which stand in other groups now."""
    words = [*TRAIN, *GPT, "--output_dir", str(tmp_path / "run"), "--resume", str(tmp_path / "run"), "--epochs"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Llama, "no_decay", None)
        assert main_mar.main([*words, "1"]) == 0
    stored, model = load_checkpoint(tmp_path / "run")["optimizer"], load_model(tmp_path / "run")[0]
    before, now = (make_optimizer(model, model.output, 0, 0, way) for way in (None, ()))
    before.load_state_dict(stored)
    now.load_state_dict(regrouped(stored, SimpleNamespace(optimizer=now, model=model, objective=model)))
    assert all(now.state[p]["exp_avg"].equal(before.state[p]["exp_avg"]) for p in model.parameters())
    assert main_mar.main([*words, "2"]) == 0
