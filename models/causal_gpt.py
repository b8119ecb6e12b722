"""LlamaGen's causal LLaMA over the ids of an image, row by row (arXiv 2406.06525).

Legend: B images, L tokens an image, n inputs that are looked at, D width, H heads, d their width, V entries of the
codebook. Input 0 is the class, input i the token i − 1; the output of input i is z of token i. Attribute names are
those of the published checkpoints.
"""

from dataclasses import InitVar, dataclass
from math import isqrt
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models.celoss import CELinear
from models.kv_cache import CausalConditions, Extension, attention, raster_only
from models.mar import compile_all
from util.args import flag

COND_ROPES = {"zero": 0.0, "identity": 1.0}  # what the class's queries and keys are multiplied by; published: zero


@dataclass(frozen=True)
class CausalGPTConfig:
    """Everything that shapes a CausalGPT; names and defaults of the published constructor.

    num_classes and block_size, the number of tokens of an image, may be given in place of class_num and img_size; they
    are not kept under these names.
    """

    dim: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int | None = None  # heads of keys and values; None: n_head
    multiple_of: int = 256  # of the feed-forward's width
    ffn_dim_multiplier: float | None = None
    rope_base: int = 10000
    norm_eps: float = 1e-5
    token_dropout_p: float = flag(0.1, "dropout of what is embedded", low=0, high=1)
    attn_dropout_p: float = flag(0.0, "dropout of attention weights", low=0, high=1)
    resid_dropout_p: float = flag(0.1, "dropout after attention", low=0, high=1)
    ffn_dropout_p: float = flag(0.1, "dropout after the feed-forward", low=0, high=1)
    num_classes: InitVar[int | None] = None
    vocab_size: int = flag(16384, "entries of the codebook (the tokenizer's)", low=1)
    block_size: InitVar[int | None] = None
    cls_token_num: int = 1
    cond_rope: str = flag("zero", "rotation of the class: zero as published, or none", choices=COND_ROPES)
    img_size: int = flag(256, "image height and width in pixels", low=1)
    vae_stride: int = flag(16, "pixels of a latent's side", low=1)
    vae_embed_dim: int = flag(8, "channels of a latent", low=1)
    class_num: int = flag(1000, "number of classes (read from the data when training)", low=1)
    label_drop_prob: float = flag(0.1, "probability of training without the label", low=0, high=1)
    mask_ratio_min: float = 1.0
    grad_checkpointing: bool = flag(False, "recompute activations in the backward pass")

    FREE: ClassVar = frozenset(
        "token_dropout_p attn_dropout_p resid_dropout_p ffn_dropout_p label_drop_prob grad_checkpointing".split()
    )

    def __post_init__(self, num_classes, block_size):
        if num_classes is not None:
            object.__setattr__(self, "class_num", num_classes)
        if block_size is not None:
            object.__setattr__(self, "img_size", isqrt(block_size) * self.vae_stride)
            if self.seq_len != block_size:
                raise ValueError(f"block_size {block_size} must be a square: an image's tokens are one")
        if self.img_size < self.vae_stride or self.img_size % self.vae_stride:
            raise ValueError(f"img_size {self.img_size} must be a multiple of vae_stride {self.vae_stride}")
        if self.cond_rope not in COND_ROPES:
            raise ValueError(f"unknown cond_rope {self.cond_rope!r}; valid: {', '.join(COND_ROPES)}")
        for name, only in (("mask_ratio_min", 1.0), ("cls_token_num", 1)):
            if getattr(self, name) != only:
                raise ValueError(f"{name} {getattr(self, name)} must be {only} of a causal model of classes")
        if self.dim % self.n_head or self.head_dim % 4:
            raise ValueError(f"dim {self.dim} must be a multiple of 4·n_head = {4 * self.n_head}")
        if self.n_head % self.kv_heads:
            raise ValueError(f"n_head {self.n_head} must be a multiple of n_kv_head {self.n_kv_head}")

    @property
    def grid(self) -> int:
        """Tokens of an image's side."""
        return self.img_size // self.vae_stride

    @property
    def seq_len(self) -> int:
        """Tokens of an image, L."""
        return self.grid**2

    @property
    def head_dim(self) -> int:
        """Width of a head, d."""
        return self.dim // self.n_head

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.n_kv_head or self.n_head

    @property
    def ffn_dim(self) -> int:
        """Width of the feed-forward."""
        width = int(8 * self.dim / 3)
        if self.ffn_dim_multiplier is not None:
            width = int(self.ffn_dim_multiplier * width)
        return -(-width // self.multiple_of) * self.multiple_of


CAUSAL_GPT_CONFIGS = {
    "causal_gpt_tiny": CausalGPTConfig(dim=64, n_layer=4, n_head=4, multiple_of=32),  # for CPU
    "llamagen_ar_b": CausalGPTConfig(dim=768, n_layer=12, n_head=12),  # published: FID 5.46 at cfg 2.0
    "llamagen_ar_l": CausalGPTConfig(dim=1024, n_layer=24, n_head=16),  # published: FID 3.80 at cfg 2.0
    "llamagen_ar_xl": CausalGPTConfig(dim=1280, n_layer=36, n_head=20),
    "llamagen_ar_xxl": CausalGPTConfig(dim=1536, n_layer=48, n_head=24),
}


# of the published models of classes, where scripts/download_weights.py puts it
PUBLISHED_TOKENIZER = {"tokenizer": "llamagen_vq16", "vae_path": "pretrained_models/vq_ds16_c2i.pt"}


def read_published(weights: dict) -> tuple[dict, dict]:
    """(the sizes that the tensors of a published model of classes have, settings of the tokenizer that it is for).

    Numbers of heads and --img_size are not among them: no tensor depends on these. Weights that lack the tensors that
    say the sizes, or have them with other numbers of axes, raise ValueError.
    """
    layers = {name.split(".")[1] for name in weights if name.startswith("layers.")}
    shapes = {}
    for name in ("cls_embedding.embedding_table.weight", "output.weight"):
        if name not in weights:
            raise ValueError(f"the checkpoint is no class model of LlamaGen: its 'model' has no {name}")
        shapes[name] = tuple(weights[name].shape)
        if len(shapes[name]) != 2:
            raise ValueError(f"the checkpoint is no class model of LlamaGen: {name} has the shape {shapes[name]}")
    num_labels, dim = shapes["cls_embedding.embedding_table.weight"]  # with a row for no class
    known = dict(dim=dim, n_layer=len(layers), class_num=num_labels - 1, vocab_size=shapes["output.weight"][0])
    return known, dict(PUBLISHED_TOKENIZER)


class CausalGPT(nn.Module):
    """Causal model of ids, row by row: `outputs` gives z of each, `output` is p(id | z)."""

    per_class = ("cls_embedding.embedding_table.weight",)
    fixed_rules = {"order": "raster", "group": "one"}

    def __init__(self, config: CausalGPTConfig):
        super().__init__()
        self.config = c = config
        self.width, self.head_dim = c.dim, c.head_dim
        self.cls_embedding = ClassEmbedding(c.class_num, c.dim)
        self.tok_embeddings = nn.Embedding(c.vocab_size, c.dim)
        self.tok_dropout = nn.Dropout(c.token_dropout_p)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.norm = RMSNorm(c.dim, c.norm_eps)
        self.output = CELinear(c.dim, c.vocab_size)
        self.register_buffer("rotary", rotary_table(c), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.output.weight)  # the first loss is ln V

    @property
    def token_head(self) -> CELinear:
        """p(id | z), under its published name."""
        return self.output

    @property
    def blocks(self) -> tuple:
        """The transformer's blocks."""
        return tuple(self.layers)

    def patchify(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids (B, h, w) to (B, L), row by row."""
        return ids.flatten(1)

    def unpatchify(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids (B, L) to (B, h, w)."""
        return ids.unflatten(1, (self.config.grid, self.config.grid))

    def logits(self, ids, labels=None) -> torch.Tensor:
        """(B, L, V) float32, row i for token i, from ids (B, L) before it; labels (B,) long, −1 or None: no class."""
        return self.output.logits(self.outputs(ids, None, labels))

    def conditions(
        self, labels, *, orders=None, tokenizer=None, refresh_every: int = 1, recompute: bool = False
    ) -> CausalConditions:
        """What computes z of a batch of labels (B,) while it is sampled; another order than raster is a ValueError."""
        return CausalConditions(self, labels, raster_only(orders))

    def encode_decode(self, tokens, mask, labels=None, num_visible=None, orders=None) -> torch.Tensor:
        """z (B, L, D) of every token from those before it; mask, num_visible and orders play no part."""
        return self.outputs(tokens, None, labels)

    def outputs(self, tokens, orders=None, labels=None) -> torch.Tensor:
        """z (B, L, D) of ids (B, L), of each from those before it; orders play no part."""
        places = torch.arange(self.config.seq_len, device=tokens.device).expand(len(tokens), -1)
        x, rotary = self._inputs(tokens, labels, places), self.rotary[places]
        for block in self.layers:
            if self.config.grad_checkpointing and self.training:
                x = checkpoint(block, x, rotary, use_reentrant=False)
            else:
                x = block(x, rotary)
        return self.norm(x)

    def extend(self, tokens, orders, labels, extension: Extension) -> torch.Tensor:
        """z (B, 1, D) of the next token of each image, from the inputs that its sequence in the cache lacks."""
        x, rotary = self._inputs(tokens, labels, extension.places), self.rotary[extension.places]
        for i, block in enumerate(self.layers):
            x = block(x, rotary, lambda *parts, layer=i: extension.attend(layer, *parts))
        return self.norm(extension.last(x))

    def compile_parts(self) -> None:
        """Compile the blocks, in place; ValueError where that cannot be done."""
        compile_all(self.layers, self.norm.weight.device)

    def _inputs(self, ids, labels, places):
        """Inputs (B, n, D) at places (B, n) long of the sequence."""
        if labels is None:
            labels = torch.full((len(ids),), -1, device=ids.device)
        x = self.tok_embeddings(ids.gather(1, (places - 1).clamp(min=0)))
        return self.tok_dropout(torch.where((places == 0).unsqueeze(-1), self.cls_embedding(labels).unsqueeze(1), x))


class ClassEmbedding(nn.Module):
    """A row for each class, and a last one for none."""

    def __init__(self, class_num: int, dim: int):
        super().__init__()
        self.embedding_table = nn.Embedding(class_num + 1, dim)

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        """(B, D) of labels (B,) long, −1 = no class."""
        return self.embedding_table(torch.where(labels < 0, self.embedding_table.num_embeddings - 1, labels))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps), computed in float32, times a gain."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of the same shape and dtype."""
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)).type_as(x) * self.weight


