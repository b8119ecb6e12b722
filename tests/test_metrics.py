"""Metrics of images: pixel figures of digits, agreement with torch-fidelity, forms of input, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.utils.data import Dataset, TensorDataset

from tests.helpers import images_of
from util.evaluation import metrics
from util.evaluation.classifiers import DIGITS_WEIGHTS, load_classifier
from util.evaluation.metrics import (
    KEPT,
    METRICS,
    Metric,
    compute_metrics,
    digit_metrics,
    frechet_distance,
    gaussian_statistics,
    metrics_line,
    possible_metrics,
)


@pytest.fixture(scope="module")
def digits():
    """The real digits in random order: uint8 (1797, 8, 8, 1) and labels (1797,)."""
    data = load_digits()
    rows = np.random.default_rng(0).permutation(len(data.target))
    return np.round(data.images * 255 / 16).astype(np.uint8)[rows, :, :, None], data.target[rows]


# ---------------------------------------------------------------------------------------------- pixel figures of digits


def test_pixel_figures_of_real_digits(digits):
    x, y = digits
    halves = digit_metrics(x[:898], y[:898], x[898:], y[898:])
    assert halves["svc_accuracy"] > 0.97
    assert 0.2 < halves["frechet_pixels"] < 0.4
    same = digit_metrics(x[..., 0], y, x, y)
    assert same["svc_accuracy"] > 0.99 and same["frechet_pixels"] < 1e-9
    noise = np.random.default_rng(0).integers(0, 256, (500, 8, 8), dtype=np.uint8)
    noisy = digit_metrics(noise, y[:500], x, y)
    assert noisy["svc_accuracy"] < 0.3 and noisy["frechet_pixels"] > 100 * halves["frechet_pixels"]


@pytest.mark.parametrize("shape, dtype", [((5, 8, 9), np.uint8), ((5, 8, 8), np.float32), ((1, 8, 8), np.uint8)])
def test_digit_metrics_refuses(digits, shape, dtype):
    with pytest.raises(ValueError, match="^generated digits must be uint8 [^\n]+$"):
        digit_metrics(np.zeros(shape, dtype), np.zeros(shape[0]), *digits)


def test_digit_metrics_refuses_labels_of_another_length(digits):
    with pytest.raises(ValueError, match="real digits must be"):
        digit_metrics(digits[0], digits[1], digits[0], digits[1][:-1])


# ----------------------------------------------------------------------------------- torch-fidelity with digit features


def digit_features(x):
    return load_classifier()(torch.from_numpy(x).permute(0, 3, 1, 2) / 127.5 - 1)[0].numpy()


def test_all_metrics_of_half_the_digits_against_the_rest(digits):
    x, _ = digits
    figures = compute_metrics(x[:300], x[300:700], features="digits")
    assert list(figures) == ["fid", "is_mean", "is_std", "kid_mean", "kid_std", "precision", "recall"]
    assert all(type(value) is float for value in figures.values())
    assert figures["fid"] < 0.5 and abs(figures["kid_mean"]) < 0.02
    assert figures["is_mean"] > 8 and figures["precision"] > 0.8 and figures["recall"] > 0.8
    ours = frechet_distance(
        *gaussian_statistics(digit_features(x[:300])), *gaussian_statistics(digit_features(x[300:700]))
    )
    assert figures["fid"] == pytest.approx(ours, rel=1e-3)
    noise = np.random.default_rng(0).integers(0, 256, (300, 8, 8, 1), dtype=np.uint8)
    bad = compute_metrics(noise, x[300:700], features="digits")
    assert bad["fid"] > 20 * figures["fid"] and bad["kid_mean"] > 20 * abs(figures["kid_mean"])
    assert bad["precision"] < 0.3 and bad["is_mean"] < 5


def test_fid_of_a_set_against_itself_is_zero(digits):
    assert abs(compute_metrics(digits[0], digits[0], features="digits", metrics=("fid",))["fid"]) < 1e-6


def test_inception_score_of_digits(digits):
    x, _ = digits
    assert compute_metrics(x, x[:2], features="digits", metrics=("isc",))["is_mean"] > 8
    constant = compute_metrics(np.zeros_like(x[:50]), x[:2], features="digits", metrics=("isc",))
    assert constant == {"is_mean": pytest.approx(1), "is_std": pytest.approx(0, abs=1e-6)}


def test_kid_of_few_images_is_the_unbiased_estimate(digits):
    x, n = digits[0], 60
    f, g = digit_features(x[:n]).astype(np.float64), digit_features(x[n : 2 * n]).astype(np.float64)
    ff, gg, fg = ((a @ b.T / 64 + 1) ** 3 for a, b in ((f, f), (g, g), (f, g)))
    expected = (ff.sum() - np.trace(ff) + gg.sum() - np.trace(gg)) / (n * (n - 1)) - 2 * fg.mean()
    figures = compute_metrics(x[:n], x[n : 2 * n], features="digits", metrics=("kid",))
    assert figures["kid_mean"] == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert figures["kid_std"] < 1e-5


class Folder(Dataset):
    """As torchvision's: (image, label) pairs; images of one channel."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return torch.from_numpy(self.images[i]).permute(2, 0, 1), 7


