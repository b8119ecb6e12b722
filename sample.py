"""Sample images from a checkpoint and measure them. `python sample.py --help` lists the flags.

OUT/<setting>/<index>.png, samples.npz, grid.png     the images, and the first of them as one picture
OUT/<setting>/trace.npz                              with --save_trace: how the first of them grew
OUT/results.jsonl                                    one line a setting: its whole configuration, all figures

With --edit_image and --edit_mask a part of a picture is kept and the rest generated, --num_images times
(docs/commands.md).

Comma lists (`--infer_mode baseline,policy --cfg 1,1.5 --seed 0,1,2`) sample every combination, the flag given last
changing fastest. What results.jsonl has already is skipped.
"""

import itertools
import json
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch

from engine_mar import evaluate
from heads.policy import load_heads
from models.int8 import fast_dtype, quantize
from models.loading import load_mar
from models.mar import MAR_CONFIGS
from sampling.editing import read_edit
from sampling.run import sample_images
from sampling.settings import FAST, SampleConfig
from sampling.trace import num_traced
from util import dist
from util.args import check_folder, check_values, defaults, flag, make_parser, pick, run_main
from util.checkpoint import checkpoint_path, load_checkpoint, weights_hash
from util.evaluation.metrics import metrics_line
from util.evaluation.protocol import EvalConfig, build_reference, protocol, protocol_line, reference_hash
from util.evaluation.results import append_result, find_result, git_commit, is_folder_name, read_results
from util.images.pictures import PNGFolder, is_whole, save_png
from util.rng import seed_of

GRID_ROWS, EDIT_COLUMNS = 5, 8
# flags that take a comma list
SWEEPS = ("infer_mode", "order", "group", "tau_schedule", "cfg_schedule", "cfg", "temperature", "num_iter")
SWEEPS += ("num_sampling_steps", "solver", "spacing", "order_noise", "order_base", "refresh_every", "seed")


@dataclass(frozen=True)
class SampleArgs:
    """Which checkpoint, which classes, where to."""

    checkpoint: str | None = flag(None, "folder or file of the checkpoint")
    output_dir: str | None = flag(None, "folder for images and results.jsonl")
    class_labels: str | None = flag(
        None, "comma list of class numbers, −1 = unconditional (default: all classes in turn)"
    )
    no_ema: bool = flag(False, "the raw weights instead of the averaged ones")
    fast: bool = flag(
        False,
        " ".join(f"--{k} {v}" for k, v in FAST.items())
        + ", and the --dtype that is fastest here; flags given by hand win",
    )
    seed: int = flag(0, "image i depends on (seed, i) only", low=0, high=2**63 - 1)
    data_path: str | None = flag(None, "folder of the reference images (default: the training data)")
    model: str | None = flag(
        None, "model size, for a published checkpoint, which does not carry it", choices=MAR_CONFIGS
    )
    diffloss_d: int | None = flag(None, "blocks of the diffusion MLP, for a published checkpoint", low=1)
    diffloss_w: int | None = flag(None, "width of the diffusion MLP, for a published checkpoint", low=1)
    vae_path: str | None = flag(None, "weights of the autoencoder (default: the checkpoint's)")
    edit_image: str | None = flag(
        None, "picture to keep a part of; makes one for each label unless --num_images is given"
    )
    edit_mask: str | None = flag(None, "picture of the same size, white where --edit_image is generated anew")
    device: str = flag("auto", "auto, cuda, mps, cpu")
    dtype: str | None = flag(
        None,
        "arithmetic (default: bf16 where CUDA has it, else fp32); int8: on CPUs, images depend a little on their batch",
        choices=dist.DTYPES,
    )
    deterministic: bool = flag(False, "the same bits in every run on the same machine (slower on GPUs)")
    compile: bool = flag(False, "compile the transformer blocks and the diffusion MLP")
    save_trace: int = flag(0, "of how many images of a setting trace.npz shall show the growth", low=0)
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


def editing_defaults(args: SampleArgs, given: dict, num_labels: int) -> dict:
    """What editing puts in the place of the checkpoint's settings: no metrics, a picture a label; {} without editing.

    Half of the two flags, or metrics asked for by hand, raise ValueError.
    """
    flags = {k: getattr(args, k) for k in ("edit_image", "edit_mask")}
    missing = [k for k, v in flags.items() if v is None]
    if len(missing) == 1:
        raise ValueError(f"--edit_image and --edit_mask go together: --{missing[0]} is missing")
    if missing:
        return {}
    if given.get("metrics", "none") != "none":
        raise ValueError(f"--metrics {given['metrics']} has no meaning for edited pictures, use none or leave it out")
    return dict(metrics="none", num_images=num_labels)


def stored_evaluation(config: dict, given: dict) -> dict:
    """The evaluation settings in a checkpoint's config, but for its reference where flags name another one."""
    named = given.keys() & {"data_path", "eval_split", "fid_stats"}
    return {k: v for k, v in config["eval"].items() if not named or k not in ("eval_split", "fid_stats")}


