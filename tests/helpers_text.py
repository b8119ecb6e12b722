"""Small models of text, tiny T5 encoders in folders, and captions of digits."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from models.maskgil import MASKGIL_CONFIGS, MaskGIL
from models.text import Prompts
from scripts.demo_text import save_encoder
from tests.helpers import named_weights
from tests.helpers_maskgil import REFERENCE, MaskGILConfig, settings_of, tiny_maskgil

NUM_TOKENS, WIDTH = 6, 8
WORDS = "zero one two three four five six seven eight nine a the digit number picture of".split()


def tiny_t2i(seed=0, num_prompts=5, **changes) -> MaskGIL:
    """A MaskGIL of text over 4×4 ids in eval mode, with prompts of 1, 2, … tokens of random features."""
    sizes = dict(model_type="t2i", caption_dim=WIDTH, cls_token_num=NUM_TOKENS)
    model = tiny_maskgil(seed, **{**sizes, **changes})
    model.prompts = random_prompts(num_prompts)
    return model


def random_prompts(number: int, seed=0) -> Prompts:
    """Prompt i has 1 + i % NUM_TOKENS tokens."""
    draws = np.random.default_rng(seed)
    rows = [draws.standard_normal((1 + i % NUM_TOKENS, WIDTH)).astype(np.float16) for i in range(number)]
    return Prompts([f"prompt {i}" for i in range(number)], rows, NUM_TOKENS, WIDTH)


def published_text() -> MaskGIL:
    """The fixture's model of text."""
    sizes = dict(item.split("=") for item in REFERENCE["config"])
    sizes = {key: float(value) if key == "norm_eps" else int(value) for key, value in sizes.items()}
    own = settings_of("text")
    own = dict(model_type="t2i", caption_dim=int(own["caption_dim"]), cls_token_num=int(own["cls_token_num"]))
    return named_weights(MaskGIL(MaskGILConfig(**sizes, **own)), float(REFERENCE["fill_std"])).eval()


def tiny_encoder(folder: Path, width=WIDTH, seed=0) -> str:
    """The folder, with a T5 encoder of random weights whose features have this width."""
    save_encoder(folder, WORDS, seed, d_model=width, d_kv=4, d_ff=8, num_layers=1, num_heads=1)
    return str(folder)


def shrink_text(patch) -> None:
    """A maskgil_t2i_tiny that takes a tenth of the time, until pytest's MonkeyPatch `patch` is undone."""
    small = replace(MASKGIL_CONFIGS["maskgil_t2i_tiny"], dim=32, n_layer=2, n_head=2)
    patch.setitem(MASKGIL_CONFIGS, "maskgil_t2i_tiny", small)


def digit_captions(path: Path, names: list[str], labels: list[int]) -> Path:
    """A table, .csv or .jsonl, with two captions of each image."""
    wordings = ("a {}", "the digit {}")
    rows = [(n, w.format(WORDS[label])) for n, label in zip(names, labels) for w in wordings]
    if path.suffix == ".csv":
        path.write_text("\n".join(["image,caption", *(",".join(row) for row in rows)]))
    else:
        path.write_text("\n".join(f'{{"image": "{name}", "caption": "{caption}"}}' for name, caption in rows))
    return path


def batch_of(model: MaskGIL, labels: list[int]):
    """(ids, mask, the `models.text.Text` of these labels) of as many images."""
    g = torch.Generator().manual_seed(1)
    length = model.config.seq_len
    ids = torch.randint(model.config.vocab_size, (len(labels), length), generator=g)
    return ids, torch.rand(len(labels), length, generator=g) < 0.5, model.prompts[torch.tensor(labels)]
