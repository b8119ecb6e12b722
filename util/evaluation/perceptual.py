"""Perceptual distance between images: that of their activations in the convolutions of a network of PERCEPTUAL.

Shapes: B images, C channels, H x W pixels, values in [-1, 1].
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from util.evaluation.classifiers import (
    CIFAR10_WEIGHTS,
    DIGITS_WEIGHTS,
    Cifar10Classifier,
    DigitClassifier,
    load_classifier,
)
from util.evaluation.features import plain_tensors


def _vgg16(path) -> nn.Sequential:
    import torchvision

    with torch.device("meta"):
        net = torchvision.models.vgg16()
    net.load_state_dict(plain_tensors(path), assign=True)
    return net.features


class Network(NamedTuple):
    """One row of PERCEPTUAL."""

    load: Callable  # path of the weights -> its convolutions, a Sequential
    weights: Path | None  # committed ones; None: --perceptual_weights names them
    mean: tuple[float, ...] = (0.0,)  # of the images it was trained on, in [-1, 1], one for each channel
    std: tuple[float, ...] = (1.0,)


PERCEPTUAL = {
    "none": None,
    "vgg16": Network(_vgg16, None, mean=(-0.03, -0.088, -0.188), std=(0.458, 0.448, 0.45)),  # torchvision's, 2x - 1
    "digits": Network(lambda path: load_classifier(DigitClassifier, path).conv, DIGITS_WEIGHTS),
    "cifar10": Network(lambda path: load_classifier(Cifar10Classifier, path).conv, CIFAR10_WEIGHTS),
}


class Perceptual(nn.Module):
    """Mean squared distance of two batches' activations, each of length 1 over its channels: () >= 0.

    LPIPS (Zhang et al. 2018, Eq. 1) with all its weights w equal to 1, averaged over the layers. These are the ones
    that a pooling follows, and the last one.
    """

    def __init__(self, layers: nn.Sequential, mean=(0.0,), std=(1.0,)):
        super().__init__()
        last = max(i for i, layer in enumerate(layers) if not isinstance(layer, nn.MaxPool2d))
        self.layers = layers[: last + 1].requires_grad_(False)
        pools = [i for i, layer in enumerate(self.layers) if isinstance(layer, nn.MaxPool2d)]
        self.taps = {*(i - 1 for i in pools), last}
        self.min_size = 2 ** len(pools)  # pixels that leave one after the last pooling
        self.channels = next(layer.in_channels for layer in layers if isinstance(layer, nn.Conv2d))
        self.register_buffer("mean", torch.tensor(mean).reshape(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(-1, 1, 1))
        self.eval()

    def activations(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Of images (B, C, H, W), grey ones too where the network takes colours, (B, c, h, w) for each layer."""
        x, activations = (x.expand(-1, self.channels, -1, -1) - self.mean) / self.std, []
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i in self.taps:
                activations.append(F.normalize(x, dim=1))
        return activations

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """() from x and y (B, C, H, W); only x, the reconstruction, gets a gradient."""
        with torch.no_grad():
            wanted = self.activations(y)
        distances = [(a - b).square().sum(dim=1).mean() for a, b in zip(self.activations(x), wanted)]
        return torch.stack(distances).mean()


def build_perceptual(name: str, weights: str | None, channels: int, img_size: int) -> Perceptual | None:
    """The distance `name` of PERCEPTUAL for images (B, channels, img_size, img_size); None for none.

    weights: path of a file with the network's plain tensors, for a network without committed ones. ValueError for an
    unknown name, a file that is missing, not expected or has anything else in it, and images that do not fit.
    """
    if name not in PERCEPTUAL:
        raise ValueError(f"unknown --perceptual {name!r}; valid: {', '.join(PERCEPTUAL)}")
    network = PERCEPTUAL[name]
    if weights and (network is None or network.weights):
        raise ValueError(f"--perceptual_weights {weights} has no meaning with --perceptual {name}, which needs no file")
    if network is None:
        return None
    path = Path(network.weights or weights or "")
    if not path.is_file():
        where = f"at {path}" if weights or network.weights else "given: name their file with --perceptual_weights"
        raise ValueError(f"no weights for --perceptual {name} {where}")
    try:
        layers = network.load(path)
    except Exception as error:  # torch, pickle, zipfile and safetensors raise many types
        reason = " ".join(str(error).split())[:100]
        raise ValueError(f"{path} refused: not the plain tensors of {name} ({reason} ...)") from None
    perceptual = Perceptual(layers, network.mean, network.std)
    if channels not in (1, perceptual.channels):
        raise ValueError(f"--perceptual {name} needs images of {perceptual.channels} channels, these have {channels}")
    if img_size < perceptual.min_size:
        raise ValueError(f"--perceptual {name} needs {perceptual.min_size} pixels a side, the images have {img_size}")
    return perceptual
