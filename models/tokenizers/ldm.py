"""Autoencoders in the tensor names of latent diffusion (LDM): MAR's KL-16 and LDM's VQ-16, both of stride 16.

diffusers has the same networks under other names; its own conversion forgets the attention inside the levels. This
module translates the names: each tensor of the diffusers model to the one of the file.
"""

import re
from pathlib import Path

import torch

from models.tokenizers.autoencoder import AutoencoderTokenizer
from util.checkpoint import read_file

# name -> where scripts/download_weights.py puts the weights; kl16's is the path in MAR's commands
PLACES = {
    "kl16": "pretrained_models/vae/kl16.ckpt",
    "llamagen_vq16": "pretrained_models/vq_ds16_c2i.pt",
    "llamagen_vq8": "pretrained_models/vq_ds8_c2i.pt",
    **dict.fromkeys(("var_vq", "var_vq_512", "var_vq_1024"), "pretrained_models/vae_ch160v4096z32.pth"),
}
WIDTHS = (128, 128, 256, 256, 512)  # channels of the levels, in both autoencoders
LAST = len(WIDTHS) - 1  # the level at the latents
# name -> class in diffusers, scale (1/std of the latents; LDM publishes none for VQ-16: scripts/measure_latents.py)
LDM = {"kl16": ("AutoencoderKL", 0.2325), "vq16": ("VQModel", 1.0)}

_RULES = [  # (pattern in diffusers' name, LDM's name of it)
    (r"(down|up)_blocks\.(\d+)\.resnets", r"\1.\2.block"),
    (r"(down|up)_blocks\.(\d+)\.attentions", r"\1.\2.attn"),
    (r"(down|up)_blocks\.(\d+)\.(down|up)samplers\.0", r"\1.\2.\3sample"),
    (r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"group_norm", "norm"),
    (r"\bto_([qkv])\b", r"\1"),
    (r"to_out\.0", "proj_out"),
    (r"(attn.*)\.query\b", r"\1.q"),  # diffusers' older names
    (r"(attn.*)\.key\b", r"\1.k"),
    (r"(attn.*)\.value\b", r"\1.v"),
    (r"proj_attn", "proj_out"),
]


# LDM's files were written by Lightning and name this class of it, as the key of a dict that nothing reads
_LIGHTNING = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"


class _Ignored:
    """Stands for Lightning's class."""


def ldm_name(name: str, last: int = LAST) -> str:
    """LDM's name of a tensor of a diffusers autoencoder whose last level, that at the latents, has this number."""
    # LDM counts the decoder's levels from the image, diffusers from the latent
    name = re.sub(r"up_blocks\.(\d+)", lambda m: f"up_blocks.{last - int(m[1])}", name)
    for pattern, replacement in _RULES:
        name = re.sub(pattern, replacement, name)
    return name


def weights_file(name: str, vae_path) -> Path:
    """The file that --vae_path names for the tokenizer `name`; without the flag or the file ValueError."""
    if not vae_path:
        raise ValueError(f"the tokenizer {name} needs --vae_path, the file with its weights")
    if not Path(vae_path).is_file():
        raise ValueError(f"no autoencoder at {vae_path}: --vae_path must name the file with the weights of {name}")
    return Path(vae_path)


