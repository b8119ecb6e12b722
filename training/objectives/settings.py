"""The settings that objectives are made of."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from heads.policy import FLAGS, PolicyHeads
from sampling.settings import SampleConfig
from training.objectives.head_losses import HeadLossConfig
from training.objectives.visiting import MaskConfig
from util.args import flag

if TYPE_CHECKING:  # training.config imports the table of objectives
    from training.config import HeadsConfig, TrainConfig

PATHS = ("full", "local")


@dataclass(frozen=True)
class RewardConfig:
    """What --objective image minimises, and how."""

    reward: str | None = flag(None, "comma list of two or more features of the reward (default: --features and pixels)")
    reward_weights: str | None = flag(None, "comma list of their weights (default: 1 each)")
    bank: int = flag(1024, "last generated images that are compared with the real ones", low=16)
    pathwise: str | None = flag(
        None,
        "gradient through all later steps, of ids by the score function, or through a step's own tokens (default: "
        "full, of ids local)",
        choices=PATHS,
    )
    adaptive: bool = flag(True, "train what heads of --objective image say about each image, not only about the step")
    adaptive_lr: float = flag(0.1, "learning rate of that part, as a share of --lr", low=0)


@dataclass(frozen=True)
class ObjectiveSettings:
    """Parts of a `training.config.RunConfig`.

    flip: may the data's images be mirrored? real: a function that gives the data set of real images, None where nothing
    is trained.
    """

    train: "TrainConfig"
    masks: MaskConfig
    losses: HeadLossConfig
    heads: "HeadsConfig"
    reward: RewardConfig
    sampling: SampleConfig
    flip: bool
    real: Callable | None = None


def check_learned_rules(heads: PolicyHeads | None, given: dict) -> None:
    """Raise ValueError for a hand-made rule given in place of one that is learned: sampling would show it instead."""
    for kind in heads.learn if heads is not None else ():
        name = given.get(FLAGS[kind])
        if name not in (None, "learned"):
            base = f"; --{kind}_base names what the head moves" if kind in ("order", "group") else ""
            raise ValueError(f"--{FLAGS[kind]} {name} leaves no place for --learn {kind}: leave one of them out{base}")
