"""MaskGIL: masked generation of ids by a bidirectional LLaMA (arXiv 2507.13032; its code is another model).

Legend: B images, L tokens an image, D width, V entries of the codebook, C classes, T tokens of the condition: the class
or a caption. `mask` (B, L) bool is True where a token is unknown. The sequence is the L tokens row by row, then the
condition. Attribute names are the published ones; that of text is made of parts of LlamaGen's.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models.blocks import Block, Llama, LlamaConfig, RMSNorm, grid_table
from models.celoss import CELinear
from models.compiled import compile_all
from models.mask_schedules import MASK_RATIOS, draw_mask, token_schedule
from models.passes import MOST_PASSES, whole_pass
from models.text import CaptionEmbedder, Text, condition_of
from util.args import flag
from util.dist import send
from util.graphs import Graphs

__all__ = ["MASKGIL_CONFIGS", "MaskGIL", "MaskGILConfig", "draw_mask", "token_loss", "token_schedule"]

LOSS_TOKENS = ("all", "masked")
MODEL_TYPES = {"c2i": "classes", "t2i": "text"}


@dataclass(frozen=True)
class MaskGILConfig(LlamaConfig):
    """Everything that shapes a MaskGIL. The defaults of rope, qk_norm and post_norm are the paper's.

    The published code is ("published", False, False).
    """

    token_dropout_p: float = 0.1  # published, and used by nothing
    initializer_range: float = 0.02
    drop_path_rate: float = 0.0
    mask_ratio_min: float = 0.0
    cls_token_num: int = flag(1, "tokens of a caption at most (those of --cached_text)", low=1)
    model_type: str = "c2i"  # of classes, or t2i: of text
    caption_dim: int = flag(2048, "channels of the features of captions (those of --cached_text)", low=1)
    rope: str = flag("2d", "rotary positions: by row and column, or the published code's", choices=("2d", "published"))
    qk_norm: bool = flag(True, "normalise queries and keys of each head")
    post_norm: bool = flag(True, "normalise a branch after it, instead of before it")
    mask_schedule: str = flag("arccos", "share of the tokens that training masks", choices=MASK_RATIOS)
    loss_tokens: str = flag("all", "tokens that the loss is a mean over", choices=LOSS_TOKENS)
    label_smoothing: float = flag(0.1, "share of the target spread over all ids", low=0, high=1)

    FREE: ClassVar = LlamaConfig.FREE | {"mask_schedule", "loss_tokens", "label_smoothing"}
    any_size: ClassVar = True  # no tensor depends on the size of the images

    def __post_init__(self, num_classes, block_size):
        super().__post_init__(num_classes, block_size)
        tables = dict(rope=ROPES, mask_schedule=MASK_RATIOS, loss_tokens=LOSS_TOKENS, model_type=MODEL_TYPES)
        for name, table in tables.items():
            if getattr(self, name) not in table:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; valid: {', '.join(table)}")
        kind = f"a MaskGIL of {MODEL_TYPES[self.model_type]}"
        own = dict(rope="2d") if self.reads_text else dict(cls_token_num=1)  # the published positions are of one class
        self.check_only(kind, mask_ratio_min=0.0, drop_path_rate=0.0, **own)

    @property
    def reads_text(self) -> bool:
        """Is the condition a caption?"""
        return self.model_type == "t2i"


@cache  # captured passes read it, so that it must stay
def published_table(c: MaskGILConfig, grid: tuple[int, int], device=None) -> torch.Tensor:
    """(L + 1, d / 2, 2): cos and sin, of the tokens and of the class, as the published code has them.

    Its table was made for a class in front: the first token has cos = sin = 0, token n the angles of place n − 1.
    """
    places = torch.arange(grid[0] * grid[1], device=device).float().unsqueeze(1)
    angles = places * c.rope_base ** (-torch.arange(0, c.head_dim, 2, device=device).float() / c.head_dim)
    table = torch.stack([angles.cos(), angles.sin()], dim=-1)
    return torch.cat([torch.zeros_like(table[:1]), table])


@cache
def paper_table(c: MaskGILConfig, grid: tuple[int, int], device=None) -> torch.Tensor:
    """(L + T, d / 2, 2): cos and sin by row and column of a grid (h, w); the condition is not rotated."""
    table = grid_table(c, *grid, device)
    of_condition = torch.zeros(c.cls_token_num, *table.shape[1:], device=device)
    of_condition[..., 0] = 1.0
    return torch.cat([table, of_condition])


ROPES = {"2d": paper_table, "published": published_table}

_B = MaskGILConfig(dim=768, n_layer=12, n_head=12)
MASKGIL_CONFIGS = {
    "maskgil_tiny": MaskGILConfig(dim=64, n_layer=4, n_head=4, multiple_of=32),  # for CPU
    "maskgil_b": _B,  # published: FID 5.64
    "maskgil_l": replace(_B, dim=1024, n_layer=24, n_head=16),  # published: FID 4.01
    "maskgil_xl": replace(_B, dim=1280, n_layer=36, n_head=20),  # published: FID 3.90
    "maskgil_xxl": replace(_B, dim=1536, n_layer=48, n_head=24),  # published: FID 3.71
}
_TEXT = dict(model_type="t2i", cls_token_num=120)  # features of flan-T5-XL
MASKGIL_CONFIGS |= {
    "maskgil_t2i_tiny": replace(MASKGIL_CONFIGS["maskgil_tiny"], **_TEXT),
    "maskgil_t2i_xl": replace(MASKGIL_CONFIGS["maskgil_xl"], **_TEXT),
}


OF_CLASSES = [size for size, config in MASKGIL_CONFIGS.items() if not config.reads_text]


class MaskedOutput(CELinear):
    """Logits of the V entries and, last, of the mask token: the loss has it as a class, sampling never draws it.

    keep_mask_logit: for traces of the published trainer, which does draw it.
    """

    keep_mask_logit = False

    def __init__(self, width: int, vocab_size: int, label_smoothing: float):
        super().__init__(width, vocab_size + 1)
        self.label_smoothing = label_smoothing

    @property
    def num_ids(self) -> int:
        """What sampling draws from, V."""
        return self.out_features if self.keep_mask_logit else self.out_features - 1

    def logits(self, z: torch.Tensor) -> torch.Tensor:
        """(…, V) float32 of z (…, D) in any dtype."""
        return self.all_logits(z)[..., : self.num_ids]

    def all_logits(self, z: torch.Tensor) -> torch.Tensor:
        """(…, V + 1) float32 of z (…, D) in any dtype."""
        return super().logits(z)


class MaskGIL(Llama):
    """Bidirectional model of ids: `encode_decode` gives z of each token, `output` is p(id | z).

    prompts: the captions that labels number, a `models.text.Prompts`; None of a model of classes.
    """

    per_class = ()  # the rows of classes are part of tok_emb
    prompts = None
    fixed_rules = {"cfg_base": "ramp"}  # any order, any group size

    def __init__(self, config: MaskGILConfig):
        super().__init__()
        self.config = c = config
        self.width, self.head_dim = c.dim, c.head_dim
        of_classes = 0 if c.reads_text else c.class_num + 1  # and no class
        self.tok_emb = nn.Embedding(c.vocab_size + 1 + of_classes, c.dim)  # ids, mask token, classes
        self.layers = nn.ModuleList(
            Block(c, causal=False, qk_norm=c.qk_norm, post_norm=c.post_norm) for _ in range(c.n_layer)
        )
        self.norm = RMSNorm(c.dim, c.norm_eps)
        self.output = MaskedOutput(c.dim, c.vocab_size, c.label_smoothing)
        self.cls_embedding = CaptionEmbedder(c.caption_dim, c.cls_token_num, c.dim) if c.reads_text else None
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=c.initializer_range)
        nn.init.zeros_(self.output.weight)  # the first loss is ln(V + 1)
        self.graphs = Graphs(MOST_PASSES)

    @property
    def num_labels(self) -> int:
        """How many conditions labels number: classes, or prompts; a model of text without prompts raises ValueError."""
        if not self.config.reads_text:
            return self.config.class_num
        if self.prompts is None:
            raise ValueError("this model is of text and has no prompts: sample.py --prompts gives them")
        return len(self.prompts)

    def logits(self, ids, mask, labels=None, *, text=None, text_mask=None, grid=None) -> torch.Tensor:
        """(B, L, V + 1) float32, the last for the mask token, of ids (B, L), read where mask (B, L) is False.

        labels (B,) long, −1 = no class, None = all. Of a model of text in their place the features of captions (B, T,
        C), of T tokens at most, and text_mask (B, T) bool, True where they have a token, None: everywhere; text None =
        no caption. grid: (h, w), None = that of img_size. A condition of the other kind, or a grid of another number of
        tokens than ids have, raises ValueError.
        """
        c = self.config
        if (labels if c.reads_text else text) is not None:
            wrong, right = ("labels", "text") if c.reads_text else ("text", "labels")
            raise ValueError(f"a MaskGIL of {MODEL_TYPES[c.model_type]} takes no {wrong}: give {right}")
        height, width = grid or c.shape
        if ids.shape[1] != height * width:
            raise ValueError(f"ids are {ids.shape[1]} an image, a grid of {height}x{width} has {height * width}")
        if text is not None:
            text_mask = torch.ones(text.shape[:2], dtype=torch.bool) if text_mask is None else text_mask
            labels = Text(text, text_mask.to(text.device), torch.ones(len(ids), dtype=torch.bool, device=ids.device))
        return self.output.all_logits(self.encode_decode(ids, mask, labels, grid=grid))

    def conditions(
        self, labels, *, orders=None, tokenizer=None, refresh_every: int = 1, recompute: bool = False
    ) -> "WholePasses":
        """What computes z of a batch of labels (B,) while it is sampled; the other settings play no part but recompute.

        All tokens look at each other, so every step computes all of them.
        """
        condition = condition_of(self, labels.cpu(), labels.device) if self.config.reads_text else labels
        return WholePasses(self, condition, recompute)

    def encode_decode(
        self, tokens, mask, labels=None, num_visible=None, orders=None, attend=None, grid=None
    ) -> torch.Tensor:
        """z (B, L, D) of every token; tokens (B, L), mask and grid as in `logits`; num_visible, orders: no part.

        labels: (B,) long, or a `models.text.Text`; None = no condition. attend(query, key, value): in place of
        attention among all inputs, see `models.blocks.Block`.
        """
        c = self.config
        x = self.tok_emb(torch.where(mask, c.vocab_size, tokens))
        condition, looked_at = self._condition(labels, len(tokens), x.device)
        x = torch.cat([x, condition], dim=1)
        keys = None
        if looked_at is not None:
            keys = torch.cat([torch.ones_like(mask), looked_at], dim=1)[:, None, None]  # (B, 1, 1, L + T)
        rotary = ROPES[c.rope](c, grid or c.shape, x.device).unsqueeze(0)
        for block in self.layers:
            if c.grad_checkpointing and self.training:
                x = checkpoint(block, x, rotary, attend, keys, use_reentrant=False)
            else:
                x = block(x, rotary, attend, keys)
        return self.norm(x)[:, : tokens.shape[1]]

    def _condition(self, labels, batch: int, device):
        """(inputs (B, T, D), those that may be looked at (B, T) bool, None for all) of a condition."""
        c = self.config
        if c.reads_text:
            return self.cls_embedding(labels, batch)
        if labels is None:
            labels = torch.full((batch,), -1, device=device)
        classes = c.vocab_size + 1 + torch.where(labels < 0, c.class_num, labels)
        return self.tok_emb(classes.unsqueeze(1)), None

    def compile_parts(self) -> None:
        """Compile the blocks, in place; ValueError where that cannot be done."""
        compile_all(self, self.layers)


class WholePasses:
    """The `models.families.Conditions` of a model that computes all tokens at every step."""

    def __init__(self, model, labels, recompute: bool = False):
        """labels: (B,) long or a `models.text.Text`; recompute: the backward pass computes activations again."""
        self.compute = whole_pass(model, recompute)
        self.labels = labels
        self.z = None  # (B', L, D) of the last look
        self.places = None  # (B,) long on the host: where each image stands in it
        self.passes = 0.0

    def look(self, step: int, tokens, unknown, images):
        """(z (B', L, D), None: it is of all positions) of images (B',) long on the host."""
        index = send(images, tokens.device)
        self.z = self._pass(tokens, unknown, images, self.labels[index])
        self.places = torch.full((len(unknown),), -1).scatter(0, images, torch.arange(len(images)))
        return self.z, None

    def at(self, step: int, tokens, unknown, rows, guided):
        """(z (N, D), z without label (G, D) or None for none) at rows (N, 2) of images that `look` saw."""
        place = send(self.places[rows[:, 0]], tokens.device)
        z = self.z[place, send(rows[:, 1], tokens.device)]
        if not len(guided):
            return z, None
        images, which = rows[guided, 0].unique(return_inverse=True)
        free = self._pass(tokens, unknown, images, None)
        return z, free[send(which, tokens.device), send(rows[guided, 1], tokens.device)]

    def write(self, step: int, rows, drawn) -> None:
        """Nothing to keep: what was drawn is read from the tokens at the next look."""

    def _pass(self, tokens, unknown, images, labels):
        """z (·, L, D) of images on the host, with labels (·,) or None."""
        self.passes += len(images)
        return self.compute(tokens[send(images, tokens.device)], send(unknown[images], tokens.device), labels)


def token_loss(logits, ids, mask=None, label_smoothing: float = 0.1) -> torch.Tensor:
    """Mean cross-entropy of logits (B, L, V + 1) for ids (B, L), of the tokens that mask names, 0 if none; None: all.

    label_smoothing: share of the target spread over all classes, the mask token among them.
    """
    losses = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none", label_smoothing=label_smoothing)
    if mask is None:
        return losses.mean()
    return (losses * mask.flatten()).sum() / mask.sum().clamp(min=1)
