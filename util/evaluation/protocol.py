"""The metrics of sampled images, their reference, and the protocol of a result (docs/evaluation.md)."""

import hashlib
import math
import os
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from util.args import flag
from util.evaluation.features import FEATURES, check_features, features_name
from util.evaluation.fid_stats import FIDStats, load_fid_stats
from util.evaluation.metrics import METRICS, check_classes, compute_metrics, digit_metrics, possible_metrics
from util.evaluation.reward import pixel_distance
from util.images.datasets import build_dataset, labels_of
from util.images.reading import DEFAULT, MARS_WAY, Reading
from util.sizes import Size

READ = 2**26  # bytes of a folder's files that are compared


@contextmanager
def way_out():
    """A ValueError of what the metrics need says that they can be left out."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error}, or use --metrics none") from None


@dataclass(frozen=True)
class EvalConfig:
    """Number of images, figures, features and reference of an evaluation."""

    num_images: int = flag(50000, "images to sample, class-balanced", low=1)
    eval_bsz: int = flag(64, "images a batch when sampling", low=1)
    metrics: str | None = flag(
        None,
        f"comma list of {', '.join(METRICS)}; or none (default: all but "
        f"{', '.join(name for name in METRICS if METRICS[name].on_request)} that features and reference allow)",
    )
    features: str = flag("inception", "features of the metrics", choices=FEATURES)
    fid_weights: str | None = flag(None, "file with the published weights of the features, or another classifier's")
    judge: str | None = flag(
        None,
        "file of another classifier, or name of other features, which took no part in what is measured: FID by these "
        "is judge_fid",
    )
    eval_split: str = flag("train", "images of the data set to compare with", choices=("train", "val"))
    fid_stats: str | None = flag(None, "file (.npz with mu and sigma) to compare with instead of images")

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The names in `metrics`; none is an empty tuple. An unknown or impossible name raises ValueError."""
        if self.metrics == "none":
            return ()
        names = None if self.metrics is None else tuple(self.metrics.split(","))
        for name in names or ():
            if name not in METRICS:
                raise ValueError(f"unknown --metrics {name!r}; valid: {', '.join(METRICS)}, none")
        return possible_metrics(names, self.features, self.fid_stats is not None)

    @property
    def judge_of(self) -> tuple[str, str | None]:
        """(features, file of their weights) of the judge."""
        return (self.judge, None) if self.judge in FEATURES else (self.features, self.judge)

    def resolved(self) -> "EvalConfig":
        """With the metrics named that a default leaves open."""
        return replace(self, metrics=",".join(self.metric_names) or "none")

    def check_count(self, num_images: int) -> None:
        """Raise ValueError where so many images are too few for one of the metrics, of which there is at least one."""
        needed = max(METRICS[name].needed for name in self.metric_names)
        if num_images < needed:
            names = ",".join(self.metric_names)
            raise ValueError(f"the metrics {names} need {needed} images, got {num_images}")

    def check_judge(self) -> None:
        """Raise ValueError unless the judge is a name of features or a file that is there."""
        if self.judge is not None and self.judge not in FEATURES and not Path(self.judge).is_file():
            valid = ", ".join(FEATURES)
            raise ValueError(f"--judge {self.judge} is no file, and no name of features; valid names: {valid}")

    @way_out()
    def check(self, reference, img_size: Size | None = None) -> None:
        """Raise ValueError, before anything is sampled, where the metrics could not be computed afterwards.

        reference: as from `build_reference`. img_size: pixels of the images that will be sampled.
        """
        if not self.metric_names:
            return
        smallest = self.num_images if isinstance(reference, FIDStats) else min(self.num_images, len(reference))
        self.check_count(smallest)
        if isinstance(reference, FIDStats):
            reference.check(self.features, img_size)
        elif self.features == "digits":
            check_classes(labels_of(reference))
        check_features(self.features, self.fid_weights, img_size)
        if self.judge is not None:
            if isinstance(reference, FIDStats):
                raise ValueError(f"--judge {self.judge} needs reference images: --fid_stats are of other features")
            if self.judge == self.features:
                raise ValueError(f"--judge {self.judge} must be other features than --features")
            try:
                check_features(*self.judge_of, img_size)
            except ValueError as error:
                raise ValueError(f"--judge {self.judge}: {error}") from None


