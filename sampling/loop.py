"""The autoregressive loop.

Legend: B images, L tokens an image, C channels a token, D width, N selected token rows, T diffusion steps,
K = num_iter autoregressive steps. `mask` (B, L) bool is True where a token is unknown.
"""

from dataclasses import replace

import torch

from diffusion.schedule import step_range
from heads.step import StepState
from models.mar import MAR
from models.mar_cache import FeatureCache
from util.dist import send
from util.rng import generator


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
    those that changed and those that are drawn, and learned rules see the z of the last time (`models.mar_cache`).
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
