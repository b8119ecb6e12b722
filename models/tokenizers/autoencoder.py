"""Autoencoders of the diffusers library as tokenizers."""

import torch

from models.tokenizers.continuous import Tokenizer, per_channel

# class in diffusers -> levels: its setting with one entry a level (each level but the first halves the image); images:
# its setting with the image's channels; gaussian: does an image have a posterior? noisy: does decoding draw noise?
# codebook: its setting with the number of entries
AUTOENCODERS = {
    "AutoencoderKL": dict(levels="block_out_channels", images="in_channels", gaussian=True, noisy=False),
    "AutoencoderTiny": dict(levels="encoder_block_out_channels", images="in_channels", gaussian=False, noisy=False),
    "AutoencoderDC": dict(levels="encoder_block_out_channels", images="in_channels", gaussian=False, noisy=False),
    "ConsistencyDecoderVAE": dict(
        levels="encoder_block_out_channels", images="encoder_in_channels", gaussian=True, noisy=True
    ),
    # its latents are those before quantisation, which is the first layer of the decoder, as in LDM
    "VQModel": dict(
        levels="block_out_channels", images="in_channels", gaussian=False, noisy=False, codebook="num_vq_embeddings"
    ),
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
        if "codebook" in row:
            self.tokens, self.codebook_size = ("continuous", "discrete"), config[row["codebook"]]
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

    def _ids(self, images):
        raw = self._moments(images).float()
        # image by image: the distances to all entries are (h·w, codebook_size)
        ids = [self.autoencoder.quantize(latents[None])[2][2] for latents in raw]
        return torch.stack(ids).reshape(len(raw), *raw.shape[2:])

    def codes(self):
        return self.autoencoder.quantize.embedding.weight

    def _images_of_codes(self, vectors):
        entries = vectors.movedim(-1, 1)
        spatial = entries if self.autoencoder.config["norm_type"] == "spatial" else None
        return self.autoencoder.decoder(self.autoencoder.post_quant_conv(entries), spatial)


def normalisation(place, config: dict, vae_scale=None, vae_mean=None) -> dict:
    """Scale and mean of an autoencoder's latents: those given, else what its config says. ValueError names `place`.

    As diffusers' pipelines have it (StableDiffusionXLPipeline, LTXPipeline): with latents_mean and latents_std, each a
    number a channel, raw = latent·latents_std/scaling_factor + latents_mean, hence the scale scaling_factor/latents_std
    and the mean latents_mean; unless both are there raw = latent/scaling_factor + shift_factor.
    """
    factor, shift = config.get("scaling_factor"), config.get("shift_factor")
    scale, mean = 1.0 if factor is None else factor, 0.0 if shift is None else shift
    means, stds = config.get("latents_mean"), config.get("latents_std")
    if None not in (means, stds) and None in (vae_scale, vae_mean):
        channels = config.get("vq_embed_dim") or config["latent_channels"]
        mean = per_channel(f"latents_mean of {place}", means, channels)
        stds = per_channel(f"latents_std of {place}", stds, channels)
        if min(stds := stds if isinstance(stds, tuple) else (stds,)) <= 0:
            raise ValueError(f"latents_std of {place} must be above 0, got {min(stds)}")
        scale = tuple(scale / std for std in stds)
    return dict(scale=scale if vae_scale is None else vae_scale, mean=mean if vae_mean is None else vae_mean)
