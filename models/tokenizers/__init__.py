"""Tokenizers: images in [−1, 1] to normalised latents and back. A new one is one file and one row of TOKENIZERS.

A tokenizer owns everything about its latents and has

    encode(images (B, 3 or 1, H, W), sample=True, generator=None) -> (raw − mean)·scale, (B, channels, h, w)
    decode(latents (B, channels, h, w)) -> images
    stride (pixels of a latent's side), channels, scale, mean, clip ((lo, hi) for a predicted x₀, or None)
"""

from models.tokenizers.pixel import PixelTokenizer

TOKENIZERS = {"pixel": PixelTokenizer}


def build_tokenizer(name: str, **options):
    """The tokenizer of this name; an unknown name raises ValueError."""
    if name not in TOKENIZERS:
        raise ValueError(f"unknown tokenizer {name!r}; valid: {', '.join(TOKENIZERS)}")
    return TOKENIZERS[name](**options)
