"""A causal model draws the first rows, MaskGIL the others: shares 0 and 1 are the two models, bit for bit."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import main_mar
import sample
from heads.policy import build_rules
from models.causal_gpt import CausalGPT
from models.maskgil import MaskGIL
from models.tokenizers import build_tokenizer
from sampling.loop import generate
from sampling.prefix import Prefix, PrefixArgs, open_prefix, whole_rows
from sampling.settings import SampleConfig
from tests.helpers import untrained
from tests.helpers_causal import LENGTH, save_published, tiny_gpt
from tests.helpers_ids import add_tokenizers
from tests.helpers_maskgil import shrink, tiny_maskgil
from tests.parity import generate_ids_causal
from tests.test_cli import refused
from tests.test_low_precision import needs_int8
from util.checkpoint import load_checkpoint

pytestmark = pytest.mark.on_cpu("runs are compared bit for bit, which a GPU promises with --deterministic alone")

TRAIN = "--data digits --img_size 8 --batch_size 256 --lr 1e-3 --lr_schedule constant --warmup_epochs 0".split()
TRAIN += "--num_workers 0 --epochs 1 --num_images 4 --metrics none --num_iter 4".split()


def test_whole_rows():
    shares = (0, 1 / 16, 0.25, 0.26, 0.5, 0.99, 1)
    assert [whole_rows(share, 4) for share in shares] == [0, 4, 4, 8, 8, 16, 16]
    assert [whole_rows(share, 16) for share in (1 / 16, 1 / 8, 1 / 4, 0.3)] == [16, 32, 64, 80]
    assert whole_rows(0.55, 20) == 220 and whole_rows(0.551, 20) == 240
    for grid in range(1, 65):
        for k in range(grid + 1):
            assert whole_rows(k / grid, grid) == k * grid


@pytest.mark.parametrize("num_tokens", [0, 4, 12, LENGTH])
def test_the_causal_model_draws_its_first_tokens_and_the_other_keeps_them(num_tokens):
    causal, model = tiny_gpt(), tiny_maskgil()
    labels, seeds = torch.tensor([0, 3, 1]), [7, 8, 9]
    sampling = SampleConfig(cfg=2.0, cfg_schedule="constant").fitted(causal.fixed_rules, "", LENGTH)
    prefix, evals = Prefix(causal, sampling, num_tokens / LENGTH, num_tokens), Counter()
    known = prefix.known(labels, seeds, None, evals)
    rules = build_rules("maskgil", cfg=3.0)
    ids = generate(model, labels, rules, 4, seeds=seeds, **known).flatten(1)
    whole = generate_ids_causal(causal, labels, cfg=2.0, seeds=seeds)
    assert ids[:, :num_tokens].equal(whole[:, :num_tokens])
    assert known["mask"].sum(dim=1).eq(LENGTH - num_tokens).all()
    if num_tokens == 0:
        assert ids.equal(generate(model, labels, rules, 4, seeds=seeds).flatten(1)) and not evals
    else:
        passes = 2 * len(labels) * num_tokens / LENGTH  # each token goes through the network once, guided: twice
        assert evals["mar"] == pytest.approx(passes)


def test_the_completion_is_drawn_independently_of_the_prefix():
    causal, model = tiny_gpt(), tiny_maskgil()
    torch.nn.init.zeros_(causal.output.weight)  # all 16 ids are equally likely, as in an untrained MaskGIL
    torch.nn.init.zeros_(model.output.weight)
    seeds, labels = list(range(1000)), torch.zeros(1000, dtype=torch.long)
    prefix = Prefix(causal, SampleConfig(cfg=1.0).fitted(causal.fixed_rules, "", LENGTH), 0.5, LENGTH // 2)
    known = prefix.known(labels, seeds, None, Counter())
    own = prefix.completion_seeds(seeds)
    assert len({*own, *seeds}) == 2000
    for num_iter in (1, 4):
        ids = generate(model, labels, build_rules("maskgil", cfg=1.0), num_iter, seeds=own, **known).flatten(1)
        first, rest = ids.split(LENGTH // 2, dim=1)
        equal = (first.unsqueeze(2) == rest.unsqueeze(1)).float().mean(dim=0)  # of each pair of places
        assert (equal - 1 / 16).abs().max() < 0.04  # 5 standard deviations


@pytest.mark.parametrize("wrapped", [False, True])
def test_published_files_are_prefixes(wrapped, tmp_path, monkeypatch):
    """With one set of weights, no names of classes, no size of images, and the same guidance at all tokens."""
    monkeypatch.chdir(tmp_path)
    published, path = save_published(tmp_path, wrapped)
    (tmp_path / "pretrained_models").rename(tmp_path / "elsewhere")
    place = "elsewhere/vq_ds16_c2i.pt"
    tokenizer = build_tokenizer("llamagen_vq16", vae_path=place)
    sizes = dict(vocab_size=12, vae_stride=16, vae_embed_dim=8, class_num=3, img_size=64)
    model, config = tiny_maskgil(**sizes), dict(data=dict(classes=["a", "b", "c"]), vae_path=place)
    args = PrefixArgs(prefix_from=str(path), prefix_model="causal_gpt_tiny", prefix_cfg=2.0, prefix_top_k=5)
    prefix = open_prefix(args, model, tokenizer, config)
    assert all(value.equal(published.state_dict()[name]) for name, value in prefix.model.state_dict().items())
    assert (prefix.sampling.cfg, prefix.sampling.cfg_schedule, prefix.sampling.top_k) == (2.0, "constant", 5)
    assert prefix.num_tokens == 4 and prefix.model.config.img_size == 64
    assert {k: v for k, v in prefix.hashes.items() if k != "prefix"} == dict(
        prefix_share=0.25, prefix_cfg=2.0, prefix_top_k=5
    )
    for given, changed, message in (
        (dict(prefix_model=None), {}, "does not say what it holds: give --prefix_model"),
        (dict(prefix_model="llamagen_ar_b"), {}, "--prefix_model llamagen_ar_b does not fit the checkpoint"),
        ({}, dict(data=dict(classes=["a", "b"])), "has 3 classes, the model 2"),
    ):
        with pytest.raises(ValueError, match=f"--prefix_from {path}.*{message}"):
            open_prefix(replace(args, **given), model, tokenizer, config | changed)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{name: a run of one epoch}."""
    root = tmp_path_factory.mktemp("prefix")
    with pytest.MonkeyPatch.context() as patch:
        add_tokenizers(patch)
        shrink(patch)
        for name, model, tokenizer in (
            ("maskgil", "maskgil_tiny", "grey16"),
            ("gpt", "causal_gpt_tiny", "grey16"),
            ("other", "causal_gpt_tiny", "grey32"),
        ):
            steps = ["--num_iter", "16"] if "gpt" in model else []
            words = [*TRAIN, *steps, "--model", model, "--tokenizer", tokenizer, "--output_dir", str(root / name)]
            assert main_mar.main(words) == 0
    return root


