"""The identity as a tokenizer: for images so small that their pixels can be the latents."""

import torch


class PixelTokenizer(torch.nn.Module):
    """Latents are the pixels themselves; `--patch_size` decides how many make a token."""

    stride = 1
    scale = 1.0
    mean = 0.0
    # An early model's few-step sampling runs away (to 1e7) unless the predicted x₀ is kept inside the data's range.
    clip = (-1.0, 1.0)

    def __init__(self, channels: int = 3):
        super().__init__()
        self.channels = channels

    def encode(self, images, sample=True, generator=None):
        if images.shape[1] != self.channels:
            raise ValueError(f"images must have {self.channels} channels, got {images.shape[1]}")
        return images

    def decode(self, latents):
        return latents
