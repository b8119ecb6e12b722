"""The small denoising MLP of MAR and its parts (arXiv 2406.11838, section 4.1).

Legend: N token rows, C channels of a token, W width of the MLP, Z width of the condition.
Attribute names are those of the published checkpoints.
"""

import math

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


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
