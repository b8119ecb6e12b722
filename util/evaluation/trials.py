"""The commands of an experiment on several training seeds: train, choose τ and w, measure, make a table."""

import argparse
import csv
import io
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from util.args import OneLineParser
from util.checkpoint import atomic_file
from util.evaluation.tables import read_lines, shown

ROOT = Path(__file__).resolve().parents[2]
SECONDS = "cpu_seconds.txt"  # of a training that was not interrupted, in its folder


@dataclass
class Trials:
    """Runs or prints the commands of an experiment, and reads what they wrote below the folder out.

    few: images to choose settings by; num_images: of each figure. Models are in out/NAME/seedS, pictures in
    out/images. Commands go on where they were interrupted, and finished ones end at once.
    """

    out: Path
    seeds: list[int]
    few: int
    num_images: int
    dry_run: bool = False

    def run(self, *words) -> None:
        """A command in the repository's root; with dry_run it is printed. One that fails raises ValueError."""
        words = [str(word) for word in words]
        if self.dry_run:
            print(shlex.join(["python", *words]))
        elif subprocess.run([sys.executable, *words], cwd=ROOT).returncode:
            raise ValueError(f"this command failed, its error stands above: {shlex.join(['python', *words])}")

    def checkpoint(self, name: str, seed: int) -> Path:
        """The folder of a model of this seed."""
        return self.out / name / f"seed{seed}"

    def tokenizer(self, name: str, flags: list[str], made: str) -> None:
        """Train a tokenizer in out/NAME, where the file or folder `made` in it is not there."""
        folder = self.out / name
        if not (folder / made).exists():
            more = ["--output_dir", folder, *(["--resume"] if folder.is_dir() else [])]
            self.run("scripts/train_tokenizer.py", *flags, *more)

    def train(self, name: str, flags: list[str]) -> None:
        """Train a model with every seed; finished ones end at once."""
        for seed in self.seeds:
            folder = self.checkpoint(name, seed)
            whole, start = not folder.exists(), _cpu_seconds()
            self.run("main_mar.py", *flags, "--seed", seed, "--output_dir", folder, "--resume", folder)
            if whole and not self.dry_run:
                with atomic_file(folder / SECONDS) as temporary:
                    temporary.write_text(f"{_cpu_seconds() - start:.0f}\n")

    def measure(self, model: str, folder: str, flags: list[str], grid: list[str], by: str = "fid") -> None:
        """Choose the best setting of a grid by the model of the first seed and seed 0; measure it with every seed.

        flags: of sample.py, for both; grid: those with the comma lists. Pictures are in out/images/FOLDER.
        """
        place = self.out / "images" / folder
        candidates, best = place.with_name(f"{place.name}_grid"), place.with_name(f"{place.name}.jsonl")
        self.run(
            *("sample.py", "--checkpoint", self.checkpoint(model, self.seeds[0]), "--output_dir", candidates, *flags),
            *(*grid, "--num_images", self.few, "--seed", 0),
        )
        self.run("scripts/best_settings.py", candidates / "results.jsonl", "--by", by, "--top", 1, "--out", best)
        for seed in self.seeds:
            self.run(
                *("sample.py", "--checkpoint", self.checkpoint(model, seed), "--output_dir", place, *flags),
                *("--settings_of", best, "--seed", seed, "--num_images", self.num_images),
            )

    def lines(self, folder: str) -> list[dict]:
        """The results in out/images/FOLDER, one for each seed."""
        lines = read_lines(self.out / "images" / folder / "results.jsonl")
        return [line for line in lines if line["settings"]["seed"] in self.seeds]

    def seconds(self, model: str) -> str:
        """The mean of what the trainings of a model that were not interrupted took of all cores, in seconds.

        Evaluations are included. Unlike seconds on a clock it hardly depends on what else the machine does.
        """
        files = [self.checkpoint(model, seed) / SECONDS for seed in self.seeds]
        taken = [int(file.read_text()) for file in files if file.is_file()]
        return f"{sum(taken) / len(taken):.0f}" if taken else ""

    def write(self, name: str, rows: list[dict[str, str]]) -> None:
        """Print rows as a table, and keep it as out/NAME.md and .csv."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        for suffix, content in (("md", markdown(rows)), ("csv", text.getvalue())):
            with atomic_file(self.out / f"{name}.{suffix}") as temporary:
                temporary.write_text(content)
        print(markdown(rows), end="")


def _cpu_seconds() -> float:
    """What the commands that have ended took of all cores."""
    times = os.times()
    return times.children_user + times.children_system


def markdown(rows: list[dict[str, str]]) -> str:
    """Rows with the same keys as a table."""
    cells = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


def metric(lines: list[dict], name: str) -> str:
    """Mean ± standard deviation of a metric over lines of results."""
    return shown([line["metrics"][name] for line in lines])


def costs(lines: list[dict]) -> dict[str, str]:
    """{evaluations of the transformer, seconds} an image of lines of results; empty where they were made before."""
    rates = [line["images_per_second"] for line in lines if line["images_per_second"]]
    evals = [line["mar_evals"] for line in lines if line["mar_evals"]]
    seconds = f"{len(rates) / sum(rates):.3g}" if rates else ""
    return {"transformer evals": f"{evals[0]:g}" if evals else "", "s an image": seconds}


def trials_parser(program: str, description: str, out: str) -> OneLineParser:
    """A parser with the flags of an experiment: --out, --seeds, --epochs, --few, --num_images, --dry_run."""
    parser = OneLineParser(prog=program, description=description, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path(out), help="folder to write to")
    parser.add_argument("--seeds", type=seeds, default=[1, 2, 3], help="comma list of training seeds (default: 1,2,3)")
    parser.add_argument("--epochs", type=int, help="of each model (default: its own)")
    parser.add_argument("--few", type=int, help="images to choose a setting by")
    parser.add_argument("--num_images", type=int, help="images of each figure")
    parser.add_argument("--dry_run", action="store_true", help="print the commands and stop")
    return parser


def seeds(text: str) -> list[int]:
    """A comma list of whole numbers; another text raises ArgumentTypeError."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be whole numbers with commas between, got {text!r}") from None
