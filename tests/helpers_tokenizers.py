"""What the tests of latent tokenizers share: the smallest autoencoder of each class, LDM files, images and errors."""

import re
from pathlib import Path

import pytest
import torch

from models.tokenizers import ldm
from util.rng import generator

# the smallest of each class, of stride 2 but for DC's 4: (settings, channels of the latents, stride, scale, mean)
LEVELS = dict(block_out_channels=(8, 8), norm_num_groups=4)
BLOCKS = dict(down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2)
TINY = {
    "AutoencoderKL": (
        dict(**LEVELS, **BLOCKS, latent_channels=5, scaling_factor=0.5, shift_factor=0.25), 5, 2, 0.5, 0.25,
    ),
    "AutoencoderTiny": (
        dict(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1))
        | dict(num_decoder_blocks=(1, 1), latent_channels=3), 3, 2, 1.0, 0.0,
    ),
    "AutoencoderDC": (
        dict(encoder_block_out_channels=(8, 8, 16), decoder_block_out_channels=(8, 8, 16), latent_channels=8)
        | dict(encoder_layers_per_block=(1,) * 3, decoder_layers_per_block=(1,) * 3, scaling_factor=0.4)
        | dict(encoder_qkv_multiscales=((),) * 3, decoder_qkv_multiscales=((),) * 3), 8, 4, 0.4, 0.0,
    ),
    "ConsistencyDecoderVAE": (
        dict(encoder_block_out_channels=(8, 8), encoder_down_block_types=["DownEncoderBlock2D"] * 2)
        | dict(encoder_layers_per_block=1, encoder_norm_num_groups=4, decoder_block_out_channels=(8, 8))
        | dict(decoder_down_block_types=["ResnetDownsampleBlock2D"] * 2, decoder_norm_num_groups=4)
        | dict(decoder_up_block_types=["ResnetUpsampleBlock2D"] * 2, decoder_layers_per_block=1), 4, 2, 0.18215, 0.0,
    ),
    "VQModel": (dict(**LEVELS, **BLOCKS, latent_channels=6, vq_embed_dim=3, num_vq_embeddings=7), 3, 2, 0.18215, 0.0),
}  # fmt: skip


def images(batch=3, height=16, width=8, seed=0):
    return torch.rand(batch, 3, height, width, generator=generator(seed)) * 2 - 1


def ldm_tensors(name, decoder_attention=False, seed=0) -> dict:
    """Tensors as an LDM file of this tokenizer names and shapes them."""
    sizes = {"decoder.up.4.attn.": 0} if decoder_attention else {}
    if name == "vq16":
        sizes |= {"quantize.embedding.weight": torch.zeros(20, 6), "decoder.conv_in.weight": torch.zeros(32, 8, 3, 3)}
    torch.manual_seed(seed)
    tensors = ldm._build(ldm.LDM[name][0], sizes).state_dict()
    linear = re.compile(r"attn.*(q|k|v|proj_out)\.weight")
    named = {ldm.ldm_name(key): value for key, value in tensors.items()}
    return {key: value[..., None, None] if linear.search(key) else value for key, value in named.items()}


def save(path, content) -> Path:
    torch.save(content, path)
    return path


def message(call, *args, **options) -> str:
    """The one line of the ValueError that the call must raise."""
    with pytest.raises(ValueError) as error:
        call(*args, **options)
    assert str(error.value) and "\n" not in str(error.value)
    return str(error.value)
