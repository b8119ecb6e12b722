"""The adversarial loss of an autoencoder: a network that tells images from reconstructions, patch by patch.

Hinge losses, as VQGAN's (arXiv 2012.09841). Shapes: B images of C channels, H x W pixels in [-1, 1].
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

WIDTH = 64  # channels of the first layer
LR = 2e-4  # of its Adam, whose betas are (0.5, 0.9)


class Discriminator(nn.Module):
    """Images (B, C, H, W) -> a number for each patch, (B, 1, h, w), above 0 for images. H and W are at least 8."""

    def __init__(self, image_channels: int):
        super().__init__()
        widths = [image_channels, WIDTH, 2 * WIDTH]
        self.convs = nn.ModuleList(
            [spectral_norm(nn.Conv2d(*pair, 4, stride=2, padding=1)) for pair in zip(widths, widths[1:])]
        )
        self.middle = spectral_norm(nn.Conv2d(widths[-1], 4 * WIDTH, 3, padding=1))
        self.out = spectral_norm(nn.Conv2d(4 * WIDTH, 1, 1))

    def forward(self, images):
        x = images
        for conv in (*self.convs, self.middle):
            x = F.leaky_relu(conv(x), 0.2)
        return self.out(x)

    def loss(self, images: torch.Tensor, decoded: torch.Tensor) -> torch.Tensor:
        """() that falls as images lie above 1 and reconstructions, which get no gradient, below −1."""
        real, fake = self(images), self(decoded.detach())
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())

    def of_generator(self, decoded: torch.Tensor) -> torch.Tensor:
        """() that falls as reconstructions (B, C, H, W) pass for images; its gradient reaches no weight of this."""
        self.requires_grad_(False)
        score = -self(decoded).mean()
        self.requires_grad_(True)
        return score
