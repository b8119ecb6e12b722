"""Table 1 of MAR's paper (arXiv 2406.11838): orders, attention and losses in eight rows, at one budget.

    python scripts/table1.py --out output_dir/table1
    python scripts/table1.py --preset cifar10 --data_path data --out output_dir/table1_cifar10
    python scripts/table1.py --preset mar_base --data_path IMAGENET --out output_dir/table1_mar_base --dry_run

AR and MAR of one loss have the same number of parameters to 2 %, all rows see the same images, and each model is
trained with every seed in --seeds. Temperature and guidance of a row are those of the smallest FID in a small grid,
sampled by the model of the first seed with seed 0; what is reported is sampled with the seeds of training. Rows of one
token a step take as many steps as an image has tokens. Digits and CIFAR-10: all rows of cross-entropy share one VQ
tokenizer, which is trained first, and diffusion loss is trained on its latents before quantisation and on pixels.

Interrupted, the same command goes on. --dry_run prints the commands and needs no data. OUT/table1.md and .csv: FID
without and with guidance, mean and standard deviation over seeds; evaluations of the transformer and seconds an image.
"""

import csv
import io
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

from util.args import OneLineParser
from util.checkpoint import FILE_NAME, atomic_file, load_checkpoint
from util.door import run_main
from util.evaluation.tables import mean_and_spread, read_lines
from util.images.folders import check_output_folder

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Preset:
    """What differs between data sets: models, tokenizers, budget, grids."""

    mar: str  # --model of the bidirectional rows
    causal: str  # of the causal rows
    tokens: int  # of an image
    steps: int  # of the rows with several tokens a step
    tokenizers: dict[str, dict[str, str]]  # loss -> {name in the table: flags of main_mar.py}
    training: str = ""  # further flags of main_mar.py, of all rows: --preset has some for MAR alone
    trained: str = ""  # flags of train_tokenizer.py for the VQ tokenizer; none: nothing is trained
    diffusion: str = ""  # flags of sample.py for rows with diffusion loss
    cfg: str = "1.25,1.5,2,3"
    tau: str = "0.8,0.9,1"
    few: int = 900  # images to choose by
    num_images: int = 1800


def own_vq(stride: int) -> dict[str, dict[str, str]]:
    """Tokenizers of pictures without a published one: a VQ of this stride, and pixels in patches of its size."""
    vq = "--tokenizer diffusers:{out}/tokenizer/autoencoder --patch_size 1"
    pixels = f"--tokenizer pixel --patch_size {stride}"
    return {"ce": {"VQ ids": vq}, "diffusion": {"VQ latents": vq, "pixels": pixels}}


NO_DROPOUT = "--attn_dropout 0 --proj_dropout 0"
PRESETS = {
    "digits": Preset(
        mar="mar_tiny",
        causal="mar_ar_tiny",
        tokens=16,
        steps=4,
        tokenizers=own_vq(2),
        training="--epochs 40 --eval_freq 1000 --diffloss_w 64 --diffusion_batch_mul 2 " + NO_DROPOUT,
        trained="--data digits --vq --codebook_size 256 --stride 2 --latent_channels 4 --epochs 150",
        diffusion="--num_sampling_steps 8 --solver dpmpp_sde",
    ),
    "cifar10": Preset(
        mar="mar_mini",
        causal="mar_ar_mini",
        tokens=64,
        steps=16,
        tokenizers=own_vq(4),
        training="--eval_freq 1000 --diffloss_w 192 --diffusion_batch_mul 1 " + NO_DROPOUT,
        trained="--data cifar10 --vq --codebook_size 1024 --stride 4 --latent_channels 8",
        diffusion="--num_sampling_steps 10 --solver dpmpp_sde --features cifar10",
        few=2000,
        num_images=10000,
    ),
    "mar_base": Preset(
        mar="mar_base",
        causal="mar_ar_base",
        tokens=256,
        steps=64,
        tokenizers={"ce": {"VQ-16 ids": "--tokenizer vq16"}, "diffusion": {"KL-16": "--tokenizer kl16"}},
        cfg="1.5,2,3,4",
        tau="0.9,0.95,1",
        few=5000,
        num_images=50000,
    ),
}


