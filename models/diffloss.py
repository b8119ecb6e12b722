"""Diffusion loss: p(token | z) as a small conditional diffusion model (arXiv 2406.11838, section 3.2 and Eq. 1–3).

Legend: N token rows, C channels of a token, D width of z, W width of the MLP, T diffusion steps.
Attribute names are those of the published checkpoints.
"""

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from diffusion import gaussian
from diffusion.schedule import NUM_TRAIN_STEPS, cosine_schedule, step_range
from models.diffusion_sampler import DiffusionSampler, column
from models.norms import LayerNorm
from models.token_head import check_no_filter, guide
from util.dist import is_half
from util.graphs import Graphs, autocast_state


def modulate(x, shift, scale):
    """x·(1 + scale) + shift, the adaptive part of AdaLN; all (N, W)."""
    return x * (1 + scale) + shift


class TimestepEmbedder(nn.Module):
    """Diffusion timesteps (N,) to vectors (N, W), through 256 cosines and sines and a two-layer MLP.

    Of more rows than there are timesteps, whole numbers below 1000, each timestep is embedded once; of half precision
    its gradient is summed in float32.
    """

    def __init__(self, width: int, num_frequencies: int = 256):
        super().__init__()
        self.num_frequencies = num_frequencies
        self.mlp = nn.Sequential(nn.Linear(num_frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        if len(t) > NUM_TRAIN_STEPS and not t.is_floating_point():
            every = self(torch.arange(NUM_TRAIN_STEPS, device=t.device))
            return F.embedding(t.long(), every.float() if is_half(every.dtype) else every).to(every.dtype)
        half = self.num_frequencies // 2
        exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
        angles = t.float()[:, None] * torch.exp(-math.log(10000) * exponents)  # (N, half)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(waves.to(self.mlp[0].weight.dtype))  # (N, W)


class ResBlock(nn.Module):
    """Residual block on x (N, W) whose LayerNorm and gate follow y = SiLU(condition), (N, W)."""

    def __init__(self, width: int):
        super().__init__()
        self.in_ln = LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x, y):
        shift, scale, gate = self.adaLN_modulation[1](y).chunk(3, dim=-1)
        return x + gate * self.mlp(modulate(self.in_ln(x), shift, scale))


class FinalLayer(nn.Module):
    """Modulated LayerNorm and a linear map, x (N, W) -> (N, out_channels); y as in `ResBlock`."""

    def __init__(self, width: int, out_channels: int):
        super().__init__()
        self.norm_final = LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, y):
        shift, scale = self.adaLN_modulation[1](y).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class SimpleMLPAdaLN(nn.Module):
    """ε_θ(x_t | t, z): noisy tokens (N, C), time (N, W) or (1, W), condition (N, W) -> (N, 2C) as (eps, v).

    time is `time_embed(t)` of timesteps and the condition `condition(z)`, computed by the caller: a sampler needs the
    one once a draw and the other once a token, not once a step. The MLP computes in the dtype of its weights; x, the
    schedule's tables and what is made of the output stay float32.
    """

    def __init__(self, channels: int, width: int, z_channels: int, depth: int, grad_checkpointing: bool = False):
        super().__init__()
        self.grad_checkpointing = grad_checkpointing
        self.time_embed = TimestepEmbedder(width)
        self.cond_embed = nn.Linear(z_channels, width)
        self.input_proj = nn.Linear(channels, width)
        self.res_blocks = nn.ModuleList(ResBlock(width) for _ in range(depth))
        self.final_layer = FinalLayer(width, 2 * channels)
        self.held = None  # a `models.low_precision.HeldMLP`, where it is to sample in 16 bits
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

    def condition(self, z):
        """What `forward` takes (N, W), of z (N, D) in any dtype."""
        return self.cond_embed(z.to(self.cond_embed.weight.dtype))

    def forward(self, x, time, condition):
        if self.held is not None and autocast_state(x.device) == self.held.dtype:
            return self.held(x, time, condition)
        x = self.input_proj(x.to(self.input_proj.weight.dtype))  # (N, W)
        y = F.silu(time + condition)  # (N, W), which each block's adaLN_modulation begins with
        for block in self.res_blocks:
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, y, use_reentrant=False)
            else:
                x = block(x, y)
        return self.final_layer(x, y)  # (N, 2C)


_T_BINS = 10  # bins of the 1000 timesteps in which token losses are compared


class Denoised(NamedTuple):
    """A prediction: what was denoised, the noise seen in it, and the variance's place between its bounds; (N, C)."""

    x_t: torch.Tensor
    eps: torch.Tensor
    v: torch.Tensor


