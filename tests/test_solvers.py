"""The solvers: exact moments of Gaussian data, order of convergence, what tau means in each, clipping."""

import math

import pytest
import torch
from scipy.integrate import quad

from diffusion.schedule import SPACINGS, cosine_schedule
from diffusion.solvers import SOLVERS, dpm
from tests.helpers import randn
from tests.helpers_diffusion import CHANNELS, NUM_STEPS, N, inputs


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


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_one_step_gives_what_the_noise_says_of_the_data(solver, spacing):
    """E[x₀ | x_T] of noise that says next to nothing: the mean of the data, and not the noise."""
    mean, std = moments(solver, 1, [(1.0, 2.0, 0.3)], spacing=spacing)
    assert mean == pytest.approx(2.0, abs=0.01) and std < 0.01


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
