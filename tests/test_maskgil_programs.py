"""MaskGIL through the programs: training on images and caches, resuming, two processes, heads, sampling, refusals."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import main_mar
import sample
from heads.policy import build_rules
from models.loading import load_model
from models.mask_schedules import MASK_RATIOS
from models.maskgil import MaskGIL, draw_mask, token_loss
from sampling.loop import generate
from scripts import cache_latents
from tests.helpers_ids import ENTRIES, add_tokenizers, in_two_processes
from tests.helpers_maskgil import LENGTH, shrink, tiny_maskgil
from tests.test_cli import refused
from training.config import TrainConfig, resolve
from training.objectives.draws import DrawSettings, training_draws
from training.objectives.token import Batch, TokenObjective
from training.optim import make_optimizer
from util.checkpoint import load_checkpoint

pytestmark = pytest.mark.on_cpu("runs are compared bit for bit, which a GPU promises with --deterministic alone")

TRAIN = "--data digits --model maskgil_tiny --tokenizer grey16 --img_size 8 --batch_size 256 --lr 1e-3".split()
TRAIN += "--lr_schedule constant --warmup_epochs 0 --num_images 4 --metrics none --eval_freq 100".split()
TRAIN += "--num_workers 0".split()
HEADS = ["--learn", "order,group,cfg"]
SAMPLE = "--num_images 4 --metrics none --eval_bsz 4".split()


def prepare(patch) -> None:
    """Tokenizers of grey levels, and a maskgil_tiny that takes a tenth of the time."""
    add_tokenizers(patch)
    shrink(patch)


@pytest.fixture(autouse=True)
def prepared(monkeypatch):
    prepare(monkeypatch)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two epochs with heads."""
    folder = tmp_path_factory.mktemp("maskgil") / "run"
    with pytest.MonkeyPatch.context() as patch:
        prepare(patch)
        assert main_mar.main([*TRAIN, *HEADS, "--epochs", "2", "--output_dir", str(folder)]) == 0
    return folder


def test_a_size_that_has_no_reference_is_refused_with_the_way_out(run, tmp_path, capsys):
    """The model makes it, the digits to compare with have another size."""
    words = ["--checkpoint", str(run), "--output_dir", str(tmp_path / "out"), *SAMPLE, "--img_size", "8x16"]
    line = refused(sample.main, [*words, "--metrics", "fid", "--features", "digits"], capsys)
    assert "8x16" in line and line.rstrip().endswith(", or use --metrics none")
    assert not (tmp_path / "out").exists() and sample.main(words) == 0


