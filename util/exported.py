"""Weights as a `.safetensors` file: tensors and texts, which nothing needs to be trusted for and many programs read.

What `scripts/export_weights.py` writes: the model's tensors under their published names, those of policy heads below
`heads.`, and in the file's metadata {"weights": "model_ema" or "model", "config": JSON of the checkpoint's config}.
"""

import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from util.foreign import are_weights

SUFFIX = ".safetensors"
HEADS = "heads."


def is_safetensors(path: Path) -> bool:
    """By its first bytes: the length of a JSON header, and that header's brace."""
    with open(path, "rb") as file:
        head, size = file.read(9), os.fstat(file.fileno()).st_size
    return len(head) == 9 and head[8:] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= size - 8


def read_exported(path: Path) -> dict:
    """The tensors of a file by name; of one of ours {model or model_ema, heads or heads_ema, config}.

    A damaged file, or metadata of ours that cannot be read, raises ValueError.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"cannot read {path}: it is a damaged safetensors file ({str(error)[:120]})") from None
    key = metadata.get("weights")
    if key not in ("model", "model_ema"):
        return tensors
    content = {key: {name: value for name, value in tensors.items() if not name.startswith(HEADS)}}
    heads = {name.removeprefix(HEADS): value for name, value in tensors.items() if name.startswith(HEADS)}
    content[key.replace("model", "heads")] = heads
    if "config" in metadata:
        try:
            content["config"] = json.loads(metadata["config"])
        except ValueError as error:
            raise ValueError(f"{path} is damaged: the config in its metadata is no JSON ({error})") from None
    return content


def exported(content: dict, ema: bool, source) -> tuple[dict, dict]:
    """(tensors, metadata) of a checkpoint's averaged or raw weights; ValueError where it has none of them."""
    key, heads_key = ("model_ema", "heads_ema") if ema else ("model", "heads")
    weights, heads, config = content.get(key), content.get(heads_key) or {}, content.get("config")
    if not are_weights(weights):
        other = "--no_ema exports the raw ones" if ema else "leave out --no_ema"
        raise ValueError(f"{source} has no {'averaged' if ema else 'raw'} weights; {other}")
    clash = [name for name in weights if name.startswith(HEADS)]
    if clash:
        raise ValueError(f"{source}: the model's {clash[0]} would be taken for a policy head")
    if config and config.get("heads") and not heads:
        raise ValueError(f"{source} is damaged: its config names heads, and it has none")
    tensors = {**weights, **{HEADS + name: value for name, value in heads.items()}}
    metadata = {"format": "pt", "weights": key}
    if config is not None:
        metadata["config"] = json.dumps(config)
    return tensors, metadata


def write_exported(path: Path, tensors: dict, metadata: dict) -> None:
    """Write and fsync. A disk that refuses the write raises OSError."""
    plain, memory = {}, set()
    for name, value in tensors.items():
        value = value.detach().contiguous()
        place = value.untyped_storage().data_ptr()
        plain[name] = value.clone() if place in memory else value  # the format has no tensors that share memory
        memory.add(place)
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(plain, path, metadata)
        path.chmod(mode)  # save_file makes it readable for its owner alone
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from None
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def num_bytes(tensors: dict) -> int:
    """Of the values."""
    return sum(value.numel() * value.element_size() for value in tensors.values())
