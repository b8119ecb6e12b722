"""Image quality figures: FID, sFID, IS, KID and precision/recall on torch-fidelity's features; two for digits alone.

Shapes: n images, H x W pixels, C channels (1 or 3), d features. Images are uint8, 0..255.
"""

import math
import os
import tempfile
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from util.evaluation.features import FEATURES, RGBImages, check_features, feature_batches
from util.evaluation.fid_stats import FIDStats, Moments

KEPT = weakref.WeakKeyDictionary()  # reference data set -> temporary folder with the features of its images


class Metric(NamedTuple):
    """A row of METRICS.

    needed: images, generated and of the reference each. from_images: is it computed from the reference's images? FID
    needs their statistics only, IS no reference. figures: {our name of a figure: the one that it is computed under}.
    compute: a function (images, reference, row, extract) -> {name: figure} of what torch-fidelity has not; row is that
    of FEATURES, extract(images, layers) gives batches of features, a tuple with an array for each layer. on_request:
    is it measured only where it is named?
    """

    needed: int
    from_images: bool
    figures: dict[str, str]
    compute: Callable | None = None
    on_request: bool = False


def spatial_frechet(images, reference, row, extract) -> dict[str, float]:
    """sFID: the Fréchet distance of features that keep places."""
    sets = [_moments(extract(x, [row.spatial])) for x in (images, reference)]
    return {"spatial_frechet_distance": frechet_distance(*sets[0], *sets[1])}


METRICS = {
    "fid": Metric(2, False, {"fid": "frechet_inception_distance"}),
    "isc": Metric(2, False, {"is_mean": "inception_score_mean", "is_std": "inception_score_std"}),
    "kid": Metric(2, True, {"kid_mean": "kernel_inception_distance_mean", "kid_std": "kernel_inception_distance_std"}),
    "prc": Metric(
        4, True, {"precision": "precision", "recall": "recall"}
    ),  # 3rd nearest neighbour, not counting itself
    # takes passes of its own over both sets of images
    "sfid": Metric(2, True, {"sfid": "spatial_frechet_distance"}, spatial_frechet, on_request=True),
}


def gaussian_statistics(x) -> tuple[np.ndarray, np.ndarray]:
    """Mean (d,) and unbiased covariance (d, d), both float64, of x (n, d); n < 2 or another shape raises ValueError."""
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"statistics need an (n, d) array with n >= 2, got shape {x.shape}")
    return x.mean(axis=0), np.atleast_2d(np.cov(x, rowvar=False))


def frechet_distance(mu1, sigma1, mu2, sigma2) -> float:
    """|mu1 - mu2|² + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^½) >= 0 (arXiv 1706.08500 Eq. 6).

    mu (d,), sigma (d, d) positive semidefinite, singular allowed; other shapes, NaN and infinities raise ValueError.
    """
    mu1, sigma1, mu2, sigma2 = arrays = [np.asarray(a, dtype=np.float64) for a in (mu1, sigma1, mu2, sigma2)]
    shapes, d = [a.shape for a in arrays], mu1.size
    if shapes != [(d,), (d, d), (d,), (d, d)] or not all(np.isfinite(a).all() for a in arrays):
        raise ValueError(f"need finite arrays of shapes (d,), (d, d), (d,), (d, d), got {shapes}")
    # The last trace is the sum of the singular values of sigma1^½ sigma2^½. For singular matrices this is exact:
    # sqrtm, or eigenvalues of the product, would take roots of rounding errors.
    overlap = np.linalg.svd(_psd_sqrt(sigma1) @ _psd_sqrt(sigma2), compute_uv=False).sum()
    return float(max(0.0, np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2 * overlap))


