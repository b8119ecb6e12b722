"""The identity as a tokenizer: for images so small that their pixels can be the latents."""

from models.tokenizers.continuous import Tokenizer


class PixelTokenizer(Tokenizer):
    """The latents are the pixels; a token has `--patch_size` of them a side."""

    # With few diffusion steps an early model's samples grow to 1e7 unless the predicted x₀ stays in the data's range.
    clip = (-1.0, 1.0)

    def __init__(self, channels: int = 3):
        super().__init__("pixel", stride=1, channels=channels, image_channels=channels)

    def _moments(self, images):
        return images

    def _images(self, raw):
        return raw
