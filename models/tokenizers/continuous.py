"""What all tokenizers share: normalisation, sampling from a posterior, and the moments that a cache stores.

Legend: B images, (H, W) pixels, c channels of a latent, (h, w) = (H, W) / stride.
"""

import json
import math
from functools import cached_property

import torch
from torch import nn

from util.checkpoint import weights_hash
from util.sizes import Size, sides


class Tokenizer(nn.Module):
    """Images in [−1, 1] to normalised latents, (raw − mean)·scale, and back. Sub-classes have `_moments` and `_images`.

    kind: "pixel", a name of LDM's, or the autoencoder's class. gaussian: do images have a posterior, so that their
    moments are its mean and log-variance (2c channels)? Else they are the raw latents (c channels). scale and mean: a
    number, or one for each channel. A sub-class may set `clip`, (lo, hi) for a predicted x₀ in normalised units, and
    `settings`, plain values which besides the weights decide its moments. tokens: what a model can take them as, see
    `models.families.Family`. Where these can be ids a sub-class sets codebook_size, the number of entries V, and
    has `_ids`, `_images_of_codes` and `codes()`, the entries (V, C) as the decoder reads them; where they are
    "multiscale", scales too, the sides p of the grids of tokens.
    """

    tokens: tuple[str, ...] = ("continuous",)
    codebook_size = 0
    scales: tuple[int, ...] = ()
    clip = None
    settings: dict = {}

    def __init__(self, kind: str, *, stride, channels, image_channels, gaussian=False, scale=1.0, mean=0.0):
        super().__init__()
        self.kind, self.stride, self.channels, self.image_channels = kind, stride, channels, image_channels
        self.gaussian = gaussian
        self.scale = per_channel("vae_scale", scale, channels)
        self.mean = per_channel("vae_mean", mean, channels)
        for name, value in (("_scale", self.scale), ("_mean", self.mean)):
            self.register_buffer(name, torch.tensor(value).reshape(-1, 1, 1), persistent=False)
        if not (self._scale > 0).all():
            raise ValueError(f"vae_scale must be above 0, got {scale}")

    @property
    def moment_channels(self) -> int:
        """Channels of the moments that `encode_moments` returns."""
        return 2 * self.channels if self.gaussian else self.channels

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of all that decides the moments: kind, settings and weights, not scale and mean."""
        text = json.dumps([self.kind, self.channels, self.settings], sort_keys=True, default=str)
        return weights_hash({**self.state_dict(), text: torch.zeros(0)})

    def describe(self) -> str:
        """All that decides the results of `encode` and `decode`, in one line."""
        return f"{self.kind} {self.fingerprint} scale {self.scale} mean {self.mean}"

    def encode(self, images: torch.Tensor, sample: bool = True, generator=None) -> torch.Tensor:
        """Images (B, image_channels, H, W) in [−1, 1] -> normalised latents (B, c, h, w); see `from_moments`."""
        return self.from_moments(self.encode_moments(images), sample, generator)

    @torch.no_grad()
    def encode_moments(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, image_channels, H, W) in [−1, 1] -> raw moments (B, moment_channels, h, w) float32.

        Other channels, or sides that are no multiples of stride, raise ValueError.
        """
        self._check_images(images)
        return self._moments(images).float()

    @torch.no_grad()
    def encode_ids(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, image_channels, H, W) in [−1, 1] -> ids (B, h, w) long, each from 0 to codebook_size − 1.

        Of a multi-scale tokenizer (B, L): each scale's after those of the scale before it, row by row. Images as in
        `encode_moments`; a tokenizer without a codebook raises ValueError.
        """
        self._check_codebook()
        self._check_images(images)
        return self._ids(images)

    @torch.no_grad()
    def decode_ids(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids (B, h, w) long -> images (B, image_channels, H, W) float32, about in [−1, 1]; (B, L) as in `encode_ids`.

        Ids that are no entries of the codebook, and a tokenizer without one, raise ValueError.
        """
        self._check_codebook()
        low, high = ids.min().item(), ids.max().item()
        if not 0 <= low <= high < self.codebook_size:
            wrong = low if low < 0 else high
            raise ValueError(f"ids for the tokenizer {self.kind} are 0 to {self.codebook_size - 1}, got {wrong}")
        return self.render_codes(self.codes()[ids])

    def render_codes(self, vectors: torch.Tensor) -> torch.Tensor:
        """As `decode_ids`, of vectors (B, h, w, C) or (B, L, C) in the place of entries; differentiable."""
        return self._images_of_codes(vectors).float()

    def _check_images(self, images: torch.Tensor) -> None:
        shape = tuple(images.shape)
        if len(shape) != 4 or shape[1] != self.image_channels or shape[2] % self.stride or shape[3] % self.stride:
            wanted = f"(B, {self.image_channels}, H, W), H and W divisible by {self.stride}"
            raise ValueError(f"images for the tokenizer {self.kind} must be {wanted}, got {shape}")

    @torch.no_grad()
    def inputs_of(self, tokens: torch.Tensor) -> torch.Tensor:
        """What a model reads of tokens (B, L, …) in training: these, unless they are of several scales."""
        return tokens

    def unknown_tokens(self, unknown: torch.Tensor) -> torch.Tensor:
        """Of the tokens (L,) bool those to make anew where unknown (h, w) bool, a cell for each of a grid, says so."""
        return unknown.flatten()

    def ids_shape(self, img_size: Size) -> tuple[int, ...]:
        """The shape of the ids of an image of this size."""
        return tuple(side // self.stride for side in sides(img_size))

    def _check_codebook(self) -> None:
        if not self.codebook_size:
            raise ValueError(f"the tokenizer {self.kind} has no codebook, its tokens are {' or '.join(self.tokens)}")

    def from_moments(self, moments: torch.Tensor, sample: bool = True, generator=None, noise=None) -> torch.Tensor:
        """Raw moments (B, moment_channels, h, w) -> normalised latents (B, c, h, w).

        sample: draw from the posterior of a gaussian tokenizer instead of taking its mean. generator: None, a
        torch.Generator, or a list of one for each image, which makes each image's draw independent of its batch. noise:
        such normal draws (B, c, h, w), made before.
        """
        if moments.dim() != 4 or moments.shape[1] != self.moment_channels:
            raise ValueError(f"moments must be (B, {self.moment_channels}, h, w), got {tuple(moments.shape)}")
        if isinstance(generator, list) and len(generator) != len(moments):
            raise ValueError(f"{len(generator)} generators do not fit {len(moments)} images")
        raw = moments.float()
        if self.gaussian:
            from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

            posterior = DiagonalGaussianDistribution(raw)
            if not sample:
                raw = posterior.mode()
            else:
                raw = posterior.sample(generator) if noise is None else posterior.mean + posterior.std * noise
        return (raw - self._mean) * self._scale

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Normalised latents (B, c, h, w) -> images (B, image_channels, H, W) float32, about in [−1, 1]."""
        return self.render(latents)

    def render(self, latents: torch.Tensor) -> torch.Tensor:
        """As `decode`, differentiable."""
        return self._images(latents.float() / self._scale + self._mean).float()


def per_channel(name: str, value, channels: int) -> float | tuple[float, ...]:
    """A number, or a tuple of one for each channel, from a number, a sequence, or text with commas; else ValueError."""
    parts = value.split(",") if isinstance(value, str) else [value] if isinstance(value, int | float) else value
    try:
        numbers = [float(part) for part in parts]
        valid = len(numbers) in (1, channels) and all(math.isfinite(number) for number in numbers)
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise ValueError(f"{name} must be a number or {channels} of them, one a channel, got {value!r}")
    return numbers[0] if len(numbers) == 1 else tuple(numbers)
