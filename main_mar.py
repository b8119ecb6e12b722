"""Train a model, or evaluate a checkpoint with --evaluate. `python main_mar.py --help` lists the flags.

MAR's flags keep their published spelling, default and meaning; --preset fills in the defaults of a known setting.
"""

import json
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from engine_mar import EpochSamples, evaluate, train
from heads.policy import load_heads
from sampling.prompts import prompts_of
from sampling.run import claim_folder
from sampling.settings import note_top_k
from training.build import (
    as_cached,
    build_data,
    build_model,
    check_cells,
    check_sizes,
    find_reference,
    give_captions,
    make_tokenizer,
    new_state,
    on_device,
    real_images,
    takes_ids,
    with_text,
)
from training.cached_picture import show_cached
from training.checkpoints import (
    averages_as_weights,
    check_output,
    check_resume,
    find_checkpoint,
    fit_classes,
    restore,
    restore_weights,
    stored_config,
)
from training.config import LaunchConfig, RunConfig, TrainConfig, flag_classes, resolve
from training.describe import attention_kernel, size_line
from training.objectives import OBJECTIVES
from training.state import TrainState
from util import dist
from util.args import check_folder, make_parser
from util.checkpoint import checkpoint_path
from util.door import run_main
from util.evaluation.metrics import metrics_line
from util.images.datasets import num_batches
from util.images.folders import check_output_folder
from util.images.text_cache import CachedTexts, open_texts
from util.lock import written_by_one

MOST_PROMPTS = 1000  # captions that samples are made of during training


def run(config: RunConfig) -> int:
    """Build everything, then train or evaluate."""
    launch, img_size = config.launch, config.model.img_size
    device = dist.pick_device(launch.device)
    dist.pick_dtype(launch.dtype, device)  # refused now, not after the data are read
    content, resumed = find_checkpoint(launch)
    dataset = build_data(config.data, img_size)
    config = replace(config, data=as_cached(config.data, dataset, img_size))
    check_sizes(config)
    reference = partial(find_reference, config.evaluation, config.data, img_size, dataset)
    if launch.online_eval or launch.evaluate:
        with dist.main_first():
            config.evaluation.check(reference(), img_size)
    torch.manual_seed(config.train.seed)  # the same initial weights on every process
    tokenizer = make_tokenizer(config.tokenizer, config.model, dataset.channels)
    check_cells(dataset, tokenizer)
    if config.data.use_cached:
        dataset.check(tokenizer, config.tokenizer.tokenizer, takes_ids(config.model))
    texts = open_texts(config.data.cached_text) if config.model.reads_text else None
    if texts is not None:
        config = replace(config, model=with_text(config.model, texts, content))
    model = build_model(config.model, tokenizer, dataset.num_classes, content, resumed)
    if texts is not None:
        model.prompts = prompts_of(texts)
    config = config.fitted(model)
    heads = load_heads(content) if launch.evaluate else config.build_heads(model.width)
    config.check_sampling(model, heads)
    note_top_k([config.sampling], model)
    on_device(device, model, tokenizer, heads)
    if launch.compile:
        model.compile_parts()
    real = partial(real_images, config.data, img_size, dataset)
    state = make_state(config, model, tokenizer, heads, dataset.flip, real)
    if texts is not None:
        give_captions(state, texts, dataset)
    if resumed:
        check_resume(launch, state.stored, content, dataset.classes)
    if dist.is_main() and not launch.evaluate:
        print(size_line(config.model.model, model, heads, attention_kernel(model.head_dim, device, state.dtype)))
    if content is not None and not resumed:
        content = fit_classes(state, content, launch, dataset.classes)
    first = begin(state, config.train, launch, content, resumed, dataset.counts)
    if config.data.use_cached and dist.is_main() and not launch.evaluate:
        show_cached(dataset, tokenizer, device, Path(launch.output_dir))
    samples = EpochSamples(
        sampling=config.sampling,
        evaluation=config.evaluation,
        seed=config.train.seed,
        output_dir=launch.output_dir,
        classes=dataset.classes,
        asked=asked(state, texts, dataset.classes),
        reference=reference,
        data=" ".join(filter(None, (config.data.data, config.data.place))),
        online=launch.online_eval,
    )
    if launch.evaluate:
        return evaluate_checkpoint(state, samples, launch.resume)
    workers = dict(num_workers=dist.num_loading(config.data.num_workers))
    workers["pin_memory"] = config.data.pin_mem and device.type == "cuda"
    with written_by_one(launch.output_dir):
        return train(state, dataset, config.train, launch, samples, workers, first)


