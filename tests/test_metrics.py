"""Metrics: closed forms, agreement with torch-fidelity, the digit classifier, and weights that must not be trusted."""

import os
import pickle
import shutil
import socket
from contextlib import suppress
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch.utils.data import Dataset, TensorDataset

from scripts import train_digits_classifier
from util import metrics
from util.classifiers import DIGITS_WEIGHTS, DigitClassifier, load_classifier
from util.features import check_features
from util.metrics import compute_metrics, digit_metrics, frechet_distance, gaussian_statistics


@pytest.fixture(scope="module")
def digits():
    """The real digits in random order: uint8 (1797, 8, 8, 1) and labels (1797,)."""
    data = load_digits()
    rows = np.random.default_rng(0).permutation(len(data.target))
    return np.round(data.images * 255 / 16).astype(np.uint8)[rows, :, :, None], data.target[rows]


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """torch-fidelity's Inception with random weights, in a file as its own: 90 MB, removed afterwards."""
    from torch_fidelity import feature_extractor_inceptionv3 as fidelity

    class Untrained(fidelity.FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict):
            pass

    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *args, **kwargs: {})
        torch.manual_seed(0)
        net = Untrained("untrained", ["2048"])
        for name, value in net.named_parameters():  # the default initialisation shrinks features to 1e-6
            if name.endswith("conv.weight"):
                torch.nn.init.kaiming_normal_(value)
    torch.save(net.state_dict(), path)
    yield path
    path.unlink()


def covariance(rng, d, rank=None):
    factor = rng.standard_normal((d, rank or d))
    return factor @ factor.T


# Fréchet distance


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 12), st.floats(0, 5), st.floats(0, 5))
def test_frechet_closed_form_isotropic(seed, d, s1, s2):
    mu1, mu2 = np.random.default_rng(seed).standard_normal((2, d))
    expected = np.sum((mu1 - mu2) ** 2) + d * (s1 - s2) ** 2
    assert frechet_distance(mu1, s1**2 * np.eye(d), mu2, s2**2 * np.eye(d)) == pytest.approx(expected, abs=1e-9)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 12))
