"""The diffusion process against closed forms; what DiffLoss promises about rows, guidance, temperature and devices."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch.distributions import Normal, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode

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
from diffusion.solvers import SOLVERS, dpm
from models.diffloss import DiffLoss
from models.mar import MAR, MAR_CONFIGS
from tests.helpers import named_weights

CHANNELS, WIDTH, NUM_STEPS, N = 3, 8, 5, 5
CLIP = (-3.0, 3.0)  # without it x₀ from pure noise by untrained weights runs to 10⁴, and nothing else would show


@pytest.fixture(scope="module")
def diffloss():
    return named_weights(DiffLoss(CHANNELS, WIDTH, depth=2, width=16), scale=0.2).eval()


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(n=N, num_steps=NUM_STEPS):
    """z, z_uncond and noise of n rows."""
    return randn(n, WIDTH, seed=1), randn(n, WIDTH, seed=2), randn(num_steps + 1, n, CHANNELS, seed=3)


def training_inputs(n=N):
    """target, z, t (0 and 999 among them) and noise of n rows."""
    t = torch.linspace(0, NUM_TRAIN_STEPS - 1, n).long()
    return randn(n, CHANNELS, seed=4).clamp(-1, 1), randn(n, WIDTH, seed=5), t, randn(n, CHANNELS, seed=6)


# ------------------------------------------------------------------------------------------------------- schedule


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
        assert len(timesteps) == num_steps and timesteps[0] == 0
        gaps = np.diff(timesteps)
        if num_steps > 1:
            assert timesteps[-1] == 999 and gaps.min() >= 1 and gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_of_every_spacing_are_different_ones_that_the_network_knows(spacing):
    for num_steps in (*range(1, 60), 250, 700, 990, 999, 1000):
        timesteps = spaced_timesteps(num_steps, spacing)
        assert timesteps.dtype == np.int64 and len(timesteps) == num_steps
        assert timesteps[0] == 0 and timesteps[-1] <= 999 and (np.diff(timesteps) >= 1).all()
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


# -------------------------------------------------------------------------------------------------------- process


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


# -------------------------------------------------------------------------------------------------------- solvers


def moments(solver, num_steps, parts, tau=1.0, divide_eps=1.0, spacing=None):
    """Mean and standard deviation that a solver gives for exact ε's: parts [(weight, mean, std)] of Gaussian data.

    One part of weight 1 is the data's own ε (and exact v); several are guidance between them. Everything is affine in
    the noise, so a row without noise and one with each unit of noise tell both exactly; the noise is float64.
    """
    solver = SOLVERS.get(solver, solver)
    schedule = cosine_schedule(num_steps, spacing or solver.spacing)

    def predict(x, i):
        signal, noise = schedule.alphas_cumprod[i], 1 - schedule.alphas_cumprod[i]
        eps = sum(w * math.sqrt(noise) * (x - math.sqrt(signal) * m) / (signal * s**2 + noise) for w, m, s in parts)
        # the reverse step's variance: the posterior's, and what x_t leaves open about x₀
        std = parts[0][2]
        open_x0 = std**2 * noise / (signal * std**2 + noise)
        variance = schedule.posterior_variance[i] + schedule.posterior_mean_coef_x0[i] ** 2 * open_x0
        low, high = schedule.posterior_log_variance_clipped[i], math.log(schedule.betas[i])
        v = 2 * (math.log(variance) - low) / (high - low) - 1
        return eps / divide_eps, torch.full_like(x, v)

    noise = torch.zeros(num_steps + 1, num_steps + 2, 1, dtype=torch.float64)
    draws = torch.arange(num_steps + 1)
    noise[draws, draws + 1] = 1.0
    out = solver.run(predict, schedule, noise, tau, None)[:, 0].double()
    return out[0].item(), (out[1:] - out[0]).square().sum().sqrt().item()


def limit(parts, stochastic, schedule, tau=1.0):
    """What `moments` tend to as steps grow: the linear SDE or ODE in u = σ²/ᾱ solved by quadrature, then ε -> x₀.

    With y = x/√ᾱ the ODE is dy/du = Σ w(y − m)/(s² + u)/2; the SDE has twice that drift, and noise of variance du.
    """
    start, end = 1 / schedule.alphas_cumprod[[-1, 0]] - 1
    drift = 1.0 if stochastic else 0.5

    def left(u, power):  # of a deviation at u, when u has fallen to end
        return math.prod(((s**2 + end) / (s**2 + u)) ** (power * w) for w, _, s in parts)

    def integral(f):
        return quad(lambda log_u: f(math.exp(log_u)) * math.exp(log_u), math.log(end), math.log(start), limit=200)[0]

    mean = integral(lambda u: drift * left(u, drift) * sum(w * m / (s**2 + u) for w, m, s in parts))
    variance = left(start, 2 * drift) * (1 + start) * (1 if stochastic else tau**2)
    if stochastic:
        variance += tau**2 * integral(lambda u: left(u, 2.0))
    keep = 1 - sum(w * end / (s**2 + end) for w, _, s in parts)
    return keep * mean + sum(w * m * end / (s**2 + end) for w, m, s in parts), keep * math.sqrt(variance)


STOCHASTIC = {"ddpm": True, "ddim": False, "dpmpp": False, "dpmpp_sde": True}
ORDER = {"ddim": 1, "dpmpp": 2, "dpmpp_sde": 2}
GUIDED = [(2.0, 0.7, 0.5), (-1.0, 0.2, 0.8)]  # w = 2 between two Gaussians


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("mean, std", [(0.7, 0.5), (-2.0, 0.2), (0.0, 1.0), (1.5, 2.0)])
def test_every_solver_recovers_gaussian_data(solver, mean, std):
    got_mean, got_std = moments(solver, 250, [(1.0, mean, std)])
    # x_t at the start of a deterministic solver is noise alone, though the data's still has √ᾱ·mean in it
    assert got_mean == pytest.approx(mean, abs=0.01 * std if STOCHASTIC[solver] else 0.02 * abs(mean) * max(std, 1))
    assert got_std == pytest.approx(std, rel=0.03)


@pytest.mark.parametrize("spacing", ["logsnr", "uniform"])
@pytest.mark.parametrize("parts", [[(1.0, 0.7, 0.5)], GUIDED], ids=["plain", "guided"])
@pytest.mark.parametrize("solver", ORDER)
def test_order_of_convergence(solver, parts, spacing):
    """Twice as many steps leave 1/2 of the error at order 1, 1/4 at order 2; the limit is known in closed form."""
    errors = []
    for num_steps in (24, 48, 96):
        expected = limit(parts, STOCHASTIC[solver], cosine_schedule(num_steps, spacing))
        errors.append(math.dist(moments(solver, num_steps, parts, spacing=spacing), expected))
    assert errors[-1] < 0.02
    ratios = [errors[0] / errors[1], errors[1] / errors[2]]
    low, high = {1: (1.7, 2.4), 2: (2.8, 8.0)}[ORDER[solver]]
    assert all(low < ratio < high for ratio in ratios), ratios


def test_few_steps_of_second_order_beat_first_order():
    for parts in ([(1.0, 0.7, 0.5)], [(1.0, 0.7, 0.1)], GUIDED):
        errors = {}
        for solver in ("ddim", "dpmpp"):
            expected = limit(parts, False, cosine_schedule(12, SOLVERS[solver].spacing))
            errors[solver] = math.dist(moments(solver, 12, parts), expected)
        assert errors["dpmpp"] < 0.5 * errors["ddim"]


@pytest.mark.parametrize("tau", [0.8, 0.9, 1.05])
@pytest.mark.parametrize("solver", SOLVERS)
def test_two_readings_of_tau(solver, tau):
    """Scaling the noise gives τ·s with every solver. ε/τ gives s·√(τ/(2−τ)) with a stochastic one, else no limit."""
    mean, std = 0.7, 0.5
    scaled = moments(solver, 250, [(1.0, mean, std)], tau, spacing="logsnr")
    assert scaled[0] == pytest.approx(mean, abs=0.01) and scaled[1] == pytest.approx(tau * std, rel=0.02)
    divided = [moments(solver, 250, [(1.0, mean, std)], 1.0, tau, spacing=name)[1] / std for name in SPACINGS]
    if STOCHASTIC[solver]:
        assert divided[1:] == pytest.approx([math.sqrt(tau / (2 - tau))] * 2, rel=0.02)
    else:
        assert max(divided) / min(divided) > 1.5  # it depends on the timestep where the solver starts


def test_ancestral_sampling_of_gaussian_data_is_exact_at_any_number_of_steps():
    """Only the last step, which draws nothing, loses the spread that the first noise level had hidden."""
    data = [(1.0, 0.7, 0.5)]
    for num_steps in (3, 10, 100):
        mean, std = moments("ddpm", num_steps, data)
        assert mean == pytest.approx(0.7, abs=1e-5) and std == pytest.approx(0.5, rel=1e-3)
    assert moments("ddpm", 100, data, tau=0.8)[1] < 0.47 < 0.53 < moments("ddpm", 100, data, tau=1.2)[1]


def test_the_family_contains_ddim_and_ancestral_sampling():
    """Order 1: DDIM's formula (Eq. 12 with σ = 0), and DDPM's with the posterior's variance."""
    schedule = cosine_schedule(7, "quadratic")
    noise = randn(8, 5, 2)

    def predict(x, i):
        return torch.tanh(x + i), torch.full_like(x, -1.0)

    x = noise[0].double()
    for i in reversed(range(7)):
        signal, before = schedule.alphas_cumprod[i], schedule.alphas_cumprod[i - 1] if i else 1.0
        eps = torch.tanh(x + i)
        x = math.sqrt(before) * (x - math.sqrt(1 - signal) * eps) / math.sqrt(signal) + math.sqrt(1 - before) * eps
    ddim = SOLVERS["ddim"].run(predict, schedule, noise, 1.0, None)
    torch.testing.assert_close(ddim, x.float(), rtol=1e-4, atol=1e-4)
    ancestral = dpm(predict, schedule, noise, 0.9, (-2, 2), order=1, stochastic=True)
    torch.testing.assert_close(
        ancestral, SOLVERS["ddpm"].run(predict, schedule, noise, 0.9, (-2, 2)), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("solver", SOLVERS)
def test_clip_bounds_the_result(solver, diffloss):
    z, _, noise = inputs()
    plain = diffloss.sample(z, num_steps=NUM_STEPS, noise=noise, solver=solver)
    clipped = diffloss.sample(z, num_steps=NUM_STEPS, noise=noise, solver=solver, clip=(-0.2, 0.1))
    assert plain.min() < -0.2 and plain.max() > 0.1
    assert clipped.min() >= -0.2 - 1e-6 and clipped.max() <= 0.1 + 1e-6
    wide = diffloss.sample(z, num_steps=NUM_STEPS, noise=noise, solver=solver, clip=(-1e9, 1e9))
    assert torch.equal(wide, plain)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_every_solver_takes_noise_of_every_length(solver, num_steps, diffloss):
    z, _, noise = inputs(num_steps=num_steps)
    out = diffloss.sample(z, num_steps=num_steps, noise=noise, solver=solver, clip=(-5, 5))
    assert out.shape == (N, CHANNELS) and out.dtype == torch.float32 and out.isfinite().all()


# ----------------------------------------------------------------------------------------------- DiffLoss.sample


@torch.no_grad()
def naive_sample(diffloss, z, z_uncond, cfg, tau, noise):
    """One row, the textbook's way: DDPM in float64 around the net, two evaluations a step."""
    schedule = cosine_schedule(len(noise) - 1)
    x = noise[0].double()
    for draw, i in enumerate(reversed(range(len(schedule))), start=1):
        t = torch.tensor([float(schedule.timesteps[i])])
        c, u = (diffloss.net(x.float(), t, diffloss.net.cond_embed(c)).double().chunk(2, dim=1) for c in (z, z_uncond))
        eps = u[0] + cfg * (c[0] - u[0])
        signal = schedule.alphas_cumprod[i]
        x_start = ((x - math.sqrt(1 - signal) * eps) / math.sqrt(signal)).clamp(*CLIP)
        x = schedule.posterior_mean_coef_x0[i] * x_start + schedule.posterior_mean_coef_xt[i] * x
        if i > 0:
            share = (c[1] + 1) / 2
            log_var = share * math.log(schedule.betas[i]) + (1 - share) * schedule.posterior_log_variance_clipped[i]
            x = x + tau * torch.exp(log_var / 2) * noise[draw].double()
    return x.float()


@pytest.mark.parametrize("solver", [name for name in SOLVERS if name != "ddpm"])
def test_rows_are_as_alone(solver, diffloss):
    z, z_uncond, noise = inputs()
    cfg, tau = torch.tensor([1.0, 3.0, 0.0, 0.5, 2.0]), torch.tensor([1.0, 0.9, 1.1, 0.0, 1.0])
    common = dict(num_steps=NUM_STEPS, solver=solver, clip=CLIP)
    out = diffloss.sample(z, z_uncond, cfg, tau, noise=noise, **common)
    assert (out.abs() < 2.99).float().mean() > 0.5
    for i in range(N):
        rows = (z[i : i + 1], z_uncond[i : i + 1], cfg[i].item(), tau[i].item())
        alone = diffloss.sample(*rows, noise=noise[:, i : i + 1], **common)
        torch.testing.assert_close(out[i : i + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
def test_unconditional_rows_only_where_guidance_acts(solver, diffloss):
    z, z_uncond, noise = inputs()
    cfg, acts = torch.tensor([1.0, 3.0, 1.0, 1.0, 0.5]), torch.tensor([1, 4])
    common = dict(cfg=cfg, num_steps=NUM_STEPS, noise=noise, solver=solver, clip=CLIP)
    rows = []
    hook = diffloss.net.register_forward_hook(lambda net, args, out: rows.append(len(out)))
    try:
        some = diffloss.sample(z, z_uncond[acts], guided=acts, **common)
    finally:
        hook.remove()
    assert rows == [N + 2] * NUM_STEPS
    torch.testing.assert_close(some, diffloss.sample(z, z_uncond, **common), rtol=1e-5, atol=1e-5)


def test_a_spacing_is_used_where_it_is_named(diffloss):
    z, _, noise = inputs()
    common = dict(num_steps=NUM_STEPS, noise=noise, solver="dpmpp", clip=CLIP)
    usual = diffloss.sample(z, **common)
    assert torch.equal(diffloss.sample(z, spacing=SOLVERS["dpmpp"].spacing, **common), usual)
    assert not torch.allclose(diffloss.sample(z, spacing="uniform", **common), usual, atol=1e-2)


def test_guided_sampling_against_the_textbook_row_by_row(diffloss):
    z, z_uncond, noise = inputs()
    cfg, tau = torch.tensor([1.0, 3.0, 0.0, 0.5, 2.0]), torch.tensor([1.0, 0.9, 1.1, 0.0, 1.0])
    out = diffloss.sample(z, z_uncond, cfg, tau, NUM_STEPS, noise=noise, clip=CLIP)
    assert (out.abs() < 2.99).float().mean() > 0.5  # most are not what the clip made them
    for i in range(N):
        rows = (z[i : i + 1], z_uncond[i : i + 1], cfg[i].item(), tau[i].item())
        draws = noise[:, i : i + 1]
        torch.testing.assert_close(out[i : i + 1], naive_sample(diffloss, *rows, draws), rtol=1e-4, atol=1e-4)
        alone = diffloss.sample(*rows, NUM_STEPS, noise=draws, clip=CLIP)
        torch.testing.assert_close(out[i : i + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
def test_cfg_of_1_is_the_plain_path(solver, diffloss):
    z, z_uncond, noise = inputs()
    common = dict(num_steps=NUM_STEPS, noise=noise, solver=solver, clip=CLIP)
    plain = diffloss.sample(z, **common)
    assert torch.equal(diffloss.sample(z, z_uncond, cfg=1.0, **common), plain)
    assert torch.equal(diffloss.sample(z, cfg=torch.ones(N), tau=torch.ones(N), **common), plain)
    ones = diffloss.sample(z, z_uncond, cfg=torch.ones(N), **common)
    torch.testing.assert_close(ones, plain, rtol=1e-5, atol=1e-5)
    assert torch.equal(ones, diffloss.sample(z, -z_uncond, cfg=torch.ones(N), **common))  # exactly eps_c at cfg 1
    assert not torch.allclose(diffloss.sample(z, z_uncond, cfg=2.0, **common), plain, atol=1e-2)


def test_cfg_of_1_evaluates_n_rows_and_guidance_2n(diffloss):
    z, z_uncond, noise = inputs()
    rows = []
    hook = diffloss.net.register_forward_hook(lambda net, args, out: rows.append(len(out)))
    try:
        diffloss.sample(z, z_uncond, cfg=1.0, num_steps=NUM_STEPS, noise=noise)
        diffloss.sample(z, z_uncond, cfg=1.5, num_steps=NUM_STEPS, noise=noise)
    finally:
        hook.remove()
    assert rows == [N] * NUM_STEPS + [2 * N] * NUM_STEPS


@pytest.mark.parametrize("solver", SOLVERS)
def test_cfg_and_tau_of_a_row_act_on_that_row_only(solver, diffloss):
    z, z_uncond, noise = inputs()
    common = dict(num_steps=NUM_STEPS, noise=noise, solver=solver, clip=CLIP)
    ones = torch.ones(N)
    base = diffloss.sample(z, z_uncond, cfg=2 * ones, tau=ones, **common)
    other_cfg, other_tau = 2 * ones, ones.clone()
    other_cfg[1], other_tau[3] = 3.0, 0.5
    out = diffloss.sample(z, z_uncond, cfg=other_cfg, tau=other_tau, **common)
    assert torch.equal(out[[0, 2, 4]], base[[0, 2, 4]])
    assert not torch.allclose(out[1], base[1], atol=1e-2)
    assert not torch.allclose(out[3], base[3], atol=1e-2)


def test_floats_and_tensors_of_tau_agree(diffloss):
    z, z_uncond, noise = inputs()
    common = dict(num_steps=NUM_STEPS, noise=noise, cfg=2.0, clip=CLIP)
    expected = diffloss.sample(z, z_uncond, tau=0.9, **common)
    for tau in (torch.full((N,), 0.9), torch.full((N, 1), 0.9), torch.tensor(0.9)):
        torch.testing.assert_close(diffloss.sample(z, z_uncond, tau=tau, **common), expected, rtol=1e-6, atol=1e-6)


def test_tau_scales_the_draws_of_the_steps_and_not_the_start(diffloss):
    z, _, noise = inputs()

    def sample(start, steps, tau):
        return diffloss.sample(z, tau=tau, num_steps=NUM_STEPS, noise=torch.cat([noise[:1] * start, steps]), clip=CLIP)

    assert torch.equal(sample(1, 0 * noise[1:], 1.0), sample(1, noise[1:], 0.0))  # tau 0: the start decides
    torch.testing.assert_close(sample(1, 0.5 * noise[1:], 1.0), sample(1, noise[1:], 0.5), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(sample(1, noise[1:], 1.0), sample(1, noise[1:], 0.0), atol=1e-2)
    assert not torch.allclose(sample(1, noise[1:], 0.0), sample(-1, noise[1:], 0.0), atol=1e-2)


def test_the_last_draw_of_ancestral_sampling_is_not_used(diffloss):
    """x_0 is the mean of the last step: no noise is added to the result."""
    z, _, noise = inputs()

    def sample(draw):
        changed = noise.clone()
        changed[draw] += 1.0
        return diffloss.sample(z, num_steps=NUM_STEPS, noise=changed, clip=CLIP)

    same = [torch.equal(sample(draw), sample(NUM_STEPS)) for draw in range(NUM_STEPS)]
    assert not any(same)
    assert torch.equal(sample(NUM_STEPS), diffloss.sample(z, num_steps=NUM_STEPS, noise=noise, clip=CLIP))


def test_noise_is_drawn_where_none_is_given(diffloss):
    z, _, _ = inputs()
    first, second = (diffloss.sample(z, num_steps=NUM_STEPS, clip=CLIP) for _ in range(2))
    assert first.shape == (N, CHANNELS) and not torch.allclose(first, second, atol=1e-2)


def test_sampling_errors(diffloss):
    z, z_uncond, noise = inputs()
    with pytest.raises(ValueError, match=rf"unknown spacing 'karras'.*{', '.join(SPACINGS)}"):
        diffloss.sample(z, num_steps=NUM_STEPS, noise=noise, spacing="karras")
    with pytest.raises(ValueError, match=rf"unknown solver 'euler'.*{', '.join(SOLVERS)}"):
        diffloss.sample(z, solver="euler", num_steps=NUM_STEPS, noise=noise)
    for wrong in (noise[1:], noise[:, 1:], noise[..., 1:]):
        with pytest.raises(ValueError, match=rf"\({NUM_STEPS + 1}, {N}, {CHANNELS}\)"):
            diffloss.sample(z, num_steps=NUM_STEPS, noise=wrong)
    mixed = torch.ones(N)
    mixed[2] = 2.0
    for cfg in (1.5, 0.0, mixed):
        with pytest.raises(ValueError, match="z_uncond"):
            diffloss.sample(z, cfg=cfg, num_steps=NUM_STEPS, noise=noise)


class HostReads(TorchDispatchMode):
    """Names of the operators that make the host wait for a device."""

    READS = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "_unique2"}

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
        if by_mask or name in self.READS:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("solver", SOLVERS)
def test_nothing_waits_for_the_device_inside_sample(solver, diffloss):
    z, z_uncond, noise = inputs()
    with HostReads() as control:
        noise[noise > 0].sum().item()
    assert control.seen == ["index", "_local_scalar_dense"]
    cfg, tau = torch.linspace(0, 2, N), torch.linspace(0.9, 1, N)
    with HostReads() as reads:
        diffloss.sample(z, z_uncond, cfg, tau, NUM_STEPS, solver, noise, clip=(-1, 1))
        diffloss.sample(z, z_uncond[:2], cfg, tau, NUM_STEPS, solver, noise, (-1, 1), guided=torch.tensor([1, 3]))
    assert reads.seen == []
    # there is nothing to read on the meta device: copying to the host raises there
    on_meta = DiffLoss(CHANNELS, WIDTH, depth=2, width=16).to("meta")
    z, z_uncond, noise, cfg, tau = (x.to("meta") for x in (z, z_uncond, noise, cfg, tau))
    with pytest.raises((NotImplementedError, RuntimeError)):
        z.cpu()
    assert on_meta.sample(z, z_uncond, cfg, tau, NUM_STEPS, solver, noise, clip=(-1, 1)).shape == (N, CHANNELS)


# ------------------------------------------------------------------------------------------------- training loss


def test_token_loss_is_the_formula_around_the_net(diffloss):
    target, z, t, noise = training_inputs()
    tau = torch.linspace(0.5, 1.5, N)
    schedule = cosine_schedule()
    alphas_cumprod = torch.from_numpy(schedule.alphas_cumprod)[t].float().unsqueeze(1)
    x_t = alphas_cumprod.sqrt() * target + (1 - alphas_cumprod).sqrt() * tau.unsqueeze(1) * noise
    with torch.no_grad():
        eps, v = diffloss.net(x_t, t, diffloss.net.cond_embed(z)).chunk(2, dim=1)
        mse, vb = diffloss.token_loss_terms(target, z, t, noise, tau)
        # the target is the noise, not τ·noise
        torch.testing.assert_close(mse, (eps - noise).square().mean(1), rtol=1e-4, atol=1e-6)
        expected_vb = gaussian.training_losses(schedule, target, x_t, t, noise, eps, v)[1]
        torch.testing.assert_close(vb, expected_vb, rtol=1e-3, atol=1e-5)
        assert torch.equal(diffloss.token_loss(target, z, t, noise, tau), mse + vb)


def test_no_tau_is_tau_1(diffloss):
    target, z, t, noise = training_inputs()
    expected = diffloss.token_loss(target, z, t, noise)
    for tau in (1.0, torch.ones(N), torch.ones(N, 1)):
        assert torch.equal(diffloss.token_loss(target, z, t, noise, tau), expected)
    assert not torch.allclose(diffloss.token_loss(target, z, t, noise, 1.1), expected)


def test_t_and_noise_are_drawn_where_none_are_given(diffloss):
    target, z, t, noise = training_inputs()
    draws = [diffloss.token_loss(target, z) for _ in range(2)]
    assert draws[0].shape == (N,) and not torch.equal(*draws)
    given = [diffloss.token_loss(target, z, t, noise) for _ in range(2)]
    assert torch.equal(*given)


def test_gradient_reaches_each_rows_own_tau_and_z(diffloss):
    target, z, t, noise = training_inputs()
    z.requires_grad_()
    tau = torch.ones(N, requires_grad=True)
    loss = diffloss.token_loss(target, z, t, noise, tau)
    for i in range(N):
        of_tau, of_z = torch.autograd.grad(loss[i], (tau, z), retain_graph=True)
        assert of_tau.isfinite().all() and (of_tau != 0).tolist() == [j == i for j in range(N)]
        assert of_z.isfinite().all() and (of_z != 0).any(1).tolist() == [j == i for j in range(N)]


def test_gradient_of_tau_is_the_slope_of_the_loss(diffloss):
    target, z, t, noise = (x[1:4] for x in training_inputs())
    tau, step = torch.ones(3, requires_grad=True), 1e-2
    (gradient,) = torch.autograd.grad(diffloss.token_loss(target, z, t, noise, tau).sum(), tau)
    above, below = (diffloss.token_loss(target, z, t, noise, 1 + s).detach() for s in (step, -step))
    torch.testing.assert_close(gradient, (above - below) / (2 * step), rtol=2e-2, atol=2e-3)


def test_rows_of_the_loss_are_independent(diffloss):
    target, z, t, noise = training_inputs()
    whole = diffloss.token_loss(target, z, t, noise)
    alone = torch.cat([diffloss.token_loss(*(x[i : i + 1] for x in (target, z, t, noise))) for i in range(N)])
    torch.testing.assert_close(whole, alone, rtol=1e-4, atol=1e-6)
    turned = diffloss.token_loss(*(x.flip(0) for x in (target, z, t, noise))).flip(0)
    torch.testing.assert_close(whole, turned, rtol=1e-4, atol=1e-6)


def test_bfloat16_autocast_gives_finite_float32(diffloss):
    """Only the net runs in bfloat16: the loss is the float32 formula on what it says, to the bit."""
    target, z, t, noise = training_inputs()
    cond, uncond, draws = inputs()
    schedule = cosine_schedule()
    x_t = gaussian.q_sample(schedule, target, t, noise)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        loss = diffloss.token_loss(target, z, t, noise)
        out = diffloss.net(x_t, t, diffloss.net.cond_embed(z))
        cfg, tau = torch.full((N,), 2.0), torch.ones(N)
        sample = diffloss.sample(cond, uncond, cfg, tau, NUM_STEPS, noise=draws, clip=CLIP)
    assert out.dtype == torch.bfloat16
    for value in (loss, sample):
        assert value.dtype == torch.float32 and value.isfinite().all()
    eps, v = out.float().chunk(2, dim=1)
    assert torch.equal(loss, sum(gaussian.training_losses(schedule, target, x_t, t, noise, eps, v)))


def test_mar_base_on_the_meta_device():
    with torch.device("meta"):
        mar = MAR(MAR_CONFIGS["mar_base"])
    batch, length, channels, width = 2, 256, 16, 768
    tokens = torch.empty(batch, length, channels, device="meta")
    mask = torch.empty(batch, length, dtype=torch.bool, device="meta")
    labels = torch.empty(batch, dtype=torch.long, device="meta")
    for num_visible in ([64, 64], [0, 0], [0, 256], [10, 30]):
        z = mar.encode_decode(tokens, mask, labels, num_visible=num_visible)
        assert z.shape == (batch, length, width) and z.dtype == torch.float32
    rows = z.flatten(0, 1)
    loss = mar.diffloss.token_loss(tokens.flatten(0, 1), rows)
    assert loss.shape == (batch * length,) and loss.dtype == torch.float32 and loss.device.type == "meta"
    sample = mar.diffloss.sample(rows, rows, cfg=2.0, num_steps=2)
    assert sample.shape == (batch * length, channels) and sample.dtype == torch.float32
