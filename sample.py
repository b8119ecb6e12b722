"""Sample images from a checkpoint and measure them. `python sample.py --help` lists the flags.

OUT/<setting>/<index>.png, samples.npz, grid.png     the images, all in one file, and the first as one picture
OUT/<setting>/trace.npz                              with --save_trace: how the first of them grew
OUT/results.jsonl                                    one line a setting: its whole configuration, all figures

With --edit_image and --edit_mask a part of a picture is kept and the rest generated, --num_images times
(docs/commands.md).

Comma lists (`--infer_mode baseline,policy --cfg 1,1.5 --seed 0,1,2`) sample every combination, the flag given last
changing fastest. What results.jsonl has already is skipped.
"""

import json
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

from engine_mar import evaluate
from heads.policy import load_heads
from heads.schedules import needed_steps
from models.families import takes_any_size
from models.loading import find_places, looked_for
from models.low_precision import fast_dtype, prepare
from models.text import reads_text
from sampling.editing import Edit, editing_defaults, open_edit
from sampling.grid import SWEEPS, Setting, name_settings, settings_of, span, unset_settings
from sampling.prefix import PrefixArgs, check_prefix_flags, open_prefix
from sampling.prompts import check_asked, open_prompts
from sampling.run import Parts, claim_folder, full_disk_named, identity, own_folder, sample_images, size_of_images
from sampling.settings import FAST, SampleConfig, check_read, note_top_k
from sampling.trace import num_traced
from training.config import DataConfig
from util import dist
from util.args import check_folder, check_values, defaults, flag, make_parser, pick
from util.checkpoint import checkpoint_path, load_checkpoint
from util.door import run_main
from util.evaluation.protocol import EvalConfig, build_reference, classifier_hashes, protocol, reference_hashes
from util.evaluation.results import append_result, find_result, git_commit, read_named, report
from util.images.folders import check_output_folder
from util.images.pictures import PNGFolder, is_whole, load_samples, save_png
from util.images.reading import Reading, stored_reading
from util.rng import DEFAULT_SEED, seed_of

__all__ = ["load_samples", "main"]  # the samples of a setting's folder: images and labels

GRID_ROWS, EDIT_COLUMNS = 5, 8


@dataclass(frozen=True)
class SampleArgs(PrefixArgs):
    """Which checkpoint, which classes, where to."""

    checkpoint: str | None = flag(None, "folder or file of the checkpoint")
    output_dir: str | None = flag(None, "folder for images and results.jsonl")
    class_labels: str | None = flag(
        None, "comma list of class numbers, −1 = unconditional (default: all classes in turn)"
    )
    prompts: str | None = flag(
        None,
        "of a model of text: a prompt, a file of them (.csv, .jsonl: caption), or a folder of scripts/cache_text.py",
    )
    text_encoder: str | None = flag(None, "folder of the T5 encoder for prompts (default: the one trained with)")
    fast: bool = flag(
        False,
        " ".join(f"--{k} {v}" for k, v in FAST.items())
        + ", and the --dtype that is fastest here; flags given by hand win",
    )
    seed: int = flag(DEFAULT_SEED, "image i depends on (seed, i) only", low=0, high=2**63 - 1)
    data_path: str | None = flag(None, "folder of the reference images (default: the training data)")
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
    settings_of: str | None = flag(None, "results.jsonl: the settings of its lines, where flags do not say otherwise")
    save_trace: int = flag(0, "of how many images of a setting trace.npz shall show the growth", low=0)
    dry_run: bool = flag(False, "print the resolved configuration and stop; without --checkpoint that of the flags")


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


def stored_evaluation(config: dict, given: dict) -> dict:
    """The evaluation settings in a checkpoint's config, but for its reference where flags name another one."""
    named = given.keys() & {"data_path", "eval_split", "fid_stats"}
    return {k: v for k, v in config["eval"].items() if not named or k not in ("eval_split", "fid_stats")}


def keep_apart(settings: list[Setting], sweep: "Sweep") -> None:
    """Give each setting the name of its `own_folder`; a name that no folder can have raises ValueError."""
    rows, parent = read_named(sweep.results), sweep.results.parent
    for setting in settings:
        setting.name = own_folder(parent / setting.name, sweep.parts, rows).name
        check_folder("output_dir", str(parent / setting.name))


