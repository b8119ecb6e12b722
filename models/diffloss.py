"""Diffusion loss: p(token | z) as a small conditional diffusion model (arXiv 2406.11838, section 3.2 and Eq. 1–3).

Legend: N token rows, C channels of a token, D width of z, W width of the MLP, T diffusion steps.
Attribute names are those of the published checkpoints.
"""

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from diffusion import gaussian
from diffusion.schedule import NUM_TRAIN_STEPS, cosine_schedule, step_range
from diffusion.solvers import SOLVERS
from models.token_head import check_no_filter, guide
from util.rng import draw_by_image


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
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(waves.to(self.mlp[0].weight.dtype))  # (N, W)


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

    The condition is `condition(z)`, computed by the caller: a sampler needs it once a token, not once a step. The MLP
    computes in the dtype of its weights; x, the schedule's tables and what is made of the output stay float32.
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

    def condition(self, z):
        """What `forward` takes (N, W), of z (N, D) in any dtype."""
        return self.cond_embed(z.to(self.cond_embed.weight.dtype))

    def forward(self, x, t, condition):
        x = self.input_proj(x.to(self.input_proj.weight.dtype))  # (N, W)
        y = self.time_embed(t) + condition  # (N, W)
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
        x_t = gaussian.q_sample(cosine_schedule(), target, t, noise if tau is None else noise * _column(tau))
        return Denoised(x_t, *self.net(x_t, t, self.net.condition(z)).float().chunk(2, dim=-1))

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
        return cond._replace(eps=guide(cond.eps, uncond.eps, _column(w)))

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
    ) -> "DiffusionSampler":
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


class DiffusionSampler:
    """The reverse process of a DiffLoss: a `models.token_head.Sampler`."""

    def __init__(self, head: DiffLoss, num_steps: tuple[int, int], solver: str, spacing: str | None, clip):
        if solver not in SOLVERS:
            raise ValueError(f"unknown solver {solver!r}; valid: {', '.join(SOLVERS)}")
        self.head, self.num_steps, self.clip = head, num_steps, clip
        self.solver, self.spacing = SOLVERS[solver], spacing or SOLVERS[solver].spacing
        cosine_schedule(num_steps[0], self.spacing)  # an unknown spacing is an error now, not at the first step

    def evals(self, num_steps: int, tokens: int, guided: int, profile=None) -> int:
        """A row for each token at each diffusion step, two where guidance acts on it."""
        schedule = cosine_schedule(num_steps, self.spacing)
        acting = sum(_acts(_share(profile, schedule, i)) for i in range(num_steps)) if guided else 0
        return tokens * num_steps + guided * acting

    def noise(self, generators, rows, num_steps: int) -> torch.Tensor:
        """(T + 1, N, C), the part of each image from its own generator."""
        return draw_by_image(generators, rows, lambda k: (num_steps + 1, k, self.head.channels), dim=1)

    def draw(self, z, z_uncond, cfg, tau, noise, num_steps: int, guided=None, profile=None) -> torch.Tensor:
        """Tokens (N, C), float32, differentiable in z, cfg, tau and the weights.

        z, z_uncond (N, D): with z_uncond ε is the guided one, the variance the conditional one; N trajectories are
        carried and the net sees 2N rows. cfg, tau: float or (N,); what tau does is the solver's, see
        `diffusion.solvers`. noise (num_steps + 1, N, C). guided (G,) long: the rows that guidance acts on, those of
        z_uncond (G, D), where it is not on all; the net sees N + G rows then. profile: see `models.token_head.Sampler`;
        where it gives the float 0 the net sees N rows. A wrong shape, or guidance without z_uncond, raises ValueError.
        """
        self._check(z, z_uncond, cfg, tau, noise, num_steps)
        net = self.head.net
        guides = z_uncond is not None and not (isinstance(cfg, int | float) and cfg == 1.0)
        schedule = cosine_schedule(num_steps, self.spacing)
        timesteps = schedule.table("timesteps", z.device)
        condition = net.condition(torch.cat([z, z_uncond]) if guides else z)  # (N + G, W) or (N, W)
        unguided = net.condition(z) if guides and profile is not None else condition  # (N, W)
        w = _of_rows(_column(cfg), guided)

        def predict(x, i):
            t, m = timesteps[i : i + 1], _share(profile, schedule, i) if guides else 0.0
            if not _acts(m):
                return net(x, t, unguided).float().chunk(2, dim=-1)
            both = torch.cat([x, x if guided is None else x[guided]])
            eps, v = net(both, t, condition).float().chunk(2, dim=-1)
            eps, eps_u, v = eps[: len(x)], eps[len(x) :], v[: len(x)]
            _check_rows("profile", m, len(x))
            m = _of_rows(_column(m), guided)
            if guided is None:
                return guide(eps, eps_u, w, m), v
            return eps.index_copy(0, guided, guide(eps[guided], eps_u, w, m)), v

        return self.solver.run(predict, schedule, noise.float(), _column(tau), self.clip)

    def _check(self, z, z_uncond, cfg, tau, noise, num_steps):
        shape = (num_steps + 1, len(z), self.head.channels)
        if tuple(noise.shape) != shape:
            raise ValueError(f"noise must have shape {shape} (num_steps + 1, N, C), got {tuple(noise.shape)}")
        for name, value in (("cfg", cfg), ("tau", tau)):
            _check_rows(name, value, len(z))
        if z_uncond is None and not torch.all(torch.as_tensor(cfg) == 1.0):
            raise ValueError(f"cfg {cfg} needs z_uncond; without it only cfg 1.0 is valid")


def _share(profile, schedule, i: int):
    """m of a profile at diffusion step i of a schedule, 1.0 without one; the timestep is read on the host."""
    return 1.0 if profile is None else profile(float(schedule.timesteps[i]) / NUM_TRAIN_STEPS)


def _check_rows(name: str, value, num_rows: int) -> None:
    """Raise ValueError unless a value is a number or has one for each row."""
    if isinstance(value, torch.Tensor) and value.dim() and value.numel() != num_rows:
        raise ValueError(f"{name} must be a number or one for each of the {num_rows} rows, got {value.numel()}")


def _acts(m) -> bool:
    """Is guidance computed at this m? A tensor is not read: that would wait for the device."""
    return isinstance(m, torch.Tensor) or m != 0.0


def _of_rows(column, rows):
    """(N, 1) at rows (G,) as (G, 1); a number stays one, and so does a column where rows are None, for all."""
    return column[rows] if rows is not None and isinstance(column, torch.Tensor) and column.dim() else column


def _column(value):
    """A float as it is, (N,) or (N, 1) as (N, 1) float32, so that it broadcasts over channels."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.float().reshape(-1, 1) if value.dim() else value.float()
