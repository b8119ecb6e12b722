"""The reward distance: Fréchet distances to real images in two or more kinds of features (docs/heads.md).

Kinds are the rows of FEATURES and `pixels`. What is optimised by them is judged by others.
Shapes: n images, H x W pixels, C channels (1 or 3), d features, p of them kept.
"""

import weakref

import numpy as np
import torch

from util.evaluation.features import FEATURES, RGBImages, check_features, feature_batches
from util.evaluation.metrics import frechet_distance, gaussian_statistics

KINDS = (*FEATURES, "pixels")
MOST_DIRECTIONS = 192
KEPT = weakref.WeakKeyDictionary()  # reference data set -> its `RewardDistance` in pixels


def reward_kinds(text: str) -> tuple[str, ...]:
    """The kinds in a comma list; fewer than two different ones, or one that is no row of KINDS, raise ValueError."""
    kinds = tuple(dict.fromkeys(text.split(",")))
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"unknown features {kind!r}; valid: {', '.join(KINDS)}")
    if len(kinds) < 2:
        raise ValueError(f"a reward needs features of at least two kinds, got {text!r}; valid: {', '.join(KINDS)}")
    return kinds


def reward_weights(text: str | None, kinds: tuple[str, ...]) -> dict[str, float]:
    """{kind: weight} of a comma list, 1 each for None; what is not one positive number a kind raises ValueError."""
    try:
        weights = [1.0] * len(kinds) if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        weights = []
    if len(weights) != len(kinds) or not all(0 < weight < np.inf for weight in weights):
        raise ValueError(
            f"--reward_weights must be {len(kinds)} numbers above 0, one for each of {','.join(kinds)}, got {text!r}"
        )
    return dict(zip(kinds, weights))


class RewardDistance:
    """{kind: Fréchet distance to the real images} of uint8 images (n, H, W, C), C that of the real ones.

    real: a data set whose items begin with uint8 (C, H, W). Of d > 192 features the 192 principal directions of the
    real ones are kept; directions {kind: (d, p)} stand in for them. What `build_extractor` refuses raises ValueError.
    """

    def __init__(self, real, kinds, device="cpu", directions=None):
        for kind in kinds:
            if kind in FEATURES:
                check_features(kind)
        self.device = device
        images = np.stack([np.moveaxis(real[i][0].numpy(), 0, -1) for i in range(len(real))])
        self.real = {}  # kind: (directions (d, p), mean (p,), covariance (p, p))
        for kind in kinds:
            rows = self.rows(images, kind)
            given = (directions or {}).get(kind)
            kept = principal_directions(rows) if given is None else np.asarray(given, dtype=np.float64)
            self.real[kind] = (kept, *gaussian_statistics(rows @ kept))

    def __call__(self, images: np.ndarray) -> dict[str, float]:
        distances = {}
        for kind, (directions, mean, covariance) in self.real.items():
            statistics = gaussian_statistics(self.rows(images, kind) @ directions)
            distances[kind] = frechet_distance(*statistics, mean, covariance)
        return distances

    def rows(self, images: np.ndarray, kind: str) -> np.ndarray:
        """Features (n, d) float64 of uint8 images (n, H, W, C); pixels are scaled to [−1, 1]."""
        if kind == "pixels":
            return images.reshape(len(images), -1) / 127.5 - 1
        batches = feature_batches(RGBImages(images, "reward"), kind, batch_size=256, device=self.device)
        return torch.cat([batch for (batch,) in batches]).double().numpy()


def pixel_distance(images, reference) -> float:
    """The distance in pixels of two data sets of uint8 (C, H, W), or of tuples that start with one.

    What is computed of the reference alone is kept as long as it.
    """
    if reference not in KEPT:
        KEPT[reference] = RewardDistance(reference, ("pixels",))
    made = [images[i] for i in range(len(images))]
    made = [image[0] if isinstance(image, tuple | list) else image for image in made]
    return KEPT[reference](np.stack([np.moveaxis(image.numpy(), 0, -1) for image in made]))["pixels"]


def principal_directions(rows: np.ndarray, most: int = MOST_DIRECTIONS) -> np.ndarray:
    """The directions (d, p) of largest variance of rows (n, d), p = min(d, most); all of them where d is small."""
    if rows.shape[1] <= most:
        return np.eye(rows.shape[1])
    return np.linalg.eigh(gaussian_statistics(rows)[1])[1][:, -most:]
