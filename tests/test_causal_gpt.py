"""LlamaGen's causal LLaMA: parity with the published one, the cache against whole passes, and its programs."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import main_mar
import sample
from heads.policy import build_rules
from models.causal_gpt import CAUSAL_GPT_CONFIGS, CausalGPT, CausalGPTConfig
from models.kv_cache import KeyValueCache
from models.loading import LoadArgs, load_model, stored_model_config
from sampling.inspector.recording import record
from sampling.inspector.spec import read_spec
from sampling.loop import generate
from scripts import inspector
from tests import helpers_ids
from tests.helpers import named_weights
from tests.helpers_causal import save_published
from tests.parity import generate_ids_causal
from tests.test_cli import refused
from util.images.pictures import read_png

FIXTURES = Path(__file__).parent / "fixtures"
REFERENCE = np.load(FIXTURES / "llamagen_ar_reference.npz")
SHAPES = json.loads((FIXTURES / "llamagen_ar_state_dict_shapes.json").read_text())
SAMPLES = ("plain", "cfg", "cfg_topk", "cfg_topp")


def tensor(name):
    return torch.from_numpy(REFERENCE[name])


def close(actual, name, rtol=1e-4, atol=2e-5):
    np.testing.assert_allclose(actual.detach().numpy(), REFERENCE[name], rtol=rtol, atol=atol)


@pytest.fixture(scope="module")
def model():
    config = dict(item.split("=") for item in REFERENCE["config"])
    config = {key: float(value) if key == "norm_eps" else int(value) for key, value in config.items()}
    return named_weights(CausalGPT(CausalGPTConfig(**config)), float(REFERENCE["fill_std"])).eval()


@pytest.mark.parametrize("name", SHAPES)
def test_published_sizes_have_the_published_keys_and_shapes(name):
    with torch.device("meta"):
        model = CausalGPT(replace(CAUSAL_GPT_CONFIGS[name]))
        same = CausalGPTConfig(**SHAPES[name]["args"])
    assert model.config == same
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == SHAPES[name]["state_dict"]
    assert sum(p.numel() for p in model.parameters()) == SHAPES[name]["params"]


def test_forward_and_gradients(model):
    ids, labels = tensor("ids"), tensor("labels")
    close(model.rotary, "rotary")
    logits = model.logits(ids, labels)
    close(logits, "logits")
    close(model.logits(ids, torch.full_like(labels, -1)), "logits_uncond")
    close(model.logits(ids), "logits_uncond")
    prediction = model.output.predict(None, model.outputs(ids, None, labels).flatten(0, 1), {})
    loss = model.output.losses(prediction, ids.flatten(), {})["ce"].mean()
    close(loss, "loss")
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, [parameters[str(name)] for name in REFERENCE["grad_names"]])
    np.testing.assert_allclose([float(g.norm()) for g in gradients], REFERENCE["grad_norms"], rtol=2e-3)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("tag", SAMPLES)
def test_samples(model, tag, use_cache):
    settings = {key: float(value) for key, value in (item.split("=") for item in REFERENCE[f"sample/{tag}/settings"])}
    settings["top_k"] = int(settings["top_k"])
    noise = tensor(f"sample/{tag}/token_gumbel")
    options = dict(noise_fn=lambda i: noise[i], use_cache=use_cache, **settings)
    expected = tensor(f"sample/{tag}/ids")
    assert generate_ids_causal(model, tensor("labels"), **options).equal(expected)
    assert generate_ids_causal(model, tensor("labels"), num_tokens=5, **options).equal(expected[:, :5])
    assert generate_ids_causal(model, tensor("labels"), prefix=expected[:, :7], **options).equal(expected)


@pytest.mark.parametrize("sizes", [{}, dict(n_kv_head=2), dict(cond_rope="identity")])
@torch.no_grad()
def test_the_cache_gives_what_one_whole_pass_gives(sizes):
    torch.manual_seed(0)
    config = CausalGPTConfig(dim=32, n_layer=2, n_head=4, multiple_of=16, vocab_size=9, num_classes=3, block_size=16)
    model = CausalGPT(replace(config, **sizes)).eval()
    torch.nn.init.normal_(model.output.weight)
    ids, labels = torch.randint(0, 9, (3, 16)), torch.tensor([0, -1, 2])
    expected, cache, rows = model.logits(ids, labels), KeyValueCache(3, 16), torch.arange(3)
    for lengths in ([3, 1, 7], *([n, n - 2, n] for n in range(8, 17))):
        z = model.extend(ids, None, labels, cache.extend(rows, torch.tensor(lengths), ids.device))
        at = expected[rows, torch.tensor(lengths) - 1]
        torch.testing.assert_close(model.output.logits(z.squeeze(1)), at, rtol=1e-4, atol=1e-5)
    assert cache.stores[1][0].shape == (3, 17, sizes.get("n_kv_head", 4), 8)


@torch.no_grad()
def test_an_output_sees_the_tokens_before_it_and_no_others(model):
    ids, labels = tensor("ids")[:1], tensor("labels")[:1]
    z = model.outputs(ids, None, labels)[0]
    for j in (0, 9, 15):
        other = ids.clone()
        other[0, j] = (other[0, j] + 1) % 40
        changed = (model.outputs(other, None, labels)[0] != z).any(dim=1)
        assert changed.tolist() == [i > j for i in range(16)]


def test_the_first_loss_is_ln_v():
    model = CausalGPT(replace(CAUSAL_GPT_CONFIGS["causal_gpt_tiny"], img_size=64))
    ids = torch.randint(0, 16384, (2, 16))
    loss = model.output.losses(model.output.predict(None, model.outputs(ids).flatten(0, 1), {}), ids.flatten(), {})
    torch.testing.assert_close(loss["ce"], torch.full((32,), math.log(16384)))


def test_it_trains_samples_loads_and_refuses(tmp_path, monkeypatch, capsys):
    helpers_ids.add_tokenizers(monkeypatch)
    folder = tmp_path / "run"
    words = "--data digits --model causal_gpt_tiny --tokenizer grey16 --img_size 8 --batch_size 256 --lr 3e-3".split()
    words += "--num_images 4 --metrics none --eval_freq 100 --num_workers 0".split()
    words += ["--warmup_epochs", "0", "--output_dir", str(folder)]
    assert main_mar.main([*words, "--epochs", "1"]) == 0
    losses = [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < math.log(16)
    place = ["--checkpoint", str(folder), "--output_dir", str(tmp_path / "out")]
    place += "--num_images 4 --metrics none --cfg 1.5 --top_k 4".split()
    capsys.readouterr()
    assert sample.main([*place, "--top_k", "17,99", "--eval_bsz", "2"]) == 0  # two batches each
    lines = [line for line in capsys.readouterr().out.splitlines() if "--top_k" in line]
    assert lines == ["--top_k 17, 99 is above the 16 entries of the codebook: ids are drawn from all of them"]
    assert isinstance(load_model(folder)[0], CausalGPT)
    assert "--order random does not fit the model, which needs raster" in refused(
        sample.main, [*place, "--order", "random"], capsys
    )
    line = refused(main_mar.main, [*words, "--tokenizer", "pixel", "--output_dir", str(tmp_path / "x")], capsys)
    assert "the tokenizer pixel makes continuous tokens, the family causal_gpt takes discrete ones" in line


@pytest.mark.parametrize("name", SHAPES)
def test_published_weights_say_their_sizes_and_the_size_that_is_named_must_be_theirs(name):
    weights = {key: torch.empty(1).expand(shape) for key, shape in SHAPES[name]["state_dict"].items()}
    config = CAUSAL_GPT_CONFIGS[name]
    sizes = dict(dim=config.dim, n_layer=config.n_layer, class_num=1000, vocab_size=16384)
    assert stored_model_config({"model": weights}, "causal_gpt") == sizes
    other = "llamagen_ar_l" if name == "llamagen_ar_b" else "llamagen_ar_b"
    shown = f"whose weights have dim {config.dim}, n_layer {config.n_layer}: give --model {name}"
    with pytest.raises(ValueError, match=shown):
        load_model({"model": weights}, ema=False, model=other)


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A function that saves a model like LlamaGen's files: wrapped -> (model, path); the tokenizer is in its place."""
    monkeypatch.chdir(tmp_path)
    return partial(save_published, tmp_path)


