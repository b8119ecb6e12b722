"""Train the small digit classifier whose features stand in for Inception's on scikit-learn's 8 x 8 digits.

    python scripts/train_digits_classifier.py        # writes util/digits_classifier.npz

It first trains on 1,437 of the 1,797 images and prints the accuracy on the other 360, then trains the network that is
kept on all of them. On one machine and one version of torch the result is the same each time.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

from util.classifiers import DIGITS_WEIGHTS, DigitClassifier


def load_images() -> tuple[torch.Tensor, torch.Tensor]:
    """Digits as this project sees them: images (1797, 1, 8, 8) float in [-1, 1] in steps of 2/255, labels (1797,)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * 255 / 16).astype(np.uint8)
    return torch.from_numpy(pixels)[:, None].float() / 127.5 - 1, torch.from_numpy(digits.target).long()


def augment(x, generator):
    """Shift each image of x (B, 1, 8, 8) by -1, 0 or 1 pixels in both directions and add noise of std 0.1."""
    padded = F.pad(x, (1, 1, 1, 1), value=-1.0)  # (B, 1, 10, 10)
    top, left = torch.randint(0, 3, (2, len(x), 1), generator=generator) + torch.arange(8)  # (B, 8) each
    image = torch.arange(len(x))[:, None, None]
    shifted = padded[image, 0, top[:, :, None], left[:, None, :]][:, None]  # (B, 1, 8, 8)
    return shifted + 0.1 * torch.randn(shifted.shape, generator=generator)


def train(x, y, epochs: int, seed: int) -> DigitClassifier:
    """Train on x (n, 1, 8, 8) in [-1, 1], y (n,) long, without touching the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = DigitClassifier()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-2)
    batches = -(-len(x) // 64)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(64):
            loss = F.cross_entropy(net(augment(x[rows], generator))[1], y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval().requires_grad_(False)


def accuracy(net, x, y) -> float:
    """Fraction of x (n, 1, 8, 8) that the network labels y (n,)."""
    return (net(x)[1].argmax(dim=1) == y).float().mean().item()


def normalize_features(net, x) -> None:
    """Scale the features to a root mean square of 1 over x, as Inception's roughly are; the logits stay the same.

    A ReLU net learns features of any size, and KID's cubic kernel (x·y/d + 1)³ is not scale-free.
    """
    scale = net(x)[0].square().mean().sqrt()
    net.hidden.weight /= scale
    net.hidden.bias /= scale
    net.head.weight *= scale


def save(net, path: Path) -> None:
    """Write the state dict as float32 arrays, through a temporary file, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez_compressed(file, **{name: value.numpy() for name, value in net.state_dict().items()})
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)  # mkstemp gives 0600
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=DIGITS_WEIGHTS, help="the .npz to write")
    parser.add_argument("--epochs", type=int, default=60, help="passes over the images, for each of the two trainings")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in a fixed order
    try:
        x, y = load_images()
        rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(args.seed))
        kept, held_out = rows[360:], rows[:360]
        net = train(x[kept], y[kept], args.epochs, args.seed)
        print(f"held-out accuracy {accuracy(net, x[held_out], y[held_out]):.2%} on {len(held_out)} images")
        net = train(x, y, args.epochs, args.seed)
        normalize_features(net, x)
        save(net, args.output)
    finally:
        torch.set_num_threads(threads)
    size = args.output.stat().st_size / 1000
    print(f"accuracy on all {len(x)} images {accuracy(net, x, y):.2%}; wrote {args.output} ({size:.0f} KB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
