"""What several tests need: a tiny model, and weights rebuilt from their names as the fixtures define them."""

import zlib

import numpy as np
import torch

from models.mar import MAR, MARConfig

TINY = dict(
    img_size=8, vae_stride=1, vae_embed_dim=1, encoder_embed_dim=16, encoder_depth=1, encoder_num_heads=2,
    decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2, class_num=3, buffer_size=2, diffloss_d=1,
    diffloss_w=16, num_sampling_steps=4, diffusion_batch_mul=1, attn_dropout=0.0, proj_dropout=0.0,
)  # fmt: skip


def named_weights(model: torch.nn.Module, scale: float = 0.05) -> torch.nn.Module:
    """The model with every tensor drawn from a seed that is its name's checksum (tests/fixtures: see shared README)."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            g = np.random.RandomState(zlib.crc32(name.encode()) & 0xFFFFFFFF)
            value = g.standard_normal(tuple(tensor.shape)) * scale
            if tensor.ndim == 1 and name.endswith("weight"):
                value = value + 1.0
            tensor.copy_(torch.from_numpy(value))
    return model


def tiny_mar(**overrides) -> MAR:
    """A MAR of a few thousand parameters, no two of them alike."""
    return named_weights(MAR(MARConfig(**{**TINY, **overrides})), scale=0.2).eval()
