"""The engine: the epoch loop, and what samples and measures a model."""

import time

import torch
from torch import nn

from sampling.loop import generate
from sampling.run import sample_images
from training.optim import lr_at
from training.state import TrainState
from training.step import forward_backward, optimizer_step
from util import dist
from util.evaluation.protocol import score
from util.images.pictures import PNGFolder

__all__ = ["evaluate", "generate", "sample_images", "train_one_epoch"]


def evaluate(mar, tokenizer, sampling, evaluation, reference, labels, seed, folder, *, device, dtype, **more) -> dict:
    """`sample_images`, then (on the first process) samples.npz and the metrics: its figures and {metrics}.

    reference is what the images are compared with (a data set, FIDStats, or None with --metrics none); more: options of
    `sample_images`.
    """
    options = dict(batch_size=evaluation.eval_bsz, device=device, dtype=dtype, **more)
    found = sample_images(mar, tokenizer, sampling, labels, seed, folder, **options)
    found["metrics"] = {}
    if dist.is_main():
        images = PNGFolder(folder, len(labels))
        images.save_npz(labels)
        found["metrics"] = score(images, labels, reference, evaluation, device)
    dist.barrier()
    return found


def train_one_epoch(state: TrainState, loader, epoch, args, flip: bool, progress, log) -> bool:
    """Run the epoch's batches from state.batch on; False if it ended early, on a signal, with its step finished.

    args: a `training.config.TrainConfig`. loader yields (batch, labels (b,), indices (b,)) with
    b = batch_size·accum_iter, batch being images uint8 (b, c, H, W) or cached moments (b, 2, c', h, w), see
    `util.images.latents`. log: a `training.run_log.RunLog` on the first process, None on the others. Raises
    FloatingPointError after 20 steps in a row without a finite gradient.
    """
    began = time.perf_counter()
    for batch, labels, indices in loader:
        lr = lr_at(
            epoch + state.batch / len(loader),
            lr=args.lr,
            min_lr=args.min_lr,
            schedule=args.lr_schedule,
            warmup_epochs=args.warmup_epochs,
            epochs=args.epochs,
        )
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        terms = forward_backward(state, batch, labels, indices, args, flip)
        state.scaler.unscale_(state.optimizer)
        grad_norm = nn.utils.clip_grad_norm_(state.module.parameters(), args.grad_clip or float("inf"))
        # the step's one wait; the stop request travels with it, so that all processes stop at the same step
        stop = torch.full((), float(state.stop_signal > 0), device=state.device)
        shared = dist.all_sum(torch.stack([*terms.values(), stop])) / dist.world_size()
        *means, stop, grad_norm = torch.cat([shared, grad_norm.reshape(1)]).tolist()
        optimizer_step(state, grad_norm)
        state.batch += 1

        record = dict(zip(terms, means), grad_norm=grad_norm, lr=lr)
        speed = len(batch) * dist.world_size() / (time.perf_counter() - began)
        began = time.perf_counter()
        if log is not None:
            log.step(state.step, record, images_per_second=speed)
        progress.set_postfix_str(f"loss {record['loss']:.3f}", refresh=False)
        progress.update()
        if stop:
            state.stopping = True
            break
    whole = state.batch == len(loader)
    state.batch = 0 if whole else state.batch
    return whole
