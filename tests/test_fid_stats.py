"""Statistics files: moments, FID from a file, what the program writes, and files that are damaged or malicious."""

from pathlib import Path

import numpy as np
import pytest
import torch

from scripts import make_fid_stats
from tests.helpers import Malicious, image_folder
from util.evaluation.features import RGBImages, feature_batches
from util.evaluation.fid_stats import FIDStats, Moments, compute_fid_stats, load_fid_stats, save_fid_stats
from util.evaluation.metrics import compute_metrics, gaussian_statistics
from util.images.datasets import build_dataset


@pytest.mark.parametrize("sizes", [[40], [1, 39], [7, 7, 7, 19]])
def test_moments_are_those_of_all_rows_at_once(sizes):
    """However the rows are split into batches, and far from zero."""
    x = np.random.default_rng(0).standard_normal((40, 5)).astype(np.float32) + np.float32(1000)
    moments = Moments()
    for part in np.split(x, np.cumsum(sizes)[:-1]):
        moments.update(torch.from_numpy(part))
    for ours, theirs in zip(moments.result(), gaussian_statistics(x)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)


def test_moments_need_two_rows():
    moments = Moments()
    moments.update(torch.ones(1, 3))
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        moments.result()


def test_fid_from_a_file_is_fid_from_the_images(digits, tmp_path):
    """torch-fidelity against both sets, and against the statistics of one of them: FID and IS are the same."""
    made, real = digits[:300], digits[300:700]
    save_fid_stats(tmp_path / "new" / "a.npz", compute_fid_stats(real, "digits", batch_size=33))
    stats = load_fid_stats(tmp_path / "new" / "a.npz")
    assert (stats.num_images, stats.features, stats.mu.shape, stats.sigma.shape) == (400, "digits", (64,), (64, 64))
    figures = compute_metrics(made, stats, features="digits", batch_size=77)
    expected = compute_metrics(made, real, features="digits", metrics=("fid", "isc"))
    assert figures == pytest.approx(expected, rel=1e-3) and figures["fid"] > 0.01
    itself = compute_metrics(real, stats, features="digits", metrics=("fid",))
    assert itself == {"fid": pytest.approx(0, abs=1e-9)}
    assert compute_metrics(real, stats, features="digits", metrics=("isc",)).keys() == {"is_mean", "is_std"}


def test_the_program_makes_plain_arrays_and_nothing_else(stats_file, digits):
    assert [p.name for p in stats_file.parent.iterdir()] == ["digits.npz"]
    with np.load(stats_file, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    assert arrays.keys() == {"mu", "sigma", "num_images", "features", "img_size", "split"}
    assert [arrays[k].item() for k in ("num_images", "features", "img_size", "split")] == [1797, "digits", 8, "train"]
    features = np.concatenate([f.numpy() for (f,) in feature_batches(RGBImages(digits, "all"), "digits")])
    mu, sigma = gaussian_statistics(features)
    np.testing.assert_allclose(arrays["mu"], mu, rtol=1e-6)
    np.testing.assert_allclose(arrays["sigma"], sigma, rtol=1e-5, atol=1e-8)


def test_statistics_of_a_folder_at_another_size_and_of_the_other_split(tmp_path, monkeypatch, capsys):
    folder = image_folder(tmp_path / "images", {"train": 6, "val": 4})
    flags = ["--data_path", str(folder), "--img_size", "8", "--features", "digits"]
    out = tmp_path / "val.npz"
    assert make_fid_stats.main([*flags, "--split", "val", "--out", str(out)]) == 0
    assert "digits features of 8 val images of imagefolder at 8x8" in capsys.readouterr().out
    stats = load_fid_stats(out)
    assert (stats.num_images, stats.img_size, stats.split) == (8, 8, "val")
    expected = compute_fid_stats(build_dataset("imagefolder", data_path=folder, img_size=8, split="val"), "digits")
    np.testing.assert_array_equal(stats.mu, expected.mu)

    monkeypatch.setattr(np, "savez", lambda file, **arrays: file.write(b"half") and 1 / 0)  # a crash while writing
    with pytest.raises(ZeroDivisionError):
        make_fid_stats.main([*flags, "--out", str(tmp_path / "train.npz")])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "val.npz"]


