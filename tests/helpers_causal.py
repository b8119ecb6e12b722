"""Small causal models, and ways to compute what they draw without a loop, a cache or a batch."""

from dataclasses import replace
from pathlib import Path

import torch

from models.causal_gpt import CAUSAL_GPT_CONFIGS, CausalGPT, CausalGPTConfig
from models.kv_cache import CausalConditions
from models.mar_ar import MARAR, MARARConfig
from models.tokenizers.vq import VQConfig, VQModel

ENTRIES, LENGTH = 16, 16


def tiny_ar(loss="ce", ar_order="random", seed=0, **changes) -> MARAR:
    """A MARAR over 4×4 tokens in eval mode, all of whose weights differ from their start."""
    sizes = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in
             (("embed_dim", 16), ("depth", 1), ("num_heads", 2))}  # fmt: skip
    options = dict(img_size=8, vae_stride=2, vae_embed_dim=2, class_num=4, loss=loss, ar_order=ar_order)
    options |= dict(vocab_size=ENTRIES) if loss == "ce" else dict(diffloss_d=1, diffloss_w=16)
    torch.manual_seed(seed)
    model = MARAR(MARARConfig(**{**sizes, **options, **changes}))
    return disturbed(model)


def tiny_gpt(seed=0, **changes) -> CausalGPT:
    """A CausalGPT over 4×4 ids in eval mode, all of whose weights differ from their start."""
    sizes = dict(dim=16, n_layer=2, n_head=2, multiple_of=8, vocab_size=ENTRIES, num_classes=4, block_size=LENGTH)
    torch.manual_seed(seed)
    return disturbed(CausalGPT(CausalGPTConfig(**{**sizes, **changes})))


def save_published(folder: Path, wrapped: bool) -> tuple[CausalGPT, Path]:
    """(model, path) of a file like LlamaGen's below the folder, with 3 classes, and the tokenizer in its place there.

    wrapped: the weights are its 'model'.
    """
    torch.manual_seed(0)
    vq = VQModel(VQConfig(ch=32, encoder_ch_mult=(1,) * 5, decoder_ch_mult=(1,) * 5, z_channels=32, codebook_size=12))
    (folder / "pretrained_models").mkdir(exist_ok=True)
    torch.save({"model": vq.state_dict()}, folder / "pretrained_models" / "vq_ds16_c2i.pt")
    model = CausalGPT(replace(CAUSAL_GPT_CONFIGS["causal_gpt_tiny"], vocab_size=12, class_num=3, img_size=32))
    torch.nn.init.normal_(model.output.weight)
    path = folder / "c2i_tiny.pt"
    torch.save({"model": model.state_dict(), "steps": 3} if wrapped else model.state_dict(), path)
    return model, path


def disturbed(model):
    """The model in eval mode with weights that differ from their start, so that nothing is zero or symmetric."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def some_tokens(model, batch, seed=1):
    """Tokens (B, L, …) of any value."""
    g = torch.Generator().manual_seed(seed)
    if model.token_head.discrete:
        return torch.randint(0, ENTRIES, (batch, LENGTH), generator=g)
    return torch.randn(batch, LENGTH, model.config.token_dim, generator=g)


def some_orders(model, batch, seed=2):
    """Orders (B, L), of a raster model row by row."""
    if "order" in model.fixed_rules:
        return torch.arange(LENGTH).repeat(batch, 1)
    g = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(LENGTH, generator=g) for _ in range(batch)])


class WholePass(CausalConditions):
    """The conditions without a cache: a pass over the whole sequence for each z."""

    def _extend(self, tokens, unknown, images, labelled):
        z = self.model.outputs(tokens[images], self.on_device[images], self.labels[images] if labelled else None)
        return z[torch.arange(len(images)), (~unknown[images]).sum(dim=1)].unsqueeze(1)