def report(row: dict, folder: Path) -> None:
    """Print a result for people: measured how, how many, how fast, how good, where the picture is."""
    if "protocol" in row:  # older lines have none
        print(protocol_line(row["protocol"]))
    speed = f", {row['images_per_second']:.1f} images/s" if row["images_per_second"] else " already"
    print(f"{row['settings']['num_images']} images in {folder}{speed}")
    for name in ("redone_fp32", "not_finite", "one_colour"):
        if row.get(name):
            print(f"{name}: {row[name]} of the {row['num_made']} images made")
    print(metrics_line(row["metrics"]) or "no metrics asked for")
    print(f"picture: {folder / 'grid.png'}")


@dataclass
class Setting:
    """One point of the grid: how it is sampled, and what identifies it."""

    seed: int
    sampling: SampleConfig
    name: str = ""  # of its folder
    row: dict = field(default_factory=dict)  # of results.jsonl, before anything is measured
    present: dict | None = None  # the finished row, where results.jsonl has it already


def span(given: dict, base: dict) -> list[Setting]:
    """All combinations of the comma lists among the flags given, in their order; base has the values of the others."""
    lists = {k: v for k, v in given.items() if k in SWEEPS}
    grid = [dict(zip(lists, values)) for values in itertools.product(*lists.values())]
    return [
        Setting(point.get("seed", SampleArgs.seed), pick(SampleConfig, {**base, **point}).resolved()) for point in grid
    ]


def name_settings(settings: list[Setting], suffix: str) -> None:
    """Give each setting its folder name; two with the same one (numbers alike in 6 digits) raise ValueError."""
    for setting in settings:
        setting.name = f"{setting.sampling.name()}_seed{setting.seed}{suffix}"
    names = [setting.name for setting in settings]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two settings of the sweep would share the folder {name}: their values are too close")


def arithmetic(args: SampleArgs, mar) -> tuple[torch.device, torch.dtype]:
    """Where and in what to compute; for int8 the model's layers are replaced."""
    device = dist.pick_device(args.device)
    name = args.dtype
    if args.fast and name is None:
        name = fast_dtype(device, mar.config.decoder_embed_dim)
        if dist.is_main():
            print(f"--fast computes in {name} here, --dtype would say otherwise")
    dtype = dist.pick_dtype(name, device)
    if dtype == torch.int8:
        quantize(mar)
    return device, dtype


def find_present(settings: list[Setting], results: Path, shared: dict, hashes: dict) -> None:
    """Make the row of each setting, and find it in the results file if it is there."""
    # read once, before anything is sampled: so all processes see the same
    done = [row for row in read_results(results) if is_folder_name(row.get("name"))]
    for setting in settings:
        setting.row = {"settings": {**asdict(setting.sampling), **shared, "seed": setting.seed}, **hashes}
        setting.present = find_result(done, setting.row)


def show(args: SampleArgs, given: dict, settings: list[Setting], evaluation: EvalConfig, config: dict) -> None:
    """Print the resolved configuration as JSON; a swept flag has the list of its values."""
    values = {**asdict(args), "seed": settings[0].seed, **asdict(settings[0].sampling), **asdict(evaluation)}
    values |= {k: v for k, v in given.items() if k in SWEEPS and len(v) > 1}
    print(json.dumps({**values, "settings": [s.name for s in settings], "config": config}, indent=2))


