"""MAR's causal variants: one stack of its blocks, one token after the other (arXiv 2406.11838, Table 1).

Legend: B images, L tokens an image, C channels a token, D width, n inputs that are looked at. An order o (L,) lists the
positions of an image, the first one first. Input i of the stack is the token at o_{i−1} (the label for i = 0), where it
is, and where the next one will be; its output is z of the token at o_i. All tokens are targets of one pass.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.compiled import compile_all, run_part
from models.kv_cache import CausalConditions, Extension, raster_only
from models.mar import MAR, MARConfig
from models.passes import MOST_PASSES
from models.vit import Block
from util.args import flag
from util.graphs import Graphs

# --ar_order: the rules of sampling that such a model cannot do without; one trained in random order takes any order
FIXED_RULES = {"random": {"group": "one"}, "raster": {"order": "raster", "group": "one"}}


@dataclass(frozen=True)
class MARARConfig(MARConfig):
    """Everything that shapes a MARAR: a MAR's encoder and decoder are one stack, and all tokens are targets."""

    mask_ratio_min: float = 1.0
    buffer_size: int = 1  # class tokens
    ar_order: str = flag("random", "order of training: a new one for each image, or row by row", choices=FIXED_RULES)

    def __post_init__(self):
        super().__post_init__()
        if self.ar_order not in FIXED_RULES:
            raise ValueError(f"unknown ar_order {self.ar_order!r}; valid: {', '.join(FIXED_RULES)}")
        for name, only in (("mask_ratio_min", 1.0), ("buffer_size", 1)):
            if getattr(self, name) != only:
                raise ValueError(f"{name} {getattr(self, name)} must be {only} of a causal model")
        for name in ("embed_dim", "num_heads"):
            encoder, decoder = getattr(self, f"encoder_{name}"), getattr(self, f"decoder_{name}")
            if encoder != decoder:
                raise ValueError(f"encoder_{name} {encoder} and decoder_{name} {decoder} are of one stack: give one")

    @property
    def depth(self) -> int:
        """Blocks of the stack."""
        return self.encoder_depth + self.decoder_depth


def fixed_rules(sizes: dict) -> dict[str, str]:
    """The rules that a model with these fields of its configuration cannot do without."""
    return FIXED_RULES[sizes["ar_order"]]


def _size(dim: int, depth: int, heads: int, **rest) -> MARARConfig:
    half = depth // 2
    parts = dict(embed_dim=dim, depth=half, num_heads=heads)
    sizes = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in parts.items()}
    return MARARConfig(**sizes, **rest)


MAR_AR_CONFIGS = {  # of the depths and widths of MAR's sizes; depth is that of the whole stack
    "mar_ar_tiny": _size(64, 4, 4, diffloss_d=3, diffloss_w=128),
    "mar_ar_mini": _size(128, 6, 4, diffloss_d=3, diffloss_w=192),
    "mar_ar_base": _size(768, 24, 12, diffloss_d=6, diffloss_w=1024),
    "mar_ar_large": _size(1024, 32, 16, diffloss_d=8, diffloss_w=1280),
    "mar_ar_huge": _size(1280, 40, 16, diffloss_d=12, diffloss_w=1536),
}


