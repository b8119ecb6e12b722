"""A causal model draws the first rows of an image, another one completes it (arXiv 2507.13032 names it, no more).

Legend: B images, L tokens an image. The causal model is sampled with the settings of its checkpoint.
"""

import math
from collections import Counter
from dataclasses import asdict, dataclass

import torch
from torch import nn

from heads.schedules import needed_steps
from models.loading import load_model
from sampling.loop import generate
from sampling.settings import SampleConfig
from util.args import pick
from util.checkpoint import weights_hash
from util.rng import seed_of

DEFAULT_SHARE = 0.25


@dataclass(frozen=True)
class Prefix:
    """The first num_tokens of images, drawn by a causal model of ids; share: of all tokens, as asked for."""

    model: nn.Module
    sampling: SampleConfig
    share: float
    num_tokens: int

    @property
    def hashes(self) -> dict:
        """What identifies it among the settings of a run."""
        own = seed_of(weights_hash(self.model.state_dict()), sorted(asdict(self.sampling).items()))
        return dict(prefix=f"{own:08x}", prefix_share=self.share)

    def known(self, labels: torch.Tensor, seeds: list[int], tokenizer, evals: Counter) -> dict[str, torch.Tensor]:
        """tokens (B, L) with these first ones, and mask (B, L) of the others, as `sampling.loop.decode` takes them.

        labels, seeds: B each. evals: see `decode`.
        """
        shape = len(labels), self.model.config.seq_len
        mask = (torch.arange(shape[1]) >= self.num_tokens).expand(shape)
        if not self.num_tokens:
            return dict(tokens=torch.zeros(shape, dtype=torch.long), mask=mask)
        ids = generate(
            self.model,
            labels,
            self.sampling.rules(),
            num_iter=self.sampling.num_iter,
            seeds=seeds,
            tokenizer=tokenizer,
            evals=evals,
            num_taken=self.num_tokens,
            **self.sampling.token_head_options(),
        )
        return dict(tokens=self.model.patchify(ids), mask=mask)

    def completion_seeds(self, seeds: list[int]) -> list[int]:
        """Seeds of what completes the images: other ones than the prefix has used, distinct if these are.

        Where nothing is drawn before, these themselves.
        """
        shift = seed_of("completion") if self.num_tokens else 0
        return [(seed + shift) % 2**32 for seed in seeds]


def whole_rows(share: float, grid: int) -> int:
    """Tokens of the rows of a square grid that a share of its tokens reaches into."""
    return grid * math.ceil(math.ceil(share * grid**2) / grid)


def open_prefix(checkpoint: str, share: float | None, model, tokenizer, config: dict, ema: bool = True) -> Prefix:
    """The prefix of a checkpoint for a model with this tokenizer and config; share None: DEFAULT_SHARE.

    A model that cannot be continued, or whose ids, images or classes are others, raises ValueError.
    """
    what = f"--prefix_from {checkpoint}"
    if config.get("text") is not None or "group" in model.fixed_rules or not model.token_head.discrete:
        raise ValueError(f"{what} has no meaning for this model: it needs one of ids, classes and free groups")
    causal, own_tokenizer, own_config = load_model(checkpoint, ema=ema)
    if causal.fixed_rules.get("order") != "raster" or not causal.token_head.discrete:
        raise ValueError(f"{what} must be a causal model of ids, row by row, such as llamagen_ar_b")
    if own_tokenizer.describe() != tokenizer.describe():
        raise ValueError(f"{what} has ids of {own_tokenizer.describe()}, the model those of {tokenizer.describe()}")
    if causal.config.img_size != model.config.img_size:
        raise ValueError(f"{what} makes images of {causal.config.img_size} pixels, the model {model.config.img_size}")
    if own_config["data"]["classes"] != config["data"]["classes"]:
        raise ValueError(f"{what} has other classes than the model")
    sampling = pick(SampleConfig, own_config["sample"]).fitted(causal.fixed_rules, what, needed_steps(causal))
    share = DEFAULT_SHARE if share is None else share
    return Prefix(causal, sampling, share, whole_rows(share, model.config.grid))


def check_prefix_flags(prefix_from: str | None, prefix_share: float | None, edit_image: str | None) -> None:
    """Raise ValueError for flags of a prefix that do not go together."""
    if prefix_from is None and prefix_share is not None:
        raise ValueError(f"--prefix_share {prefix_share:g} needs --prefix_from, the checkpoint of a causal model")
    if prefix_from is not None and edit_image is not None:
        raise ValueError("--prefix_from and --edit_image both say which tokens are known: give one of the two")
