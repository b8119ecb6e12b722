"""Cross-entropy: p(token | z) over the entries of a codebook, for tokens that are ids.

Legend: B images, L tokens an image, N token rows, G of them guided, D width of z, V entries of the codebook.
"""

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from models.token_head import check_no_profile, guide
from util.dist import send
from util.rng import gumbel

SMALLEST_TAU = 1e-6  # by which logits are divided: as τ falls to 0 the likeliest id is drawn


class Logits(NamedTuple):
    """A prediction: unnormalised log-probabilities of the entries, float32 (N, V)."""

    logits: torch.Tensor


class CrossEntropy:
    """Training loss and sampler of the logits that a linear layer `proj` makes of z: a `models.token_head.TokenHead`.

    label_smoothing: share of the target's probability that training spreads evenly over all entries.
    """

    has_steps = False
    discrete = True
    exceeds_top_p = True  # must the ids that top_p leaves hold more than it, or is as much enough?

    @property
    def num_ids(self) -> int:
        """How many entries are drawn from, V."""
        return self.proj.out_features

    def logits(self, z: torch.Tensor) -> torch.Tensor:
        """(…, V) float32 of z (…, D) in any dtype."""
        return self.proj(z.to(self.proj.weight.dtype)).float()

    def all_logits(self, z: torch.Tensor) -> torch.Tensor:
        """Those that the loss is made of: of a model that has classes beside its ids, those too."""
        return self.logits(z)

    def empty(self, batch: int, length: int) -> torch.Tensor:
        """Ids (B, L) long, all 0."""
        return torch.zeros(batch, length, dtype=torch.long, device=self.proj.weight.device)

    def draws(self, generator: torch.Generator, num_tokens: int) -> dict[str, torch.Tensor]:
        """{}: the loss is not random."""
        return {}

    def predict(self, target, z, draws, tau=None) -> Logits:
        """The logits under z (N, D), divided by tau, a float or (N,), where it is given."""
        logits = self.all_logits(z)
        return Logits(logits if tau is None else logits / _column(tau))

    def losses(self, prediction: Logits, target, draws) -> dict[str, torch.Tensor]:
        """{ce (N,)} of the ids target (N,), with label smoothing; ln V where all logits are equal."""
        return {"ce": _cross_entropy(prediction.logits, target, self.label_smoothing)}

    def fit(self, prediction: Logits, target, draws) -> torch.Tensor:
        """−log p of the ids target (N,)."""
        return _cross_entropy(prediction.logits, target)

    @torch.no_grad()
    def measures(self, prediction: Logits, target) -> dict[str, torch.Tensor]:
        """{accuracy (N,)}: 1 where the likeliest entry is the id of target (N,), else 0."""
        return {"accuracy": (prediction.logits.argmax(dim=-1) == target).float()}

    def comparable(self, loss, draws) -> torch.Tensor:
        """The losses (N,): nothing about them is drawn."""
        return loss

    def guided(self, cond: Logits, uncond: Logits, w) -> Logits:
        """uncond + w·(cond − uncond) with w (N,)."""
        return Logits(guide(cond.logits, uncond.logits, _column(w)))

    def sampler(
        self, *, num_steps=1, solver=None, spacing=None, clip=None, top_k: int = 0, top_p: float = 1.0
    ) -> "CategoricalSampler":
        """What draws ids from the top_k likeliest entries (0: all) and of these the fewest that hold more than top_p
        (0 or 1: all; where `exceeds_top_p` is off, that hold as much). The other settings are those of diffusion steps,
        of which there are none.

        A top_k below 0, or a top_p outside 0 … 1, raises ValueError.
        """
        if top_k < 0:
            raise ValueError(f"--top_k must be 0 (off) or a number of entries, got {top_k}")
        if not 0 <= top_p <= 1:
            raise ValueError(f"--top_p must be between 0 and 1 (both off), got {top_p:g}")
        return CategoricalSampler(self, top_k, top_p)


class CELoss(CrossEntropy, nn.Module):
    """The token head of MAR's kind."""

    def __init__(self, width: int, vocab_size: int, *, label_smoothing: float = 0.1):
        super().__init__()
        self.label_smoothing = label_smoothing
        self.proj = nn.Linear(width, vocab_size)
        nn.init.normal_(self.proj.weight, std=0.02)
        nn.init.zeros_(self.proj.bias)


class CELinear(CrossEntropy, nn.Linear):
    """A token head that is its linear layer, for models whose published key is such as output.weight."""

    label_smoothing = 0.0

    def __init__(self, width: int, vocab_size: int, bias: bool = False):
        super().__init__(width, vocab_size, bias=bias)

    @property
    def proj(self) -> nn.Linear:
        """The layer itself."""
        return self