def read_content(path: Path):
    """What is in a file: the tensors of a .safetensors, or what torch.save wrote. An unreadable one: ValueError."""
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    with torch.serialization.safe_globals([(_Ignored, _LIGHTNING)]):
        return read_file(path)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors in a file by name, see `read_content` and `tensors_of`."""
    return tensors_of(read_content(path), path)


def tensors_of(content, path: Path) -> dict[str, torch.Tensor]:
    """The tensors by name in the content of a file, under "model", "state_dict" or by themselves.

    Of a whole latent diffusion model those of its autoencoder, without what precedes their names; never those of a
    training loss, `loss.`. Content without tensors raises ValueError.
    """
    weights = content
    if isinstance(content, dict):
        weights = content.get("model", content.get("state_dict", content))
    if not weights or not isinstance(weights, dict) or not all(torch.is_tensor(v) for v in weights.values()):
        raise ValueError(f"{path} is no autoencoder: it has no tensors under 'model' or 'state_dict', or by themselves")
    first = "encoder.conv_in.weight"
    prefix = min((key.removesuffix(first) for key in weights if key.endswith(f".{first}")), key=len, default="")
    if first not in weights:
        weights = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    return {key: value for key, value in weights.items() if not key.startswith("loss.")}


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from diffusers.models.model_loading_utils import load_state_dict

    try:
        return load_state_dict(str(path))
    except Exception as error:  # safetensors and diffusers raise many types
        raise ValueError(f"cannot read {path}: {' '.join(str(error).split())[:200]}") from None


def load_ldm(name: str, *, vae_path=None, vae_scale=None, vae_mean=None) -> AutoencoderTokenizer:
    """The tokenizer `name` of LDM from a file with its tensors under "model" (MAR) or "state_dict" (LDM).

    Tensors missing in the file, left over in it, or of another shape raise ValueError, as does a file that cannot be
    read.
    """
    weights = read_tensors(weights_file(name, vae_path))
    class_name, scale = LDM[name]
    with torch.device("meta"):  # without initial values, which would be replaced
        autoencoder = _build(class_name, weights)
    fill(autoencoder, weights, f"{vae_path} does not fit {name}")
    scale = scale if vae_scale is None else vae_scale
    return AutoencoderTokenizer(name, autoencoder, scale=scale, mean=0.0 if vae_mean is None else vae_mean)


def fill(autoencoder: torch.nn.Module, weights: dict, complaint: str) -> None:
    """Give a diffusers autoencoder (on the meta device) its tensors, in diffusers' own names or in LDM's, as float32.

    Any difference raises ValueError with the complaint and the first tensor that does not fit.
    """
    own = autoencoder.state_dict()
    last = max((int(m[1]) for key in own if (m := re.match(r"decoder\.up_blocks\.(\d+)", key))), default=0)
    if weights.keys() != own.keys():
        weights = {ldm_name(key, last): value for key, value in weights.items()}
    translated = {}
    for key, value in own.items():
        source = key if key in weights else ldm_name(key, last)
        if source not in weights:
            raise ValueError(f"{complaint}: it lacks {source}")
        stored = weights[source]
        if stored.dim() == 4 and value.dim() == 2:  # attention: 1×1 convolutions in LDM, linear layers in diffusers
            stored = stored.flatten(1)
        if stored.shape != value.shape:
            shapes = f"{source} is {tuple(stored.shape)} there and {tuple(value.shape)} here"
            raise ValueError(f"{complaint}: {shapes}")
        translated[key] = (source, stored.float())
    unknown = weights.keys() - {source for source, _ in translated.values()}
    if unknown:
        raise ValueError(f"{complaint}: {len(unknown)} unknown tensors, the first is {min(unknown)}")
    autoencoder.load_state_dict({key: value for key, (_, value) in translated.items()}, strict=True, assign=True)


def fill_as_named(model: torch.nn.Module, weights: dict, complaint: str) -> None:
    """Give a model (on the meta device) its tensors, which have its own names, as float32; differences as in `fill`."""
    own = {key: value.shape for key, value in model.state_dict().items()}
    for key, shape in own.items():
        if key not in weights:
            raise ValueError(f"{complaint}: it lacks {key}")
        if weights[key].shape != shape:
            raise ValueError(f"{complaint}: {key} is {tuple(weights[key].shape)} there and {tuple(shape)} here")
    unknown = weights.keys() - own.keys()
    if unknown:
        raise ValueError(f"{complaint}: {len(unknown)} unknown tensors, the first is {min(unknown)}")
    model.load_state_dict({key: value.float() for key, value in weights.items()}, assign=True)


def sizes_of(weights: dict, path) -> tuple[str, dict]:
    """(class in diffusers, its settings) of an autoencoder from its tensors, in LDM's names or in diffusers'.

    A file without those tensors raises ValueError with its path.
    """
    blocks = {m[1] for key in weights if (m := re.match(r"encoder\.down(?:_blocks)?\.(\d+)\.(?:block|resnets)\.", key))}
    last = len(blocks) - 1
    tensors = {ldm_name(key, last): value.shape for key, value in weights.items()}
    try:
        widths = [tensors[f"encoder.down.{i}.block.0.conv2.weight"][0] for i in range(last + 1)]
        latent_channels = tensors["decoder.conv_in.weight"][1]
        channels = dict(in_channels=tensors["encoder.conv_in.weight"][1])
        channels["out_channels"] = tensors["decoder.conv_out.weight"][0]
    except (KeyError, IndexError) as error:
        raise ValueError(f"{path} is no AutoencoderKL or VQModel in the names of LDM: it lacks {error}") from None
    if not widths or any(width % 32 for width in widths):  # the groups of LDM's normalisation
        wanted = "a single file must be LDM's, of widths divisible by 32; give the folder with its config.json"
        raise ValueError(f"{path} has levels of the widths {widths}: {wanted}")
    attention = [
        f"{half}.{i}.attn.0.q.weight" in tensors for half in ("encoder.down", "decoder.up") for i in range(last + 1)
    ]
    down, up = attention[: last + 1], attention[:last:-1]
    settings = dict(
        **channels,
        latent_channels=latent_channels,
        block_out_channels=widths,
        down_block_types=["AttnDownEncoderBlock2D" if attention else "DownEncoderBlock2D" for attention in down],
        up_block_types=["AttnUpDecoderBlock2D" if attention else "UpDecoderBlock2D" for attention in up],
        layers_per_block=sum(bool(re.fullmatch(r"encoder\.down\.0\.block\.\d+\.conv2\.weight", k)) for k in tensors),
        mid_block_add_attention="encoder.mid.attn_1.q.weight" in tensors,
    )
    codebook = tensors.get("quantize.embedding.weight")
    if codebook is not None:
        return "VQModel", dict(settings, num_vq_embeddings=codebook[0], vq_embed_dim=codebook[1])
    convs = {f"use_{name}": f"{name}.weight" in tensors for name in ("quant_conv", "post_quant_conv")}
    return "AutoencoderKL", dict(settings, **convs)


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
