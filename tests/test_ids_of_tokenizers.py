"""Discrete tokens: ids are the nearest entries, decode as latents do, and tokenizers without a codebook refuse them."""

import pytest
import torch

from models.tokenizers import build_tokenizer
from tests.helpers_ids import GreyIds
from tests.helpers_tokenizers import TINY, images, ldm_tensors, message, save
from util.rng import generator


@pytest.fixture
def tokenizer(request, saved, small, tmp_path):
    """vq16, and a VQModel of diffusers whose latents have a scale and a mean."""
    if request.param == "vq16":
        tokenizer = build_tokenizer("vq16", vae_path=save(tmp_path / "f", {"state_dict": ldm_tensors("vq16")}))
        last = tokenizer.autoencoder.quant_conv  # latents of new weights are much alike
        last.bias -= tokenizer.encode_moments(images(3, 32, 16)).mean(dim=(0, 2, 3))
        spread = tokenizer.encode_moments(images(3, 32, 16)).std()
        last.weight /= spread
        last.bias /= spread
        tokenizer.autoencoder.quantize.embedding.weight.copy_(torch.randn(20, 6, generator=generator(0)))
        return tokenizer
    return build_tokenizer(f"diffusers:{saved / 'VQModel'}", vae_scale=3.0, vae_mean=[0.5, 0.1, -2.0])


BOTH = pytest.mark.parametrize("tokenizer", ["vq16", "VQModel"], indirect=True)


@BOTH
def test_ids_are_the_nearest_entries_as_they_are(tokenizer):
    """By plain distance: neither latents nor entries are divided by their length, nor are latents normalised."""
    x = images(3, 32, 16)
    moments, codebook = tokenizer.encode_moments(x), tokenizer.autoencoder.quantize.embedding.weight
    ids = tokenizer.encode_ids(x)
    distances = (moments.movedim(1, -1).unsqueeze(-2) - codebook).square().sum(dim=-1)  # (B, h, w, V)
    assert tokenizer.tokens == ("continuous", "discrete") and tokenizer.codebook_size == len(codebook)
    assert ids.shape == (3, 32 // tokenizer.stride, 16 // tokenizer.stride) and ids.dtype == torch.long
    assert torch.equal(ids, distances.argmin(dim=-1)) and len(ids.unique()) > 1
    assert torch.equal(tokenizer.encode_ids(x[1:2]), ids[1:2])


@BOTH
def test_ids_decode_as_the_latents_that_they_are_the_nearest_entries_of(tokenizer):
    x = images(3, 32, 16)
    ids = tokenizer.encode_ids(x)
    decoded, others = tokenizer.decode_ids(ids), tokenizer.decode_ids((ids + 1) % tokenizer.codebook_size)
    assert decoded.shape == x.shape and decoded.dtype == torch.float32
    error = (decoded - tokenizer.decode(tokenizer.encode(x))).abs().max()  # a new network amplifies rounding
    assert error < 0.02 * (decoded - others).abs().max()


@BOTH
def test_ids_that_are_none_are_one_line(tokenizer):
    size = tokenizer.codebook_size
    for wrong in (size, -1):
        line = message(tokenizer.decode_ids, torch.full((1, 2, 2), wrong))
        assert f"0 to {size - 1}, got {wrong}" in line
    assert "divisible by" in message(tokenizer.encode_ids, images(1, 31, 16))


@pytest.mark.parametrize("name", [name for name in TINY if name != "VQModel"])
def test_an_autoencoder_without_codebook_has_no_ids(saved, name):
    tokenizer = build_tokenizer(f"diffusers:{saved / name}")
    assert (tokenizer.tokens, tokenizer.codebook_size) == (("continuous",), 0)
    for call, given in ((tokenizer.encode_ids, images()), (tokenizer.decode_ids, torch.zeros(1, 2, 2).long())):
        assert f"{name} has no codebook, its tokens are continuous" in message(call, given)


def test_a_tokenizer_of_ids_alone_has_the_same_interface():
    tokenizer = GreyIds()
    ids = torch.randint(tokenizer.codebook_size, (2, 4, 4))
    assert torch.equal(tokenizer.encode_ids(tokenizer.decode_ids(ids)), ids)
