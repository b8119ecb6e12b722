"""The LayerNorm of MAR's blocks and of the diffusion MLP."""

import torch
from torch import nn
from torch.nn import functional as F

from util.dist import is_half


class LayerNorm(nn.LayerNorm):
    """Of x in 16 bits a result in 16 bits, with gains and offsets rounded to them as autocast rounds other weights.

    Its statistics are float32. On CUDA, where autocast has LayerNorm compute in float32, x would be widened and the
    next layer narrow the result again: more memory traffic than the norm itself, forwards and backwards.
    """

    def forward(self, x):
        """x (..., D) to the same shape and dtype."""
        if not is_half(x.dtype):
            return super().forward(x)
        weight, bias = (None if p is None else p.to(x.dtype) for p in (self.weight, self.bias))
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)
