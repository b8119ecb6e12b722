"""A T5 encoder of the transformers library, which makes features of captions."""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from util.checkpoint import weights_hash

WANTED = "a folder with config.json, model.safetensors and the tokenizer of a T5 encoder, such as flan-T5-XL's"


class TextEncoder:
    """An encoder with its tokenizer on a device; captions have at most num_tokens tokens, the rest is cut off.

    width: channels of the features. fingerprint: 16 hex digits that change with weights and vocabulary.
    """

    def __init__(self, path: str, tokenizer, network, num_tokens: int):
        self.path, self.tokenizer, self.network, self.num_tokens = path, tokenizer, network, num_tokens
        self.width = network.config.d_model
        parts = [weights_hash(network.state_dict()), sorted(tokenizer.get_vocab().items())]
        self.fingerprint = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()

    @torch.no_grad()
    def encode(self, captions: list[str], batch_size: int = 64, quiet: bool = False) -> list[np.ndarray]:
        """Features (n, C) float16 of each caption, of its tokens alone; numbers beyond float16 raise ValueError."""
        device, rows = next(self.network.parameters()).device, []
        for start in tqdm(range(0, len(captions), batch_size), unit="batch", desc="encoding", disable=quiet):
            words = self.tokenizer(
                captions[start : start + batch_size],
                padding=True,
                truncation=True,
                max_length=self.num_tokens,
                return_tensors="pt",
            )
            ids, mask = words["input_ids"].to(device), words["attention_mask"].to(device)
            features = self.network(input_ids=ids, attention_mask=mask).last_hidden_state.half().cpu()
            if not features.isfinite().all():
                raise ValueError(f"--text_encoder {self.path} gives numbers that are not finite, or beyond float16")
            rows += [row[kept].numpy() for row, kept in zip(features, words["attention_mask"].bool())]
        return rows


def load_text_encoder(path: str, num_tokens: int, device="cpu") -> TextEncoder:
    """The encoder in a folder; nothing is downloaded, and what is no T5 encoder raises ValueError."""
    if not Path(path).expanduser().is_dir():
        raise ValueError(f"--text_encoder {path} is no folder; expected {WANTED}")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    place = dict(pretrained_model_name_or_path=str(Path(path).expanduser()), local_files_only=True)
    try:
        kind = transformers.AutoConfig.from_pretrained(**place).model_type
        if kind != "t5":
            raise ValueError(f"it holds a model of the type {kind}")
        tokenizer = transformers.AutoTokenizer.from_pretrained(**place)
        network, loaded = transformers.T5EncoderModel.from_pretrained(
            **place, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # transformers raises many types, with messages of many lines
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise ValueError(f"--text_encoder {path} cannot be read ({reason}); expected {WANTED}") from None
    if missing := sorted(loaded["missing_keys"]):
        raise ValueError(f"--text_encoder {path} lacks {len(missing)} weights, the first is {missing[0]}")
    if tokenizer.pad_token_id is None:
        raise ValueError(f"--text_encoder {path} has a tokenizer without a token for padding; expected {WANTED}")
    largest, num_rows = max(tokenizer.get_vocab().values()), network.get_input_embeddings().num_embeddings
    if largest >= num_rows:
        raise ValueError(
            f"--text_encoder {path} has a tokenizer with ids up to {largest} and a network for those below {num_rows}: "
            "they are not of one encoder"
        )
    return TextEncoder(path, tokenizer, network.to(device).eval(), num_tokens)
