"""Write the averaged weights of a checkpoint, with its config, as one `.safetensors` file.

    python scripts/export_weights.py --checkpoint output_dir/digits --output digits.safetensors

The model's tensors keep their published names, those of policy heads stand below `heads.`. sample.py --checkpoint FILE,
main_mar.py --init_from FILE and load_mar(FILE) take the file; nothing in one can be executed.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

from models.loading import check_config
from training.config import DataConfig
from util.args import flag, make_parser
from util.checkpoint import atomic_file, checkpoint_path, load_checkpoint
from util.door import run_main
from util.exported import HEADS, SUFFIX, exported, num_bytes, write_exported
from util.images.folders import check_output_folder
from util.images.reading import stored_reading


@dataclass(frozen=True)
class ExportArgs:
    """From where to where."""

    checkpoint: str | None = flag(None, "folder or file of the checkpoint")
    output: str | None = flag(None, f"file to write, FILE{SUFFIX}")
    no_ema: bool = flag(False, "the raw weights instead of the averaged ones")
    force: bool = flag(False, "replace a file that is there")
    dry_run: bool = flag(False, "print what would be written and stop")


def check_output(args: ExportArgs) -> Path:
    """The file to write; one that cannot be, or is there without --force, raises ValueError."""
    output = Path(args.output)
    if output.suffix != SUFFIX:
        raise ValueError(f"--output must end in {SUFFIX}, got {args.output}")
    check_output_folder("output", output.parent)
    if output.is_dir() or (output.exists() and not args.force):
        way_out = "choose another name" if output.is_dir() else "--force replaces it"
        raise ValueError(f"--output {output} is there already: {way_out}")
    return output


def run(args: ExportArgs) -> int:
    """Read, check, write."""
    for name in ("checkpoint", "output"):
        if getattr(args, name) is None:
            raise ValueError(f"--{name} is needed")
    output, source = check_output(args), checkpoint_path(args.checkpoint)
    content = load_checkpoint(source)
    if "config" in content:
        check_config(content["config"], source)
        data = content["config"]["data"]
        split_dir = stored_reading(data.get("reading")).split_dir
        place = DataConfig(data=data["name"], data_path=data["path"]).place
        check_output_folder("output", output.parent, data["name"], place, split_dir)
    tensors, metadata = exported(content, not args.no_ema, source)
    num_heads = sum(name.startswith(HEADS) for name in tensors)
    shown = dict(num_tensors=len(tensors) - num_heads, num_head_tensors=num_heads, bytes=num_bytes(tensors))
    if args.dry_run:
        print(
            json.dumps({**asdict(args), **shown, "metadata": sorted(metadata), "replaces": output.exists()}, indent=2)
        )
        return 0
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(output) as temporary:
        write_exported(temporary, tensors, metadata)
    what = "raw" if args.no_ema else "averaged"
    print(f"{output}: the {what} weights of {source}, {len(tensors)} tensors, {shown['bytes'] / 1e6:.1f} MB")
    if "config" not in metadata:
        print("the checkpoint does not say what it holds: give --model with the file, as with the checkpoint")
    return 0


def main(argv=None) -> int:
    """Parse, write; returns the exit code."""
    given = make_parser("export_weights.py", __doc__.splitlines()[0], ExportArgs).parse_args(argv)
    return run(ExportArgs(**vars(given)))


if __name__ == "__main__":
    sys.exit(run_main(main))
