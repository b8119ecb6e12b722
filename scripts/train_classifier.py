"""Train a small classifier whose features stand in for Inception's on small images: digits, or CIFAR-10.

    python scripts/train_classifier.py
    python scripts/train_classifier.py --classifier cifar10 --data_path DIR

It writes util/evaluation/digits_classifier.npz or cifar10_classifier.npz. DIR has torchvision's CIFAR-10, or
train/<class>/* as an image folder. A fifth (digits) or a tenth (CIFAR-10) of the images is held out, to print the
accuracy on. For digits the committed network is then trained on all images. On one machine and one version of torch the
result is the same each time.
"""

import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

from util.args import check_output_file, flag, make_parser
from util.checkpoint import atomic_file
from util.door import run_main
from util.evaluation.classifiers import CIFAR10_WEIGHTS, DIGITS_WEIGHTS, Cifar10Classifier, DigitClassifier
from util.evaluation.fid_stats import has_arrays
from util.images.datasets import build_dataset
from util.images.folders import check_output_folder


class Recipe(NamedTuple):
    """One row of RECIPES: the training of a classifier, and its file."""

    net: type
    weights: Path
    epochs: int
    held_out: int  # one image in `held_out` is not trained on
    shift: int  # pixels, in both directions
    flip: bool
    final: bool  # is the network that is saved trained anew on all images?
    dtype: type  # in the file


RECIPES = {
    "digits": Recipe(DigitClassifier, DIGITS_WEIGHTS, 60, 5, shift=1, flip=False, final=True, dtype=np.float32),
    "cifar10": Recipe(Cifar10Classifier, CIFAR10_WEIGHTS, 8, 10, shift=3, flip=True, final=False, dtype=np.float16),
}


@dataclass(frozen=True)
class ClassifierArgs:
    """A classifier, its data, and the file to write."""

    classifier: str = flag("digits", "the classifier to train", choices=RECIPES)
    data_path: str | None = flag(None, "folder of CIFAR-10")
    output: str | None = flag(None, "the .npz to write (default: the one that is committed)")
    epochs: int | None = flag(None, "passes over the images (default: 60 for digits, 8 for CIFAR-10)", low=1)
    seed: int = flag(0, "seed of weights and order", low=0, high=2**63 - 1)
    held_out: bool = flag(True, "train on a part first and say how well it knows the rest")
    dry_run: bool = flag(False, "print the recipe and stop")


def images_of(name: str, data_path: str | None) -> tuple[str, str | None]:
    """(data set, its place) that a classifier is trained on: a folder of images, or the one of its name."""
    is_folder = data_path is not None and not Path(data_path, "cifar-10-batches-py").is_dir()
    return "imagefolder" if is_folder else name, data_path