def asked(state: TrainState, texts: CachedTexts | None, classes: list[str]) -> dict[int, str]:
    """{label: its name} of what samples are made of on the way: all classes, or some of the captions trained on."""
    if texts is None:
        return dict(enumerate(classes))
    return {number: texts.captions[number] for number in state.captions.examples(MOST_PROMPTS)}


def check_places(config: RunConfig) -> None:
    """Raise ValueError where a run cannot or must not write."""
    launch, data, sampling = config.launch, config.data, config.sampling
    for name in ("output_dir", "log_dir"):
        check_output_folder(name, getattr(launch, name), data.data, data.place, data.split_dir)
        if data.use_cached:
            check_output_folder(name, getattr(launch, name), "imagefolder", data.cached_path, ".")
    if launch.evaluate or launch.online_eval:  # a long name is refused now, not when images are sampled
        check_folder("output_dir", str(Path(launch.output_dir) / sampling.name()))
    if not launch.evaluate:
        check_output(launch)


def make_state(config: RunConfig, model, tokenizer, heads, flip: bool, real=None) -> TrainState:
    """The state of a run that starts, all parts on the model's device.

    flip: may images be mirrored? real: a function that gives the images trained on, for objectives that compare.
    """
    objective = OBJECTIVES[config.train.objective].build(model, heads, config.for_objective(flip, real))
    dtype = dist.pick_dtype(config.launch.dtype, next(model.parameters()).device)
    state = new_state(objective, tokenizer, config.train, dtype)
    parts = dict(tokenizer=config.tokenizer, data=config.data, sampling=config.sampling, evaluation=config.evaluation)
    state.stored = {"args": config.flat(), "config": stored_config(state, config.model.family_name, **parts)}
    return state


def begin(
    state: TrainState, train: TrainConfig, launch: LaunchConfig, content: dict | None, resumed: bool, counts: tuple
) -> int:
    """Load what a run starts from, and set its step; the epoch to begin with. counts: of the images of each size."""
    if min(counts) < train.global_batch and not launch.evaluate:
        of_size = " of one of the sizes" if len(counts) > 1 else ""
        raise ValueError(
            f"--batch_size: a global batch of {train.global_batch} is more than the {min(counts)} images{of_size} "
            "there are"
        )
    state.steps_per_epoch = max(num_batches(counts, train.global_batch), 1)
    state.num_steps = train.epochs * state.steps_per_epoch
    state.step = train.start_epoch * state.steps_per_epoch
    if resumed:
        return restore(state, content, launch.resume)
    if content is not None:
        frozen = train.freeze_backbone or not train.train_diffloss  # whose average would become what is frozen
        content = averages_as_weights(content) if frozen else content
        restore_weights(state, content, launch.init_from, heads_too=False)
    return train.start_epoch


def evaluate_checkpoint(state: TrainState, samples: EpochSamples, source: str) -> int:
    """--evaluate: sample with the averaged weights of the checkpoint `source`, compute the metrics, print them."""
    labels, reference = samples.labels(), samples.reference()
    with state.averaged() as parts:
        parts = replace(parts, checkpoint=str(checkpoint_path(source).resolve()))
        folder = claim_folder(Path(samples.output_dir) / "evaluation" / samples.sampling.name(), parts)
        result = evaluate(parts, samples.sampling, samples.evaluation, reference, labels, samples.seed, folder)
    if dist.is_main():
        print(samples.protocol(labels, reference, parts))
        print(f"{len(labels)} images in {folder}: {metrics_line(result['metrics']) or 'no metrics asked for'}")
    return 0


def show(config: RunConfig) -> None:
    """Print the resolved configuration as one JSON object, the model's under the name of its family."""
    settings = config.model.settings
    known = settings["vae_stride"] and settings["vae_embed_dim"]  # else the tokenizer, not loaded yet, decides them
    sizes = asdict(config.model.build()) if known else None
    print(json.dumps({**config.flat(), config.model.family_name: sizes}, indent=2))


def main(argv=None) -> int:
    """Parse, build, train; returns the exit code."""
    given = vars(make_parser("main_mar.py", __doc__.splitlines()[0], *flag_classes()).parse_args(argv))
    dry = given.get("dry_run", False)
    try:
        if not dry:
            dist.set_deterministic(given.get("deterministic", False))
            device = dist.pick_device(given.get("device", "auto"))
            dist.init(device, given.get("dist_url", "env://"), given.get("dist_on_itp", False))
        config = resolve(given)
        check_sizes(config)
        check_places(config)
        if dry:
            show(config)
            return 0
        # before the checkpoint is read: another run may be about to write a later one
        alone = nullcontext() if config.launch.evaluate else written_by_one(config.launch.output_dir, make=False)
        with alone:
            return run(config)
    finally:
        dist.shutdown()


if __name__ == "__main__":
    sys.exit(run_main(main))