@way_out()
def build_reference(config: EvalConfig, name: str, data_path, img_size: Size, reading: Reading = DEFAULT):
    """What the metrics compare with: FIDStats with --fid_stats, else the data set `name` in the split --eval_split.

    None without metrics. What cannot be read raises ValueError.
    """
    if not config.metric_names:
        return None
    config.check_judge()
    if config.fid_stats is None:
        where = dict(data_path=data_path, img_size=img_size, split=config.eval_split)
        return build_dataset(name, **where, reading=reading)
    if config.eval_split != "train":
        raise ValueError(f"--eval_split {config.eval_split} has no meaning with --fid_stats: the file is of one split")
    return load_fid_stats(config.fid_stats)


def score(images, labels, reference, config: EvalConfig, device) -> dict[str, float]:
    """The figures that config names for images (a Dataset of uint8 (C, H, W)) against a data set or FIDStats.

    With reference images also, of the digit features, those of `util.evaluation.metrics.digit_metrics`, and of
    CIFAR-10's the distance in pixels. labels: classes, None where captions are asked for.
    """
    if not config.metric_names:
        return {}
    figures = compute_metrics(
        images,
        reference,
        features=config.features,
        weights=config.fid_weights,
        metrics=config.metric_names,
        device=device,
        verbose=len(images) > 5000,  # torch-fidelity's progress bars, for what takes minutes
    )
    if config.judge is not None:
        features, weights = config.judge_of
        options = dict(features=features, weights=weights, metrics=("fid",), device=device)
        figures["judge_fid"] = compute_metrics(images, reference, **options)["fid"]
    if config.features == "cifar10" and not isinstance(reference, FIDStats):
        figures["frechet_pixels"] = pixel_distance(images, reference)
    if config.features == "digits" and not isinstance(reference, FIDStats):
        generated = np.stack([images[i].numpy()[0] for i in range(len(images))])
        real, real_labels, _ = zip(*(reference[i] for i in range(len(reference))))
        figures.update(digit_metrics(generated, labels, np.stack([image.numpy()[0] for image in real]), real_labels))
    return figures


def reference_hash(reference) -> str:
    """16 hex digits that change with the reference: its statistics, bytes, or for a folder names and sizes of files.

    For a folder also with the way its images are read; MAR's, the only one of old results, adds nothing. Files that
    are replaced by others of the same name and size change `content_hash` instead, which old results do not have.
    """
    if isinstance(reference, FIDStats):
        return reference.hash()
    digest = hashlib.blake2b(digest_size=8)
    if hasattr(reference, "images"):
        digest.update(reference.images.numpy().tobytes())
    else:
        for path, label in reference.samples:
            digest.update(os.fsencode(Path(path).name) + f"/{_size(path)}/{label}".encode())
        for name in ("value_range", "exif", "background"):
            value = getattr(reference.reading, name)
            if value != getattr(MARS_WAY, name):
                digest.update(f"{name}={value}".encode())
    return digest.hexdigest()


def content_hash(reference) -> str | None:
    """16 hex digits that change with the bytes of a folder's files; None for a reference that is no folder.

    A folder of at most READ bytes is read whole, of a larger one every k-th file, about READ bytes: a file between
    those that is replaced by another of the same name and size is not noticed.
    """
    paths = [path for path, _ in getattr(reference, "samples", ())]
    if not paths:
        return None
    digest, step = hashlib.blake2b(digest_size=8), max(1, math.ceil(sum(map(_size, paths)) / READ))
    for path in paths[::step]:
        try:
            digest.update(Path(path).read_bytes())
        except OSError:  # a broken image, of which the reference has none
            continue
    return digest.hexdigest()


