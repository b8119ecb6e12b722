"""What is measured on sampled images, against which reference."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from util.args import flag
from util.metrics import FEATURES, METRICS, check_features, compute_metrics, digit_metrics


@dataclass(frozen=True)
class EvalConfig:
    """How many images, which figures, from which features."""

    num_images: int = flag(50000, "images to sample, class-balanced", low=1)
    eval_bsz: int = flag(64, "images a batch when sampling", low=1)
    metrics: str = flag("fid,isc,kid,prc", "comma list of fid, isc, kid, prc; or none")
    features: str = flag("inception", "features of the metrics", choices=FEATURES)
    fid_weights: str | None = flag(None, "file with torch-fidelity's Inception weights, for machines without network")

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The names in `metrics`; none is an empty tuple. An unknown name raises ValueError."""
        names = () if self.metrics == "none" else tuple(self.metrics.split(","))
        for name in names:
            if name not in METRICS:
                raise ValueError(f"unknown --metrics {name!r}; valid: {', '.join(METRICS)}, none")
        return names

    def check(self, num_reference: int | None = None) -> None:
        """Raise ValueError, before anything is sampled, where the metrics could not be computed afterwards."""
        if not self.metric_names:
            return
        needed = max(METRICS[name][0] for name in self.metric_names)
        smallest = min(self.num_images, self.num_images if num_reference is None else num_reference)
        if smallest < needed:
            raise ValueError(f"the metrics {self.metrics} need {needed} images, got {smallest}; or use --metrics none")
        check_features(self.features, self.fid_weights)


def score(images, labels, reference, config: EvalConfig, device) -> dict[str, float]:
    """The figures that config names for images (a Dataset of uint8 (C, H, W)) against the data set `reference`.

    With the digit features also those of `util.metrics.digit_metrics`.
    """
    if not config.metric_names:
        return {}
    found = compute_metrics(
        images,
        reference,
        features=config.features,
        weights=config.fid_weights,
        metrics=config.metric_names,
        device=device,
        verbose=len(images) > 5000,  # torch-fidelity's own progress bars
    )
    if config.features == "digits":
        made = np.stack([images[i].numpy()[0] for i in range(len(images))])
        real = [reference[i] for i in range(len(reference))]
        found |= digit_metrics(made, labels, np.stack([r[0].numpy()[0] for r in real]), [r[1] for r in real])
    return found


def reference_hash(dataset) -> str:
    """16 hex digits that change with the reference images: their bytes, or for a folder their names and sizes."""
    digest = hashlib.blake2b(digest_size=8)
    if hasattr(dataset, "images"):
        digest.update(dataset.images.numpy().tobytes())
    else:
        for path, label in dataset.samples:
            digest.update(f"{Path(path).name}/{Path(path).stat().st_size}/{label}".encode())
    return digest.hexdigest()
