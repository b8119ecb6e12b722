"""The Gaussian diffusion process and its losses against closed forms."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from diffusion import gaussian
from diffusion.schedule import cosine_betas, cosine_schedule
from tests.helpers import randn
from tests.helpers_diffusion import CHANNELS, N, training_inputs


def test_q_sample_has_the_moments_of_the_one_step_chain():
    """√ᾱ and 1 − ᾱ from iterating x_t = √(1−β)·x_{t−1} + √β·ε; q_sample is linear, so two rows show both."""
    schedule = cosine_schedule()
    factor, variance = np.empty(1000), np.empty(1000)
    f, s = 1.0, 0.0
    for i, beta in enumerate(cosine_betas()):
        f, s = f * math.sqrt(1 - beta), s * (1 - beta) + beta
        factor[i], variance[i] = f, s
    t, one, zero = torch.arange(1000), torch.ones(1000, 1), torch.zeros(1000, 1)
    np.testing.assert_allclose(gaussian.q_sample(schedule, one, t, zero)[:, 0], factor, rtol=1e-5)
    np.testing.assert_allclose(gaussian.q_sample(schedule, zero, t, one)[:, 0] ** 2, variance, rtol=1e-5)
    x_start, noise = randn(1000, 2, seed=1), randn(1000, 2, seed=2)
    expected = factor[:, None] * x_start.numpy() + variance[:, None] ** 0.5 * noise.numpy()
    np.testing.assert_allclose(gaussian.q_sample(schedule, x_start, t, noise), expected, rtol=1e-4, atol=1e-6)


def test_predict_x_start_inverts_q_sample():
    schedule = cosine_schedule()
    t = torch.arange(1000)
    x_start, noise = randn(1000, 4, seed=1), randn(1000, 4, seed=2)
    x_t = gaussian.q_sample(schedule, x_start, t, noise)
    error = (gaussian.predict_x_start(schedule, x_t, t, noise) - x_start).abs().amax(1)
    # float32 rounding of x_t, magnified by 1/√ᾱ; nothing else
    assert (error <= 2e-6 * schedule.table("sqrt_recip_alphas_cumprod", "cpu")).all()
    assert error[:500].max() < 1e-5


def test_log_variance_runs_from_the_posterior_to_beta():
    schedule = cosine_schedule(20)
    t = torch.arange(20)
    low, high = (gaussian.log_variance(schedule, torch.full((20, 1), v), t)[:, 0] for v in (-1.0, 1.0))
    np.testing.assert_allclose(low, schedule.posterior_log_variance_clipped, rtol=1e-5)
    np.testing.assert_allclose(high, np.log(schedule.betas), rtol=1e-5, atol=1e-6)
    middle = gaussian.log_variance(schedule, torch.zeros(20, 1), t)[:, 0]
    torch.testing.assert_close(middle, (low + high) / 2)


def test_vb_is_the_kl_divergence_between_gaussians():
    schedule = cosine_schedule()
    t = torch.tensor([1, 2, 10, 100, 500, 900])
    x_start, noise, eps, v = (randn(len(t), 4, seed=i) for i in range(4))
    v = v.clamp(-1, 1)
    x_t = gaussian.q_sample(schedule, x_start, t, noise)
    mse, vb = gaussian.training_losses(schedule, x_start, x_t, t, noise, eps, v)
    torch.testing.assert_close(mse, ((noise - eps) ** 2).mean(1))

    def column(values):
        return torch.as_tensor(values)[t].unsqueeze(1)

    alphas_cumprod = column(schedule.alphas_cumprod)
    x_predicted = (x_t - (1 - alphas_cumprod).sqrt() * eps) / alphas_cumprod.sqrt()
    a, b = column(schedule.posterior_mean_coef_x0), column(schedule.posterior_mean_coef_xt)
    true_var, beta = column(schedule.posterior_variance), column(schedule.betas)
    model_var = true_var ** ((1 - v) / 2) * beta ** ((1 + v) / 2)  # geometric interpolation
    true = Normal(a * x_start + b * x_t, true_var.sqrt())
    model = Normal(a * x_predicted + b * x_t, model_var.sqrt())
    expected = kl_divergence(true, model).mean(1) / math.log(2)
    torch.testing.assert_close(vb.double(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("mean", [0.3, -1.0, 1.2])
@pytest.mark.parametrize("v", [-1.0, 0.5])
def test_likelihood_at_step_0_is_a_distribution_over_256_grey_levels(mean, v):
    schedule = cosine_schedule()
    x_start = torch.linspace(-1, 1, 256).unsqueeze(1)  # bin centres
    t = torch.zeros(256, dtype=torch.long)
    signal, scale = (schedule.table(n, "cpu")[0] for n in ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"))
    eps = torch.full((256, 1), 0.5)
    x_t = signal * mean + scale * eps  # so that the predicted x₀ is mean, whatever x₀ is
    noise = (x_t - signal * x_start) / scale
    _, vb = gaussian.training_losses(schedule, x_start, x_t, t, noise, eps, torch.full((256, 1), v))
    probability = 2.0 ** -vb.double()
    assert probability.sum().item() == pytest.approx(1.0, abs=1e-4)
    nearest = (x_start[:, 0] - mean).abs().argmin()
    assert probability.argmax() == nearest
    centre = (probability * x_start[:, 0]).sum().item()
    assert centre == pytest.approx(min(max(mean, -1), 1), abs=0.004)


def test_vb_trains_the_variance_only_and_mse_the_mean_only():
    schedule = cosine_schedule()
    target, _, t, noise = training_inputs()
    eps, v = randn(N, CHANNELS, seed=7).requires_grad_(), torch.zeros(N, CHANNELS, requires_grad=True)
    x_t = gaussian.q_sample(schedule, target, t, noise)
    mse, vb = gaussian.training_losses(schedule, target, x_t, t, noise, eps, v)
    of_mse = torch.autograd.grad(mse.sum(), (eps, v), retain_graph=True, allow_unused=True)
    of_vb = torch.autograd.grad(vb.sum(), (eps, v), allow_unused=True)
    torch.testing.assert_close(of_mse[0], 2 * (eps - noise).detach() / CHANNELS)
    assert of_mse[1] is None and of_vb[0] is None
    assert (of_vb[1] != 0).all()
