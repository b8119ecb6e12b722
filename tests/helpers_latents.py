"""What the tests of cached latents share: pictures with odd names, a tiny tokenizer, commands that cache and train."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

import main_mar
from models.tokenizers.continuous import Tokenizer
from scripts import cache_latents
from training import step as step_module
from util.door import run_main
from util.images.latent_files import WRITERS

FORMATS = list(WRITERS)
# the same name in several classes, in a folder of a class, with two endings; names that are no ASCII
NAMES = [f"{c}/{n}" for c in ("7", "a b", "Été ☀") for n in ("0.png", "1.png", "ñ'\".png", "1.jpg.png")] + [
    "Été ☀/deep/0.png"
]
NUM = len(NAMES)
SMALL = "--data imagefolder --tokenizer pixel --img_size 8 --num_workers 0".split()
CACHE = [*SMALL, "--batch_size", "2", "--shard_size", "6"]  # units of packed: 0..5, 6..11, 12
TRAIN = "--model mar_tiny --buffer_size 2 --attn_dropout 0 --proj_dropout 0 --diffloss_w 16 --diffloss_d 1".split()
TRAIN += "--diffusion_batch_mul 1 --batch_size 4 --epochs 2 --blr 0.02 --warmup_epochs 0 --num_iter 2".split()
TRAIN += "--num_sampling_steps 2 --eval_freq 100".split()


class TinyKL(Tokenizer):
    """A tokenizer with a posterior, as KL-16 has: one convolution at stride 2; other seeds are other weights."""

    def __init__(self, seed: int = 0):
        super().__init__("tiny", stride=2, channels=2, image_channels=3, gaussian=True, scale=0.5)
        torch.manual_seed(seed)
        self.conv = torch.nn.Conv2d(3, 4, 2, stride=2).requires_grad_(False)

    def _moments(self, images):
        return self.conv(images)

    def _images(self, raw):
        return torch.cat([raw[:, :2], raw[:, :1]], dim=1).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


def write_image(path: Path, seed: int, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, format="png")


def cache(data, folder, *flags) -> Path:
    """Run cache_latents.py, which must end well."""
    argv = [*CACHE, "--data_path", str(data), "--cached_path", str(folder), *map(str, flags)]
    assert run_main(cache_latents.main, argv) == 0
    return folder


def refused(main, capsys, *argv) -> str:
    """The one line on stderr of a command that must end with code 2."""
    capsys.readouterr()
    assert run_main(main, [*map(str, argv)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "%|" not in line]  # a bar
    return line


def content(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def losses(monkeypatch, folder, *flags) -> list[float]:
    """The loss of each training step."""
    found, step = [], step_module.forward_backward

    def noted(*arguments):
        terms = step(*arguments)
        found.append(terms["loss"].item())
        return terms

    with monkeypatch.context() as patch:
        patch.setattr(step_module, "forward_backward", noted)
        assert main_mar.main([*SMALL, *TRAIN, "--output_dir", str(folder), *map(str, flags)]) == 0
    return found