@pytest.fixture(autouse=True)
def prepared(monkeypatch):
    add_tokenizers(monkeypatch)
    shrink(monkeypatch)


def images(runs, out, name, *words):
    flags = f"--checkpoint {runs / name} --output_dir {out} --num_images 4 --metrics none --seed 3".split()
    assert sample.main([*flags, *words]) == 0
    (row,) = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return row, [np.asarray(Image.open(out / row["name"] / f"{i}.png")) for i in range(4)]


def test_shares_0_and_1_are_the_two_models(runs, tmp_path):
    given = ["--prefix_from", str(runs / "gpt"), "--prefix_share"]
    (pure, masked), (alone, causal) = (images(runs, tmp_path / name, name) for name in ("maskgil", "gpt"))
    for share, expected in (("0", masked), ("1", causal)):
        row, made = images(runs, tmp_path / share, "maskgil", *given, share)
        assert all(np.array_equal(a, b) for a, b in zip(made, expected))
        assert row["settings"]["prefix_share"] == float(share) and f"_prefix{share}-" in row["name"]
    row, made = images(runs, tmp_path / "some", "maskgil", *given[:2])
    assert row["settings"]["prefix_share"] == 0.25 and row["mar_evals"] < pure["mar_evals"] + alone["mar_evals"]
    for image, first in zip(made, causal):
        assert np.array_equal(image[:2], first[:2])  # a row of tokens of 2×2 pixels
    assert any(not np.array_equal(image, other) for image, other in zip(made, masked))