@dataclass(frozen=True)
class Row:
    """A row of the table, of one tokenizer."""

    order: str
    causal: bool
    several: bool  # tokens a step
    loss: str
    tokenizer: str  # its name in the table
    flags: str  # of main_mar.py, for it

    @property
    def model(self) -> str:
        """Name of the model's folder; rows that differ in tokens a step share one."""
        kind = f"{'ar' if self.causal else 'mar'}_{self.order}_{self.loss}_{self.tokenizer}"
        return kind.lower().replace(" ", "_")

    @property
    def name(self) -> str:
        """Name of the folder of its pictures."""
        return f"{self.model}_{'several' if self.several else 'one'}"


def rows_of(preset: Preset) -> list[Row]:
    """The paper's eight rows; a loss with several tokenizers has one row for each."""
    kinds = [("raster", True, False), ("random", True, False), ("random", False, False), ("random", False, True)]
    return [
        Row(*kind, loss, name, flags)
        for kind in kinds
        for loss, tokenizers in preset.tokenizers.items()
        for name, flags in tokenizers.items()
    ]


class Table:
    """Runs or prints the commands of a preset, and reads what they wrote."""

    def __init__(self, args):
        self.args, self.preset, self.out = args, PRESETS[args.preset], args.out
        self.data = ["--data_path", args.data_path] if args.data_path else []

    def run(self, *words) -> None:
        """A command in the repository's root; with --dry_run it is printed. One that fails raises ValueError."""
        words = [str(word) for word in words]
        if self.args.dry_run:
            print(shlex.join(["python", *words]))
        elif subprocess.run([sys.executable, *words], cwd=ROOT).returncode:
            raise ValueError(f"this command failed, its error stands above: {shlex.join(['python', *words])}")

    def tokenizer(self) -> None:
        """Train the VQ tokenizer, if the preset has one and it is not there."""
        folder = self.out / "tokenizer"
        if self.preset.trained and not (folder / "autoencoder").is_dir():
            flags = [*self.preset.trained.split(), *self.data, "--output_dir", folder]
            self.run("scripts/train_tokenizer.py", *flags, *(["--resume"] if folder.is_dir() else []))

    def checkpoint(self, row: Row, seed: int) -> Path:
        """The folder of the row's model of this seed."""
        return self.out / row.model / f"seed{seed}"

    def train(self, row: Row) -> None:
        """Train the row's model with every seed; finished ones end at once."""
        preset = self.preset
        causal = ["--model", preset.causal, "--ar_order", row.order, "--num_iter", preset.tokens]
        model = causal if row.causal else ["--model", preset.mar]
        flags = [*model, "--loss", row.loss, *row.flags.format(out=self.out).split(), *preset.training.split()]
        flags += ["--lr_schedule", "cosine"] if row.loss == "ce" else []
        flags += ["--epochs", self.args.epochs] if self.args.epochs else []
        for seed in self.args.seeds:
            folder = self.checkpoint(row, seed)
            self.run(
                *("main_mar.py", "--preset", self.args.preset, *self.data, *flags),
                *("--seed", seed, "--output_dir", folder, "--resume", folder),
            )

    def measure(self, row: Row) -> None:
        """Choose τ and w of the row, without guidance and with it, and measure both with every seed."""
        preset, folder = self.preset, self.out / "images" / row.name
        budget = ["--num_iter", preset.steps if row.several else preset.tokens]
        budget += [] if row.several else ["--group", "one"]
        budget += preset.diffusion.split() if row.loss == "diffusion" else []
        for name, cfg in (("plain", "1"), ("guided", preset.cfg)):
            grid, best = folder / f"{name}_grid", folder / f"{name}.jsonl"
            shared = [*self.data, "--infer_mode", "baseline", "--metrics", "fid"]
            self.run(
                *("sample.py", "--checkpoint", self.checkpoint(row, self.args.seeds[0]), "--output_dir", grid, *shared),
                *(*budget, "--cfg", cfg, "--temperature", preset.tau, "--num_images", self.args.few or preset.few),
                *("--seed", 0),
            )
            self.run("scripts/best_settings.py", grid / "results.jsonl", "--by", "fid", "--top", 1, "--out", best)
            for seed in self.args.seeds:
                self.run(
                    *("sample.py", "--checkpoint", self.checkpoint(row, seed), "--output_dir", folder / name, *shared),
                    *("--settings_of", best, "--seed", seed),
                    *("--num_images", self.args.num_images or preset.num_images),
                )

    def line(self, row: Row) -> dict[str, str]:
        """The row of the table, from the results files."""
        weights = load_checkpoint(self.checkpoint(row, self.args.seeds[0]) / FILE_NAME)["model"]
        shown = {
            "order": row.order,
            "attention": "causal" if row.causal else "bidirectional",
            "tokens a step": "several" if row.several else "1",
            "loss": "cross-entropy" if row.loss == "ce" else "diffusion",
            "tokens": row.tokenizer,
            "parameters": f"{sum(value.numel() for value in weights.values()):,}",
        }
        plain, guided = (self.lines(row, name) for name in ("plain", "guided"))
        for title, lines in (("FID", plain), ("FID, guided", guided)):
            mean, spread = mean_and_spread([x["metrics"]["fid"] for x in lines])
            settings = lines[0]["settings"]
            chosen = f"τ {settings['temperature']:g}" + (f", w {settings['cfg']:g}" if lines is guided else "")
            shown[title] = f"{mean:.3f}" + (f" ± {spread:.3f}" if spread is not None else "") + f" ({chosen})"
        rates = [x["images_per_second"] for x in guided if x["images_per_second"]]
        evals = [x["mar_evals"] for x in guided if x["mar_evals"]]
        shown["transformer evals, guided"] = f"{evals[0]:g}" if evals else ""
        shown["s an image, guided"] = f"{len(rates) / sum(rates):.3g}" if rates else ""
        return shown | {"seeds": str(len(guided))}

    def lines(self, row: Row, name: str) -> list[dict]:
        """The results of the row, plain or guided, one for each seed."""
        lines = read_lines(self.out / "images" / row.name / name / "results.jsonl")
        return [x for x in lines if x["settings"]["seed"] in self.args.seeds]


