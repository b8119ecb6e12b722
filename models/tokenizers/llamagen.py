"""LlamaGen's published tokenizers: rows `llamagen_vq16` and `llamagen_vq8`."""

import math
import re

import torch

from models.tokenizers.continuous import Tokenizer
from models.tokenizers.ldm import fill_as_named, read_tensors, weights_file
from models.tokenizers.vq import NUM_USED, VQ_CONFIGS, VQConfig, VQModel

STATISTICS = "quantize.codebook_used"  # of training; files may lack it


class LlamaGenTokenizer(Tokenizer):
    """A `VQModel`, frozen. Its latents are the vectors before quantisation divided by their length; decoding quantises.

    scale None: that which makes the mean square of such latents 1.
    """

    tokens = ("continuous", "discrete")

    def __init__(self, kind: str, model: VQModel, *, scale=None, mean=0.0):
        config = model.config
        super().__init__(
            kind,
            stride=config.stride,
            channels=config.codebook_embed_dim,
            image_channels=config.in_channels,
            scale=math.sqrt(config.codebook_embed_dim) if scale is None else scale,
            mean=mean,
        )
        self.codebook_size = config.codebook_size
        self.model = model.float().requires_grad_(False)
        self.eval()

    def _moments(self, images):
        return self.model.quantize.normalised(self.model.pre_quant(images.float()).float())

    def _images(self, raw):
        return self.model.decode(self.model.quantised(raw))

    def _ids(self, images):
        return self.model.encode_ids(images.float())

    def codes(self):
        return self.model.quantize.entries()

    def _images_of_codes(self, vectors):
        return self.model.decode(vectors.movedim(-1, 1))


def load_llamagen(name: str, *, vae_path=None, vae_scale=None, vae_mean=None) -> LlamaGenTokenizer:
    """The tokenizer `name` of VQ_CONFIGS from a file with its tensors under "model", by their published names.

    The sizes are those of the tensors. A file that cannot be read, or does not fit, raises ValueError.
    """
    weights = read_tensors(weights_file(name, vae_path))
    config = config_of(weights, vae_path)
    if config.stride != VQ_CONFIGS[name].stride:
        fitting = [row for row, sizes in VQ_CONFIGS.items() if sizes.stride == config.stride]
        way_out = f"; use --tokenizer {fitting[0]}" if fitting else ""
        raise ValueError(f"{vae_path} does not fit {name}: it is of stride {config.stride}{way_out}")
    with torch.device("meta"):  # without initial values, which are replaced
        model = VQModel(config)
    weights.setdefault(STATISTICS, torch.zeros(NUM_USED))
    fill_as_named(model, weights, f"{vae_path} does not fit {name}")
    return LlamaGenTokenizer(name, model, scale=vae_scale, mean=0.0 if vae_mean is None else vae_mean)


def config_of(weights: dict, path) -> VQConfig:
    """The sizes of a `VQModel` from its tensors; without those that say them a ValueError names the path."""

    def widths(part: str, count: int) -> list[int]:
        return [len(weights[f"{part}.conv_blocks.{i}.res.0.conv2.weight"]) for i in range(count)]

    blocks = {m[0] for key in weights if (m := re.match(r"(encoder|decoder)\.conv_blocks\.\d+\.", key))}
    num_levels = [sum(block.startswith(part) for block in blocks) for part in ("encoder", "decoder")]
    try:
        ch, in_channels = weights["encoder.conv_in.weight"].shape[:2]
        codebook_size, codebook_embed_dim = weights["quantize.embedding.weight"].shape
        z_channels = len(weights["encoder.conv_out.weight"])
        encoder, decoder = widths("encoder", num_levels[0]), widths("decoder", num_levels[1])[::-1]
    except KeyError as error:
        raise ValueError(f"{path} is no tokenizer of LlamaGen: it lacks {error}") from None
    except (ValueError, TypeError):
        raise ValueError(f"{path} is no tokenizer of LlamaGen: its tensors have other numbers of dimensions") from None
    uneven = not encoder or num_levels[0] != num_levels[1]
    if uneven or ch == 0 or ch % 32 or any(width % ch for width in encoder + decoder):
        raise ValueError(f"{path} is no tokenizer of LlamaGen: its levels have the widths {encoder} and {decoder}")
    return VQConfig(
        in_channels=in_channels,
        ch=ch,
        z_channels=z_channels,
        codebook_size=codebook_size,
        codebook_embed_dim=codebook_embed_dim,
        encoder_ch_mult=[width // ch for width in encoder],
        decoder_ch_mult=[width // ch for width in decoder],
    )
