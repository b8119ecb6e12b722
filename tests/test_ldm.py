"""KL-16 and VQ-16: parity with the published one, files of MAR and of LDM, and files that do not fit."""

import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from models.tokenizers import build_tokenizer, ldm
from tests.helpers import tensors_by_name
from tests.helpers_tokenizers import images, ldm_tensors, message, save
from util.checkpoint import read_file

REFERENCE = np.load(Path(__file__).parent / "fixtures" / "kl16_reference.npz")


def test_kl16_is_at_parity_with_the_published_one(tmp_path):
    """All 312 tensors of the file, and an image that is not square, which shows on which side the strides pad."""
    shapes = {}
    for entry in REFERENCE["keys"]:
        key, shape = re.fullmatch(r"(\S+) \((.*)\)", entry).groups()
        shapes[key] = tuple(int(n) for n in shape.split(",") if n.strip())
    weights = {"loss.logvar": torch.zeros(()), **tensors_by_name(shapes)}
    file = save(tmp_path / "kl16.ckpt", {"model": weights})
    tokenizer = build_tokenizer("kl16", vae_path=file)
    file.unlink()  # 270 MB
    assert (tokenizer.stride, tokenizer.channels, tokenizer.moment_channels, tokenizer.clip) == (16, 16, 32, None)
    assert (tokenizer.scale, tokenizer.mean) == (0.2325, 0.0)
    assert not tokenizer.training and not any(p.requires_grad for p in tokenizer.parameters())

    moments = tokenizer.encode_moments(torch.from_numpy(REFERENCE["image"]))
    np.testing.assert_allclose(moments.numpy(), REFERENCE["moments"], rtol=1e-4, atol=1e-5)
    latents = tokenizer.from_moments(moments, sample=False)
    torch.testing.assert_close(latents, moments[:, :16] * 0.2325)
    np.testing.assert_allclose(
        tokenizer.decode(latents).numpy(), REFERENCE["reconstruction_of_mode"], rtol=1e-4, atol=5e-5
    )


@pytest.mark.parametrize("name, channels", [("kl16", 16), ("vq16", 6)])
@pytest.mark.parametrize("key, decoder_attention", [("model", False), ("state_dict", True)])
def test_files_of_mar_and_of_ldm_load(tmp_path, small, name, channels, key, decoder_attention):
    tensors = ldm_tensors(name, decoder_attention)
    assert ("decoder.up.4.attn.2.proj_out.weight" in tensors) == decoder_attention
    tokenizer = build_tokenizer(name, vae_path=save(tmp_path / "f", {key: {**tensors, "loss.a.b": torch.ones(3)}}))
    assert (tokenizer.stride, tokenizer.channels) == (16, channels)
    for ours, value in tokenizer.autoencoder.state_dict().items():
        assert torch.equal(value.flatten(), tensors[ldm.ldm_name(ours)].flatten())
    assert tokenizer.encode(images(1, 32, 16)).shape == (1, channels, 2, 1)


def test_a_file_that_lightning_wrote_loads_without_lightning(tmp_path, small, monkeypatch):
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    content = {"callbacks": {module.ModelCheckpoint: {"best": None}}, "state_dict": ldm_tensors("vq16")}
    with monkeypatch.context() as patch:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
            patch.setitem(sys.modules, name, module)
        file = save(tmp_path / "f", content)
    assert build_tokenizer("vq16", vae_path=file).channels == 6
    assert "cannot read" in message(read_file, file)  # nowhere else


def test_vq16_is_continuous_and_quantised_by_the_decoder(tmp_path, small):
    tensors = ldm_tensors("vq16")
    tensors["quantize.embedding.weight"] = torch.randn(tensors["quantize.embedding.weight"].shape)
    tokenizer = build_tokenizer("vq16", vae_path=save(tmp_path / "f", {"state_dict": tensors}))
    model, x = tokenizer.autoencoder, images(2, 32, 32)
    latents = tokenizer.encode(x)
    assert torch.equal(latents, model.encode(x).latents) and tokenizer.moment_channels == tokenizer.channels
    codes = torch.cdist(latents.movedim(1, -1), model.quantize.embedding.weight).argmin(-1)
    nearest = model.quantize.embedding.weight[codes].movedim(-1, 1)
    assert not torch.allclose(nearest, latents)
    decoded = tokenizer.decode(latents)
    torch.testing.assert_close(decoded, model.decode(nearest, force_not_quantize=True).sample, rtol=1e-3, atol=1e-3)
    assert (decoded - model.decode(latents, force_not_quantize=True).sample).abs().max() > 0.1


BAD_FILES = {
    "lacks decoder.mid.attn_1.q.bias": lambda t: t.pop("decoder.mid.attn_1.q.bias"),
    "lacks encoder.down.4.attn.1.k.weight": lambda t: t.pop("encoder.down.4.attn.1.k.weight"),
    "unknown tensors, the first is encoder.extra": lambda t: t.update({"encoder.extra": torch.ones(1)}),
    "unknown tensors, the first is model_ema.decay": lambda t: t.update({"model_ema.decay": torch.ones(1)}),
    "decoder.conv_in.weight is (3,) there and (32, 16, 3, 3) here": lambda t: t.update(
        {"decoder.conv_in.weight": torch.ones(3)}
    ),
    "quant_conv.bias is (7,) there and (32,) here": lambda t: t.update({"quant_conv.bias": torch.ones(7)}),
}


@pytest.mark.parametrize("shown", BAD_FILES)
def test_a_file_that_does_not_fit_is_named_with_the_tensor(tmp_path, small, shown):
    tensors = ldm_tensors("kl16")
    BAD_FILES[shown](tensors)
    file = save(tmp_path / "f", {"model": tensors})
    line = message(build_tokenizer, "kl16", vae_path=file)
    assert shown in line and str(file) in line


@pytest.mark.parametrize("content", [{"weights": {}}, {"model": 3}, [1], {"model": {"a": "text"}}])
def test_a_file_without_tensors_is_no_autoencoder(tmp_path, content):
    file = save(tmp_path / "f", content)
    assert f"{file} is no autoencoder" in message(build_tokenizer, "kl16", vae_path=file)


def test_files_that_cannot_be_read(tmp_path, small):
    assert "--vae_path" in message(build_tokenizer, "vq16")
    assert str(tmp_path / "no") in message(build_tokenizer, "kl16", vae_path=tmp_path / "no")
    whole = save(tmp_path / "whole", {"model": ldm_tensors("kl16")}).read_bytes()
    for data in (b"this is text", whole[: len(whole) // 2]):
        (tmp_path / "broken").write_bytes(data)
        said = message(build_tokenizer, "kl16", vae_path=tmp_path / "broken")
        assert str(tmp_path / "broken") in said and ("cannot read" in said or "is damaged" in said)
