"""When is an image decided? Its steps up to one kept, the rest drawn anew, several times; and equal evaluations.

Legend: n branches, L tokens, K steps, (H, W, C) pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from heads.schedules import MIN_STEPS
from sampling.inspector.recording import Recording, record, sample
from sampling.inspector.spec import MOST_STEPS, Spec
from sampling.run import SamplingRun
from util.rng import seed_of

MOST_STEPS_TRIED = 256


@dataclass(frozen=True)
class Branches:
    """Images uint8 (n, H, W, C) that agree before a step; mean and spread of their pixels, float (H, W, C) in 0…255."""

    images: np.ndarray
    mean: np.ndarray
    spread: np.ndarray

    @property
    def picture_of_spread(self) -> np.ndarray:
        """uint8 (H, W, C): black where all agree, white where half of them are 0 and half 255."""
        return (self.spread * 2).round().clip(0, 255).astype(np.uint8)


@torch.no_grad()
def branch(spec: Spec, recording: Recording, image: int, step: int, count: int, emit: Callable) -> Branches:
    """`count` images that have the tokens which that image of the recording had before step 0 … K, the rest new."""
    label, num_iter = spec.labels[image], spec.sampling.num_iter
    seed = seed_of("branch", spec.seed, image, step)
    scales = spec.loaded.model.fixed_rules.get("group") == "scale"
    sampling = spec.sampling if scales else replace(spec.sampling, num_iter=max(num_iter - step, 1))
    run = SamplingRun(spec.parts(), sampling, [label] * count, seed, None, spec.edit)
    unknown = recording.unknown & (recording.order_step[image] >= step)
    taken = [i for i, taken in enumerate(recording.steps) if taken < step]
    if not unknown.any():
        return branches_of(np.repeat(recording.images[image : image + 1], count, axis=0))
    if taken:
        tokens = recording.tokens[taken[-1]][image : image + 1]
        run.known = dict(tokens=tokens, mask=torch.from_numpy(unknown)[None])
    placed = {} if scales else dict(start=step, num_iter=num_iter, num_start=int(recording.unknown.sum()))
    return branches_of(sample(spec, run, emit, frames=False, **placed).images)


def branches_of(images: np.ndarray) -> Branches:
    """Branches with these images uint8 (n, H, W, C)."""
    values = images.astype(np.float32)
    return Branches(images, values.mean(axis=0), values.std(axis=0))


def matched(spec: Spec, target: dict, emit: Callable) -> tuple[Spec, dict]:
    """The request with autoregressive and diffusion steps whose evaluations of an image are nearest to the target.

    target: {"mar", "mlp"}, as `Recording.evals`; also returns those that it comes to. emit(event), which may raise, at
    every step and try.
    """
    fixed = spec.loaded.model.fixed_rules
    if fixed.get("group"):
        raise ValueError(f"the steps of this model are not free: its own group rule is {fixed['group']}")
    one = replace(spec, redo=(), sure=0)
    tried = {}

    def evals_of(**texts):
        key = tuple(sorted(texts.items()))
        if key not in tried:
            changed = {**spec.texts, **{name: str(value) for name, value in texts.items()}}
            sampling = spec.loaded.setting(changed)
            trial = replace(one, sampling=sampling, changes=())
            tried[key] = record(trial, lambda event: emit({"progress": True}), frames=False).evals
            emit({"tried": texts, "evals": tried[key]})
        return tried[key]

    least = MIN_STEPS.get(spec.sampling.group, 1)
    low = high = least
    while high < MOST_STEPS_TRIED and evals_of(num_iter=high)["mar"] < target["mar"]:
        low, high = high + 1, min(2 * high, MOST_STEPS_TRIED)
    while low < high:  # the least number of steps that reaches the target
        middle = (low + high) // 2
        low, high = (low, middle) if evals_of(num_iter=middle)["mar"] >= target["mar"] else (middle + 1, high)
    near = {max(low - 1, least), low}
    steps = min(near, key=lambda number: abs(evals_of(num_iter=number)["mar"] - target["mar"]))
    texts = {"num_iter": steps}
    if spec.loaded.model.token_head.has_steps:
        rows = evals_of(**texts, num_sampling_steps=10)["mlp"] / 10  # a diffusion step costs the same as another
        texts["num_sampling_steps"] = min(max(1, round(target["mlp"] / rows)), MOST_STEPS)
    evals = evals_of(**texts)
    texts = {**spec.texts, **{name: str(value) for name, value in texts.items()}}
    return replace(spec, texts=texts, sampling=spec.loaded.setting(texts)), evals
