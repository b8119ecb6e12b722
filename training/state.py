"""Everything that training changes, and how a checkpoint of it is made and restored."""

import contextlib
from dataclasses import asdict, dataclass

import torch
from torch import nn

from heads.policy import PolicyHeads
from models.mar import MAR
from sampling.settings import SampleConfig
from training.objectives.visiting import Visits
from training.optim import EMA
from util import dist
from util.args import defaults
from util.checkpoint import load_weights
from util.evaluation.protocol import EvalConfig
from util.rng import generator


@dataclass
class TrainState:
    """Everything that training changes, and the parts it works with."""

    module: nn.Module  # TrainingLoss, possibly inside DistributedDataParallel
    mar: MAR
    heads: PolicyHeads | None
    tokenizer: nn.Module
    visits: Visits | None  # makes the training masks; None for the published ones
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: EMA
    heads_ema: EMA | None
    device: torch.device
    dtype: torch.dtype
    step: int = 0  # optimizer steps done
    steps_per_epoch: int = 1
    batch: int = 0  # steps done of the epoch under way
    unsaved: bool = False  # has the last try to save failed?
    bad_steps: int = 0  # of these, skipped for non-finite gradients
    bad_in_a_row: int = 0
    stop_signal: int = 0  # number of the signal that asked this process to stop, or 0
    stopping: bool = False  # has any process been asked?
    interrupted: bool = False  # while sampling, that is without the other processes
    interruptible: bool = False  # may a signal interrupt at once, instead of waiting for the end of the step?

    @contextlib.contextmanager
    def averaged(self):
        """The averaged weights inside the block, those under training again afterwards."""
        with self.ema.applied_to(self.mar):
            with self.heads_ema.applied_to(self.heads) if self.heads is not None else contextlib.nullcontext():
                yield

    @torch.no_grad()
    def tokens(self, batch: torch.Tensor, flip: torch.Tensor | None, seeds: list[int]) -> torch.Tensor:
        """Tokens (b, L, C) of images uint8 (b, c, H, W), or of moments (b, 2, c', h, w), see `util.images.latents`.

        flip (b,) bool, or None for nowhere: take the mirror image. Where the tokenizer has a posterior, the draw of
        image i comes from seeds[i] alone.
        """
        if batch.dtype == torch.uint8:
            images = batch.float() / 127.5 - 1
            if flip is not None:
                images = torch.where(flip[:, None, None, None], images.flip(-1), images)
            moments = self.tokenizer.encode_moments(images)
        else:
            moments = batch[torch.arange(len(batch), device=batch.device), 0 if flip is None else flip.long()]
        generators = [generator(seed) for seed in seeds]
        return self.mar.patchify(self.tokenizer.from_moments(moments, generator=generators))


def checkpoint_content(state: TrainState, values: dict, epoch: int, classes: list[str]) -> dict:
    """What a checkpoint holds, `epoch` being the last finished one; the keys are explained in util/checkpoint.py."""
    return {
        "model": state.mar.state_dict(),
        "model_ema": state.ema.weights,
        "optimizer": state.optimizer.state_dict(),
        "epoch": epoch,
        "scaler": state.scaler.state_dict(),
        "args": values,
        "heads": state.heads.state_dict() if state.heads is not None else {},
        "heads_ema": state.heads_ema.weights if state.heads is not None else {},
        "config": {
            "mar": asdict(state.mar.config),
            "tokenizer": values["tokenizer"],
            **{k: values[k] for k in ("vae_path", "vae_scale", "vae_mean")},
            "latents": state.tokenizer.describe(),
            "heads": state.heads.settings() if state.heads is not None else None,
            "data": {"name": values["data"], "path": values["data_path"], "classes": classes},
            "sample": {k: values[k] for k in defaults(SampleConfig)},
            "eval": {k: values[k] for k in defaults(EvalConfig)},
        },
        # every draw is a function of seed, step and sample; batch: how far into the unfinished epoch of so many steps
        "rng": {
            "seed": values["seed"],
            "step": state.step,
            "batch": state.batch,
            "steps_per_epoch": state.steps_per_epoch,
        },
        "step": state.step,
    }


def restore_weights(state: TrainState, content: dict, source, heads_too: bool = True) -> None:
    """Load the weights and their averages of a checkpoint; heads_too: it must have the heads that are trained here."""
    load_weights(state.mar, content["model"], source)
    state.ema.load(content.get("model_ema", content["model"]))
    here = list(state.heads.learn) if state.heads is not None else []
    there = (content.get("config", {}).get("heads") or {}).get("learn", [])
    if here == there and here:
        load_weights(state.heads, content["heads"], source)
        state.heads_ema.load(content["heads_ema"])
    elif heads_too and here != there:
        raise ValueError(
            f"{source} has the heads {','.join(there) or 'none'}, --learn names {','.join(here) or 'none'}; "
            "a new stage with other heads starts with --init_from"
        )


def restore(state: TrainState, content: dict, source) -> int:
    """Load a checkpoint into the state; the epoch to continue with."""
    restore_weights(state, content, source)
    if "optimizer" in content:
        weight_decay = [group["weight_decay"] for group in state.optimizer.param_groups]
        state.optimizer.load_state_dict(content["optimizer"])
        for group, value in zip(state.optimizer.param_groups, weight_decay):  # the flag counts, as it does for lr
            group["weight_decay"] = value
    if content.get("scaler") and state.scaler.is_enabled():
        state.scaler.load_state_dict(content["scaler"])
    epoch = content.get("epoch", -1) + 1
    state.step = content.get("step", epoch * state.steps_per_epoch)
    place = content.get("rng", {})
    if place.get("batch") and place["steps_per_epoch"] == state.steps_per_epoch:
        state.batch = place["batch"]
    elif place.get("batch") and dist.is_main():
        print(f"another batch size than before: epoch {epoch + 1} starts from its beginning")
    return epoch
