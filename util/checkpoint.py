"""Checkpoints: one file, `checkpoint-last.pth`, in the published layout with a few keys of our own.

    model, model_ema, optimizer, epoch, scaler, args     as in MAR (args a plain dict; published files have a Namespace)
    heads, heads_ema, config, rng, step                  ours; a published file has none of them

Files are read with weights_only=True, so nothing in them is executed, and written to a temporary name first.
"""

import argparse
import hashlib
import os
from pathlib import Path

import torch

FILE_NAME = "checkpoint-last.pth"


def checkpoint_path(place: str | Path) -> Path:
    """The checkpoint file for a folder or a file."""
    place = Path(place)
    return place if place.is_file() or (place.suffix == ".pth" and not place.is_dir()) else place / FILE_NAME


def save_checkpoint(place: str | Path, content: dict) -> Path:
    """Write atomically: temporary file, fsync, rename. An interrupted save leaves the old file whole."""
    path = checkpoint_path(place)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    return path


class atomic_file:
    """`with atomic_file(path) as temporary:` renames the temporary file to path at the end, or removes it on error."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        # 60 characters: with what is added they stay below the 255 bytes that a name may have
        self.temporary = self.path.with_name(f".{self.path.name[:60]}.{os.getpid()}.tmp")

    def __enter__(self) -> Path:
        return self.temporary

    def __exit__(self, kind, value, traceback):
        if kind is None:
            os.replace(self.temporary, self.path)
        else:
            self.temporary.unlink(missing_ok=True)


def load_checkpoint(place: str | Path) -> dict:
    """The content, on the CPU. A missing, damaged or unsafe file, or one without `model`, raises ValueError."""
    path = checkpoint_path(place)
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}")
    content = read_file(path)
    weights = content.get("model") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or "class_emb.weight" not in weights:
        raise ValueError(f"{path} is not a MAR checkpoint: it has no 'model' with a class embedding")
    if content.get("config", {"mar": None}).keys().isdisjoint({"mar"}):
        raise ValueError(f"{path} is damaged: its 'config' has no 'mar'")
    return content


def read_file(path: str | Path):
    """What torch.save wrote, on the CPU; a damaged file, or one with more than data in it, raises ValueError."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, pickle and zipfile each raise their own kinds, for garbage even IndexError
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"cannot read {path}: {reason[:200]}") from None


def load_weights(model: torch.nn.Module, weights: dict, source) -> None:
    """model.load_state_dict(strict=True), whose mismatch becomes one line that names the first difference."""
    own = model.state_dict()
    missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = [k for k in own.keys() & weights.keys() if own[k].shape != weights[k].shape]
    if missing or extra or shapes:
        if shapes:
            k = min(shapes)
            first = f"{k} is {tuple(weights[k].shape)} there and {tuple(own[k].shape)} here"
        else:
            first = f"{len(missing)} names missing, {len(extra)} unknown, the first is {(missing + extra)[0]}"
        raise ValueError(f"the weights in {source} do not fit the model ({first}); check --model and its sizes")
    model.load_state_dict(weights, strict=True)


def weights_hash(weights: dict) -> str:
    """16 hex digits over the names, shapes and values of a state dict."""
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(weights):
        value = weights[name].detach().cpu().float().contiguous()
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()
