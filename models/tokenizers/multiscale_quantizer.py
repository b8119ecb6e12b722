"""VAR's quantiser (arXiv 2404.02905, algorithms 1 and 2): an image's features as the sum of what each scale adds.

Legend: B images, f (B, C, h, w) features, S scales, of which scale s is a grid of p_s × p_s tokens and the last one has
(h, w); L = Σ p_s² tokens, V codes of C numbers. f̂_s is the sum of what the scales 0…s add. All in float32.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

NO_PHI = 1e-6  # a share of the convolution up to which there is none
USED = 0.08  # of the hits of a code that is chosen as often as all others, from which on it counts as used


def phi_index(num_phis: int, num_scales: int) -> tuple[int, ...]:
    """Which of so many φ each scale uses: the nearest to s/(S − 1) of evenly spaced ticks, the first on a tie.

    Ties exist, and rounding in float64 decides them as in the published code.
    """
    edge = 1 / (3 * num_phis) if num_phis == 4 else 1 / (2 * num_phis)
    ticks = np.linspace(edge, 1 - edge, num_phis)
    return tuple(int(np.abs(ticks - s / (num_scales - 1)).argmin()) for s in range(num_scales))


class Phi(nn.Conv2d):
    """φ(e) = (1 − r)·e + r·conv(e): corrects what resizing a scale's codes has blurred."""

    def __init__(self, channels: int, share: float):
        super().__init__(channels, channels, 3, padding=1)
        self.share = share

    def forward(self, e):
        return (1 - self.share) * e + self.share * super().forward(e)


