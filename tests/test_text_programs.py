"""Text through the programs: caches of features, training, sampling of prompts, and what is refused."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main_mar
import sample
from models.loading import load_model
from models.text_encoder import TextEncoder, load_text_encoder
from sampling.inspector.recording import record
from sampling.inspector.spec import read_spec
from scripts import cache_text, demo_text, inspector
from tests.helpers import image_folder, untrained
from tests.helpers_ids import add_tokenizers
from tests.helpers_text import NUM_TOKENS, WIDTH, digit_captions, shrink_text, tiny_encoder
from tests.test_cli import refused
from tests.test_maskgil_programs import SAMPLE, records
from tests.test_maskgil_programs import TRAIN as TRAIN_CLASSES
from util.checkpoint import load_checkpoint, save_checkpoint
from util.images.captions import captions_of_images
from util.images.datasets import build_dataset
from util.images.latent_files import image_names
from util.images.pictures import read_png
from util.images.text_cache import open_texts

pytestmark = pytest.mark.on_cpu("runs are compared bit for bit, which a GPU promises with --deterministic alone")

TRAIN = [word.replace("maskgil_tiny", "maskgil_t2i_tiny") for word in TRAIN_CLASSES]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """{name: folder or file}: encoders of two widths, captions of the digits, their features."""
    root = tmp_path_factory.mktemp("text")
    digits = build_dataset("digits")
    made = {"encoder": tiny_encoder(root / "encoder"), "wide": tiny_encoder(root / "wide", width=2 * WIDTH)}
    made["other"] = tiny_encoder(root / "other", seed=1)
    for ending in ("csv", "jsonl"):
        made[ending] = digit_captions(root / f"captions.{ending}", image_names(digits), digits.labels.tolist())
    made["prompts"] = root / "prompts.txt"
    made["prompts"].write_text("a seven\n\nthe number two\na picture of the digit nine\n")
    made["features"] = root / "features"
    assert cache(made, "--captions", made["csv"], "--cached_text", made["features"]) == 0
    return {name: str(place) for name, place in made.items()}


def cache(places, *words):
    """Exit code of cache_text.py on the digits; what is given twice counts the last time."""
    base = ["--data", "digits", "--text_encoder", places["encoder"], "--max_tokens", NUM_TOKENS]
    return cache_text.main([str(word) for word in (*base, "--shard_size", 8, *words)])


@pytest.fixture(scope="module")
def run(places, tmp_path_factory):
    """A run of two epochs."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        add_tokenizers(patch)
        shrink_text(patch)
        words = ["--cached_text", places["features"], "--epochs", "2", "--output_dir", str(folder)]
        assert main_mar.main([*TRAIN, *words]) == 0
    return folder


@pytest.fixture(autouse=True)
def prepared(monkeypatch):
    add_tokenizers(monkeypatch)
    shrink_text(monkeypatch)


# ------------------------------------------------------------------------------------------------------------- caches


def test_a_cache_has_the_encoders_features(places, tmp_path):
    texts, encoder = open_texts(places["features"]), load_text_encoder(places["encoder"], NUM_TOKENS)
    assert len(texts) == 20 and len(texts.shards) == 3 and texts.width == WIDTH
    assert texts.captions[:4] == ["a zero", "the digit zero", "a one", "the digit one"]
    assert texts.numbers[:2] == [[0, 1], [2, 3]] and texts.names[11] == "1/000011"
    for i, row in enumerate(encoder.encode(texts.captions, quiet=True)):
        np.testing.assert_allclose(texts[i], row, rtol=2e-3, atol=2e-3)
        assert len(row) == len(texts.captions[i].split()) + 1  # the end of a text is a token
    (cut,) = load_text_encoder(places["encoder"], 3).encode(["a the digit number picture"], quiet=True)
    assert cut.shape == (3, WIDTH) and cut.dtype == np.float16


def test_an_interrupted_cache_goes_on(places, tmp_path, monkeypatch):
    out = tmp_path / "features"
    words = ["--captions", places["jsonl"], "--cached_text", out]
    encode, calls = TextEncoder.encode, []

    def counted(self, captions, *rest, **options):
        calls.append(len(captions))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(self, captions, *rest, **options)

    monkeypatch.setattr(TextEncoder, "encode", counted)
    with pytest.raises(KeyboardInterrupt):
        cache(places, *words)
    with pytest.raises(ValueError, match="are not complete: run scripts/cache_text.py again"):
        open_texts(str(out))
    assert cache(places, *words) == 0 and calls == [8, 8, 8, 4]  # the first file is not made again
    for name in ("shard-00000.npy", "shard-00001.npy", "shard-00002.npy"):
        assert (out / name).read_bytes() == (Path(places["features"]) / name).read_bytes()
    (out / "shard-00001.npy").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="cannot read .*shard-00001.npy"):
        open_texts(str(out))
    assert cache(places, *words) == 0 and calls[4:] == [8]


