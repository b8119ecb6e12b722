"""LlamaGen's VQ autoencoder (arXiv 2406.06525), under the tensor names of its published files: VQ-16 and VQ-8.

Legend: B images of (H, W) pixels, (h, w) = (H, W) / stride, z channels of the encoder, e of an entry, V entries.
Vectors and entries are compared, and given to the decoder, divided by their length.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

NUM_RES_BLOCKS = 2  # of a level of the encoder; the decoder has one more
GROUPS = 32  # of channels that are normalised together
NUM_USED = 65536  # latents whose ids the published buffer `codebook_used` keeps


@dataclass(frozen=True)
class VQConfig:
    """Sizes of a `VQModel`, and the weights of its training losses.

    encoder_ch_mult, decoder_ch_mult: channels of the levels over ch, from the full resolution down; each level but the
    first halves the image. codebook_l2_norm: divide vectors and entries by their length, as published.
    """

    in_channels: int = 3
    ch: int = 128
    z_channels: int = 256
    codebook_size: int = 16384
    codebook_embed_dim: int = 8
    encoder_ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    decoder_ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    commit_loss_beta: float = 0.25
    entropy_loss_ratio: float = 0.0
    codebook_l2_norm: bool = True

    def __post_init__(self):
        for name in ("encoder_ch_mult", "decoder_ch_mult"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def stride(self) -> int:
        """Pixels of a latent's side."""
        return 2 ** (len(self.encoder_ch_mult) - 1)


VQ_CONFIGS = {
    "llamagen_vq16": VQConfig(),  # published rFID 2.19 at 256 pixels
    "llamagen_vq8": VQConfig(encoder_ch_mult=(1, 2, 2, 4), decoder_ch_mult=(1, 2, 2, 4)),  # 0.59
}


