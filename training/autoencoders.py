"""Training an autoencoder: the network, its loss terms, and latents moved to mean zero.

Shapes: B images of C channels, H x W pixels, values in [-1, 1]; latents (B, c, h, w) with (h, w) = (H, W) / stride.
"""

import math
from contextlib import contextmanager

import torch
from torch import nn

MULTIPLIERS = (1, 1, 2, 2, 4)  # channels of the levels over those of the first one, as in KL-16
CHANCES = 10  # latents an entry of a codebook, after which one that none has chosen is moved


def _kl_terms(autoencoder, images, generator):
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    # .float(): posterior and divergence are computed in float32 under autocast too
    posterior = DiagonalGaussianDistribution(autoencoder.encode(images).latent_dist.parameters.float())
    decoded = autoencoder.decode(posterior.sample(generator)).sample
    return decoded, posterior.kl().sum() / images.numel()


def _vq_terms(autoencoder, images, generator):
    decoded, commitment = autoencoder.decode(autoencoder.encode(images).latents.float(), return_dict=False)
    return decoded, commitment


# class in diffusers -> (function for its loss terms, name of the penalty). The function takes (autoencoder, images,
# generator of the posterior's draws) and returns (decoded images, penalty ()). kl: the divergence in nats, divided by
# the number of values of an image; vq: codebook and commitment loss
LOSSES = {"AutoencoderKL": (_kl_terms, "kl"), "VQModel": (_vq_terms, "vq")}


def make_autoencoder(
    class_name: str,
    *,
    stride: int,
    image_channels: int,
    img_size: int,
    latent_channels: int,
    width: int,
    codebook_size: int,
) -> nn.Module:
    """A diffusers autoencoder of a class in LOSSES with new weights, from torch's global random state.

    stride: a power of 2 from 2 to 16. width: channels at full resolution, a multiple of 4. One residual block a level
    (two in the decoder), and no attention, which costs more than it brings in images this small.
    """
    import diffusers

    levels = int(math.log2(stride)) + 1
    codebook = dict(num_vq_embeddings=codebook_size) if class_name == "VQModel" else {}
    autoencoder = getattr(diffusers, class_name)(
        in_channels=image_channels,
        out_channels=image_channels,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=[width * multiplier for multiplier in MULTIPLIERS[:levels]],
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=math.gcd(32, width // 4),
        sample_size=img_size,
        mid_block_add_attention=False,
        **codebook,
    )
    if class_name == "VQModel":
        autoencoder.quantize.legacy = False  # else the weight 0.25 is on the codebook's term, not on the commitment
    return autoencoder.train()


@torch.no_grad()
def start_codebook(autoencoder, images: torch.Tensor, generator: torch.Generator) -> None:
    """Set the codes of a VQModel to latents of images (B, C, H, W), drawn at random."""
    latents = autoencoder.encode(images).latents.movedim(1, -1).flatten(0, -2)  # (B·h·w, c)
    codes = autoencoder.quantize.embedding.weight
    codes.copy_(latents[torch.randint(len(latents), (len(codes),), generator=generator)])


@contextmanager
def watched(autoencoder):
    """A list that gets (latents (N, c), ids (N,)) of each quantisation inside the block; none of an AutoencoderKL."""
    seen = []
    if not hasattr(autoencoder, "quantize"):
        yield seen
        return

    def note(quantize, inputs, output):
        seen.append((inputs[0].detach().movedim(1, -1).flatten(0, -2), output[2][2].flatten()))

    handle = autoencoder.quantize.register_forward_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


@torch.no_grad()
def revive(autoencoder, idle: torch.Tensor, latents: torch.Tensor, ids: torch.Tensor, generator) -> None:
    """Move the entries that are dead to latents (N, c) of this step, drawn at random; its ids are (N,).

    idle (V,) long on the host: steps since an entry was chosen or moved, changed in place.
    """
    codes = autoencoder.quantize.embedding.weight
    idle += 1
    idle[ids.cpu()] = 0
    dead = (idle >= math.ceil(CHANCES * len(codes) / len(latents))).nonzero().squeeze(1)
    drawn = torch.randint(len(latents), (len(dead),), generator=generator)
    codes[dead.to(codes.device)] = latents[drawn.to(latents.device)].to(codes.dtype)
    idle[dead] = 0


@torch.no_grad()
def centre_latents(autoencoder, mean: torch.Tensor) -> None:
    """Let the encoder subtract mean (c,) from the latents and the decoder add it: decoded images stay the same.

    diffusers' config cannot do this: its shift_factor is one number for all channels, and VQModel has none.
    """
    last, first = autoencoder.quant_conv, autoencoder.post_quant_conv  # of the encoder, of the decoder
    last.bias[: len(mean)] -= mean  # AutoencoderKL's other half are log-variances
    first.bias += first.weight[:, :, 0, 0] @ mean
    if hasattr(autoencoder, "quantize"):
        autoencoder.quantize.embedding.weight -= mean