def run(args: SampleArgs, given: dict) -> int:
    """Sample and measure all settings, one after the other; all of them are checked before the first is sampled."""
    sizes = {k: getattr(args, k) for k in ("model", "diffloss_d", "diffloss_w", "vae_path")}
    content = load_checkpoint(args.checkpoint)
    mar, tokenizer, config = load_mar(content, ema=not args.no_ema, **sizes)
    heads = load_heads(content, ema=not args.no_ema)
    del content  # the optimizer's tensors are large
    for kind, key in ((SampleConfig, "sample"), (EvalConfig, "eval")):
        check_values(kind, config[key], f"the checkpoint {args.checkpoint}")  # names of folders are made of them
    base = {**defaults(SampleConfig, EvalConfig), **config["sample"], **stored_evaluation(config, given)}
    classes = config["data"]["classes"]
    class_labels = parse_labels(args.class_labels, len(classes))
    base |= editing_defaults(args, given, len(class_labels))
    if args.fast:
        base |= FAST
    base |= {k: v for k, v in given.items() if k not in SWEEPS}
    settings, evaluation = span(given, base), pick(EvalConfig, base).resolved()
    suffix = f"_n{evaluation.num_images}" + ("_no_ema" if args.no_ema else "")
    if class_labels != list(range(len(classes))):
        suffix += f"_classes{seed_of(class_labels):08x}"  # a checksum: the list may be too long for a file name
    edit = None
    if args.edit_image is not None and not args.dry_run:  # which reads no data
        cell = mar.config.vae_stride * mar.config.patch_size
        sizes = dict(img_size=mar.config.img_size, channels=tokenizer.image_channels, cell=cell)
        edit = read_edit(args.edit_image, args.edit_mask, **sizes)
        suffix += f"_edit{seed_of(*edit.hashes.values()):08x}"
    if args.dry_run:
        name_settings(settings, suffix)
        show(args, given, settings, evaluation, config)
        return 0
    device, dtype = arithmetic(args, mar)
    dtype_name = dist.dtype_name(dtype)
    name_settings(settings, suffix + (f"_{dtype_name}" if dtype != torch.float32 else ""))
    for setting in settings:
        setting.sampling.rules(heads)  # a missing head or file is found before the work, not after it
    check_folder("output_dir", args.output_dir)
    data, source, img_size = config["data"]["name"], args.data_path or config["data"]["path"], config["mar"]["img_size"]
    with dist.main_first():
        reference = build_reference(evaluation, data, source, img_size)
        evaluation.check(reference, img_size)
    shared = dict(asdict(evaluation), class_labels=class_labels, ema=not args.no_ema, dtype=dtype_name)
    shared |= edit.hashes if edit else {}
    hashes = {"weights": weights_hash({**mar.state_dict(), **(heads.state_dict() if heads else {})})}
    hashes["reference"] = reference_hash(reference) if reference is not None else None
    hashes["tokenizer"] = tokenizer.describe()
    find_present(settings, Path(args.output_dir) / "results.jsonl", shared, hashes)
    labels = [class_labels[i % len(class_labels)] for i in range(evaluation.num_images)]
    data = f"{data} {source}" if source else data
    kind = "editing" if edit else "generation"
    how = protocol(kind, evaluation, labels, reference, data, ema=not args.no_ema, dtype=dtype_name)
    model = mar.to(device), tokenizer.to(device)
    if args.compile:
        mar.compile_parts()
    where = dict(device=device, dtype=dtype, heads=heads.to(device) if heads else None, edit=edit)
    for i, setting in enumerate(settings, start=1):
        if dist.is_main() and len(settings) > 1:
            print(f"setting {i} of {len(settings)}: {setting.name}", flush=True)
        run_setting(args, setting, model, evaluation, reference, classes, how, **where)
    return 0


def save_grid(folder: Path, labels: list[int], classes: list[str], columns: int, edit) -> None:
    """grid.png: the first images with the names of their classes, and what was given to edit."""
    captions = [classes[label] if label >= 0 else "any" for label in labels[: GRID_ROWS * columns]]
    save_png(folder / "grid.png", PNGFolder(folder, len(labels)).grid(captions, columns, edit and edit.grid))


def run_setting(args, setting: Setting, model, evaluation, reference, classes: list[str], how: dict, **where) -> None:
    """Sample one setting, measure it, append its line; of one that is present make what is missing of its files."""
    out, class_labels = Path(args.output_dir), setting.row["settings"]["class_labels"]
    folder, results = out / (setting.present or {"name": setting.name})["name"], out / "results.jsonl"
    labels = [class_labels[i % len(class_labels)] for i in range(evaluation.num_images)]
    to_trace, columns = min(args.save_trace, len(labels)), min(len(class_labels), 10)
    if edit := where["edit"]:  # the classes below each other, where they fit
        columns = EDIT_COLUMNS // columns * columns or EDIT_COLUMNS
    if setting.present is not None:
        if num_traced(folder / "trace.npz") < to_trace or not is_whole(folder, setting.row["weights"], len(labels)):
            options = dict(batch_size=evaluation.eval_bsz, num_traced=to_trace, **where)
            sample_images(*model, setting.sampling, labels, setting.seed, folder, **options)
            if dist.is_main():
                PNGFolder(folder, len(labels)).save_npz(labels)
                save_grid(folder, labels, classes, columns, edit)
        if dist.is_main():
            print(f"{setting.name}: already in {results}")
            report(setting.present, folder)
        return
    where["num_traced"] = to_trace
    found = evaluate(*model, setting.sampling, evaluation, reference, labels, setting.seed, folder, **where)
    if dist.is_main():
        save_grid(folder, labels, classes, columns, edit)
        row = setting.row | dict(found, kind=how["kind"], protocol=how, name=setting.name)
        row |= dict(checkpoint=str(checkpoint_path(args.checkpoint)))
        row |= dict(device=where["device"].type, world_size=dist.world_size(), git_commit=git_commit())
        append_result(results, row)
        report(row, folder)


def main(argv=None) -> int:
    """Parse, sample; returns the exit code."""
    given = vars(make_parser("sample.py", __doc__.splitlines()[0], *CONFIGS, sweep=SWEEPS).parse_args(argv))
    args = SampleArgs(**{f.name: given[f.name] for f in fields(SampleArgs) if f.name in given.keys() - set(SWEEPS)})
    for name in ("checkpoint", "output_dir"):
        if getattr(args, name) is None and not (args.dry_run and name == "output_dir"):
            raise ValueError(f"--{name} is needed")
    try:
        if not args.dry_run:
            dist.set_deterministic(args.deterministic)
            dist.init(dist.pick_device(args.device))
        return run(args, given)
    finally:
        dist.shutdown()


if __name__ == "__main__":
    sys.exit(run_main(main))
