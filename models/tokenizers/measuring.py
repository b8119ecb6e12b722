"""Measuring a tokenizer on images: mean and variance of its latents, from which --vae_scale and --vae_mean follow."""

from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from models.tokenizers import NAMES, Tokenizer, tokenizer_of
from models.tokenizers.ldm import PLACES
from util import dist
from util.args import flag
from util.images.datasets import ImagesArgs
from util.rng import generator, seed_of


@dataclass(frozen=True)
class MeasuringArgs(ImagesArgs):
    """Flags of the scripts that measure a tokenizer on the images of a data set."""

    tokenizer: str = flag(
        "kl16",
        NAMES,
    )
    vae_path: str | None = flag(None, "weights of the autoencoder (default: download_weights.py's place for them)")
    num_workers: int = flag(0, **dist.WORKERS)

    @property
    def weights_path(self) -> str | None:
        """Path of the autoencoder's weights; None for a tokenizer whose name contains it or that needs no weights."""
        return self.vae_path or PLACES.get(self.tokenizer)

    def build(self, image_channels: int, **normalisation) -> Tokenizer:
        """The tokenizer for such images; normalisation: vae_scale, vae_mean. Errors as in `tokenizer_of`."""
        return tokenizer_of(dict(tokenizer=self.tokenizer, vae_path=self.weights_path, **normalisation), image_channels)


@torch.no_grad()
def measure_latents(
    tokenizer, images, *, num_images: int, seed=0, batch_size=64, num_workers=0, device="cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of each channel of the latents, (c,) float64 each, over images and positions.

    images: a Dataset of (uint8 (C, H, W), label, index), of which num_images (all of a smaller data set) are drawn at
    random. Posteriors are sampled, as they are in training.
    """
    order = np.random.default_rng(seed).permutation(len(images))[:num_images].tolist()
    loader = DataLoader(Subset(images, order), batch_size=batch_size, num_workers=dist.num_loading(num_workers))
    count, total, squares = 0, 0.0, 0.0
    with tqdm(total=len(order), unit="image", desc="measuring") as progress:
        for batch, _, indices in loader:
            noise = [generator(seed_of("posterior", seed, 0, i)) for i in indices.tolist()]
            latents = tokenizer.encode(batch.to(device).float() / 127.5 - 1, generator=noise)
            values = latents.cpu().double().transpose(0, 1).flatten(1)  # (c, B·h·w)
            count += values.shape[1]
            total = total + values.sum(dim=1)
            squares = squares + values.square().sum(dim=1)
            progress.update(len(batch))
    mean = total / count
    return mean.numpy(), (squares / count - mean.square()).clamp(min=0).numpy()