def test_captions_beside_images(tmp_path):
    root = image_folder(tmp_path / "images", {"train": 2})
    images = build_dataset("imagefolder", data_path=root, img_size=8)
    for path, label in images.samples:
        text = f"A picture of <b>{('Dark', 'Light')[label]}</b>\n\nanother one\n"
        (root / path).with_suffix(".txt").write_text(text)
    names = image_names(images)
    captions = captions_of_images("beside", images, names)
    assert captions == [["a picture of dark", "another one"]] * 2 + [["a picture of light", "another one"]] * 2
    (root / "train" / "light" / "1.txt").unlink()
    with pytest.raises(ValueError, match="--captions beside: 1 of 4 images have none: light/1.png"):
        captions_of_images("beside", images, names)
    with pytest.raises(ValueError, match="--captions beside needs --data imagefolder"):
        captions_of_images("beside", build_dataset("digits"), [])


# ------------------------------------------------------------------------------------------------ training, sampling


def test_it_trains_on_captions_and_says_which(run, places):
    content, log = load_checkpoint(run), records(run)
    config = content["config"]
    assert config["text"] == open_texts(places["features"]).describe()
    assert config["maskgil"]["caption_dim"] == WIDTH and config["maskgil"]["cls_token_num"] == NUM_TOKENS
    assert log[-1]["ce"] < 0.95 * log[0]["ce"]
    model, _, _ = load_model(run)
    start = content["model"]["cls_embedding.uncond_embedding"]
    assert not model.cls_embedding.uncond_embedding.equal(start)  # averaged, and trained


def test_a_run_that_stops_and_goes_on_is_the_run_that_never_stopped(run, places, tmp_path):
    words = [*TRAIN, "--cached_text", places["features"], "--output_dir", str(tmp_path), "--keep_last", "5"]
    assert main_mar.main([*words, "--epochs", "1"]) == 0
    assert main_mar.main([*words, "--epochs", "2", "--resume", str(tmp_path)]) == 0
    whole, parts = load_checkpoint(run), load_checkpoint(tmp_path)
    for key in ("model", "model_ema"):
        assert all(parts[key][name].equal(value) for name, value in whole[key].items())


def sampled(run, out, *words):
    assert sample.main(["--checkpoint", str(run), "--output_dir", str(out), *words]) == 0
    (row,) = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return row, {path.name: np.asarray(Image.open(path)) for path in (out / row["name"]).glob("?.png")}


def test_prompts_are_texts_files_or_features(run, places, tmp_path):
    row, lines = sampled(run, tmp_path / "lines", "--prompts", places["prompts"])
    assert row["settings"]["num_images"] == 3 and row["settings"]["metrics"] == "none"
    assert row["protocol"]["balance"] == "1 of each of 3 captions" and "_prompts" in row["name"]
    _, first = sampled(run, tmp_path / "first", "--prompts", "A  Seven")
    assert np.array_equal(first["0.png"], lines["0.png"])
    features = tmp_path / "features"
    assert cache(places, "--captions", places["prompts"], "--cached_text", features) == 0
    again, cached = sampled(run, tmp_path / "cached", "--prompts", str(features), "--num_images", "4")
    assert again["settings"]["prompts"] == row["settings"]["prompts"]
    assert all(np.array_equal(cached[name], lines[name]) for name in lines) and len(cached) == 4
    words = ["--captions", places["prompts"], "--cached_text", tmp_path / "short", "--max_tokens", "4"]
    assert cache(places, *words) == 0
    short, cut = sampled(run, tmp_path / "cut", "--prompts", str(tmp_path / "short"))
    assert short["settings"]["prompts"] != row["settings"]["prompts"] and short["name"] != row["name"]
    assert np.array_equal(cut["0.png"], lines["0.png"])  # of three tokens


def test_metrics_of_prompts_have_no_accuracy_of_classes(run, places, tmp_path):
    words = "--num_images 12 --metrics fid --features digits".split()
    row, _ = sampled(run, tmp_path, "--prompts", places["prompts"], *words)
    assert {"fid", "frechet_pixels"} == row["metrics"].keys()


