"""Small classifiers whose features stand in for Inception's, with their weights committed beside this file as .npz.

Such a class has `shape` (C, H, W of the images it takes) and `dim` (width of its features); called with x (B, C, H, W)
in [-1, 1] it returns (features (B, dim), logits (B, classes)).
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn

DIGITS_WEIGHTS = Path(__file__).with_name("digits_classifier.npz")
CIFAR10_WEIGHTS = Path(__file__).with_name("cifar10_classifier.npz")


class DigitClassifier(nn.Module):
    """Convolutional net for 8 x 8 digits: x (B, 1, 8, 8) in [-1, 1] -> (features (B, 64) >= 0, logits (B, 10))."""

    shape, dim = (1, 8, 8), 64

    def __init__(self):
        super().__init__()
        blocks = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU()]  # (B, 32, 8, 8)
        blocks += [nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]  # (B, 32, 4, 4)
        blocks += [nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]  # (B, 64, 2, 2)
        self.conv = nn.Sequential(*blocks)
        self.hidden = nn.Linear(64 * 2 * 2, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        features = self.hidden(self.conv(x).flatten(1)).relu()  # (B, 64)
        return features, self.head(features)


class Cifar10Classifier(nn.Module):
    """Convolutional net for 32 x 32 colour images: x (B, 3, 32, 32) in [-1, 1] -> (features (B, 64) >= 0, logits)."""

    shape, dim = (3, 32, 32), 64

    def __init__(self):
        super().__init__()
        layers, channels = [], 3
        for width in (32, 64, 96, 96):
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if width != 96 or channels != 96 else []  # 16, 8 and 4 pixels wide
            channels = width
        self.conv = nn.Sequential(*layers)
        self.hidden = nn.Linear(96 * 4 * 4, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        features = self.hidden(self.conv(x).flatten(1)).relu()  # (B, 64)
        return features, self.head(features)


def load_classifier(net_class=DigitClassifier, path=DIGITS_WEIGHTS) -> nn.Module:
    """A classifier with the weights in an .npz of its state dict, in eval mode on the CPU."""
    with np.load(path, allow_pickle=False) as arrays:
        state = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    state = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    with torch.device("meta"):  # no initial weights, which would draw random numbers
        net = net_class()
    net.load_state_dict(state, assign=True)
    return net.eval().requires_grad_(False)
