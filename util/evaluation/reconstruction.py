"""What a tokenizer loses: rFID, PSNR and SSIM of decode(encode(image)); how much of its codebook it uses.

Shapes: B images, C channels, H x W pixels; figures are of uint8 images, 0..255, as they would be saved.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from util import dist
from util.evaluation.features import build_extractor
from util.evaluation.fid_stats import FIDStats, Moments
from util.evaluation.metrics import frechet_distance

LOW_USAGE = 0.5  # share of the entries; of as many tokens as entries, all equally likely, 0.63 are used
PSNR_MAX = 100.0  # dB of an image without any error, whose PSNR is infinite


def psnr(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio (B,) in dB of images (B, C, H, W) with values 0..255, at most PSNR_MAX."""
    mse = (x.double() - y.double()).square().mean(dim=(1, 2, 3))
    return (10 * torch.log10(255**2 / mse)).clamp(max=PSNR_MAX)


def ssim(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Structural similarity (B,) in [-1, 1] of images (B, C, H, W), values 0..255: mean over channels and positions.

    Wang et al. 2004, Eq. 13 with their constants: a Gaussian window of 11 pixels, std 1.5, at all positions inside the
    image. In a smaller image the window has the largest odd size that fits.
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


@dataclass(frozen=True)
class ReconstructionFID:
    """What an rFID is computed from: features, and the statistics to compare with.

    weights: as in `features.check_features`. stats None: those of the images that are reconstructed.
    """

    features: str = "inception"
    weights: str | None = None
    stats: FIDStats | None = None

    def build_features(self, device):
        """A function uint8 (B, 3, H, W) -> (B, d); unsuitable features, weights and statistics raise ValueError."""
        extractor, _ = build_extractor(self.features, self.weights, device=device)
        if self.stats is not None:
            self.stats.check(self.features)
        return lambda images: extractor(images)[0]


@torch.no_grad()
def score_reconstructions(
    tokenizer,
    images,
    fid: ReconstructionFID | None,
    *,
    batch_size=64,
    num_workers=0,
    device="cpu",
    dtype=torch.float32,
    verbose=False,
) -> dict[str, float]:
    """{rfid, psnr, ssim} of a tokenizer on a Dataset of (uint8 (C, H, W), ...), n >= 2 images, in one pass.

    Of one with a codebook the images are decoded from ids, and {usage, perplexity} of these are measured too, see
    `codebook_scores`; of a multi-scale one also of each scale, under {usage_P, perplexity_P} with its side P. fid None:
    no rfid. Latents are the means of their distributions (sample=False). dtype: arithmetic of the tokenizer. Images
    that the features cannot take, and what `ReconstructionFID.build_features` refuses, raise ValueError.
    """
    device = torch.device(device)
    features = None if fid is None else fid.build_features(device)
    accurate = device if device.type == "cuda" else torch.device("cpu")  # MPS has no float64
    decoded_moments, real_moments, quality = Moments(), Moments(), []
    scales, entries = getattr(tokenizer, "scales", ()), getattr(tokenizer, "codebook_size", 0)
    counts = torch.zeros(max(len(scales), 1), entries, dtype=torch.long)
    with torch.random.fork_rng(devices=[]):
        loader = DataLoader(images, batch_size=batch_size, num_workers=dist.num_loading(num_workers))
        loader = iter(loader)  # draws a random number
    with tqdm(total=len(images), unit="image", desc="reconstructing", disable=not verbose, leave=False) as progress:
        for batch, *_ in loader:
            batch = batch.to(device)
            decoded, ids = _reconstruct(tokenizer, batch, dtype, discrete=entries > 0)
            decoded = decoded.to(accurate)
            if ids is not None:
                of_scales = ids.split([p * p for p in scales], dim=1) if scales else [ids]
                counts += torch.stack([part.flatten().bincount(minlength=entries) for part in of_scales]).cpu()
            batch = batch.to(accurate)
            quality.append(torch.stack([psnr(decoded, batch), ssim(decoded, batch)]).cpu())
            if fid is not None:
                decoded_moments.update(features(decoded.expand(-1, 3, -1, -1)).cpu())
                if fid.stats is None:
                    real_moments.update(features(batch.expand(-1, 3, -1, -1)).cpu())
            progress.update(len(batch))
    scores = {}
    if fid is not None:
        reference = real_moments.result() if fid.stats is None else (fid.stats.mu, fid.stats.sigma)
        scores["rfid"] = frechet_distance(*decoded_moments.result(), *reference)
    scores["psnr"], scores["ssim"] = torch.cat(quality, dim=1).mean(dim=1).tolist()
    if entries:
        scores |= codebook_scores(counts.sum(dim=0))
    for p, of_scale in zip(scales, counts):
        scores |= {f"{name}_{p}": value for name, value in codebook_scores(of_scale).items()}
    return scores


def codebook_scores(counts: torch.Tensor) -> dict[str, float]:
    """{usage, perplexity} of how often each entry was chosen, (V,): the share of those that were, and e to the entropy.

    The perplexity is the number of entries that, chosen equally often, would say as much: V at most.
    """
    p = counts.double() / counts.sum()
    return {"usage": (counts > 0).double().mean().item(), "perplexity": torch.special.entr(p).sum().exp().item()}


def scales_lines(metrics: dict) -> list[str]:
    """A line for people of the {usage_P, perplexity_P} of each scale, in order; none without scales."""
    sides = [key.removeprefix("usage_") for key in metrics if key.startswith("usage_")]
    return [
        f"scale {p}×{p}: codebook used {metrics[f'usage_{p}']:.1%}, perplexity {metrics[f'perplexity_{p}']:.1f}"
        for p in sides
    ]


def warn_of_usage(usage: float, num_tokens: int, codebook_size: int) -> None:
    """Print a line if so many tokens use a small share of the entries, as far as they can tell."""
    if usage < LOW_USAGE * min(1.0, num_tokens / codebook_size):
        share = f"{num_tokens} tokens use {usage:.1%} of {codebook_size} entries"
        print(f"warning: {share}: lower --codebook_size, or train longer")


def _reconstruct(tokenizer, images: torch.Tensor, dtype, discrete: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(uint8 images (B, C, H, W) made of the tokens of such images, the ids (B, …) where it has a codebook).

    A tokenizer that makes images of another shape raises ValueError.
    """
    pixels, ids = images.float() / 127.5 - 1, None
    with dist.autocast(images.device, dtype):
        if discrete:
            ids = tokenizer.encode_ids(pixels)
            decoded = tokenizer.decode_ids(ids)
        else:
            decoded = tokenizer.decode(tokenizer.encode(pixels, sample=False))
    if decoded.shape != images.shape:
        shapes = f"{tuple(decoded.shape[1:])} from {tuple(images.shape[1:])}"
        raise ValueError(f"the tokenizer makes images of another shape: {shapes}")
    return ((decoded.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8), ids