def arithmetic(args: SampleArgs, width: int) -> tuple[torch.device, torch.dtype]:
    """Where and in what to compute with a model whose z has this width."""
    device = dist.pick_device(args.device)
    name = args.dtype
    if args.fast and name is None:
        name = fast_dtype(device, width)
        if dist.is_main() and not args.dry_run:
            print(f"--fast computes in {name} here, --dtype would say otherwise")
    return device, dist.pick_dtype(name, device)


@dataclass(frozen=True)
class Sweep:
    """What all settings of a run share."""

    parts: Parts
    evaluation: EvalConfig
    class_labels: list[int]
    classes: list[str]  # their names, or the prompts
    edit: Edit | None
    args: SampleArgs
    data: str  # name and place of the reference's data set

    @property
    def labels(self) -> list[int]:
        """Of image after image."""
        return [self.class_labels[i % len(self.class_labels)] for i in range(self.evaluation.num_images)]

    @property
    def suffix(self) -> str:
        """What a folder's name says of all this."""
        suffix = f"_n{self.evaluation.num_images}" + ("_no_ema" if self.args.no_ema else "")
        if reads_text(self.parts.model):
            suffix += f"_prompts{self.parts.model.prompts.content[:8]}"
        elif self.class_labels != list(range(len(self.classes))):
            suffix += f"_classes{seed_of(self.class_labels):08x}"  # the list may be too long for a file name
        if self.args.edit_image is not None:
            suffix += "_edit" + (f"{seed_of(*self.edit.hashes.values()):08x}" if self.edit else 8 * "?")
        if self.args.img_size is not None and takes_any_size(self.parts.model.config):
            suffix += f"_{self.args.img_size}px"
        if self.parts.prefix is not None:
            suffix += "_prefix{prefix_share:g}-{prefix}".format(**self.parts.prefix.hashes)
        if self.parts.dtype != torch.float32:
            suffix += f"_{dist.dtype_name(self.parts.dtype)}"
        return suffix

    def rows(self, settings: list[Setting], reference) -> None:
        """Make the row of each setting, and find it in the results file if it has been measured."""
        shared = dict(asdict(self.evaluation), class_labels=self.class_labels, ema=not self.args.no_ema)
        shared |= dict(dtype=dist.dtype_name(self.parts.dtype), **identity(self.parts, self.edit))
        unset = unset_settings() | ({} if self.args.img_size else size_of_images(self.parts.model))
        hashes = {"weights": self.parts.weights_hash(), **reference_hashes(reference)}
        hashes |= classifier_hashes(self.evaluation)
        hashes["tokenizer"] = self.parts.tokenizer.describe()
        # read once, before anything is sampled: so all processes see the same
        done = read_named(self.results)
        for setting in settings:
            setting.row = {"settings": {**asdict(setting.sampling), **shared, "seed": setting.seed}, **hashes}
            setting.present = find_result(done, setting.row, unset)

    @property
    def results(self) -> Path:
        """The file that results are appended to."""
        return Path(self.args.output_dir) / "results.jsonl"

    def protocol(self, reference) -> dict:
        """What the figures are to be quoted with."""
        options = dict(ema=not self.args.no_ema, dtype=dist.dtype_name(self.parts.dtype))
        options["of_text"] = reads_text(self.parts.model)
        result = "editing" if self.edit else "generation"
        return protocol(result, self.evaluation, self.labels, reference, self.data, **options)


def show(sweep: Sweep, given: dict, settings: list[Setting], config: dict) -> None:
    """Print the resolved configuration as JSON; a swept flag has the list of its values."""
    shown = {**asdict(sweep.args), "seed": settings[0].seed, **asdict(settings[0].sampling), **asdict(sweep.evaluation)}
    shown |= {k: v for k, v in given.items() if k in SWEEPS and len(v) > 1}
    print(json.dumps({**shown, "settings": [s.name for s in settings], "config": config}, indent=2))


def stored_defaults(config: dict, args: SampleArgs, given: dict, num_labels: int) -> tuple[SampleConfig, EvalConfig]:
    """How a checkpoint's config says to sample and to evaluate, where flags given by hand do not say otherwise.

    num_labels: how many classes or prompts are asked for. Of each prompt there is an image, and no metrics.
    """
    for settings_type, key in ((SampleConfig, "sample"), (EvalConfig, "eval")):
        check_values(settings_type, config[key], f"the checkpoint {args.checkpoint}")  # folder names are made of them
    base = {**defaults(SampleConfig, EvalConfig), **config["sample"], **stored_evaluation(config, given)}
    base |= dict(metrics="none", num_images=num_labels) if args.prompts is not None else {}
    base |= editing_defaults(args.edit_image, args.edit_mask, given, num_labels)
    base |= (FAST if args.fast else {}) | {k: v for k, v in given.items() if k not in SWEEPS}
    return pick(SampleConfig, base), pick(EvalConfig, base).resolved()


