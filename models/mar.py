"""MAR: an MAE-style encoder and decoder, with the diffusion loss or, over ids, cross-entropy (arXiv 2406.11838).

Legend: B images, L tokens an image, C channels a token, S buffer tokens, D width, V visible tokens (the batch maximum).
Tokens are (B, L, C); with --loss ce ids (B, L) long.
`mask` (B, L) bool is True where a token is still unknown. Attribute names are those of the published checkpoints.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from diffusion.schedule import step_range
from models.celoss import CELoss
from models.compiled import compile_all
from models.diffloss import DiffLoss
from models.mar_cache import FeatureCache
from models.passes import MOST_PASSES
from models.token_head import LOSSES, TokenHead
from models.tokenizers.ldm import PLACES
from models.vit import Block
from util.args import flag
from util.graphs import Graphs
from util.sizes import Size, check_counts, check_square, image_size


@dataclass(frozen=True)
class MARConfig:
    """Everything that shapes a MAR; names and defaults of the published constructor."""

    img_size: Size = flag(256, "pixels of an image's side, or HxW, height x width", type=image_size, metavar="SIZE")
    vae_stride: int = flag(16, "pixels of a latent's side", low=1)
    patch_size: int = flag(1, "latents of a token's side", low=1)
    encoder_embed_dim: int = 1024
    encoder_depth: int = 16
    encoder_num_heads: int = 16
    decoder_embed_dim: int = 1024
    decoder_depth: int = 16
    decoder_num_heads: int = 16
    mlp_ratio: float = 4.0
    vae_embed_dim: int = flag(16, "channels of a latent", low=1)
    mask_ratio_min: float = flag(0.7, "smallest mask ratio in training", low=0, high=1)
    label_drop_prob: float = flag(0.1, "probability of training without the label", low=0, high=1)
    class_num: int = flag(1000, "number of classes (read from the data when training)", low=1)
    attn_dropout: float = flag(0.1, "dropout of attention weights", low=0, high=1)
    proj_dropout: float = flag(0.1, "dropout after attention and MLP", low=0, high=1)
    buffer_size: int = flag(64, "class tokens in front of the image's", low=1)
    diffloss_d: int = flag(3, "blocks of the diffusion MLP", low=1)
    diffloss_w: int = flag(1024, "width of the diffusion MLP", low=1)
    num_sampling_steps: int | str = "100"  # where sample settings say nothing
    diffusion_batch_mul: int = flag(4, "noise levels drawn for each token in training", low=1)
    grad_checkpointing: bool = flag(False, "recompute activations in the backward pass")
    loss: str = flag("diffusion", "of a token: diffusion of latents, or cross-entropy of ids", choices=LOSSES)
    vocab_size: int | None = flag(None, "entries of the codebook, with --loss ce (the tokenizer's)", low=1)
    label_smoothing: float = flag(0.1, "share of the target spread over all ids, with --loss ce", low=0, high=1)

    FREE: ClassVar = frozenset(
        "mask_ratio_min label_drop_prob attn_dropout proj_dropout num_sampling_steps diffusion_batch_mul "
        "grad_checkpointing label_smoothing".split()
    )

    def __post_init__(self):
        if self.loss not in LOSSES:
            raise ValueError(f"unknown loss {self.loss!r}; valid: {', '.join(LOSSES)}")
        if self.loss == "ce" and self.patch_size != 1:
            raise ValueError(f"--patch_size {self.patch_size} must be 1 with --loss ce: a token is one id")
        if self.loss != "ce" and self.vocab_size is not None:
            raise ValueError(f"--vocab_size {self.vocab_size} has no meaning with --loss {self.loss}: it is for ce")
        step_range(self.num_sampling_steps)  # raises ValueError for what is neither a number nor two
        check_square(self.img_size, "a MAR")
        check_counts(self, "encoder_embed_dim encoder_num_heads decoder_embed_dim decoder_num_heads")
        check_counts(self, "patch_size vae_stride vae_embed_dim vocab_size class_num")
        cell = self.vae_stride * self.patch_size
        if self.img_size < cell or self.img_size % cell:
            raise ValueError(f"img_size {self.img_size} must be a multiple of vae_stride·patch_size = {cell}")
        for part in ("encoder", "decoder"):
            dim, heads = getattr(self, f"{part}_embed_dim"), getattr(self, f"{part}_num_heads")
            if dim % heads:
                raise ValueError(f"{part}_embed_dim {dim} must be a multiple of {part}_num_heads {heads}")

    @property
    def grid(self) -> int:
        """Tokens of an image's side."""
        return self.img_size // self.vae_stride // self.patch_size

    @property
    def seq_len(self) -> int:
        """Tokens of an image, L."""
        return self.grid**2

    @property
    def token_dim(self) -> int:
        """Channels of a token, C."""
        return self.vae_embed_dim * self.patch_size**2


