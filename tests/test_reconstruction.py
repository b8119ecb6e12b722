"""How well tokenizers reconstruct: PSNR, SSIM and rFID against closed forms, and the program that measures them."""

import re
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d

from models.tokenizers import measuring
from scripts import measure_reconstruction, train_classifier
from tests.helpers import image_folder
from tests.helpers_ids import GreyIds
from tests.helpers_tokenizers import TINY
from tests.test_cli import refused
from tests.test_sample import rows
from util.evaluation.features import RGBImages, feature_batches
from util.evaluation.fid_stats import compute_fid_stats
from util.evaluation.metrics import compute_metrics, frechet_distance, gaussian_statistics
from util.evaluation.protocol import class_balance
from util.evaluation.reconstruction import (
    PSNR_MAX,
    ReconstructionFID,
    codebook_scores,
    psnr,
    score_reconstructions,
    ssim,
)
from util.images.datasets import build_dataset


def noise(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def test_psnr_closed_forms():
    x = noise(3, 2, 9, 9).clamp(max=200)
    y = x.clone()
    y[1] += 5  # mse 25
    y[2, 0] += 10  # mse 50
    expected = [PSNR_MAX, 20 * np.log10(255 / 5), 20 * np.log10(255 / np.sqrt(50))]
    assert psnr(x, y).tolist() == pytest.approx(expected)
    assert psnr(torch.zeros(1, 1, 4, 4), torch.full((1, 1, 4, 4), 255)).item() == pytest.approx(0)


def test_ssim_closed_forms():
    x, y = noise(2, 3, 24, 20), noise(2, 3, 24, 20, seed=1)
    assert ssim(x, x).tolist() == pytest.approx([1, 1])
    torch.testing.assert_close(ssim(x, y), ssim(y, x))
    assert ssim(x, y).abs().max() < 0.2  # nothing in common
    a, b, c1 = 60.0, 180.0, 6.5025
    flat = ssim(torch.full((1, 1, 16, 16), a), torch.full((1, 1, 16, 16), b))
    assert flat.item() == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1))
    assert ssim(x, 255 - x).max() < 0  # the structure is inverted
    near = ssim(x, (x.int() + 4).clamp(max=255))
    assert (ssim(x, y) < near).all() and (near < 1).all()


