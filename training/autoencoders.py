"""Training an autoencoder: the network, its loss terms, its codebook, and latents moved to mean zero.

Shapes: B images of C channels, H x W pixels, values in [-1, 1]; latents (B, c, h, w) with (h, w) = (H, W) / stride.
"""

import math
from collections.abc import Callable
from contextlib import contextmanager
from itertools import islice
from typing import NamedTuple

import torch
from torch import nn

from models.tokenizers.multiscale_vq import MultiScaleVQ, MultiScaleVQConfig
from util.door import making_a_model

MULTIPLIERS = (1, 1, 2, 2, 4)  # channels of the levels over those of the first one, as in KL-16
CHANCES = 10  # latents an entry of a codebook, after which one that none has chosen is moved


def _kl_terms(autoencoder, images, generator, partial):
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    # .float(): posterior and divergence are computed in float32 under autocast too
    posterior = DiagonalGaussianDistribution(autoencoder.encode(images).latent_dist.parameters.float())
    decoded = autoencoder.decode(posterior.sample(generator)).sample
    return decoded, posterior.kl().sum() / images.numel()


def _vq_terms(autoencoder, images, generator, partial):
    decoded, commitment = autoencoder.decode(autoencoder.encode(images).latents.float(), return_dict=False)
    return decoded, commitment


def _multiscale_terms(autoencoder, images, generator, partial):
    num_scales = len(autoencoder.quantize.scales)
    last = torch.randint(num_scales, (len(images),), generator=generator)
    last[torch.rand(len(images), generator=generator) >= partial] = num_scales - 1
    return autoencoder(images, last.to(images.device))


class Kind(NamedTuple):
    """What training knows of a class of autoencoders."""

    # (autoencoder, images, generator of the draws, share of the images that scales are left out of, the last ones from
    # a random one on) -> (decoded images, penalty ())
    terms: Callable
    penalty: str  # its name. kl: the divergence in nats, divided by the number of values of an image; vq: codebook and
    # commitment loss
    # (inputs, output) of its quantiser -> [(latents (B, c, h, w), their ids) of each scale]; None without a codebook
    quantised: Callable | None = None


LOSSES = {
    "AutoencoderKL": Kind(_kl_terms, "kl"),
    "VQModel": Kind(_vq_terms, "vq", lambda inputs, output: [(inputs[0], output[2][2])]),
    "MultiScaleVQ": Kind(_multiscale_terms, "vq", lambda inputs, output: output[2]),
}


@making_a_model()
def make_autoencoder(
    class_name: str,
    *,
    stride: int,
    image_channels: int,
    img_size: int,
    latent_channels: int,
    width: int,
    codebook_size: int,
    scales: tuple[int, ...] = (),
) -> nn.Module:
    """An autoencoder of a class in LOSSES with new weights, from torch's global random state.

    stride: a power of 2 from 1 to 16. width: channels at full resolution, a multiple of 4. Those of diffusers have one
    residual block a level (two in the decoder), and no attention, which costs more than it brings in images this small.
    scales: of a MultiScaleVQ, which has the published blocks. Sizes that cannot be raise ValueError.
    """
    levels = int(math.log2(stride)) + 1
    groups = math.gcd(32, width // 4)
    if class_name == "MultiScaleVQ":
        config = MultiScaleVQConfig(
            vocab_size=codebook_size,
            z_channels=latent_channels,
            ch=width,
            v_patch_nums=scales,
            in_channels=image_channels,
            ch_mult=MULTIPLIERS[:levels],
            norm_groups=groups,
        )
        return MultiScaleVQ(config).train()

    import diffusers

    codebook = dict(num_vq_embeddings=codebook_size) if class_name == "VQModel" else {}
    autoencoder = getattr(diffusers, class_name)(
        in_channels=image_channels,
        out_channels=image_channels,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=[width * multiplier for multiplier in MULTIPLIERS[:levels]],
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=groups,
        sample_size=img_size,
        mid_block_add_attention=False,
        **codebook,
    )
    if class_name == "VQModel":
        autoencoder.quantize.legacy = False  # else the weight 0.25 is on the codebook's term, not on the commitment
    return autoencoder.train()


@torch.no_grad()
def start_codebook(autoencoder, images: torch.Tensor, generator: torch.Generator) -> None:
    """Set the codes to latents of images (B, C, H, W), drawn at random.

    Of S scales, code v is of what scale v mod S is to quantise, which the codes of the scales before it leave.
    """
    codes = autoencoder.quantize.embedding.weight
    if not isinstance(autoencoder, MultiScaleVQ):
        latents = autoencoder.encode(images).latents.movedim(1, -1).flatten(0, -2)  # (B·h·w, c)
        codes.copy_(latents[torch.randint(len(latents), (len(codes),), generator=generator)])
        return
    features, num_scales = autoencoder.encode_features(images), len(autoencoder.quantize.scales)
    codes.zero_()
    for s in range(num_scales):
        *_, (z, _, _) = islice(autoencoder.quantize.steps(features), s + 1)
        rows = z.movedim(1, -1).flatten(0, -2)  # (B·p², c)
        own = codes[s::num_scales]
        own.copy_(rows[torch.randint(len(rows), (len(own),), generator=generator).to(rows.device)])


@contextmanager
def watched(autoencoder):
    """A list that gets, of each quantisation inside the block, [(latents (N, c), ids (N,)) of each scale].

    Nothing of an autoencoder without a codebook.
    """
    seen, quantised = [], LOSSES[type(autoencoder).__name__].quantised
    if quantised is None:
        yield seen
        return

    def note(quantize, inputs, output):
        tokens = quantised(inputs, output)
        seen.append([(z.detach().movedim(1, -1).flatten(0, -2), ids.flatten()) for z, ids in tokens])

    handle = autoencoder.quantize.register_forward_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


@torch.no_grad()
def revive(autoencoder, idle: torch.Tensor, tokens: list, generator) -> None:
    """Move the entries that are dead to latents of this step, drawn at random.

    tokens: [(latents (N_s, c), ids (N_s,)) of each of S scales], S is 1 without scales. Entry v belongs to scale
    v mod S: it is dead when no scale has chosen it for as long as its own takes to give each of its V/S entries CHANCES
    latents, and moves to one of these. Thus the scales of few tokens keep as many entries as those of many.
    idle (V,) long on the host: steps since an entry was chosen or moved, changed in place.
    """
    codes = autoencoder.quantize.embedding.weight
    idle += 1
    for _, ids in tokens:
        idle[ids.cpu()] = 0
    for s, (latents, _) in enumerate(tokens):
        own = torch.arange(s, len(codes), len(tokens))
        patience = math.ceil(CHANCES * len(codes) / len(tokens) / len(latents))
        dead = own[idle[own] >= patience]
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