def _size(dim: int, depth: int, heads: int, **rest) -> MARConfig:
    sizes = {f"{p}_{k}": v for p in ("encoder", "decoder") for k, v in zip(_SIZE_KEYS, (dim, depth, heads))}
    return MARConfig(**sizes, **rest)


_SIZE_KEYS = ("embed_dim", "depth", "num_heads")
MAR_CONFIGS = {
    "mar_tiny": _size(64, 2, 4, diffloss_d=3, diffloss_w=128),  # for CPU
    "mar_mini": _size(128, 3, 4, diffloss_d=3, diffloss_w=192),  # for CPU and 32 px
    "mar_small": _size(384, 5, 6, diffloss_d=4, diffloss_w=640),  # 28 M, for 32 px on a GPU
    "mar_base": _size(768, 12, 12, diffloss_d=6, diffloss_w=1024),  # published: FID 2.31, IS 281.7 at cfg 2.9
    "mar_large": _size(1024, 16, 16, diffloss_d=8, diffloss_w=1280),  # published: FID 1.78, IS 296.0 at cfg 3.0
    "mar_huge": _size(1280, 20, 16, diffloss_d=12, diffloss_w=1536),  # published: FID 1.55, IS 303.7 at cfg 3.2
}
PUBLISHED = ("mar_base", "mar_large", "mar_huge")


def read_published(weights: dict) -> tuple[dict, dict]:
    """({class_num} of a published MAR's weights, settings of the tokenizer that the published models are for).

    Weights without a class embedding raise ValueError.
    """
    if "class_emb.weight" not in weights:
        raise ValueError("the checkpoint is not one of MAR: its 'model' has no class embedding")
    if weights["class_emb.weight"].dim() != 2:
        shape = tuple(weights["class_emb.weight"].shape)
        raise ValueError(f"the checkpoint is not one of MAR: its class embedding has the shape {shape}, not two axes")
    return {"class_num": len(weights["class_emb.weight"])}, {"tokenizer": "kl16", "vae_path": PLACES["kl16"]}


