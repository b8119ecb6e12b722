"""What training an autoencoder needs: the network, its loss terms, and latents moved to mean zero.

Shapes: B images of C channels, H x W pixels, values in [-1, 1]; latents (B, c, h, w) with (h, w) = (H, W) / stride.
"""

import math

import torch
from torch import nn

MULTIPLIERS = (1, 1, 2, 2, 4)  # channels of the levels over those of the first one, as in KL-16


def _kl_terms(autoencoder, images, generator):
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    # outside of autocast's low precision
    posterior = DiagonalGaussianDistribution(autoencoder.encode(images).latent_dist.parameters.float())
    found = autoencoder.decode(posterior.sample(generator)).sample
    return found, posterior.kl().sum() / images.numel()


def _vq_terms(autoencoder, images, generator):
    found, commitment = autoencoder.decode(autoencoder.encode(images).latents.float(), return_dict=False)
    return found, commitment


# class in diffusers -> (autoencoder, images, generator of a posterior's draws) -> (images found, penalty ()), and the
# penalty's name: kl, the divergence (nats) for each value of an image, or vq, codebook and commitment loss
KINDS = {"AutoencoderKL": (_kl_terms, "kl"), "VQModel": (_vq_terms, "vq")}


def make_autoencoder(
    kind: str, *, stride: int, image_channels: int, img_size: int, latent_channels: int, width: int, codebook_size: int
) -> nn.Module:
    """A diffusers autoencoder of KINDS with new weights, from torch's global random state.

    stride: a power of 2 from 2 to 16. width: channels at full resolution, a multiple of 4. One residual block a level
    (two in the decoder), and no attention, which costs more than it brings in images this small.
    """
    import diffusers

    levels = int(math.log2(stride)) + 1
    more = dict(num_vq_embeddings=codebook_size) if kind == "VQModel" else {}
    autoencoder = getattr(diffusers, kind)(
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
        **more,
    )
    if kind == "VQModel":
        autoencoder.quantize.legacy = False  # else its commitment weight, 0.25, is on the codebook's term
    return autoencoder.train()


@torch.no_grad()
def start_codebook(autoencoder, images: torch.Tensor, generator: torch.Generator) -> None:
    """Start the codes of a VQModel at latents of images (B, C, H, W), drawn at random."""
    latents = autoencoder.encode(images).latents.movedim(1, -1).flatten(0, -2)  # (B·h·w, c)
    codes = autoencoder.quantize.embedding.weight
    codes.copy_(latents[torch.randint(len(latents), (len(codes),), generator=generator)])


@torch.no_grad()
def centre_latents(autoencoder, mean: torch.Tensor) -> None:
    """Subtract mean (c,) from the latents inside the network, whose decoder adds it: images stay what they were.

    For what diffusers' config cannot say: its shift_factor is one number, and VQModel has none.
    """
    into, out = autoencoder.quant_conv, autoencoder.post_quant_conv
    into.bias[: len(mean)] -= mean  # what follows in AutoencoderKL are log-variances
    out.bias += out.weight[:, :, 0, 0] @ mean
    if hasattr(autoencoder, "quantize"):
        autoencoder.quantize.embedding.weight -= mean
