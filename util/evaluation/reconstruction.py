"""How well a tokenizer gives back what it was given: rFID, PSNR and SSIM of decode(encode(image)).

Shapes: B images, C channels, H x W pixels; figures are of uint8 images, 0..255, as they would be saved.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from util.dist import autocast
from util.evaluation.features import build_extractor
from util.evaluation.fid_stats import FIDStats, Moments
from util.evaluation.metrics import frechet_distance

PSNR_MAX = 100.0  # dB of an image without any error, whose PSNR is infinite


def psnr(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio (B,) in dB of images (B, C, H, W) with values 0..255, at most PSNR_MAX."""
    mse = (x.double() - y.double()).square().mean(dim=(1, 2, 3))
    return (10 * torch.log10(255**2 / mse)).clamp(max=PSNR_MAX)


def ssim(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Structural similarity (B,) in [-1, 1] of images (B, C, H, W) with values 0..255: mean over channels and places.

    Wang et al. 2004, Eq. 13 with their constants: a Gaussian window of 11 pixels, std 1.5 (the largest odd size that
    fits, for images smaller than that), at all places where it fits whole.
    """
    size = min(11, *(side - 1 + side % 2 for side in x.shape[2:]))
    window = torch.exp(-((torch.arange(size, device=x.device).double() - size // 2) ** 2) / (2 * 1.5**2))
    window = (window / window.sum())[None, None, None]  # (1, 1, 1, size): the two-dimensional one is a product

    def blur(image):
        image = F.conv2d(F.conv2d(image.flatten(0, 1)[:, None], window), window.mT)
        return image[:, 0].unflatten(0, x.shape[:2])  # (B, C, H', W')

    x, y = x.double(), y.double()
    mu_x, mu_y = blur(x), blur(y)
    var_x, var_y, cov = blur(x * x) - mu_x**2, blur(y * y) - mu_y**2, blur(x * y) - mu_x * mu_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mu_x * mu_y + c1) * (2 * cov + c2) / ((mu_x**2 + mu_y**2 + c1) * (var_x + var_y + c2))
    return similarity.mean(dim=(1, 2, 3))


@torch.no_grad()
def score_reconstructions(
    tokenizer,
    images,
    *,
    features="inception",
    weights=None,
    stats: FIDStats | None = None,
    batch_size=64,
    num_workers=0,
    device="cpu",
    dtype=torch.float32,
    verbose=False,
) -> dict[str, float]:
    """{rfid, psnr, ssim} of a tokenizer on a Dataset of (uint8 (C, H, W), ...), n >= 2 images, in one pass.

    rfid is against the same images, or against stats where they are given. Latents are the means of their
    distributions (sample=False). weights: as in `features.check_features`. features None: no rfid. Unsuitable
    images, features, weights and statistics raise ValueError.
    """
    device, extractor = torch.device(device), None
    if features is not None:
        extractor = build_extractor(features, weights, device=device)[0]
        if stats is not None:
            stats.check(features)
    place = device if device.type == "cuda" else torch.device("cpu")  # MPS has no float64
    made, real, quality = Moments(), Moments(), []
    with torch.random.fork_rng(devices=[]):
        loader = iter(DataLoader(images, batch_size=batch_size, num_workers=num_workers))
    with tqdm(total=len(images), unit="image", desc="reconstructing", disable=not verbose, leave=False) as progress:
        for batch, *_ in loader:
            batch = batch.to(device)
            with autocast(device, dtype):
                found = tokenizer.decode(tokenizer.encode(batch.float() / 127.5 - 1, sample=False))
            found = ((found.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
            if found.shape != batch.shape:
                shapes = f"{tuple(found.shape[1:])} from {tuple(batch.shape[1:])}"
                raise ValueError(f"the tokenizer makes images of another shape: {shapes}")
            found, batch = found.to(place), batch.to(place)
            quality.append(torch.stack([psnr(found, batch), ssim(found, batch)]).cpu())
            if extractor is not None:
                made.update(extractor(found.expand(-1, 3, -1, -1))[0].cpu())
                if stats is None:
                    real.update(extractor(batch.expand(-1, 3, -1, -1))[0].cpu())
            progress.update(len(batch))
    result = {}
    if extractor is not None:
        reference = real.result() if stats is None else (stats.mu, stats.sigma)
        result["rfid"] = frechet_distance(*made.result(), *reference)
    averages = np.asarray(torch.cat(quality, dim=1).mean(dim=1))
    return result | dict(zip(("psnr", "ssim"), averages.tolist()))