@pytest.mark.parametrize("size, window", [(24, 11), (11, 11), (8, 7), (3, 3)])
def test_ssim_is_wangs_equation(size, window):
    """The equation with scipy's filters; in images smaller than the window, the largest odd one that fits."""
    x, y = noise(1, 1, size, size).double(), noise(1, 1, size, size, seed=1).double()
    y = (x + y) / 2
    kernel = np.exp(-((np.arange(window) - window // 2) ** 2) / (2 * 1.5**2))
    inside = slice(window // 2, size - window // 2)

    def mean(image):
        for axis in (0, 1):
            image = correlate1d(image, kernel / kernel.sum(), axis=axis)
        return image[inside, inside]

    p, q = x[0, 0].numpy(), y[0, 0].numpy()
    mp, mq = mean(p), mean(q)
    vp, vq, c = mean(p**2) - mp**2, mean(q**2) - mq**2, mean(p * q) - mp * mq
    expected = (2 * mp * mq + 6.5025) * (2 * c + 58.5225) / ((mp**2 + mq**2 + 6.5025) * (vp + vq + 58.5225))
    assert ssim(x, y).item() == pytest.approx(expected.mean(), rel=1e-9)


class Rounding(torch.nn.Module):
    """A tokenizer that keeps four grey levels."""

    stride, channels, fingerprint = 1, 1, "rounding"

    def __init__(self):
        super().__init__()
        self.levels = torch.nn.Parameter(torch.tensor(1.5))

    def encode(self, images, sample=True, generator=None):
        assert not sample  # the mean of the distribution, not a draw from it
        return (images * self.levels - 0.5).round() + 0.5

    def decode(self, latents):
        return latents / self.levels


def test_reconstruction_figures_are_those_of_the_images(digits):
    """In batches as all at once: rFID from compute_metrics' distance, PSNR and SSIM of the rounded images."""
    real = torch.from_numpy(digits[:200]).permute(0, 3, 1, 2)
    images = torch.utils.data.TensorDataset(real)
    scores = score_reconstructions(Rounding(), images, ReconstructionFID("digits"), batch_size=33)
    made = Rounding().decode(Rounding().encode(real / 127.5 - 1, sample=False))
    made = ((made + 1) * 127.5).round().to(torch.uint8)
    assert len(made.unique()) == 4
    by_images = compute_metrics(made.permute(0, 2, 3, 1), digits[:200], features="digits", metrics=("fid",))
    assert scores["rfid"] == pytest.approx(by_images["fid"], rel=1e-3) and scores["rfid"] > 0.001
    assert scores["psnr"] == pytest.approx(psnr(made, real).mean().item())
    assert scores["ssim"] == pytest.approx(ssim(made, real).mean().item())
    stats = compute_fid_stats(digits[200:], "digits")
    against = score_reconstructions(Rounding(), images, ReconstructionFID("digits", stats=stats))
    moved = [
        np.concatenate([f.numpy() for (f,) in feature_batches(RGBImages(x, "x"), "digits")])
        for x in (made.permute(0, 2, 3, 1), digits[200:])
    ]
    expected = frechet_distance(*gaussian_statistics(moved[0]), *gaussian_statistics(moved[1]))
    assert against["rfid"] == pytest.approx(expected, rel=1e-4)


def test_usage_and_perplexity_are_those_of_the_ids(digits):
    """Closed forms, and of a tokenizer of ids alone the images that its ids decode to."""
    assert codebook_scores(torch.full((8,), 3)) == pytest.approx(dict(usage=1.0, perplexity=8.0))
    assert codebook_scores(torch.tensor([5, 0, 0, 0])) == pytest.approx(dict(usage=0.25, perplexity=1.0))
    assert codebook_scores(torch.tensor([1, 1, 2, 0]))["perplexity"] == pytest.approx(2 * 2**0.5)
    real = torch.from_numpy(digits[:50]).permute(0, 3, 1, 2)
    scores = score_reconstructions(GreyIds(), torch.utils.data.TensorDataset(real), None, batch_size=33)
    ids = GreyIds().encode_ids(real / 127.5 - 1)
    assert scores.keys() == {"psnr", "ssim", "usage", "perplexity"}
    assert scores["usage"] == len(ids.unique()) / GreyIds().codebook_size
    assert scores["perplexity"] == pytest.approx(codebook_scores(ids.flatten().bincount())["perplexity"])
    made = ((GreyIds().decode_ids(ids) + 1) * 127.5).round().to(torch.uint8)
    assert scores["psnr"] == pytest.approx(psnr(made, real).mean().item())


def test_what_cannot_be_compared_is_refused(digits):
    images = torch.utils.data.TensorDataset(torch.from_numpy(digits[:4]).permute(0, 3, 1, 2))
    other = replace(compute_fid_stats(digits[:4], "digits"), features="inception")
    with pytest.raises(ValueError, match="holds statistics of inception features, not of digits"):
        score_reconstructions(Rounding(), images, ReconstructionFID("digits", stats=other))
    tokenizer = Rounding()
    tokenizer.decode = lambda latents: latents[..., :4]
    with pytest.raises(ValueError, match=r"images of another shape: \(1, 8, 4\) from \(1, 8, 8\)"):
        score_reconstructions(tokenizer, images, None)


def test_the_program_measures_once_and_says_reconstruction(tmp_path, monkeypatch, capsys):
    base = ["--tokenizer", "pixel", "--data", "digits", "--features", "digits"]
    base += ["--output_dir", str(tmp_path)]
    assert measure_reconstruction.main([*base, "--num_images", "50"]) == 0
    (row,) = rows(tmp_path)
    assert row["kind"] == "reconstruction"
    assert row["metrics"] == {"rfid": pytest.approx(0, abs=1e-9), "psnr": PSNR_MAX, "ssim": pytest.approx(1)}
    record = row["protocol"]
    expected = dict(kind="reconstruction", num_images=50, num_reference=50, ema=None)
    assert {key: record[key] for key in expected} == expected
    labels = build_dataset("digits").labels.tolist()
    assert record["balance"] == class_balance([labels[i * 1797 // 50] for i in range(50)])
    assert "reconstruction of 50 images" in capsys.readouterr().out

    monkeypatch.setattr(measure_reconstruction, "score_reconstructions", lambda *a, **k: pytest.fail("measured again"))
    assert measure_reconstruction.main([*base, "--num_images", "50"]) == 0
    assert len(rows(tmp_path)) == 1 and "already in" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setattr(measuring, "tokenizer_of", lambda settings, channels: Rounding())
    assert measure_reconstruction.main([*base, "--num_images", "50", "--no_rfid"]) == 0
    second = rows(tmp_path)[1]
    assert second["metrics"].keys() == {"psnr", "ssim"} and second["weights"] != row["weights"]
    assert re.search(r"pixel: PSNR \d+\.\d+ dB  SSIM 0\.\d+\n", capsys.readouterr().out)


def test_another_classifiers_figures_are_another_line(tmp_path):
    other = tmp_path / "other.npz"
    assert train_classifier.main(["--seed", "1", "--epochs", "1", "--output", str(other)]) == 0
    base = ["--tokenizer", "pixel", "--data", "digits", "--features", "digits", "--num_images", "50"]
    base += ["--output_dir", str(tmp_path)]
    for flags in ([], ["--fid_weights", str(other)], []):
        assert measure_reconstruction.main([*base, *flags]) == 0
    first, second = rows(tmp_path)
    assert [row["protocol"]["features"] for row in (first, second)] == ["digits", f"digits of {other}"]
    assert "fid_weights" not in first["settings"] and second["settings"]["fid_weights"] == str(other)
    assert train_classifier.main(["--seed", "2", "--epochs", "1", "--output", str(other)]) == 0  # replaced
    assert measure_reconstruction.main([*base, "--fid_weights", str(other)]) == 0 and len(rows(tmp_path)) == 3


def test_an_autoencoder_is_measured_on_a_folder(tmp_path, capsys):
    """An untrained one, in two precisions and on two splits: as many lines, none of them good."""
    folder = image_folder(tmp_path / "images", {"train": 3, "val": 2})
    diffusers.AutoencoderKL(**TINY["AutoencoderKL"][0]).save_pretrained(tmp_path / "vae")
    base = ["--tokenizer", f"diffusers:{tmp_path / 'vae'}", "--data_path", str(folder), "--img_size", "8"]
    base += ["--features", "digits", "--output_dir", str(tmp_path / "out")]
    full, val = ["--dtype", "fp32"], ["--split", "val"]
    for flags in (full, [*full, *val], ["--dtype", "bf16"], [*full, *val]):
        assert measure_reconstruction.main([*base, *flags]) == 0
    lines = rows(tmp_path / "out")
    said = [(r["protocol"]["num_images"], r["protocol"]["dtype"]) for r in lines]
    assert said == [(6, "fp32"), (4, "fp32"), (6, "bf16")]
    for row in lines:
        assert 0 < row["metrics"]["psnr"] < 20 and row["metrics"]["rfid"] > 0 and -1 <= row["metrics"]["ssim"] < 0.9
    odd = [*base[:4], "--img_size", "9", *base[6:]]
    assert "9" in refused(measure_reconstruction.main, odd, capsys)
