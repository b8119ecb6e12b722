"""The settings that objectives are made of."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sampling.settings import SampleConfig
from training.objectives.head_losses import HeadLossConfig
from training.objectives.visiting import MaskConfig

if TYPE_CHECKING:  # training.config imports the table of objectives
    from training.config import HeadsConfig, TrainConfig


@dataclass(frozen=True)
class ObjectiveSettings:
    """Parts of a `training.config.RunConfig`. flip: may the data's images be mirrored?"""

    train: "TrainConfig"
    masks: MaskConfig
    losses: HeadLossConfig
    heads: "HeadsConfig"
    sampling: SampleConfig
    flip: bool
