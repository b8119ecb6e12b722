"""Autoencoders of the diffusers library as tokenizers; `diffusers:PATH_OR_REPO` loads one as it was saved."""

import re
from pathlib import Path

import torch

from models.tokenizers.continuous import Tokenizer

# class in diffusers -> levels: its setting with one entry a level (each level but the first halves the image); images:
# its setting with the image's channels; gaussian: does an image have a posterior? noisy: does decoding draw noise?
AUTOENCODERS = {
    "AutoencoderKL": dict(levels="block_out_channels", images="in_channels", gaussian=True, noisy=False),
    "AutoencoderTiny": dict(levels="encoder_block_out_channels", images="in_channels", gaussian=False, noisy=False),
    "AutoencoderDC": dict(levels="encoder_block_out_channels", images="in_channels", gaussian=False, noisy=False),
    "ConsistencyDecoderVAE": dict(
        levels="encoder_block_out_channels", images="encoder_in_channels", gaussian=True, noisy=True
    ),
    # its latents are those before quantisation, which is the first layer of the decoder, as in LDM
    "VQModel": dict(levels="block_out_channels", images="in_channels", gaussian=False, noisy=False),
}
# settings of scale and mean, which do not change moments
_NORMALISATION = {"scaling_factor", "shift_factor", "latents_mean", "latents_std"}


class AutoencoderTokenizer(Tokenizer):
    """One of AUTOENCODERS, frozen, in float32 and eval mode."""

    def __init__(self, kind: str, autoencoder: torch.nn.Module, *, scale=1.0, mean=0.0):
        config = dict(autoencoder.config)
        row = AUTOENCODERS[type(autoencoder).__name__]
        super().__init__(
            kind,
            stride=2 ** (len(config[row["levels"]]) - 1),
            channels=config.get("vq_embed_dim") or config["latent_channels"],
            image_channels=config[row["images"]],
            gaussian=row["gaussian"],
            scale=scale,
            mean=mean,
        )
        self.settings = {k: v for k, v in config.items() if not k.startswith("_") and k not in _NORMALISATION}
        self.noisy = row["noisy"]
        self.autoencoder = autoencoder.float().requires_grad_(False)
        self.eval()

    def _moments(self, images):
        (encoded,) = self.autoencoder.encode(images.float(), return_dict=False)  # a posterior or latents
        return encoded.parameters if self.gaussian else encoded

    def _images(self, raw):
        options = {}
        if self.noisy:  # the same draw for each image: decoding is a function of the latents
            options["generator"] = [torch.Generator().manual_seed(0) for _ in raw]
        return self.autoencoder.decode(raw, return_dict=False, **options)[0]


def load_diffusers(place: str, *, vae_path=None, vae_scale=None, vae_mean=None) -> AutoencoderTokenizer:
    """The autoencoder that diffusers saved in the folder `place`, or that has this name (OWNER/NAME) on the hub.

    vae_path replaces place. Scale and mean are those of its config unless they are given. A missing or damaged
    autoencoder, and one of a class that is not in AUTOENCODERS, raises ValueError.
    """
    import diffusers

    place = str(Path(vae_path or place).expanduser())
    if not Path(place).is_dir() and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", place):
        raise ValueError(f"no folder {place} with a diffusers autoencoder, nor a name like OWNER/NAME on the hub")
    name = str(_attempt(place, diffusers.AutoencoderKL.load_config).get("_class_name"))
    if name not in AUTOENCODERS:
        raise ValueError(f"{place} holds no autoencoder but a {name}; valid: {', '.join(AUTOENCODERS)}")
    load = getattr(diffusers, name).from_pretrained
    autoencoder, info = _attempt(place, load, output_loading_info=True, low_cpu_mem_usage=False)
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if wrong:  # diffusers leaves missing tensors at random values
        raise ValueError(f"the weights in {place} do not fit its config: {len(wrong)} tensors, the first is {wrong[0]}")
    config = autoencoder.config
    scale = config.get("scaling_factor") if vae_scale is None else vae_scale
    mean = config.get("shift_factor") if vae_mean is None else vae_mean
    return AutoencoderTokenizer(
        name, autoencoder, scale=1.0 if scale is None else scale, mean=0.0 if mean is None else mean
    )


def _attempt(place: str, load, **options):
    """load(place, **options), whose errors become one ValueError."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # else it prints several lines about what then becomes a ValueError
    try:
        return load(place, **options)
    except Exception as error:  # diffusers, safetensors, json and the hub raise many types
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        source = place if Path(place).is_dir() else f"{place} (no such folder here, so it was looked for on the hub)"
        raise ValueError(f"cannot load an autoencoder from {source}: {reason}") from None
    finally:
        logging.set_verbosity(before)
