"""Autoencoders of diffusers: every class, normalisation, posterior noise, fingerprints, and what is refused."""

import json
import re

import pytest
import torch

from models.tokenizers import build_tokenizer
from models.tokenizers.autoencoder import AUTOENCODERS
from tests.helpers_tokenizers import TINY, images, message, save
from util.rng import generator


def test_every_class_is_tested():
    assert TINY.keys() == AUTOENCODERS.keys()


@pytest.mark.parametrize("name", TINY)
def test_an_autoencoder_of_each_class(saved, name):
    _, channels, stride, scale, mean = TINY[name]
    tokenizer = build_tokenizer(f"diffusers:{saved / name}")
    assert (tokenizer.stride, tokenizer.channels, tokenizer.image_channels) == (stride, channels, 3)
    assert tokenizer.scale == pytest.approx(scale) and tokenizer.mean == pytest.approx(mean) and tokenizer.clip is None
    assert not tokenizer.training and not any(p.requires_grad for p in tokenizer.parameters())

    x = images()
    moments = tokenizer.encode_moments(x)
    assert moments.shape == (3, tokenizer.moment_channels, 16 // stride, 8 // stride)
    gaussian = name in ("AutoencoderKL", "ConsistencyDecoderVAE")
    assert tokenizer.moment_channels == channels * (2 if gaussian else 1)
    for draw in (lambda: generator(1), lambda: [generator(i) for i in (5, 6, 7)]):
        latents = tokenizer.encode(x, generator=draw())
        assert torch.equal(latents, tokenizer.from_moments(moments, generator=draw()))
    assert latents.shape == (3, channels, 16 // stride, 8 // stride)
    torch.testing.assert_close(tokenizer.encode(x, sample=False), (moments[:, :channels] - mean) * scale)

    decoded = tokenizer.decode(latents)
    assert decoded.shape == x.shape and decoded.dtype == torch.float32
    assert torch.equal(decoded, tokenizer.decode(latents))  # also where decoding draws noise
    torch.testing.assert_close(decoded[1:2], tokenizer.decode(latents[1:2]), rtol=1e-4, atol=1e-5)


def test_sampling_the_posterior_is_its_mean_plus_its_deviation_times_the_draw(saved):
    tokenizer = build_tokenizer(f"diffusers:{saved / 'AutoencoderKL'}", vae_scale=1, vae_mean=0)
    mean, log_variance = torch.randn(2, 1, 5, 4, 4)
    moments = torch.cat([mean, log_variance], dim=1)
    drawn = tokenizer.from_moments(moments, generator=generator(3))
    expected = mean + (0.5 * log_variance).exp() * torch.randn(1, 5, 4, 4, generator=generator(3))
    torch.testing.assert_close(drawn, expected)
    assert torch.equal(tokenizer.from_moments(moments, sample=False), mean)


def test_an_image_with_its_own_generator_has_the_same_latents_in_any_batch(saved):
    tokenizer = build_tokenizer(f"diffusers:{saved / 'AutoencoderKL'}")
    moments = tokenizer.encode_moments(images(4))
    together = tokenizer.from_moments(moments, generator=[generator(i) for i in range(4)])
    for i in (2, 0):
        alone = tokenizer.from_moments(moments[i : i + 1], generator=[generator(i)])
        assert torch.equal(alone[0], together[i])
    pair = tokenizer.from_moments(moments[[3, 1]], generator=[generator(3), generator(1)])
    assert torch.equal(pair, together[[3, 1]])
    assert not torch.equal(together, tokenizer.from_moments(moments, sample=False))
    assert "2 generators" in message(tokenizer.from_moments, moments, generator=[generator(0)] * 2)


@pytest.mark.parametrize("mean", [0.5, [0.1, -0.2, 0.3, 0.0, 2.0], "0.1,-0.2,0.3,0,2"])
def test_scale_and_mean_can_be_given_and_cancel_in_the_decoder(saved, mean):
    name = f"diffusers:{saved / 'AutoencoderKL'}"
    plain, other = build_tokenizer(name, vae_scale=1, vae_mean=0), build_tokenizer(name, vae_scale="3", vae_mean=mean)
    x = images()
    raw, latents = plain.encode(x, sample=False), other.encode(x, sample=False)
    column = torch.tensor(0.5 if mean == 0.5 else [0.1, -0.2, 0.3, 0.0, 2.0]).reshape(-1, 1, 1)
    torch.testing.assert_close(latents, (raw - column) * 3)
    assert other.scale == 3 and (other.mean == 0.5 or other.mean == (0.1, -0.2, 0.3, 0.0, 2.0))
    torch.testing.assert_close(other.decode(latents), plain.decode(raw), rtol=1e-4, atol=1e-5)


BAD_NUMBERS = [("vae_scale", 0), ("vae_scale", -1), ("vae_scale", "x"), ("vae_scale", "1,1,1,1,0"), ("vae_mean", "1,2")]
BAD_NUMBERS += [("vae_mean", [1.0, 2.0]), ("vae_mean", "nan"), ("vae_mean", "1,,2,3,4")]


@pytest.mark.parametrize("key, value", BAD_NUMBERS)
def test_bad_scale_or_mean_is_one_line(saved, key, value):
    assert key in message(build_tokenizer, f"diffusers:{saved / 'AutoencoderKL'}", **{key: value})


def test_the_fingerprint_is_of_the_weights_not_of_the_normalisation(saved, tmp_path):
    name = f"diffusers:{saved / 'AutoencoderKL'}"
    first = build_tokenizer(name)
    moved = tmp_path / "elsewhere"
    first.autoencoder.save_pretrained(moved)
    same = [build_tokenizer(name, vae_scale=7, vae_mean=1), build_tokenizer(f"diffusers:{moved}")]
    same.append(build_tokenizer("diffusers:gone", vae_path=moved))
    assert {t.fingerprint for t in same} == {first.fingerprint} and re.fullmatch(r"[0-9a-f]{16}", first.fingerprint)
    assert same[0].describe() != first.describe() == same[1].describe()
    with torch.no_grad():
        first.autoencoder.quant_conv.bias[0] += 1
    first.autoencoder.save_pretrained(moved)
    others = [build_tokenizer(f"diffusers:{p}") for p in (moved, saved / "ConsistencyDecoderVAE", saved / "VQModel")]
    others += [build_tokenizer("pixel", channels=1), build_tokenizer("pixel", channels=3)]
    assert len({t.fingerprint for t in [*same, *others]}) == 1 + len(others)


def test_pixels_have_moments_too():
    tokenizer, x = build_tokenizer("pixel", channels=3), images()
    assert torch.equal(tokenizer.encode(x, generator=[generator(0)] * 3), x) and torch.equal(tokenizer.decode(x), x)
    assert torch.equal(tokenizer.from_moments(tokenizer.encode_moments(x)), x) and tokenizer.moment_channels == 3
    assert (tokenizer.scale, tokenizer.mean, tokenizer.stride, tokenizer.clip) == (1, 0, 1, (-1, 1))


@pytest.mark.parametrize("shape", [(1, 3, 15, 16), (1, 3, 16, 9), (1, 1, 16, 16), (3, 16, 16)])
def test_images_that_do_not_fit_are_one_line(saved, shape):
    tokenizer = build_tokenizer(f"diffusers:{saved / 'AutoencoderKL'}")
    line = message(tokenizer.encode, torch.zeros(shape))
    assert "AutoencoderKL" in line and str(shape[2] if len(shape) == 4 and shape[1] == 3 else shape) in line
    message(tokenizer.from_moments, torch.zeros(1, 9, 4, 4))


def test_what_is_no_autoencoder_of_diffusers_is_one_line(saved, tmp_path):
    for name in ("nope", "diffusers", "diffusers:", "pixel:x", "kl16:x"):
        assert repr(name) in message(build_tokenizer, name)
    missing = tmp_path / "missing"
    assert str(missing) in message(build_tokenizer, f"diffusers:{missing}")
    assert str(tmp_path) in message(build_tokenizer, f"diffusers:{tmp_path}")  # a folder without config.json
    config = json.loads((saved / "AutoencoderKL" / "config.json").read_text())
    weights = next((saved / "AutoencoderKL").glob("*.safetensors"))
    copy = tmp_path / weights.name
    for settings, data, shown in (
        ({**config, "_class_name": "UNet2DModel"}, weights.read_bytes(), "UNet2DModel"),
        ({**config, "latent_channels": 7}, weights.read_bytes(), "conv"),
        ({**config, "block_out_channels": [8, 8, 8]}, weights.read_bytes(), "tmp"),
        (config, weights.read_bytes()[:1000], "cannot load"),
        (config, b"", "cannot load"),
        (config, None, "cannot load"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(settings))
        copy.unlink(missing_ok=True)
        if data is not None:
            copy.write_bytes(data)
        assert shown in message(build_tokenizer, f"diffusers:{tmp_path}")
    (tmp_path / "config.json").write_text("{")
    assert str(tmp_path) in message(build_tokenizer, f"diffusers:{tmp_path}")


def test_tensors_that_are_missing_are_not_left_at_random(saved, tmp_path):
    build_tokenizer(f"diffusers:{saved / 'AutoencoderTiny'}").autoencoder.save_pretrained(
        tmp_path, safe_serialization=False
    )
    file = tmp_path / "diffusion_pytorch_model.bin"
    weights = torch.load(file, weights_only=True)
    key = sorted(weights)[3]
    save(file, {k: v for k, v in weights.items() if k != key})
    assert key in message(build_tokenizer, f"diffusers:{tmp_path}")
