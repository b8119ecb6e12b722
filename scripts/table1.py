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

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

from models.loading import num_parameters
from util.door import run_main
from util.evaluation.trials import Trials, costs, metric, trials_parser
from util.images.folders import check_output_folder


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
    """The rows of a preset: what is run for each, and what is read of it."""

    def __init__(self, args):
        self.args, self.preset = args, PRESETS[args.preset]
        few, num_images = args.few or self.preset.few, args.num_images or self.preset.num_images
        self.trials = Trials(args.out, args.seeds, few, num_images, args.dry_run)
        self.data = ["--data_path", args.data_path] if args.data_path else []

    def tokenizer(self) -> None:
        """Train the VQ tokenizer, if the preset has one and it is not there."""
        if self.preset.trained:
            self.trials.tokenizer("tokenizer", [*self.preset.trained.split(), *self.data], "autoencoder")

    def train(self, row: Row) -> None:
        """Train the row's model with every seed; finished ones end at once."""
        preset = self.preset
        causal = ["--model", preset.causal, "--ar_order", row.order, "--num_iter", preset.tokens]
        model = causal if row.causal else ["--model", preset.mar]
        flags = [*model, "--loss", row.loss, *row.flags.format(out=self.args.out).split(), *preset.training.split()]
        flags += ["--lr_schedule", "cosine"] if row.loss == "ce" else []
        flags += ["--epochs", self.args.epochs] if self.args.epochs else []
        self.trials.train(row.model, ["--preset", self.args.preset, *self.data, *flags])

    def measure(self, row: Row) -> None:
        """Choose τ and w of the row, without guidance and with it, and measure both with every seed."""
        preset = self.preset
        budget = ["--num_iter", preset.steps if row.several else preset.tokens]
        budget += [] if row.several else ["--group", "one"]
        budget += preset.diffusion.split() if row.loss == "diffusion" else []
        for name, cfg in (("plain", "1"), ("guided", preset.cfg)):
            flags = [*self.data, "--infer_mode", "baseline", "--metrics", "fid", *budget]
            self.trials.measure(row.model, f"{row.name}/{name}", flags, ["--cfg", cfg, "--temperature", preset.tau])

    def line(self, row: Row) -> dict[str, str]:
        """The row of the table, from the results files."""
        cells = {
            "order": row.order,
            "attention": "causal" if row.causal else "bidirectional",
            "tokens a step": "several" if row.several else "1",
            "loss": "cross-entropy" if row.loss == "ce" else "diffusion",
            "tokens": row.tokenizer,
            "parameters": f"{num_parameters(self.trials.checkpoint(row.model, self.trials.seeds[0])):,}",
        }
        plain, guided = (self.trials.lines(f"{row.name}/{name}") for name in ("plain", "guided"))
        for title, lines in (("FID", plain), ("FID, guided", guided)):
            settings = lines[0]["settings"]
            chosen = f"τ {settings['temperature']:g}" + (f", w {settings['cfg']:g}" if lines is guided else "")
            cells[title] = f"{metric(lines, 'fid')} ({chosen})"
        cells |= {f"{name}, guided": value for name, value in costs(guided).items()}
        return cells | {"seeds": str(len(guided))}


def parse(argv=None):
    """The command line."""
    parser = trials_parser("table1.py", __doc__.splitlines()[0], "output_dir/table1")
    parser.add_argument("--preset", default="digits", choices=PRESETS, help="data, models and budget (default: digits)")
    parser.add_argument("--data_path", help="folder of the data, where the preset needs one")
    return parser.parse_args(argv)


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
    if not args.dry_run:
        table.trials.write("table1", lines)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
