"""Autoencoders in the tensor names of latent diffusion (LDM): MAR's KL-16 and LDM's VQ-16, both of stride 16.

diffusers has the same networks under other names; its own conversion forgets the attention inside the levels. This
module translates the names: each tensor of the diffusers model to the one of the file.
"""

import re
from pathlib import Path

import torch

from models.tokenizers.autoencoder import AutoencoderTokenizer
from util.checkpoint import read_file

KL16_PATH = "pretrained_models/vae/kl16.ckpt"  # the path in MAR's commands
WIDTHS = (128, 128, 256, 256, 512)  # channels of the levels, in both autoencoders
LAST = len(WIDTHS) - 1  # the level at the latents
# name -> class in diffusers, scale (1/std of the latents; LDM publishes none for VQ-16: scripts/measure_latents.py)
LDM = {"kl16": ("AutoencoderKL", 0.2325), "vq16": ("VQModel", 1.0)}

_RULES = [  # (pattern in diffusers' name, LDM's name of it)
    (r"down_blocks\.(\d+)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d+)\.attentions", r"down.\1.attn"),
    (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
    # LDM counts the decoder's levels from the image, diffusers from the latent
    (r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{LAST - int(m[1])}.block"),
    (r"up_blocks\.(\d+)\.attentions", lambda m: f"up.{LAST - int(m[1])}.attn"),
    (r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{LAST - int(m[1])}.upsample"),
    (r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"group_norm", "norm"),
    (r"\bto_([qkv])\b", r"\1"),
    (r"to_out\.0", "proj_out"),
]


# LDM's files were written by Lightning and name this class of it, as the key of a dict that nothing reads
_LIGHTNING = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"


class _Ignored:
    """Stands for Lightning's class."""


def ldm_name(name: str) -> str:
    """LDM's name of a tensor of a diffusers autoencoder."""
    for pattern, replacement in _RULES:
        name = re.sub(pattern, replacement, name)
    return name


def load_ldm(name: str, *, vae_path=None, vae_scale=None, vae_mean=None) -> AutoencoderTokenizer:
    """The tokenizer `name` of LDM from a file with its tensors under "model" (MAR) or "state_dict" (LDM).

    Tensors missing in the file, left over in it (but for those of the training loss, `loss.`), or of another shape
    raise ValueError, as does a file that cannot be read.
    """
    if not vae_path:
        raise ValueError(f"the tokenizer {name} needs --vae_path, the file with its weights")
    if not Path(vae_path).is_file():
        raise ValueError(f"no autoencoder at {vae_path}: --vae_path must name the file with the weights of {name}")
    with torch.serialization.safe_globals([(_Ignored, _LIGHTNING)]):
        content = read_file(vae_path)
    weights = content.get("model", content.get("state_dict")) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(v, torch.Tensor) for v in weights.values()):
        raise ValueError(f"{vae_path} is no autoencoder: it has no tensors under 'model' or 'state_dict'")
    weights = {key: value for key, value in weights.items() if not key.startswith("loss.")}
    class_name, scale = LDM[name]
    with torch.device("meta"):  # without initial values, which would be replaced
        autoencoder = _build(class_name, weights)
    translated = {}
    for key, value in autoencoder.state_dict().items():
        source = ldm_name(key)
        if source not in weights:
            raise ValueError(f"{vae_path} does not fit {name}: it lacks {source}")
        stored = weights.pop(source)
        if stored.dim() == 4 and value.dim() == 2:  # attention: 1×1 convolutions in LDM, linear layers in diffusers
            stored = stored.flatten(1)
        if stored.shape != value.shape:
            shapes = f"{source} is {tuple(stored.shape)} there and {tuple(value.shape)} here"
            raise ValueError(f"{vae_path} does not fit {name}: {shapes}")
        translated[key] = stored.float()
    if weights:
        raise ValueError(f"{vae_path} does not fit {name}: {len(weights)} unknown tensors, the first is {min(weights)}")
    autoencoder.load_state_dict(translated, strict=True, assign=True)
    scale = scale if vae_scale is None else vae_scale
    return AutoencoderTokenizer(name, autoencoder, scale=scale, mean=0.0 if vae_mean is None else vae_mean)


def _build(class_name: str, weights: dict):
    """The network; the sizes in which published files of one class differ are those of the tensors."""
    import diffusers

    # LDM's decoder has attention in the level at the latents, MAR's has none
    in_decoder = any(key.startswith(f"decoder.up.{LAST}.attn.") for key in weights)

    def size(key, axis, usual):
        return weights[key].shape[axis] if key in weights and weights[key].dim() > axis else usual

    sizes = dict(latent_channels=16)
    if class_name == "VQModel":
        codebook = "quantize.embedding.weight"
        sizes = dict(num_vq_embeddings=size(codebook, 0, 16384), vq_embed_dim=size(codebook, 1, 8))
        sizes["latent_channels"] = size("decoder.conv_in.weight", 1, 8)
    return getattr(diffusers, class_name)(
        block_out_channels=WIDTHS,
        down_block_types=["DownEncoderBlock2D"] * LAST + ["AttnDownEncoderBlock2D"],
        up_block_types=["AttnUpDecoderBlock2D" if in_decoder else "UpDecoderBlock2D"] + ["UpDecoderBlock2D"] * LAST,
        layers_per_block=2,
        **sizes,
    )
