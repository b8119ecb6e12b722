"""Canvases of digits sampled in three shapes: which share of them shows what was asked for, and a picture.

    python scripts/demo_shapes.py --output_dir DIR --tokenizer diffusers:DIR/tokenizer/autoencoder

DIR/samples_<size>/<setting>/samples.npz    what sample.py --img_size <size> has made, of each size one setting
DIR/accuracy.json                           of each size the share of canvases, and of digits at each place
DIR/shapes.png                              the first canvases of each class and size

A canvas of class c shows c and, where it has a second place, the digit after it, 0 after 9. A support vector classifier
of the real digits reads them. With --tokenizer the share of real canvases that it reads rightly, once these are encoded
and decoded, stands beside. scripts/demo_shapes.sh runs all of it.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from models.tokenizers import tokenizer_of
from util.args import check_folder, flag, run_with
from util.checkpoint import atomic_file
from util.door import run_main
from util.images.datasets import CANVASES, build_dataset
from util.images.pictures import load_samples, save_png, to_uint8
from util.sizes import sides

SIDE = 8  # pixels of a digit
ZOOM, GAP, COLUMNS = 4, 4, 10


@dataclass(frozen=True)
class ShapesArgs:
    """The flags."""

    output_dir: str = flag("output_dir/demo_shapes", "folder with the samples, for figures and picture")
    tokenizer: str | None = flag(None, "that of the model, to measure what it leaves of real canvases")
    dry_run: bool = flag(False, "print the resolved configuration and stop")


def samples_of(folder: Path, size) -> tuple[np.ndarray, np.ndarray]:
    """(images uint8 (n, H, W, 1), labels (n,)) of a size; none, several settings or another size raise ValueError."""
    name = f"samples_{'x'.join(map(str, sides(size)))}"
    settings = sorted((folder / name).glob("*/samples.npz"))
    if len(settings) != 1:
        raise ValueError(f"--output_dir {folder}: {name} must hold the samples of one setting, it has {len(settings)}")
    samples = load_samples(settings[0])
    if samples["images"].shape[1:] != (*sides(size), 1):
        raise ValueError(f"{settings[0]} holds images {samples['images'].shape[1:]}, expected {(*sides(size), 1)}")
    return samples["images"], samples["labels"]


def digits_on(images: np.ndarray) -> np.ndarray:
    """(places, n, 8, 8) of canvases (n, H, W, 1), row by row."""
    n, height, width, _ = images.shape
    cells = images.reshape(n, height // SIDE, SIDE, width // SIDE, SIDE)
    return cells.transpose(1, 3, 0, 2, 4).reshape(-1, n, SIDE, SIDE)


def measure(images: np.ndarray, labels: np.ndarray, real) -> dict[str, float]:
    """The share of canvases on which all is right, "canvas", and that of the digits at each place, "first", "second".

    real: (images, labels) of digits, which the classifier learns from.
    """
    from sklearn.svm import SVC

    pixels, classes = real
    reader = SVC(kernel="rbf", gamma="scale").fit(pixels.reshape(len(pixels), -1) / 127.5 - 1, classes)
    places = digits_on(images)
    read = np.stack([reader.predict(place.reshape(len(place), -1) / 127.5 - 1) for place in places])
    right = read == (labels + np.arange(len(places))[:, None]) % 10
    names = dict(zip(("first", "second"), right.mean(axis=1).tolist()))
    return {"canvas": float(right.all(axis=0).mean()), **names}


def decoded(tokenizer, size, num_images: int) -> tuple[np.ndarray, np.ndarray]:
    """(images uint8 (n, H, W, 1), labels (n,)) of the first real canvases of a size, after a tokenizer of ids."""
    real = build_dataset("canvases", img_size=size)
    ids = tokenizer.encode_ids(real.images[:num_images].float() / 127.5 - 1)
    return to_uint8(tokenizer.decode_ids(ids)), real.labels[:num_images].numpy()


def sheet(images: np.ndarray) -> np.ndarray:
    """Canvases (n, H, W, 1) side by side and, from COLUMNS on, below each other: uint8 (H', W', 1) on white."""
    n, height, width, _ = images.shape
    cell_h, cell_w = ZOOM * height + GAP, ZOOM * width + GAP
    rows = -(-n // COLUMNS)
    paper = np.full((rows * cell_h, min(n, COLUMNS) * cell_w, 1), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = i // COLUMNS * cell_h, i % COLUMNS * cell_w
        paper[y : y + cell_h - GAP, x : x + cell_w - GAP] = np.kron(image, np.ones((ZOOM, ZOOM, 1), np.uint8))
    return paper


def picture(sets: list[np.ndarray]) -> np.ndarray:
    """The sheets of several sets of canvases below each other, uint8 (H, W, 1)."""
    sheets = [sheet(images) for images in sets]
    width = max(part.shape[1] for part in sheets)
    padded = [np.pad(part, ((0, 3 * GAP), (0, width - part.shape[1]), (0, 0)), constant_values=255) for part in sheets]
    return np.concatenate(padded)


def run(args: ShapesArgs) -> int:
    """Read the samples, print a table, write figures and picture."""
    folder, digits = Path(args.output_dir), build_dataset("digits")
    real = (digits.images[:, 0].numpy(), digits.labels.numpy())
    samples = {size: samples_of(folder, size) for size in CANVASES}
    tokenizer = None if args.tokenizer is None else tokenizer_of(dict(tokenizer=args.tokenizer), digits.channels)
    result = {}
    head = "| canvas | samples | all as asked | first digit | second digit | real ones, decoded: all |"
    print(f"{head}\n| --- | ---: | ---: | ---: | ---: | ---: |")
    for size, (images, labels) in samples.items():
        name = "{}×{}".format(*sides(size))
        result[name] = measure(images, labels, real)
        if tokenizer is not None:
            result[name]["decoded"] = measure(*decoded(tokenizer, size, len(labels)), real)["canvas"]
        shares = [result[name].get(key) for key in ("canvas", "first", "second", "decoded")]
        print(f"| {name} | {len(labels)} | " + " | ".join("–" if s is None else f"{s:.1%}" for s in shares) + " |")
    save_png(folder / "shapes.png", picture([images[:10] for images, _ in samples.values()]))
    with atomic_file(folder / "accuracy.json") as temporary:
        temporary.write_text(json.dumps(result, indent=2))
    return 0


def check(args: ShapesArgs) -> None:
    """Raise ValueError for a place that cannot be used."""
    check_folder("output_dir", args.output_dir)


def main(argv=None) -> int:
    """Parse, measure; returns the exit code."""
    return run_with(run, ShapesArgs, "demo_shapes.py", __doc__.splitlines()[0], argv, check)


if __name__ == "__main__":
    sys.exit(run_main(main))
