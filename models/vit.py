"""The Vision Transformer's block (arXiv 2010.11929 Eq. 2 and 3), of which MAR's encoder and decoder are made.

Legend: B sequences, n inputs of each, D width, H heads. Attributes have timm's names, as those of MAR's checkpoints.
timm itself, whose block computes the same, loads torch's compiler when it is imported: half of a program's start.
"""

import torch
from torch import nn
from torch.nn import functional as F

from models.norms import LayerNorm


class Block(nn.Module):
    """x + Attention(LN(x)), then x + MLP(LN(x)): (B, n, D) to the same shape.

    mlp_ratio: width of the MLP's hidden layer over D. attn_dropout: of attention weights. proj_dropout: after each
    linear layer but that of queries, keys and values.
    """

    normed = (("norm1", "attn.qkv"), ("norm2", "mlp.fc1"))  # norms, and the linear layers that alone read them

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, attn_dropout: float, proj_dropout: float):
        super().__init__()
        self.norm1 = LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, num_heads, attn_dropout, proj_dropout)
        self.norm2 = LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width, int(width * mlp_ratio), proj_dropout)

    def forward(self, x, attn_mask=None, causal: bool = False):
        """attn_mask: bool, True where an input (row) sees another (column), as in scaled_dot_product_attention.

        causal: input i sees 0 … i, in place of a mask; CUDA has faster kernels for it.
        """
        query, key, value = (part.transpose(1, 2) for part in self.before_attention(x).unbind(dim=2))
        dropout = self.attn.dropout if self.training else 0.0
        options = dict(attn_mask=attn_mask, is_causal=causal, dropout_p=dropout)
        looked = F.scaled_dot_product_attention(query, key, value, **options)
        return self.after_attention(x, looked.transpose(1, 2))

    def before_attention(self, x) -> torch.Tensor:
        """Queries, keys and values (B, n, 3, H, D / H)."""
        return self.attn.qkv(self.norm1(x)).unflatten(-1, (3, self.attn.num_heads, -1))

    def after_attention(self, x, looked) -> torch.Tensor:
        """The rest of the block, from what its attention returned (B, n, H, D / H)."""
        x = x + self.attn.proj_drop(self.attn.proj(looked.flatten(2)))
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    """The linear layers and rates of a block's attention."""

    def __init__(self, width: int, num_heads: int, attn_dropout: float, proj_dropout: float):
        super().__init__()
        if width % num_heads:
            raise ValueError(f"a width of {width} cannot be shared among {num_heads} heads")
        self.num_heads = num_heads
        self.dropout = attn_dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(proj_dropout)


class MLP(nn.Module):
    """Linear, GELU, linear: (…, D) to the same shape."""

    def __init__(self, width: int, hidden: int, dropout: float):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.drop = nn.Dropout(dropout)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))