def records(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def draws_of(samples, **settings):
    options = dict(mask_ratio_min=0.0, label_drop_prob=0.1, **settings)
    return training_draws(0, 0, samples, tiny_maskgil().token_head, DrawSettings(LENGTH, **options))


# --------------------------------------------------------------------------------------------------------- the parts


@pytest.mark.parametrize("kind", MASK_RATIOS)
def test_masks_have_the_mean_of_their_schedule(kind):
    """Each token by itself: an image's number of masked tokens is binomial, and may be none or all."""
    draws = draws_of(range(400), mask_schedule=kind)
    r = torch.linspace(0, 1, 10001)
    mean = MASK_RATIOS[kind](r).mean().item()
    assert draws.mask.float().mean().item() == pytest.approx(mean, abs=0.05)
    counts = draws.mask.sum(dim=1)
    assert counts.min() == 0 and counts.max() == LENGTH and draws.num_visible == (LENGTH - counts).tolist()
    assert draws.tokens.rows.sort()[0].equal(draws.mask.flatten().nonzero().flatten())
    in_order = draws.mask.gather(1, draws.orders)
    assert in_order.equal(in_order.sort(dim=1)[0])  # those that are not masked come first
    assert draws_of([7], mask_schedule=kind).mask[0].equal(draws.mask[7])


def test_where_rules_choose_no_mask_is_empty():
    plain = draws_of(range(100), mask_schedule="square")
    with_rules = draws_of(range(100), mask_schedule="square", num_iter=(2, 16))
    empty = ~plain.mask.any(dim=1)
    assert empty.any() and with_rules.mask[empty].sum(dim=1).eq(1).all()
    assert with_rules.mask[~empty].equal(plain.mask[~empty])


@pytest.mark.parametrize("loss_tokens", ["all", "masked"])
def test_the_loss_of_all_tokens_or_of_the_masked_ones(loss_tokens):
    model = tiny_maskgil()
    draws = draws_of(range(6), mask_schedule="arccos", loss_tokens=loss_tokens)
    ids, labels = torch.randint(ENTRIES, (6, LENGTH)), torch.tensor([0, 1, 2, 3, -1, 0])
    batch = Batch(ids, labels, draws)
    expected = token_loss(model.logits(ids, draws.mask, labels), ids, draws.mask if loss_tokens == "masked" else None)
    assert batch.num_targets == (int(draws.mask.sum()) if loss_tokens == "masked" else ids.numel())
    terms = TokenObjective(model)(batch, batch.num_targets)
    torch.testing.assert_close(terms["loss"], expected)
    terms["loss"].backward()
    assert model.tok_emb.weight.grad[-1].any()  # of no class


@pytest.mark.slow
def test_two_epochs_on_eight_images_reproduce_their_ids():
    """The specification's section 9; an epoch shows each image 300 times, under masks of the published schedule."""
    torch.manual_seed(0)
    sizes = dict(dim=64, class_num=8, resid_dropout_p=0.0, ffn_dropout_p=0.0)
    model, g = MaskGIL(replace(tiny_maskgil().config, **sizes)), torch.Generator().manual_seed(0)
    ids, labels = torch.randint(ENTRIES, (8, LENGTH), generator=g), torch.arange(8)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.96))
    for lr in (3e-3, 1e-3):
        optimizer.param_groups[0]["lr"] = lr
        for _ in range(300):
            mask = draw_mask("arccos", torch.rand(8, generator=g), torch.rand(8, LENGTH, generator=g))
            optimizer.zero_grad()
            token_loss(model.logits(ids, mask, labels), ids, mask, label_smoothing=0.0).backward()
            optimizer.step()
    for num_iter in (1, 8):
        rules = build_rules("maskgil", cfg=1.0, temperature=0.01)
        assert generate(model, labels, rules, num_iter, seeds=range(8)).flatten(1).equal(ids)


def test_a_batch_without_a_masked_token_has_no_loss_and_a_gradient_of_zero():
    model = tiny_maskgil()
    draws = draws_of(range(100), mask_schedule="square")
    empty = int((~draws.mask.any(dim=1)).nonzero()[0])
    batch = Batch(torch.zeros(1, LENGTH).long(), torch.tensor([0]), draws_of([empty], mask_schedule="square"))
    assert batch.num_targets == 0
    loss = TokenObjective(model)(batch, torch.ones(()))["loss"]
    loss.backward()
    assert loss.item() == 0 and all(not p.grad.any() for p in model.parameters())


def test_the_optimizer_has_the_rates_that_are_asked_for():
    model = tiny_maskgil()
    optimizer = make_optimizer(model, model.token_head, 1e-3, 0.1, beta2=0.96)
    assert optimizer.defaults["betas"] == (0.9, 0.96)
    undecayed = sum(p.numel() for p in optimizer.param_groups[0]["params"])
    gains = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    assert undecayed == gains + model.output.weight.numel()
    assert TrainConfig().beta2 == 0.95


def test_a_familys_defaults_give_way_to_flags():
    sampling = resolve(dict(model="maskgil_b", tokenizer="llamagen_vq16")).sampling
    assert (sampling.infer_mode, sampling.num_iter, sampling.cfg) == ("maskgil", 8, 4.0)
    assert resolve(dict(model="mar_base")).sampling.infer_mode == "baseline"
    sampling = resolve(dict(model="maskgil_b", infer_mode="baseline", num_iter=12)).sampling
    assert (sampling.infer_mode, sampling.num_iter, sampling.cfg) == ("baseline", 12, 4.0)


# ------------------------------------------------------------------------------------------------------ the programs


