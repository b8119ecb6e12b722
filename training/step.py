"""One optimizer step: tokens and draws of its micro-batches, the gradient of all of them, the update."""

import contextlib
import math

import torch
from torch import nn
from torch.profiler import record_function

from training.config import TrainConfig
from training.state import TrainState
from util import dist
from util.dist import autocast, tf32
from util.rng import seed_of

MAX_BAD_STEPS = 20  # non-finite gradients in a row before training stops


@record_function("training_step")
def training_step(state: TrainState, batch, labels, indices, lr: float, config: TrainConfig) -> dict[str, float]:
    """One step on images or moments (b, …) with labels and indices (b,): the loss terms, grad_norm and lr.

    A request to stop, that any process has noted, is in state.stopping afterwards, on all of them.
    """
    for group in state.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_share", 1.0)
        if group["weight_decay"] and config.wd_end is not None:
            group["weight_decay"] = config.decay(state.step, state.num_steps)
    terms = forward_backward(state, batch, labels, indices, config.accum_iter)
    state.scaler.unscale_(state.optimizer)
    grad_norm = nn.utils.clip_grad_norm_(state.wrapped.parameters(), config.grad_clip or float("inf"))
    # the step's one wait; the stop request travels with it, so that all processes stop at the same step
    stop = torch.full((), float(state.stop_signal > 0), device=state.device)
    shared = dist.all_sum(torch.stack([*terms.values(), stop])) / dist.world_size()
    *means, stop, grad_norm = torch.cat([shared, grad_norm.reshape(1)]).tolist()
    optimizer_step(state, grad_norm)
    state.stopping = state.stopping or stop > 0
    return dict(zip(terms, means), grad_norm=grad_norm, lr=lr)


def forward_backward(state: TrainState, batch, labels, indices, accum_iter: int = 1):
    """Accumulate the gradient of the whole step, micro-batch by micro-batch; returns the loss terms."""
    parts = zip(*(_split(x, accum_iter) for x in (batch, labels, indices)))
    parts = [state.objective.prepare(state, *part) for part in parts]
    # A mean over all target tokens of the global batch. DDP averages gradients over processes: hence the division.
    num_targets = torch.full((), float(sum(part.num_targets for part in parts)), device=state.device)
    # Where masks may be empty there may be none, and the loss is 0.
    num_targets = dist.all_sum(num_targets).clamp(min=1) / dist.world_size()
    torch.manual_seed(seed_of("dropout", state.seed, state.step, dist.rank()))
    totals = {}
    for i, part in enumerate(parts):
        sync = i == accum_iter - 1 or not isinstance(state.wrapped, nn.parallel.DistributedDataParallel)
        with torch.enable_grad() if sync else state.wrapped.no_sync(), rounding(state):
            with autocast(state.device, state.dtype):
                terms = state.wrapped(part, num_targets)
            state.scaler.scale(terms["loss"]).backward()
        for name, value in terms.items():
            totals[name] = totals.get(name, 0) + value.detach()
    return totals


def rounding(state: TrainState):
    """A context: TF32 for a model that learns in float32, unless --deterministic.

    Only of the model and its gradient, since the ids of a codebook must be those that a cache has. Not where heads
    learn from whole images, whose features are compared with those of real ones.
    """
    if state.dtype != torch.float32 or state.objective.keeps_model:
        return contextlib.nullcontext()
    return tf32(not torch.are_deterministic_algorithms_enabled())


def foresee(state: TrainState, batch, indices, accum_iter: int) -> None:
    """Begin, before a step, with what the one after it needs, of whose images batch (b, …) and indices (b,) are."""
    for part, numbers in zip(_split(batch, accum_iter), _split(indices, accum_iter)):
        state.objective.foresee(state, state.step + 1, part, numbers)


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
        state.ema.update(state.model, state.step, state.num_steps)
        if state.heads is not None:
            state.heads_ema.update(state.heads, state.step, state.num_steps)
        return
    state.bad_steps += 1
    if state.bad_in_a_row >= MAX_BAD_STEPS:
        raise FloatingPointError(
            f"the gradient was not finite in {MAX_BAD_STEPS} steps in a row (step {state.step}); "
            "lower --blr, or use --dtype fp32"
        )
