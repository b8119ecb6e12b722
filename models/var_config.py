"""What shapes a VAR: its configuration, the published sizes, and what a published file's weights say of them."""

from dataclasses import InitVar, dataclass
from typing import ClassVar

from models.tokenizers.ldm import PLACES
from models.tokenizers.multiscale_vq import SCALES, check_sides
from util.args import flag
from util.sizes import Size, check_counts, check_square, image_size


@dataclass(frozen=True)
class VARConfig:
    """Everything that shapes a VAR; names and defaults of the published constructor.

    num_classes, cond_drop_rate and z_channels may be given in place of class_num, label_drop_prob and vae_embed_dim;
    they are not kept under these names.
    """

    num_classes: InitVar[int | None] = None
    depth: int = 16
    embed_dim: int = 1024
    num_heads: int = 16
    mlp_ratio: float = 4.0
    drop_rate: float = flag(0.0, "dropout after attention and feed-forward", low=0, high=1)
    attn_drop_rate: float = flag(0.0, "dropout of attention weights", low=0, high=1)
    drop_path_rate: float = flag(0.0, "of the last block: share of the images that a branch leaves out", low=0, high=1)
    norm_eps: float = 1e-6
    shared_aln: bool = flag(False, "one layer for the modulations of all blocks, as of var_d36_s")
    cond_drop_rate: InitVar[float | None] = None
    attn_l2_norm: bool = False
    patch_nums: tuple = SCALES["var_vq"]  # tokens of the sides of the scales (the tokenizer's)
    vocab_size: int = flag(4096, "entries of the codebook (the tokenizer's)", low=1)
    z_channels: InitVar[int | None] = None
    img_size: Size | None = flag(None, "pixels of an image's side", type=image_size)  # None: what the last scale covers
    vae_stride: int = flag(16, "pixels of a latent's side", low=1)
    vae_embed_dim: int = flag(32, "channels of a latent", low=1)
    class_num: int = flag(1000, "number of classes (read from the data when training)", low=1)
    label_drop_prob: float = flag(0.1, "probability of training without the label", low=0, high=1)
    label_smoothing: float = flag(0.0, "share of the target spread over all ids", low=0, high=1)
    init_adaln_gamma: float = flag(1e-5, "size of the blocks' gates at the start", low=0)
    mask_ratio_min: float = 1.0
    grad_checkpointing: bool = flag(False, "recompute activations in the backward pass")

    FREE: ClassVar = frozenset(
        "drop_rate attn_drop_rate drop_path_rate label_drop_prob label_smoothing init_adaln_gamma "
        "grad_checkpointing".split()
    )

    def __post_init__(self, num_classes, cond_drop_rate, z_channels):
        given = dict(class_num=num_classes, label_drop_prob=cond_drop_rate, vae_embed_dim=z_channels)
        for name, value in given.items():
            if value is not None:
                object.__setattr__(self, name, value)
        object.__setattr__(self, "patch_nums", tuple(self.patch_nums))
        check_sides("patch_nums", self.patch_nums)
        check_square(self.img_size, "a VAR")
        check_counts(self, "depth embed_dim num_heads vocab_size vae_stride vae_embed_dim class_num")
        if self.img_size is None:
            object.__setattr__(self, "img_size", self.grid * self.vae_stride)
        if self.img_size != self.grid * self.vae_stride:
            raise ValueError(
                f"img_size {self.img_size} must be {self.grid}·{self.vae_stride} = {self.grid * self.vae_stride}: the "
                "last scale has a token for each latent"
            )
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} must be a multiple of num_heads {self.num_heads}")
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate {self.drop_path_rate} must be below 1: a branch left out always is none")
        if self.mask_ratio_min != 1.0:
            raise ValueError(f"mask_ratio_min {self.mask_ratio_min} must be 1.0: all tokens are targets")

    @property
    def grid(self) -> int:
        """Tokens of the last scale's side."""
        return self.patch_nums[-1]

    @property
    def seq_len(self) -> int:
        """Tokens of an image, L."""
        return sum(p * p for p in self.patch_nums)

    @property
    def first(self) -> int:
        """Tokens of the first scale."""
        return self.patch_nums[0] ** 2

    def scale_of(self, num: int) -> int:
        """The scale that ends after so many tokens."""
        ends = [sum(p * p for p in self.patch_nums[: s + 1]) for s in range(len(self.patch_nums))]
        return ends.index(num)


def read_published(weights: dict) -> tuple[dict, dict]:
    """(fields of the configuration that the weights of a published VAR say, settings of the tokenizer it is for).

    Weights that are no VAR's raise ValueError.
    """
    try:
        blocks = {int(key.split(".")[1]) for key in weights if key.startswith("blocks.")}
        num_rows, width = weights["class_emb.weight"].shape
        vocab_size, channels = len(weights["head.weight"]), weights["word_embed.weight"].shape[1]
        num_scales, length = len(weights["lvl_embed.weight"]), weights["pos_1LC"].shape[1]
        hidden, scales = len(weights["blocks.0.ffn.fc1.weight"]), weights.get("blocks.0.attn.scale_mul_1H11")
        num_heads = width // 64 if scales is None else scales.shape[1]
    except KeyError as error:
        raise ValueError(f"the checkpoint is not one of VAR: its 'model' has no {error}") from None
    except (ValueError, IndexError):
        raise ValueError("the checkpoint is not one of VAR: its tensors have other numbers of dimensions") from None
    fitting = [name for name, s in SCALES.items() if len(s) == num_scales and sum(p * p for p in s) == length]
    if not fitting:
        raise ValueError(f"the checkpoint has {num_scales} scales of {length} tokens in all, as no published VAR has")
    sides = SCALES[fitting[0]]
    known = dict(depth=len(blocks), embed_dim=width, mlp_ratio=hidden / width, class_num=num_rows - 1)
    known |= dict(num_heads=num_heads, attn_l2_norm=scales is not None)
    known |= dict(vocab_size=vocab_size, vae_embed_dim=channels, patch_nums=sides, img_size=16 * sides[-1])
    known |= dict(shared_aln="shared_ada_lin.1.weight" in weights)
    return known, {"tokenizer": fitting[0], "vae_path": PLACES[fitting[0]]}


def _published(depth: int, patch_nums=SCALES["var_vq"], shared_aln: bool = False) -> VARConfig:
    """The size that is published with so many blocks."""
    return VARConfig(
        depth=depth,
        embed_dim=64 * depth,
        num_heads=depth,
        drop_path_rate=0.1 * depth / 24,
        attn_l2_norm=True,
        shared_aln=shared_aln,
        patch_nums=patch_nums,
    )


VAR_CONFIGS = {
    "var_tiny": VARConfig(
        depth=4, embed_dim=64, num_heads=2, attn_l2_norm=True, patch_nums=(1, 2, 3, 4, 6, 8), vae_stride=1
    ),  # for CPU: digits
    "var_mini": VARConfig(
        depth=4, embed_dim=128, num_heads=4, attn_l2_norm=True, patch_nums=(1, 2, 3, 4, 6, 8), vae_stride=4
    ),  # for CPU: CIFAR-10
    "var_d16": _published(16),  # published: FID 3.55 (paper: 3.30), as are the next four with --cfg 2.5
    "var_d20": _published(20),  # published: FID 2.95 (paper: 2.57)
    "var_d24": _published(24),  # published: FID 2.33 (paper: 2.09)
    "var_d30": _published(30),  # published: FID 1.97 (paper: 1.92)
    "var_d36_s": _published(36, SCALES["var_vq_512"], shared_aln=True),  # 512 px; published: FID 2.63
}