def all_settings(args: SampleArgs, given: dict, base: SampleConfig, *of_model) -> list[Setting]:
    """What the flags span, see `span`; of each line of --settings_of, where that is given."""
    settings = []
    for point in settings_of(args.settings_of, given):
        settings += span(given, replace(base, **point), *of_model)
    check_read(given, [setting.sampling for setting in settings])
    return settings


def show_flags(args: SampleArgs, given: dict) -> None:
    """Check what flags say whatever the checkpoint is, and print it: --dry_run before there is a checkpoint."""
    base, evaluation = stored_defaults({"sample": {}, "eval": {}}, args, given, num_labels=1)
    settings = all_settings(args, given, base, {})
    if evaluation.metric_names:
        evaluation.check_count(evaluation.num_images)
    shown = {**asdict(args), **asdict(settings[0].sampling), **asdict(evaluation), **given}
    print(json.dumps(shown, indent=2))


def reference_reading(data: dict, data_path: str | None) -> Reading:
    """How the images of the reference are read: as in training, data being the checkpoint's; data_path: the flag."""
    reading = stored_reading(data.get("reading"))
    if data_path and reading.split_dir and not (Path(data_path) / reading.split_dir).is_dir():
        return replace(reading, split_dir=None)  # another folder, with a layout of its own
    return reading


def check_output(args: SampleArgs, config: dict) -> None:
    """Raise ValueError where the images cannot or must not be written: among those trained on, and the reference's."""
    data = config["data"]
    trained_on = DataConfig(data=data["name"], data_path=data["path"]).place
    for images in (trained_on, args.data_path or trained_on):
        split_dir = reference_reading(data, images).split_dir
        check_output_folder("output_dir", args.output_dir, data["name"], images, split_dir)


def open_reference(evaluation: EvalConfig, config: dict, args: SampleArgs, source: str | None, img_size: int):
    """What the metrics compare with, checked; where a path of the checkpoint's is nowhere, the error says where not."""
    reading = reference_reading(config["data"], args.data_path)
    try:
        reference = build_reference(evaluation, config["data"]["name"], source, img_size, reading)
        evaluation.check(reference, img_size)
    except ValueError as error:
        raise ValueError(f"{error}{looked_for(error, find_places(config, args.checkpoint)[1])}") from None
    return reference


def run(args: SampleArgs, given: dict) -> int:
    """Sample and measure all settings, one after the other; all of them are checked before the first is sampled."""
    content = load_checkpoint(args.checkpoint)
    model, tokenizer, config = args.load(content, args.checkpoint)
    heads = load_heads(content, ema=not args.no_ema)
    del content  # the optimizer's tensors are large
    check_asked(config, args.prompts, args.text_encoder, args.class_labels)
    check_prefix_flags(args, args.edit_image)
    prefix = None if args.prefix_from is None else open_prefix(args, model, tokenizer, config)
    classes = config["data"]["classes"]
    if args.prompts is not None:
        model.prompts = open_prompts(args.prompts, args.text_encoder, config, args.dry_run)
        classes = model.prompts.captions
    class_labels = parse_labels(args.class_labels, len(classes))
    base, evaluation = stored_defaults(config, args, given, len(class_labels))
    settings = all_settings(args, given, base, model.fixed_rules, heads is not None, needed_steps(model))
    edit = open_edit(args.edit_image, args.edit_mask, model.config, tokenizer.image_channels, args.dry_run)
    if edit is not None:
        edit.check(model.fixed_rules)
    own = str(checkpoint_path(args.checkpoint).resolve())
    device, dtype = arithmetic(args, model.width)
    for part in filter(None, (model, tokenizer, heads, prefix and prefix.model)):
        part.to(device)
    parts = Parts(model, tokenizer, device, dtype, heads, own, prefix)
    data, source = config["data"]["name"], args.data_path or config["data"]["path"]
    place = f"{data} {source}" if source else data
    sweep = Sweep(parts, evaluation, class_labels, classes, edit, args, place)
    name_settings(settings, sweep.suffix)
    if args.output_dir is not None:
        check_output(args, config)
        keep_apart(settings, sweep)
    if args.dry_run:
        show(sweep, given, settings, config)
        return 0
    for setting in settings:
        if args.save_trace and setting.sampling.smooth:
            raise ValueError("--save_trace shows ids as they are drawn, --smooth mixes them: give one of the two")
        # what cannot be sampled is an error before the work, not after it
        setting.sampling.check(model, heads)
    note_top_k([setting.sampling for setting in settings], model)
    networks = [model] + ([prefix.model] if prefix else [])
    for network in networks:
        prepare(network, parts.dtype)
    with dist.main_first():
        reference = open_reference(evaluation, config, args, source, model.config.img_size)
    sweep.rows(settings, reference)
    if args.compile:
        for network in networks:
            network.compile_parts()
    for i, setting in enumerate(settings, start=1):
        if dist.is_main() and len(settings) > 1:
            print(f"setting {i} of {len(settings)}: {setting.name}", flush=True)
        with full_disk_named(sweep.results.parent):
            run_setting(sweep, setting, reference)
    return 0


