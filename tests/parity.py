"""Sampling as the specifications in shared/specs name it, by the one loop: for comparisons with published samplers."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from heads.orders import Confidence
from heads.policy import build_rules
from models.next_scale import NextScaleConditions, kept_tokens
from models.text import Text
from models.token_head import guide
from sampling.loop import eval_mode, generate
from tests.helpers_causal import WholePass
from training.optim import make_optimizer
from training.schedules import decay_at, lr_factor
from util.sizes import size_of

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
    cfg_schedule="linear", randomize="linear", keep_mask_logit=False, ids=None, mask=None, text=None, text_mask=None,
    grid=None, seeds=None, noise_fn=None, callback=None,
):  # fmt: skip
    """Ids (B, L) long of a MaskGIL for labels (B,), −1 = no class; cfg_schedule "linear" is the rule ramp.

    counts: tokens of each step, in place of the schedule's. ids, mask (B, L): known tokens to keep. A model of
    text has text (B, T, C) with text_mask (B, T), None: all real; labels −1 = no caption, None = all have theirs;
    without text no image has one, and labels say how many there are. grid: (h, w), None: that of img_size.
    noise_fn(step) -> (Gumbel draws (B, L, V), V + 1 with keep_mask_logit, draws of the score (B, L)).
    callback(step, ids, mask) after each step.
    """
    names = dict(order="confidence", group=f"step_{schedule}", cfg_schedule=CFGS_OF.get(cfg_schedule, cfg_schedule))
    numbers = dict(cfg=cfg, temperature=temperature, confidence_noise=r_temp, confidence_score=randomize)
    rules = build_rules("baseline", **names, **numbers)
    if counts is not None:
        rules = replace(rules, group=lambda state: torch.full_like(state.num_unknown, float(counts[state.step])))
    if noise_fn is not None:
        rules = replace(rules, order=Recorded(r_temp, randomize, lambda step: noise_fn(step)[1]))
    if model.config.reads_text:
        labels = torch.zeros(len(text)) if labels is None else labels
        labels = torch.full_like(labels, -1) if text is None else labels
        text = torch.zeros(len(labels), 1, model.config.caption_dim) if text is None else text
        labels = torch.where(labels < 0, -1, torch.arange(len(labels)))

    def noise(step, rows):
        return noise_fn(step)[0][rows[:, 0], rows[:, 1]]

    def after(step, rows, plan, tokens):
        unknown[rows[:, 0], rows[:, 1]] = False
        callback(step, tokens.clamp(max=model.config.vocab_size - 1), unknown.clone())

    options = dict(seeds=seeds, noise_fn=noise_fn and noise, callback=callback and after, tokens=ids, mask=mask)
    with changed(model, text, text_mask, grid, keep_mask_logit):
        shape = len(labels), model.config.seq_len
        unknown = torch.ones(shape, dtype=torch.bool) if mask is None else mask.clone()
        made = generate(model, labels, rules, num_iter, **options)
    return made.flatten(1).clamp(max=model.config.vocab_size - 1)


class GivenText:
    """`models.text.Prompts` of features (B, T, C) of any precision, with their mask (B, T), None: all real."""

    def __init__(self, features, mask):
        self.features = features
        self.mask = torch.ones(features.shape[:2], dtype=torch.bool) if mask is None else mask

    def __len__(self):
        return len(self.features)

    def __getitem__(self, labels):
        return Text(self.features[labels.clamp(min=0)], self.mask[labels.clamp(min=0)], labels >= 0)


@contextlib.contextmanager
def changed(model, text, text_mask, grid, keep_mask_logit):
    """A MaskGIL that has these captions, makes images of this grid, and draws the mask token or not."""
    config, prompts = model.config, model.prompts
    if config.reads_text:
        model.prompts = GivenText(text, text_mask)
    if grid is not None:
        model.config = replace(config, img_size=size_of(*(side * config.vae_stride for side in grid)))
    model.token_head.keep_mask_logit = keep_mask_logit
    try:
        yield
    finally:
        model.config, model.prompts, model.token_head.keep_mask_logit = config, prompts, False


def generate_var(
    var, tok, labels, cfg=1.5, top_k=0, top_p=0.0, seeds=None, greedy=False, smooth=False, noise_fn=None,
    callback=None, keep_ids=None, keep_mask=None,
):  # fmt: skip
    """(images (B, 3, H, W) in [−1, 1], [ids (B, p_s²)] * S) of labels (B,), by the published settings.

    cfg is guidance in the convention in which 0 is off. noise_fn(s) -> Gumbel draws (B, p_s², V); greedy: none.
    callback(s, guided logits before filtering (B, p_s², V), ids, f̂ after the scale), for all tokens, those kept too.
    keep_ids (B, L) or a list of one a scale, with keep_mask (h, w): the tokens to keep.
    """
    sides = var.config.patch_nums
    sizes = [side * side for side in sides]
    known = {}
    if keep_mask is not None:
        ids = torch.cat(keep_ids, dim=1) if isinstance(keep_ids, list) else keep_ids
        mask = ~kept_tokens(torch.as_tensor(keep_mask), sides).expand(len(ids), -1)
        known = dict(tokens=ids, mask=mask)
    watched = {}

    def conditions(labels, *, tokenizer, **options):
        watched["scales"] = WatchedScales(var, labels, tokenizer, cfg, callback)
        return watched["scales"]

    def noise(step, rows):
        if greedy:
            return torch.zeros(len(rows), var.config.vocab_size)
        return noise_fn(step)[rows[:, 0], rows[:, 1] - sum(sizes[:step])]

    def after(step, rows, plan, tokens):
        watched["tokens"] = tokens

    rules = build_rules("baseline", order="raster", group="scale", cfg=1 + cfg, cfg_schedule="ramp")
    labels = torch.where(labels == var.config.class_num, -1, labels)
    var.conditions = conditions
    try:
        with eval_mode(tok), eval_mode(var), torch.no_grad():
            options = dict(top_k=0 if greedy else top_k, top_p=0.0 if greedy else top_p, tokenizer=tok)
            given = dict(noise_fn=noise if greedy or noise_fn else None, callback=after, smooth=smooth)
            generate(var, labels, rules, len(sides), seeds=seeds, **known, **given, **options)
            tokens = watched["tokens"]
            f_hat = watched["scales"].ended(tokens)
            return tok.decode_features(f_hat).clamp(-1, 1), list(tokens.split(sizes, dim=1))
    finally:
        del var.conditions


class WatchedScales(NextScaleConditions):
    """The conditions with a callback for each scale, as `generate_var` has it."""

    def __init__(self, model, labels, tokenizer, cfg, callback):
        super().__init__(model, labels, tokenizer)
        self.cfg, self.callback, self.logits, self.free = cfg, callback, [], None

    def look(self, step, tokens, unknown, images):
        found = super().look(step, tokens, unknown, images)
        self.tell(step, tokens)
        w = 1 + self.cfg * step / (len(self.stops) - 1)
        logits = self.model.head.logits(self.z)
        if w != 1:
            self.free = super()._extend(step, images, labelled=False)
            whole = torch.zeros_like(self.z).index_copy(0, images, self.free)
            logits = guide(logits, self.model.head.logits(whole), w)
        self.logits.append(logits)
        return found

    def _extend(self, step, images, labelled):
        if labelled:
            return super()._extend(step, images, labelled)
        return self.free

    def tell(self, step, tokens):
        """What the scale before `step` came to."""
        if step and self.callback:
            scale = step - 1
            ids = tokens[:, self.starts[scale] : self.stops[scale]]
            self.callback(scale, self.logits[scale], ids, self.f_hat)

    def ended(self, tokens):
        """f̂ of all scales; those that nothing was drawn of are looked at first."""
        for step in range(len(self.logits), len(self.stops)):
            self.look(step, tokens, None, torch.arange(len(tokens)))
        f_hat = self.finished(tokens)
        self.tell(len(self.stops), tokens)
        return f_hat


def lr_and_wd(it, *, schedule, peak_lr, wd, wd_end, warmup_its, max_its, wp0, wpe) -> tuple[float, float]:
    """Learning rate and weight decay at iteration it of max_its."""
    return peak_lr * lr_factor(it, schedule, warmup_its, max_its, wp0, wpe), decay_at(it, max_its, wd, wd_end)


def no_decay_names(var) -> set[str]:
    """Names of the parameters that the optimizer of a run gives no weight decay."""
    optimizer = make_optimizer(var, var.token_head, 1e-4, 0.05, var.no_decay)
    exempt = {id(p) for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    return {name for name, parameter in var.named_parameters() if id(parameter) in exempt}
