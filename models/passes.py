"""A pass of a whole transformer, captured as a CUDA graph where the same shapes come again.

Legend: B images, L tokens an image, D width of z.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from util.graphs import bucket

MOST_PASSES = 512  # captures of a model: 256 autoregressive steps, with label and without


def whole_pass(model, recompute: bool) -> Callable:
    """(tokens (B, L, …), mask (B, L), labels, num_visible) -> z (B, L, D), by `model.encode_decode`.

    model has `graphs`, a `util.graphs.Graphs`. recompute: the backward pass computes activations again, and nothing is
    captured.
    """
    if recompute:
        return partial(checkpoint, model.encode_decode, use_reentrant=False)
    return partial(_captured, model)


def padded_counts(counts: list[int], length: int) -> tuple[int, int]:
    """(fewest, most) of the counts of tokens of some images, each of `length`; where they differ, bounds on them.

    These are few, so that the shapes that images are padded to come again, whatever their counts.
    """
    fewest, most = min(counts), max(counts)
    return (fewest, most) if fewest == most else (0, min(bucket(most), length))


def _captured(model, tokens, mask, labels=None, num_visible=None) -> torch.Tensor:
    """z, of a graph from the second time on that as many images with as many visible tokens each are asked for.

    Images of different counts are padded. Conditions other than labels (B,) are computed eagerly.
    """
    tensors = [tokens, mask] if labels is None else [tokens, mask, labels]
    if not all(isinstance(x, torch.Tensor) for x in tensors) or not model.graphs.usable(model, tokens.device):
        return model.encode_decode(tokens, mask, labels, num_visible)
    counts = num_visible and padded_counts(num_visible, mask.shape[1])

    def encode_decode(tokens, mask, labels=None):
        return model.encode_decode(tokens, mask, labels, counts)

    return model.graphs.run_again((counts, labels is None), encode_decode, tensors)
