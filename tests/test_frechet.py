"""The Fréchet distance and the statistics it is of: closed forms, symmetry, singular covariances, bad input."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from util.evaluation.metrics import frechet_distance, gaussian_statistics


def covariance(rng, d, rank=None):
    factor = rng.standard_normal((d, rank or d))
    return factor @ factor.T


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
