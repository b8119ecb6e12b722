"""Mean and variance of a tokenizer's latents on images: what --vae_scale and --vae_mean should undo."""

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from util.rng import generator, seed_of


@torch.no_grad()
def measure_latents(
    tokenizer, images, *, num_images: int, seed=0, batch_size=64, num_workers=0, device="cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of each channel of the latents, (c,) float64 each, over images and positions.

    images: a Dataset of (uint8 (C, H, W), label, index), of which num_images (all where there are fewer) are drawn at
    random. Posteriors are sampled, as they are in training.
    """
    order = np.random.default_rng(seed).permutation(len(images))[:num_images].tolist()
    loader = DataLoader(Subset(images, order), batch_size=batch_size, num_workers=num_workers)
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