def markdown(lines: list[dict[str, str]]) -> str:
    """The rows as a table."""
    rows = [list(lines[0]), ["---"] * len(lines[0]), *(list(line.values()) for line in lines)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def parse(argv=None):
    """The command line."""
    parser = OneLineParser(prog="table1.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--preset", default="digits", choices=PRESETS, help="data, models and budget (default: digits)")
    parser.add_argument("--data_path", help="folder of the data, where the preset needs one")
    parser.add_argument("--out", type=Path, default=Path("output_dir/table1"), help="folder to write to")
    parser.add_argument("--seeds", default="1,2,3", help="comma list of training seeds (default: 1,2,3)")
    parser.add_argument("--epochs", type=int, help="of each model (default: the preset's)")
    parser.add_argument("--few", type=int, help="images to choose a setting by (default: the preset's)")
    parser.add_argument("--num_images", type=int, help="images of each figure (default: the preset's)")
    parser.add_argument("--dry_run", action="store_true", help="print the commands and stop")
    args = parser.parse_args(argv)
    try:
        args.seeds = [int(part) for part in args.seeds.split(",")]
    except ValueError:
        parser.error(f"--seeds must be whole numbers with commas between, got {args.seeds!r}")
    return args


def main(argv=None) -> int:
    """Train, sample, print; returns the exit code."""
    args = parse(argv)
    check_output_folder("out", args.out)
    args.out = args.out.absolute() if not args.dry_run else args.out
    table = Table(args)
    table.tokenizer()
    trained = set()
    lines = []
    for row in rows_of(table.preset):
        if row.model not in trained:
            table.train(row)
            trained.add(row.model)
        table.measure(row)
        if not args.dry_run:
            lines.append(table.line(row))
    if args.dry_run:
        return 0
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    for name, content in (("table1.md", markdown(lines)), ("table1.csv", text.getvalue())):
        with atomic_file(args.out / name) as temporary:
            temporary.write_text(content)
    print(markdown(lines), end="")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
