"""The reward of --objective image: a Fréchet distance in several kinds of features, and what each image does to it.

Legend: n images, H x W pixels, d features of a kind, p <= 192 of its directions kept, P those of all kinds together, N
images in the bank. Statistics are float64. (docs/heads.md)
"""

from collections.abc import Callable

import torch

from util.dist import send
from util.evaluation.features import differentiable_features
from util.evaluation.reward import RewardDistance

RIDGE = 1e-3  # of the real features' mean variance, on both covariances


class Frechet:
    """The Fréchet distance F to real features of mean (p,) and covariance (p, p), and its influence function.

    F = ‖μ − μ_r‖² + tr(Σ + Σ_r − 2 (Σ_r^½ Σ Σ_r^½)^½), a ridge on both covariances (arXiv 1706.08500 Eq. 6).
    """

    def __init__(self, mean, covariance):
        covariance = torch.as_tensor(covariance, dtype=torch.float64)
        self.ridge = RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
        self.mean, self.covariance = torch.as_tensor(mean, dtype=torch.float64), covariance + self.ridge
        values, vectors = torch.linalg.eigh(self.covariance)
        self.root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T

    def __call__(self, features: torch.Tensor) -> tuple[float, Callable]:
        """(F of features (N, p), c), where c(f (n, p)) -> (n,), differentiable, is the influence function at them.

        c(f) = 2 (μ − μ_r)ᵀ(f − μ) + (f − μ)ᵀ A (f − μ), A = I − Σ_r^½ (Σ_r^½ Σ Σ_r^½)^−½ Σ_r^½. With μ, Σ and A held
        constant ∂c/∂f at a row of the features is N times the gradient of F in this row.
        """
        features = features.double().cpu()
        mean = features.mean(dim=0)
        centred = features - mean
        covariance = centred.T @ centred / len(features) + self.ridge
        values, vectors = torch.linalg.eigh(self.root @ covariance @ self.root)
        roots = values.clamp(min=1e-12 * float(values.max())).sqrt()
        shift = mean - self.mean
        distance = shift @ shift + covariance.trace() + self.covariance.trace() - 2 * roots.sum()
        a = torch.eye(len(mean), dtype=torch.float64) - self.root @ (vectors / roots) @ vectors.T @ self.root

        def influence(f):
            mu, slope, curvature = (send(x.to(f.dtype), f.device) for x in (mean, 2 * shift, a))
            f = f - mu
            return f @ slope + ((f @ curvature) * f).sum(dim=1)

        return max(float(distance), 0.0), influence


class Bank:
    """The features (N, P) of the last N images generated, the oldest replaced first."""

    def __init__(self, size: int):
        self.size, self.rows, self.next = size, None, 0

    def push(self, features: torch.Tensor) -> None:
        """Add features (n, P) float32; of n > N the last N."""
        features = features.detach().float().cpu()[-self.size :]
        if self.rows is None:
            self.rows = features.new_zeros(0, features.shape[1])
        missing = self.size - len(self.rows)
        self.rows = torch.cat([self.rows, features[:missing]])
        features = features[missing:]
        if len(features):
            at = (self.next + torch.arange(len(features))) % self.size
            self.rows[at] = features
            self.next = (self.next + len(features)) % self.size

    @property
    def is_full(self) -> bool:
        return self.rows is not None and len(self.rows) == self.size


class Reward:
    """The features of images, and how far a bank of them is from those of real images.

    kinds: as from `reward_kinds`; real: a data set of uint8 images; directions: as from `kept_directions`, for a bank
    made with them. Kinds without a gradient raise ValueError.
    """

    def __init__(self, real, kinds: tuple[str, ...], device, directions=None):
        networks = {kind: differentiable_features(kind, device) for kind in kinds if kind != "pixels"}
        self.functions = {kind: networks.get(kind, _pixels) for kind in kinds}
        statistics = RewardDistance(real, kinds, device, directions).real
        self.directions = {
            kind: torch.as_tensor(directions, dtype=torch.float32, device=device)
            for kind, (directions, _, _) in statistics.items()
        }
        self.real = {kind: Frechet(mean, covariance) for kind, (_, mean, covariance) in statistics.items()}

    def kept_directions(self) -> dict[str, torch.Tensor]:
        """{kind: directions (d, p)} where there are fewer than features: computed again, they might be turned."""
        return {kind: rows.double().cpu() for kind, rows in self.directions.items() if rows.shape[0] > rows.shape[1]}

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Features (n, P) of images (n, C, H, W) in [−1, 1], differentiable."""
        return torch.cat([self.functions[kind](images) @ self.directions[kind] for kind in self.functions], dim=1)

    def split(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """{kind: (n, p)} of features (n, P); another P raises ValueError."""
        widths = [self.directions[kind].shape[1] for kind in self.functions]
        if features.shape[1] != sum(widths):
            raise ValueError(f"the bank of the checkpoint has {features.shape[1]} features, --reward has {sum(widths)}")
        return dict(zip(self.functions, features.split(widths, dim=1)))

    def against(self, bank: torch.Tensor) -> dict[str, tuple[float, Callable]]:
        """{kind: (distance, influence function)} of a bank (N, P)."""
        return {kind: self.real[kind](part) for kind, part in self.split(bank).items()}


def _pixels(images):
    return images.movedim(1, -1).flatten(1)  # (n, H·W·C), as `RewardDistance` has them