class MAR(nn.Module):
    """Masked autoregressive model: `encode_decode` gives a condition z for each token, `token_head` is p(x|z).

    A configuration with --loss ce and no vocab_size raises ValueError.
    """

    fixed_rules = {}  # any order, any group size
    per_class = ("class_emb.weight",)

    def __init__(self, config: MARConfig):
        super().__init__()
        self.config = c = config
        seq_len, width, out_width = c.seq_len, c.encoder_embed_dim, c.decoder_embed_dim

        self._add_inputs()
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, c.buffer_size + seq_len, width))
        self.encoder_blocks = self._blocks(c.encoder_depth, width, c.encoder_num_heads)
        self.encoder_norm = nn.LayerNorm(width, eps=1e-6)

        self.decoder_embed = nn.Linear(width, out_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, out_width))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, c.buffer_size + seq_len, out_width))
        self.decoder_blocks = self._blocks(c.decoder_depth, out_width, c.decoder_num_heads)
        self.decoder_norm = nn.LayerNorm(out_width, eps=1e-6)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, seq_len, out_width))

        self._init_weights()
        self._add_token_head()
        self.graphs = Graphs(MOST_PASSES)

    def _add_inputs(self) -> None:
        """The layers by which classes and tokens come in."""
        c, width = self.config, self.config.encoder_embed_dim
        self.class_emb = nn.Embedding(c.class_num, width)
        self.fake_latent = nn.Parameter(torch.zeros(1, width))  # stands for "no label"
        if c.loss == "ce":
            if c.vocab_size is None:
                raise ValueError("--loss ce needs vocab_size, the number of entries of the tokenizer's codebook")
            self.token_emb = nn.Embedding(c.vocab_size, width)
        else:
            self.z_proj = nn.Linear(c.token_dim, width)
        self.z_proj_ln = nn.LayerNorm(width, eps=1e-6)

    def _add_token_head(self) -> None:
        """p(token | z), after `_init_weights`: it initialises itself."""
        c = self.config
        if c.loss == "ce":
            self.celoss = CELoss(self.width, c.vocab_size, label_smoothing=c.label_smoothing)
        else:
            self.diffloss = DiffLoss(
                c.token_dim, self.width, c.diffloss_d, c.diffloss_w, c.grad_checkpointing, repeats=c.diffusion_batch_mul
            )

    @property
    def width(self) -> int:
        """Width D of z."""
        return self.config.decoder_embed_dim

    @property
    def head_dim(self) -> int:
        """Width of an attention head of the decoder."""
        return self.width // self.config.decoder_num_heads

    @property
    def blocks(self) -> tuple:
        """The transformer's blocks and the token head's."""
        of_token_head = [self.celoss] if self.config.loss == "ce" else self.diffloss.net.res_blocks
        return (*self.encoder_blocks, *self.decoder_blocks, *of_token_head)

    @property
    def token_head(self) -> TokenHead:
        """p(token | z); the published name of a DiffLoss is diffloss."""
        return self.celoss if self.config.loss == "ce" else self.diffloss

    def head_logits(self, z: torch.Tensor) -> torch.Tensor:
        """Logits (…, V) float32 of the ids under z (…, D), with --loss ce."""
        return self.celoss.logits(z)

    def conditions(
        self, labels, *, orders=None, tokenizer=None, refresh_every: int = 1, recompute: bool = False
    ) -> FeatureCache:
        """What computes z of a batch of labels (B,) while it is sampled; orders and tokenizer play no part."""
        return FeatureCache(self, labels, refresh_every, recompute)

    def _blocks(self, depth, width, heads):
        c = self.config
        rates = dict(attn_dropout=c.attn_dropout, proj_dropout=c.proj_dropout)
        return nn.ModuleList(Block(width, heads, c.mlp_ratio, **rates) for _ in range(depth))

    def _init_weights(self):
        for parameter in self.parameters(recurse=False):
            nn.init.normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def patchify(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, c, h, w) to tokens (B, L, C), row by row; within a token channel first, then row and column.

        Ids (B, h, w) to (B, L).
        """
        if self.config.loss == "ce":
            return latents.flatten(1)
        b, c, h, w = latents.shape
        p = self.config.patch_size
        x = latents.reshape(b, c, h // p, p, w // p, p)
        return x.permute(0, 2, 4, 1, 3, 5).reshape(b, (h // p) * (w // p), c * p * p)

    def unpatchify(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, L, C) to latents (B, c, h, w), or ids (B, L) to (B, h, w); the inverse of `patchify`."""
        if self.config.loss == "ce":
            return tokens.unflatten(1, (self.config.grid, self.config.grid))
        b, g, p, c = tokens.shape[0], self.config.grid, self.config.patch_size, self.config.vae_embed_dim
        return tokens.reshape(b, g, g, c, p, p).permute(0, 3, 1, 4, 2, 5).reshape(b, c, g * p, g * p)

    def encode_decode(self, tokens, mask, labels=None, num_visible=None, orders=None) -> torch.Tensor:
        """Condition z (B, L, D) of every token, the diffusion position embedding included.

        tokens (B, L, …), read where mask (B, L) bool is False; labels (B,) long, −1 = unconditional, None = all
        unconditional. Rows of mask may have different counts. num_visible: those counts as a list of B ints, or bounds
        on them (fewest, most), for a caller that knows them; otherwise finding them waits for the device once. orders
        play no part.
        """
        if num_visible is None:
            num_visible = (~mask).sum(dim=1).tolist()
        visible, padding = self.visible_positions(mask, num_visible)
        return self.decode(self.encode(tokens, visible, padding, labels), visible, padding)

    def visible_positions(self, mask, num_visible):
        """(visible (B, V) long, padding (B, V) bool or None) of a mask (B, L); num_visible as in `encode_decode`.

        Visible positions come first, in order; rows with fewer than the maximum, V, are padded with hidden ones.
        """
        visible = torch.argsort(mask.to(torch.uint8), dim=1, stable=True)[:, : max(num_visible)]
        return visible, mask.gather(1, visible) if min(num_visible) != max(num_visible) else None

    def encode(self, tokens, visible, padding, labels, run=None) -> torch.Tensor:
        """Encoder output (B, S + V, D) for the tokens at positions visible (B, V); padding (B, V) bool or None.

        run(blocks, x, attention_mask) -> x, where something else than this module shall lead through the blocks.
        """
        size = self.config.buffer_size
        x = self.embed_tokens(tokens, visible, padding)
        buffer = self._class_embedding(labels, tokens.shape[0]).unsqueeze(1) + self.encoder_pos_embed_learned[:, :size]
        x = torch.cat([self.z_proj_ln(buffer.to(x.dtype)), x], dim=1)  # (B, S + V, D)
        return self.encoder_norm((run or self._run)(self.encoder_blocks, x, self._attention_mask(padding)))

    def embed_tokens(self, tokens, positions, padding=None) -> torch.Tensor:
        """What the encoder sees (B, V, D) of the tokens (B, L, …) at positions (B, V); padding as in `encode`."""
        position = self.encoder_pos_embed_learned[0, self.config.buffer_size :][positions]
        if self.config.loss == "ce":
            x = self.token_emb(tokens.gather(1, positions))
            return self.z_proj_ln(x + position.to(x.dtype))
        x = tokens.gather(1, positions.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))  # (B, V, C)
        if padding is not None:  # attention leaves the padding out, but 0 · NaN is NaN
            x = x.masked_fill(padding.unsqueeze(-1), 0.0)
        x = self.z_proj(x.to(self.z_proj.weight.dtype))  # tokens are float32, whatever the model's dtype
        return self.z_proj_ln(x + position.to(x.dtype))

    def decode(self, encoded, visible, padding, run=None) -> torch.Tensor:
        """Decoder output z (B, L, D): mask tokens stand wherever no encoded token (B, S + V, D) does; run as above."""
        c = self.config
        x = self.decoder_embed(encoded)  # (B, S + V, D)
        rows = visible.unsqueeze(-1).expand(-1, -1, x.shape[-1])
        mask_token = self.mask_token.to(x.dtype).expand(x.shape[0], c.seq_len, -1)
        seen = x[:, c.buffer_size :]
        if padding is not None:
            seen = torch.where(padding.unsqueeze(-1), mask_token[:, : seen.shape[1]], seen)
        x = torch.cat([x[:, : c.buffer_size], mask_token.scatter(1, rows, seen)], dim=1)  # (B, S + L, D)
        x = x + self.decoder_pos_embed_learned.to(x.dtype)
        x = self.decoder_norm((run or self._run)(self.decoder_blocks, x, None))
        return x[:, c.buffer_size :] + self.diffusion_pos_embed_learned

    def compile_parts(self) -> None:
        """Compile the transformer's blocks and, of the diffusion loss, the MLP, in place, for batches of any size.

        Where nothing can be compiled, as without a C++ compiler on a CPU, that is a ValueError.
        """
        of_token_head = [] if self.config.loss == "ce" else [self.diffloss.net]
        compile_all(self, (*self.encoder_blocks, *self.decoder_blocks, *of_token_head))

    def _class_embedding(self, labels, batch_size):
        if labels is None:
            return self.fake_latent.expand(batch_size, -1)
        return torch.where((labels < 0).unsqueeze(-1), self.fake_latent, self.class_emb(labels.clamp(min=0)))

    def _attention_mask(self, padding):
        """Keys that may be attended to, (B, 1, 1, S + V) bool, or None where all may."""
        if padding is None:
            return None
        keep = torch.cat([padding.new_ones(padding.shape[0], self.config.buffer_size), ~padding], dim=1)
        return keep[:, None, None, :]

    def _run(self, blocks, x, attention_mask):
        for block in blocks:
            if self.config.grad_checkpointing and self.training:
                x = checkpoint(block, x, attention_mask, use_reentrant=False)
            else:
                x = block(x, attn_mask=attention_mask)
        return x
