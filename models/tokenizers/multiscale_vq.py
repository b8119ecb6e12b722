"""VAR's tokenizer (arXiv 2404.02905): a VQGAN whose quantiser is multi-scale, under the published tensor names.

Legend: B images of (H, W) pixels, f (B, C, h, w) features, (h, w) = (H, W) / stride; S scales of p_s × p_s tokens.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from models.tokenizers.multiscale_quantizer import MultiScaleQuantizer
from models.tokenizers.vq import GROUPS, NUM_RES_BLOCKS, Downsample, ResBlock, Upsample, norm

# row of TOKENIZERS -> sides of the scales of the published file, which has no sizes of its own; a trained one says its
# scales. No transformer is published for the last.
SCALES = {
    "var_vq": (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    "var_vq_512": (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    "var_vq_1024": (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}


# the least of the sizes of a `MultiScaleVQConfig`
LOWEST = dict(vocab_size=1, z_channels=1, ch=1, in_channels=1, norm_groups=1, quant_conv_ks=1)
LOWEST |= dict(share_quant_resi=0, default_qresi_counts=0)


def check_sides(name: str, sides: tuple) -> None:
    """Raise ValueError unless these are the sides of two or more scales, each larger than the one before."""
    whole = all(isinstance(side, int) and side > 0 for side in sides)
    if len(sides) < 2 or not whole or any(a >= b for a, b in zip(sides, sides[1:])):
        raise ValueError(f"{name} {sides} must be two or more whole numbers, each larger than the one before")


@dataclass(frozen=True)
class MultiScaleVQConfig:
    """Sizes of a `MultiScaleVQ`, by their published names and defaults (the published file has ch 160).

    ch_mult: channels of the levels over ch, from the full resolution down; each level but the first halves the image.
    norm_groups: groups of channels that are normalised together, a divisor of ch. v_patch_nums: sides p of the scales.
    quant_resi: share of the convolution in φ. share_quant_resi: 0 for one φ a scale (or default_qresi_counts of them),
    1 for one φ, K for K of them. beta: weight of the commitment. Sizes that cannot be raise ValueError.
    """

    vocab_size: int = 4096
    z_channels: int = 32
    ch: int = 128
    dropout: float = 0.0
    beta: float = 0.25
    using_znorm: bool = False
    quant_conv_ks: int = 3
    quant_resi: float = 0.5
    share_quant_resi: int = 4
    default_qresi_counts: int = 0
    v_patch_nums: tuple[int, ...] = SCALES["var_vq"]
    in_channels: int = 3
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    norm_groups: int = GROUPS

    def __post_init__(self):
        for name in ("v_patch_nums", "ch_mult"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check_sides("v_patch_nums", self.v_patch_nums)
        for name, low in LOWEST.items():
            value = getattr(self, name)
            if type(value) is not int or value < low:
                raise ValueError(f"{name} must be a whole number of at least {low}, got {value!r}")
        if self.quant_conv_ks % 2 == 0:
            raise ValueError(f"quant_conv_ks must be odd, got {self.quant_conv_ks}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be from 0 to below 1, got {self.dropout}")
        if not self.ch_mult or min(self.ch_mult) < 1:
            raise ValueError(f"ch_mult must be numbers of at least 1, got {self.ch_mult}")
        if not math.isfinite(self.quant_resi):
            raise ValueError(f"quant_resi must be a finite number, got {self.quant_resi}")
        if self.ch % self.norm_groups:
            raise ValueError(f"ch {self.ch} must be divisible by the {self.norm_groups} groups of its normalisation")

    @property
    def stride(self) -> int:
        """Pixels of a feature's side."""
        return 2 ** (len(self.ch_mult) - 1)


