"""VAR: next-scale prediction of the ids of a multi-scale quantiser (arXiv 2404.02905).

Legend: B images, S scales of p_s × p_s tokens, L = Σ p_s² tokens of an image, F = p_0² of them in the first scale, n
inputs that are looked at, D width, H heads, d their width, V entries of the codebook, C their channels. Input i is what
the scales before it make of the place of token i (of the first scale: the class), and its output is z of token i.
Attribute names are those of the published checkpoints.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models.celoss import CELinear, filter_logits
from models.compiled import compile_all, run_part
from models.kv_cache import Extension, attention
from models.next_scale import NextScaleConditions
from models.var_config import VAR_CONFIGS, VARConfig
from util.dist import send
from util.graphs import Graphs

__all__ = ["VAR", "VARConfig", "VAR_CONFIGS", "filter_logits", "next_scale_loss"]

LOG_LARGEST = math.log(100)  # of what normalised queries are multiplied by
# parts of names of the parameters that have no weight decay, beside biases and vectors
NO_DECAY = ("pos_1LC", "pos_start", "lvl_embed", "ada_gss", "scale_mul")


class VAR(nn.Module):
    """Causal between scales: `outputs` gives z of each token from the scales before it, `head` is p(id | z)."""

    per_class = ("class_emb.weight",)
    # a scale a step; guidance grows from the first to the last, and that schedule is what a learned one moves
    fixed_rules = {"order": "raster", "group": "scale", "cfg_base": "ramp"}
    no_decay = NO_DECAY

    def __init__(self, config: VARConfig):
        super().__init__()
        self.config = c = config
        self.width, self.head_dim = c.embed_dim, c.embed_dim // c.num_heads
        spread = math.sqrt(1 / (3 * c.embed_dim))
        self.word_embed = nn.Linear(c.vae_embed_dim, c.embed_dim)
        self.class_emb = nn.Embedding(c.class_num + 1, c.embed_dim)  # the last row: no class
        self.pos_start = nn.Parameter(torch.empty(1, c.first, c.embed_dim).normal_(std=spread))
        self.pos_1LC = nn.Parameter(torch.empty(1, c.seq_len, c.embed_dim).normal_(std=spread))
        self.lvl_embed = nn.Embedding(len(c.patch_nums), c.embed_dim)
        scale = torch.cat([torch.full((p * p,), s) for s, p in enumerate(c.patch_nums)])
        self.register_buffer("lvl_1L", scale.unsqueeze(0))
        allowed = scale.unsqueeze(1) >= scale.unsqueeze(0)
        bias = torch.zeros(c.seq_len, c.seq_len).masked_fill(~allowed, -math.inf)
        self.register_buffer("attn_bias_for_masking", bias[None, None])
        self.shared_ada_lin = modulation_layer(c.embed_dim, 6) if c.shared_aln else None
        self.drop_rates = [c.drop_path_rate * i / max(c.depth - 1, 1) for i in range(c.depth)]  # of images, by block
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.head_nm = HeadNorm(c.embed_dim, c.norm_eps)
        self.head = CELinear(c.embed_dim, c.vocab_size, bias=True)
        self.head.exceeds_top_p = False
        self.head.label_smoothing = c.label_smoothing
        self.init_weights(init_adaln_gamma=c.init_adaln_gamma)
        self.graphs = Graphs()

    @torch.no_grad()
    def init_weights(self, init_adaln=0.5, init_adaln_gamma=1e-5, init_head=0.02, init_std=-1) -> None:
        """Draw linear layers, embeddings and modulations anew, as published: normal, of init_std or, below 0, √(1/3D).

        init_head multiplies the head's weight, init_adaln scales and shifts of the modulations, init_adaln_gamma their
        gates. Of a shared modulation the linear layer stays as it is drawn, so its gates do not start near 0.
        """
        std = math.sqrt(1 / (3 * self.width)) if init_std < 0 else init_std
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
        self.head.weight.mul_(init_head)
        self.head_nm.ada_lin[1].weight.mul_(init_adaln)
        shares = torch.tensor([init_adaln_gamma] * 2 + [init_adaln] * 4)
        for block in self.blocks:
            for layer in (block.attn.proj, block.ffn.fc2):
                layer.weight.div_(math.sqrt(2 * len(self.blocks)))
            if self.config.shared_aln:
                block.ada_gss.normal_(std=math.sqrt(1 / self.width)).mul_(shares.to(block.ada_gss).unsqueeze(1))
            else:
                weight = block.ada_lin[1].weight
                weight.mul_(shares.to(weight).repeat_interleave(self.width).unsqueeze(1))

    @property
    def token_head(self) -> CELinear:
        """p(id | z), under its published name."""
        return self.head

    def patchify(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids (B, L), scale by scale, as they are."""
        return ids

    def unpatchify(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids (B, L) as they are."""
        return ids

    def embed(self, labels, inputs) -> torch.Tensor:
        """The sequence before the first block (B, n, D) float32, of labels (B,) and inputs (B, n − F, C)."""
        with torch.autocast(inputs.device.type, enabled=False):
            start = self.classes(labels, len(inputs)).unsqueeze(1) + self.pos_start  # (B, F, D)
            x = torch.cat([start, self.word_embed(inputs.to(self.word_embed.weight.dtype))], dim=1)
            num = x.shape[1]
            return x + (self.lvl_embed(self.lvl_1L[:, :num]) + self.pos_1LC[:, :num])

    def classes(self, labels, batch: int) -> torch.Tensor:
        """c (B, D) of labels (B,) long; −1 and class_num are no class, None is none for a batch of so many."""
        none = self.config.class_num
        if labels is None:
            labels = torch.full((batch,), none, device=self.class_emb.weight.device)
        return self.class_emb(torch.where(labels < 0, none, labels))

    def modulations(self, labels, batch: int) -> list[torch.Tensor]:
        """What labels make of the norms: of each block six vectors (B, 6, D), of the head's norm two (B, 2, D)."""
        c = self.classes(labels, batch)
        shared = c if self.shared_ada_lin is None else self.shared_ada_lin(c).unflatten(-1, (6, -1))
        return [*(block.modulation(shared) for block in self.blocks), self.head_nm.modulation(c)]

    def outputs(self, labels, inputs) -> torch.Tensor:
        """z (B, n, D) float32 of the first n tokens of labels (B,), −1 or None: no class, with inputs (B, n − F, C)."""
        x = self.embed(labels, inputs)
        *modulations, last = self.modulations(labels, len(x))
        mask = self.attn_bias_for_masking[:, :, : x.shape[1], : x.shape[1]] == 0
        for block, six, kept in zip(self.blocks, modulations, self._kept(x)):
            if self.config.grad_checkpointing and self.training:
                x = checkpoint(block, x, six, mask, kept, use_reentrant=False)
            else:
                x = block(x, six, mask, kept)
        return self.head_nm(x, last)

    def _kept(self, x) -> list:
        """Of each block a factor (2, B, 1, 1) of its two branches: 0 where an image goes without, else 1/(1 − rate).

        None: all branches as they are, which is so but in training. All factors are drawn at once.
        """
        if not self.training or not any(self.drop_rates):
            return [None] * len(self.blocks)
        keep = send(1 - torch.tensor(self.drop_rates).view(-1, 1, 1, 1, 1), x.device)
        draws = torch.rand(len(self.blocks), 2, len(x), 1, 1, device=x.device)
        return list(((draws < keep) / keep).unbind())

    def forward(self, labels, inputs) -> torch.Tensor:
        """Logits (B, n, V) float32 of the first n tokens; labels and inputs as in `outputs`.

        In training a label becomes none with the probability label_drop_prob.
        """
        if self.training:
            dropped = torch.rand(len(labels), device=labels.device) < self.config.label_drop_prob
            labels = torch.where(dropped, self.config.class_num, labels)
        return self.head.logits(self.outputs(labels, inputs))

    def encode_decode(self, tokens, mask=None, labels=None, num_visible=None, orders=None) -> torch.Tensor:
        """z (B, n, D) of every token; tokens are inputs (B, n − F, C), which the quantiser makes of ids (B, L).

        mask, num_visible and orders play no part.
        """
        return self.outputs(labels, tokens)

    def extend(self, labels, inputs, modulations, extension: Extension) -> torch.Tensor:
        """z (R, p², D) of the last scale of each of R sequences, from the inputs that they lack in the cache.

        labels (R,) or None; inputs (R, n − F, C) are those of all scales up to it.
        """
        x = self.embed(labels, inputs)
        x = x.gather(1, extension.places.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        *modulations, last = modulations
        for i, (block, six) in enumerate(zip(self.blocks, modulations)):
            parts = run_part(Block.before_attention, block, x, six)
            x = run_part(Block.after_attention, block, x, six, extension.attend(i, *parts, block.attn.scale))
        side = self.config.patch_nums[self.config.scale_of(inputs.shape[1] + self.config.first)]
        return self.head_nm(extension.last(x, side * side), last)

    def conditions(
        self, labels, *, orders=None, tokenizer=None, refresh_every: int = 1, recompute: bool = False
    ) -> NextScaleConditions:
        """What computes z of a batch of labels (B,) while it is sampled; the tokenizer's quantiser makes the inputs.

        orders, refresh_every and recompute play no part.
        """
        if tokenizer is None:
            raise ValueError("a model of scales is sampled with its tokenizer: give decode(..., tokenizer=…)")
        return NextScaleConditions(self, labels, tokenizer)

    def compile_parts(self) -> None:
        """Compile the blocks, in place; ValueError where that cannot be done."""
        compile_all(self, self.blocks)


def modulation_layer(width: int, num: int) -> nn.Sequential:
    """From c (B, D) to num vectors, (B, num·D)."""
    return nn.Sequential(nn.SiLU(), nn.Linear(width, num * width))


class Block(nn.Module):
    """Attention and feed-forward, each after a norm that six vectors γ1 γ2 scale1 scale2 shift1 shift2 modulate."""

    def __init__(self, c: VARConfig):
        super().__init__()
        self.norm_eps = c.norm_eps
        self.attn, self.ffn = Attention(c), FeedForward(c)
        if c.shared_aln:
            self.ada_gss = nn.Parameter(torch.empty(1, 1, 6, c.embed_dim))
        else:
            self.ada_lin = modulation_layer(c.embed_dim, 6)

    def modulation(self, c) -> torch.Tensor:
        """The six vectors (B, 6, D), of c (B, D) or, where these are shared, of the shared ones (B, 6, D)."""
        if c.dim() == 3:
            return self.ada_gss[0] + c
        return self.ada_lin(c).unflatten(-1, (6, -1))

    def forward(self, x, six, mask=None, kept=None) -> torch.Tensor:
        """(B, n, D) of x (B, n, D) and six (B, 6, D); mask (1, 1, n, n) bool: what may be looked at.

        kept (2, B, 1, 1): what the two branches are multiplied by; None: 1.
        """
        query, key, value = self.before_attention(x, six)
        dropout = self.attn.dropout if self.training else 0.0
        looked = attention(query, key, value, mask, dropout=dropout, scale=self.attn.scale)
        return self.after_attention(x, six, looked, kept)

    def before_attention(self, x, six) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, each (B, n, H, d), that attention with attn.scale compares."""
        _, _, scale, _, shift, _ = six.unsqueeze(1).unbind(2)  # each (B, 1, D)
        return self.attn.heads(self._norm(x) * (1 + scale) + shift)

    def after_attention(self, x, six, looked, kept=None) -> torch.Tensor:
        """The rest of the block, from what its attention returned (B, n, H, d); kept: see `forward`."""
        gate1, gate2, _, scale, _, shift = six.unsqueeze(1).unbind(2)
        if kept is not None:
            gate1, gate2 = gate1 * kept[0], gate2 * kept[1]
        x = x + gate1 * self.attn.finish(looked)
        return x + gate2 * self.ffn(self._norm(x) * (1 + scale) + shift)

    def _norm(self, x):
        return F.layer_norm(x, x.shape[-1:], eps=self.norm_eps)


class Attention(nn.Module):
    """What stands around attention; mat_qkv makes queries, keys and values in this order. Keys have no bias."""

    def __init__(self, c: VARConfig):
        super().__init__()
        dim = c.embed_dim
        self.shape, self.l2_norm, self.dropout = (3, c.num_heads, dim // c.num_heads), c.attn_l2_norm, c.attn_drop_rate
        self.scale = 1.0 if c.attn_l2_norm else 0.25 / math.sqrt(dim // c.num_heads)  # of q·k, before the softmax
        self.mat_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.register_buffer("zero_k_bias", torch.zeros(dim))
        if c.attn_l2_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, c.num_heads, 1, 1), math.log(4)))
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(c.drop_rate)

    def heads(self, x) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, each (B, n, H, d), of x (B, n, D)."""
        qkv = self.mat_qkv(x) + torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])
        query, key, value = qkv.unflatten(-1, self.shape).unbind(2)  # each (B, n, H, d)
        if self.l2_norm:
            factor = self.scale_mul_1H11.clamp(max=LOG_LARGEST).exp().transpose(1, 2)  # (1, 1, H, 1)
            query = (F.normalize(query, dim=-1) * factor).type_as(value)
            key = F.normalize(key, dim=-1).type_as(value)
        return query, key, value

    def finish(self, looked) -> torch.Tensor:
        """(B, n, D) of what was looked up, (B, n, H, d)."""
        return self.proj_drop(self.proj(looked.flatten(2)))


