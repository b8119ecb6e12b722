"""The autoregressive loop and the epoch loop.

Legend: B images, L tokens an image, C channels a token, D width, N selected token rows, T diffusion steps,
K = num_iter autoregressive steps. `mask` (B, L) bool is True where a token is unknown.
"""

import time
from collections import Counter
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from diffusion.schedule import step_range
from heads.rules import StepState
from models.feature_cache import FeatureCache
from models.mar import MAR
from train_state import TrainState
from train_step import forward_backward, optimizer_step
from util import dist
from util.checkpoint import weights_hash
from util.dist import autocast, send
from util.evaluation import score
from util.guards import complain, draw_finite, is_plain
from util.images import PNGFolder, Trace, image_path, is_readable, prepare_folder, save_png, to_uint8
from util.optim import lr_at
from util.rng import generator, image_seeds


@torch.no_grad()
def generate(
    mar: MAR,
    labels: torch.Tensor,
    rules,
    num_iter: int = 64,
    num_steps: int | str = 100,
    seeds=None,
    orders=None,
    noise_fn=None,
    callback=None,
    solver: str = "ddpm",
    clip=None,
    tokens=None,
    mask=None,
    evals=None,
    spacing=None,
    refresh_every=1,
) -> torch.Tensor:
    """Latents (B, c, h, w) for labels (B,) long, −1 = unconditional (MAR, section 3.4 and Fig. 3).

    1. z from the visible tokens; 2. the rules say which tokens come next, at which τ, under which w; 3. the diffusion
    head draws them; 4. write them, unmask them; until nothing is unknown, K times at most.

    num_steps: diffusion steps T, or "A:B" for A at the first step to B at the last (the plan says which T a step has).
    seeds: B ints; all draws of image i come from seeds[i] alone. orders (B, L) replaces the ranking, its last entries
    are revealed first, as published. noise_fn(step, rows) -> (T + 1, N, C) replaces the draws, rows (N, 2) long on the
    CPU are (index in the batch, position), row-major. callback(step, rows, plan, tokens) after each step, plan (B', L)
    holding only the images unfinished before it. tokens (B, L, C) with mask (B, L): known tokens to keep. solver,
    spacing, clip: see `DiffLoss.sample`. evals, a Counter, grows by the network evaluations: "mar" by the images that
    each pass of the transformer computes, "mlp" by the rows that the diffusion MLP does. Unconditional ones are made
    only where guidance acts (w ≠ 1). refresh_every > 1: only so many steps apart are all tokens computed, between them
    those that changed and those that are drawn, and learned rules see the z of the last time (`models.feature_cache`).
    The model is in eval mode inside and as it was afterwards. Labels out of range, fewer than 1 step, or tokens without
    mask raise ValueError.
    """
    config, device = mar.config, mar.mask_token.device
    ends = step_range(num_steps)
    batch_size, shape = len(labels), (len(labels), config.seq_len)
    _check_generate(config, labels, num_iter, refresh_every, seeds, tokens, mask, shape)
    if orders is not None and not torch.equal(torch.sort(torch.as_tensor(orders))[0].cpu(), _all_positions(shape)):
        raise ValueError(f"orders must be {shape}, each row a permutation of the positions")
    labels = torch.as_tensor(labels).to(device)
    if seeds is None:
        seeds = torch.randint(0, 2**32, (batch_size,)).tolist()
    generators = [generator(seed) for seed in seeds]
    # minus the log of an exponential draw is a Gumbel draw
    gumbel = torch.stack([-torch.empty(config.seq_len).exponential_(generator=g).log() for g in generators]).to(device)
    if orders is not None:
        ranking = torch.argsort(torch.as_tensor(orders, device=device), dim=1).float()
        rules = replace(rules, order=lambda state: ranking[state.images])
    if tokens is None:
        tokens = torch.zeros(*shape, config.token_dim, device=device)
        unknown = torch.ones(shape, dtype=torch.bool)
    else:
        tokens, unknown = tokens.to(device, torch.float32, copy=True), mask.to("cpu", torch.bool, copy=True)

    features = FeatureCache(mar, labels, refresh_every)
    # The mask lives on the host, so that shapes are known there; one copy a step, of the plan, keeps it current.
    num_start = unknown.sum(dim=1).float()
    was_training = {module: module.training for module in mar.modules()}  # a frozen part may be in eval mode already
    mar.eval()
    try:
        for step in range(num_iter):
            images = unknown.any(dim=1).nonzero().squeeze(1)  # finished images have left the batch
            if not len(images):
                break
            here = unknown[images]
            index = send(images, device)
            state = StepState(
                step=step,
                num_iter=num_iter,
                mask=send(here, device),
                num_unknown=send(here.sum(dim=1).float(), device),
                num_start=send(num_start[images], device),
                gumbel=gumbel[index],
                z=features.look(step, tokens, unknown, images),
                images=index,
                num_steps=ends,
            )
            plan = rules(state)
            select, guided = torch.stack([plan.select, plan.select & (plan.cfg != 1.0)]).cpu()  # the one wait

            rows = select.nonzero()  # (N, 2), row-major
            row, column = send(rows, device).unbind(dim=1)
            acts = guided[rows[:, 0], rows[:, 1]].nonzero().squeeze(1)  # (G,): where guidance acts
            rows = torch.stack([images[rows[:, 0]], rows[:, 1]], dim=1)
            z, z_uncond = features.at(step, tokens, unknown, rows, acts)  # (N, D), (G, D)
            if noise_fn:
                noise = noise_fn(step, rows)
            else:
                noise = _draw_noise(generators, rows, plan.num_steps, config.token_dim)
            drawn = mar.diffloss.sample(
                z,
                z_uncond,
                cfg=plan.cfg[row, column] if len(acts) else 1.0,
                tau=plan.tau[row, column],
                num_steps=plan.num_steps,
                solver=solver,
                noise=send(noise, device),
                clip=clip,
                spacing=spacing,
                guided=None if len(acts) in (0, len(rows)) else send(acts, device),
            )
            tokens[index[row], column] = drawn
            unknown[rows[:, 0], rows[:, 1]] = False
            if evals is not None:
                evals.update(mlp=(len(rows) + len(acts)) * plan.num_steps)
            if callback:
                callback(step, rows, plan, tokens)
    finally:
        for module, mode in was_training.items():
            module.training = mode
    if evals is not None:
        evals.update(mar=features.passes)
    return mar.unpatchify(tokens)


