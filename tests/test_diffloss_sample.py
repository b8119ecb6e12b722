"""What DiffLoss.sample promises about rows, guidance, temperature and devices."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion.schedule import SPACINGS, cosine_schedule
from diffusion.solvers import SOLVERS
from models.diffloss import DiffLoss
from tests.helpers_diffusion import CHANNELS, CLIP, NUM_STEPS, WIDTH, N, inputs


@torch.no_grad()
def naive_sample(diffloss, z, z_uncond, cfg, tau, noise):
    """One row, the textbook's way: DDPM in float64 around the net, two evaluations a step."""
    schedule = cosine_schedule(len(noise) - 1)
    x = noise[0].double()
    for draw, i in enumerate(reversed(range(len(schedule))), start=1):
        t = torch.tensor([float(schedule.timesteps[i])])
        c, u = (
            diffloss.net(x.float(), diffloss.net.time_embed(t), diffloss.net.cond_embed(c)).double().chunk(2, dim=1)
            for c in (z, z_uncond)
        )
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
