"""Sampling as the specifications in shared/specs name it, by the one loop: for comparisons with published samplers."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from heads.orders import Confidence
from heads.policy import build_rules
from sampling.loop import generate
from tests.helpers_causal import WholePass

CFGS_OF = {"linear": "ramp"}  # the specification's names: ours


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


@dataclass(frozen=True)
class Recorded(Confidence):
    """The order confidence with the draws that of_step(step) (B, L) gives in place of the image's own."""

    of_step: Callable

    def scores(self, state, log_prob, gumbel):
        return super().scores(state, log_prob, self.of_step(state.step)[state.images])


def generate_ids(
    model, labels, *, num_iter=8, schedule="arccos", counts=None, temperature=1.0, r_temp=4.5, cfg=4.0,
    cfg_schedule="linear", randomize="linear", keep_mask_logit=False, ids=None, mask=None, seeds=None, noise_fn=None,
    callback=None,
):  # fmt: skip
    """Ids (B, L) long of a MaskGIL for labels (B,), −1 = no class; cfg_schedule "linear" is the rule ramp.

    counts: tokens of each step, in place of the schedule's. ids, mask (B, L): known tokens to keep. noise_fn(step) ->
    (Gumbel draws (B, L, V), V + 1 with keep_mask_logit, draws of the score (B, L)). callback(step, ids, mask) after
    each step.
    """
    names = dict(order="confidence", group=f"step_{schedule}", cfg_schedule=CFGS_OF.get(cfg_schedule, cfg_schedule))
    numbers = dict(cfg=cfg, temperature=temperature, confidence_noise=r_temp, confidence_score=randomize)
    rules = build_rules("baseline", **names, **numbers)
    if counts is not None:
        rules = replace(rules, group=lambda state: torch.full_like(state.num_unknown, float(counts[state.step])))
    if noise_fn is not None:
        rules = replace(rules, order=Recorded(r_temp, randomize, lambda step: noise_fn(step)[1]))
    unknown = torch.ones(len(labels), model.config.seq_len, dtype=torch.bool) if mask is None else mask.clone()

    def noise(step, rows):
        return noise_fn(step)[0][rows[:, 0], rows[:, 1]]

    def after(step, rows, plan, tokens):
        unknown[rows[:, 0], rows[:, 1]] = False
        callback(step, tokens.clamp(max=model.config.vocab_size - 1), unknown.clone())

    options = dict(seeds=seeds, noise_fn=noise_fn and noise, callback=callback and after, tokens=ids, mask=mask)
    head = model.token_head
    head.keep_mask_logit = keep_mask_logit
    try:
        made = generate(model, labels, rules, num_iter, **options)
    finally:
        head.keep_mask_logit = False
    return made.flatten(1).clamp(max=model.config.vocab_size - 1)
