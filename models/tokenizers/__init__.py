"""Tokenizers: images in [−1, 1] to latents, or ids, and back. A new one is one file and one row of TOKENIZERS.

The interface, documented in `models.tokenizers.continuous.Tokenizer`:

    encode(images (B, image_channels, H, W), sample=True, generator=None) -> (raw − mean)·scale, (B, channels, h, w)
    decode(latents (B, channels, h, w)) -> images
    encode_moments(images) -> (B, moment_channels, h, w), raw; from_moments(moments, sample, generator) -> latents
    tokens: which of "continuous", "discrete", "multiscale" they can be used as; where ids, codebook_size entries,
    encode_ids(images) -> ids (B, h, w) long, of all scales (B, L); decode_ids(ids) -> images; ids_shape(img_size)
    codes() -> entries (V, C); render_codes(entries in the place of ids) -> images, differentiable
    scales: sides of the grids of a multi-scale one, else ()
    stride (pixels of a latent's side), channels, scale, mean, clip ((lo, hi) for a predicted x₀, or None), fingerprint
"""

from functools import partial

from models.tokenizers.continuous import Tokenizer
from models.tokenizers.ldm import LDM, PLACES, load_ldm
from models.tokenizers.llamagen import load_llamagen
from models.tokenizers.multiscale import SCALES, load_multiscale
from models.tokenizers.pixel import PixelTokenizer
from models.tokenizers.saved import load_diffusers
from models.tokenizers.vq import VQ_CONFIGS

TOKENIZERS = {
    "pixel": PixelTokenizer,
    **{name: partial(load_ldm, name) for name in LDM},
    **{name: partial(load_llamagen, name) for name in VQ_CONFIGS},
    **{name: partial(load_multiscale, name) for name in SCALES},
    "diffusers": load_diffusers,
}
NAMES = ", ".join(f"{key}:PATH_OR_REPO" if key == "diffusers" else key for key in TOKENIZERS)  # for people
_OPTIONS = ("vae_path", "vae_scale", "vae_mean")  # of all rows but pixel


def build_tokenizer(name: str, **options) -> Tokenizer:
    """The tokenizer of this name: a row of TOKENIZERS, for diffusers with `:PATH_OR_REPO` after it.

    options: channels (of the images) for pixel; vae_path, vae_scale, vae_mean for the others, the last two a number or
    one for each channel. An unknown name, or weights that cannot be read or do not fit, raise ValueError.
    """
    row, _, place = name.partition(":")
    if row not in TOKENIZERS or (row == "diffusers") != bool(place):
        raise ValueError(f"unknown tokenizer {name!r}; valid: {NAMES}")
    if row == "diffusers":
        return load_diffusers(place, **options)
    return TOKENIZERS[row](**options)


def tokenizer_of(settings: dict, image_channels: int | None) -> Tokenizer:
    """The tokenizer of the flags, or a checkpoint's config: their tokenizer, vae_path, vae_scale and vae_mean.

    Published weights are those in PLACES unless vae_path names others. image_channels: None if unknown; pixel needs it.
    A tokenizer of images with other channels raises ValueError.
    """
    name = settings["tokenizer"]
    given = {key: settings[key] for key in _OPTIONS if settings.get(key) is not None}
    if name == "pixel":
        unused = [key for key in given if key != "vae_path"]
        if unused:
            raise ValueError(f"--{unused[0]} has no meaning for the tokenizer pixel, whose latents are the pixels")
        return build_tokenizer(name, channels=image_channels)
    if name in PLACES:
        given.setdefault("vae_path", PLACES[name])
    tokenizer = build_tokenizer(name, **given)
    if image_channels not in (None, tokenizer.image_channels):
        channels = f"images of {tokenizer.image_channels} channels, the data have {image_channels}"
        raise ValueError(f"the tokenizer {name} takes {channels}")
    return tokenizer
