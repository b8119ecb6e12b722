"""MaskGIL on images of several sizes through the programs: training, caches, resuming, sampling, what is refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import main_mar
import sample
from models import tokenizers
from sampling import prompts
from scripts import cache_latents, cache_text, demo_shapes, plot_trace
from tests.helpers_ids import GreyIds, add_tokenizers, in_two_processes
from tests.helpers_maskgil import shrink
from tests.helpers_text import shrink_text
from tests.test_cli import refused
from training.objectives.token import TokenObjective
from util.checkpoint import load_checkpoint
from util.images import datasets
from util.images.buckets import open_cache

pytestmark = pytest.mark.on_cpu("runs are compared bit for bit, which a GPU promises with --deterministic alone")

NUM = 40  # canvases of each size
SIZES = "8x8,8x16,16x8"
TRAIN = "--data canvases --model maskgil_tiny --tokenizer grey16 --batch_size 16 --lr 1e-3".split()
TRAIN += "--lr_schedule constant --warmup_epochs 0 --num_images 4 --metrics none --eval_freq 100".split()
TRAIN += "--num_workers 0".split()
SAMPLE = "--num_images 4 --metrics none --eval_bsz 4 --num_iter 4".split()
BUCKETS = ["--buckets", SIZES]
EPOCH = 3 * (NUM // 16)  # steps


@pytest.fixture(autouse=True)
def prepared(monkeypatch):
    prepare(monkeypatch)


def prepare(patch) -> None:
    """Few canvases, tokenizers of grey levels, a small maskgil_tiny."""
    add_tokenizers(patch)
    shrink(patch)
    shrink_text(patch)
    patch.setitem(tokenizers.TOKENIZERS, "grey16rgb", lambda **options: GreyIds(image_channels=3))
    build = datasets.build_canvases

    def few(**options):
        whole = build(**options)
        return datasets.MemoryDataset(whole.images[:NUM], whole.labels[:NUM], whole.classes, whole.flip)

    patch.setitem(datasets.DATASETS, "canvases", few)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two epochs with heads."""
    folder = tmp_path_factory.mktemp("shapes") / "run"
    with pytest.MonkeyPatch.context() as patch:
        prepare(patch)
        words = ["--learn", "order,group,cfg", "--epochs", "2", "--output_dir", str(folder)]
        assert main_mar.main([*TRAIN, *BUCKETS, *words]) == 0
    return folder


def same_weights(a, b) -> bool:
    weights = [load_checkpoint(folder)["model"] for folder in (a, b)]
    return all(weights[0][name].equal(value) for name, value in weights[1].items())


def test_it_trains_on_all_sizes(run, monkeypatch, tmp_path):
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert len(log) == 2 * EPOCH and log[-1]["ce"] < log[0]["ce"]
    assert load_checkpoint(run)["args"]["buckets"] == SIZES
    seen, forward = [], TokenObjective.forward

    def noted(self, batch, num_targets):
        seen.append((*batch.shape["grid"], *batch.tokens.shape, *batch.draws.mask.shape))
        return forward(self, batch, num_targets)

    monkeypatch.setattr(TokenObjective, "forward", noted)
    assert main_mar.main([*TRAIN, *BUCKETS, "--epochs", "1", "--output_dir", str(tmp_path)]) == 0
    assert {shape: seen.count(shape) for shape in seen} == {
        (h, w, 16, h * w, 16, h * w): NUM // 16 for h, w in ((4, 4), (4, 8), (8, 4))
    }


def test_a_run_that_stops_inside_an_epoch_goes_on_as_if_it_had_not(tmp_path, monkeypatch):
    words = [*TRAIN, *BUCKETS, "--epochs", "1", "--output_dir"]
    assert main_mar.main([*words, str(tmp_path / "whole")]) == 0
    import engine_mar

    step, calls = engine_mar.training_step, []

    def stopped(state, *rest):
        calls.append(0)
        state.stop_signal = 15 if len(calls) == 4 else 0
        return step(state, *rest)

    monkeypatch.setattr(engine_mar, "training_step", stopped)
    assert main_mar.main([*words, str(tmp_path / "parts")]) == 128 + 15
    place = load_checkpoint(tmp_path / "parts")["rng"]
    assert (place["batch"], place["steps_per_epoch"]) == (4, EPOCH)
    assert main_mar.main([*words, str(tmp_path / "parts"), "--resume", str(tmp_path / "parts")]) == 0
    assert len(calls) == EPOCH and same_weights(tmp_path / "whole", tmp_path / "parts")


def cache(folder, *words):
    base = "--data canvases --tokenizer grey16 --num_workers 0 --cached_path".split()
    return cache_latents.main([*base, str(folder), *words])


