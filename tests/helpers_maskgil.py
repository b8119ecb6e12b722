"""The published numbers of MaskGIL, and small models of it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from models.maskgil import MASKGIL_CONFIGS, MaskGIL, MaskGILConfig
from tests.helpers import named_weights
from tests.helpers_causal import disturbed

REFERENCE = np.load(Path(__file__).parent / "fixtures" / "maskgil_reference.npz")
ENTRIES, LENGTH = 16, 16
VARIANTS = ["published", "rope2d", "rope2d_qk", "rope2d_post", "rope2d_qk_post", "published_qk_post"]


def tensor(name: str) -> torch.Tensor:
    """An array of the fixture."""
    return torch.from_numpy(REFERENCE[name])


def settings_of(name: str) -> dict[str, str]:
    """{key: text} of the fixture's "<name>/settings"."""
    return dict(item.split("=") for item in REFERENCE[f"{name}/settings"])


def published(variant: str) -> MaskGIL:
    """The fixture's model, in one of its VARIANTS."""
    sizes = dict(item.split("=") for item in REFERENCE["config"])
    sizes = {key: float(value) if key == "norm_eps" else int(value) for key, value in sizes.items()}
    switches = settings_of(variant)
    switches = {key: switches[key] == "True" for key in ("qk_norm", "post_norm")} | {"rope": switches["rope"]}
    return named_weights(MaskGIL(MaskGILConfig(**sizes, **switches)), float(REFERENCE["fill_std"])).eval()


def tiny_maskgil(seed=0, **changes) -> MaskGIL:
    """A MaskGIL over 4×4 ids of 16 entries in eval mode, all of whose weights differ from their start."""
    sizes = dict(dim=32, n_layer=2, n_head=2, multiple_of=16, vocab_size=ENTRIES, img_size=8, vae_stride=2)
    torch.manual_seed(seed)
    return disturbed(MaskGIL(MaskGILConfig(**{**sizes, "vae_embed_dim": 1, "class_num": 4, **changes})))


def shrink(patch) -> None:
    """A maskgil_tiny that takes a tenth of the time, until pytest's MonkeyPatch `patch` is undone."""
    small = replace(MASKGIL_CONFIGS["maskgil_tiny"], dim=32, n_layer=2, n_head=2)
    patch.setitem(MASKGIL_CONFIGS, "maskgil_tiny", small)
