"""LlamaGen's tokenizers: parity with the published one, keys and counts, sizes from the file, files that do not fit."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models.tokenizers import build_tokenizer
from models.tokenizers.vq import VQ_CONFIGS, VQConfig, VQModel
from tests.helpers import tensors_by_name
from tests.helpers_tokenizers import images, message, save

FIXTURES = Path(__file__).parent / "fixtures"
REFERENCE = np.load(FIXTURES / "llamagen_vq_reference.npz")
SHAPES = json.loads((FIXTURES / "llamagen_vq_shapes.json").read_text())
CONFIG = VQConfig(
    **{key: json.loads(value.lower()) for key, value in (item.split("=") for item in REFERENCE["config"])}
)
STATISTICS = "quantize.codebook_used"


def tensor(name):
    return torch.from_numpy(REFERENCE[name])


def close(actual, name, rtol=1e-4, atol=2e-5):
    np.testing.assert_allclose(np.asarray(actual.detach()), REFERENCE[name], rtol=rtol, atol=atol)


@pytest.fixture(scope="module")
def weights() -> dict:
    shapes = {}
    for entry in REFERENCE["keys"]:
        key, shape = re.fullmatch(r"(\S+) \((.*)\)", entry).groups()
        shapes[key] = tuple(int(n) for n in shape.split(",") if n.strip())
    return tensors_by_name(shapes) | {STATISTICS: torch.zeros(shapes[STATISTICS])}


@pytest.fixture(scope="module")
def model(weights) -> VQModel:
    model = VQModel(CONFIG)
    model.load_state_dict(weights)
    return model


@pytest.fixture(scope="module")
def file(weights, tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("vq") / "vq_ds16.pt", {"model": weights})


def test_encoder_quantiser_and_decoder(model):
    """Of images that are not square, which show on which side the strides pad."""
    with torch.no_grad():
        close(model.encoder(tensor("images")), "encoder_out")
        vectors = model.pre_quant(tensor("images"))
        close(vectors, "pre_quant")
        assert torch.equal(model.encode_ids(tensor("images")), tensor("ids"))
        close(model.lookup(tensor("ids")), "codebook_entries")
        close(model.quantised(vectors), "quantised")
        close(model.decode(model.quantised(vectors)), "decoded")
        close(model.decode_ids(tensor("decode_ids")), "decode_ids_images")


def test_training_losses_and_gradients(model):
    model.zero_grad()
    losses = model.losses(tensor("images"))
    close(losses["reconstruction"], "reconstruction")
    for name in ("vq_loss", "commit_loss", "entropy_loss"):
        close(losses[name], name)
    mse = (losses["reconstruction"] - tensor("images")).square().mean()
    total = mse + losses["vq_loss"] + losses["commit_loss"] + losses["entropy_loss"]
    close(total, "total_without_perceptual_and_gan")
    total.backward()
    gradients = dict(model.named_parameters())
    norms = [float(gradients[name].grad.norm()) for name in REFERENCE["grad_names"]]
    np.testing.assert_allclose(norms, REFERENCE["grad_norms"], rtol=5e-3, atol=1e-4)
    assert set(REFERENCE["grad_names"]) == gradients.keys()
    assert VQModel(replace(CONFIG, ch=32, entropy_loss_ratio=0.0)).losses(images(1, 16, 16))["entropy_loss"] == 0


@pytest.mark.parametrize("name", VQ_CONFIGS)
def test_published_sizes_have_the_published_keys_and_shapes(name):
    with torch.device("meta"):
        model = VQModel(VQ_CONFIGS[name])
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == SHAPES[name]["state_dict"]
    assert sum(p.numel() for p in model.parameters()) == SHAPES[name]["params"]


def test_the_row_reads_its_sizes_from_the_file(file):
    tokenizer = build_tokenizer("llamagen_vq16", vae_path=file)
    assert (tokenizer.tokens, tokenizer.codebook_size) == (("continuous", "discrete"), 128)
    assert (tokenizer.stride, tokenizer.channels, tokenizer.image_channels) == (16, 8, 3)
    assert not tokenizer.training and not any(p.requires_grad for p in tokenizer.parameters())
    assert torch.equal(tokenizer.encode_ids(tensor("images")), tensor("ids"))
    close(tokenizer.decode_ids(tensor("decode_ids")), "decode_ids_images")
    assert torch.equal(tokenizer.encode_ids(tensor("images")[1:]), tensor("ids")[1:])


def test_its_latents_are_vectors_of_length_1_before_quantisation(file):
    """Normalised such that their mean square is 1; a vector of any length decodes as its direction's nearest entry."""
    tokenizer = build_tokenizer("llamagen_vq16", vae_path=file)
    latents = tokenizer.encode(tensor("images"))
    assert latents.square().mean().item() == pytest.approx(1, abs=1e-5)
    expected = torch.nn.functional.normalize(tensor("pre_quant"), dim=1)
    torch.testing.assert_close(latents / 8**0.5, expected, rtol=1e-4, atol=2e-5)
    for length in (1.0, 0.3):
        close(tokenizer.decode(length * latents), "decoded", rtol=1e-3, atol=1e-4)
    latents.requires_grad_()
    tokenizer.render(latents).sum().backward()
    assert latents.grad.abs().sum() > 0


def test_a_file_of_stride_8_has_its_own_row(tmp_path):
    config = replace(CONFIG, codebook_size=64, encoder_ch_mult=(1, 1, 1, 2), decoder_ch_mult=[1, 1, 1, 2])
    stored = VQModel(config).state_dict()
    del stored[STATISTICS]
    file = save(tmp_path / "vq_ds8.pt", {"model": stored})
    tokenizer = build_tokenizer("llamagen_vq8", vae_path=file)
    assert (tokenizer.stride, tokenizer.codebook_size) == (8, 64)
    assert tokenizer.encode_ids(images(1, 32, 16)).shape == (1, 4, 2)
    assert "stride 8; use --tokenizer llamagen_vq8" in message(build_tokenizer, "llamagen_vq16", vae_path=file)


def test_files_that_do_not_fit_are_one_line(weights, tmp_path):
    def said(content) -> str:
        return message(build_tokenizer, "llamagen_vq16", vae_path=save(tmp_path / "f.pt", {"model": content}))

    key = "decoder.mid.1.q.weight"
    assert f"lacks {key}" in said({name: value for name, value in weights.items() if name != key})
    assert f"{key} is (3,) there" in said({**weights, key: torch.zeros(3)})
    assert "1 unknown tensors, the first is extra" in said({**weights, "extra": torch.zeros(1)})
    assert "lacks 'quantize.embedding.weight'" in said({"encoder.conv_in.weight": torch.zeros(4, 3, 3, 3)})
    assert "other numbers of dimensions" in said({**weights, "quantize.embedding.weight": torch.zeros(3)})
    assert "its levels have the widths" in said({**weights, "encoder.conv_in.weight": torch.zeros(48, 3, 3, 3)})
    assert "needs --vae_path" in message(build_tokenizer, "llamagen_vq16")
    assert "no autoencoder at nowhere" in message(build_tokenizer, "llamagen_vq16", vae_path="nowhere")
