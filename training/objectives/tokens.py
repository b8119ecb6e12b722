"""Tokens of the images or cached moments that were read."""

import torch

from util.rng import generator


def grid_of_batch(batch, tokenizer) -> tuple[int, int]:
    """(h, w) of the tokens of images uint8 (b, c, H, W), or of cached ids (b, 2, h, w)."""
    stride = tokenizer.stride if batch.dtype == torch.uint8 else 1
    return batch.shape[2] // stride, batch.shape[3] // stride


def tokens_of(batch, flip, seeds: list[int], tokenizer, model) -> torch.Tensor:
    """Tokens (b, L, …) of images uint8 (b, c, H, W), or of moments (b, 2, c', h, w), see `util.images.latents`.

    Where the model's tokens are ids these take the place of the moments, (b, 2, h, w).
    flip (b,) bool, or None for nowhere: take the mirror image. Where the tokenizer has a posterior, the draw of image i
    comes from seeds[i] alone.
    """
    discrete = model.token_head.discrete
    if batch.dtype == torch.uint8:
        images = batch.float() / 127.5 - 1
        if flip is not None:
            images = torch.where(flip[:, None, None, None], images.flip(-1), images)
        moments = tokenizer.encode_ids(images) if discrete else tokenizer.encode_moments(images)
    else:
        moments = batch[torch.arange(len(batch), device=batch.device), 0 if flip is None else flip.long()]
    if discrete:
        return model.patchify(moments.long())
    return model.patchify(tokenizer.from_moments(moments, generator=[generator(seed) for seed in seeds]))
