"""The reward of --objective image: its distance, the influence of one image on it, the bank of generated images."""

import numpy as np
import pytest
import torch

from tests.helpers import randn
from training.objectives.reward import RIDGE, Bank, Frechet, Reward
from util.evaluation.metrics import digit_metrics, frechet_distance, gaussian_statistics
from util.evaluation.reward import RewardDistance, pixel_distance, reward_weights
from util.images.datasets import MemoryDataset, build_dataset


def spread(n, d, seed):
    """Correlated rows (n, d), float64."""
    return (randn(n, d, seed=seed) @ randn(d, d, seed=seed + 1) + randn(1, d, seed=seed + 2)).double()


def real(d, seed=10):
    return Frechet(*gaussian_statistics(spread(200, d, seed)))


def test_the_pixel_distance_of_a_metric_is_the_rewards():
    """Of the digits it is that of `digit_metrics`; the reference is read once."""
    real = build_dataset("digits")
    images = torch.randint(0, 256, (90, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    made = MemoryDataset(images, torch.zeros(90, dtype=torch.long), ["0"], flip=False)
    distance = pixel_distance(made, real)
    array, labels = images.movedim(1, -1).numpy(), real.labels
    expected = digit_metrics(array, None, real.images.movedim(1, -1).numpy(), labels)["frechet_pixels"]
    assert distance == pytest.approx(expected, rel=1e-9)
    assert distance == RewardDistance(real, ("pixels", "digits"))(array)["pixels"]
    real.images = None
    assert pixel_distance(made, real) == distance


def test_the_distance_is_that_of_the_metrics_with_a_ridge():
    rows, reference = spread(50, 4, 0), gaussian_statistics(spread(200, 4, 10))
    ridge = RIDGE * np.trace(reference[1]) / 4 * np.eye(4)
    covariance = np.cov(rows.numpy(), rowvar=False, bias=True)
    expected = frechet_distance(rows.mean(0).numpy(), covariance + ridge, reference[0], reference[1] + ridge)
    assert Frechet(*reference)(rows)[0] == pytest.approx(expected, rel=1e-9)


def test_the_influence_function_has_the_gradient_of_the_distance():
    """∂c/∂f at a row of the bank is N times the gradient of F in this row, by central differences."""
    frechet, rows = real(3), spread(20, 3, 0)
    f = rows[:5].clone().requires_grad_()
    _, influence = frechet(rows)
    (slopes,) = torch.autograd.grad(influence(f).sum(), f)
    for row in range(5):
        for column in range(3):
            step = torch.zeros_like(rows)
            step[row, column] = 1e-4
            difference = (frechet(rows + step)[0] - frechet(rows - step)[0]) / 2e-4
            assert slopes[row, column].item() == pytest.approx(len(rows) * difference, rel=1e-4, abs=1e-6)


def test_the_influence_function_of_gaussians_in_closed_form():
    """In one dimension F = (μ − μ_r)² + (σ − σ_r)², so c(f) = 2 (μ − μ_r)(f − μ) + (1 − σ_r / σ)(f − μ)²."""
    frechet = Frechet(np.array([0.5]), np.array([[4.0]]))
    rows = torch.tensor([[2.0], [3.0], [7.0], [8.0]], dtype=torch.float64)
    deviation, goal = (rows.var(correction=0) + 4 * RIDGE).sqrt(), (4 + 4 * RIDGE) ** 0.5
    distance, influence = frechet(rows)
    assert distance == pytest.approx((5 - 0.5) ** 2 + (deviation.item() - goal) ** 2)
    f = torch.linspace(-3, 9, 7, dtype=torch.float64)
    expected = 2 * 4.5 * (f - 5) + (1 - goal / deviation) * (f - 5) ** 2
    torch.testing.assert_close(influence(f.unsqueeze(1)), expected)


def test_images_like_the_real_ones_have_no_influence():
    rows = spread(500, 4, 10)
    distance, influence = Frechet(rows.mean(0), np.cov(rows.numpy(), rowvar=False, bias=True))(rows)
    assert distance < 1e-9 and influence(rows).abs().max() < 1e-6


@pytest.mark.parametrize("sizes", [[4, 3, 5, 1], [1] * 12, [12], [30, 2]])
def test_the_bank_has_the_last_images(sizes):
    bank, rows = Bank(10), torch.arange(float(sum(sizes))).unsqueeze(1)
    for number, part in enumerate(rows.split(sizes)):
        bank.push(part)
        assert bank.is_full == (sum(sizes[: number + 1]) >= 10)
        kept = rows[: sum(sizes[: number + 1])][-10:]
        assert sorted(bank.rows.flatten().tolist()) == kept.flatten().tolist()


def test_features_are_those_of_the_measurement_and_have_a_gradient():
    """Of pictures of 8 bits the path with a gradient gives what RewardDistance measures."""
    data = build_dataset("digits")
    images = data.images[:40]
    reward, measured = Reward(data, ("digits", "pixels"), "cpu"), RewardDistance(data, ("digits", "pixels"))
    x = (images.float() / 127.5 - 1).requires_grad_()
    parts = reward.split(reward.features(x))
    for kind, part in parts.items():
        rows = measured.rows(images.movedim(1, -1).numpy(), kind) @ measured.real[kind][0]
        np.testing.assert_allclose(part.detach().numpy(), rows, rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(sum(part.sum() for part in parts.values()), x)
    assert (gradient != 0).any(dim=(1, 2, 3)).all()
    with pytest.raises(ValueError, match="bank of the checkpoint has 3 features, --reward has 128"):
        reward.split(torch.zeros(2, 3))


def test_colour_pixels_are_flattened_as_the_measurement_does():
    pixels = torch.randint(0, 256, (6, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = [(image, 0, i) for i, image in enumerate(pixels)]
    reward, measured = Reward(data, ("pixels",), "cpu"), RewardDistance(data, ("pixels",))
    rows = measured.rows(pixels.movedim(1, -1).numpy(), "pixels") @ measured.real["pixels"][0]
    np.testing.assert_allclose(reward.features(pixels.float() / 127.5 - 1).numpy(), rows, atol=1e-5)


def test_weights():
    assert reward_weights(None, ("digits", "pixels")) == {"digits": 1.0, "pixels": 1.0}
    assert reward_weights("1,4", ("digits", "pixels")) == {"digits": 1.0, "pixels": 4.0}
    for text in ("1", "1,0", "1,nan", "a,b", "1,2,3", ""):
        with pytest.raises(
            ValueError, match="--reward_weights must be 2 numbers above 0, one for each of digits,pixels"
        ):
            reward_weights(text, ("digits", "pixels"))
