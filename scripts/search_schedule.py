"""Search a schedule by CMA-ES: group sizes, temperature and guidance of each step, and the profile of the guidance.

Of a model that draws tokens without diffusion steps there is no profile; of one that draws one token a step there are
no group sizes, and temperature and guidance have --num_iter values, between which its steps interpolate.

    python scripts/search_schedule.py --checkpoint output_dir/quickstart --out schedule.json
    python sample.py --checkpoint output_dir/quickstart --output_dir OUT --schedule schedule.json --num_iter 4 \\
        --num_sampling_steps 8 --solver dpmpp_sde

What is minimised is the mean, over the kinds in --features and weighted by --reward_weights, of the Fréchet distance of
--num_images images to the data, divided by that of the start, which is the best point of a small grid of hand-made
settings. The points of a generation have the same random numbers, and each generation others: what is good for some
images alone does not last. At the end the start and the mean of the search are measured on images that neither has
seen, and the better one is written. Judge it by other features: docs/evaluation.md.

OUT.json         the schedule, with what it was made of and its distances
OUT.state.json   the search so far, after each generation; the same command goes on from it exactly
OUT.png          the distances over the evaluations
"""

import json
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

from diffusion.schedule import num_steps_setting
from diffusion.solvers import SOLVERS
from heads.orders import ORDERS
from heads.policy import build_rules
from heads.schedules import needed_steps
from heads.searched import read_schedule
from models.coding import render
from models.loading import load_model
from models.low_precision import prepare
from sampling.loop import generate
from sampling.run import Parts
from sampling.settings import SampleConfig
from training.search import Options, Search, hand_made_grid, kinds_of, ratio, read_state
from util import dist
from util.args import check_output_file, flag, run_with
from util.checkpoint import atomic_file, checkpoint_path
from util.door import run_main
from util.evaluation.results import git_commit
from util.evaluation.reward import RewardDistance, reward_kinds, reward_weights
from util.images.datasets import build_dataset
from util.images.folders import check_output_folder
from util.images.pictures import is_png, to_uint8
from util.images.reading import stored_reading
from util.rng import DEFAULT_SEED, image_seeds, seed_of


@dataclass(frozen=True)
class SearchArgs:
    """What is searched for, by which distance, for how long."""

    checkpoint: str | None = flag(None, "folder or file of the checkpoint")
    out: str | None = flag(None, "the .json to write; the state and the picture get names beside it")
    features: str = flag("digits,pixels", "comma list of the kinds of features of the reward, two at least")
    reward_weights: str | None = flag(None, "comma list of their weights (default: 1 each)")
    data_path: str | None = flag(None, "folder of the real images (default: the training data)")
    num_iter: int = flag(4, "autoregressive steps; of a model that draws one token a step: values of tau and w", low=1)
    num_sampling_steps: int | str = flag(
        8,
        "diffusion steps of each, or A:B from A at the first to B at the last",
        type=num_steps_setting,
        metavar="T|A:B",
    )
    solver: str = flag("dpmpp_sde", "solver of the diffusion head", choices=SOLVERS)
    order: str | None = flag(None, "order of the tokens (default: random, or the model's)", choices=ORDERS)
    num_images: int = flag(900, "images of an evaluation", low=2)
    batch_size: int = flag(300, "images a batch", low=1)
    popsize: int = flag(12, "evaluations of a generation", low=4)
    iterations: int = flag(100, "generations", low=1)
    max_minutes: float = flag(
        30.0, "minutes of evaluations, all calls together, after which no generation begins", low=0
    )
    seed: int = flag(DEFAULT_SEED, "seed of the images and of the search", low=0, high=2**32 - 2)
    sigma: float = flag(0.5, "first standard deviation of the search", low=1e-6)
    no_ema: bool = flag(False, "the raw weights instead of the averaged ones")
    device: str = flag("auto", "auto, cuda, mps, cpu")
    dry_run: bool = flag(False, "print the resolved configuration and stop")


def is_own(path: Path, read) -> bool:
    """Is an existing file one that `read` takes?"""
    try:
        return bool(read(path))
    except ValueError:
        return False


# -------------------------------------------------------------------------------------------------------- the program


UNSEEN = range(-1, -4, -1)  # draws of images to choose the schedule by that is written


class Sampled:
    """values, draw -> {kind: distance} of the images that a schedule makes, labels in turn; draw: which images."""

    def __init__(self, args: SearchArgs):
        self.args = args
        model, tokenizer, config = load_model(args.checkpoint, ema=not args.no_ema)
        device = dist.pick_device(args.device)
        one_a_step = model.fixed_rules.get("group") == "one"
        sampling = SampleConfig(num_iter=None if one_a_step else args.num_iter, order=args.order, solver=args.solver)
        self.sampling = sampling.fitted(model.fixed_rules, "the model", needed_steps(model))
        self.sampling.check(model)
        self.order = self.sampling.order or "random"
        self.parts = Parts(model.to(device), tokenizer.to(device), device, dist.pick_dtype(None, device))
        prepare(model, self.parts.dtype)
        data, reading = config["data"], stored_reading(config["data"].get("reading"))
        place = args.data_path or data["path"]
        check_output_folder("out", Path(args.out).parent, data["name"], place, reading.split_dir)
        where = dict(data_path=place, img_size=model.config.img_size, split="train")
        real = build_dataset(data["name"], **where, reading=reading)
        self.reward = RewardDistance(real, reward_kinds(args.features), device)
        self.labels = torch.arange(args.num_images) % len(data["classes"])

    def __call__(self, values: dict, draw: int) -> dict[str, float]:
        args, parts = self.args, self.parts
        rules = build_rules("baseline", order=self.order, group=self.sampling.group, schedule=json.dumps(values))
        options = dict(num_iter=self.sampling.num_iter, num_steps=args.num_sampling_steps, solver=args.solver)
        options |= dict(clip=parts.tokenizer.clip, tokenizer=parts.tokenizer)
        images = []
        for rows in torch.arange(args.num_images).split(args.batch_size):
            seeds = image_seeds(seed_of("schedule", args.seed, draw), rows)
            with dist.autocast(parts.device, parts.dtype), torch.no_grad():
                drawn = generate(parts.model, self.labels[rows], rules, seeds=seeds, **options)
                images.append(to_uint8(render(parts.tokenizer, drawn)))
        return self.reward(np.concatenate(images))


