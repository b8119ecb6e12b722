"""Diffusion loss: p(token | z) as a small conditional diffusion model (arXiv 2406.11838, section 3.2 and Eq. 1–3).

Legend: N token rows, C channels of a token, D width of z, T diffusion steps.
"""

import torch
from torch import nn

from diffusion import gaussian
from diffusion.schedule import NUM_TRAIN_STEPS, cosine_schedule
from diffusion.solvers import SOLVERS
from models.layers import SimpleMLPAdaLN


class DiffLoss(nn.Module):
    """The denoising MLP with its training loss and its sampler."""

    def __init__(self, channels: int, z_channels: int, depth: int, width: int, grad_checkpointing: bool = False):
        super().__init__()
        self.channels = channels
        self.net = SimpleMLPAdaLN(channels, width, z_channels, depth, grad_checkpointing)

    def noised(self, target, t, noise, tau=None) -> torch.Tensor:
        """x_t = √ᾱ·x₀ + √(1−ᾱ)·τ·noise (N, C); tau (N,), (N, 1), float, or None for 1."""
        return gaussian.q_sample(cosine_schedule(), target, t, noise if tau is None else noise * _column(tau))

    def predict(self, x_t, t, z):
        """(eps, v), both (N, C) float32, at training timesteps t (N,) under condition z (N, D)."""
        return self.net(x_t, t, self.net.cond_embed(z)).float().chunk(2, dim=-1)

    def token_loss_terms(self, target, z, t=None, noise=None, tau=None):
        """(mse, vb), each (N,), for clean tokens target (N, C) under condition z (N, D).

        t (N,) long in [0, 1000) and noise (N, C) are drawn where None. tau scales the noise that is added, see
        `noised`, while the prediction's target stays `noise`.
        """
        if t is None:
            t = torch.randint(0, NUM_TRAIN_STEPS, target.shape[:1], device=target.device)
        if noise is None:
            noise = torch.randn_like(target)
        x_t = self.noised(target, t, noise, tau)
        eps, v = self.predict(x_t, t, z)
        return gaussian.training_losses(cosine_schedule(), target, x_t, t, noise, eps, v)

    def token_loss(self, target, z, t=None, noise=None, tau=None) -> torch.Tensor:
        """Loss (N,) = mse + vb of each row; arguments as in `token_loss_terms`."""
        mse, vb = self.token_loss_terms(target, z, t, noise, tau)
        return mse + vb

    @torch.no_grad()
    def sample(
        self,
        z,
        z_uncond=None,
        cfg=1.0,
        tau=1.0,
        num_steps=100,
        solver="ddpm",
        noise=None,
        clip=None,
        spacing=None,
        guided=None,
    ):
        """Tokens (N, C) drawn from p(token | z), float32.

        z, z_uncond (N, D): with z_uncond, eps = eps_u + cfg·(eps_c − eps_u), the variance is the conditional one, N
        trajectories are carried and the net sees 2N rows. cfg, tau: float or (N,); what tau does is the solver's, see
        `diffusion.solvers`. noise (num_steps + 1, N, C), drawn if None. clip (lo, hi) bounds the predicted x₀. spacing
        names the timesteps (`diffusion.schedule.SPACINGS`; None: the solver's). guided (G,) long: the rows that
        guidance acts on, those of z_uncond (G, D), where it is not on all; the net sees N + G rows then. An unknown
        solver or spacing, a wrong shape of noise, or guidance without z_uncond raises ValueError.
        """
        if solver not in SOLVERS:
            raise ValueError(f"unknown solver {solver!r}; valid: {', '.join(SOLVERS)}")
        num_steps = int(num_steps)
        shape = (num_steps + 1, z.shape[0], self.channels)
        if noise is None:
            noise = torch.randn(shape, device=z.device)
        elif tuple(noise.shape) != shape:
            raise ValueError(f"noise must have shape {shape} (num_steps + 1, N, C), got {tuple(noise.shape)}")
        for name, value in (("cfg", cfg), ("tau", tau)):
            if isinstance(value, torch.Tensor) and value.dim() and value.numel() != len(z):
                raise ValueError(f"{name} must be a number or one for each of the {len(z)} rows, got {value.numel()}")
        if z_uncond is None and not torch.all(torch.as_tensor(cfg) == 1.0):
            raise ValueError(f"cfg {cfg} needs z_uncond; without it only cfg 1.0 is valid")
        guides = z_uncond is not None and not (isinstance(cfg, (int, float)) and cfg == 1.0)
        rows = slice(None) if guided is None else guided
        schedule = cosine_schedule(num_steps, spacing or SOLVERS[solver].spacing)
        timesteps = schedule.table("timesteps", z.device)
        condition = self.net.cond_embed(torch.cat([z, z_uncond]) if guides else z)  # (N + G, W) or (N, W)
        lift = _column(cfg) - 1.0
        if isinstance(lift, torch.Tensor) and lift.dim():
            lift = lift[rows]  # (G, 1)

        def predict(x, i):
            out = self.net(torch.cat([x, x[rows]]) if guides else x, timesteps[i : i + 1], condition).float()
            eps, v = out.chunk(2, dim=-1)
            if guides:
                eps, eps_u, v = eps[: len(x)], eps[len(x) :], v[: len(x)]
                # = eps_u + cfg·(eps_c − eps_u), exactly eps_c at cfg 1
                eps[rows] = eps[rows] + lift * (eps[rows] - eps_u)
            return eps, v

        return SOLVERS[solver].run(predict, schedule, noise.float(), _column(tau), clip)


def _column(value):
    """A float as it is, (N,) or (N, 1) as (N, 1), so that it broadcasts over channels."""
    return value.reshape(-1, 1) if isinstance(value, torch.Tensor) and value.dim() else value
