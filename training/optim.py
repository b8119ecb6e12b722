"""Optimizer groups, learning rate, exponential moving average of weights."""

import contextlib
import functools
import math

import torch
from torch import nn


def make_optimizer(
    module: nn.Module,
    token_head: nn.Module,
    lr: float,
    weight_decay: float,
    no_decay: tuple[str, ...] | None = None,
    beta2: float = 0.95,
) -> torch.optim.AdamW:
    """AdamW (0.9, beta2) for a module, without weight decay on biases, norms and its token head, as MAR's is published.

    no_decay: in place of the token head, the parameters with one of these parts in their names. Where the device can,
    all are moved by one call (`fused`), on two CPU cores in a tenth of the time.
    """
    of_token_head = {id(parameter) for parameter in token_head.parameters()} if no_decay is None else set()
    decay, plain = [], []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            exempt = parameter.ndim <= 1 or name.endswith(".bias") or id(parameter) in of_token_head
            exempt = exempt or any(part in name for part in no_decay or ())
            (plain if exempt else decay).append(parameter)
    fused = {parameter.device.type for parameter in module.parameters()} <= {"cpu", "cuda"}
    groups = [{"params": plain, "weight_decay": 0.0}, {"params": decay, "weight_decay": weight_decay}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, beta2), fused=fused or None)


def lr_at(progress: float, *, lr: float, min_lr: float, schedule: str, warmup_epochs: float, epochs: float) -> float:
    """Learning rate at `progress` epochs: linear warm-up, then constant, or half a cosine down to min_lr.

    late_cosine: constant for the first half, the cosine in the second.
    """
    if progress < warmup_epochs:
        return lr * progress / warmup_epochs
    if schedule == "constant":
        return lr
    done = (progress - warmup_epochs) / max(epochs - warmup_epochs, 1e-9)
    if schedule == "late_cosine":
        done = max(2 * done - 1, 0.0)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


class CosineAdam(torch.optim.Adam):
    """Adam in which groups with `cosines` hold curves, parameters p (n,) at n knots, that it moves along cosines.

    p = Σ_k q_k s_k c_k with the orthonormal cosines c_k ∝ cos(πk(i + ½)/n) at knot i, s_0 = 1 and s_k = 3 / (1 + k/2);
    Adam moves q. Knot by knot all would follow what their gradients share, which is mostly noise; along cosines the
    mean takes small steps, and slopes and what is smooth large ones.
    """

    @torch.no_grad()
    def step(self, closure=None):
        """Moves the parameters; see `torch.optim.Optimizer.step`."""
        curves = []
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None and group.get("cosines")]
            curves += [(p, *_cosines(len(p), p.dtype, p.device)) for p in moved]
        for p, basis, sizes in curves:
            p.copy_(basis @ p / sizes)
            p.grad.copy_(sizes * (basis @ p.grad))
        loss = super().step(closure)
        for p, basis, sizes in curves:
            p.copy_(basis.T @ (sizes * p))
        return loss


@functools.lru_cache
def _cosines(n: int, dtype, device) -> tuple[torch.Tensor, torch.Tensor]:
    """The orthonormal cosines (n, n), one a row, and s (n,)."""
    k = torch.arange(n, dtype=torch.float64)
    basis = torch.cos(math.pi * k[:, None] * (k + 0.5) / n) * math.sqrt(2 / n)
    basis[0] /= math.sqrt(2)
    sizes = torch.where(k > 0, 3 / (1 + k / 2), 1.0)
    return basis.to(device, dtype), sizes.to(device, dtype)


class EMA:
    """Averaged copy of a model's parameters, matched by name.

    The rate starts at 2/11 and approaches `rate`, so that a run of a few hundred steps has a usable average too.
    """

    def __init__(self, model: nn.Module, rate: float):
        self.rate = rate
        self.weights = {name: p.detach().float().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, num_steps: int = 0) -> None:
        """Move towards the model after optimizer step number `step` (1, 2, …) of num_steps."""
        rate = self.rate_at(step, num_steps)
        own = {name: p.detach().float() for name, p in model.named_parameters()}
        torch._foreach_lerp_(list(self.weights.values()), [own[name] for name in self.weights], 1 - rate)

    def rate_at(self, step: int, num_steps: int) -> float:
        """The share of the average that stays."""
        return min(self.rate, (1 + step) / (10 + step))

    @contextlib.contextmanager
    def applied_to(self, model: nn.Module):
        """The model with the averaged weights inside the block, its own again afterwards."""
        own = {name: p.detach().clone() for name, p in model.named_parameters()}
        try:
            _copy_into(model, self.weights)
            yield
        finally:
            _copy_into(model, own)

    def load(self, weights: dict) -> None:
        """Take over averaged weights; other names or shapes raise ValueError."""
        odd = sorted(weights.keys() ^ self.weights.keys())
        odd += sorted(k for k in weights.keys() & self.weights.keys() if weights[k].shape != self.weights[k].shape)
        if odd:
            raise ValueError(f"the averaged weights do not fit the model: {len(odd)} of them, the first is {odd[0]!r}")
        for name, value in weights.items():
            self.weights[name].copy_(value)


class TailAverage(EMA):
    """The mean of the weights after the last `share` of a run's steps; before these, the weights themselves."""

    def __init__(self, model: nn.Module, share: float):
        super().__init__(model, share)

    def rate_at(self, step: int, num_steps: int) -> float:
        """The share of the average that stays."""
        place = step - math.floor((1 - self.rate) * num_steps)  # 1, 2, … in the last steps
        return 1 - 1 / max(place, 1)


@torch.no_grad()
def _copy_into(model, weights):
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])