@pytest.mark.parametrize("wrapped", [False, True])
def test_published_files_load_at_any_size_of_image_and_sample(published, wrapped, tmp_path, capsys):
    model, path = published(wrapped)
    for side in (32, 48):
        loaded, tokenizer, config = load_model(path, ema=False, model="causal_gpt_tiny", img_size=side)
        assert loaded.config == replace(model.config, img_size=side) and tokenizer.codebook_size == 12
        assert all(value.equal(loaded.state_dict()[name]) for name, value in model.state_dict().items())
        assert len(config["data"]["classes"]) == 3
    words = ["--checkpoint", str(path), "--model", "causal_gpt_tiny", "--img_size", "48", "--no_ema"]
    words += ["--output_dir", str(tmp_path / "out"), "--metrics", "none", "--num_images", "1"]
    assert sample.main([*words, "--cfg", "2", "--cfg_schedule", "constant"]) == 0
    (row,) = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert json.loads(row)["settings"]["num_iter"] == 9
    line = refused(sample.main, [*words, "--diffloss_d", "3"], capsys)
    assert line == "error: --diffloss_d 3 has no meaning for --model causal_gpt_tiny"


def test_the_inspector_shows_published_files_with_the_flags_of_sample_py(published, tmp_path):
    """And the command that it shows makes the same image."""
    _, path = published(True)
    cpu, weights = torch.device("cpu"), LoadArgs(no_ema=True, model="causal_gpt_tiny", img_size=48)
    loaded = inspector.load(str(path), "it", cpu, torch.float32, weights)
    spec = read_spec({"settings": {"cfg": "2"}, "labels": [2], "seed": 3}, {"it": loaded})
    words = spec.command().split()[2:]
    assert words[2:7] == ["--no_ema", "--model", "causal_gpt_tiny", "--img_size", "48"]
    words[words.index("OUT")] = str(tmp_path / "out")
    assert sample.main(words) == 0
    (image,) = (tmp_path / "out").glob("*/0.png")
    assert np.array_equal(read_png(image), record(spec, lambda event: None).images[0])
    with pytest.raises(ValueError, match="does not say what it holds: give --model"):
        inspector.load(str(path), "it", cpu, torch.float32)


