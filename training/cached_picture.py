"""A look at a cache before training on it: some of its latents or ids, decoded.

A cache's checksums and its tokenizer's fingerprint say that the numbers are those once written, not that they are of
the right images, read in the right way.
"""

from pathlib import Path

import numpy as np
import torch

from models.tokenizers import Tokenizer
from util.images.pictures import make_grid, save_png, to_uint8

SHOWN = 8  # images of each size


def show_cached(dataset, tokenizer: Tokenizer, device, folder: Path) -> None:
    """Decode images spread over a cache into FOLDER/cached.png, above each other as they are and mirrored.

    dataset: latents or ids as `util.images.buckets.open_cache` gives them; of several sizes there are as many pictures,
    cached_SIZE.png. Pictures that are there stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = getattr(dataset, "parts", [dataset])
    for part in parts:
        path = folder / (f"cached_{part.img_size}.png" if len(parts) > 1 else "cached.png")
        if not path.exists():
            save_png(path, _decoded(part, tokenizer, device))
            print(f"images of the cache, decoded: {path}")


@torch.no_grad()
def _decoded(latents, tokenizer: Tokenizer, device) -> np.ndarray:
    """The picture of one size: a row as they are, and where training mirrors images a second one."""
    chosen = np.linspace(0, len(latents) - 1, min(SHOWN, len(latents))).astype(int)
    items = [latents[int(i)] for i in chosen]
    ways = {"": 0, "mirrored": 1} if latents.flip else {"": 0}
    tokens = torch.stack([pair[way] for way in ways.values() for pair, _, _ in items]).to(device)
    if latents.codebook_size:
        images = tokenizer.decode_ids(tokens)
    else:
        images = tokenizer.decode(tokenizer.from_moments(tokens, sample=False))
    names = [latents.classes[int(label)] for _, label, _ in items]
    return make_grid(to_uint8(images), [f"{name} {way}".strip() for way in ways for name in names], len(items))