def draw(search: Search, path: Path) -> None:
    """The distances over the evaluations as a PNG: all points, and the generations' means, by kind too."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    generations = [generation["distances"] for generation in search.state["generations"]]
    ratios = np.array(
        [
            [ratio(distances, search.unit, search.options.reward_weights) for distances in measured]
            for measured in generations
        ]
    )
    counts = np.arange(1, ratios.size + 1).reshape(ratios.shape)
    figure, panel = plt.subplots(figsize=(7, 4))
    panel.scatter(counts, ratios, s=6, color="0.75", label="a point")
    panel.plot(counts[:, -1], ratios.mean(axis=1), color="black", label="a generation's mean")
    for kind, unit in search.unit.items():
        means = [np.mean([distances[kind] for distances in measured]) / unit for measured in generations]
        panel.plot(counts[:, -1], means, linewidth=1, label=f"{kind} alone")
    panel.set(xlabel="evaluations", ylabel="distance / that of the start", ylim=(0, 2))
    panel.legend(frameon=False)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120, bbox_inches="tight")
    plt.close(figure)


def files_of(out: Path) -> tuple[Path, Path, Path]:
    """The schedule, the state of the search, the picture."""
    return out, out.with_suffix(".state.json"), out.with_suffix(".png")


def check_args(args: SearchArgs) -> None:
    """Raise ValueError where what is written cannot or must not be, and for flags that are wrong by themselves."""
    for name in ("checkpoint", "out"):
        if getattr(args, name) is None and not args.dry_run:
            raise ValueError(f"--{name} is needed")
    reward_weights(args.reward_weights, reward_kinds(args.features))
    if args.out is None:
        return
    out, state, picture = files_of(Path(args.out))
    check_output_folder("out", out.parent)
    if out.suffix != ".json":
        raise ValueError(f"--out {out} must end in .json")
    kinds = ((out, partial(is_own, read=read_schedule)), (state, partial(is_own, read=read_state)), (picture, is_png))
    inputs = [checkpoint_path(args.checkpoint)] if args.checkpoint else []
    for path, is_of_its_kind in kinds:
        check_output_file("out", path, is_of_its_kind, inputs)


def mean_distances(measure: Sampled, values: dict) -> dict[str, float]:
    """{kind: distance} of a schedule, a mean over the draws of UNSEEN."""
    several = [measure(values, draw) for draw in UNSEEN]
    return {kind: float(np.mean([distances[kind] for distances in several])) for kind in several[0]}


def run(args: SearchArgs) -> int:
    """Search, or go on, and write the schedule; returns the exit code."""
    out, state, picture = files_of(Path(args.out))
    measure = Sampled(args)
    model = measure.parts.model
    if args.num_iter > model.config.seq_len:
        raise ValueError(f"--num_iter {args.num_iter} must be at most the {model.config.seq_len} tokens of an image")
    changing = ("out", "iterations", "max_minutes", "dry_run", "device", "checkpoint")
    settings = {k: v for k, v in asdict(args).items() if k not in changing}
    settings |= dict(order=measure.order, weights=measure.parts.weights_hash())
    out.parent.mkdir(parents=True, exist_ok=True)
    grid = hand_made_grid(args.num_iter, model.config.seq_len, kinds_of(model))
    weights = reward_weights(args.reward_weights, reward_kinds(args.features))
    search = Search(measure, grid, state, settings, Options(args.popsize, args.seed, args.sigma, weights))
    search.run(args.iterations, args.max_minutes * 60)
    candidates = search.candidates()
    check = {name: mean_distances(measure, values) for name, values in candidates.items()}
    ratios = {name: ratio(distances, check["start"], weights) for name, distances in check.items()}
    name = min(candidates, key=ratios.get)
    generations = len(search.state["generations"])
    evaluations = len(grid) + generations * args.popsize
    provenance = settings | dict(checkpoint=str(args.checkpoint), point=name)
    provenance |= dict(evaluations=evaluations, generations=generations, git_commit=git_commit())
    provenance["distance"] = dict(start=search.unit, unseen=check, unseen_over_start=ratios)
    provenance["start"] = search.start
    with atomic_file(out) as temporary:
        temporary.write_text(json.dumps({"provenance": provenance, "values": candidates[name]}, indent=1) + "\n")
    if generations:
        draw(search, picture)
    unseen = f"on images that neither has seen the mean is at {ratios['mean']:.3f} times the start's distance"
    print(f"{evaluations} evaluations; {unseen}; {out} has the {name}")
    for kind in check["start"]:
        print(f"Fréchet ({kind}) on these: start {check['start'][kind]:.3f}, written {check[name][kind]:.3f}")
    return 0


def main(argv=None) -> int:
    """Parse, search; returns the exit code."""
    return run_with(run, SearchArgs, "search_schedule.py", __doc__.splitlines()[0], argv, check_args)


if __name__ == "__main__":
    sys.exit(run_main(main))