def _all_positions(shape):
    return torch.arange(shape[1]).expand(shape)


def _check_generate(config, labels, num_iter, refresh_every, seeds, tokens, mask, shape):
    labels = torch.as_tensor(labels)
    if labels.dim() != 1 or not len(labels):
        raise ValueError(f"labels must be one number for each image, at least one, got shape {tuple(labels.shape)}")
    low, high = int(labels.min()), int(labels.max())
    if low < -1 or high >= config.class_num:
        raise ValueError(f"labels must be between -1 and {config.class_num - 1}, got {low if low < -1 else high}")
    for name, value in (("num_iter", num_iter), ("refresh_every", refresh_every)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if seeds is not None and len(seeds) != len(labels):
        raise ValueError(f"seeds must be one int for each of the {len(labels)} labels, got {len(seeds)}")
    if (tokens is None) != (mask is None):
        raise ValueError("tokens and mask go together: give both or neither")
    if mask is not None and (tuple(mask.shape) != shape or tuple(tokens.shape) != (*shape, config.token_dim)):
        raise ValueError(f"mask must be {shape} and tokens {(*shape, config.token_dim)}")


def _draw_noise(generators, rows, num_steps, channels):
    """(T + 1, N, C), the part of each image from its own generator."""
    images, counts = rows[:, 0].unique_consecutive(return_counts=True)
    parts = [
        torch.randn((num_steps + 1, k, channels), generator=generators[i])
        for i, k in zip(images.tolist(), counts.tolist())
    ]
    return torch.cat(parts, dim=1)


@torch.no_grad()
def sample_images(
    mar,
    tokenizer,
    sampling,
    labels,
    seed: int,
    folder: Path,
    *,
    batch_size,
    device,
    dtype,
    num_traced=0,
    heads=None,
    edit=None,
) -> dict:
    """Write image i of labels[i] to folder/<i>.png for all i, sharing the batches between the processes.

    Image i depends on (seed, i), its label, the weights and the settings only (in int8, by less than its rounding, on
    its batch too, see models/int8.py); these stand in folder/run.json, and files of another run are removed. A batch
    whose files are all there and whole is skipped, any other is made again whole. num_traced: the growth of so many
    images goes to folder/trace.npz (see `util.images.Trace`); where that is missing their batches, which all belong to
    the first process, are made again. edit, a `util.editing.Edit`: all images are made of its source, whose known
    tokens (the mean of the tokenizer's posterior) stay as they are, and so do the pixels that belong to them. Returns
    {weights (their hash), num_made, seconds, images_per_second}, summed over processes, and the network evaluations
    that an image took on average, counted (see `generate`; None where no image was made): mar_evals, mlp_evals. Of the
    images made it also counts redone_fp32, those drawn twice (`draw_finite`; a trace shows the first time), not_finite,
    those in vain, which are black, and one_colour, as a model that has learned little makes them; the last two are
    named on stderr.
    """
    rules = sampling.rules(heads)
    run = dict(asdict(sampling), seed=seed, labels=labels, batch_size=batch_size, dtype=str(dtype), device=device.type)
    run["weights"] = weights_hash({**mar.state_dict(), **(heads.state_dict() if heads else {})})
    run["tokenizer"] = tokenizer.describe()
    tokens = mask = None
    if edit is not None:
        run |= edit.hashes
        tokens = mar.patchify(tokenizer.encode(edit.images().to(device), sample=False))
        mask = torch.from_numpy(edit.unknown).reshape(1, -1)
    if dist.is_main():
        prepare_folder(folder, run)
    dist.barrier()
    batches = [range(i, min(i + batch_size, len(labels))) for i in range(0, len(labels), batch_size)]
    trace = Trace(folder, labels[:num_traced], mar.config.seq_len, sampling.num_iter)
    to_trace = [batch for batch in batches if batch.start < num_traced]
    mine = to_trace if dist.is_main() else []
    redo = [] if trace.is_saved() else mine
    mine = mine + batches[len(to_trace) :][dist.rank() :: dist.world_size()]
    mine = [batch for batch in mine if batch in redo or not all(is_readable(image_path(folder, i)) for i in batch)]
    num_made, evals, began = 0, Counter(), time.perf_counter()
    redone, broken, plain = [], [], []  # numbers of images
    quiet = not (mine and dist.is_main())
    with tqdm(total=sum(map(len, mine)), unit="image", desc="sampling", disable=quiet, leave=False) as progress:

        def after_step(step, *details):
            progress.set_postfix_str(f"step {step + 1}/{sampling.num_iter}")
            trace.record(step, *details)

        def pictures(latents):
            images = to_uint8(tokenizer.decode(latents))
            return images if edit is None else edit.paste(images)

        def draw(batch, rows, dtype):
            images = [batch[row] for row in rows]
            with autocast(device, dtype):
                return generate(
                    mar,
                    torch.tensor([labels[i] for i in images]),
                    rules,
                    num_iter=sampling.num_iter,
                    num_steps=sampling.num_sampling_steps,
                    seeds=image_seeds(seed, images),
                    callback=None if trace.steps else after_step,  # a second time it would be traced twice
                    solver=sampling.solver,
                    spacing=sampling.spacing,
                    refresh_every=sampling.refresh_every,
                    clip=tokenizer.clip,
                    tokens=None if edit is None else tokens.expand(len(images), -1, -1),
                    mask=None if edit is None else mask.expand(len(images), -1),
                    evals=evals,
                )

        for batch in mine:
            trace.begin(batch if batch in redo else None)
            latents, twice, lost = draw_finite(partial(draw, batch), len(batch), dtype)
            images = pictures(latents)
            images[lost] = 0
            redone += [batch[row] for row in twice]
            broken += [batch[row] for row in lost]
            plain += [i for i, image in zip(batch, images) if is_plain(image)]
            trace.end(lambda tokens: pictures(mar.unpatchify(tokens)), images)
            for i, image in zip(batch, images):
                save_png(image_path(folder, i), image)
            num_made += len(batch)
            progress.update(len(batch))
    seconds = time.perf_counter() - began
    rate = dist.all_sum(torch.tensor(num_made / seconds, device=device)).item()
    tried = " in float32 too" if dist.is_half(dtype) else ""
    complain(f"have numbers that are not finite{tried} and are left black", broken, num_made)
    complain("are of one colour, which a model makes that has learned little", plain, num_made)
    notes = {"redone_fp32": len(redone), "not_finite": len(broken), "one_colour": len(plain)}
    # whole numbers, since they are too large for float32; parts of a pass as thousandths
    counts = [num_made, *notes.values(), round(1000 * evals["mar"]), evals["mlp"]]
    num_made, *counts, mar_evals, mlp_evals = dist.all_sum(torch.tensor(counts, device=device)).tolist()
    dist.barrier()
    found = {"weights": run["weights"], "num_made": num_made, "seconds": round(seconds, 3)}
    found["images_per_second"] = round(rate, 3) if num_made else None
    found |= dict(zip(notes, counts))
    for name, count in (("mar_evals", mar_evals / 1000), ("mlp_evals", mlp_evals)):
        found[name] = round(count / num_made, 3) if num_made else None
    return found


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

    args is config.TrainConfig. loader yields (batch, labels (b,), indices (b,)) with b = batch_size·accum_iter, batch
    being images uint8 (b, c, H, W) or cached moments (b, 2, c', h, w), see `util.latents`. log: a `util.run_log.RunLog`
    on the first process, None on the others. Raises FloatingPointError after 20 steps in a row without a finite
    gradient.
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
