"""LlamaGen's causal LLaMA over the ids of an image, row by row (arXiv 2406.06525).

Legend: B images, L tokens an image, n inputs that are looked at, D width, H heads, d their width, V entries of the
codebook. Input 0 is the class, input i the token i − 1; the output of input i is z of token i. Attribute names are
those of the published checkpoints.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.blocks import Block, Llama, LlamaConfig, RMSNorm, grid_table
from models.celoss import CELinear
from models.compiled import compile_all, run_part
from models.kv_cache import CausalConditions, Extension, raster_only
from models.passes import MOST_PASSES
from models.tokenizers.ldm import PLACES
from util.args import flag
from util.graphs import Graphs
from util.sizes import check_square

COND_ROPES = {"zero": 0.0, "identity": 1.0}  # what the class's queries and keys are multiplied by; published: zero


@dataclass(frozen=True)
class CausalGPTConfig(LlamaConfig):
    """Everything that shapes a CausalGPT."""

    cond_rope: str = flag("zero", "rotation of the class: zero as published, or none", choices=COND_ROPES)

    def __post_init__(self, num_classes, block_size):
        super().__post_init__(num_classes, block_size)
        check_square(self.img_size, "a causal model")
        if self.cond_rope not in COND_ROPES:
            raise ValueError(f"unknown cond_rope {self.cond_rope!r}; valid: {', '.join(COND_ROPES)}")
        self.check_only("a causal model of classes", mask_ratio_min=1.0, cls_token_num=1)


CAUSAL_GPT_CONFIGS = {
    "causal_gpt_tiny": CausalGPTConfig(dim=64, n_layer=4, n_head=4, multiple_of=32),  # for CPU
    "llamagen_ar_b": CausalGPTConfig(dim=768, n_layer=12, n_head=12),  # published: FID 5.46 at cfg 2.0
    "llamagen_ar_l": CausalGPTConfig(dim=1024, n_layer=24, n_head=16),  # published: FID 3.80 at cfg 2.0
    "llamagen_ar_xl": CausalGPTConfig(dim=1280, n_layer=36, n_head=20),
    "llamagen_ar_xxl": CausalGPTConfig(dim=1536, n_layer=48, n_head=24),
}


# of the published models of classes, where scripts/download_weights.py puts it
PUBLISHED_TOKENIZER = {"tokenizer": "llamagen_vq16", "vae_path": PLACES["llamagen_vq16"]}


def read_published(weights: dict) -> tuple[dict, dict]:
    """(the sizes that the tensors of a published model of classes have, settings of the tokenizer that it is for).

    Numbers of heads and --img_size are not among them: no tensor depends on these. Weights that lack the tensors that
    say the sizes, or have them with other numbers of axes, raise ValueError.
    """
    layers = {name.split(".")[1] for name in weights if name.startswith("layers.")}
    shapes = {}
    for name in ("cls_embedding.embedding_table.weight", "output.weight"):
        if name not in weights:
            raise ValueError(f"the checkpoint is no class model of LlamaGen: its 'model' has no {name}")
        shapes[name] = tuple(weights[name].shape)
        if len(shapes[name]) != 2:
            raise ValueError(f"the checkpoint is no class model of LlamaGen: {name} has the shape {shapes[name]}")
    num_labels, dim = shapes["cls_embedding.embedding_table.weight"]  # with a row for no class
    known = dict(dim=dim, n_layer=len(layers), class_num=num_labels - 1, vocab_size=shapes["output.weight"][0])
    return known, dict(PUBLISHED_TOKENIZER)


class CausalGPT(Llama):
    """Causal model of ids, row by row: `outputs` gives z of each, `output` is p(id | z)."""

    per_class = ("cls_embedding.embedding_table.weight",)
    fixed_rules = {"order": "raster", "group": "one"}

    def __init__(self, config: CausalGPTConfig):
        super().__init__()
        self.config = c = config
        self.width, self.head_dim = c.dim, c.head_dim
        self.cls_embedding = ClassEmbedding(c.class_num, c.dim)
        self.tok_embeddings = nn.Embedding(c.vocab_size, c.dim)
        self.tok_dropout = nn.Dropout(c.token_dropout_p)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.norm = RMSNorm(c.dim, c.norm_eps)
        self.output = CELinear(c.dim, c.vocab_size)
        self.register_buffer("rotary", rotary_table(c), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.output.weight)  # the first loss is ln V
        self.graphs = Graphs(MOST_PASSES)

    def logits(self, ids, labels=None) -> torch.Tensor:
        """(B, L, V) float32, row i for token i, from ids (B, L) before it; labels (B,) long, −1 or None: no class."""
        return self.output.logits(self.outputs(ids, None, labels))

    def conditions(
        self, labels, *, orders=None, tokenizer=None, refresh_every: int = 1, recompute: bool = False
    ) -> CausalConditions:
        """What computes z of a batch of labels (B,) while it is sampled; another order than raster is a ValueError."""
        return CausalConditions(self, labels, raster_only(orders))

    def encode_decode(self, tokens, mask, labels=None, num_visible=None, orders=None) -> torch.Tensor:
        """z (B, L, D) of every token from those before it; mask, num_visible and orders play no part."""
        return self.outputs(tokens, None, labels)

    def outputs(self, tokens, orders=None, labels=None) -> torch.Tensor:
        """z (B, L, D) of ids (B, L), of each from those before it; orders play no part."""
        places = torch.arange(self.config.seq_len, device=tokens.device).expand(len(tokens), -1)
        x, rotary = self._inputs(tokens, labels, places), self.rotary[places]
        for block in self.layers:
            if self.config.grad_checkpointing and self.training:
                x = checkpoint(block, x, rotary, use_reentrant=False)
            else:
                x = block(x, rotary)
        return self.norm(x)

    def extend(self, tokens, orders, labels, extension: Extension) -> torch.Tensor:
        """z (B, 1, D) of the next token of each image, from the inputs that its sequence in the cache lacks."""
        x, rotary = self._inputs(tokens, labels, extension.places), self.rotary[extension.places]
        for i, block in enumerate(self.layers):
            looked = extension.attend(i, *run_part(Block.before_attention, block, x, rotary))
            x = run_part(Block.after_attention, block, x, looked)
        return self.norm(extension.last(x))

    def compile_parts(self) -> None:
        """Compile the blocks, in place; ValueError where that cannot be done."""
        compile_all(self, self.layers)

    def _inputs(self, ids, labels, places):
        """Inputs (B, n, D) at places (B, n) long of the sequence."""
        if labels is None:
            labels = torch.full((len(ids),), -1, device=ids.device)
        x = self.tok_embeddings(ids.gather(1, (places - 1).clamp(min=0)))
        return self.tok_dropout(torch.where((places == 0).unsqueeze(-1), self.cls_embedding(labels).unsqueeze(1), x))


class ClassEmbedding(nn.Module):
    """A row for each class, and a last one for none."""

    def __init__(self, class_num: int, dim: int):
        super().__init__()
        self.embedding_table = nn.Embedding(class_num + 1, dim)

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        """(B, D) of labels (B,) long, −1 = no class."""
        return self.embedding_table(torch.where(labels < 0, self.embedding_table.num_embeddings - 1, labels))


def rotary_table(c: CausalGPTConfig) -> torch.Tensor:
    """(1 + L, d / 2, 2): cos and sin of each pair of channels, of the class, then of the tokens row by row.

    The class has cos = sin = 0 as published: all tokens give it the score 0.
    """
    table = grid_table(c, c.grid, c.grid)
    of_class = torch.zeros_like(table[:1])
    of_class[..., 0] = COND_ROPES[c.cond_rope]
    return torch.cat([of_class, table])