class MARAR(nn.Module):
    """Causal model of the tokens of an image in a given order: `outputs` gives z of each, `token_head` is p(token | z).

    A configuration with --loss ce and no vocab_size raises ValueError.
    """

    per_class = ("class_emb.weight",)
    patchify, unpatchify, head_logits = MAR.patchify, MAR.unpatchify, MAR.head_logits  # a token is what it is of MAR
    token_head, width, head_dim = MAR.token_head, MAR.width, MAR.head_dim
    _add_inputs, _blocks, _add_token_head = MAR._add_inputs, MAR._blocks, MAR._add_token_head
    _init_weights, _class_embedding = MAR._init_weights, MAR._class_embedding

    def __init__(self, config: MARARConfig):
        super().__init__()
        self.config = c = config
        width = c.encoder_embed_dim
        self._add_inputs()
        self.pos_embed = nn.Parameter(torch.zeros(c.seq_len, width))  # where a token is
        self.next_pos_embed = nn.Parameter(torch.zeros(c.seq_len, width))  # where the next one will be
        self.layers = self._blocks(c.depth, width, c.encoder_num_heads)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        if c.loss == "diffusion":
            self.diffusion_pos_embed = nn.Parameter(torch.zeros(c.seq_len, width))
        self._init_weights()
        self._add_token_head()
        self.graphs = Graphs(MOST_PASSES)

    @property
    def fixed_rules(self) -> dict[str, str]:
        """Groups of one, and of a raster model its order."""
        return FIXED_RULES[self.config.ar_order]

    @property
    def blocks(self) -> tuple:
        """The transformer's blocks and the token head's."""
        return (*self.layers, *([self.celoss] if self.config.loss == "ce" else self.diffloss.net.res_blocks))

    def conditions(
        self, labels, *, orders=None, tokenizer=None, refresh_every: int = 1, recompute: bool = False
    ) -> CausalConditions:
        """What computes z of a batch of labels (B,) while it is sampled in orders (B, L) long, None: row by row.

        The cache is exact, so refresh_every plays no part. Another order than the one that a raster model was trained
        in raises ValueError.
        """
        return CausalConditions(self, labels, raster_only(orders) if self.config.ar_order == "raster" else orders)

    def encode_decode(self, tokens, mask, labels=None, num_visible=None, orders=None) -> torch.Tensor:
        """z (B, L, D) of every token from those before it, by position; mask and num_visible play no part.

        tokens (B, L, …); labels (B,) long, −1 = unconditional, None = all; orders (B, L) long as drawn for training,
        None or of a raster model: row by row.
        """
        if orders is None or self.config.ar_order == "raster":
            orders = torch.arange(self.config.seq_len, device=tokens.device).expand(len(tokens), -1)
        z = self.outputs(tokens, orders, labels)
        return torch.zeros_like(z).scatter(1, orders.unsqueeze(-1).expand_as(z), z)

    def outputs(self, tokens, orders, labels=None) -> torch.Tensor:
        """z (B, L, D), z[:, i] for the token at orders[:, i], which sees those at orders[:, :i].

        tokens (B, L, C), or ids (B, L), by position; orders (B, L) long; labels (B,) long, −1 or None: without.
        """
        places = torch.arange(self.config.seq_len, device=tokens.device).expand(len(tokens), -1)
        x = self._inputs(tokens, orders, labels, places)
        for block in self.layers:
            if self.config.grad_checkpointing and self.training:
                x = checkpoint(block, x, causal=True, use_reentrant=False)
            else:
                x = block(x, causal=True)
        return self._finish(x, orders)

    def extend(self, tokens, orders, labels, extension: Extension) -> torch.Tensor:
        """z (B, 1, D) of the next token of each image, from the inputs that its sequence in the cache lacks."""
        x = self._inputs(tokens, orders, labels, extension.places)
        for i, block in enumerate(self.layers):
            looked = extension.attend(i, *run_part(Block.before_attention, block, x).unbind(dim=2))
            x = run_part(Block.after_attention, block, x, looked)
        return self._finish(extension.last(x), orders.gather(1, extension.last_places))

    def compile_parts(self) -> None:
        """Compile the blocks and, of the diffusion loss, the MLP, in place; ValueError where that cannot be done."""
        compile_all(self, (*self.layers, *([] if self.config.loss == "ce" else [self.diffloss.net])))

    def _inputs(self, tokens, orders, labels, places):
        """Inputs (B, n, D) of the stack at places (B, n) long of each sequence."""
        upcoming, previous = orders.gather(1, places), orders.gather(1, (places - 1).clamp(min=0))
        if self.config.loss == "ce":
            x = self.token_emb(tokens.gather(1, previous))
        else:
            x = tokens.gather(1, previous.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
            x = self.z_proj(x.to(self.z_proj.weight.dtype))  # tokens are float32, whatever the model's dtype
        x = x + self.pos_embed[previous].to(x.dtype)
        label = self._class_embedding(labels, len(tokens)).unsqueeze(1).to(x.dtype)
        x = torch.where((places == 0).unsqueeze(-1), label, x)
        return self.z_proj_ln(x + self.next_pos_embed[upcoming].to(x.dtype))  # (B, n, D)

    def _finish(self, x, positions):
        """z (B, n, D) of outputs x (B, n, D) of the stack, for the tokens at positions (B, n)."""
        z = self.norm(x)
        return z + self.diffusion_pos_embed[positions] if self.config.loss == "diffusion" else z