class MultiScaleQuantizer(nn.Module):
    """One codebook for all scales, and their φ: one each, one for all, or a few that neighbouring scales share.

    config: a `MultiScaleVQConfig`. phi_index (S,): the φ of each scale; empty where there is none.
    """

    def __init__(self, config):
        super().__init__()
        self.scales = config.v_patch_nums
        self.znorm, self.beta = config.using_znorm, config.beta
        self.embedding = nn.Embedding(config.vocab_size, config.z_channels)
        share, num_scales = abs(config.quant_resi), len(self.scales)
        count = config.share_quant_resi or config.default_qresi_counts or num_scales
        self.phi_index = phi_index(count, num_scales)
        phis = nn.ModuleList([Phi(config.z_channels, share) for _ in range(count)])
        if share <= NO_PHI:
            self.phi_index, self.quant_resi = (), nn.ModuleList()
        elif config.share_quant_resi == 0:
            self.quant_resi = phis
        elif config.share_quant_resi == 1:
            self.quant_resi = nn.ModuleDict({"qresi": phis[0]})
        else:
            self.quant_resi = nn.ModuleDict({"qresi_ls": phis})
        # in the published files: how often each scale chooses each code, a running mean (S, V); see `count`
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(num_scales, config.vocab_size))

    def phi(self, s: int) -> nn.Module:
        """The φ of scale s."""
        if not self.phi_index:
            return nn.Identity()
        phis = self.quant_resi
        if isinstance(phis, nn.ModuleDict):
            phis = phis["qresi_ls"] if "qresi_ls" in phis else [phis["qresi"]]
        return phis[self.phi_index[s]]

    @property
    def num_tokens(self) -> tuple[int, ...]:
        """Tokens of each scale."""
        return tuple(p * p for p in self.scales)

    def split(self, ids: torch.Tensor) -> list[torch.Tensor]:
        """Ids (B, L), or codes (B, L, C), as one (B, p_s², …) a scale; another number of them raises ValueError."""
        if ids.dim() < 2 or ids.shape[1] != sum(self.num_tokens):
            scales = ",".join(map(str, self.scales))
            raise ValueError(
                f"ids of the scales {scales} must be (B, {sum(self.num_tokens)}), got {tuple(ids.shape[:2])}"
            )
        return list(ids.split(self.num_tokens, dim=1))

    @torch.no_grad()
    def nearest(self, vectors: torch.Tensor) -> torch.Tensor:
        """Ids (B, h·w) of the codes nearest to vectors (B, C, h, w), the lowest one on a tie.

        With using_znorm both are divided by their length to be compared; `embed` uses the codes as they are.
        """
        with torch.autocast(vectors.device.type, enabled=False):
            codes = self.embedding.weight.float()
            rows = vectors.float().flatten(2).mT  # (B, h·w, C)
            if self.znorm:
                codes, rows = F.normalize(codes, dim=-1), F.normalize(rows, dim=-1)
                return torch.stack([(row @ codes.T).argmax(dim=1) for row in rows])  # (h·w, V) at a time
            squares = codes.square().sum(dim=1)
            distances = (row.square().sum(dim=1, keepdim=True) + squares - 2 * row @ codes.T for row in rows)
            return torch.stack([distance.argmin(dim=1) for distance in distances])

    def embed(self, ids: torch.Tensor, s: int) -> torch.Tensor:
        """What ids (B, p_s²) of scale s add to f̂, (B, C, h, w): φ of their codes, resized."""
        return self.embed_vectors(self.embedding(ids), s)

    def embed_vectors(self, vectors: torch.Tensor, s: int) -> torch.Tensor:
        """As `embed`, of vectors (B, p_s², C) in place of codes."""
        return self._spread(vectors, s, (self.scales[s],) * 2, (self.scales[-1],) * 2)

    def _spread(self, vectors, s, size: tuple[int, int], full: tuple[int, int]) -> torch.Tensor:
        with torch.autocast(vectors.device.type, enabled=False):
            e = vectors.float().mT.unflatten(2, size)
            if s < len(self.scales) - 1:
                e = F.interpolate(e, full, mode="bicubic")
            return self.phi(s)(e)

    def next_input(self, f_hat: torch.Tensor, s: int) -> torch.Tensor:
        """What a transformer reads of f̂ (B, C, h, w), the sum of the scales before s, to predict s: (B, p_s², C)."""
        with torch.autocast(f_hat.device.type, enabled=False):
            return F.interpolate(f_hat.float(), (self.scales[s],) * 2, mode="area").flatten(2).mT

    def steps(self, f: torch.Tensor, scales=None) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """(z (B, C, p_s, p_s), ids (B, p_s²), f̂_s (B, C, h, w)) of each scale s, for features f (B, C, h, w).

        z is what the scales before s leave of f, resized. The gradient of f̂ reaches codes and φ, never f. scales: other
        sides than the quantiser's, each a number or (height, width), the last one that of f, else ValueError.
        """
        sizes = [(side, side) if isinstance(side, int) else tuple(side) for side in scales or self.scales]
        if len(sizes) != len(self.scales) or sizes[-1] != tuple(f.shape[2:]):
            wanted = f"{len(self.scales)} scales, the last one that of the features"
            raise ValueError(f"expected {wanted} {tuple(f.shape[2:])}, got {sizes}")
        rest = f.detach().float()
        f_hat = torch.zeros_like(rest)
        for s, size in enumerate(sizes):
            z = rest if s == len(sizes) - 1 else F.interpolate(rest, size, mode="area")
            ids = self.nearest(z)
            e = self._spread(self.embedding(ids), s, size, sizes[-1])
            f_hat, rest = f_hat + e, rest - e.detach()
            yield z, ids, f_hat

    def forward(self, f: torch.Tensor, last=None) -> tuple[torch.Tensor, torch.Tensor, list]:
        """For training, of features f (B, C, h, w): (f̂ straight-through like f, vq_loss (), [(z, ids) of each scale]).

        vq_loss is the mean over the scales of β·‖sg(f̂_s) − f‖², which moves the encoder towards the codes, and
        ‖f̂_s − sg(f)‖², which moves codes and φ; each is a mean over all numbers. The gradient of f̂ passes to f alone.
        last (B,) long: the scale after which f̂ of each image is taken; None: the last one.
        """
        with torch.autocast(f.device.type, enabled=False):
            f, total, tokens, f_hats = f.float(), 0.0, [], []
            for z, ids, f_hat in self.steps(f):
                total = total + self.beta * F.mse_loss(f, f_hat.detach()) + F.mse_loss(f_hat, f.detach())
                tokens.append((z, ids))
                f_hats.append(f_hat.detach())
            taken = f_hats[-1] if last is None else torch.stack(f_hats, dim=1)[torch.arange(len(f)), last]
            return f + (taken - f.detach()), total / len(self.scales), tokens

    @torch.no_grad()
    def count(self, ids: list[torch.Tensor], step: int) -> None:
        """Put how often each scale chose each code in training step `step` into the running mean, in place.

        Its first step is copied, up to step 99 a step weighs 0.1, from then on 0.01. (The published code counts scales
        in place of steps.)
        """
        codes = len(self.embedding.weight)
        hits = torch.stack([scale.flatten().bincount(minlength=codes) for scale in ids]).to(self.ema_vocab_hit_SV)
        self.ema_vocab_hit_SV.lerp_(hits, 1.0 if step == 0 else 0.1 if step < 100 else 0.01)

    def usage(self, batch_size: int) -> torch.Tensor:
        """The share of the codes that each scale uses (S,), by the running mean of batches of so many images.

        A code counts as used from 0.08 of the hits on that all codes would have if chosen equally often. (The published
        threshold is that of the last scale for all, which calls the others unused.)
        """
        expected = batch_size * torch.tensor(self.num_tokens) / len(self.embedding.weight)
        return (self.ema_vocab_hit_SV.cpu() >= USED * expected[:, None]).float().mean(dim=1)
