"""Sample images from a checkpoint and measure them. `python sample.py --help` lists the flags.

OUT/<setting>/<index>.png, samples.npz, grid.png     the images, and the first of them as one picture
OUT/results.jsonl                                    one line a setting: its whole configuration, all figures
"""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from engine_mar import evaluate
from heads.policy import SampleConfig
from models.loading import load_mar
from models.mar import MAR_CONFIGS
from util import dist
from util.args import check_folder, defaults, flag, make_parser, pick, run_main
from util.checkpoint import checkpoint_path, weights_hash
from util.data import build_dataset
from util.evaluation import EvalConfig, reference_hash
from util.images import PNGFolder, save_png
from util.metrics import metrics_line
from util.rng import seed_of

GRID_ROWS = 5


@dataclass(frozen=True)
class SampleArgs:
    """Which checkpoint, which classes, where to."""

    checkpoint: str | None = flag(None, "folder or file of the checkpoint")
    output_dir: str | None = flag(None, "folder for images and results.jsonl")
    class_labels: str | None = flag(
        None, "comma list of class numbers, −1 = unconditional (default: all classes in turn)"
    )
    no_ema: bool = flag(False, "the raw weights instead of the averaged ones")
    seed: int = flag(0, "image i depends on (seed, i) only", low=0, high=2**63 - 1)
    data_path: str | None = flag(None, "folder of the reference images (default: the training data)")
    model: str | None = flag(
        None, "model size, for a published checkpoint, which does not carry it", choices=MAR_CONFIGS
    )
    diffloss_d: int | None = flag(None, "blocks of the diffusion MLP, for a published checkpoint", low=1)
    diffloss_w: int | None = flag(None, "width of the diffusion MLP, for a published checkpoint", low=1)
    vae_path: str | None = flag(None, "weights of the autoencoder (default: the checkpoint's)")
    device: str = flag("auto", "auto, cuda, mps, cpu")
    dtype: str | None = flag(None, "arithmetic (default: bf16 where CUDA has it, else fp32)", choices=dist.DTYPES)
    dry_run: bool = flag(False, "print the resolved configuration and stop")


CONFIGS = (SampleArgs, SampleConfig, EvalConfig)


def parse_labels(text: str | None, num_classes: int) -> list[int]:
    """The class numbers in the comma list; all classes for None."""
    if text is None:
        return list(range(num_classes))
    try:
        labels = [int(part) for part in text.split(",")]
    except ValueError:
        labels = [num_classes]
    if any(not -1 <= label < num_classes for label in labels):
        raise ValueError(
            f"--class_labels must be numbers from -1 to {num_classes - 1} with commas between, got {text!r}"
        )
    return labels


def git_commit() -> str | None:
    """The commit of this repository, None outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def read_results(path: Path) -> list[dict]:
    """The lines of a results file; a last line cut short by a crash is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def append_result(path: Path, row: dict) -> None:
    """Add one line; where a crash cut the last one short, after a new line."""
    text = path.read_text() if path.is_file() else ""
    with open(path, "a") as file:
        file.write(("" if not text or text.endswith("\n") else "\n") + json.dumps(row) + "\n")


def report(row: dict, folder: Path) -> None:
    """Print a result for people: how many, how fast, how good, where the picture is."""
    print(f"{row['settings']['num_images']} images in {folder}, {row['images_per_second']:.1f} images/s")
    print(metrics_line(row["metrics"]) or "no metrics asked for")
    print(f"picture: {folder / 'grid.png'}")


def run(args: SampleArgs, given: dict) -> int:
    """Sample one setting, measure it, append its line."""
    sizes = {k: getattr(args, k) for k in ("model", "diffloss_d", "diffloss_w", "vae_path")}
    mar, tokenizer, config = load_mar(args.checkpoint, ema=not args.no_ema, **sizes)
    values = {**defaults(SampleConfig, EvalConfig), **config["sample"], **config["eval"], **given}
    sampling, evaluation = pick(SampleConfig, values), pick(EvalConfig, values)
    classes = config["data"]["classes"]
    class_labels = parse_labels(args.class_labels, len(classes))
    if args.dry_run:
        print(json.dumps({**asdict(args), **asdict(sampling), **asdict(evaluation), "config": config}, indent=2))
        return 0
    sampling.rules()  # a missing head or file is found before the work, not after it
    check_folder("output_dir", args.output_dir)
    reference = None
    if evaluation.metric_names:
        source = args.data_path or config["data"]["path"]
        with dist.main_first():
            reference = build_dataset(config["data"]["name"], data_path=source, img_size=config["mar"]["img_size"])
            evaluation.check(len(reference))
    device = dist.pick_device(args.device)
    dtype = dist.pick_dtype(args.dtype, device)

    labels = [class_labels[i % len(class_labels)] for i in range(evaluation.num_images)]
    settings = dict(asdict(sampling), **asdict(evaluation), class_labels=class_labels, seed=args.seed)
    settings |= dict(ema=not args.no_ema, dtype=next(name for name, kind in dist.DTYPES.items() if kind == dtype))
    row = {"settings": settings, "weights": weights_hash(mar.state_dict())}
    row["reference"] = reference_hash(reference) if reference is not None else None
    name = f"{sampling.name()}_seed{args.seed}_n{evaluation.num_images}"
    name += "_no_ema" if args.no_ema else ""
    if class_labels != list(range(len(classes))):
        name += f"_classes{seed_of(class_labels):08x}"  # a checksum: the list itself may be too long for a file name
    out = Path(args.output_dir)
    folder, results = out / name, out / "results.jsonl"
    present = next((r for r in read_results(results) if all(r.get(k) == v for k, v in row.items())), None)
    if present is not None:
        if dist.is_main():
            print(f"{name}: already in {results}")
            report(present, out / present["name"])
        return 0

    mar, tokenizer, where = mar.to(device), tokenizer.to(device), dict(device=device, dtype=dtype)
    found = evaluate(mar, tokenizer, sampling, evaluation, reference, labels, args.seed, folder, **where)
    if dist.is_main():
        columns = min(len(class_labels), 10)
        captions = [classes[label] if label >= 0 else "any" for label in labels[: GRID_ROWS * columns]]
        save_png(folder / "grid.png", PNGFolder(folder, len(labels)).grid(captions, columns))
        row |= dict(found, name=name, checkpoint=str(checkpoint_path(args.checkpoint)), device=device.type)
        append_result(results, row | dict(world_size=dist.world_size(), git_commit=git_commit()))
        report(row, folder)
    return 0


def main(argv=None) -> int:
    """Parse, sample; returns the exit code."""
    given = vars(make_parser("sample.py", __doc__.splitlines()[0], *CONFIGS).parse_args(argv))
    args = SampleArgs(**{f.name: given.get(f.name, f.default) for f in fields(SampleArgs)})
    for name in ("checkpoint", "output_dir"):
        if getattr(args, name) is None and not (args.dry_run and name == "output_dir"):
            raise ValueError(f"--{name} is needed")
    try:
        if not args.dry_run:
            dist.init(dist.pick_device(args.device))
        return run(args, given)
    finally:
        dist.shutdown()


if __name__ == "__main__":
    sys.exit(run_main(main))
