"""The training loss of DiffLoss: the formula, its gradients, independent rows, dtypes and devices."""

import pytest
import torch

from diffusion import gaussian
from diffusion.schedule import NUM_TRAIN_STEPS, cosine_schedule
from models.diffloss import TimestepEmbedder
from models.mar import MAR, MAR_CONFIGS
from tests.helpers import randn
from tests.helpers_diffusion import CLIP, NUM_STEPS, N, inputs, training_inputs


def test_token_loss_is_the_formula_around_the_net(diffloss):
    target, z, t, noise = training_inputs()
    tau = torch.linspace(0.5, 1.5, N)
    schedule = cosine_schedule()
    alphas_cumprod = torch.from_numpy(schedule.alphas_cumprod)[t].float().unsqueeze(1)
    x_t = alphas_cumprod.sqrt() * target + (1 - alphas_cumprod).sqrt() * tau.unsqueeze(1) * noise
    with torch.no_grad():
        eps, v = diffloss.net(x_t, diffloss.net.time_embed(t), diffloss.net.cond_embed(z)).chunk(2, dim=1)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_timestep_is_embedded_once_where_there_are_more_rows(dtype):
    """With the values and the gradients of row by row; in bf16 the gradients are as exact as those of a product."""
    net, rows = TimestepEmbedder(8), NUM_TRAIN_STEPS * 5
    t = torch.randint(0, NUM_TRAIN_STEPS, (rows,), generator=torch.Generator().manual_seed(0))
    upstream, lengths = randn(rows, 8), []
    net.mlp.register_forward_hook(lambda module, args, out: lengths.append(len(out)))

    def gradients(parts) -> list:
        net.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            values = torch.cat([net(part) for part in parts])
        (values.float() * upstream).sum().backward()
        return [values, *(parameter.grad.clone() for parameter in net.parameters())]

    made, expected = gradients([t]), gradients(t.split(NUM_TRAIN_STEPS))
    assert lengths == [NUM_TRAIN_STEPS] * 6 and made[0].dtype == expected[0].dtype == dtype
    assert torch.equal(net(t.short()), net(t)) and len(net(t.double())) == rows
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    for a, b in zip(made, expected):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


def test_bfloat16_autocast_gives_finite_float32(diffloss):
    """Only the net runs in bfloat16: the loss is the float32 formula on what it says, to the bit."""
    target, z, t, noise = training_inputs()
    cond, uncond, draws = inputs()
    schedule = cosine_schedule()
    x_t = gaussian.q_sample(schedule, target, t, noise)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        loss = diffloss.token_loss(target, z, t, noise)
        out = diffloss.net(x_t, diffloss.net.time_embed(t), diffloss.net.cond_embed(z))
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
