"""Tokens of the images or cached moments that were read."""

import torch


def grid_of_batch(batch, tokenizer) -> tuple[int, int]:
    """(h, w) of the latents of images uint8 (b, c, H, W), of cached ids (b, 2, h, w) or of moments (b, 2, c', h, w)."""
    stride = tokenizer.stride if batch.dtype == torch.uint8 else 1
    return batch.shape[-2] // stride, batch.shape[-1] // stride


def posterior_shape(batch, tokenizer, model) -> tuple[int, int, int] | None:
    """(c, h, w) of the normal draws that an image's latents are made with; None where these need none."""
    if model.token_head.discrete or not tokenizer.gaussian:
        return None
    return tokenizer.moment_channels // 2, *grid_of_batch(batch, tokenizer)


def tokens_of(batch, flip, noise, tokenizer, model) -> torch.Tensor:
    """Tokens (b, L, …) of images uint8 (b, c, H, W), or of moments (b, 2, c', h, w), see `util.images.latents`.

    Where the model's tokens are ids these take the place of the moments, (b, 2, h, w).
    flip (b,) bool, or None for nowhere: take the mirror image. noise (b, c, h, w): the draws of the tokenizer's
    posterior, None where it has none.
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
    return model.patchify(tokenizer.from_moments(moments, noise=noise))