def test_a_cache_keeps_the_sizes(tmp_path, capsys):
    held, out = tmp_path / "cache", str(tmp_path / "run")
    assert cache(held, *BUCKETS) == 0 and cache(held, *BUCKETS) == 0  # the second time nothing is left to do
    latents = open_cache(held)
    assert latents.sizes == (8, "8x16", "16x8") and [part.shape for part in latents.parts] == [(4, 4), (4, 8), (8, 4)]
    assert len(latents) == len(set(latents.names)) == 3 * NUM
    assert cache_latents.main(["--verify", "--cached_path", str(held)]) == 0
    words = [*TRAIN, "--use_cached", "--cached_path", str(held), "--epochs", "1", "--output_dir"]
    assert main_mar.main([*words, str(tmp_path / "cached"), *BUCKETS]) == 0  # the flag may be left out
    assert main_mar.main([*TRAIN, *BUCKETS, "--epochs", "1", "--output_dir", str(tmp_path / "images")]) == 0
    assert same_weights(tmp_path / "cached", tmp_path / "images")
    assert load_checkpoint(tmp_path / "cached")["args"]["buckets"] == "8,8x16,16x8"
    line = refused(main_mar.main, [*words, out, "--buckets", "8,8x16"], capsys)
    assert "--buckets 8,8x16 does not fit --cached_path" in line and "8,8x16,16x8" in line
    line = refused(lambda argv: cache(held, *argv), ["--buckets", "8,8x16"], capsys)
    assert "holds the sizes 8,8x16,16x8, --buckets names 8,8x16" in line
    assert "not empty" in refused(lambda argv: cache(held, *argv), ["--img_size", "8"], capsys)
    (held / "16x8" / "index.json").unlink()
    assert "not complete" in refused(main_mar.main, [*words, out], capsys)
    (held / "buckets.json").write_text('{"version": 1, "sizes": ["8x"]}')
    assert "8x" in refused(main_mar.main, [*words, out], capsys)


def test_it_samples_any_size(run, tmp_path):
    for size, shape in (("8x16", (8, 16)), ("16x8", (16, 8)), ("12x20", (12, 20))):
        words = ["--checkpoint", str(run), "--output_dir", str(tmp_path), *SAMPLE, "--img_size", size]
        assert sample.main([*words, "--save_trace", "1"]) == 0
        (made,) = tmp_path.glob(f"*_{size}px")
        assert np.asarray(Image.open(made / "3.png")).shape == shape
        with np.load(made / "trace.npz") as trace:
            assert trace["frames"].shape[2:4] == shape and trace["order_step"].shape[1] == shape[0] * shape[1] // 4
    assert plot_trace.main([str(made / "trace.npz"), "--out", str(tmp_path / "plots")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["settings"]["img_size"] for row in rows] == ["8x16", "16x8", "12x20"]
    one = ["--checkpoint", str(run), "--output_dir", str(tmp_path / "one"), *SAMPLE, "--img_size", "8x16"]
    assert sample.main([*one, "--eval_bsz", "1"]) == 0
    for i in range(4):  # an image depends on the seed and its number only
        pair = [Image.open(next(folder.glob("*_8x16px")) / f"{i}.png") for folder in (tmp_path, tmp_path / "one")]
        assert np.array_equal(*map(np.asarray, pair))
    assert sample.main([*one, "--infer_mode", "policy", "--order_base", "confidence"]) == 0  # with the heads


def test_a_line_from_before_sizes_is_of_the_size_trained_with(run, tmp_path):
    words = ["--checkpoint", str(run), "--output_dir", str(tmp_path), *SAMPLE]
    lines = tmp_path / "results.jsonl"
    assert sample.main(words) == 0
    row = json.loads(lines.read_text())
    assert row["settings"].pop("img_size") == 8
    lines.write_text(json.dumps(row) + "\n")
    assert sample.main(words) == 0 and len(lines.read_text().splitlines()) == 1
    assert sample.main([*words, "--img_size", "8x16"]) == 0 and len(lines.read_text().splitlines()) == 2


def test_sampling_refuses_what_has_no_such_size(run, tmp_path, capsys):
    words = ["--checkpoint", str(run), "--output_dir", str(tmp_path), *SAMPLE]
    for more, message in (
        (["--img_size", "8x15"], "img_size 8x15 must be a multiple of vae_stride 2"),
        (["--img_size", "8x16", "--order", "halton"], "--order halton is of square images"),
        (
            ["--img_size", "8x16", "--metrics", "fid", "--features", "digits"],
            "digits features need uint8 images (B, 3, 8",
        ),
    ):
        assert message in refused(sample.main, [*words, *more], capsys)


@pytest.mark.parametrize(
    "flags, message",
    [
        (f"--model causal_gpt_tiny --buckets {SIZES}", f"--buckets {SIZES} does not fit --model causal_gpt_tiny"),
        ("--model var_tiny --img_size 8x16", "--img_size 8x16 does not fit --model var_tiny"),
        ("--img_size 8x15", "img_size is 8x15, but canvases have 8, 8x16, 16x8"),
        ("--data digits --img_size 8x16", "img_size is 8x16, but digits images are 8 pixels wide: use 8"),
        (f"--buckets {SIZES} --objective image --learn cfg", "needs --objective token"),
        ("--img_size 8x16 --objective image --learn cfg", "--img_size 8x16 needs --objective token"),
        ("--buckets 8,8x16 --train_masks visited --loss_tokens masked --order halton", "--order halton is of square"),
        ("--img_size 8x16 --learn order --order_base center", "--order_base center is of square"),
        ("--buckets 8,8x16 --batch_size 41", "a global batch of 41 is more than the 40 images of one of the sizes"),
    ],
)
def test_training_refuses_what_has_no_such_size(flags, message, capsys, tmp_path):
    words = [*TRAIN, "--epochs", "1", *flags.split(), "--output_dir", str(tmp_path / "run")]
    assert message in refused(main_mar.main, words, capsys)


class ToyEncoder:
    """Features that say how long a word is, in place of a T5's."""

    path, fingerprint, width, num_tokens = "toy", "toy", 8, 6

    def encode(self, captions, batch_size=1, quiet=True):
        return [np.float16([[len(word)] * 8 for word in caption.split()]) for caption in captions]


def folder_of_shapes(folder):
    """32 pictures, each lying or upright, with a caption beside it."""
    (folder / "a").mkdir(parents=True)
    for i in range(32):
        size = (20, 10) if i % 2 else (10, 20)
        Image.new("RGB", size, (7 * i, 100, 90)).save(folder / "a" / f"{i:02d}.png")
        (folder / "a" / f"{i:02d}.txt").write_text("a two" if i % 2 else "the digit one")
    return str(folder)


def test_a_model_of_text_trains_on_a_folder_of_shapes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cache_text, "load_text_encoder", lambda *args: ToyEncoder())
    monkeypatch.setattr(prompts, "load_text_encoder", lambda *args: ToyEncoder())
    words = ["--data", "imagefolder", "--data_path", folder_of_shapes(tmp_path / "images")]
    made = ["--captions", "beside", "--text_encoder", "toy", "--max_tokens", "6"]
    assert cache_text.main([*words, *made, "--cached_text", str(tmp_path / "text")]) == 0
    words = [*TRAIN, *words, "--model", "maskgil_t2i_tiny", "--cached_text", str(tmp_path / "text"), "--epochs", "1"]
    words += ["--tokenizer", "grey16rgb", "--img_size", "8x16", "--output_dir", str(tmp_path / "run")]
    assert main_mar.main([*words, "--buckets", "8x16,16x8"]) == 0
    line = refused(main_mar.main, [*words[:-1], str(tmp_path / "no"), "--buckets", "8x15,16x8"], capsys)
    assert "--buckets: the sides of 8x15 must be multiples of the tokenizer's 2" in line
    out = ["--checkpoint", str(tmp_path / "run"), "--output_dir", str(tmp_path / "out"), "--num_iter", "2"]
    assert sample.main([*out, "--prompts", "a two"]) == 0
    (picture,) = tmp_path.glob("out/*/0.png")
    assert np.asarray(Image.open(picture)).shape == (8, 16, 3)  # the size that it was trained with


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path):
    """torchrun with gloo against one process at the same global batch, to rounding."""
    words = [*TRAIN, *BUCKETS, "--resid_dropout_p", "0", "--ffn_dropout_p", "0", "--epochs", "2", "--output_dir"]
    in_two_processes(tmp_path, [*words, str(tmp_path / "two"), "--batch_size", "8"], prepare)
    assert main_mar.main([*words, str(tmp_path / "one")]) == 0
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("one", "two")]
    one, two = ([json.loads(line)["ce"] for line in lines] for lines in logs)
    assert len(one) == 2 * EPOCH and two == pytest.approx(one, rel=2e-3)


