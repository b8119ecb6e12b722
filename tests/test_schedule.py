"""The noise schedule: betas, timesteps of every spacing, numbers of steps as texts, and respaced tables."""

import math

import numpy as np
import pytest
import torch

from diffusion import gaussian
from diffusion.schedule import (
    LAST_STABLE,
    MAX_BETA,
    NUM_TRAIN_STEPS,
    SPACINGS,
    cosine_betas,
    cosine_schedule,
    num_steps_setting,
    spaced_timesteps,
    step_range,
)
from tests.helpers_diffusion import inputs


def test_cosine_betas():
    betas = cosine_betas()
    assert betas.shape == (1000,) and betas.dtype == np.float64
    assert (betas > 0).all() and betas.max() == MAX_BETA == 0.999
    alphas_cumprod = cosine_schedule().alphas_cumprod
    assert (np.diff(alphas_cumprod) < 0).all() and 0 < alphas_cumprod[-1] and alphas_cumprod[0] < 1
    unclipped = betas < MAX_BETA  # up to the first clipped beta the product telescopes to the cosine itself
    f = np.cos((np.arange(1, 1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(alphas_cumprod[unclipped], f[unclipped], rtol=1e-9)
    assert unclipped.sum() > 990


def test_timesteps_are_ascending_even_and_include_both_ends():
    for num_steps in range(1, NUM_TRAIN_STEPS + 1):
        timesteps = spaced_timesteps(num_steps)
        assert len(timesteps) == num_steps and timesteps[0] == (0 if num_steps > 1 else LAST_STABLE)
        gaps = np.diff(timesteps)
        if num_steps > 1:
            assert timesteps[-1] == 999 and gaps.min() >= 1 and gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_of_every_spacing_are_different_ones_that_the_network_knows(spacing):
    for num_steps in (*range(1, 60), 250, 700, 990, 999, 1000):
        timesteps = spaced_timesteps(num_steps, spacing)
        assert timesteps.dtype == np.int64 and len(timesteps) == num_steps
        assert (
            timesteps[0] == (0 if num_steps > 1 else LAST_STABLE)
            and timesteps[-1] <= 999
            and (np.diff(timesteps) >= 1).all()
        )
        if spacing != "uniform" and 1 < num_steps <= LAST_STABLE:
            assert timesteps[-1] == LAST_STABLE
    assert (spaced_timesteps(1000, spacing) == np.arange(1000)).all()


def test_logsnr_spacing_is_even_in_logsnr_and_quadratic_in_the_root():
    kept = np.cumprod(1 - cosine_betas())
    t = spaced_timesteps(12, "logsnr")[1:-1]
    gaps = np.diff(0.5 * np.log(kept / (1 - kept))[t])
    assert gaps.std() < 0.05 * abs(gaps.mean())
    gaps = np.diff(np.sqrt(spaced_timesteps(20, "quadratic")))[1:]
    assert gaps.std() < 0.05 * gaps.mean()


@pytest.mark.parametrize("text, ends", [(100, (100, 100)), ("7", (7, 7)), ("50:5", (50, 5)), ("5:50", (5, 50))])
def test_texts_of_diffusion_steps(text, ends):
    assert step_range(text) == ends
    assert step_range(num_steps_setting(text)) == ends
    assert num_steps_setting("05:5") == num_steps_setting("5") == 5  # one form


@pytest.mark.parametrize("text", ["", ":", "5:", "1:2:3", "0:5", "50:1001", "5.0", "-1", 0, "a:b", "5;4", "٥0:x"])
def test_texts_that_are_no_diffusion_steps(text):
    with pytest.raises(ValueError, match="num_sampling_steps must be a whole number between 1 and 1000, or two") as e:
        step_range(text)
    assert repr(text) in str(e.value)


def test_a_schedule_is_made_once_however_many_there_are():
    """A capture on a GPU is known by its schedule."""
    made = [cosine_schedule(num_steps) for num_steps in range(2, 202)]
    assert all(cosine_schedule(num_steps) is schedule for num_steps, schedule in zip(range(2, 202), made))


@pytest.mark.parametrize("num_steps", [0, -1, 1001])
def test_impossible_numbers_of_steps(num_steps, diffloss):
    with pytest.raises(ValueError, match=str(num_steps)):
        spaced_timesteps(num_steps)
    if num_steps > 0:
        z, _, noise = inputs(num_steps=num_steps)
        with pytest.raises(ValueError, match=str(num_steps)):
            diffloss.sample(z, num_steps=num_steps, noise=noise)


@pytest.mark.parametrize("num_steps", [1, 2, 7, 50, 100, 999, 1000])
def test_respacing_keeps_alpha_bar(num_steps):
    schedule = cosine_schedule(num_steps)
    whole = np.cumprod(1 - cosine_betas())
    assert len(schedule) == num_steps
    # the last ᾱ is 2e-9, so 1 − β there has lost eight of float64's sixteen digits
    np.testing.assert_allclose(schedule.alphas_cumprod, whole[schedule.timesteps], rtol=1e-7)
    np.testing.assert_allclose(np.cumprod(1 - schedule.betas), whole[schedule.timesteps], rtol=1e-7)
    assert ((schedule.betas > 0) & (schedule.betas < 1)).all()
    assert np.isfinite(schedule.posterior_log_variance_clipped).all()


@pytest.mark.parametrize("num_steps", [2, 10, 1000])
def test_posterior_is_gaussian_conditioning(num_steps):
    """q(x_{t−1} | x_t, x₀) from the product of q(x_{t−1} | x₀) and q(x_t | x_{t−1}), by adding precisions."""
    schedule = cosine_schedule(num_steps)
    x_start, x_t = 0.7, -1.3
    for i in range(1, num_steps):
        before, beta = schedule.alphas_cumprod[i - 1], schedule.betas[i]
        prior, likelihood = 1 / (1 - before), (1 - beta) / beta
        variance = 1 / (prior + likelihood)
        mean = variance * (prior * math.sqrt(before) * x_start + math.sqrt(1 - beta) / beta * x_t)
        assert schedule.posterior_variance[i] == pytest.approx(variance, rel=1e-8)
        assert schedule.posterior_log_variance_clipped[i] == pytest.approx(math.log(variance), abs=1e-8)
        row = gaussian.posterior_mean(schedule, torch.tensor([[x_start]]), torch.tensor([[x_t]]), torch.tensor([i]))
        assert row.item() == pytest.approx(mean, rel=1e-5, abs=1e-6)
    x_start = torch.tensor([[0.7]])
    mean = gaussian.posterior_mean(schedule, x_start, torch.tensor([[5.0]]), torch.tensor([0]))
    torch.testing.assert_close(mean, x_start)  # before the first step there is x₀ and nothing else


def test_tables_are_float32_copies():
    schedule = cosine_schedule(10)
    expected = {
        "sqrt_alphas_cumprod": schedule.alphas_cumprod**0.5,
        "sqrt_one_minus_alphas_cumprod": (1 - schedule.alphas_cumprod) ** 0.5,
        "sqrt_recip_alphas_cumprod": schedule.alphas_cumprod**-0.5,
        "sqrt_recipm1_alphas_cumprod": ((1 - schedule.alphas_cumprod) / schedule.alphas_cumprod) ** 0.5,
        "log_betas": np.log(schedule.betas),
        "timesteps": spaced_timesteps(10),
    }
    for name, values in expected.items():
        table = schedule.table(name, torch.device("cpu"))
        assert table.dtype == torch.float32
        np.testing.assert_allclose(table.numpy(), values, rtol=1e-6)
