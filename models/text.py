"""Text as what a model is conditioned on: features of captions, and what makes inputs of them.

Legend: B images, T tokens of a caption at most, C channels of their features, D width of the model. A `mask` (B, T)
bool is True where a caption has a token.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn
from torch.nn import functional as F

from util.dist import send


@dataclass(frozen=True)
class Text:
    """The captions of B images: features (B, T, C), mask (B, T) bool, known (B,) bool, False where there is none."""

    features: torch.Tensor
    mask: torch.Tensor
    known: torch.Tensor

    def __getitem__(self, index) -> "Text":
        """Those of the images at an index, as of a tensor's first axis."""
        return Text(self.features[index], self.mask[index], self.known[index])

    def to(self, device) -> "Text":
        """The same on a device."""
        return Text(*(send(part, device) for part in (self.features, self.mask, self.known)))


class Prompts:
    """Numbered captions: `prompts[labels]` is the `Text` of labels (B,) long on the host, −1 = no caption.

    captions: their texts; rows[i]: the features (n, C) float16 of caption i, n at most num_tokens, as a numpy array.
    """

    def __init__(self, captions: list[str], rows: Sequence, num_tokens: int, width: int):
        self.captions, self.rows, self.num_tokens, self.width = captions, rows, num_tokens, width

    def __len__(self) -> int:
        return len(self.captions)

    @cached_property
    def content(self) -> str:
        """16 hex digits that change with the captions and with where they are cut off."""
        parts = [self.captions, self.num_tokens]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()

    def __getitem__(self, labels: torch.Tensor) -> Text:
        features = torch.zeros(len(labels), self.num_tokens, self.width, dtype=torch.float16)
        mask = torch.zeros(len(labels), self.num_tokens, dtype=torch.bool)
        for i, label in enumerate(labels.tolist()):
            if label >= 0:
                row = torch.from_numpy(self.rows[label])
                features[i, : len(row)], mask[i, : len(row)] = row, True
        return Text(features, mask, labels >= 0)


def condition_of(model, labels: torch.Tensor, device):
    """What the model's `encode_decode` takes for labels (B,) long on the host: they, or the captions they number."""
    return model.prompts[labels].to(device) if reads_text(model) else send(labels, device)


def reads_text(model) -> bool:
    """Do the model's labels number captions?"""
    return getattr(model, "prompts", None) is not None


def is_known(condition) -> torch.Tensor:
    """(B,) bool: which images a condition, see `condition_of`, says something of."""
    return condition.known if isinstance(condition, Text) else condition >= 0


class CaptionEmbedder(nn.Module):
    """Inputs of captions, and of none: the unconditional embedding, which is trained, is in the features' place."""

    def __init__(self, caption_dim: int, num_tokens: int, dim: int):
        super().__init__()
        self.cap_proj = Projector(caption_dim, dim)
        self.uncond_embedding = nn.Parameter(torch.randn(num_tokens, caption_dim) / caption_dim**0.5)

    def forward(self, text: Text | None, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(inputs (B, T, D), mask (B, T): those that may be looked at) of B = batch captions; None: of none.

        Without a caption all T may be looked at. What features hold where a caption has no token does not matter, so
        those of fewer than T tokens are filled up. Captions of more tokens or another width raise ValueError.
        """
        free = self.uncond_embedding.expand(batch, -1, -1)
        if text is None:
            return self.cap_proj(free), torch.ones(free.shape[:2], dtype=torch.bool, device=free.device)
        num, width = text.features.shape[1:]
        most, channels = self.uncond_embedding.shape
        if num > most or width != channels:
            raise ValueError(f"captions have {num} tokens of {width} channels, the model takes {most} of {channels}")
        mask = F.pad(text.mask, (0, most - num))
        features = F.pad(text.features.to(free.dtype), (0, 0, 0, most - num)).masked_fill(~mask.unsqueeze(-1), 0)
        features = torch.where(text.known[:, None, None], features, free)
        return self.cap_proj(features), mask | ~text.known.unsqueeze(1)


class Projector(nn.Module):
    """Features (…, C) to (…, D)."""

    def __init__(self, caption_dim: int, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(caption_dim, dim, bias=False)
        self.fc2 = nn.Linear(dim, dim, bias=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(…, D)."""
        return self.fc2(F.gelu(self.fc1(features), approximate="tanh"))