def test_the_demonstration_measures_what_was_asked(tmp_path, capsys):
    digits = build_dataset("digits")
    images = digits.images.permute(0, 2, 3, 1).numpy()
    prompts = [label + 10 * (i % 4) for i, label in enumerate(digits.labels.tolist())]
    np.savez(tmp_path / "samples.npz", arr_0=images, labels=prompts)
    accuracy = demo_text.measure(tmp_path)
    assert len(accuracy) == 5 and min(accuracy.values()) > 0.97
    np.savez(tmp_path / "samples.npz", arr_0=images, labels=[p + 1 if p % 10 < 9 else p - 9 for p in prompts])
    assert demo_text.measure(tmp_path)["all"] < 0.03
    assert [prompt.split()[-1] for prompt in demo_text.held_out_prompts()[30:33]] == ["0", "1", "2"]
    words = [word for digit in range(10) for word in demo_text.words_of(digit)]
    trained = {wording.format(word) for wording in demo_text.TRAINED for word in words}
    assert not trained & set(demo_text.held_out_prompts())


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "words, message",
    [
        ("--prompts {tmp}/missing.txt", "--prompts: there is no file {tmp}/missing.txt"),
        ("--prompts <b>", '--prompts "<b>" has no text'),
        ("--prompts {tmp}", "--prompts {tmp} holds no text features"),
        ("", "--prompts is needed"),
        ("--prompts seven --class_labels 3", "--class_labels 3 has no meaning for this model, which is of text"),
        ("--prompts seven --text_encoder {tmp}/none", "--text_encoder {tmp}/none is no folder; expected a folder with"),
        ("--prompts seven --text_encoder {tmp}", "--text_encoder {tmp} cannot be read"),
        ("--prompts seven --text_encoder {wide}", "{wide} makes features of 16 channels, the model takes 8"),
        ("--prompts seven --text_encoder {other}", "{other} is not of the encoder that the model was trained with"),
    ],
)
def test_prompts_that_cannot_be_are_refused(words, message, run, places, tmp_path, capsys):
    places = {**places, "tmp": str(tmp_path)}
    given = ["--checkpoint", str(run), "--output_dir", str(tmp_path / "out"), *words.format(**places).split(), *SAMPLE]
    assert message.format(**places) in refused(sample.main, given, capsys)
    assert not (tmp_path / "out").exists()


def test_the_inspector_takes_prompts(run, places, tmp_path, capsys):
    """And the command that it shows makes the same image; a prompt may be longer than a file's name."""
    cpu = torch.device("cpu")
    loaded = inspector.load(str(run), "text", cpu, torch.float32, text_encoder=places["encoder"])
    settings, prompt = {"cfg": "2", "num_iter": "3"}, f"A  seven{' and a digit' * 30}"
    spec = read_spec({"settings": settings, "prompts": [prompt], "labels": [0, 0], "seed": 3}, {"text": loaded})
    words = shlex.split(spec.command())[2:]
    assert ["--text_encoder", places["encoder"]] == words[2:4]
    words[words.index("OUT")] = str(tmp_path / "out")
    assert sample.main(words) == 0
    for i, image in enumerate(record(spec, lambda event: None).images):
        (path,) = (tmp_path / "out").glob(f"*/{i}.png")
        assert np.array_equal(read_png(path), image)
    with pytest.raises(ValueError, match="the model takes 8"):
        inspector.load(str(run), "text", cpu, torch.float32, text_encoder=places["wide"])
    line = refused(inspector.main, ["--checkpoint", str(untrained(tmp_path / "run")), "--text_encoder", "x"], capsys)
    assert line == "error: --text_encoder x has no meaning: no --checkpoint is of text"


def test_a_checkpoint_whose_encoder_is_gone_says_so(run, places, tmp_path, capsys):
    content = load_checkpoint(run)
    content["config"]["text"]["encoder"] = "gone"
    save_checkpoint(tmp_path, content)
    words = ["--checkpoint", str(tmp_path), "--output_dir", str(tmp_path / "out"), "--prompts", "seven"]
    assert "--text_encoder gone is no folder" in refused(sample.main, words, capsys)
    content["config"]["text"] = {"encoder": 3}
    save_checkpoint(tmp_path, content)
    assert "does not say which features of captions it takes" in refused(sample.main, words, capsys)


