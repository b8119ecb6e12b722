"""The state of a training run: what a step changes, and the parts that it works with."""

import contextlib
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from heads.policy import PolicyHeads
from models.low_precision import prepared
from sampling.run import Parts
from training.ahead import Ahead
from training.optim import EMA
from util import dist
from util.images.text_cache import ImageCaptions


@dataclass
class TrainState:
    """Everything that training changes, and the parts it works with."""

    objective: nn.Module  # a row of OBJECTIVES
    model: nn.Module
    heads: PolicyHeads | None
    tokenizer: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: EMA
    heads_ema: EMA | None
    device: torch.device
    dtype: torch.dtype
    seed: int
    captions: ImageCaptions | None = None  # of the images trained on, for a model of text
    stored: dict = field(default_factory=dict)  # args and config, as each checkpoint has them
    wrapped: nn.Module | None = None  # the objective inside DistributedDataParallel, or itself
    step: int = 0  # optimizer steps done
    steps_per_epoch: int = 1
    num_steps: int = 1  # of the whole run
    batch: int = 0  # steps done of the epoch under way
    unsaved: bool = False  # has the last try to save failed?
    bad_steps: int = 0  # of these, skipped for non-finite gradients
    bad_in_a_row: int = 0
    stop_signal: int = 0  # number of the signal that asked this process to stop, or 0
    stopping: bool = False  # has any process been asked?
    interrupted: bool = False  # while sampling, that is without the other processes
    interruptible: bool = False  # may a signal interrupt at once, instead of waiting for the end of the step?

    def __post_init__(self):
        self.ahead = Ahead(self.device.type == "cuda")
        dist.check_devices(self.device, objective=self.objective, tokenizer=self.tokenizer)

    @property
    def parts(self) -> Parts:
        """What samples images with the weights as they are."""
        return Parts(self.model, self.tokenizer, self.device, self.dtype, self.heads)

    @contextlib.contextmanager
    def averaged(self):
        """What samples with the averaged weights, as `sample.py` does; those under training are back afterwards."""
        with self.ema.applied_to(self.model):
            with self.heads_ema.applied_to(self.heads) if self.heads is not None else contextlib.nullcontext():
                yield replace(self.parts, model=prepared(self.model, self.dtype))
