"""A pass of a whole transformer, captured as a CUDA graph where the same shapes come again.

Legend: B images, L tokens an image, D width of z.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

MOST_PASSES = 512  # captures of a model: 256 autoregressive steps, with label and without


def whole_pass(model, recompute: bool) -> Callable:
    """(tokens (B, L, …), mask (B, L), labels, num_visible) -> z (B, L, D), by `model.encode_decode`.

    model has `graphs`, a `util.graphs.Graphs`. recompute: the backward pass computes activations again, and nothing is
    captured.
    """
    if recompute:
        return partial(checkpoint, model.encode_decode, use_reentrant=False)
    return partial(_captured, model)


def _captured(model, tokens, mask, labels=None, num_visible=None) -> torch.Tensor:
    """z, of a graph from the second time on that as many images with as many visible tokens each are asked for.

    Eager are images of different counts, whose shapes hardly come again, and conditions other than labels (B,).
    """
    count = num_visible[0] if num_visible else None
    tensors = [tokens, mask] if labels is None else [tokens, mask, labels]
    plain = all(isinstance(x, torch.Tensor) for x in tensors) and (num_visible is None or set(num_visible) == {count})
    if not plain or not model.graphs.usable(model, tokens.device):
        return model.encode_decode(tokens, mask, labels, num_visible)

    def encode_decode(tokens, mask, labels=None):
        return model.encode_decode(tokens, mask, labels, None if count is None else [count] * len(tokens))

    return model.graphs.run_again((count, labels is None), encode_decode, tensors)