class Attention(nn.Module):
    """Attention with rotated queries and keys; wqkv holds queries, keys and values in this order."""

    def __init__(self, c: CausalGPTConfig):
        super().__init__()
        self.sizes, self.dropout = (c.n_head, c.kv_heads, c.kv_heads), c.attn_dropout_p
        self.head_dim = c.head_dim
        self.wqkv = nn.Linear(c.dim, sum(self.sizes) * c.head_dim, bias=False)
        self.wo = nn.Linear(c.dim, c.dim, bias=False)
        self.resid_dropout = nn.Dropout(c.resid_dropout_p)

    def forward(self, x, rotary, attend=None) -> torch.Tensor:
        """(B, n, D); attend(query, key, value), each (B, n, ·, d): in place of causal attention among the inputs."""
        heads = self.wqkv(x).unflatten(-1, (-1, self.head_dim))
        turned, value = heads.split((sum(self.sizes[:2]), self.sizes[2]), dim=2)
        query, key = rotated(turned, rotary).split(self.sizes[:2], dim=2)
        if attend is None:
            looked = attention(query, key, value, causal=True, dropout=self.dropout if self.training else 0.0)
        else:
            looked = attend(query, key, value)
        return self.resid_dropout(self.wo(looked.flatten(2)))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, c: CausalGPTConfig):
        super().__init__()
        self.w1 = nn.Linear(c.dim, c.ffn_dim, bias=False)
        self.w3 = nn.Linear(c.dim, c.ffn_dim, bias=False)
        self.w2 = nn.Linear(c.ffn_dim, c.dim, bias=False)
        self.ffn_dropout = nn.Dropout(c.ffn_dropout_p)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, n, D)."""
        return self.ffn_dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class Block(nn.Module):
    """Attention and feed-forward, each after its norm and added to what it saw."""

    def __init__(self, c: CausalGPTConfig):
        super().__init__()
        self.attention, self.feed_forward = Attention(c), FeedForward(c)
        self.attention_norm, self.ffn_norm = RMSNorm(c.dim, c.norm_eps), RMSNorm(c.dim, c.norm_eps)

    def forward(self, x, rotary, attend=None) -> torch.Tensor:
        """(B, n, D) of x (B, n, D), with the rotation (B, n, d / 2, 2) of each input; attend as in `Attention`."""
        x = x + self.attention(self.attention_norm(x), rotary, attend)
        return x + self.feed_forward(self.ffn_norm(x))


def rotary_table(c: CausalGPTConfig) -> torch.Tensor:
    """(1 + L, d / 2, 2): cos and sin of each pair of channels, of the class, then of the tokens row by row.

    The first half of the pairs turns with the row, the second with the column. The class has cos = sin = 0 as
    published: all tokens give it the score 0.
    """
    frequencies = c.rope_base ** (-torch.arange(0, c.head_dim // 2, 2).float() / (c.head_dim // 2))
    angles = torch.arange(c.grid).float().unsqueeze(1) * frequencies  # (side, d / 4)
    pairs = torch.cat(
        [angles.unsqueeze(1).expand(-1, c.grid, -1), angles.unsqueeze(0).expand(c.grid, -1, -1)], dim=-1
    ).flatten(0, 1)  # (L, d / 2)
    table = torch.stack([pairs.cos(), pairs.sin()], dim=-1)
    of_class = torch.zeros_like(table[:1])
    of_class[..., 0] = COND_ROPES[c.cond_rope]
    return torch.cat([of_class, table])


def rotated(x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """x (B, n, H, d) with neighbouring channels (a, b) as (a·cos − b·sin, b·cos + a·sin); rotary (B, n, d / 2, 2)."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotary.float().unsqueeze(2).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).type_as(x)
