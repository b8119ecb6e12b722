"""Write a checkpoint's averaged weights as one .safetensors file, with its config in the file's metadata.

    python scripts/export_weights.py --checkpoint DIR --output FILE.safetensors

The model's tensors have their published names, those of the policy heads begin with `heads.`. sample.py --checkpoint,
main_mar.py --init_from and models.loading.load_mar take the file.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

from util.args import flag, run_with
from util.checkpoint import atomic_file, load_checkpoint
from util.door import run_main
from util.foreign import HEADS


@dataclass(frozen=True)
class ExportArgs:
    """What to export, and where to."""

    checkpoint: str | None = flag(None, "folder or file of the checkpoint")
    output: str | None = flag(None, "the .safetensors file to write")
    no_ema: bool = flag(False, "the raw weights instead of the averaged ones")
    force: bool = flag(False, "replace a file that is there")
    dry_run: bool = flag(False, "print the resolved configuration and stop")


def run(args: ExportArgs) -> int:
    """Read, write; returns the exit code."""
    from safetensors.torch import save_file

    for name in ("checkpoint", "output"):
        if getattr(args, name) is None:
            raise ValueError(f"--{name} is needed")
    path = Path(args.output)
    if path.suffix != ".safetensors":
        raise ValueError(f"--output {path} must end in .safetensors")
    if path.exists() and not args.force:
        raise ValueError(f"{path} is there already: --force replaces it")
    content = load_checkpoint(args.checkpoint)
    if "config" not in content:
        raise ValueError(f"{args.checkpoint} has no config, which the file would carry: it is one of MAR's own")
    end = "" if args.no_ema else "_ema"
    if f"model{end}" not in content:
        raise ValueError(f"{args.checkpoint} has no averaged weights; --no_ema exports the raw ones")
    heads = {HEADS + name: value for name, value in (content.get(f"heads{end}") or {}).items()}
    tensors = {name: value.clone() for name, value in {**content[f"model{end}"], **heads}.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", "config": json.dumps(content["config"])})
    print(f"{len(tensors)} tensors, {sum(value.numel() for value in tensors.values()) / 1e6:.2f} M numbers: {path}")
    return 0


def main(argv=None) -> int:
    """Parse, export; returns the exit code."""
    return run_with(run, ExportArgs, "export_weights.py", __doc__.splitlines()[0], argv)


if __name__ == "__main__":
    sys.exit(run_main(main))
