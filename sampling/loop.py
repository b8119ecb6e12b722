"""The autoregressive loop, the same for every family: conditions, rules, token head, tokens (MAR, section 3.4).

Legend: B images, B' of them unfinished, L tokens an image, C channels a token, D width, N tokens drawn in a step, G of
them guided, K = num_iter autoregressive steps. `mask` (B, L) bool is True where a token is unknown.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from heads.schedules import default_num_iter, needed_steps
from sampling.canvas import Canvas
from util.dist import send


def decode(
    model,
    labels: torch.Tensor,
    rules,
    num_iter: int | None = None,
    num_steps: int | str = 100,
    seeds=None,
    orders=None,
    noise_fn=None,
    callback=None,
    *,
    tokens=None,
    mask=None,
    tokenizer=None,
    evals=None,
    num_taken: int | None = None,
    refresh_every: int = 1,
    recompute: bool = False,
    local: bool = False,
    smooth: bool = False,
    **token_head_options,
) -> torch.Tensor:
    """Latents (B, c, h, w), or ids, for labels (B,), −1 = unconditional; differentiable where the parts are.

    The ids of an image of which one could not be drawn, since its logits are not finite, are all −1.

    1. z from the visible tokens; 2. the rules say which tokens come next, at which τ, under which w; 3. the token head
    draws them; 4. write them, unmask them; until nothing is unknown, K times at most.

    model: a `models.families.Backbone`; rules: a `heads.rules.Rules`. num_iter: None is the model's default, see
    `heads.schedules.default_num_iter`. num_steps: steps of the token head for a token, T, or "A:B" for A at the first
    autoregressive step to B at the last; token_head_options: its other settings (`TokenHead.sampler`). seeds: B ints;
    all draws of image i come from seeds[i] alone. orders (B, L) replaces the ranking, its last entries are revealed
    first, as published. noise_fn(step, rows) replaces the sampler's noise, rows (N, 2) long on the CPU are (index in
    the batch, position), row-major. callback(step, rows, plan, tokens) after each step that draws, plan (B', L) holding
    only the images unfinished before it. tokens (B, L, C) with mask (B, L): known tokens to keep. tokenizer: for the
    families whose conditions are made with it. smooth: of a model of scales, mixtures of codes take the places of the
    ids drawn, and features f̂ (B, C, h, w) are returned. evals, a Counter, grows by the network evaluations: "mar" by
    the images that each pass of the backbone computes, "mlp" by the rows that the token head does. Unconditional ones
    are made only where guidance acts: w ≠ 1 and, in the token head, a profile that is not the float 0. num_taken: only
    so many of the steps are taken, and what they leave unknown is that of `TokenHead.empty`. refresh_every >
    1: only so many steps apart are all tokens computed, between them those that changed and those that are drawn, and
    learned rules see the z of the last time. The model is in eval mode inside and as it was afterwards. Labels out of
    range, fewer than 1 step, or tokens without mask raise ValueError. Labels may be whole numbers of any type; a model
    in another dtype than float32 computes in its own, its token head's process in float32.

    Of gradients: recompute keeps no activations of the draws, nor of the passes where the family can, and computes them
    again, step by step, in the backward pass, for which the model must be in eval mode. local: later steps see the
    tokens without gradient, and log p of the ids drawn is added to no plan's log_prob.
    """
    labels = _checked_labels(getattr(model, "num_labels", model.config.class_num), labels)
    num_iter = _checked_steps(model, num_iter, refresh_every)
    rules.check(model)
    sampler = model.token_head.sampler(num_steps=num_steps, **token_head_options)
    canvas = Canvas(model.token_head.empty(len(labels), model.config.seq_len), tokens, mask, seeds, orders)
    rules = canvas.ordered(rules, orders is not None)
    options = dict(orders=canvas.orders, tokenizer=tokenizer, refresh_every=refresh_every, recompute=recompute)
    with eval_mode(model):
        conditions = model.conditions(send(labels, canvas.tokens.device), **options)
        for step, images in canvas.steps(num_iter if num_taken is None else num_taken):
            seen = canvas.tokens.detach() if local else canvas.tokens
            z, positions = conditions.look(step, seen, canvas.unknown, images)
            on_host = canvas.host_state(step, num_iter, images, positions, sampler.num_steps)
            state = canvas.state(on_host, z, positions)
            plan = rules(state)
            if noise_fn is None:
                canvas.make_noise(sampler, rules.num_selected(on_host), images, plan.num_steps)
            chosen = canvas.select(plan, images)
            rows, guided = chosen.rows, chosen.guided
            canvas.renew(images, plan.gumbel)
            if not len(rows):  # the tokens that this step could choose from are all given
                continue
            pair = conditions.at(step, seen, canvas.unknown, rows, guided)  # (N, D), (G, D)
            noise = canvas.noise(sampler, noise_fn, step, rows, plan.num_steps)
            mixed = (chosen.mixture(sampler, *pair, noise, state),) if smooth else ()
            drawn, log_probs = chosen.draw(sampler, *pair, noise, recompute)
            if evals is not None:
                evals.update(mlp=sampler.evals(plan.num_steps, len(rows), len(guided), plan.profile))
            if log_probs is not None:
                plan, rows, drawn = canvas.judged(rules, state, plan, images, rows, drawn, log_probs, local)
            drawn = canvas.write(rows, drawn)
            conditions.write(step, rows, drawn.detach() if local else drawn, *mixed)
            if callback:
                callback(step, rows, plan, canvas.tokens)
    canvas.check_finished(num_iter, num_taken)
    if evals is not None:
        evals.update(mar=conditions.passes)
    return conditions.finished(canvas.tokens) if smooth else model.unpatchify(canvas.result())


generate = torch.no_grad()(decode)


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The model in eval mode inside the block; afterwards each module as it was, since some may be frozen in it."""
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in was_training.items():
            module.training = mode


def _checked_labels(num_labels: int, labels) -> torch.Tensor:
    """The labels (B,) long; ValueError for what is not one of so many or −1 an image, as whole numbers of any width."""
    try:
        labels = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"labels must be one whole number for each image, got {str(labels)[:60]}") from None
    if labels.dim() != 1 or not len(labels):
        raise ValueError(f"labels must be one number for each image, at least one, got shape {tuple(labels.shape)}")
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"labels must be whole numbers, got {str(labels.dtype).removeprefix('torch.')}")
    if labels.dtype == torch.uint64:  # whose upper half would wrap around
        labels = torch.tensor([min(label, num_labels) for label in labels.tolist()])
    labels = labels.long()
    low, high = int(labels.min()), int(labels.max())
    if low < -1 or high >= num_labels:
        raise ValueError(f"labels must be between -1 and {num_labels - 1}, got {low if low < -1 else high}")
    return labels


def _checked_steps(model, num_iter: int | None, refresh_every: int) -> int:
    """K, for None the model's default; ValueError where it or refresh_every is below 1."""
    if num_iter is None:
        num_iter = default_num_iter(model.fixed_rules, needed_steps(model))
    for name, value in (("num_iter", num_iter), ("refresh_every", refresh_every)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    return num_iter
