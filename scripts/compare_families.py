"""Two tables on digits: the families trained and sampled beside each other, and learned heads on each.

    python scripts/compare_families.py --out output_dir/families

Each family's smallest model is trained with every seed in --seeds on the tokens that it takes: pixels in patches of
2×2, ids of a VQ tokenizer, or ids of a multi-scale one. The causal model has a VQ tokenizer of 20 epochs: with
MaskGIL's, of 150, its samples are seldom digits. Models of the first table differ by 2 % in their parameters, by the
width of MAR's token head and VAR's shared modulation; parameters and seconds of training, of all cores, are columns.
Temperature and guidance are those of the smallest FID in a small grid, by the model of the first seed with seed 0; what
is reported is sampled with the seeds of training.

Heads are trained by --objective image on each frozen model, and measured beside hand-made rules by a classifier that
took no part: a row is compared with the hand-made rule that the judge likes best among those of no larger pixel
distance. Hand-made rules are those of the grid that no other beats in both reward features, on seed 0.

Interrupted, the same command goes on. OUT/families.md, OUT/heads.md and .csv files: the tables. --dry_run prints the
commands.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

from models.loading import num_parameters
from sampling.grid import unset_settings
from util.door import run_main
from util.evaluation.rivals import HEADINGS, cells, entries
from util.evaluation.trials import Trials, costs, metric, trials_parser
from util.images.folders import check_output_folder


@dataclass(frozen=True)
class Row:
    """A family: how it is trained and sampled, which hand-made settings are tried, and which heads it can have."""

    name: str
    tokens: str  # their kind, in words
    training: str  # flags of main_mar.py
    epochs: int
    steps: str  # flags of sample.py and of heads: how many
    grid: str  # comma lists for sample.py
    learn: str = ""  # heads; none: of the first table alone
    heads: str = ""  # further flags of their training
    rules: str = ""  # the hand-made order and groups beside learned temperature and guidance, flags of sample.py
    order: str = ""  # in mode both, where it is not learned
    mode: str = "baseline"  # of hand-made rules
    in_first: bool = True  # has a row in the first table

    @property
    def model(self) -> str:
        """The name of its folder."""
        return self.name.lower().replace(", ", "_").replace("-", "_")


VQ = "--tokenizer diffusers:{out}/vq/autoencoder"
VQ_20 = "--tokenizer diffusers:{out}/vq_20/autoencoder"
NO_DROPOUT = "--attn_dropout 0 --proj_dropout 0"
ROWS = [
    Row(
        "MAR",
        "pixels, 2×2",
        f"--preset digits --tokenizer pixel --patch_size 2 --diffloss_w 40 {NO_DROPOUT}",
        65,
        "--num_iter 8 --num_sampling_steps 8 --solver dpmpp_sde",
        "--group cosine,staged --cfg 1,1.2,1.5,2,3 --temperature 0.7,0.8,0.9,1",
        "order,group,tau,cfg,profile",
        "--group_base staged --cfg 1.8 --temperature 0.9",
        "--group staged",
    ),
    Row(
        "MAR, cross-entropy",
        "ids",
        f"--preset digits --loss ce {VQ} {NO_DROPOUT}",
        65,
        "--num_iter 8",
        "--group cosine,staged --cfg 1,1.5,2,3 --temperature 0.7,0.8,0.9,1",
        "order,group,tau,cfg",
        "--group_base staged --cfg 2 --temperature 0.9",
        "--group staged",
        in_first=False,
    ),
    Row(
        "causal",
        "ids, VQ of 20 epochs",
        f"--preset digits --model causal_gpt_tiny {VQ_20}",
        43,
        "--num_iter 16",
        "--cfg 1,1.5,2,3 --cfg_schedule constant,linear --temperature 0.7,0.8,0.9,1",
    ),
    Row(
        "VAR",
        "ids of 6 scales",
        "--preset var_digits --vae_path {out}/scales/tokenizer.pth --shared_aln",
        8,
        "",
        "--cfg 1,1.5,2,3 --cfg_schedule constant,ramp --temperature 0.8,0.9,1",
        "tau,cfg",
        "--cfg 1.5 --temperature 1",
    ),
    Row(
        "MaskGIL",
        "ids",
        f"--preset digits --model maskgil_tiny {VQ} --loss_tokens masked --label_smoothing 0",
        39,
        "--num_iter 8",
        "--group step_arccos,step_cosine --confidence_noise 2,4.5 --cfg 1,1.5,2,3 --temperature 0.8,0.9,1",
        "group,tau,cfg",
        "--order confidence --group_base step_arccos --cfg 2 --temperature 1",
        "--order confidence --group step_arccos",
        order="--order confidence",
        mode="maskgil",
    ),
]
HEADS = "--objective image --reward digits,pixels --reward_weights 1,3 --bank 1024 --lr 1.6e-2 --adaptive_lr 0.03"
HEADS += " --no-grad_checkpointing --eval_freq 1000"
HEAD_EPOCHS = 10
TRAIN_VQ = "--data digits --vq --codebook_size 256 --stride 2 --latent_channels 4"
VQ_EPOCHS = {"vq": 150, "vq_20": 20}
TRAIN_SCALES = "--data digits --multiscale --stride 1 --width 16 --latent_channels 8 --codebook_size 64"
TRAIN_SCALES += " --batch_size 64 --lr 3e-3 --epochs 10 --features digits"


class Families:
    """What is run for each family, and what is read of it."""

    def __init__(self, args):
        self.args = args
        self.trials = Trials(args.out, args.seeds, args.few or 900, args.num_images or 1800, args.dry_run)
        self.judge = args.out / "judge.npz"

    def prepare(self) -> None:
        """Train the tokenizers and the judge."""
        for name, epochs in VQ_EPOCHS.items():
            self.trials.tokenizer(name, [*TRAIN_VQ.split(), "--epochs", str(epochs)], "autoencoder")
        self.trials.tokenizer("scales", TRAIN_SCALES.split(), "tokenizer.pth")
        if not self.judge.is_file():
            self.trials.run("scripts/train_classifier.py", "--seed", 1, "--output", self.judge)

    def training(self, row: Row, epochs: int) -> list[str]:
        """Flags of main_mar.py that say which model it is, and how long it learns."""
        return [*row.training.format(out=self.args.out).split(), "--epochs", str(self.args.epochs or epochs)]

    def sampling(self, row: Row, mode: str) -> list[str]:
        """Flags of sample.py that all settings of a family share."""
        measured = ["--metrics", "fid", "--features", "digits", "--judge", str(self.judge)]
        return ["--infer_mode", mode, *row.steps.split(), *measured]

    def base(self, row: Row) -> None:
        """Train the family's model, choose a setting of the grid, measure it."""
        self.trials.train(row.model, [*self.training(row, row.epochs), "--eval_freq", "1000"])
        self.trials.measure(row.model, row.model, self.sampling(row, row.mode), row.grid.split())

    def line(self, row: Row) -> dict[str, str]:
        """A row of the first table."""
        lines = self.trials.lines(row.model)
        settings = lines[0]["settings"]
        return {
            "family": row.name,
            "tokens": row.tokens,
            "parameters": f"{num_parameters(self.trials.checkpoint(row.model, self.trials.seeds[0])):,}",
            "training, CPU s": self.trials.seconds(row.model),
            "τ, w": f"{settings['temperature']:g}, {settings['cfg']:g}",
            "FID": metric(lines, "fid"),
            "Fréchet, pixels": metric(lines, "frechet_pixels"),
            "recognised": metric(lines, "svc_accuracy"),
            **costs(lines),
            "seeds": str(len(lines)),
        }

    def heads(self, row: Row) -> None:
        """Train heads on each of the family's models; measure them, and the hand-made front, with every seed."""
        trials, name = self.trials, f"{row.model}_heads"
        place = trials.out / "images" / name
        front = place.with_name(f"{row.model}_front.jsonl")
        grid = trials.out / "images" / f"{row.model}_grid" / "results.jsonl"
        trials.run("scripts/best_settings.py", grid, "--by", "fid,frechet_pixels", "--front", "--out", front)
        for seed in self.args.seeds:
            base, heads = trials.checkpoint(row.model, seed), trials.checkpoint(name, seed)
            trials.run(
                *("main_mar.py", *self.training(row, HEAD_EPOCHS), *HEADS.split(), "--init_from", base),
                *("--learn", row.learn, *row.heads.split(), *row.steps.split()),
                *("--seed", seed, "--output_dir", heads, "--resume", heads),
            )
            for folder, checkpoint, flags in (
                ("hand", base, [*self.sampling(row, row.mode), "--settings_of", front]),
                *((mode, heads, [*self.sampling(row, mode), *rules]) for mode, rules in modes(row)),
            ):
                trials.run(
                    *("sample.py", "--checkpoint", checkpoint, "--output_dir", place / folder, *flags),
                    *("--seed", seed, "--num_images", trials.num_images),
                )

    def compared(self, row: Row) -> list[dict[str, str]]:
        """Rows of the second table: the modes of the heads, each beside its hand-made rival."""
        place = self.trials.out / "images" / f"{row.model}_heads"
        hand = entries(place / "hand" / "results.jsonl", None, unset_settings())
        files = {mode: place / mode / "results.jsonl" for mode, _ in modes(row)}
        rows = [entries(file, f"{row.name}: {mode}", unset_settings())[0] for mode, file in files.items()]
        return [dict(zip(HEADINGS, cells(entry, hand))) for entry in rows]


def modes(row: Row) -> list[tuple[str, list[str]]]:
    """(inference mode, hand-made rules as flags) of a family's heads."""
    both = [("both", row.order.split())] if "group" in row.learn else []
    return [("guidance", row.rules.split()), *both]


def main(argv=None) -> int:
    """Train, sample, print; returns the exit code."""
    args = trials_parser("compare_families.py", __doc__.splitlines()[0], "output_dir/families").parse_args(argv)
    check_output_folder("out", args.out)
    args.out = args.out.absolute() if not args.dry_run else args.out
    families = Families(args)
    families.prepare()
    for row in ROWS:
        families.base(row)
    if not args.dry_run:
        families.trials.write("families", [families.line(row) for row in ROWS if row.in_first])
    learned = [row for row in ROWS if row.learn]
    for row in learned:
        families.heads(row)
    if not args.dry_run:
        families.trials.write("heads", [line for row in learned for line in families.compared(row)])
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