def test_adms_files_are_read_and_no_more_of_them_than_is_needed(tmp_path):
    """They also hold sFID's statistics and sample images; what is not needed may be anything."""
    mu, sigma = np.zeros(2048), np.eye(2048)
    extra = dict(mu_s=np.zeros(9), sigma_s=np.eye(9), arr_0=np.array([Malicious(tmp_path / "executed")], dtype=object))
    np.savez(tmp_path / "adm.npz", mu=mu, sigma=sigma, **extra)
    stats = load_fid_stats(tmp_path / "adm.npz")
    assert (stats.features, stats.num_images, stats.img_size) == (None, None, None)
    assert not (tmp_path / "executed").exists()
    stats.check("inception", 256)
    with pytest.raises(ValueError, match="adm.npz holds statistics of 2048 features, digits has 64"):
        stats.check("digits")


def damaged(damage: str, path: Path) -> None:
    """Write a statistics file that is no good in this way."""
    mu, sigma = np.zeros(4), np.eye(4)
    if damage in ("text", "truncated", "array"):
        np.savez(path, mu=mu, sigma=sigma)
        whole = path.read_bytes()
        path.write_bytes({"text": b"mu = 0", "truncated": whole[:300], "array": b""}[damage])
        if damage == "array":
            with open(path, "wb") as file:
                np.save(file, mu)
        return
    objects = np.array([Malicious(path.parent / "executed")] * 4, dtype=object)
    changes = {
        "objects": dict(mu=objects),
        "object features": dict(features=objects[:1]),
        "two features": dict(features=np.array(["a", "b"])),
        "no sigma": dict(sigma=None),
        "nan": dict(mu=mu * np.nan),
        "whole numbers": dict(mu=np.zeros(4, int)),
        "matrix mu": dict(mu=sigma),
        "other sizes": dict(sigma=np.eye(5)),
        "negative": dict(sigma=-np.eye(4)),
        "half": dict(sigma=np.triu(np.ones((4, 4))) + 4 * np.eye(4)),
        "indefinite": dict(sigma=np.ones((4, 4)) - 0.5 * np.eye(4)),
    }
    arrays = {"mu": mu, "sigma": sigma} | changes[damage]
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})


DAMAGES = ["text", "truncated", "array", "objects", "object features", "two features", "no sigma", "nan"]
DAMAGES += ["whole numbers", "matrix mu", "other sizes", "negative", "half", "indefinite"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_and_unsafe_statistics_are_one_line(damage, tmp_path):
    path = tmp_path / "bad.npz"
    damaged(damage, path)
    with pytest.raises(ValueError, match=r"bad\.npz refused: [^\n]+$"):
        load_fid_stats(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [3, 200])
def test_covariances_that_are_rounded_or_singular_are_read(n, dtype, tmp_path):
    """Of fewer images than features, and of features of very different sizes."""
    x = np.random.default_rng(0).normal(size=(n, 64)) * np.logspace(-4, 2, 64)
    np.savez(tmp_path / "s.npz", mu=x.mean(axis=0).astype(dtype), sigma=np.cov(x, rowvar=False).astype(dtype))
    assert load_fid_stats(tmp_path / "s.npz").sigma.shape == (64, 64)


def test_statistics_of_something_else_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no statistics at .*missing.npz"):
        load_fid_stats(tmp_path / "missing.npz")
    stats = FIDStats(np.zeros(64), np.eye(64), features="digits", img_size=8, source="a.npz")
    for call, message in (
        (lambda: stats.check("inception"), "a.npz holds statistics of digits features, not of inception"),
        (lambda: stats.check("digits", 16), "a.npz is of images of 8 pixels, those here have 16"),
        (lambda: FIDStats(np.zeros(9), np.eye(9)).check("digits"), "statistics of 9 features, digits has 64"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
