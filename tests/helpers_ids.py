"""A tokenizer of ids, the grey levels of cells of an image, and a small MAR of them."""

from pathlib import Path

import torch

from models import tokenizers
from models.mar import MAR, MARConfig
from models.tokenizers.continuous import Tokenizer
from tests.helpers import torchrun

ENTRIES = 16


class GreyIds(Tokenizer):
    """An id is the mean of a cell, rounded to one of so many levels."""

    tokens = ("discrete",)

    def __init__(self, entries=ENTRIES, stride=2, image_channels=1):
        super().__init__(f"grey{entries}", stride=stride, channels=1, image_channels=image_channels)
        self.codebook_size = entries

    def encode_ids(self, images):
        means = torch.nn.functional.avg_pool2d(images.mean(dim=1, keepdim=True), self.stride).squeeze(1)
        return ((means + 1) / 2 * (self.codebook_size - 1)).round().long()

    def codes(self):
        return torch.linspace(-1, 1, self.codebook_size).unsqueeze(1).to(self._scale.device)

    def _images_of_codes(self, vectors):
        grey = vectors.movedim(-1, 1).expand(-1, self.image_channels, -1, -1)
        return grey.repeat_interleave(self.stride, dim=2).repeat_interleave(self.stride, dim=3)


def add_tokenizers(patch) -> None:
    """grey16 and grey32, in the table until pytest's MonkeyPatch `patch` takes them out again."""
    patch.setitem(tokenizers.TOKENIZERS, "grey16", lambda **options: GreyIds())
    patch.setitem(tokenizers.TOKENIZERS, "grey32", lambda **options: GreyIds(32))


def in_two_processes(folder: Path, words: list[str], prepare=add_tokenizers) -> None:
    """Run main_mar.py with these words by torchrun with gloo; folder: for its program.

    prepare(patch), a function of a module, comes before it: the tokenizers in its table.
    """
    program = (
        f"import sys, pytest, main_mar; from {prepare.__module__} import {prepare.__name__} as prepare\n"
        "with pytest.MonkeyPatch.context() as patch: prepare(patch); sys.exit(main_mar.main(sys.argv[1:]))"
    )
    (folder / "program.py").write_text(program)
    torchrun(folder / "program.py", *words)


def tiny_ids(seed=0, **changes) -> MAR:
    """A MAR over 4×4 ids in eval mode, all of whose weights differ from their start."""
    sizes = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in
             (("embed_dim", 16), ("depth", 1), ("num_heads", 2))}  # fmt: skip
    options = dict(img_size=8, vae_stride=2, vae_embed_dim=1, class_num=4, buffer_size=2, loss="ce", vocab_size=ENTRIES)
    torch.manual_seed(seed)
    model = MAR(MARConfig(**{**sizes, **options, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.celoss.proj.weight.mul_(5)
    return model.eval()