class CategoricalSampler:
    """Draws ids from softmax(guided logits / τ), filtered: a `models.token_head.Sampler`."""

    num_steps = (1, 1)

    def __init__(self, head: CrossEntropy, top_k: int, top_p: float):
        self.head, self.top_k, self.top_p = head, top_k, top_p

    def evals(self, num_steps: int, tokens: int, guided: int, profile=None) -> int:
        """A row for each token, two for a guided one."""
        return tokens + guided

    def noise(self, generators, rows, num_steps: int) -> torch.Tensor:
        """Gumbel draws (N, V) on the device, the part of each image of its own generator."""
        images, counts = rows[:, 0].unique_consecutive(return_counts=True)
        parts = [
            torch.randint(-(2**31), 2**31, (count,), dtype=torch.int32, generator=generators[image])
            for image, count in zip(images.tolist(), counts.tolist())
        ]
        return gumbel(send(torch.cat(parts), self.head.proj.weight.device), self.head.num_ids)

    def draw(self, z, z_uncond, cfg, tau, noise, num_steps: int, guided=None, profile=None) -> torch.Tensor:
        """Ids (N,) long by Gumbel-max, that is a categorical draw, with noise (N, V); without gradient.

        −1 where the logits are not finite. z (N, D), z_uncond (G, D), guided and profile as in
        `models.token_head.Sampler`; cfg, tau: float or (N,).
        """
        check_no_profile(profile)
        with torch.no_grad():
            logits = self._guided(z, z_uncond, cfg, tau, guided)
            finite = logits.amax(dim=-1).isfinite()
            return torch.where(finite, self._filter(logits).add_(noise).argmax(dim=-1), -1)

    def log_prob(self, drawn, z, z_uncond, cfg, tau, guided=None) -> torch.Tensor:
        """log p (N,) of the ids drawn (N,) under what `draw` draws from; differentiable in z, cfg, tau and weights."""
        return self.log_probs(z, z_uncond, cfg, tau, guided).gather(1, drawn.unsqueeze(1)).squeeze(1)

    def log_probs(self, z, z_uncond, cfg, tau, guided=None) -> torch.Tensor:
        """As `log_prob`, of all ids, (N, V)."""
        return self._filtered(z, z_uncond, cfg, tau, guided).log_softmax(dim=-1)

    @torch.no_grad()
    def mixture(self, z, z_uncond, cfg, tau, noise, share: float, guided=None) -> torch.Tensor:
        """Weights (N, V) of the codes in place of one of them: softmax((1 + u)·logits + noise over a temperature).

        share, u: of the steps behind, from 0 at the first to 1 at the last, with which the temperature falls (VAR's
        smooth variant). The logits are filtered, so that entries that are taken away weigh nothing. Others: as in
        `draw`, with the same noise.
        """
        logits = (1 + share) * self._filtered(z, z_uncond, cfg, tau, guided) + noise
        return (logits / max(0.27 * (1 - 0.95 * share), 0.005)).softmax(dim=-1)

    def _filtered(self, z, z_uncond, cfg, tau, guided) -> torch.Tensor:
        """Guided logits / τ (N, V), −∞ where the filter takes an entry away."""
        return self._filter(self._guided(z, z_uncond, cfg, tau, guided))

    def _guided(self, z, z_uncond, cfg, tau, guided) -> torch.Tensor:
        """Guided logits / τ (N, V), a new tensor."""
        logits = self.head.logits(z)
        if z_uncond is not None:
            uncond, w = self.head.logits(z_uncond), _column(cfg)
            if guided is None:
                logits = guide(logits, uncond, w)
            else:
                w = w[guided] if isinstance(w, torch.Tensor) and w.dim() else w
                logits = logits.index_copy(0, guided, guide(logits[guided], uncond, w))
        tau = _column(tau)
        return logits / (tau.clamp(min=SMALLEST_TAU) if isinstance(tau, torch.Tensor) else max(tau, SMALLEST_TAU))

    def _filter(self, logits) -> torch.Tensor:
        """Logits (N, V), −∞ where the filter takes an entry away."""
        if not 0 < self.top_k < self.head.num_ids and not 0 < self.top_p < 1:
            return logits
        return filter_logits(logits, self.top_k, self.top_p, self.head.exceeds_top_p)


def filter_logits(
    logits: torch.Tensor, top_k: int = 0, top_p: float = 0.0, exceeds_top_p: bool = False
) -> torch.Tensor:
    """Logits (…, V) with −∞ where `kept` takes an entry away; a new tensor. A top_k above V is V."""
    rows = logits.flatten(0, -2)
    return rows.masked_fill(~kept(rows, top_k, top_p, exceeds_top_p), -math.inf).view_as(logits)


@torch.no_grad()
def kept(logits: torch.Tensor, top_k: int, top_p: float, exceeds_top_p: bool = False) -> torch.Tensor:
    """Which entries (N, V) bool of logits (N, V) a filter leaves, top-k first, then top-p of what top-k leaves.

    top_k keeps everything that is at least the k-th largest; top_p the fewest of the likeliest entries
    that hold as much (VAR), or with exceeds_top_p more (LlamaGen): one entry differs where their sum is top_p exactly.
    """
    keep = torch.ones_like(logits, dtype=torch.bool)
    if 0 < top_k < logits.shape[-1]:
        keep = logits >= logits.topk(top_k, dim=-1).values[:, -1:]
    if 0 < top_p < 1:
        p, order = logits.masked_fill(~keep, -math.inf).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        before = p.cumsum(dim=-1) - p
        wanted = before <= top_p if exceeds_top_p else before < top_p
        keep &= torch.zeros_like(keep).scatter(1, order, wanted)
    return keep


def _cross_entropy(logits, target, label_smoothing: float = 0.0) -> torch.Tensor:
    """(N,) of logits (N, V) for ids (N,)."""
    return F.cross_entropy(logits, target, reduction="none", label_smoothing=label_smoothing)


def _column(value):
    """A number as it is, (N,) or (N, 1) as (N, 1) float32, so that it broadcasts over the entries."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.float().reshape(-1, 1) if value.dim() else value.float()