def load_images(name: str = "digits", data_path=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (n, C, H, W) float in [-1, 1] in steps of 2/255, labels (n,)."""
    data_set, place = images_of(name, data_path)
    data = build_dataset(data_set, data_path=place, img_size=32 if data_set == "imagefolder" else None)
    items = [data[i] for i in tqdm(range(len(data)), desc="reading", leave=False, disable=len(data) < 5000)]
    images = torch.stack([image for image, *_ in items])
    return images.float() / 127.5 - 1, torch.tensor([label for _, label, _ in items])


def check_images(x, y, net, name: str) -> None:
    """Raise ValueError for images x (n, C, H, H) or labels y (n,) that the classifier `name`, a net, cannot learn."""
    if tuple(x.shape[1:]) != net.shape:
        raise ValueError(f"the classifier {name} takes images of {net.shape} numbers, these have {tuple(x.shape[1:])}")
    number, most = len(y.unique()), net.head.out_features
    if not 2 <= number <= most or y.max() >= most:
        raise ValueError(f"the classifier {name} tells 2 to {most} classes apart, the images have {number}")


def augment(x, generator, shift: int = 1, flip: bool = False):
    """Shift the images of x (B, C, H, H) by up to `shift` pixels each way, mirror half, add noise of std 0.1."""
    size = x.shape[-1]
    padded = F.pad(x, (shift,) * 4, value=-1.0)
    offsets = torch.randint(0, 2 * shift + 1, (2, len(x), 1), generator=generator)
    top, left = offsets + torch.arange(size)  # (B, H) each
    if flip:
        left = torch.where(torch.rand(len(x), 1, generator=generator) < 0.5, left, left.flip(1))
    image = torch.arange(len(x))[:, None, None]
    shifted = padded[image, :, top[:, :, None], left[:, None, :]].permute(0, 3, 1, 2)  # (B, C, H, H)
    return shifted + 0.1 * torch.randn(shifted.shape, generator=generator)


def train(x, y, epochs: int, seed: int, recipe: Recipe = RECIPES["digits"]):
    """The network trained on x (n, C, H, H) in [-1, 1], y (n,) long, without touching the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = recipe.net()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-2)
    batches = math.ceil(len(x) / 64)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    with tqdm(total=epochs * batches, unit="step", desc="training", leave=False) as progress:
        for _ in range(epochs):
            for rows in torch.randperm(len(x), generator=generator).split(64):
                batch = augment(x[rows], generator, recipe.shift, recipe.flip)
                loss = F.cross_entropy(net(batch)[1], y[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                progress.update()
    return net.eval().requires_grad_(False)


def features_and_logits(net, x):
    """The network's two outputs for all of x, a thousand images at a time."""
    return tuple(torch.cat(parts) for parts in zip(*(net(part) for part in x.split(1000))))


def accuracy(net, x, y) -> float:
    """Fraction of x (n, C, H, W) that the network labels y (n,)."""
    return (features_and_logits(net, x)[1].argmax(dim=1) == y).float().mean().item()


def normalize_features(net, x) -> None:
    """Scale the features to a root mean square of 1 over x, as Inception's roughly are; the logits stay the same.

    A ReLU net learns features of any size, and KID's cubic kernel (x·y/d + 1)³ is not scale-free.
    """
    scale = features_and_logits(net, x)[0].square().mean().sqrt()
    net.hidden.weight /= scale
    net.hidden.bias /= scale
    net.head.weight *= scale


def save(net, path: Path, dtype) -> None:
    """Write the state dict as arrays of this type."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {k: v.numpy() for k, v in net.state_dict().items()}
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **{k: v.astype(dtype) if v.dtype == np.float32 else v for k, v in arrays.items()})


def main(argv=None) -> int:
    """Train, report, save; returns the exit code."""
    parser = make_parser("train_classifier.py", __doc__.splitlines()[0], ClassifierArgs)
    args = ClassifierArgs(**vars(parser.parse_args(argv)))
    recipe = RECIPES[args.classifier]
    epochs, output = args.epochs or recipe.epochs, Path(args.output or recipe.weights)
    with torch.device("meta"):  # draws no random numbers
        net = recipe.net()
    check_output_file("output", output, partial(has_arrays, names=net.state_dict().keys()))
    check_output_folder("output", output.parent, *images_of(args.classifier, args.data_path))
    if args.dry_run:
        print(recipe)
        return 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in a fixed order
    try:
        x, y = load_images(args.classifier, args.data_path)
        check_images(x, y, net, args.classifier)
        if args.held_out:
            rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(args.seed))
            held_out, kept = rows.tensor_split([math.ceil(len(x) / recipe.held_out)])
            net = train(x[kept], y[kept], epochs, args.seed, recipe)
            print(f"held-out accuracy {accuracy(net, x[held_out], y[held_out]):.2%} on {len(held_out)} images")
        if recipe.final or not args.held_out:
            net = train(x, y, epochs, args.seed, recipe)
        normalize_features(net, x)
        save(net, output, recipe.dtype)
    finally:
        torch.set_num_threads(threads)
    size = output.stat().st_size / 1000
    print(f"accuracy on all {len(x)} images {accuracy(net, x, y):.2%}; wrote {output} ({size:.0f} KB)")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
