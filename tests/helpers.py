"""What several tests need: a tiny model, weights rebuilt from their names as the fixtures define them, files, ranks."""

import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import main_mar
from models.mar import MAR, MARConfig
from models.tokenizers import build_tokenizer
from sampling.run import Parts
from training.checkpoints import checkpoint_content
from training.config import flag_classes, resolve
from util import dist
from util.checkpoint import save_checkpoint

ROOT = Path(__file__).resolve().parents[1]
SMALLEST = "--preset digits --diffloss_w 16 --diffloss_d 1 --diffusion_batch_mul 1 --buffer_size 2 --num_iter 2"
TINY = dict(
    img_size=8, vae_stride=1, vae_embed_dim=1, encoder_embed_dim=16, encoder_depth=1, encoder_num_heads=2,
    decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2, class_num=3, buffer_size=2, diffloss_d=1,
    diffloss_w=16, num_sampling_steps=4, diffusion_batch_mul=1, attn_dropout=0.0, proj_dropout=0.0,
)  # fmt: skip


def named_weights(model: torch.nn.Module, scale: float = 0.05) -> torch.nn.Module:
    """The model with every tensor drawn from a seed that is its name's checksum (tests/fixtures: see shared README)."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            g = np.random.RandomState(zlib.crc32(name.encode()) & 0xFFFFFFFF)
            value = g.standard_normal(tuple(tensor.shape)) * scale
            if tensor.ndim == 1 and name.endswith("weight"):
                value = value + 1.0
            tensor.copy_(torch.from_numpy(value))
    return model


def tensors_by_name(shapes: dict) -> dict[str, torch.Tensor]:
    """Tensors of an autoencoder, {name: shape}, each drawn from a seed that is its name's checksum, by its fan-in."""
    tensors = {}
    for name, shape in shapes.items():
        g = np.random.RandomState(zlib.crc32(name.encode()) & 0xFFFFFFFF)
        fan_in = 400 if len(shape) == 1 else np.prod(shape[1:])
        value = g.standard_normal(shape) / np.sqrt(fan_in) + (len(shape) == 1 and name.endswith("weight"))
        tensors[name] = torch.from_numpy(value.astype(np.float32))
    return tensors


def randn(*shape, seed=0) -> torch.Tensor:
    """Standard normal numbers that depend on the seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tiny_mar(**overrides) -> MAR:
    """A MAR of a few thousand parameters, no two of them alike."""
    return named_weights(MAR(MARConfig(**{**TINY, **overrides})), scale=0.2).eval()


def untrained(folder, *flags):
    """The folder, with the checkpoint that main_mar.py would start from with these flags, for the digits."""
    given = vars(main_mar.make_parser("", "", *flag_classes()).parse_args([*map(str, (*SMALLEST.split(), *flags))]))
    config = resolve(given)
    classes = [str(digit) for digit in range(10)]
    mar = MAR(config.model.build(class_num=len(classes)))
    tokenizer, heads = build_tokenizer("pixel", channels=1), config.build_heads(mar.width)
    state = main_mar.make_state(config, mar, tokenizer, heads, flip=False)
    save_checkpoint(folder, checkpoint_content(state, 0, classes))
    return folder


def on_cpu(model, tokenizer, heads=None, dtype=torch.float32) -> Parts:
    """What samples on the CPU."""
    return Parts(model, tokenizer, torch.device("cpu"), dtype, heads)


def shows(line: str, text: str) -> bool:
    """Does text stand in the line, on its own: 9 is not in 19, nor in 0.9?"""
    return re.search(rf"(?<![\w.]){re.escape(text)}(?!\.?\w)", line) is not None


def images_of(*shape, dtype=np.uint8) -> np.ndarray:
    """Black images (B, H, W, C)."""
    return np.zeros(shape, dtype)


def blank_trace() -> dict[str, np.ndarray]:
    """The arrays of a trace of one image of 2×2 pixels, each a token."""
    arrays = dict(order_step=np.zeros((1, 4), int), tau=np.ones((1, 4)), cfg=np.ones((1, 4)), labels=np.zeros(1, int))
    return arrays | dict(group_size=np.full((1, 1), 4), frames=np.zeros((1, 1, 2, 2, 1), np.uint8))


def image_folder(root: Path, sizes: dict[str, int], seed=0) -> Path:
    """Two classes of so many 12 x 10 RGB images in each split."""
    draws = np.random.default_rng(seed)
    for split, count in sizes.items():
        for name in ("dark", "light"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = draws.integers(0, 128, (12, 10, 3)) + (127 if name == "light" else 0)
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i}.png")
    return root


class Malicious:
    """Unpickling it makes a folder."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


def each_rank(monkeypatch):
    """Yield rank 0 and then rank 1 of two processes, whose work one does after the other; they exchange nothing."""
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    for name in ("barrier", "all_sum"):
        monkeypatch.setattr(dist, name, lambda *tensors: tensors[0] if tensors else None)
    for rank in (0, 1):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        yield rank


def torchrun(program: Path | str, *words: object) -> None:
    """Run a program with these words as two processes on the CPU, by torchrun with gloo; both must end well."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, str(program), *map(str, words), "--device", "cpu"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr  # all of it: the launcher's own words follow those of the processes
