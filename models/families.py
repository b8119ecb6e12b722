"""The families of models, and what all programs need of one. A new family is one file and one row of FAMILIES.

Legend: B images, B' of them unfinished, L tokens an image, P positions with a condition, D width of z, N drawn tokens,
G of them guided.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from models import causal_gpt, mar, var_config
from models.causal_gpt import CAUSAL_GPT_CONFIGS, CausalGPT, CausalGPTConfig
from models.mar import MAR, MAR_CONFIGS, MARConfig
from models.mar_ar import MAR_AR_CONFIGS, MARAR, MARARConfig, fixed_rules
from models.maskgil import MASKGIL_CONFIGS, MaskGIL, MaskGILConfig
from models.token_head import LOSSES, TokenHead
from models.var import VAR, VAR_CONFIGS, VARConfig
from util.sizes import Size


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
        """The tokens drawn (N, …) at rows (N, 2) of this step; with decode(..., smooth=True) weights (N, V) too."""


class Config(Protocol):
    """A frozen dataclass of all that shapes a model; its `util.args.flag` fields are flags of the command line."""

    img_size: Size  # of an image in pixels, see util/sizes.py
    vae_stride: int  # pixels of a latent's side; like the next two set to what the tokenizer or the data have
    vae_embed_dim: int  # channels of a latent
    class_num: int
    label_drop_prob: float  # probability of training without the label
    mask_ratio_min: float  # the smallest share of the tokens that training masks; 1.0: all tokens are targets
    # a configuration may have mask_schedule, a row of MASK_RATIOS in models/mask_schedules.py, whose masks take the
    # place of these, and loss_tokens, "all" where known tokens are targets too
    grad_checkpointing: bool  # compute activations again in the backward pass, where the model can
    seq_len: int  # L
    grid: int  # tokens of an image's side
    # one may have any_size, True where images need not be square and their size may change after training; it then has
    # shape, (h, w) tokens of a column and of a row, and `Backbone.encode_decode` takes grid=(h, w), None for that
    FREE: frozenset[str]  # names of the fields that may change within a run


class Backbone(Protocol):
    """What a family's model, made of its configuration, offers beside being an `nn.Module`."""

    config: Config
    width: int  # D
    head_dim: int  # width of an attention head
    token_head: TokenHead
    per_class: tuple[str, ...]  # names of the parameters with a row for each class
    # a model of text has prompts, a `models.text.Prompts`, and num_labels: how many captions its labels number
    # of order and group those that it cannot do without, by name, such as {"order": "raster"}; and as cfg_base the
    # guidance schedule that is its default, if it has one of its own
    fixed_rules: dict[str, str]
    # names of parameters without weight decay, beside those of one dimension, may stand in no_decay; without that the
    # token head has none, as MAR's
    blocks: tuple  # modules with most of the linear layers, those of the token head included

    def patchify(self, latents: torch.Tensor) -> torch.Tensor:
        """A tokenizer's latents as tokens (B, L, …)."""

    def unpatchify(self, tokens: torch.Tensor) -> torch.Tensor:
        """The inverse of `patchify`."""

    def encode_decode(self, tokens, mask, labels, num_visible, orders=None) -> torch.Tensor:
        """z (B, L, D) for the training loss of the tokens (B, L, …) that mask (B, L) bool names, of the other tokens.

        tokens are what `Tokenizer.inputs_of` makes of them, which are the tokens themselves but for multi-scale ones.
        labels (B,) long, −1 without label, or None: all without; of a model of text a `models.text.Text`. num_visible:
        B ints, the tokens that are not masked.
        orders (B, L) long: positions in an order drawn for each image, in which the tokens that are not masked come
        first; for the families that need one. Where all tokens are targets (mask_ratio_min 1.0), z may look at the
        tokens before its own in the model's order.
        """

    def compile_parts(self) -> None:
        """Compile what a step repeats, in place, for batches of any size; ValueError where nothing can be compiled."""

    def conditions(
        self, labels, *, orders=None, tokenizer=None, refresh_every: int = 1, recompute: bool = False
    ) -> Conditions:
        """For a batch of labels (B,). orders (B, L) long: positions in each image's random order, the first one first;
        tokenizer: where z is made of its codebook; recompute: keep no activations for a backward pass that can be
        computed again in it."""


class Family(NamedTuple):
    """A row of FAMILIES."""

    model: type
    config: type  # a `Config`
    sizes: dict  # --model NAME -> configuration
    # of a tokenizer's `tokens` those that fit: "continuous", "discrete", "multiscale"; a configuration whose field
    # `loss`, of LOSSES, says which of them, and that of ids has a field `vocab_size`
    tokens: tuple[str, ...]
    # (weights of a file without config) -> (fields of the configuration, tokenizer settings); None: no such files
    read_published: Callable | None = None
    # (fields of the configuration) -> `Backbone.fixed_rules`, where these depend on it; None: the model class has them
    fixed_rules: Callable | None = None
    sampling: dict = {}  # its own defaults of flags that say how images are sampled


# A checkpoint names its family in config["family"] (none: mar), and has the sizes in config[family].
FAMILIES = {
    "mar": Family(MAR, MARConfig, MAR_CONFIGS, ("continuous", "discrete"), mar.read_published),
    "mar_ar": Family(MARAR, MARARConfig, MAR_AR_CONFIGS, ("continuous", "discrete"), fixed_rules=fixed_rules),
    "causal_gpt": Family(CausalGPT, CausalGPTConfig, CAUSAL_GPT_CONFIGS, ("discrete",), causal_gpt.read_published),
    "maskgil": Family(
        MaskGIL, MaskGILConfig, MASKGIL_CONFIGS, ("discrete",), sampling=dict(infer_mode="maskgil", num_iter=8, cfg=4.0)
    ),
    "var": Family(VAR, VARConfig, VAR_CONFIGS, ("multiscale",), var_config.read_published),
}
SIZES = {size: name for name, family in FAMILIES.items() for size in family.sizes}  # --model NAME -> its family


def takes_any_size(config) -> bool:
    """May images of models of this configuration, or of this class of them, have any height and width?"""
    return getattr(config, "any_size", False)


def tokens_of(family: str, sizes: dict) -> tuple[str, ...]:
    """Of the tokens that a family takes those that its model of these sizes does; its loss decides, if it has one."""
    return (LOSSES[sizes["loss"]],) if "loss" in sizes else FAMILIES[family].tokens


def rules_of(family: str, sizes: dict) -> dict[str, str]:
    """The `Backbone.fixed_rules` of a family's model of these sizes."""
    row = FAMILIES[family]
    return row.fixed_rules(sizes) if row.fixed_rules else row.model.fixed_rules


def family_of(config: dict) -> str:
    """The family that a checkpoint's config names; one that is no row of FAMILIES raises ValueError."""
    name = config.get("family", "mar")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(f"the checkpoint is of the family {name!r}; valid: {', '.join(FAMILIES)}")
    return name