def test_it_trains_with_heads_and_says_what_it_is(run):
    config, log = load_checkpoint(run)["config"], records(run)
    assert config["family"] == "maskgil" and config["maskgil"]["vocab_size"] == ENTRIES
    assert config["sample"]["infer_mode"] == "maskgil"
    assert log[0]["ce"] == pytest.approx(math.log(ENTRIES + 1), rel=0.02) and log[-1]["ce"] < 0.95 * log[0]["ce"]
    assert {"order", "size", "budget", "cfg", "w_mean"} <= log[-1].keys()
    model, tokenizer, _ = load_model(run)
    assert isinstance(model, MaskGIL) and tokenizer.codebook_size == ENTRIES
    assert not model.tok_emb.weight.equal(load_checkpoint(run)["model"]["tok_emb.weight"])  # averaged


def test_a_run_that_stops_and_goes_on_is_the_run_that_never_stopped(run, tmp_path):
    words = [*TRAIN, *HEADS, "--output_dir", str(tmp_path), "--keep_last", "5"]
    assert main_mar.main([*words, "--epochs", "1"]) == 0
    assert main_mar.main([*words, "--epochs", "2", "--resume", str(tmp_path)]) == 0
    whole, parts = load_checkpoint(run), load_checkpoint(tmp_path)
    for key in ("model", "model_ema", "heads", "heads_ema"):
        assert all(parts[key][name].equal(value) for name, value in whole[key].items())


@pytest.mark.slow
def test_two_processes_train_like_one(run, tmp_path):
    """torchrun with gloo against one process at the same global batch, to rounding."""
    words = [*TRAIN, *HEADS, "--output_dir", str(tmp_path / "two"), "--batch_size", "128"]
    in_two_processes(tmp_path, [*words, "--epochs", "2"], prepare)
    one, two = (records(folder) for folder in (run, tmp_path / "two"))
    assert len(one) == len(two)
    for before, after in zip(one, two):
        assert after["ce"] == pytest.approx(before["ce"], rel=2e-3)


def test_training_on_cached_ids_equals_training_on_the_images(tmp_path):
    cache = "--data digits --img_size 8 --tokenizer grey16 --num_workers 0 --cached_path".split()
    assert cache_latents.main([*cache, str(tmp_path / "cache")]) == 0
    for name, more in (("images", []), ("cached", ["--use_cached", "--cached_path", str(tmp_path / "cache")])):
        assert main_mar.main([*TRAIN, *more, "--epochs", "1", "--output_dir", str(tmp_path / name)]) == 0
    plain, cached = (load_checkpoint(tmp_path / name)["model"] for name in ("images", "cached"))
    assert all(cached[name].equal(value) for name, value in plain.items())


def outputs(folder, out, *flags):
    assert sample.main(["--checkpoint", str(folder), "--output_dir", str(out), *SAMPLE, *flags]) == 0
    (made,) = [path for path in out.iterdir() if path.is_dir()]
    return {path.name: np.asarray(Image.open(path)) for path in made.glob("?.png")}


def test_it_samples_with_its_own_rules_with_heads_and_edits(run, tmp_path):
    own = outputs(run, tmp_path / "own")
    (row,) = [json.loads(line) for line in (tmp_path / "own" / "results.jsonl").read_text().splitlines()]
    names = ("infer_mode", "order", "group", "cfg_schedule", "num_iter", "cfg", "confidence_score")
    expected = ["maskgil", "confidence", "step_arccos", "ramp", 8, 1.5, "linear"]  # the preset's scale
    assert [row["settings"][name] for name in names] == expected
    assert row["mar_evals"] == 15  # 8 with the label, 7 without
    learned = "--infer_mode policy --cfg_schedule learned --order_base confidence".split()
    heads = outputs(run, tmp_path / "heads", *learned)
    assert len(own) == len(heads) == 4 and any(not np.array_equal(own[name], heads[name]) for name in own)
    picture = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "picture.png")
    Image.fromarray(np.repeat(np.uint8([[255, 0]]), 4, axis=1).repeat(8, axis=0)).save(tmp_path / "mask.png")
    edit = ["--edit_image", str(tmp_path / "picture.png"), "--edit_mask", str(tmp_path / "mask.png")]
    for name, image in outputs(run, tmp_path / "edit", *edit, "--save_trace", "2").items():
        assert np.array_equal(image.squeeze()[:, 4:], picture[:, 4:]), name


