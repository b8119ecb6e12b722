"""VAR's reference: its arrays, the tokenizer it was made with, and tensors from their names."""

import ast
import json
import re
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch

from models.tokenizers.multiscale_vq import MultiScaleVQ, MultiScaleVQConfig

FIXTURES = Path(__file__).parent / "fixtures"
REFERENCE = np.load(FIXTURES / "var_reference.npz")
SHAPES = json.loads((FIXTURES / "var_state_dict_shapes.json").read_text())
VARIANTS = ("partial4", "shared", "nonshared", "partial3", "znorm", "nophi")  # of the quantiser
STATISTICS = "quantize.ema_vocab_hit_SV"


def array(name) -> torch.Tensor:
    """An array of the reference."""
    return torch.from_numpy(REFERENCE[name])


def options(name) -> dict:
    """A configuration of the reference."""
    return {key: ast.literal_eval(value) for key, value in (item.split("=") for item in REFERENCE[name])}


def shapes(name) -> dict:
    """{key: shape} of a state dict of the reference."""
    entries = (re.fullmatch(r"(\S+) \((.*)\)", entry).groups() for entry in REFERENCE[name])
    return {key: [int(n) for n in shape.split(",") if n.strip()] for key, shape in entries}


def close(actual, name, rtol=1e-4, atol=1e-4):
    """Is it the array of the reference?"""
    np.testing.assert_allclose(np.asarray(actual.detach()), REFERENCE[name], rtol=rtol, atol=atol)


@torch.no_grad()
def fill_by_name(module: torch.nn.Module) -> torch.nn.Module:
    """Give each parameter the values that the reference draws from its name."""
    for name, parameter in module.named_parameters():
        shape = tuple(parameter.shape)
        z = np.random.RandomState(zlib.crc32(name.encode()) & 0xFFFFFFFF).standard_normal(shape)
        if "scale_mul" in name:
            z = 3 + 2 * z
        elif len(shape) == 1:
            z = 0.2 * z + name.endswith("weight")
        else:
            z = z / np.sqrt(np.prod(shape[1:]) if name.endswith("weight") else shape[-1])
        parameter.copy_(torch.from_numpy(z.astype(np.float32)))
    return module


@cache
def tokenizer(variant="partial4", **changes) -> MultiScaleVQ:
    """The tokenizer of the reference in eval mode, with one of VARIANTS."""
    config = MultiScaleVQConfig(**{**options("vq_config"), **options(f"vq/{variant}/options"), **changes})
    return fill_by_name(MultiScaleVQ(config)).eval()