class VQModel(nn.Module):
    """Encoder, quantiser and decoder."""

    def __init__(self, config: VQConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Quantizer(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_embed_dim, config.z_channels, 1)

    def pre_quant(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) in [−1, 1] -> vectors (B, e, h, w), of any length."""
        return self.quant_conv(self.encoder(images))

    def encode_ids(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) -> ids (B, h, w) long."""
        return self.quantize.nearest(self.pre_quant(images))

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """Entries (B, e, h, w) of ids (B, h, w)."""
        return F.embedding(ids, self.quantize.entries()).movedim(-1, 1)

    def decode(self, vectors: torch.Tensor) -> torch.Tensor:
        """Entries (B, e, h, w) -> images (B, C, H, W), not clamped."""
        return self.decoder(self.post_quant_conv(vectors))

    def decode_ids(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids (B, h, w) -> images (B, C, H, W), not clamped."""
        return self.decode(self.lookup(ids))

    def quantised(self, vectors: torch.Tensor) -> torch.Tensor:
        """The nearest entries (B, e, h, w) of vectors (B, e, h, w); the gradient passes to their normalised vectors."""
        vectors = self.quantize.normalised(vectors)
        return vectors + (self.lookup(self.quantize.nearest(vectors)) - vectors).detach()

    def losses(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """{reconstruction (B, C, H, W), vq_loss, commit_loss, entropy_loss}, each loss () with its factor."""
        config = self.config
        vectors = self.quantize.normalised(self.pre_quant(images))
        entries = self.lookup(self.quantize.nearest(vectors))
        entropy = vectors.new_zeros(())
        if config.entropy_loss_ratio:
            entropy = config.entropy_loss_ratio * entropy_loss(self.quantize.distances(vectors))
        return {
            "reconstruction": self.decode(vectors + (entries - vectors).detach()),
            "vq_loss": F.mse_loss(entries, vectors.detach()),
            "commit_loss": config.commit_loss_beta * F.mse_loss(entries.detach(), vectors),
            "entropy_loss": entropy,
        }


def entropy_loss(distances: torch.Tensor, temperature: float = 0.01) -> torch.Tensor:
    """Mean entropy of softmax(−distance / temperature) less the entropy of its mean, () of distances (N, V)."""
    log_p = (-distances / temperature).log_softmax(dim=-1)
    p = log_p.exp()
    mean = p.mean(dim=0)
    return (mean * (mean + 1e-5).log()).sum() - (p * log_p).sum(dim=-1).mean()


class Quantizer(nn.Module):
    """The codebook."""

    def __init__(self, config: VQConfig):
        super().__init__()
        self.l2_norm = config.codebook_l2_norm
        self.embedding = nn.Embedding(config.codebook_size, config.codebook_embed_dim)
        self.register_buffer("codebook_used", torch.zeros(NUM_USED))  # in the published files; nothing reads it

    def normalised(self, vectors: torch.Tensor) -> torch.Tensor:
        """Vectors (B, e, h, w) divided by their length, or as they are."""
        return F.normalize(vectors, dim=1) if self.l2_norm else vectors

    def entries(self) -> torch.Tensor:
        """The codebook (V, e) as it is used: the stored rows may have any length."""
        return F.normalize(self.embedding.weight, dim=1) if self.l2_norm else self.embedding.weight

    def distances(self, vectors: torch.Tensor) -> torch.Tensor:
        """Squared distances (B·h·w, V) of vectors (B, e, h, w) to all entries."""
        rows, entries = self.normalised(vectors).movedim(1, -1).flatten(0, 2), self.entries()
        return rows.square().sum(dim=1, keepdim=True) + entries.square().sum(dim=1) - 2 * rows @ entries.T

    @torch.no_grad()
    def nearest(self, vectors: torch.Tensor) -> torch.Tensor:
        """Ids (B, h, w) of the entries nearest to vectors (B, e, h, w); the lowest on a tie."""
        ids = [self.distances(vector[None]).argmin(dim=1) for vector in vectors.float()]  # (h·w, V) at a time
        return torch.stack(ids).reshape(len(vectors), *vectors.shape[2:])


class ResBlock(nn.Module):
    """x + two convolutions of it, each after normalisation in `groups` groups and SiLU; dropout before the second."""

    def __init__(self, channels: int, out_channels: int, dropout: float = 0.0, groups: int = GROUPS):
        super().__init__()
        self.norm1, self.norm2 = norm(channels, groups), norm(out_channels, groups)
        self.dropout = dropout
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else nn.Identity()

    def forward(self, x):
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.dropout(F.silu(self.norm2(y)), self.dropout, self.training))
        return y + self.nin_shortcut(x)


class AttnBlock(nn.Module):
    """x + attention of one head over all positions."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (conv(y).flatten(2).mT for conv in (self.q, self.k, self.v))  # (B, h·w, channels)
        y = F.scaled_dot_product_attention(q, k, v).mT.reshape(x.shape)
        return x + self.proj_out(y)


class Downsample(nn.Module):
    """Half the side: a row below and a column to the right are padded."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the side."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Level(nn.Module):
    """Residual blocks, each with attention after it or none; downsample or upsample leads to the next level."""

    def __init__(self, channels: int, out_channels: int, num_blocks: int, *, attention: bool):
        super().__init__()
        widths = [channels] + [out_channels] * num_blocks
        self.res = nn.ModuleList([ResBlock(*pair) for pair in zip(widths, widths[1:])])
        self.attn = nn.ModuleList([AttnBlock(out_channels) for _ in range(num_blocks if attention else 0)])
        self.downsample = self.upsample = nn.Identity()

    def forward(self, x):
        for i, block in enumerate(self.res):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        return self.upsample(self.downsample(x))


class Encoder(nn.Module):
    """Images (B, C, H, W) -> (B, z, h, w), with attention in the last level."""

    def __init__(self, config: VQConfig):
        super().__init__()
        widths = [config.ch] + [config.ch * multiple for multiple in config.encoder_ch_mult]
        last = len(widths) - 2
        self.conv_in = nn.Conv2d(config.in_channels, config.ch, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        for i, (channels, out_channels) in enumerate(zip(widths, widths[1:])):
            self.conv_blocks.append(Level(channels, out_channels, NUM_RES_BLOCKS, attention=i == last))
            if i < last:
                self.conv_blocks[i].downsample = Downsample(out_channels)
        self.mid = middle(widths[-1])
        self.norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 3, padding=1)

    def forward(self, images):
        x = self.conv_in(images)
        for module in (*self.conv_blocks, *self.mid):
            x = module(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """(B, z, h, w) -> images (B, C, H, W), with attention in the first level, that of the lowest resolution."""

    def __init__(self, config: VQConfig):
        super().__init__()
        widths = [config.ch * multiple for multiple in config.decoder_ch_mult[::-1]]
        self.conv_in = nn.Conv2d(config.z_channels, widths[0], 3, padding=1)
        self.mid = middle(widths[0])
        self.conv_blocks = nn.ModuleList()
        for i, (channels, out_channels) in enumerate(zip([widths[0], *widths], widths)):
            self.conv_blocks.append(Level(channels, out_channels, NUM_RES_BLOCKS + 1, attention=i == 0))
            if i < len(widths) - 1:
                self.conv_blocks[i].upsample = Upsample(out_channels)
        self.norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.in_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for module in (*self.mid, *self.conv_blocks):
            x = module(x)
        return self.conv_out(F.silu(self.norm_out(x)))


def middle(channels: int) -> nn.ModuleList:
    """The blocks at the lowest resolution: residual, attention, residual."""
    return nn.ModuleList([ResBlock(channels, channels), AttnBlock(channels), ResBlock(channels, channels)])


def norm(channels: int, groups: int = GROUPS) -> nn.GroupNorm:
    """The normalisation of all blocks."""
    return nn.GroupNorm(groups, channels, eps=1e-6)