def test_the_causal_model_is_sampled_with_the_settings_given(runs, tmp_path):
    """Those of the pure model, bit for bit; a line of results names what was given."""
    given = {"cfg": 3.0, "temperature": 0.5, "top_k": 3}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    _, causal = images(runs, tmp_path / "pure", "gpt", *words)
    words = [word.replace("--", "--prefix_") for word in words]
    share = ["--prefix_from", str(runs / "gpt"), "--prefix_share", "1"]
    row, made = images(runs, tmp_path / "all", "maskgil", *share, *words)
    assert all(np.array_equal(a, b) for a, b in zip(made, causal))
    assert {name: row["settings"][f"prefix_{name}"] for name in given} == given
    row, made = images(runs, tmp_path / "none", "maskgil", *share)
    assert not [name for name in row["settings"] if name in ("prefix_cfg", "prefix_temperature", "prefix_top_k")]
    assert any(not np.array_equal(a, b) for a, b in zip(made, causal))


def test_int8_and_compile_are_for_both_models(runs, tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr("sample.prepare", lambda model, dtype: done.append((dtype, type(model))))
    for family in (MaskGIL, CausalGPT):
        monkeypatch.setattr(family, "compile_parts", lambda model: done.append(("compile", type(model))))
    words = ["--prefix_from", str(runs / "gpt"), "--dtype", "int8", "--compile"]
    images(runs, tmp_path, "maskgil", *words)
    assert done == [(how, family) for how in (torch.int8, "compile") for family in (MaskGIL, CausalGPT)]


@needs_int8
def test_a_prefix_in_int8_is_the_causal_models_in_int8(runs, tmp_path):
    _, causal = images(runs, tmp_path / "pure", "gpt", "--dtype", "int8")
    given = ["--prefix_from", str(runs / "gpt"), "--prefix_share", "1"]
    row, made = images(runs, tmp_path / "all", "maskgil", *given, "--dtype", "int8")
    assert all(np.array_equal(a, b) for a, b in zip(made, causal))
    assert row["settings"]["prefix"] in row["name"]


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(num_iter=3), "cannot be sampled with the settings in it: --num_iter 3 is too small"),
        (dict(tau_schedule="learned"), "is sampled with a learned tau_schedule: a prefix has hand-made rules only"),
        (dict(cfg=-1), "is damaged: cfg: invalid value '-1': must be a number of at least 0"),
    ],
)
def test_settings_of_the_prefix_are_checked_before_the_work(settings, message, runs, tmp_path, capsys):
    content = load_checkpoint(runs / "gpt")
    content["config"]["sample"] |= settings
    torch.save(content, tmp_path / "x.pth")
    flags = ["--checkpoint", str(runs / "maskgil"), "--prefix_from", str(tmp_path / "x.pth"), "--dry_run"]
    assert f"--prefix_from {tmp_path / 'x.pth'} {message}" in refused(sample.main, flags, capsys)


@pytest.mark.parametrize(
    "words, message",
    [
        ("--prefix_share 0.5", "--prefix_share 0.5 needs --prefix_from"),
        ("--prefix_model llamagen_ar_b", "--prefix_model llamagen_ar_b needs --prefix_from"),
        ("--prefix_cfg 2", "--prefix_cfg 2.0 needs --prefix_from"),
        ("--prefix_temperature 0.5", "--prefix_temperature 0.5 needs --prefix_from"),
        ("--prefix_top_k 0", "--prefix_top_k 0 needs --prefix_from"),
        ("--prefix_from {runs}/gpt --prefix_model llamagen_ar_b", "--prefix_model llamagen_ar_b does not fit"),
        ("--prefix_from {runs}/none", "no checkpoint at {runs}/none"),
        ("--prefix_from {runs}/maskgil", "must be a causal model of ids, row by row"),
        ("--prefix_from {runs}/other", "has ids of "),
        ("--prefix_from {runs}/gpt --img_size 8x16", "makes images of 8 pixels, the model 8x16"),
        ("--prefix_from {runs}/gpt --edit_image a --edit_mask b", "--prefix_from and --edit_image both say"),
        ("--prefix_from {runs}/gpt --checkpoint {runs}/gpt", "has no meaning for this model"),
        ("--prefix_from {runs}/gpt --checkpoint {pixels}", "has no meaning for this model"),
    ],
)
def test_prefixes_that_cannot_be_are_refused(words, message, runs, tmp_path, capsys):
    places = dict(runs=runs, pixels=tmp_path / "pixels")
    if "{pixels}" in words:
        untrained(tmp_path / "pixels")
    flags = f"--checkpoint {runs / 'maskgil'} --output_dir {tmp_path / 'out'} --num_images 4 --metrics none".split()
    assert message.format(**places) in refused(sample.main, [*flags, *words.format(**places).split()], capsys)
    assert not (tmp_path / "out").exists()
