"""One optimizer step: tokens and draws of its micro-batches, the gradient of all of them, the update."""

import math

import torch
from torch import nn

from training.objectives.draws import training_draws
from training.state import TrainState
from util import dist
from util.dist import autocast, send
from util.rng import seed_of

MAX_BAD_STEPS = 20  # non-finite gradients in a row before training stops


def forward_backward(state: TrainState, batch, labels, indices, args, flip):
    """Accumulate the gradient of the whole step, micro-batch by micro-batch; returns the loss terms."""
    parts = zip(*(_split(x, args.accum_iter) for x in (batch, labels, indices)))
    parts = [prepare(state, *part, args, flip) for part in parts]
    # A mean over all target tokens of the global batch. DDP averages gradients over processes: hence the division.
    num_targets = torch.full((), float(sum(draws.num_targets for *_, draws in parts)), device=state.device)
    num_targets = dist.all_sum(num_targets) / dist.world_size()
    torch.manual_seed(seed_of("dropout", args.seed, state.step, dist.rank()))
    totals = {}
    for i, (tokens, label, draws) in enumerate(parts):
        sync = i == args.accum_iter - 1 or not isinstance(state.module, nn.parallel.DistributedDataParallel)
        with torch.enable_grad() if sync else state.module.no_sync():
            with autocast(state.device, state.dtype):
                terms = state.module(tokens, label, draws.to(state.device), num_targets)
            state.scaler.scale(terms["loss"]).backward()
        for name, value in terms.items():
            totals[name] = totals.get(name, 0) + value.detach()
    return totals


@torch.no_grad()
def prepare(state, batch, labels, indices, args, flip):
    """(tokens (b, L, C), labels with −1 where dropped, both on the device, and the draws) of one micro-batch."""
    config, heads_or_masks = state.mar.config, state.heads is not None or state.visits is not None
    samples = indices.tolist()
    draws = training_draws(
        args.seed,
        state.step,
        samples,
        seq_len=config.seq_len,
        token_dim=config.token_dim,
        diffusion_batch_mul=config.diffusion_batch_mul,
        mask_ratio_min=config.mask_ratio_min,
        label_drop_prob=config.label_drop_prob,
        mask_ratio_per_image=args.mask_ratio_per_image,
        num_iter=args.num_iter_range if heads_or_masks else None,
        cfg_max=args.cfg_train_max,
        every_token=state.visits is not None,
    )
    draws.heads_rest = state.step < args.heads_from * state.steps_per_epoch
    flips = draws.flip.to(state.device) if flip else None
    seeds = [seed_of("posterior", args.seed, state.step, sample) for sample in samples]
    tokens = state.tokens(batch.to(state.device, non_blocking=True), flips, seeds)
    labels = torch.where(draws.drop, -1, labels)
    if state.visits is not None:
        state.module.eval()  # no dropout in the scores
        with autocast(state.device, state.dtype):
            draws = state.visits(draws, lambda mask, n: _score(state.mar, tokens, mask, labels, n), state.device)
        state.module.train()
    return tokens, send(labels, state.device), draws


def _score(mar, tokens, mask, labels, num_visible):
    """`encode_decode` for labels on the host; where nothing is visible yet, once for each class, not for each image."""
    if any(num_visible):
        return mar.encode_decode(tokens, mask, send(labels, mask.device), num_visible)
    classes, which = (send(x, mask.device) for x in labels.unique(return_inverse=True))
    return mar.encode_decode(tokens[: len(classes)], mask[: len(classes)], classes, num_visible[: len(classes)])[which]


def _split(items, parts):
    size = len(items) // parts
    return [items[i * size : (i + 1) * size] for i in range(parts)]


def optimizer_step(state: TrainState, grad_norm: float) -> None:
    """Step and average. A non-finite gradient (the same on all processes, after DDP's sum) skips both."""
    finite = math.isfinite(grad_norm)
    if finite:
        state.scaler.step(state.optimizer)
    state.scaler.update()  # halves the scale where unscale_ met an infinity
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    state.bad_in_a_row = 0 if finite else state.bad_in_a_row + 1
    if finite:
        state.ema.update(state.mar, state.step)
        if state.heads is not None:
            state.heads_ema.update(state.heads, state.step)
        return
    state.bad_steps += 1
    if state.bad_in_a_row >= MAX_BAD_STEPS:
        raise FloatingPointError(
            f"the gradient was not finite in {MAX_BAD_STEPS} steps in a row (step {state.step}); "
            "lower --blr, or use --dtype fp32"
        )
