"""Statistics of a set of images, mean and covariance of their features, and the .npz files that hold them.

A file has `mu` (d,) and `sigma` (d, d), as ADM's reference batches do, and if it is ours `num_images`, `features`,
`img_size` and `split` as well. Files are read without pickle.
"""

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from util.checkpoint import atomic_file
from util.evaluation.features import FEATURES, RGBImages, feature_batches
from util.foreign import reason_of
from util.sizes import Size


class Moments:
    """Mean and unbiased covariance of rows that arrive in batches, in float64."""

    def __init__(self):
        self.num, self.shift, self.total, self.products = 0, 0.0, 0.0, 0.0

    def update(self, x: torch.Tensor) -> None:
        """Add the rows of x (b, d)."""
        x = x.double()
        if not self.num:
            self.shift = x.mean(dim=0)  # sums of squares about a near mean lose no digits when the mean is subtracted
        x = x - self.shift
        self.num, self.total, self.products = self.num + len(x), self.total + x.sum(dim=0), self.products + x.T @ x

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """(mean (d,), covariance (d, d)), float64; fewer than two rows raise ValueError."""
        if self.num < 2:
            raise ValueError(f"statistics need at least 2 images, got {self.num}")
        mean = self.total / self.num
        covariance = (self.products - self.num * mean[:, None] * mean) / (self.num - 1)
        return (mean + self.shift).numpy(), covariance.numpy()


@dataclass(frozen=True, eq=False)
class FIDStats:
    """Mean (d,) and covariance (d, d) of features; the other fields are None where the file lacks them."""

    mu: np.ndarray
    sigma: np.ndarray
    num_images: int | None = None
    features: str | None = None
    img_size: Size | None = None
    split: str | None = None
    source: str = "the statistics"  # for messages

    def check(self, features: str, img_size: Size | None = None) -> None:
        """Raise ValueError unless images of this size can be compared with these statistics by these features."""
        if self.features not in (None, features):
            raise ValueError(f"{self.source} holds statistics of {self.features} features, not of {features}")
        if len(self.mu) != (dim := FEATURES[features].dim):
            raise ValueError(f"{self.source} holds statistics of {len(self.mu)} features, {features} has {dim}")
        if img_size is not None and self.img_size not in (None, img_size):
            raise ValueError(f"{self.source} is of images of {self.img_size} pixels, those here have {img_size}")

    def hash(self) -> str:
        """16 hex digits that change with the numbers."""
        digest = hashlib.blake2b(digest_size=8)
        for array in (self.mu, self.sigma):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def compute_fid_stats(images, features="inception", *, weights=None, batch_size=64, device="cpu", verbose=False):
    """FIDStats of images: uint8 (n, H, W, C) or a Dataset of uint8 (C, H, W), n >= 2. One batch is held at a time.

    weights: as in `check_features`. Unsuitable images, features and weights raise ValueError.
    """
    images, moments = RGBImages(images, "reference"), Moments()
    if len(images) < 2:
        raise ValueError(f"statistics need at least 2 images, got {len(images)}")
    options = dict(batch_size=batch_size, device=device, verbose=verbose)
    for (batch,) in feature_batches(images, features, weights, **options):
        moments.update(batch)
    mu, sigma = moments.result()
    return FIDStats(mu, sigma, num_images=len(images), features=features)


def has_arrays(path: Path, names) -> bool:
    """Is it an .npz with arrays of these names?"""
    try:
        with np.load(path, allow_pickle=False) as file:
            return set(names) <= set(file.files)
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile):
        return False


def save_fid_stats(path: str | Path, stats: FIDStats) -> None:
    """Write the .npz atomically; what is None is left out."""
    names = ("mu", "sigma", "num_images", "features", "img_size", "split")
    arrays = {name: np.asarray(getattr(stats, name)) for name in names if getattr(stats, name) is not None}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def _is_covariance(sigma: np.ndarray) -> bool:
    """Is (d, d) symmetric and without negative eigenvalues, but for what float32 rounds?"""
    rounding = 1e-5 * max(np.abs(sigma).max(initial=0.0), 1e-30)
    if not np.allclose(sigma, sigma.T, rtol=0.0, atol=rounding):
        return False
    try:
        np.linalg.cholesky(sigma + rounding * np.eye(len(sigma)))
    except np.linalg.LinAlgError:
        return False
    return True


def load_fid_stats(path: str | Path) -> FIDStats:
    """Read the .npz. A missing or damaged file, Python objects in it, and other shapes or numbers raise ValueError."""
    if not Path(path).is_file():
        raise ValueError(f"no statistics at {path}: --fid_stats takes an .npz with mu and sigma")
    try:
        with np.load(path, allow_pickle=False) as file:
            mu, sigma = (np.asarray(file[name]) for name in ("mu", "sigma"))
            known = [name for name in ("num_images", "features", "img_size", "split") if name in file]
            origin = {name: file[name].item() for name in known}
    except Exception as error:  # numpy, zipfile and zlib raise many types
        wanted = "an .npz of plain arrays mu and sigma, as scripts/make_fid_stats.py writes it"
        raise ValueError(f"{path} refused: not {wanted} ({reason_of(error)})") from None
    if not all(a.dtype.kind == "f" and np.isfinite(a).all() for a in (mu, sigma)):
        raise ValueError(f"{path} refused: mu and sigma must be finite floating-point numbers")
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise ValueError(f"{path} refused: mu must be (d,) and sigma (d, d), got {mu.shape} and {sigma.shape}")
    if not _is_covariance(sigma.astype(np.float64)):
        raise ValueError(f"{path} refused: sigma is no covariance, which is symmetric and has no negative eigenvalues")
    return FIDStats(mu.astype(np.float64), sigma.astype(np.float64), **origin, source=str(path))
