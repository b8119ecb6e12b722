"""Parts of the LLaMA-like models: the sizes that they share, norm, attention, feed-forward, block, rotary positions.

Legend: B images, n inputs of a sequence, D width, H heads, d their width, (h, w) tokens of an image's rows and columns.
Attribute names are those of LlamaGen's published checkpoints.
"""

from dataclasses import InitVar, dataclass
from math import isqrt
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from models.kv_cache import attention
from util.args import flag
from util.sizes import Size, check_counts, grid_of, image_size


@dataclass(frozen=True)
class LlamaConfig:
    """What shapes such a model of ids; names and defaults of the published constructors.

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
    img_size: Size = flag(256, "pixels of an image's side, or HxW, height x width", type=image_size, metavar="SIZE")
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
        check_counts(self, "dim n_layer n_head n_kv_head multiple_of vocab_size cls_token_num class_num")
        check_counts(self, "vae_stride vae_embed_dim")
        if block_size is not None:
            object.__setattr__(self, "img_size", isqrt(block_size) * self.vae_stride)
            if self.seq_len != block_size:
                raise ValueError(f"block_size {block_size} must be a square: an image's tokens are one")
        if grid_of(self.img_size, self.vae_stride) is None:
            raise ValueError(f"img_size {self.img_size} must be a multiple of vae_stride {self.vae_stride}")
        if self.dim % self.n_head or self.head_dim % 4:
            raise ValueError(f"dim {self.dim} must be a multiple of 4·n_head = {4 * self.n_head}")
        if self.n_head % self.kv_heads:
            raise ValueError(f"n_head {self.n_head} must be a multiple of n_kv_head {self.n_kv_head}")

    def check_only(self, model: str, **values) -> None:
        """Raise ValueError where a field is not the one value that a kind of model has."""
        for name, only in values.items():
            if getattr(self, name) != only:
                raise ValueError(f"{name} {getattr(self, name)} must be {only} of {model}")

    @property
    def shape(self) -> tuple[int, int]:
        """Tokens of a column and of a row, (h, w)."""
        return grid_of(self.img_size, self.vae_stride)

    @property
    def grid(self) -> int:
        """Tokens of a column, and where images are square of a row."""
        return self.shape[0]

    @property
    def seq_len(self) -> int:
        """Tokens of an image, L."""
        return self.shape[0] * self.shape[1]

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
    """Attention with rotated queries and keys; wqkv makes queries, keys and values in this order.

    causal: an input looks at itself and those before it, else at all. qk_norm: queries and keys of each head are
    normalised before they are rotated, with a gain for each channel of a head.
    """

    def __init__(self, c: LlamaConfig, causal: bool, qk_norm: bool):
        super().__init__()
        self.sizes, self.dropout = (c.n_head, c.kv_heads, c.kv_heads), c.attn_dropout_p
        self.head_dim, self.causal = c.head_dim, causal
        self.wqkv = nn.Linear(c.dim, sum(self.sizes) * c.head_dim, bias=False)
        self.wo = nn.Linear(c.dim, c.dim, bias=False)
        self.resid_dropout = nn.Dropout(c.resid_dropout_p)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps) if qk_norm else None

    def heads(self, x, rotary) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, each (B, n, ·, d), of x (B, n, D); rotary as in `Block`."""
        heads = self.wqkv(x).unflatten(-1, (-1, self.head_dim))
        turned, value = heads.split((sum(self.sizes[:2]), self.sizes[2]), dim=2)
        if self.q_norm is not None:  # under autocast the gain is wider than the values
            query, key = turned.split(self.sizes[:2], dim=2)
            turned = torch.cat([self.q_norm(query), self.k_norm(key)], dim=2).type_as(value)
        query, key = rotated(turned, rotary).split(self.sizes[:2], dim=2)
        return query, key, value

    def among(self, query, key, value, mask=None) -> torch.Tensor:
        """What the inputs find among each other, (B, n, H, d); mask (B, 1, 1, n) bool: those that may be looked at."""
        dropout = self.dropout if self.training else 0.0
        return attention(query, key, value, mask, causal=self.causal, dropout=dropout)

    def finish(self, looked) -> torch.Tensor:
        """(B, n, D) of what was looked up, (B, n, H, d)."""
        return self.resid_dropout(self.wo(looked.flatten(2)))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.w1 = nn.Linear(c.dim, c.ffn_dim, bias=False)
        self.w3 = nn.Linear(c.dim, c.ffn_dim, bias=False)
        self.w2 = nn.Linear(c.ffn_dim, c.dim, bias=False)
        self.ffn_dropout = nn.Dropout(c.ffn_dropout_p)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, n, D)."""
        return self.ffn_dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class Block(nn.Module):
    """Attention and feed-forward, each added to what it saw.

    Each branch is normalised before it, or with post_norm after it, before the addition. causal, qk_norm: as in
    `Attention`.
    """

    def __init__(self, c: LlamaConfig, *, causal: bool = True, qk_norm: bool = False, post_norm: bool = False):
        super().__init__()
        self.post_norm = post_norm
        self.attention, self.feed_forward = Attention(c, causal, qk_norm), FeedForward(c)
        self.attention_norm, self.ffn_norm = RMSNorm(c.dim, c.norm_eps), RMSNorm(c.dim, c.norm_eps)

    def forward(self, x, rotary, attend=None, mask=None) -> torch.Tensor:
        """(B, n, D) of x (B, n, D), with the rotation (B or 1, n, d / 2, 2) of each input.

        attend(query, key, value), each (B, n, ·, d): in place of attention among the inputs. mask (B, 1, 1, n) bool:
        those that may be looked at, None: all.
        """
        query, key, value = self.before_attention(x, rotary)
        looked = attend(query, key, value) if attend else self.attention.among(query, key, value, mask)
        return self.after_attention(x, looked)

    def before_attention(self, x, rotary) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, each (B, n, ·, d)."""
        return self.attention.heads(x if self.post_norm else self.attention_norm(x), rotary)

    def after_attention(self, x, looked) -> torch.Tensor:
        """The rest of the block, from what its attention returned (B, n, H, d)."""
        branch = self.attention.finish(looked)
        if self.post_norm:
            x = x + self.attention_norm(branch)
            return x + self.ffn_norm(self.feed_forward(x))
        x = x + branch
        return x + self.feed_forward(self.ffn_norm(x))