def _psd_sqrt(sigma: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(sigma)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def compute_metrics(
    images,
    reference,
    *,
    features="inception",
    weights=None,
    metrics=None,
    batch_size=64,
    device="cpu",
    verbose=False,
) -> dict[str, float]:
    """The METRICS of `images` against `reference` by torch-fidelity, keyed as there; sFID by its features.

    images, reference: uint8 (n, H, W, C), C 1 or 3, or Datasets (read from threads) of uint8 (C, H, W) tensors or of
    tuples that start with one. reference may be FIDStats, which have FID (and IS) only. metrics None: all that are
    possible (see `possible_metrics`). KID's subsets have 1000 images, or all of a smaller set; IS has 10 splits, with
    fewer than 100 images one for each 10. A reference that is a Dataset must not change: its features are extracted
    once and serve until it, or the process, ends. The random state is kept. Other types and shapes, too few images,
    unknown or impossible metrics and what check_features refuses raise ValueError.
    """
    from_stats = isinstance(reference, FIDStats)
    metrics = possible_metrics(metrics, features, from_stats)
    images = RGBImages(images, "generated")
    reference = reference if from_stats else RGBImages(reference, "reference")
    n = len(images) if from_stats else min(len(images), len(reference))
    for name in metrics:
        if n < METRICS[name].needed:
            counts = f"{len(images)} generated" + ("" if from_stats else f" and {len(reference)} reference") + " images"
            raise ValueError(f"{name} needs at least {METRICS[name].needed} of each, got {counts}")
    if from_stats:
        options = dict(batch_size=batch_size, device=device, verbose=verbose)
        return _from_statistics(images, reference, features, weights, metrics, **options)
    path = check_features(features, weights)
    row = FEATURES[features]
    import torch_fidelity

    figures = {}

    def extract(images, layers):
        options = dict(layers=layers, batch_size=batch_size, device=device, verbose=verbose)
        return feature_batches(images, features, path, **options)

    for name in metrics:
        if METRICS[name].compute is not None:
            figures |= METRICS[name].compute(images, reference, row, extract)
    upstream = [name for name in METRICS if METRICS[name].compute is None]
    if not set(upstream) & set(metrics):
        return _with_our_names(figures, metrics)
    cuda = torch.device(device).type == "cuda"  # torch-fidelity knows CUDA and CPU only
    # The DataLoader and the extractor's construction draw random numbers, which would change a training run.
    with torch.random.fork_rng(devices=[]), torch.cuda.device(device) if cuda else nullcontext():
        figures |= torch_fidelity.calculate_metrics(
            input1=images,
            input2=reference,
            **{name: name in metrics for name in upstream},
            feature_extractor=f"mar-{features}",  # by name: precision and recall would fall back to VGG-16
            **{f"feature_layer_{name}": row.logits if name == "isc" else row.layer for name in upstream},
            feature_extractor_weights_path=path,
            isc_splits=_num_splits(images),
            kid_subset_size=min(1000, n),
            batch_size=batch_size,
            cuda=cuda,
            **_kept_features(reference, path, device),
            save_cpu_ram=True,  # no worker processes; precision/recall in blocks (50k x 50k distances are 10 GB)
            verbose=verbose,
        )
    return _with_our_names(figures, metrics)


def _kept_features(reference: RGBImages, path, device) -> dict:
    """torch-fidelity's options to extract the features of a data set once; arrays may change, theirs are not kept.

    path: file of the extractor's weights, None for those it comes with.
    """
    if not isinstance(reference.images, Dataset):
        return dict(cache=False)
    if reference.images not in KEPT:
        KEPT[reference.images] = tempfile.TemporaryDirectory(prefix="reference_features_")
    extractor = "own"
    if path is not None:
        file = os.stat(path)
        extractor = f"{file.st_dev}_{file.st_ino}_{file.st_size}_{file.st_mtime_ns}"
    name = f"{extractor}_{torch.device(device).type}"
    return dict(cache=True, cache_root=KEPT[reference.images].name, input2_cache_name=name)


def _moments(batches) -> tuple[np.ndarray, np.ndarray]:
    moments = Moments()
    for (batch,) in batches:
        moments.update(batch)
    return moments.result()


def _with_our_names(figures: dict, metrics) -> dict[str, float]:
    return {ours: float(figures[theirs]) for name in metrics for ours, theirs in METRICS[name].figures.items()}


def possible_metrics(metrics, features: str, from_stats: bool) -> tuple[str, ...]:
    """The metrics, None for all that are possible but those on request; an impossible or unknown one raises ValueError.

    The Inception score needs features of a classifier, sFID those that keep places; it, KID, precision and recall need
    the reference's images, so they are impossible with its statistics only (from_stats).
    """
    if features not in FEATURES:
        raise ValueError(f"unknown features {features!r}: choose from {', '.join(FEATURES)}")
    obstacles = {}
    if FEATURES[features].logits is None:
        obstacles["isc"] = f"{features} features come from no classifier, which the Inception score needs"
    if FEATURES[features].spatial is None:
        obstacles["sfid"] = f"{features} features keep no places in the image, which sFID needs: --features inception"
    if from_stats:
        for name, metric in METRICS.items():
            if metric.from_images or metric.compute:
                obstacles[name] = f"{name} needs the reference images, of which --fid_stats has the statistics only"
    possible = tuple(name for name in METRICS if name not in obstacles)
    for name in metrics or ():
        if name not in METRICS:
            raise ValueError(f"unknown metric {name!r}: choose from {', '.join(METRICS)}")
        if name in obstacles:
            raise ValueError(f"{obstacles[name]}; possible here: --metrics {','.join(possible)}")
    return tuple(name for name in possible if not METRICS[name].on_request) if metrics is None else tuple(metrics)


def _num_splits(images) -> int:
    return max(1, min(10, len(images) // 10))


def _from_statistics(images, stats: FIDStats, features, weights, metrics, **options) -> dict[str, float]:
    """FID and IS in one pass over the images, whose features are not kept."""
    from torch_fidelity.metric_isc import isc_features_to_metric

    stats.check(features)
    row, moments, logits = FEATURES[features], Moments(), []
    layers = [row.layer, row.logits] if "isc" in metrics else [row.layer]
    for batch, *batch_logits in feature_batches(images, features, weights, layers=layers, **options):
        moments.update(batch)
        logits += batch_logits
    figures = {}
    if "fid" in metrics:
        figures["frechet_inception_distance"] = frechet_distance(*moments.result(), stats.mu, stats.sigma)
    if "isc" in metrics:
        figures.update(isc_features_to_metric(torch.cat(logits), _num_splits(images)))
    return _with_our_names(figures, metrics)


def check_classes(labels) -> None:
    """Raise ValueError unless the labels (n,) of the reference are of two classes or more, as `digit_metrics` needs."""
    if len(set(labels)) < 2:
        raise ValueError(
            f"--features digits needs reference images of at least 2 classes, got {len(set(labels))}: name others with "
            "--data_path"
        )


def digit_metrics(images, labels, real_images, real_labels) -> dict[str, float]:
    """svc_accuracy, the share of `images` that an SVC trained on the real pixels labels rightly, and frechet_pixels.

    images, real_images: uint8 (n, 8, 8) or (n, 8, 8, 1), n >= 2; labels, real_labels: (n,) integers, the real ones of
    two classes or more; else ValueError. labels None: of no classes, there is no svc_accuracy.
    The Fréchet distance is that of the 64-vectors of pixels scaled to [-1, 1].
    """
    from sklearn.svm import SVC

    sets = []
    for name, x, y in (("generated", images, labels), ("real", real_images, real_labels)):
        x, y = np.asarray(x), np.zeros(len(x), int) if y is None else np.asarray(y)
        if x.dtype != np.uint8 or x.shape[1:] not in ((8, 8), (8, 8, 1)) or len(x) < 2 or y.shape != x.shape[:1]:
            need = "uint8 (n, 8, 8, 1), n >= 2, with labels (n,)"
            raise ValueError(f"{name} digits must be {need}, got {x.dtype} {x.shape} with {y.shape}")
        sets.append((x.reshape(-1, 64) / 127.5 - 1, y))
    (x, y), real = sets
    check_classes(real[1].tolist())
    figures = {"frechet_pixels": frechet_distance(*gaussian_statistics(x), *gaussian_statistics(real[0]))}
    if labels is None:
        return figures
    accuracy = np.mean(SVC(kernel="rbf", gamma="scale").fit(*real).predict(x) == y)
    return {"svc_accuracy": float(accuracy), **figures}


def metrics_line(metrics: dict) -> str:
    """One line for people from the figures of this module and of `reconstruction`, those that are in `metrics`."""
    parts = {
        "rfid": "rFID {rfid:.3f}",
        "psnr": "PSNR {psnr:.2f} dB",
        "ssim": "SSIM {ssim:.4f}",
        "usage": "codebook used {usage:.1%}",
        "perplexity": "perplexity {perplexity:.1f}",
        "fid": "FID {fid:.3f}",
        "sfid": "sFID {sfid:.3f}",
        "is_mean": "IS {is_mean:.2f}±{is_std:.2f}",
        "kid_mean": "KID {kid_mean:.4f}",
        "precision": "precision {precision:.2f}",
        "recall": "recall {recall:.2f}",
        "svc_accuracy": "SVC accuracy {svc_accuracy:.1%}",
        "frechet_pixels": "Fréchet (pixels) {frechet_pixels:.2f}",
        "judge_fid": "FID of the judge {judge_fid:.3f}",
    }
    numbers = {key: math.nan if value is None else value for key, value in metrics.items()}  # null in results.jsonl
    others = {name for metric in METRICS.values() for name in metric.figures} - {"is_std", "kid_std"}
    parts |= {name: f"{name} {{{name}:.4g}}" for name in sorted(others - parts.keys())}  # of rows that are added
    return "  ".join(text.format_map(numbers) for key, text in parts.items() if key in numbers)
