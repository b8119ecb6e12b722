"""Image quality figures: FID, IS, KID and precision/recall through torch-fidelity, and two more for digits.

Shapes: n images, H x W pixels, C channels (1 or 3), d features. Images are uint8, 0..255.
"""

import functools
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

DIGITS_WEIGHTS = Path(__file__).with_name("digits_classifier.npz")

# metric -> (images needed of each kind, {our name of the figure: torch-fidelity's})
METRICS = {
    "fid": (2, {"fid": "frechet_inception_distance"}),
    "isc": (2, {"is_mean": "inception_score_mean", "is_std": "inception_score_std"}),
    "kid": (2, {"kid_mean": "kernel_inception_distance_mean", "kid_std": "kernel_inception_distance_std"}),
    "prc": (4, {"precision": "precision", "recall": "recall"}),  # 3rd nearest neighbour, not counting itself
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
    # The last trace is the sum of the singular values of sigma1^½ sigma2^½. Unlike sqrtm, or eigenvalues of the
    # product, this takes no root of a rounding error, so null directions cost nothing.
    overlap = np.linalg.svd(_psd_sqrt(sigma1) @ _psd_sqrt(sigma2), compute_uv=False).sum()
    return float(max(0.0, np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2 * overlap))


def _psd_sqrt(sigma: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(sigma)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


class DigitClassifier(nn.Module):
    """Convolutional net for 8 x 8 digits: x (B, 1, 8, 8) in [-1, 1] -> (features (B, 64) >= 0, logits (B, 10))."""

    def __init__(self):
        super().__init__()
        blocks = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU()]  # (B, 32, 8, 8)
        blocks += [nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]  # (B, 32, 4, 4)
        blocks += [nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]  # (B, 64, 2, 2)
        self.conv = nn.Sequential(*blocks)
        self.hidden = nn.Linear(64 * 2 * 2, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        features = self.hidden(self.conv(x).flatten(1)).relu()  # (B, 64)
        return features, self.head(features)


def load_digit_classifier(path=DIGITS_WEIGHTS) -> DigitClassifier:
    """The committed digit classifier (or another .npz of its state dict), in eval mode on the CPU."""
    with np.load(path, allow_pickle=False) as arrays:
        state = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    with torch.device("meta"):  # no initial weights, which would draw random numbers
        net = DigitClassifier()
    net.load_state_dict(state, assign=True)
    return net.eval().requires_grad_(False)


def _prepare_inception(weights) -> str:
    """Path of Inception weights that are safe to hand to torch-fidelity, which unpickles whatever it is given."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

    path = Path(weights or Path(torch.hub.get_dir(), "checkpoints", URL_INCEPTION_V3.rsplit("/", 1)[1]))
    if weights and not path.is_file():
        raise ValueError(f"no Inception weights at {path}: --fid_weights takes the file {URL_INCEPTION_V3}")
    if not path.is_file():
        # The place and the function of torch-fidelity's own download, with a time limit.
        timeout = socket.getdefaulttimeout()
        try:
            socket.setdefaulttimeout(10)  # seconds without a byte
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), progress=False)
        except (OSError, HTTPException) as error:
            raise ValueError(
                f"no Inception weights in {path.parent} and no network ({' '.join(str(error).split())}): give "
                f"--fid_weights FILE ({URL_INCEPTION_V3}), use --features digits, or turn the metrics off"
            ) from None
        finally:
            socket.setdefaulttimeout(timeout)
    try:
        torch.load(path, map_location="cpu", weights_only=True)  # first: the next line would run what is in the file
        with torch.random.fork_rng(devices=[]):  # construction draws initial weights
            FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))
    except Exception as error:  # torch, pickle and zipfile each raise their own kinds
        why = " ".join(str(error).split())[:100]
        raise ValueError(f"{path} refused: not the plain tensors of {URL_INCEPTION_V3} ({why} ...)") from None
    return str(path)


@functools.cache  # torch-fidelity refuses to register a name twice
def _prepare_digits() -> str:
    import torch_fidelity

    class DigitsFeatureExtractor(torch_fidelity.FeatureExtractorBase):
        """Layers "64" and "logits" of the digit classifier for uint8 (B, 3, 8, 8); another size raises ValueError."""

        def __init__(self, name, features_list, feature_extractor_weights_path=DIGITS_WEIGHTS, **kwargs):
            super().__init__(name, features_list)
            self.net = load_digit_classifier(feature_extractor_weights_path)

        @staticmethod
        def get_provided_features_list():
            return "64", "logits"

        def forward(self, x):
            if x.dtype != torch.uint8 or x.shape[1:] != (3, 8, 8):
                raise ValueError(f"digit features need uint8 images (B, 3, 8, 8), got {x.dtype} {tuple(x.shape)}")
            features, logits = self.net(x.float().mean(dim=1, keepdim=True) / 127.5 - 1)
            return tuple({"64": features, "logits": logits}[name] for name in self.features_list)

    torch_fidelity.register_feature_extractor("digits", DigitsFeatureExtractor)
    return str(DIGITS_WEIGHTS)


# name -> (torch-fidelity's name, layer for FID, KID and precision/recall, layer for IS, function that turns
#          --fid_weights or None into the path of weights from which torch-fidelity can build it, else ValueError)
FEATURES = {
    "inception": ("inception-v3-compat", "2048", "logits_unbiased", _prepare_inception),
    "digits": ("digits", "64", "logits", lambda weights: _prepare_digits()),
}


def check_features(name, weights=None) -> str:
    """Make sure, before any sampling, that the features `name` can be computed; returns the path of their weights.

    weights: path of Inception weights; None for torch-fidelity's own, downloaded if absent (90 MB); unused by digits.
    One-line ValueError for an unknown name, a missing file, one with anything but Inception's tensors (nothing in it is
    executed), and no file with no network.
    """
    if name not in FEATURES:
        raise ValueError(f"unknown features {name!r}: choose from {', '.join(FEATURES)}")
    return FEATURES[name][3](weights)


class _RGBImages(Dataset):
    """uint8 images, an array (n, H, W, C) or a Dataset of (C, H, W), as a Dataset of uint8 (3, H, W)."""

    def __init__(self, images, name: str):
        self.images = images if isinstance(images, Dataset) else torch.as_tensor(images).movedim(-1, 1)  # (n, C, H, W)
        self.name, self.shape = name, None
        self.shape = self[0].shape if len(self) else None

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image = self.images[i]
        image = image[0] if isinstance(image, tuple | list) else image
        dtype, shape = getattr(image, "dtype", type(image)), tuple(getattr(image, "shape", ()))
        if dtype != torch.uint8 or len(shape) != 3 or shape[0] not in (1, 3):
            raise ValueError(f"{self.name} images must be uint8 (1 or 3, H, W) each, got {dtype} {shape}")
        image = image.expand(3, -1, -1)  # (3, H, W)
        if self.shape not in (None, image.shape):
            raise ValueError(f"{self.name} images must be of one size: 0 has {self.shape}, {i} has {image.shape}")
        return image

    def __getitems__(self, indices):
        # A batch at a time from threads (image decoding releases the interpreter): torch-fidelity's worker processes
        # want a Dataset that can be pickled, and for arrays cost more than they save.
        with ThreadPoolExecutor(1 if torch.is_tensor(self.images) else min(8, os.cpu_count() or 1)) as pool:
            return list(pool.map(self.__getitem__, indices))


def compute_metrics(
    images,
    reference,
    *,
    features="inception",
    weights=None,
    metrics=tuple(METRICS),
    batch_size=64,
    device="cpu",
    verbose=False,
) -> dict[str, float]:
    """FID, IS, KID, precision and recall of `images` against `reference` by torch-fidelity, keyed as in METRICS.

    images, reference: uint8 (n, H, W, C), C 1 or 3, or Datasets (read from threads) of uint8 (C, H, W) tensors or of
    tuples that start with one. With few images KID's subsets shrink to the smaller set and IS's splits get fewer, of
    10 images or more. Nothing is cached and the random state is kept. Other types and shapes, too few images, unknown
    metrics and what check_features refuses raise ValueError.
    """
    images, reference = _RGBImages(images, "generated"), _RGBImages(reference, "reference")
    n = min(len(images), len(reference))
    for name in metrics:
        if name not in METRICS:
            raise ValueError(f"unknown metric {name!r}: choose from {', '.join(METRICS)}")
        if n < METRICS[name][0]:
            counts = f"{len(images)} generated and {len(reference)} reference images"
            raise ValueError(f"{name} needs at least {METRICS[name][0]} of each, got {counts}")
    path = check_features(features, weights)
    extractor, layer, logits_layer, _ = FEATURES[features]
    import torch_fidelity

    cuda = torch.device(device).type == "cuda"  # torch-fidelity knows CUDA and CPU only
    # The DataLoader and the extractor's construction draw random numbers, which would change a training run.
    with torch.random.fork_rng(devices=[]), torch.cuda.device(device) if cuda else nullcontext():
        found = torch_fidelity.calculate_metrics(
            input1=images,
            input2=reference,
            **{name: name in metrics for name in METRICS},
            feature_extractor=extractor,  # by name: precision and recall would fall back to VGG-16
            **{f"feature_layer_{name}": logits_layer if name == "isc" else layer for name in METRICS},
            feature_extractor_weights_path=path,
            isc_splits=max(1, min(10, len(images) // 10)),
            kid_subset_size=min(1000, n),
            batch_size=batch_size,
            cuda=cuda,
            cache=False,
            save_cpu_ram=True,  # no worker processes; precision/recall in blocks (50k x 50k distances are 10 GB)
            verbose=verbose,
        )
    return {ours: float(found[theirs]) for name in metrics for ours, theirs in METRICS[name][1].items()}


def digit_metrics(images, labels, real_images, real_labels) -> dict[str, float]:
    """svc_accuracy, the fraction of `images` that an SVC trained on the real pixels labels rightly, and frechet_pixels.

    images, real_images: uint8 (n, 8, 8) or (n, 8, 8, 1), n >= 2; labels, real_labels: (n,) integers; else ValueError.
    The Fréchet distance is that of the 64-vectors of pixels scaled to [-1, 1].
    """
    from sklearn.svm import SVC

    sets = []
    for name, x, y in (("generated", images, labels), ("real", real_images, real_labels)):
        x, y = np.asarray(x), np.asarray(y)
        if x.dtype != np.uint8 or x.shape[1:] not in ((8, 8), (8, 8, 1)) or len(x) < 2 or y.shape != x.shape[:1]:
            need = "uint8 (n, 8, 8, 1), n >= 2, with labels (n,)"
            raise ValueError(f"{name} digits must be {need}, got {x.dtype} {x.shape} with {y.shape}")
        sets.append((x.reshape(-1, 64) / 127.5 - 1, y))
    (x, y), real = sets
    accuracy = np.mean(SVC(kernel="rbf", gamma="scale").fit(*real).predict(x) == y)
    distance = frechet_distance(*gaussian_statistics(x), *gaussian_statistics(real[0]))
    return {"svc_accuracy": float(accuracy), "frechet_pixels": distance}


def metrics_line(d) -> str:
    """One line for people from the figures of compute_metrics and digit_metrics, those that are in `d`."""
    parts = {
        "fid": "FID {fid:.3f}",
        "is_mean": "IS {is_mean:.2f}±{is_std:.2f}",
        "kid_mean": "KID {kid_mean:.4f}",
        "precision": "precision {precision:.2f}",
        "recall": "recall {recall:.2f}",
        "svc_accuracy": "SVC accuracy {svc_accuracy:.1%}",
        "frechet_pixels": "Fréchet (pixels) {frechet_pixels:.2f}",
    }
    return "  ".join(text.format_map(d) for key, text in parts.items() if key in d)