@pytest.mark.slow
def test_heads_learn_from_images(run, tmp_path):
    words = "--objective image --learn order,group,tau,cfg --bank 300 --epochs 1 --cfg 1.5 --features digits".split()
    words += ["--num_iter", "3", "--output_dir", str(tmp_path), "--init_from", str(run)]
    assert main_mar.main([*TRAIN, *words]) == 0
    heads = load_checkpoint(tmp_path)["heads"]
    for name in ("group", "tau", "cfg"):
        assert any(value.abs().max() > 0 for key, value in heads.items() if key == f"heads.{name}.values")
    assert any(value.abs().max() > 0 for key, value in heads.items() if key.startswith("heads.order.out"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_it_trains_and_samples_on_a_gpu(dtype, tmp_path):
    words = [*TRAIN, "--device", "cuda", "--dtype", dtype, "--output_dir", str(tmp_path / "run")]
    assert main_mar.main([*words, "--epochs", "1"]) == 0
    log = records(tmp_path / "run")
    assert log[-1]["ce"] < log[0]["ce"]
    assert len(outputs(tmp_path / "run", tmp_path / "out", "--device", "cuda", "--dtype", dtype)) == 4


@pytest.mark.gpu
@torch.no_grad()
def test_logits_on_a_gpu_are_those_of_the_cpu():
    for switches in ({}, dict(rope="published", qk_norm=False, post_norm=False)):
        model = tiny_maskgil(**switches)
        ids, labels = torch.arange(LENGTH).expand(2, -1), torch.tensor([1, -1])
        mask = ids % 2 > 0
        expected = model.logits(ids, mask, labels)
        made = model.cuda().logits(ids.cuda(), mask.cuda(), labels.cuda()).cpu()
        torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            "--mask_schedule root",
            "--mask_schedule: invalid value 'root': must be one of arccos, cosine, linear, square",
        ),
        ("--loss_tokens some", "--loss_tokens: invalid value 'some': must be one of all, masked"),
        ("--mask_ratio_min 0.5", "--mask_ratio_min 0.5 has no meaning for --model maskgil_tiny"),
        ("--token_dropout_p 0.5", "--token_dropout_p 0.5 has no meaning for --model maskgil_tiny"),
        ("--model mar_tiny --loss_tokens all", "--loss_tokens all has no meaning for --model mar_tiny"),
        ("--tokenizer pixel", "makes continuous tokens, the family maskgil takes discrete ones"),
        ("--vocab_size 32", "--vocab_size 32 does not fit the tokenizer grey16, which has 16"),
        ("--img_size 7", "img_size is 7, but digits images are 8 pixels wide: use 8"),
        ("--train_masks visited", "--loss_tokens all must be masked with --train_masks visited"),
        ("--learn tau", "--learn tau: --objective token learns it by the noise of a diffusion loss"),
        ("--beta2 1", "--beta2: invalid value '1': must be a number of at least 0 and at most 0.99999"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags, message, capsys, tmp_path):
    words = [*TRAIN, "--epochs", "1", *flags.split(), "--output_dir", str(tmp_path / "run")]
    assert message in refused(main_mar.main, words, capsys)


def test_a_resumed_run_may_change_what_is_free(run, tmp_path, capsys):
    stored = load_checkpoint(run)["config"]["maskgil"]
    free = replace(load_model(run)[0].config, mask_schedule="cosine", loss_tokens="masked", label_smoothing=0.0)
    assert {name for name, value in stored.items() if getattr(free, name) != value} <= free.FREE
    words = [*TRAIN, *HEADS, "--epochs", "2", "--resume", str(run), "--output_dir", str(tmp_path)]
    assert "post_norm True, not False" in refused(main_mar.main, [*words, "--no_post_norm"], capsys)
