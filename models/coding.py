"""Between a tokenizer and a model: images as the tokens that the model's token head is for, and back.

Legend: B images, (H, W) pixels, L tokens an image, c channels of a latent, (h, w) = (H, W) / stride.
"""

import torch


def encode(model, tokenizer, images: torch.Tensor) -> torch.Tensor:
    """Tokens (B, L, …) of images (B, C, H, W) in [−1, 1]: ids, or of the tokenizer's posterior the mean.

    model: a `models.families.Backbone`.
    """
    if model.token_head.discrete:
        return model.patchify(tokenizer.encode_ids(images))
    return model.patchify(tokenizer.encode(images, sample=False))


def render(tokenizer, drawn: torch.Tensor) -> torch.Tensor:
    """Images (B, C, H, W), about in [−1, 1], of latents (B, c, h, w), differentiable, or of ids (B, h, w).

    An image of ids −1, which could not be drawn, is NaN.
    """
    if drawn.is_floating_point():
        return tokenizer.render(drawn)
    return blanked(tokenizer.decode_ids(drawn.clamp(min=0)), drawn)


def blanked(images: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Images (B, …), NaN where one of the ids (B, …) is −1."""
    none = (ids < 0).flatten(1).any(dim=1)
    return images.masked_fill(none.view(-1, *[1] * (images.dim() - 1)), torch.nan)