class MultiScaleVQ(nn.Module):
    """Encoder, quantiser and decoder. Ids are lists of one (B, p_s²) a scale."""

    def __init__(self, config: MultiScaleVQConfig):
        super().__init__()
        self.config = config
        channels, kernel = config.z_channels, config.quant_conv_ks
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = MultiScaleQuantizer(config)
        self.quant_conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        self.post_quant_conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)

    def encode_features(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in [−1, 1] -> f (B, C, h, w)."""
        return self.quant_conv(self.encoder(images))

    @torch.no_grad()
    def features_to_ids(self, f: torch.Tensor, scales=None) -> list[torch.Tensor]:
        """Features f (B, C, h, w) -> ids; scales as in `MultiScaleQuantizer.steps`."""
        return [ids for _, ids, _ in self.quantize.steps(f, scales)]

    @torch.no_grad()
    def encode(self, images: torch.Tensor, scales=None) -> list[torch.Tensor]:
        """Images (B, 3, H, W) in [−1, 1] -> ids."""
        return self.features_to_ids(self.encode_features(images), scales)

    def ids_to_features(self, ids: list[torch.Tensor]) -> list[torch.Tensor]:
        """Ids -> f̂ (B, C, h, w) after each scale."""
        f_hats = []
        for s, scale_ids in enumerate(ids):
            e = self.quantize.embed(scale_ids, s)
            f_hats.append(f_hats[-1] + e if f_hats else e)
        return f_hats

    def ids_to_inputs(self, ids: list[torch.Tensor]) -> torch.Tensor:
        """Ids of the scales 0…k -> what a transformer reads to predict the scales 1…k + 1, (B, Σ p_s², C) float32.

        There is no scale S, so of all ids those of the last scale are not read: the inputs are (B, L − p_0², C).
        """
        f_hats = self.ids_to_features(ids[: len(self.quantize.scales) - 1])
        return torch.cat([self.quantize.next_input(f_hat, s) for s, f_hat in enumerate(f_hats, 1)], dim=1)

    def decode_features(self, f_hat: torch.Tensor) -> torch.Tensor:
        """f̂ (B, C, h, w) -> images (B, 3, H, W), not clamped."""
        return self.decoder(self.post_quant_conv(f_hat))

    def decode(self, ids: list[torch.Tensor]) -> torch.Tensor:
        """Ids -> images (B, 3, H, W) in [−1, 1]."""
        return self.decode_features(self.ids_to_features(ids)[-1]).clamp(-1, 1)

    def quantize_loss(self, f: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(f̂ straight-through, vq_loss ()) of features f (B, C, h, w); see `MultiScaleQuantizer.forward`."""
        f_hat, vq_loss, _ = self.quantize(f)
        return f_hat, vq_loss

    def forward(self, images: torch.Tensor, last=None) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (B, 3, H, W) in [−1, 1] -> (their reconstruction, not clamped, vq_loss ()); last: as in `quantize`."""
        f_hat, vq_loss, _ = self.quantize(self.encode_features(images), last)
        return self.decode_features(f_hat), vq_loss


class AttnBlock(nn.Module):
    """x + attention of one head over all positions, whose queries, keys and values are one convolution."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = norm(channels, groups)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).flatten(2).mT.chunk(3, dim=2)  # (B, h·w, channels)
        y = F.scaled_dot_product_attention(q, k, v).mT.reshape(x.shape)
        return x + self.proj_out(y)


class Level(nn.Module):
    """Residual blocks, each with attention after it or none; downsample or upsample leads to the next level."""

    def __init__(self, channels: int, out_channels: int, num_blocks: int, config: MultiScaleVQConfig, *, attention):
        super().__init__()
        widths, groups = [channels] + [out_channels] * num_blocks, config.norm_groups
        self.block = nn.ModuleList([ResBlock(*pair, config.dropout, groups) for pair in zip(widths, widths[1:])])
        self.attn = nn.ModuleList([AttnBlock(out_channels, groups) for _ in range(num_blocks if attention else 0)])
        self.downsample = self.upsample = nn.Identity()

    def forward(self, x):
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        return self.upsample(self.downsample(x))


class Middle(nn.Module):
    """The blocks at the lowest resolution: residual, attention, residual."""

    def __init__(self, channels: int, config: MultiScaleVQConfig):
        super().__init__()
        self.block_1 = ResBlock(channels, channels, config.dropout, config.norm_groups)
        self.attn_1 = AttnBlock(channels, config.norm_groups)
        self.block_2 = ResBlock(channels, channels, config.dropout, config.norm_groups)

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Images (B, 3, H, W) -> (B, C, h, w), with attention in the last level."""

    def __init__(self, config: MultiScaleVQConfig):
        super().__init__()
        widths = [config.ch] + [config.ch * multiple for multiple in config.ch_mult]
        last = len(config.ch_mult) - 1
        self.conv_in = nn.Conv2d(config.in_channels, config.ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (channels, out_channels) in enumerate(zip(widths, widths[1:])):
            self.down.append(Level(channels, out_channels, NUM_RES_BLOCKS, config, attention=i == last))
            if i < last:
                self.down[i].downsample = Downsample(out_channels)
        self.mid = Middle(widths[-1], config)
        self.norm_out = norm(widths[-1], config.norm_groups)
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 3, padding=1)

    def forward(self, images):
        x = self.conv_in(images)
        for module in (*self.down, self.mid):
            x = module(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """(B, C, h, w) -> images (B, 3, H, W). `up` is from the full resolution down, and runs in reverse.

    Its last level, that of the lowest resolution, has attention.
    """

    def __init__(self, config: MultiScaleVQConfig):
        super().__init__()
        widths = [config.ch * multiple for multiple in config.ch_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], config)
        self.up = nn.ModuleList()
        for i, (channels, out_channels) in enumerate(zip([*widths[1:], widths[-1]], widths)):
            self.up.append(Level(channels, out_channels, NUM_RES_BLOCKS + 1, config, attention=i == last))
            if i > 0:
                self.up[i].upsample = Upsample(out_channels)
        self.norm_out = norm(widths[0], config.norm_groups)
        self.conv_out = nn.Conv2d(widths[0], config.in_channels, 3, padding=1)

    def forward(self, x):
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))
