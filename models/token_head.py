"""What the loop, the rules and the objectives need of a token head, p(token | z), and of its sampler.

Legend: B images, L tokens an image, N token rows, G of them guided, D width of z, m draws of a token in training.
`models.diffloss.DiffLoss` is one. ("Token head" is this; the policy heads that move rules live in heads/.)
"""

from typing import NamedTuple, Protocol

import torch

LOSSES = {"diffusion": "continuous", "ce": "discrete"}  # --loss: the tokens that it is for


class Sampler(Protocol):
    """Draws tokens with the settings that `TokenHead.sampler` was given."""

    num_steps: tuple[int, int]  # of the network for a token, at the first and at the last autoregressive step

    def evals(self, num_steps: int, tokens: int, guided: int, profile=None) -> int:
        """Rows of the network that `draw` computes for so many tokens, of which some are guided."""

    def noise(self, generators: list, rows: torch.Tensor, num_steps: int) -> torch.Tensor:
        """What `draw` needs for rows (N, 2) long on the host, (image, position); image i draws from generators[i]."""

    def draw(self, z, z_uncond, cfg, tau, noise, num_steps: int, guided=None, profile=None) -> torch.Tensor:
        """Tokens (N, …) under z (N, D), guided by z_uncond (G, D) in the rows guided (G,); differentiable.

        An id that cannot be drawn, since what it depends on is not finite, is −1.
        profile(t / 1000) -> m, a float or (N,), scales guidance over diffusion steps: w(t) = 1 + (w − 1)·m; None: 1.
        A head without diffusion steps refuses any other one with `check_no_profile`.
        """

    def log_prob(self, drawn, z, z_uncond, cfg, tau, guided=None) -> torch.Tensor:
        """log p (N,) of tokens drawn (N, …) under what `draw` draws from, differentiable; of ids only."""

    def log_probs(self, z, z_uncond, cfg, tau, guided=None) -> torch.Tensor:
        """As `log_prob`, of all V ids there are, (N, V)."""


class TokenHead(Protocol):
    """p(token | z) with its training loss. What it predicts is a NamedTuple of tensors (N, …)."""

    has_steps: bool  # is a token drawn in diffusion steps, over which guidance may have a profile?
    discrete: bool  # are tokens ids (B, L) long? They have no gradient: what they depend on learns by `log_probs`

    def empty(self, batch: int, length: int) -> torch.Tensor:
        """Tokens (B, L, …) of which nothing is known."""

    def draws(self, generator: torch.Generator, num_tokens: int) -> dict[str, torch.Tensor]:
        """What a training loss of so many tokens is random in, each (m, N, …)."""

    def predict(self, target, z, draws: dict, tau=None) -> NamedTuple:
        """The prediction for target (N, …) under z (N, D), with draws (N, …)."""

    def losses(self, prediction, target, draws: dict) -> dict[str, torch.Tensor]:
        """The terms, each (N,), whose sum is the loss."""

    def fit(self, prediction, target, draws: dict) -> torch.Tensor:
        """The term (N,) that says how well the prediction fits target (N, …), which guidance is trained on."""

    def measures(self, prediction, target) -> dict[str, torch.Tensor]:
        """What is reported of a prediction beside the losses, each (N,), without gradient; {}: nothing."""

    def comparable(self, loss, draws: dict) -> torch.Tensor:
        """Losses (N,) such that tokens can be compared by them: without what their draws alone make of them."""

    def guided(self, cond, uncond, w) -> NamedTuple:
        """The prediction under guidance w (N,)."""

    def sampler(self, *, num_steps=100, solver=None, spacing=None, clip=None, top_k=0, top_p=1.0) -> Sampler:
        """What draws tokens. A head of ids has no use for the settings of diffusion steps, num_steps to clip, and
        takes any; another head refuses the filters of ids, top_k and top_p, with `check_no_filter`."""


def guide(cond: torch.Tensor, uncond: torch.Tensor, w) -> torch.Tensor:
    """uncond + w·(cond − uncond) (arXiv 2207.12598, Eq. 6); w = 1 gives cond exactly."""
    return push(cond, uncond, w - 1.0)


def push(cond: torch.Tensor, uncond: torch.Tensor, excess) -> torch.Tensor:
    """The same, of the excess w − 1."""
    if isinstance(excess, torch.Tensor):
        return torch.addcmul(cond, cond - uncond, excess)
    return torch.add(cond, cond - uncond, alpha=excess)


def check_no_profile(profile) -> None:
    """Raise ValueError for a profile given to a head that draws its tokens without diffusion steps."""
    if profile is not None:
        raise ValueError("--cfg_profile must be constant: this model draws a token in one step, not in diffusion steps")


def check_no_filter(top_k: int, top_p: float) -> None:
    """Raise ValueError for a filter of ids given to a head whose tokens are none."""
    for name, value, off in (("top_k", top_k, (0,)), ("top_p", top_p, (0, 1))):
        if value not in off:
            raise ValueError(
                f"--{name} {value:g} must be {off[-1]}: this model draws tokens that are no ids (--loss ce)"
            )
