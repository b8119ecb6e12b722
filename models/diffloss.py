"""Diffusion loss: p(token | z) as a small conditional diffusion model (arXiv 2406.11838, section 3.2 and Eq. 1–3).

Legend: N token rows, C channels of a token, D width of z, W width of the MLP, T diffusion steps.
Attribute names are those of the published checkpoints.
"""

import math

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from diffusion import gaussian
from diffusion.schedule import NUM_TRAIN_STEPS, cosine_schedule
from diffusion.solvers import SOLVERS


def modulate(x, shift, scale):
    """x·(1 + scale) + shift, the adaptive part of AdaLN; all (N, W)."""
    return x * (1 + scale) + shift


class TimestepEmbedder(nn.Module):
    """Diffusion timesteps (N,) to vectors (N, W), through 256 cosines and sines and a two-layer MLP."""

    def __init__(self, width: int, num_frequencies: int = 256):
        super().__init__()
        self.num_frequencies = num_frequencies
        self.mlp = nn.Sequential(nn.Linear(num_frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        half = self.num_frequencies // 2
        exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
        angles = t.float()[:, None] * torch.exp(-math.log(10000) * exponents)  # (N, half)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))  # (N, W)


class ResBlock(nn.Module):
    """Residual block on (N, W) whose LayerNorm and gate follow the condition (N, W) or (1, W)."""

    def __init__(self, width: int):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x, condition):
        shift, scale, gate = self.adaLN_modulation(condition).chunk(3, dim=-1)
        return x + gate * self.mlp(modulate(self.in_ln(x), shift, scale))


class FinalLayer(nn.Module):
    """Modulated LayerNorm and a linear map (N, W) -> (N, out_channels)."""

    def __init__(self, width: int, out_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, condition):
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class SimpleMLPAdaLN(nn.Module):
    """ε_θ(x_t | t, z): noisy tokens (N, C), timesteps (N,) or (1,), condition (N, W) -> (N, 2C) as (eps, v).

    The condition is `cond_embed(z)`, computed by the caller: a sampler needs it once a token, not once a step.
    """

    def __init__(self, channels: int, width: int, z_channels: int, depth: int, grad_checkpointing: bool = False):
        super().__init__()
        self.grad_checkpointing = grad_checkpointing
        self.time_embed = TimestepEmbedder(width)
        self.cond_embed = nn.Linear(z_channels, width)
        self.input_proj = nn.Linear(channels, width)
        self.res_blocks = nn.ModuleList(ResBlock(width) for _ in range(depth))
        self.final_layer = FinalLayer(width, 2 * channels)
        self._init_weights()

    def _init_weights(self):
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in (self.time_embed.mlp[0], self.time_embed.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        # every block starts as the identity and the output as zero
        for layer in [b.adaLN_modulation[-1] for b in self.res_blocks] + [
            self.final_layer.adaLN_modulation[-1],
            self.final_layer.linear,
        ]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x, t, condition):
        x = self.input_proj(x)  # (N, W)
        y = self.time_embed(t) + condition  # (N, W)
        for block in self.res_blocks:
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, y, use_reentrant=False)
            else:
                x = block(x, y)
        return self.final_layer(x, y)  # (N, 2C)


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