def test_frechet_is_symmetric_and_keeps_rotations(seed, d):
    rng = np.random.default_rng(seed)
    (mu1, mu2), s1, s2 = rng.standard_normal((2, d)), covariance(rng, d), covariance(rng, d, rank=max(1, d // 2))
    q = np.linalg.qr(rng.standard_normal((d, d)))[0]
    distance = frechet_distance(mu1, s1, mu2, s2)
    assert distance > 0
    assert frechet_distance(mu2, s2, mu1, s1) == pytest.approx(distance, rel=1e-9)
    assert frechet_distance(q @ mu1, q @ s1 @ q.T, q @ mu2, q @ s2 @ q.T) == pytest.approx(distance, rel=1e-6)


@pytest.mark.parametrize("rank", [1, 5, 64])
def test_frechet_of_identical_gaussians_is_zero(rank):
    rng = np.random.default_rng(rank)
    mu, sigma = rng.standard_normal(64), covariance(rng, 64, rank)
    assert 0 <= frechet_distance(mu, sigma, mu, sigma) < 1e-9 * np.trace(sigma)


def test_frechet_singular_covariances():
    # commuting, diagonal: sum of (sqrt a - sqrt b)², also where one or both are zero
    a, b = np.array([4.0, 0, 9, 0]), np.array([1.0, 16, 0, 0])
    assert frechet_distance(np.zeros(4), np.diag(a), np.zeros(4), np.diag(b)) == pytest.approx(1 + 16 + 9, abs=1e-9)
    # rank one, u u' and v v': |u|² + |v|² - 2 |u·v|
    u, v = np.random.default_rng(0).standard_normal((2, 50))
    expected = u @ u + v @ v - 2 * abs(u @ v)
    assert frechet_distance(np.zeros(50), np.outer(u, u), np.zeros(50), np.outer(v, v)) == pytest.approx(expected)


def test_frechet_and_statistics_of_one_dimension():
    mu, sigma = gaussian_statistics([[1.0], [3.0]])
    assert mu.tolist() == [2.0] and sigma.tolist() == [[2.0]]
    assert frechet_distance(mu, sigma, mu + 3, 4 * sigma) == pytest.approx(9 + 2)


def test_statistics_are_those_of_numpy():
    x = np.random.default_rng(0).standard_normal((30, 4)).astype(np.float32)
    mu, sigma = gaussian_statistics(x)
    centred = x.astype(np.float64) - x.astype(np.float64).mean(axis=0)
    assert mu.dtype == sigma.dtype == np.float64
    np.testing.assert_allclose(sigma, centred.T @ centred / 29)


@pytest.mark.parametrize(
    "call",
    [
        lambda: gaussian_statistics(np.zeros((1, 4))),
        lambda: gaussian_statistics(np.zeros(4)),
        lambda: frechet_distance(np.zeros(3), np.eye(3), np.zeros(4), np.eye(4)),
        lambda: frechet_distance(np.zeros(3), np.zeros(3), np.zeros(3), np.zeros(3)),
        lambda: frechet_distance(np.full(3, np.nan), np.eye(3), np.zeros(3), np.eye(3)),
    ],
)
def test_frechet_refuses(call):
    with pytest.raises(ValueError, match="^[^\n]+$"):
        call()


# Digits


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


def test_committed_classifier(digits):
    assert DIGITS_WEIGHTS.stat().st_size <= 300_000
    with np.load(DIGITS_WEIGHTS, allow_pickle=False) as arrays:
        assert {arrays[name].dtype for name in arrays.files} == {np.dtype(np.float32)}
    x, y = train_digits_classifier.load_images()
    net = load_classifier()
    features, logits = net(x)
    assert features.shape == (1797, 64) and logits.shape == (1797, 10)
    assert features.square().mean().sqrt().item() == pytest.approx(1, abs=1e-3)
    assert train_digits_classifier.accuracy(net, x, y) >= 0.98


def test_training_script(tmp_path, capsys):
    before, output = torch.get_rng_state(), tmp_path / "new" / "net.npz"
    assert train_digits_classifier.main(["--epochs", "2", "--output", str(output)]) == 0
    assert "held-out accuracy" in capsys.readouterr().out
    assert list(output.parent.iterdir()) == [output]  # no partial file left
    x, y = train_digits_classifier.load_images()
    assert train_digits_classifier.accuracy(load_classifier(DigitClassifier, output), x, y) > 0.5
    first, second = (train_digits_classifier.train(x[:200], y[:200], 2, seed=3).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(before, torch.get_rng_state())


def test_augmentation_shifts_by_at_most_one_pixel():
    x = torch.full((200, 1, 8, 8), -1.0)
    x[:, 0, 3, 4] = 9.0  # far above the noise
    shifted = train_digits_classifier.augment(x, torch.Generator().manual_seed(0))
    found = {divmod(i, 8) for i in shifted.flatten(1).argmax(1).tolist()}
    assert found == {(row, column) for row in (2, 3, 4) for column in (3, 4, 5)}


# torch-fidelity with digit features


def digit_features(x):
    return load_classifier()(torch.from_numpy(x).permute(0, 3, 1, 2) / 127.5 - 1)[0].numpy()


def test_all_metrics_of_half_the_digits_against_the_rest(digits):
    x, _ = digits
    found = compute_metrics(x[:300], x[300:700], features="digits")
    assert list(found) == ["fid", "is_mean", "is_std", "kid_mean", "kid_std", "precision", "recall"]
    assert all(type(value) is float for value in found.values())
    assert found["fid"] < 0.5 and abs(found["kid_mean"]) < 0.02
    assert found["is_mean"] > 8 and found["precision"] > 0.8 and found["recall"] > 0.8
    ours = frechet_distance(
        *gaussian_statistics(digit_features(x[:300])), *gaussian_statistics(digit_features(x[300:700]))
    )
    assert found["fid"] == pytest.approx(ours, rel=1e-3)
    noise = np.random.default_rng(0).integers(0, 256, (300, 8, 8, 1), dtype=np.uint8)
    bad = compute_metrics(noise, x[300:700], features="digits")
    assert bad["fid"] > 20 * found["fid"] and bad["kid_mean"] > 20 * abs(found["kid_mean"])
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
    found = compute_metrics(x[:n], x[n : 2 * n], features="digits", metrics=("kid",))
    assert found["kid_mean"] == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert found["kid_std"] < 1e-5


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
        found = compute_metrics(images, Folder(reference), features="digits", metrics=names, batch_size=33)
        assert found == pytest.approx(expected, rel=1e-3)


def test_quiet_no_cache_and_random_state_kept(digits, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    compute_metrics(digits[0][:40], digits[0][40:80], features="digits")
    assert torch.equal(before, torch.get_rng_state())
    assert numpy_before == np.random.get_state()[1].tolist()  # noqa: NPY002
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def images_of(*shape, dtype=np.uint8):
    return np.zeros(shape, dtype)


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


# Weights


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize(
    "write", [torch.save, lambda thing, path: Path(path).write_bytes(pickle.dumps(thing, protocol=2))]
)
def test_pickles_are_refused_and_not_run(tmp_path, write):
    file, target = tmp_path / "weights.pth", tmp_path / "executed"
    write({"fc.weight": Malicious(str(target))}, file)
    for call in (check_features, lambda *args: compute_metrics(*2 * (images_of(4, 8, 8, 3),), weights=args[1])):
        with pytest.raises(ValueError, match="weights.pth refused") as caught:
            call("inception", file)
        assert "\n" not in str(caught.value) and not target.exists()
    with suppress(RuntimeError):
        torch.load(file, weights_only=False)  # what it does to those who trust it
    assert target.exists()


def test_other_weights_are_refused(tmp_path, inception_file):
    file = tmp_path / "weights.pth"
    with pytest.raises(ValueError, match="no inception weights at .*weights.pth"):
        check_features("inception", file)
    file.write_bytes(inception_file.read_bytes()[:100_000])
    with pytest.raises(ValueError, match="weights.pth refused"):
        check_features("inception", file)
    torch.save({"fc.weight": torch.zeros(3)}, file)
    with pytest.raises(ValueError, match="weights.pth refused") as caught:
        check_features("inception", file)
    assert "\n" not in str(caught.value)


def test_no_weights_and_no_network(tmp_path, monkeypatch, capfd):
    def unreachable(*args, **kwargs):
        assert socket.getdefaulttimeout() == 10
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(
        ValueError, match="no network.*no route to host.*--fid_weights FILE.*--features digits"
    ) as caught:
        check_features("inception")
    assert "\n" not in str(caught.value)
    assert socket.getdefaulttimeout() is None
    assert capfd.readouterr() == ("", "")
    check_features("digits")


def test_weights_are_downloaded_to_torch_hub_once(tmp_path, monkeypatch, inception_file):
    calls = []

    def download(url, target, **kwargs):
        calls.append(url)
        shutil.copy(inception_file, target)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    for _ in range(2):
        assert check_features("inception") == str(tmp_path / "checkpoints" / calls[0].rsplit("/", 1)[1])
    assert len(calls) == 1
    shutil.rmtree(tmp_path / "checkpoints")


def tiny_images(seed):
    return np.random.default_rng(seed).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8) // (1 + seed)


def test_inception_features(inception_file):
    names = ("isc", "kid", "prc")
    found = compute_metrics(tiny_images(0), tiny_images(1), weights=inception_file, metrics=names)
    assert list(found) == ["is_mean", "is_std", "kid_mean", "kid_std", "precision", "recall"]
    assert np.isfinite(list(found.values())).all() and found["is_mean"] >= 1


@pytest.mark.slow  # eigenvalues of 2048 x 2048 matrices
def test_inception_fid(inception_file):
    from torch_fidelity.utils import create_feature_extractor

    net = create_feature_extractor(
        "inception-v3-compat", ["2048"], cuda=False, feature_extractor_weights_path=inception_file, verbose=False
    )
    sets = [tiny_images(0), tiny_images(1)]
    statistics = [gaussian_statistics(net(torch.from_numpy(x).permute(0, 3, 1, 2))[0].numpy()) for x in sets]
    expected = frechet_distance(*statistics[0], *statistics[1])
    found = compute_metrics(*sets, weights=inception_file, metrics=("fid",), batch_size=8)
    assert found == {"fid": pytest.approx(expected, rel=1e-3)}


def test_metrics_line():
    figures = {"fid": 12.3, "is_mean": 8.123, "is_std": 0.1, "kid_mean": 0.012, "kid_std": 0.001}
    assert metrics.metrics_line(figures) == "FID 12.300  IS 8.12±0.10  KID 0.0120"
    figures = {"precision": 0.71, "recall": 0.65, "svc_accuracy": 0.973, "frechet_pixels": 1.12}
    assert metrics.metrics_line(figures) == "precision 0.71  recall 0.65  SVC accuracy 97.3%  Fréchet (pixels) 1.12"
    assert metrics.metrics_line({}) == ""
