"""Checkpoints of other makers: what a file is that is none, and the one form that all the others are brought into.

What programs save is much alike: the weights under one of a few keys or alone, averaged or not, with the prefixes of
the wrappers they were trained in. Nothing here knows a family of models: names stay those of the file.
"""

import re
from pathlib import Path

import torch

MODEL, AVERAGED = ("model", "state_dict"), ("model_ema", "ema", "state_dict_ema")  # keys of the weights; first: ours
# what wrappers put between the dots of a name, wherever the wrapped module stands in the model
_INNER = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_OUTER = "module"  # of DataParallel and AveragedModel; inside a name a module of a model may be called so
_COUNTER = "n_averaged"  # what AveragedModel stores beside its module

_STARTS = [  # (first bytes of a file, what it is)
    (b"version https://git-lfs", "a pointer of git-lfs, not the file itself: fetch that with `git lfs pull`"),
    (b"\x93NUMPY", "an array of numpy"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (b"%PDF", "a PDF"),
    (b"GGUF", "a GGUF file"),
    (b"\x1f\x8b", "compressed with gzip: unpack it first"),
    (b"\xfd7zXZ", "compressed with xz: unpack it first"),
    (b"BZh", "compressed with bzip2: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd: unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it first"),
]
_MARKUP = re.compile(rb"\s*(<!doctype html|<html|<head|<!--)", re.IGNORECASE)
VALID = "valid: what torch.save wrote of tensors, numbers, texts, lists and dicts, or safetensors"


def what_is(path: Path) -> str | None:
    """What a file is, by its first bytes, where that is no file of weights; None where it may be one.

    A file that cannot be opened raises OSError.
    """
    with open(path, "rb") as file:
        head = file.read(512)
    if not head:
        return "empty (0 bytes): copy or download it again"
    if _MARKUP.match(head.removeprefix(b"\xef\xbb\xbf")):
        return "a web page, not the file that was asked for: download it again"
    for start, name in _STARTS:
        if head.startswith(start):
            return name
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it first"
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # else the last character is cut in two
            return None
        text = head[: error.start].decode()
    plain = all(character.isprintable() or character.isspace() for character in text)
    return f"a text that begins with {' '.join(text.split())[:40]!r}" if plain else None


def why(error: Exception) -> str:
    """What an error of torch.load says about the file, and nothing of its advice to trust it."""
    text = " ".join(str(error).split())
    foreign = re.search(r"GLOBAL ([\w.]+)|unrecognized function (?:<[\w-]+ function )?([\w.]+)", text)
    if foreign:
        name = foreign[1] or foreign[2]
        what = next((words for start, words in _OBJECTS.items() if name.startswith(start)), "objects")
        return f"it holds {what} ({name[:80]}), which are not read from files; {VALID}"
    if "TorchScript" in text:
        return f"it is a TorchScript program, which is not run; {VALID}"
    if "PytorchStreamReader" in text or "in archive" in text:
        return f"it is a zip archive of something else; {VALID}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"it is no file of weights, or not the whole of one; {VALID}"


def reason_of(error: Exception) -> str:
    """What a library said against a file, in at most 100 characters, and nothing of its advice to trust the file."""
    text = " ".join(str(error).split())
    if "pickle" in text or "Weights only" in text:
        return "it is a file of another kind, or holds Python objects"
    return text[:100]


_OBJECTS = {  # how the name of a class begins -> what it is
    "numpy": "arrays or numbers of numpy",
    "pathlib": "paths",
    "torch.nn.modules": "a whole module instead of its state_dict()",
    "__main__": "objects of the program that wrote it",
}


def type_of(value) -> str:
    """What a value is, in words; of a dict its first keys too."""
    if value is None:
        return "None"
    if isinstance(value, dict):
        keys = [repr(key)[:30] for key in list(value)[:4]] + ["…"] * (len(value) > 4)
        return f"a dict of {', '.join(keys)}" if value else "an empty dict"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def are_weights(value) -> bool:
    """Is it a dict from names to tensors with values on the CPU, as `state_dict()` makes one?"""
    return isinstance(value, dict) and bool(value) and all(map(_is_weight, value, value.values()))


def _is_weight(name, value) -> bool:
    if not isinstance(name, str) or not torch.is_tensor(value):
        return False
    return value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized


def as_checkpoint(content, source) -> dict:
    """What a file held, in this project's keys: `model` or `model_ema` or both, with names free of wrappers' prefixes.

    A state dict alone stands for both: nobody can say which it is. Other keys stay. No tensors, or a config or heads
    that are none, raise ValueError, which says what there is instead; source names the file.
    """
    if are_weights(content):
        weights = unwrapped(content, source)
        return {"model": weights, "model_ema": weights}
    if not isinstance(content, dict):
        raise ValueError(f"{source}, which is {type_of(content)}, {_NO_CHECKPOINT}")
    result = dict(content)
    trainer = result.get("trainer")  # what VAR's training program saves, with a config of its own kind in it
    if isinstance(trainer, dict) and are_weights(trainer.get("var_wo_ddp")):
        return as_checkpoint(trainer["var_wo_ddp"], source)
    for ours, *others in (MODEL, AVERAGED, ("heads",), ("heads_ema",)):
        key = next((key for key in (ours, *others) if are_weights(result.get(key))), None)
        if key is not None:
            result[ours] = unwrapped(result[ours] if key == ours else result.pop(key), source)
        elif result.get(ours) is not None and result[ours] != {}:
            problem = _NO_CHECKPOINT if ours == "model" else "is damaged: these are no tensors"
            raise ValueError(f"{source}, whose {ours!r} is {type_of(result[ours])}, {problem}")
    if not any(result.get(key) for key in (MODEL[0], AVERAGED[0])):
        raise ValueError(f"{source}, which is {type_of(content)}, {_NO_CHECKPOINT}")
    if not isinstance(result.get("config", {}), dict):
        valid = "a dict of sizes, as this project stores one, or no 'config', as in published files"
        raise ValueError(f"{source} has {type_of(result['config'])} as its 'config'; valid: {valid}")
    return result


_NO_CHECKPOINT = "is not a checkpoint of this project: it has no 'model' with tensors"


def unwrapped(weights: dict, source) -> dict:
    """Weights without what DataParallel, AveragedModel, FSDP and torch.compile put into their names."""
    result, previous = weights, None
    while result is not previous:
        previous, names = result, {}
        own = [name for name in result if name != _COUNTER]
        outer = bool(own) and all(name.startswith(f"{_OUTER}.") for name in own)
        for name in own if outer else result:
            parts = [part for part in name.split(".") if part not in _INNER]
            names[name] = ".".join(parts[1:] if outer and parts[0] == _OUTER else parts)
        if len(set(names.values())) < len(names):
            raise ValueError(f"{source} has the weights of several models: names are the same without their prefixes")
        if any(name != new for name, new in names.items()):
            result = {new: result[name] for name, new in names.items()}
    return result


def some_weights(content: dict) -> dict:
    """The raw weights of a checkpoint's content, or the averaged ones where there are no others."""
    return content.get("model") or content["model_ema"]
