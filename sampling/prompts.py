"""The prompts of sample.py: a text, a file of them, or features that scripts/cache_text.py has made."""

import json
import os
from pathlib import Path

from models.text import Prompts
from models.text_encoder import TextEncoder, load_text_encoder
from util.images.captions import TABLES, clean, read_prompts
from util.images.text_cache import CachedTexts, open_texts


def check_asked(config: dict, prompts: str | None, text_encoder: str | None, class_labels: str | None) -> None:
    """Raise ValueError for prompts of a model of classes, classes of a model of text, and one of text without prompts.

    config: the checkpoint's.
    """
    given = dict(prompts=prompts, text_encoder=text_encoder)
    if config.get("text") is None:
        for name in (name for name, value in given.items() if value is not None):
            raise ValueError(
                f"--{name} {given[name]} has no meaning for this model, which is of classes: use --class_labels"
            )
        return
    if class_labels is not None:
        raise ValueError(
            f"--class_labels {class_labels} has no meaning for this model, which is of text: use --prompts"
        )
    if prompts is None:
        what = "a text, a file with one a line or in a column caption, or a folder of scripts/cache_text.py"
        raise ValueError(f"--prompts is needed, {what}: this model is of text")


def open_prompts(source: str, text_encoder: str | None, config: dict, dry: bool = False) -> Prompts:
    """The prompts that --prompts names, for the model of a checkpoint with this config.

    text_encoder: the flag, None for the encoder that the checkpoint names. With dry nothing is encoded, and a file may
    be missing. Features of another encoder than the one that the model was trained with, or of another width, raise
    ValueError.
    """
    text = config["text"]
    if os.path.isdir(source):  # not Path's, which fails at a text longer than a file's name
        texts = open_texts(source, "prompts")
        _check_encoder(texts, f"--prompts {source}", text)
        return prompts_of(texts)
    captions = _captions(source, dry)
    if dry:
        return Prompts(captions, [], text["num_tokens"], text["width"])
    return encoded(captions, open_encoder(text_encoder, config))


def open_encoder(text_encoder: str | None, config: dict) -> TextEncoder:
    """The encoder of the model of a checkpoint with this config, from the folder of the flag, or that which it names.

    One that the model was not trained with raises ValueError.
    """
    text = config["text"]
    encoder = load_text_encoder(text_encoder or text["encoder"], text["num_tokens"])
    _check_encoder(encoder, f"--text_encoder {encoder.path}", text)
    return encoder


def encoded(captions: list[str], encoder: TextEncoder) -> Prompts:
    """Captions with the features that the encoder makes of them."""
    return Prompts(captions, encoder.encode(captions, quiet=True), encoder.num_tokens, encoder.width)


def prompts_of(texts: CachedTexts) -> Prompts:
    """All captions of a cache."""
    return Prompts(texts.captions, texts, texts.num_tokens, texts.width)


def _captions(source: str, dry: bool) -> list[str]:
    if os.path.isfile(source):
        return read_prompts("prompts", Path(source))
    if Path(source).suffix in (*TABLES, ".txt") and not dry:
        raise ValueError(f"--prompts: there is no file {source}")
    caption = clean(source)
    if not caption:
        raise ValueError(f"--prompts {json.dumps(source)} has no text")
    return [caption]


def _check_encoder(features, what: str, text: dict) -> None:
    """Raise ValueError unless features, a cache or an encoder, are what the model was trained with."""
    if features.width != text["width"]:
        raise ValueError(f"{what} makes features of {features.width} channels, the model takes {text['width']}")
    if features.num_tokens > text["num_tokens"]:
        raise ValueError(f"{what} has captions of {features.num_tokens} tokens, the model takes {text['num_tokens']}")
    if features.fingerprint != text["fingerprint"]:
        raise ValueError(
            f"{what} is not of the encoder that the model was trained with (fingerprint {features.fingerprint}, not "
            f"{text['fingerprint']})"
        )