def test_the_demonstration_measures_what_was_asked_for(tmp_path, capsys):
    for size, name in ((8, "8x8"), ("8x16", "8x16"), ("16x8", "16x8")):
        canvases = datasets.build_canvases(img_size=size)
        folder = tmp_path / f"samples_{name}" / "setting"
        folder.mkdir(parents=True)
        images = canvases.images.permute(0, 2, 3, 1).numpy()[:50].copy()
        images[:10] = 0  # of ten nothing can be read
        labels = torch.where(torch.arange(50) < 10, 3, canvases.labels[:50]).numpy()
        np.savez(folder / "samples.npz", arr_0=images, labels=labels)
    assert demo_shapes.main(["--output_dir", str(tmp_path), "--tokenizer", "grey16"]) == 0
    measured = json.loads((tmp_path / "accuracy.json").read_text())
    assert [result["canvas"] for result in measured.values()] == [pytest.approx(0.8, abs=0.03)] * 3
    assert all(0 < result["decoded"] < 1 for result in measured.values())  # of cells of one grey level
    assert "second" not in measured["8×8"] and measured["8×16"]["second"] >= 0.8
    assert (tmp_path / "shapes.png").is_file() and "| 16×8 | 50 |" in capsys.readouterr().out
    np.savez(folder / "samples.npz", arr_0=images[:, :8], labels=labels)
    assert "expected (16, 8, 1)" in refused(demo_shapes.main, ["--output_dir", str(tmp_path)], capsys)
    (folder / "samples.npz").unlink()
    line = refused(demo_shapes.main, ["--output_dir", str(tmp_path)], capsys)
    assert "samples_16x8 must hold the samples of one setting, it has 0" in line