def grid_table(c: LlamaConfig, height: int, width: int, device=None) -> torch.Tensor:
    """(h·w, d / 2, 2): cos and sin of each pair of channels, of the tokens row by row.

    The first half of the pairs turns with the row, the second with the column.
    """
    frequencies = c.rope_base ** (-torch.arange(0, c.head_dim // 2, 2, device=device).float() / (c.head_dim // 2))
    rows, columns = (torch.arange(n, device=device).float().unsqueeze(1) * frequencies for n in (height, width))
    pairs = torch.cat(
        [rows.unsqueeze(1).expand(-1, width, -1), columns.unsqueeze(0).expand(height, -1, -1)], dim=-1
    ).flatten(0, 1)  # (h·w, d / 2)
    return torch.stack([pairs.cos(), pairs.sin()], dim=-1)


def rotated(x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """x (B, n, H, d) with neighbouring channels (a, b) as (a·cos − b·sin, b·cos + a·sin).

    rotary (B or 1, n, d / 2, 2): cos and sin of each pair.
    """
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotary.float().unsqueeze(2).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).type_as(x)


class Llama(nn.Module):
    """What such models of ids share: a config, layers, and as output p(id | z), under their published names."""

    no_decay = ()  # the output too has weight decay, as all else of two dimensions or more

    @property
    def token_head(self) -> nn.Module:
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
        return ids.unflatten(1, self.config.shape)