def test_files_that_are_no_class_model_of_llamagens_are_one_line(published):
    model, _ = published(False)
    weights = model.state_dict()
    for name, value, message in (
        ("cls_embedding.embedding_table.weight", None, "has no cls_embedding.embedding_table.weight"),
        ("output.weight", None, "has no output.weight"),
        ("output.weight", torch.zeros(3), r"output.weight has the shape \(3,\)"),
    ):
        content = {key: tensor for key, tensor in weights.items() if key != name}
        content |= {} if value is None else {name: value}
        with pytest.raises(ValueError, match=f"no class model of LlamaGen.*{message}"):
            load_model({"model": content}, ema=False, model="causal_gpt_tiny")


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(block_size=15), "block_size 15 must be a square"),
        (dict(n_head=5), "dim 768 must be a multiple of 4·n_head = 20"),
        (dict(n_kv_head=5), "n_head 12 must be a multiple of n_kv_head 5"),
        (dict(cond_rope="none"), "unknown cond_rope 'none'; valid: zero, identity"),
        (dict(cls_token_num=120), "cls_token_num 120 must be 1"),
        (dict(n_head=0), "n_head must be at least 1, got 0"),
    ],
)
def test_sizes_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CausalGPTConfig(**options)


def test_another_order_is_refused(model):
    with pytest.raises(ValueError, match="it needs --order raster"):
        generate(model, torch.tensor([0, 1, 2]), build_rules("baseline", group="one"), 16)