def reference_hashes(reference) -> dict[str, str | None]:
    """What tells references apart in results.jsonl; None for no reference."""
    known = reference is not None
    return {"reference": reference_hash(reference) if known else None, "reference_content": content_hash(reference)}


def classifier_hashes(config: EvalConfig) -> dict[str, str]:
    """16 hex digits of the bytes of each file whose features are measured by, {} where there is none."""
    of = dict(features_content=config.fid_weights)
    of |= dict(judge_content=config.judge_of[1] if config.judge is not None else None)
    return {
        name: hashlib.blake2b(Path(path).read_bytes(), digest_size=8).hexdigest()
        for name, path in of.items()
        if path is not None and config.metrics != "none" and Path(path).is_file()  # else it is named where it is used
    }


def _size(path: str) -> int:
    """Bytes of a file; −1 for a link to nothing, which is a broken image."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def reconstruction_row(weights: str, settings: dict, config: EvalConfig, reference) -> dict:
    """What identifies a tokenizer's result in results.jsonl: fingerprint, settings of the measurement, reference."""
    measured = {name: getattr(config, name) for name in ("num_images", "features", "eval_split", "fid_stats")}
    measured |= dict(fid_weights=config.fid_weights) if config.fid_weights is not None else {}
    hashes = reference_hashes(reference) | classifier_hashes(config)
    return dict(kind="reconstruction", settings={**settings, **measured}, weights=weights, **hashes)


def class_balance(labels, of_text: bool = False) -> str:
    """The number of images of each class as a phrase: "180 of each of 10 classes"; label −1 is no class.

    of_text: labels number captions.
    """
    counts = Counter(labels)
    if not counts.keys() - {-1}:
        return "unconditional"
    least, most = min(counts.values()), max(counts.values())
    per_class = f"{least}" if least == most else f"{least} to {most}"
    one, several = ("caption", "captions") if of_text else ("class", "classes")
    classes = f"{len(counts)} {several}" if len(counts) > 1 else f"1 {one}"
    if -1 in counts:
        classes += " (one of them unconditional)"
    return f"{per_class} of each of {classes}"


def protocol(
    kind: str, config: EvalConfig, labels, reference, data: str, *, ema: bool | None, dtype: str, of_text: bool = False
) -> dict:
    """What a figure must be quoted with, plain values for JSON.

    kind: "generation", or "reconstruction" for a tokenizer's own. data: name and place of the reference's data set.
    ema: are the weights averaged ones? None for a tokenizer, which has no averages. reference: a data set, FIDStats, or
    None for no metrics. of_text: labels number captions.
    """
    sampled = dict(kind=kind, num_images=len(labels), balance=class_balance(labels, of_text), ema=ema, dtype=dtype)
    if reference is None:
        return sampled
    if isinstance(reference, FIDStats):
        name, split, count = f"statistics in {config.fid_stats}", reference.split or "unknown", reference.num_images
    else:
        name, split, count = data, config.eval_split, len(reference)
    record = dict(sampled, reference=name, split=split, num_reference=count)
    record["features"] = features_name(config.features, config.fid_weights)
    return record | (dict(judge=features_name(*config.judge_of)) if config.judge else {})


def protocol_line(record: dict) -> str:
    """What `protocol` returned, as one line for people."""
    weights = {True: ", EMA weights", False: ", raw weights", None: ""}[record["ema"]]
    line = f"{record['kind']} of {record['num_images']} images ({record['balance']}{weights}, {record['dtype']})"
    if "reference" not in record:
        return line
    count = "an unknown number of" if record["num_reference"] is None else record["num_reference"]
    line += f" against {count} images of {record['reference']} (split: {record['split']})"
    line += f", features: {record['features']}" if record["features"] else ""
    return line + (f", judge: {record['judge']}" if "judge" in record else "")
