"""Sampling as the specifications in shared/specs name it, by the one loop: for comparisons with published samplers."""

import contextlib

import torch

from heads.policy import build_rules
from sampling.loop import generate
from tests.helpers_causal import WholePass


def generate_ids_causal(
    model, labels, *, num_tokens=None, cfg=1.0, cfg_schedule="constant", temperature=1.0, top_k=0, top_p=1.0,
    prefix=None, use_cache=True, seeds=None, noise_fn=None, callback=None,
):  # fmt: skip
    """Ids (B, num_tokens or L) long of a causal model of ids, row by row, for labels (B,), −1 = no class.

    prefix (B, ·): the first tokens, to keep. noise_fn(i) -> Gumbel draws (B, V) of token i. callback(i, ids) after each
    token, ids (B, L).
    """
    length = model.config.seq_len
    wanted = length if num_tokens is None else num_tokens
    num_entries = model.config.vocab_size

    def noise(step, rows):
        position = int(rows[0, 1])
        return noise_fn(position)[rows[:, 0]] if position < wanted else torch.zeros(len(rows), num_entries)

    def after(step, rows, plan, tokens):
        if int(rows[0, 1]) < wanted:
            callback(int(rows[0, 1]), tokens)

    known = {}
    if prefix is not None:
        tokens = torch.zeros(len(labels), length, dtype=torch.long)
        tokens[:, : prefix.shape[1]] = prefix
        mask = (torch.arange(length) >= prefix.shape[1]).repeat(len(labels), 1)
        known = dict(tokens=tokens, mask=mask)
    rules = build_rules(
        "baseline", order="raster", group="one", cfg=cfg, cfg_schedule=cfg_schedule, temperature=temperature
    )
    options = dict(seeds=seeds, noise_fn=noise_fn and noise, callback=callback and after, top_k=top_k, top_p=top_p)
    with contextlib.nullcontext() if use_cache else without_cache(model):
        ids = generate(model, labels, rules, length, **known, **options)
    return ids.flatten(1)[:, :wanted]


@contextlib.contextmanager
def without_cache(model):
    """The model with conditions that compute the whole sequence for each token."""
    model.conditions = lambda labels, **options: WholePass(model, labels, None)
    try:
        yield
    finally:
        del model.conditions
