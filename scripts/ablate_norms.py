"""Why MaskGIL normalises: QK-norm and post-norm, on and off, trained side by side at a high learning rate.

    python scripts/train_tokenizer.py --data digits --vq --stride 2 --codebook_size 256 --output_dir output_dir/vq
    python scripts/ablate_norms.py --data digits --tokenizer diffusers:output_dir/vq/autoencoder

The four models of a seed have the same initial weights, ids, masks and labels, and no gradient is clipped. Written to
--output_dir: curves.csv (each step's loss, gradient norm before the update, and largest attention logit, that is
q·k / sqrt(d) over all layers, heads and pairs of inputs), table.md and curves.png (the first seed). A run whose loss
or gradient is not finite ends there, and its last finite step counts.
"""

import csv
import io
import itertools
import math
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from models.kv_cache import attention
from models.mask_schedules import MASK_RATIOS, draw_mask
from models.maskgil import MASKGIL_CONFIGS, OF_CLASSES, MaskGIL, MaskGILConfig, token_loss
from models.tokenizers import tokenizer_of
from util import dist
from util.args import flag, run_with
from util.checkpoint import atomic_file
from util.door import run_main
from util.evaluation.tables import mean_and_spread
from util.images.datasets import ImagesArgs
from util.images.folders import check_output_folder
from util.rng import generator, seed_of

NORMS = {  # name: switches of the model
    "QK-norm and post-norm": dict(qk_norm=True, post_norm=True),
    "QK-norm": dict(qk_norm=True, post_norm=False),
    "post-norm": dict(qk_norm=False, post_norm=True),
    "neither": dict(qk_norm=False, post_norm=False),
}
CURVES = ("loss", "grad_norm", "attention_logit")


@dataclass(frozen=True)
class AblateArgs(ImagesArgs):
    """The flags."""

    tokenizer: str | None = flag(None, "one of ids, such as diffusers:DIR of train_tokenizer.py --vq")
    vae_path: str | None = flag(None, "its weights (default: download_weights.py's place for them)")
    model: str = flag("maskgil_tiny", "size", choices=OF_CLASSES)
    steps: int = flag(600, "steps of each run", low=1)
    lr: float = flag(1e-2, "learning rate, constant after the warm-up", low=0)
    warmup_steps: int = flag(20, "steps of linear warm-up", low=0)
    mask_schedule: str = flag("arccos", "share of the tokens that is masked", choices=MASK_RATIOS)
    seeds: str = flag("1,2,3", "comma list of seeds, of weights and of all draws")
    output_dir: str = flag("output_dir/ablate_norms", "folder to write to")
    dry_run: bool = flag(False, "print the resolved configuration and stop")

    def seed_list(self) -> list[int]:
        """The seeds; a text that is no list of whole numbers raises ValueError."""
        try:
            return [int(part) for part in self.seeds.split(",")]
        except ValueError:
            raise ValueError(f"--seeds must be whole numbers with commas between, got {self.seeds!r}") from None