class DiffLoss(nn.Module):
    """The denoising MLP with its training loss and its sampler: a `models.token_head.TokenHead`.

    repeats: noise levels drawn for each token in training (MAR's diffusion_batch_mul).
    """

    has_steps = True
    discrete = False

    def __init__(
        self, channels: int, z_channels: int, depth: int, width: int, grad_checkpointing: bool = False, repeats: int = 1
    ):
        super().__init__()
        self.channels = channels
        self.repeats = repeats
        self.net = SimpleMLPAdaLN(channels, width, z_channels, depth, grad_checkpointing)
        self.graphs = Graphs()

    def empty(self, batch: int, length: int) -> torch.Tensor:
        """Tokens (B, L, C) of zeros, float32."""
        return torch.zeros(batch, length, self.channels, device=self.net.input_proj.weight.device)

    def draws(self, generator: torch.Generator, num_tokens: int) -> dict[str, torch.Tensor]:
        """{t (m, N) long in [0, 1000), noise (m, N, C)} of a generator on the CPU."""
        shape = (self.repeats, num_tokens)
        t = torch.randint(0, NUM_TRAIN_STEPS, shape, generator=generator)
        return {"t": t, "noise": torch.randn((*shape, self.channels), generator=generator)}

    def predict(self, target, z, draws, tau=None) -> Denoised:
        """ε and v, float32, of the noisy x_t = √ᾱ·x₀ + √(1−ᾱ)·τ·noise.

        target (N, C) is x₀, z (N, D) the condition, draws {t (N,), noise (N, C)}, tau (N,), (N, 1), float, or None
        for 1. The target of ε stays the unscaled noise.
        """
        t, noise = draws["t"], draws["noise"]
        x_t = gaussian.q_sample(cosine_schedule(), target, t, noise if tau is None else noise * column(tau))
        net = self.net
        return Denoised(x_t, *net(x_t, net.time_embed(t), net.condition(z)).float().chunk(2, dim=-1))

    def losses(self, prediction: Denoised, target, draws) -> dict[str, torch.Tensor]:
        """{mse, vb}, each (N,): ε-prediction, and the variational bound, which trains v only."""
        t, noise = draws["t"], draws["noise"]
        x_t, eps, v = prediction
        mse, vb = gaussian.training_losses(cosine_schedule(), target, x_t, t, noise, eps, v)
        return {"mse": mse, "vb": vb}

    def fit(self, prediction: Denoised, target, draws) -> torch.Tensor:
        """mean ‖ε_θ − ε‖² (N,)."""
        return (draws["noise"] - prediction.eps).square().mean(-1)

    def guided(self, cond: Denoised, uncond: Denoised, w) -> Denoised:
        """ε under guidance w (N,); v stays the conditional one."""
        return cond._replace(eps=guide(cond.eps, uncond.eps, column(w)))

    def measures(self, prediction, target) -> dict[str, torch.Tensor]:
        """{}: a diffusion loss is all there is."""
        return {}

    def comparable(self, loss, draws) -> torch.Tensor:
        """Losses (N,) over the mean of their timesteps' bin in this batch: louder noise is easier for every token."""
        bins = draws["t"] * _T_BINS // NUM_TRAIN_STEPS
        total = loss.new_zeros(_T_BINS).index_add_(0, bins, loss)
        count = loss.new_zeros(_T_BINS).index_add_(0, bins, torch.ones_like(loss))
        return loss / (total / count.clamp(min=1))[bins].clamp(min=1e-12)

    def token_loss_terms(self, target, z, t=None, noise=None, tau=None):
        """(mse, vb), each (N,), for clean tokens target (N, C) under condition z (N, D).

        t (N,) long in [0, 1000) and noise (N, C) are drawn where None. tau: see `predict`.
        """
        t = torch.randint(0, NUM_TRAIN_STEPS, target.shape[:1], device=target.device) if t is None else t
        draws = {"t": t, "noise": torch.randn_like(target) if noise is None else noise}
        terms = self.losses(self.predict(target, z, draws, tau), target, draws)
        return terms["mse"], terms["vb"]

    def token_loss(self, target, z, t=None, noise=None, tau=None) -> torch.Tensor:
        """Loss (N,) = mse + vb of each row; arguments as in `token_loss_terms`."""
        mse, vb = self.token_loss_terms(target, z, t, noise, tau)
        return mse + vb

    def sampler(
        self, *, num_steps: int | str = 100, solver="ddpm", spacing=None, clip=None, top_k=0, top_p=1.0
    ) -> DiffusionSampler:
        """What draws tokens. num_steps: T, or "A:B" for A at the first autoregressive step to B at the last.

        spacing names the timesteps (`diffusion.schedule.SPACINGS`; None: the solver's). clip (lo, hi) bounds the
        predicted x₀. An unknown solver, spacing or number of steps, or a filter of ids, raises ValueError.
        """
        check_no_filter(top_k, top_p)
        return DiffusionSampler(self, step_range(num_steps), solver, spacing, clip)

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
        profile=None,
    ):
        """Tokens (N, C) drawn from p(token | z), float32: `DiffusionSampler.draw`, without gradient.

        noise (num_steps + 1, N, C) is drawn if None; num_steps is one number; the other settings as in `sampler`.
        """
        num_steps = int(num_steps)
        if noise is None:
            noise = torch.randn((num_steps + 1, len(z), self.channels), device=z.device)
        sampler = self.sampler(num_steps=num_steps, solver=solver, spacing=spacing, clip=clip)
        return sampler.draw(z, z_uncond, cfg, tau, noise, num_steps, guided, profile)