class FeedForward(nn.Module):
    """Two layers with a GELU in its tanh approximation."""

    def __init__(self, c: VARConfig):
        super().__init__()
        hidden = round(c.mlp_ratio * c.embed_dim)
        self.fc1, self.fc2 = nn.Linear(c.embed_dim, hidden), nn.Linear(hidden, c.embed_dim)
        self.drop = nn.Dropout(c.drop_rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, n, D)."""
        return self.drop(self.fc2(F.gelu(self.fc1(x), approximate="tanh")))


class HeadNorm(nn.Module):
    """The norm before the head, modulated by scale and shift, in this order."""

    def __init__(self, width: int, norm_eps: float):
        super().__init__()
        self.norm_eps, self.ada_lin = norm_eps, modulation_layer(width, 2)

    def modulation(self, c) -> torch.Tensor:
        """Scale and shift (B, 2, D) of c (B, D)."""
        return self.ada_lin(c).unflatten(-1, (2, -1))

    def forward(self, x, two) -> torch.Tensor:
        """(B, n, D) float32 of x (B, n, D) and two (B, 2, D)."""
        scale, shift = two.unsqueeze(1).unbind(2)
        return F.layer_norm(x.float(), x.shape[-1:], eps=self.norm_eps) * (1 + scale) + shift


def next_scale_loss(logits, ids, patch_nums, label_smoothing=0.0, stage=-1, stage_weight=1.0) -> torch.Tensor:
    """Mean over the images of Σ_tokens weight/L · cross-entropy of logits (B, n, V) for ids (B, n), a scalar.

    stage: the last scale that logits and ids have, whose tokens have stage_weight, the others 1; −1 or S − 1: all
    scales are there, each with the weight 1.
    """
    losses = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none", label_smoothing=label_smoothing)  # (B, n)
    if 0 <= stage < len(patch_nums) - 1:
        newest = patch_nums[stage] ** 2
        losses = torch.cat([losses[:, :-newest], losses[:, -newest:] * stage_weight], dim=1)
    return losses.sum(dim=1).mean() / sum(p * p for p in patch_nums)