def save_grid(sweep: Sweep, folder: Path) -> None:
    """grid.png: the first images with the names of their classes, and what was given to edit."""
    columns, edit = min(len(sweep.class_labels), 10), sweep.edit
    if edit is not None:  # the classes below each other, where they fit
        columns = EDIT_COLUMNS // columns * columns or EDIT_COLUMNS
    labels = sweep.labels
    captions = [sweep.classes[label] if label >= 0 else "any" for label in labels[: GRID_ROWS * columns]]
    save_png(folder / "grid.png", PNGFolder(folder, len(labels)).grid(captions, columns, edit and edit.grid))


def run_setting(sweep: Sweep, setting: Setting, reference) -> None:
    """Sample one setting, measure it, append its line; of one that is present make what is missing of its files."""
    parts, args, labels = sweep.parts, sweep.args, sweep.labels
    options = dict(num_traced=min(args.save_trace, len(labels)), edit=sweep.edit)
    if setting.present is not None:
        folder = Path(args.output_dir) / setting.present["name"]
        traced = num_traced(folder / "trace.npz") >= options["num_traced"]
        if not traced or not is_whole(folder, setting.row["weights"], len(labels)):
            batch_size = sweep.evaluation.eval_bsz
            sample_images(parts, setting.sampling, labels, setting.seed, folder, batch_size=batch_size, **options)
            if dist.is_main():
                PNGFolder(folder, len(labels)).save_npz(labels)
                save_grid(sweep, folder)
        if dist.is_main():
            print(f"{setting.name}: already in {sweep.results}")
            report(setting.present, folder)
        return
    folder = claim_folder(Path(args.output_dir) / setting.name, parts, read_named(sweep.results))
    result = evaluate(parts, setting.sampling, sweep.evaluation, reference, labels, setting.seed, folder, **options)
    if dist.is_main():
        save_grid(sweep, folder)
        measured = sweep.protocol(reference)
        row = setting.row | dict(result, kind=measured["kind"], protocol=measured, name=folder.name)
        row |= dict(checkpoint=str(checkpoint_path(args.checkpoint)), device=parts.device.type)
        row |= dict(world_size=dist.world_size(), git_commit=git_commit())
        append_result(sweep.results, row)
        report(row, folder)


def main(argv=None) -> int:
    """Parse, sample; returns the exit code."""
    given = vars(make_parser("sample.py", __doc__.splitlines()[0], *CONFIGS, sweep=SWEEPS).parse_args(argv))
    args = SampleArgs(**{f.name: given[f.name] for f in fields(SampleArgs) if f.name in given.keys() - set(SWEEPS)})
    for name in ("checkpoint", "output_dir"):
        if getattr(args, name) is None and not args.dry_run:
            raise ValueError(f"--{name} is needed")
    if args.checkpoint is None:
        show_flags(args, given)
        return 0
    try:
        if not args.dry_run:
            dist.set_deterministic(args.deterministic)
            dist.init(dist.pick_device(args.device))
        return run(args, given)
    finally:
        dist.shutdown()


if __name__ == "__main__":
    sys.exit(run_main(main))