def test_forms_of_input_agree(digits):
    x, names = digits[0][:100], ("fid", "prc")
    reference = digits[0][100:250]
    expected = compute_metrics(x, reference, features="digits", metrics=names)
    for images in (
        x.repeat(3, axis=3),
        torch.from_numpy(x),
        Folder(x),
        TensorDataset(torch.from_numpy(x).permute(0, 3, 1, 2)),
    ):
        figures = compute_metrics(images, Folder(reference), features="digits", metrics=names, batch_size=33)
        assert figures == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("names", [("fid",), ("fid", "isc", "kid", "prc")])
def test_reference_is_read_once(digits, tmp_path, monkeypatch, names):
    class Counted(Folder):
        reads = 0

        def __getitem__(self, i):
            Counted.reads += 1
            return super().__getitem__(i)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    x, reference = digits[0], Counted(digits[0][100:300])
    other = tmp_path / "other.npz"
    other.write_bytes(DIGITS_WEIGHTS.read_bytes())
    figures = []
    for images in (x[:100], x[50:150]):
        for weights in (None, other):
            figures.append(compute_metrics(images, reference, features="digits", weights=weights, metrics=names))
    assert Counted.reads <= 2 * len(reference) + 8  # whole once for each file of weights; for its size image 0
    kept = Path(KEPT[reference].name)
    assert figures[0] == figures[1] and figures[2] == figures[3] != figures[0]
    again = Counted(digits[0][100:300])
    assert compute_metrics(x[50:150], again, features="digits", metrics=names) == figures[2]
    assert list(tmp_path.iterdir()) == [other] and list(kept.iterdir())
    del reference
    assert not kept.exists()


def test_quiet_no_cache_and_random_state_kept(digits, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    compute_metrics(digits[0][:40], digits[0][40:80], features="digits")
    assert torch.equal(before, torch.get_rng_state())
    assert numpy_before == np.random.get_state()[1].tolist()  # noqa: NPY002
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "images, options, message",
    [
        (images_of(1, 8, 8, 1), {"metrics": ("fid",)}, "fid needs at least 2 of each, got 1 generated and 9"),
        (images_of(0, 8, 8, 1), {"metrics": ("isc",)}, "isc needs at least 2 of each, got 0 generated"),
        (images_of(3, 8, 8, 1), {}, "prc needs at least 4 of each, got 3 generated"),
        (images_of(9, 8, 8, 1), {"metrics": ("fid", "ppl")}, "unknown metric 'ppl': choose from fid, isc, kid, prc"),
        (
            images_of(9, 8, 8, 1),
            {"features": "vgg"},
            "unknown features 'vgg': choose from inception, clip, vgg16",
        ),
        (images_of(9, 8, 8, 2), {}, "generated images must be uint8"),
        (images_of(9, 8, 8), {}, "generated images must be uint8"),
        (images_of(9, 8, 8, 1, dtype=np.float32), {}, "generated images must be uint8"),
        (images_of(9, 16, 16, 1), {}, "digits features need uint8 images .B, 3, 8, 8., got torch.uint8 .9, 3, 16, 16."),
    ],
)
def test_compute_metrics_refuses(images, options, message):
    reference = images_of(9, 8, 8, 1)
    with pytest.raises(ValueError, match=message) as caught:
        compute_metrics(images, reference, **{"features": "digits", **options})
    assert "\n" not in str(caught.value)


def test_images_of_different_sizes_are_refused():
    images = [images_of(8, 8, 1)] * 8 + [images_of(9, 8, 1)]
    with pytest.raises(ValueError, match="reference images must be of one size"):
        compute_metrics(images_of(9, 8, 8, 1), Folder(images), features="digits")


def test_metrics_line():
    figures = {"fid": 12.3, "is_mean": 8.123, "is_std": 0.1, "kid_mean": 0.012, "kid_std": 0.001}
    assert metrics.metrics_line(figures) == "FID 12.300  IS 8.12±0.10  KID 0.0120"
    figures = {"precision": 0.71, "recall": 0.65, "svc_accuracy": 0.973, "frechet_pixels": 1.12}
    assert metrics.metrics_line(figures) == "precision 0.71  recall 0.65  SVC accuracy 97.3%  Fréchet (pixels) 1.12"
    assert metrics.metrics_line({}) == ""


def test_a_row_is_a_metric(digits, monkeypatch):
    """It is computed, named where it is impossible, and shown; the others stay as they are."""

    def brightness(images, reference, row, extract):
        means = [np.concatenate([part for (part,) in extract(x, [row.layer])]).mean() for x in (images, reference)]
        return {"difference": means[0] - means[1]}

    monkeypatch.setitem(METRICS, "bright", Metric(3, False, {"bright_mean": "difference"}, brightness))
    x = digits[0]
    figures = compute_metrics(x[:300], x[300:700], features="digits", metrics=("fid", "bright"))
    expected = compute_metrics(x[:300], x[300:700], features="digits", metrics=("fid",))
    assert figures.keys() == {"fid", "bright_mean"} and figures["fid"] == expected["fid"]
    assert f"bright_mean {figures['bright_mean']:.4g}" in metrics_line(figures)
    assert "bright" in possible_metrics(None, "digits", from_stats=False)
    with pytest.raises(ValueError, match="bright needs at least 3 of each"):
        compute_metrics(x[:2], x[300:700], features="digits", metrics=("bright",))
    with pytest.raises(ValueError, match="bright needs the reference images"):  # of its own passes over them
        possible_metrics(("bright",), "digits", from_stats=True)
    monkeypatch.setitem(METRICS, "bright", METRICS["bright"]._replace(on_request=True))
    assert "bright" not in possible_metrics(None, "digits", from_stats=False)
