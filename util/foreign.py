"""Files that others have made: what they are, in words, and their weights in this project's layout."""

import json
import re
from pathlib import Path

import torch

# beginnings of files that are saved as checkpoints by mistake -> what they are
KINDS = (
    (rb"$", "is empty"),
    (rb"version https://git-lfs", "is a git-lfs pointer to the file, not the file: `git lfs pull` fetches it"),
    (rb"\s*<(!DOCTYPE|html|\?xml)", "is a web page: the download needs another address, or a login"),
    (rb"\s*[\[{]", "is a JSON text"),
    (rb"[\t\n\r -~]{16}", "is a text"),
)
WRAPPERS = r"(?:(?<=^)|(?<=\.))(?:module|_orig_mod)\."  # DistributedDataParallel's and torch.compile's, in any nesting
WEIGHTS = ("model", "model_ema", "heads", "heads_ema")
HEADS = "heads."  # prefix of the policy heads in an exported file


def what_is(path: Path) -> str | None:
    """What a file is that is no checkpoint, such as "is a web page"; None where its beginning does not say."""
    with open(path, "rb") as file:
        start = file.read(512)
    return next((words for pattern, words in KINDS if re.match(pattern, start, flags=re.IGNORECASE)), None)


def explain(error: Exception) -> str:
    """Why torch.load has refused or failed, without its advice to load unsafely."""
    text = str(error).strip() or type(error).__name__
    if named := re.search(r"GLOBAL ([\w.]+)", text):
        return (
            f"it holds Python objects ({named[1]}), which are not loaded: save it with tensors, numbers and texts only"
        )
    return text.splitlines()[0][:200]


def is_safetensors(path: Path) -> bool:
    """Does it begin as such a file does: the length of its header, and the header, a JSON text?"""
    with open(path, "rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size


def read_safetensors(path: Path) -> dict:
    """The content that scripts/export_weights.py has written, or {model} of another's file of tensors."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = file.metadata() or {}
    heads = {name.removeprefix(HEADS): tensors.pop(name) for name in list(tensors) if name.startswith(HEADS)}
    content = {"model": tensors, "model_ema": tensors, "heads": heads, "heads_ema": heads}
    return content | ({"config": json.loads(metadata["config"])} if "config" in metadata else {})


def in_our_layout(content):
    """A checkpoint's content with `model` and, where there are averages, `model_ema`, all of them in float32.

    Takes a bare state dict, one under `state_dict`, averages alone (`model_ema` or `ema`), and prefixes of wrappers.
    A `config` that is no dict says nothing to this project, and is left out. Anything else is returned as it is.
    """
    if not isinstance(content, dict):
        return content
    if is_weights(content):
        content = {"model": content}
    content = dict(content)
    for name, others in (("model_ema", ("ema",)), ("model", ("state_dict", "model_ema"))):
        for other in others:
            if name not in content and is_weights(content.get(other)):
                content[name] = content[other]
    if "config" in content and not isinstance(content["config"], dict):
        del content["config"]
    for name in WEIGHTS:
        if is_weights(content.get(name)):
            content[name] = {re.sub(WRAPPERS, "", key): _single(value) for key, value in content[name].items()}
    return content


def is_weights(value) -> bool:
    """Is it a state dict?"""
    return isinstance(value, dict) and bool(value) and all(torch.is_tensor(part) for part in value.values())


def _single(value: torch.Tensor) -> torch.Tensor:
    return value.float() if value.is_floating_point() else value