@pytest.mark.parametrize(
    "words, message",
    [
        ("", "--model maskgil_t2i_tiny is of text and needs --cached_text DIR"),
        ("--model maskgil_tiny --cached_text {features}", "has no meaning for --model maskgil_tiny"),
        ("--cached_text {features} --caption_dim 16", "--caption_dim 16 does not fit --cached_text {features}"),
        ("--cached_text {features} --cls_token_num 9", "--cls_token_num 9 does not fit --cached_text {features}"),
        ("--cached_text {broad} --init_from {run}", "the checkpoint does not fit --cached_text {broad}"),
        ("--cached_text {features} --rope published", "rope published must be 2d of a MaskGIL of text"),
        (
            "--cached_text {features} --objective image --learn tau --cfg 2 --num_iter 2",
            "--objective image does not fit a model of text",
        ),
        ("--cached_text {prompted}", "--cached_text {prompted}: 1797 of the 1797 images have no caption in it"),
        ("--cached_text {tmp}/none", "no folder of text features at --cached_text '{tmp}/none'"),
        ("--cached_text {encoder}", "--cached_text {encoder} holds no text features"),
    ],
)  # fmt: skip
def test_training_that_cannot_be_is_refused(words, message, run, places, tmp_path, capsys):
    places = {**places, "tmp": str(tmp_path), "run": str(run), "broad": "", "prompted": ""}
    if "{broad}" in words:
        places["broad"] = str(tmp_path / "broad")
        flags = ["--text_encoder", places["wide"], "--captions", places["csv"], "--cached_text", places["broad"]]
        assert cache(places, *flags) == 0
    if "{prompted}" in words:
        places["prompted"] = str(tmp_path / "prompted")
        assert cache(places, "--captions", places["prompts"], "--cached_text", places["prompted"]) == 0
    given = [*TRAIN, "--epochs", "1", *words.format(**places).split(), "--output_dir", str(tmp_path / "out")]
    assert message.format(**places) in refused(main_mar.main, given, capsys)
    assert not (tmp_path / "out").exists()


def test_prompts_for_a_model_of_classes_are_refused(tmp_path, capsys):
    words = ["--checkpoint", str(untrained(tmp_path / "run")), "--output_dir", str(tmp_path / "out")]
    line = refused(sample.main, [*words, "--prompts", "seven"], capsys)
    assert "--prompts seven has no meaning for this model, which is of classes: use --class_labels" in line
    line = refused(sample.main, [*words, "--text_encoder", "x"], capsys)
    assert "--text_encoder x has no meaning for this model" in line


def test_a_resumed_run_must_have_the_same_encoder(run, places, tmp_path, capsys):
    flags = ["--text_encoder", places["other"], "--captions", places["csv"], "--cached_text", tmp_path / "features"]
    assert cache(places, *flags) == 0
    words = ["--cached_text", str(tmp_path / "features"), "--epochs", "3", "--output_dir", str(tmp_path / "out")]
    line = refused(main_mar.main, [*TRAIN, *words, "--resume", str(run)], capsys)
    assert "features of captions by another encoder" in line


@pytest.mark.parametrize(
    "words, message",
    [
        ("--captions {tmp}/none.csv", "--captions: there is no file {tmp}/none.csv"),
        ("--captions words", "--captions words must be beside, or a file .csv, .jsonl or .txt"),
        ("--captions {tmp}/few.csv", "--captions {tmp}/few.csv: 1796 of 1797 images have none: 1/000001, 2/000002"),
        ("--captions {tmp}/wrong.jsonl", "--captions {tmp}/wrong.jsonl: entry 2 needs an image and a caption"),
        ("--captions {tmp}/wrong.csv", "--captions {tmp}/wrong.csv: entry 1 needs an image and a caption"),
        ("--captions {tmp}/bytes.txt", "--captions: {tmp}/bytes.txt cannot be read as text"),
        ("--captions {tmp}/empty.txt", "--captions {tmp}/empty.txt has no line with a text"),
        ("--captions {csv} --text_encoder {tmp}", "--text_encoder {tmp} cannot be read"),
        ("--captions {csv} --text_encoder {bert}", "it holds a model of the type bert"),
        ("--captions {csv} --cached_text {tmp}", "--cached_text {tmp} is not empty and no text features"),
        ("--captions {csv} --cached_text {features} --max_tokens 5", "num_tokens 6 instead of 5"),
    ],
)
def test_caches_that_cannot_be_are_refused(words, message, places, tmp_path, capsys):
    places = {**places, "tmp": str(tmp_path), "bert": str(tmp_path / "bert")}
    (tmp_path / "few.csv").write_text("image,caption\n0/000000,a zero\n")
    (tmp_path / "wrong.jsonl").write_text('{"image": "a", "caption": "b"}\n[3]\n')
    (tmp_path / "wrong.csv").write_text("image,text\na,b\n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty.txt").write_text("\n <b> \n")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    given = ["--data", "digits", "--cached_text", str(tmp_path / "out"), "--text_encoder", places["encoder"]]
    given += ["--max_tokens", str(NUM_TOKENS), "--shard_size", "8", *words.format(**places).split()]
    line = refused(cache_text.main, given, capsys)
    assert message.format(**places) in line and len(line) < 400
    assert not (tmp_path / "out").exists()


@pytest.mark.gpu
def test_text_trains_and_samples_on_a_gpu(places, tmp_path):
    words = ["--cached_text", places["features"], "--epochs", "1", "--output_dir", str(tmp_path / "run")]
    assert main_mar.main([*TRAIN, *words, "--device", "cuda", "--dtype", "bf16"]) == 0
    row, images = sampled(tmp_path / "run", tmp_path / "out", "--prompts", places["prompts"], "--device", "cuda")
    assert len(images) == 3