class Largest:
    """Attention among all inputs that notes the largest logit since the last reading, for `MaskGIL.encode_decode`."""

    def __init__(self):
        self.value = None

    def __call__(self, query, key, value) -> torch.Tensor:
        with torch.no_grad():
            wide = query.float(), key.float().repeat_interleave(query.shape[2] // key.shape[2], dim=2)
            logits = torch.einsum("bnhd,bmhd->bhnm", *wide) / math.sqrt(query.shape[-1])
            self.value = logits.max() if self.value is None else torch.maximum(self.value, logits.max())
        return attention(query, key, value)

    def read(self) -> torch.Tensor:
        """The largest logit; it is forgotten."""
        value, self.value = self.value, None
        return value


@torch.no_grad()
def encode(tokenizer, images, batch_size: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids (N, L), labels (N,)) of a data set, on the device."""
    ids, labels = [], []
    for batch, of_batch, _ in DataLoader(images, batch_size):
        ids.append(tokenizer.encode_ids(batch.to(device).float() / 127.5 - 1).flatten(1))
        labels.append(of_batch.to(device))
    return torch.cat(ids), torch.cat(labels)


def train(config: MaskGILConfig, ids, labels, args: AblateArgs, seed: int) -> list[dict[str, float]]:
    """The CURVES of one run, a dict a step; it ends where they are no longer finite."""
    torch.manual_seed(seed_of("weights", seed))
    model = MaskGIL(config).to(ids.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.96), weight_decay=1e-5)
    warmed = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / (args.warmup_steps + 1)))
    torch.manual_seed(seed_of("dropout", seed))
    watched, curves = Largest(), []
    for step in range(args.steps):
        g = generator(seed_of("step", seed, step))
        rows = torch.randint(len(ids), (args.batch_size,), generator=g)
        dropped = torch.rand(args.batch_size, generator=g) < config.label_drop_prob
        draws = torch.rand(args.batch_size, generator=g), torch.rand(args.batch_size, ids.shape[1], generator=g)
        mask, rows, dropped = (x.to(ids.device) for x in (draw_mask(args.mask_schedule, *draws), rows, dropped))
        z = model.encode_decode(ids[rows], mask, torch.where(dropped, -1, labels[rows]), attend=watched)
        loss = token_loss(model.token_head.all_logits(z), ids[rows], label_smoothing=config.label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
        values = torch.stack([loss.detach(), norm, watched.read()]).tolist()
        if not all(map(math.isfinite, values)):
            break
        curves.append(dict(zip(CURVES, values)))
        optimizer.step()
        warmed.step()
    return curves


def summary(name: str, runs: list[list[dict]], steps: int) -> list[str]:
    """The cells of a combination's row: means over its runs, with their spread."""

    def shown(values) -> str:
        mean, spread = mean_and_spread(values)
        return f"{mean:.3g}" + (f" ± {spread:.2g}" if spread is not None else "")

    ends = [run[-max(1, steps // 20) :] for run in runs]
    cells = [shown([sum(point["loss"] for point in end) / len(end) for end in ends])]
    for key in ("grad_norm", "attention_logit"):
        cells += [shown([max(point[key] for point in run) for run in runs]), shown([run[-1][key] for run in runs])]
    finished = sum(len(run) == steps for run in runs)
    return [name, *cells, f"{finished} of {len(runs)}"]


def table(runs: dict[str, list[list[dict]]], args: AblateArgs) -> str:
    """Markdown; the loss is the mean of the last twentieth of the steps."""
    head = ["norms", "loss", "largest gradient norm", "last", "largest attention logit", "last", "finite runs"]
    rows = [head, ["---"] + ["---:"] * (len(head) - 1)]
    rows += [summary(name, found, args.steps) for name, found in runs.items()]
    sizes = f"{args.model}, learning rate {args.lr:g}, {args.steps} steps of {args.batch_size} images"
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([f"{sizes}, seeds {args.seeds}:", "", *lines, ""])


def draw(runs: dict[str, list[list[dict]]], path: Path) -> None:
    """One panel a curve, one line a combination, of the first seed, to a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = dict(loss="loss", grad_norm="gradient norm", attention_logit="largest attention logit")
    figure, panels = plt.subplots(1, len(CURVES), figsize=(12.6, 3.4))
    for panel, key in zip(panels, CURVES):
        for name, (first, *_) in runs.items():
            panel.plot([point[key] for point in first], linewidth=1.0, label=name)
        panel.set_title(titles[key])
        panel.set_xlabel("step")
        panel.set_yscale("linear" if key == "loss" else "log")
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.tight_layout()
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)


def csv_of(runs: dict[str, list[list[dict]]], seeds: list[int]) -> str:
    """A line a step of each run."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["norms", "seed", "step", *CURVES])
    for name, found in runs.items():
        for seed, run in zip(seeds, found):
            writer.writerows([name, seed, step, *point.values()] for step, point in enumerate(run))
    return text.getvalue()


def check(args: AblateArgs) -> None:
    """Raise ValueError for flags that no run could use."""
    args.seed_list()
    if args.tokenizer is None:
        raise ValueError("--tokenizer is missing: one of ids, such as diffusers:DIR of train_tokenizer.py --vq")
    check_output_folder("output_dir", args.output_dir, args.data, args.data_path, args.split_dir)


def run(args: AblateArgs) -> int:
    """Train all combinations with all seeds, write and print what they did."""
    device, images, seeds = dist.pick_device(args.device), args.images(), args.seed_list()
    tokenizer = tokenizer_of(dict(tokenizer=args.tokenizer, vae_path=args.vae_path), images.channels).to(device)
    if "discrete" not in tokenizer.tokens:
        raise ValueError(
            f"--tokenizer {args.tokenizer} makes {' or '.join(tokenizer.tokens)} tokens, it must be of ids"
        )
    ids, labels = encode(tokenizer, images, args.batch_size, device)
    sizes = dict(img_size=images.img_size, vae_stride=tokenizer.stride, vae_embed_dim=tokenizer.channels)
    sizes |= dict(vocab_size=tokenizer.codebook_size, class_num=images.num_classes)
    build = partial(replace, MASKGIL_CONFIGS[args.model], **sizes)
    runs = {name: [] for name in NORMS}
    for name, seed in tqdm([*itertools.product(NORMS, seeds)], desc="runs", leave=False):
        curves = train(build(**NORMS[name]), ids, labels, args, seed)
        if not curves:
            raise ValueError(f"--lr {args.lr:g}: the first loss is not finite")
        runs[name].append(curves)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("curves.csv", csv_of(runs, seeds)), ("table.md", table(runs, args))):
        with atomic_file(folder / name) as temporary:
            temporary.write_text(text)
    draw(runs, folder / "curves.png")
    print(table(runs, args), end="")
    print(f"curves: {folder / 'curves.csv'}, figure: {folder / 'curves.png'}")
    return 0


def main(argv=None) -> int:
    """Parse, train, print; returns the exit code."""
    return run_with(run, AblateArgs, "ablate_norms.py", __doc__.splitlines()[0], argv, check)


if __name__ == "__main__":
    sys.exit(run_main(main))
