"""The LayerNorm of MAR's blocks and of the diffusion MLP."""

import torch
from torch import nn
from torch.nn import functional as F

from util.dist import is_half
from util.graphs import autocast_state


class LayerNorm(nn.LayerNorm):
    """Of x in 16 bits, under autocast, a result in 16 bits, with gains and offsets rounded as other weights are.

    Its statistics are float32. On CUDA, where autocast has LayerNorm compute in float32, x would be widened and the
    next layer narrow the result again: more memory traffic than the norm itself, forwards and backwards. That saves
    what follows 16 bits, the decoder and the diffusion MLP; the encoder's sums are float32, and so are its norms.
    """

    def forward(self, x):
        """x (..., D) to the same shape and dtype."""
        if not is_half(x.dtype) or autocast_state(x.device) is None:
            return super().forward(x)
        weight, bias = (None if p is None else p.to(x.dtype) for p in (self.weight, self.bias))
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)
