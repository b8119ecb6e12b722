"""The families of models, and what the sampling loop needs of one. A new family is one file and one row of FAMILIES.

Legend: B images, B' of them unfinished, L tokens an image, P positions with a condition, D width of z, N drawn tokens,
G of them guided.
"""

from typing import NamedTuple, Protocol

import torch

from models.mar import MAR, MAR_CONFIGS, MARConfig
from models.token_head import TokenHead


class Conditions(Protocol):
    """z of the tokens of a batch while it is sampled; keeps what the family keeps from step to step.

    tokens (B, L, …) are on the device; unknown (B, L) bool, images and rows are on the host, so that shapes are known
    without waiting.
    """

    passes: float  # images that went through the network so far, parts of a pass as fractions

    def look(self, step: int, tokens, unknown, images) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(z (B', P, D) under the labels, positions (B', P) long on the host, None for all L) of images (B',) long."""

    def at(self, step: int, tokens, unknown, rows, guided) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(z (N, D), z without label (G, D) or None) at rows (N, 2), (image, position); guided (G,) long of them."""

    def write(self, step: int, rows, drawn) -> None:
        """The tokens drawn (N, …) at rows (N, 2) of this step."""


class Backbone(Protocol):
    """What a family's model offers beside being an `nn.Module`."""

    config: object  # with seq_len (L) and class_num
    width: int  # D
    head_dim: int  # width of an attention head
    token_head: TokenHead
    per_class: tuple[str, ...]  # names of the parameters with a row for each class
    fixed_rules: dict[str, str]  # {} where any order and group size will do, else the names of those that it needs

    def patchify(self, latents: torch.Tensor) -> torch.Tensor:
        """A tokenizer's latents as tokens (B, L, …)."""

    def unpatchify(self, tokens: torch.Tensor) -> torch.Tensor:
        """The inverse of `patchify`."""

    def conditions(self, labels, *, orders=None, tokenizer=None, refresh_every: int = 1) -> Conditions:
        """For a batch of labels (B,). orders (B, L) long: positions in each image's random order, the first one first;
        tokenizer: where z is made of its codebook."""


class Family(NamedTuple):
    """A row of FAMILIES."""

    model: type
    config: type  # a frozen dataclass; its `util.args.flag` fields are flags of the command line
    sizes: dict  # --model NAME -> configuration
    tokens: tuple[str, ...]  # of the tokenizers that fit: "continuous", "discrete", "multiscale"


# A checkpoint names its family in config["family"] (none: mar), and has the sizes in config[family].
FAMILIES = {"mar": Family(MAR, MARConfig, MAR_CONFIGS, ("continuous",))}
SIZES = {size: name for name, family in FAMILIES.items() for size in family.sizes}  # --model NAME -> its family


def family_of(config: dict) -> str:
    """The family that a checkpoint's config names; one that is no row of FAMILIES raises ValueError."""
    name = config.get("family", "mar")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(f"the checkpoint is of the family {name!r}; valid: {', '.join(FAMILIES)}")
    return name
