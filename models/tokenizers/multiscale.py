"""VAR's tokenizers: its published file at 256, 512 or 1024 pixels, and those that scripts/train_tokenizer.py makes."""

import re
from dataclasses import asdict
from pathlib import Path

import torch

from models.next_scale import kept_tokens
from models.tokenizers.continuous import Tokenizer
from models.tokenizers.ldm import fill_as_named, read_content, tensors_of, weights_file
from models.tokenizers.multiscale_vq import SCALES, MultiScaleVQ, MultiScaleVQConfig
from util.checkpoint import save_checkpoint

STATISTICS = "quantize.ema_vocab_hit_SV"  # of training, one row a scale
# fields of the configuration that no shape of a tensor says, with their types
STORED = dict(using_znorm=bool, quant_resi=float, norm_groups=int, beta=float, v_patch_nums=tuple)


class MultiScaleTokenizer(Tokenizer):
    """A `MultiScaleVQ`, frozen. Its ids (B, L) are those of all scales, the coarsest first."""

    tokens = ("multiscale",)

    def __init__(self, kind: str, model: MultiScaleVQ):
        config = model.config
        super().__init__(kind, stride=config.stride, channels=config.z_channels, image_channels=config.in_channels)
        self.codebook_size, self.scales = config.vocab_size, config.v_patch_nums
        self.settings = asdict(config)
        self.model = model.float().requires_grad_(False)
        self.eval()

    @property
    def quantize(self):
        """The quantiser, with what a transformer of next scales needs of it."""
        return self.model.quantize

    def ids_shape(self, img_size):
        """The shape (L,) of an image's ids; a size other than that of the last scale raises ValueError."""
        side = self.scales[-1] * self.stride
        if img_size != side:
            scales = ",".join(map(str, self.scales))
            raise ValueError(f"{self.kind} with the scales {scales} is for images of {side} pixels, got {img_size}")
        return (sum(self.quantize.num_tokens),)

    def decode_scales(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids (B, L) -> the images (S, B, image_channels, H, W) that the scales up to each one make."""
        with torch.no_grad():
            f_hats = self.model.ids_to_features(self.quantize.split(ids))
            return torch.stack([self.model.decode_features(f_hat).clamp(-1, 1) for f_hat in f_hats])

    def _check_images(self, images):
        super()._check_images(images)
        for side in images.shape[2:]:
            self.ids_shape(side)

    def _moments(self, images):
        raise ValueError(f"the tokenizer {self.kind} makes ids alone, it has no latents")

    def _images(self, f_hat):
        return self.model.decode_features(f_hat).clamp(-1, 1)

    def inputs_of(self, tokens):
        """What a transformer of next scales reads, (B, L − p_0², C), to predict the ids (B, L) of each scale."""
        return self.model.ids_to_inputs(self.quantize.split(tokens))

    def unknown_tokens(self, unknown):
        """Those tokens (L,) bool that are not kept where unknown (h, w) bool is to be made anew."""
        return ~kept_tokens(~unknown, self.scales)

    def images_so_far(self, ids, unknown):
        """The images (B, …) of the scales before the first that has an unknown token, of ids and unknown (B, L)."""
        columns = unknown.any(dim=0)
        num = next((s for s, part in enumerate(self.quantize.split(columns[None])) if part.any()), len(self.scales))
        if num == 0:
            return torch.zeros(len(ids), self.image_channels, *[self.scales[-1] * self.stride] * 2, device=ids.device)
        f_hats = self.model.ids_to_features(self.quantize.split(ids)[:num])
        return self.model.decode_features(f_hats[-1]).clamp(-1, 1)

    def _ids(self, images):
        return torch.cat(self.model.encode(images.float()), dim=1)

    def codes(self):
        return self.quantize.embedding.weight

    def _images_of_codes(self, vectors):
        parts = enumerate(self.quantize.split(vectors))
        return self._images(sum(self.quantize.embed_vectors(part, s) for s, part in parts))


def load_multiscale(name: str, *, vae_path=None, vae_scale=None, vae_mean=None) -> MultiScaleTokenizer:
    """The tokenizer `name` of SCALES from VAR's published file, or from one that `save_multiscale` wrote.

    The sizes are those of the tensors. A file that cannot be read, or does not fit, raises ValueError, as do a scale
    and a mean, which ids do not have.
    """
    if vae_scale not in (None, 1) or vae_mean not in (None, 0):
        flag = "vae_mean" if vae_scale in (None, 1) else "vae_scale"
        raise ValueError(f"--{flag} has no meaning for the tokenizer {name}, which makes ids alone")
    path = weights_file(name, vae_path)
    content = read_content(path)
    weights = tensors_of(content, path)
    config = config_of(weights, stored_settings(content, name, path), path)
    with torch.device("meta"):  # without initial values, which are replaced
        model = MultiScaleVQ(config)
    hits = torch.zeros(len(config.v_patch_nums), config.vocab_size)
    if getattr(weights.get(STATISTICS), "shape", None) != hits.shape:  # of as many scales as the file was trained with
        weights[STATISTICS] = hits
    fill_as_named(model, weights, f"{path} does not fit {name}")
    return MultiScaleTokenizer(name, model)


def stored_settings(content, name: str, path: Path) -> dict:
    """What a file of `save_multiscale` says that its tensors do not; of any other the scales that belong to the name.

    Settings that are none, and a name of other scales, raise ValueError.
    """
    config = content.get("config") if isinstance(content, dict) else None
    if not isinstance(config, dict):
        return dict(v_patch_nums=SCALES[name])
    for key, value_type in STORED.items():
        value = config.get(key)
        if value_type is float and type(value) is int:
            value = float(value)
        if not isinstance(value, value_type) or value_type is tuple and not all(type(p) is int for p in value):
            raise ValueError(f"{path} is damaged: its {key} is {str(value)[:40]!r}")
    stored = {key: config[key] for key in STORED}
    if name != "var_vq" and stored["v_patch_nums"] != SCALES[name]:
        scales = ",".join(map(str, stored["v_patch_nums"]))
        raise ValueError(f"{path} does not fit {name}: it has the scales {scales}; use --tokenizer var_vq")
    return stored


def config_of(weights: dict, stored: dict, path) -> MultiScaleVQConfig:
    """The sizes of a `MultiScaleVQ` from its tensors and `stored_settings`; where they say none, ValueError."""
    blocks = {m[1] for key in weights if (m := re.match(r"encoder\.down\.(\d+)\.", key))}
    phis = {m[1] for key in weights if (m := re.match(r"quantize\.quant_resi\.(.*)\.weight$", key))}
    try:
        ch, in_channels = weights["encoder.conv_in.weight"].shape[:2]
        vocab_size, z_channels = weights["quantize.embedding.weight"].shape
        widths = [len(weights[f"encoder.down.{i}.block.0.conv1.weight"]) for i in range(len(blocks))]
        kernel = weights["quant_conv.weight"].shape[-1]
    except KeyError as error:
        raise ValueError(f"{path} is no tokenizer of VAR: it lacks {error}") from None
    except (ValueError, TypeError, IndexError):
        raise ValueError(f"{path} is no tokenizer of VAR: its tensors have other numbers of dimensions") from None
    if not widths or ch == 0 or any(width % ch for width in widths):
        raise ValueError(f"{path} is no tokenizer of VAR: its levels have the widths {widths}, the first layer {ch}")
    sizes = dict(in_channels=in_channels, ch=ch, ch_mult=[width // ch for width in widths])
    sizes |= dict(vocab_size=vocab_size, z_channels=z_channels, quant_conv_ks=kernel)
    if not phis:
        stored = stored | dict(quant_resi=0.0)
    elif phis == {"qresi"}:
        sizes["share_quant_resi"] = 1
    elif any(name.startswith("qresi_ls.") for name in phis):
        sizes["share_quant_resi"] = len(phis)
    else:
        sizes |= dict(share_quant_resi=0, default_qresi_counts=len(phis))
    try:
        return MultiScaleVQConfig(**sizes, **stored)
    except ValueError as error:
        raise ValueError(f"{path} is no tokenizer of VAR: {error}") from None


def save_multiscale(path: Path, model: MultiScaleVQ) -> None:
    """Write a file that `load_multiscale` reads; the tensors in it have their published names."""
    config = asdict(model.config)
    weights = {key: value.detach().cpu() for key, value in model.state_dict().items()}
    save_checkpoint(path, {"model": weights, "config": {key: config[key] for key in STORED}})
