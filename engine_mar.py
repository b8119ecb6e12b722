"""The engine: train a state epoch after epoch, with checkpoints and samples on the way; sample and measure a model."""

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from models.text import reads_text
from sampling.loop import generate
from sampling.run import Parts, sample_images
from sampling.settings import SampleConfig
from training.ahead import with_next
from training.checkpoints import checkpoint_content
from training.config import LaunchConfig, TrainConfig
from training.keeping import forget_best_after, keep_best, keep_checkpoint
from training.run_log import RunLog
from training.state import TrainState
from training.step import foresee, training_step
from training.stopping import interruptible, leave_signals_to_the_main_process, signals_noted
from util import dist
from util.checkpoint import checkpoint_path
from util.evaluation.metrics import metrics_line
from util.evaluation.protocol import EvalConfig, protocol, protocol_line, score
from util.graphs import release
from util.images.datasets import EpochSampler, broken_note
from util.images.pictures import PNGFolder, save_png

__all__ = ["EpochSamples", "evaluate", "generate", "sample_epoch", "sample_images", "train", "train_one_epoch"]

EPOCH_NPZ_LIMIT = 2**30  # bytes: a file an epoch must not fill the disk


def evaluate(parts: Parts, sampling: SampleConfig, evaluation: EvalConfig, reference, labels, seed, folder, **options):
    """`sample_images`, then (on the first process) samples.npz and the metrics: its figures and {metrics}.

    reference is what the images are compared with (a data set, FIDStats, or None with --metrics none); options:
    num_traced and edit of `sample_images`, npz_limit: bytes of images above which there is no samples.npz.
    """
    npz_limit = options.pop("npz_limit", None)
    batch_size = evaluation.eval_bsz
    result = sample_images(parts, sampling, labels, seed, folder, batch_size=batch_size, **options)
    result["metrics"] = {}
    if dist.is_main():
        images = PNGFolder(folder, len(labels))
        images.save_npz(labels, npz_limit)
        classes = None if reads_text(parts.model) else labels
        result["metrics"] = score(images, classes, reference, evaluation, parts.device)
    dist.barrier()
    return result


@dataclass(frozen=True)
class EpochSamples:
    """What is sampled and measured after an epoch, and where it goes.

    classes: of the data; asked: {label: its name} of what is sampled. reference: a function without arguments that
    gives what the metrics compare with; data: its name and place, for people. online: are metrics computed, at cfg 1
    and at the sampling's?
    """

    sampling: SampleConfig
    evaluation: EvalConfig
    seed: int
    output_dir: str
    classes: list[str]
    asked: dict[int, str]
    reference: Callable
    data: str
    online: bool = False

    def folder(self, epoch: int) -> Path:
        """Of an epoch's samples; the grid beside it, of the same name with .png, is written last."""
        return Path(self.output_dir) / "samples" / f"epoch{epoch + 1:04d}"

    def protocol(self, labels, reference, parts: Parts) -> str:
        """The line that says what the figures of the averaged weights are to be quoted with."""
        options = dict(ema=True, dtype=dist.dtype_name(parts.dtype), of_text=reads_text(parts.model))
        return protocol_line(protocol("generation", self.evaluation, labels, reference, self.data, **options))

    def labels(self) -> list[int]:
        """Of the images that are measured: those that are asked for in turn."""
        labels = list(self.asked)
        return [labels[i % len(labels)] for i in range(self.evaluation.num_images)]


def train(
    state: TrainState, dataset, config: TrainConfig, launch: LaunchConfig, samples: EpochSamples, workers: dict, first
) -> int:
    """Epoch after epoch from `first` on, with checkpoints, grids, metrics; 0, or 128 + the signal that ended it.

    workers: num_workers and pin_memory of the DataLoader.
    """
    if first >= config.epochs and not samples_missing(state, samples, first - 1, config, launch):
        if dist.is_main():
            print(f"{checkpoint_path(launch.resume)} is trained already: {first} epochs, step {state.step}")
        return 0
    where = dict(rank=dist.rank(), world_size=dist.world_size(), counts=dataset.counts)
    sampler = EpochSampler(len(dataset), config.images_per_process, config.seed, **where)
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        persistent_workers=workers["num_workers"] > 0,
        worker_init_fn=leave_signals_to_the_main_process,
        **workers,
    )
    log = RunLog(launch.output_dir, launch.log_dir, state.step) if dist.is_main() else None
    # Steps done and to do: another batch size on resume makes other epochs than those behind. Closing the bar late
    # keeps one estimate of the time left for the whole run.
    total = state.step + (config.epochs - first) * len(sampler) - state.batch
    progress = tqdm(total=total, initial=state.step, unit="step", disable=not dist.is_main())
    progress.set_description("training")
    began, first_step = time.perf_counter(), state.step
    if dist.is_main():
        forget_best_after(launch.output_dir, state.step)
    with progress, signals_noted(state):
        if state.batch == 0 and samples_missing(state, samples, first - 1, config, launch):  # stopped while sampling
            sample_during_training(state, samples, first - 1, log)
        for epoch in range(first, config.epochs):
            if state.stopping:
                break
            sampler.set_epoch(epoch, state.batch)
            dataset.set_epoch(config.seed, epoch)
            state.wrapped.train()
            whole = train_one_epoch(state, loader, epoch, config, progress, log)
            if epoch == first < config.epochs - 1:  # at the end it would be late to look at the files
                say_broken(state, dataset)
            finish_epoch(state, samples, epoch if whole else epoch - 1, epoch, config, launch, log)
    if log is not None:
        log.close()
    broken = count_broken(state, dataset)
    if dist.is_main():
        seconds = time.perf_counter() - began
        rate = (state.step - first_step) * config.global_batch / seconds
        print_end(state, launch.output_dir, broken_note(broken, len(dataset)), rate)
    return 128 + stop_number(state) if state.stopping else 0


def train_one_epoch(state: TrainState, loader, epoch: int, config: TrainConfig, progress, log) -> bool:
    """Run the epoch's batches from state.batch on; False if it ended early, on a signal, with its step finished.

    loader yields (batch, labels (b,), indices (b,)) with b = config.images_per_process, batch being images uint8
    (b, c, H, W) or cached moments (b, 2, c', h, w), see `util.images.latents`. log: a `training.run_log.RunLog` on the
    first process, None on the others. Raises FloatingPointError after 20 steps in a row without a finite gradient.
    """
    began = time.perf_counter()
    for (batch, labels, indices), following in with_next(loader):
        if following is not None:
            next_batch, _, next_indices = following
            foresee(state, next_batch, next_indices, config.accum_iter)
        lr = config.rate(epoch + state.batch / len(loader), len(loader))
        record = training_step(state, batch, labels, indices, lr, config)
        state.batch += 1
        speed = len(batch) * dist.world_size() / (time.perf_counter() - began)
        began = time.perf_counter()
        if log is not None:
            log.step(state.step, record, images_per_second=speed)
        progress.set_postfix_str(f"loss {record['loss']:.3f}", refresh=False)
        progress.update()
        if state.stopping:
            break
    whole = state.batch == len(loader)
    state.batch = 0 if whole else state.batch
    return whole


def finish_epoch(
    state: TrainState, samples: EpochSamples, done: int, epoch: int, config: TrainConfig, launch: LaunchConfig, log
) -> None:
    """After the batches of an epoch: a checkpoint and samples, where they are due; done: the last whole epoch."""
    to_sample = due_for_samples(epoch, config, launch)
    due = state.stopping or to_sample or (epoch + 1) % launch.save_last_freq == 0
    if dist.is_main() and (due or state.unsaved):
        log.sync()
        last = state.stopping or epoch + 1 == config.epochs
        save(state, done, samples.classes, launch, may_fail=not last)
    if due:
        dist.barrier()
    if to_sample and not state.stopping:
        sample_during_training(state, samples, epoch, log)
        if state.stopping and state.unsaved:
            save(state, epoch, samples.classes, launch, may_fail=False)


def save(state: TrainState, epoch: int, classes: list[str], launch: LaunchConfig, may_fail: bool) -> None:
    """Save a checkpoint, `epoch` being the last finished one.

    With may_fail a full disk is a warning: the run goes on, and tries again after the next epoch.
    """
    folder = launch.output_dir
    try:
        keep_checkpoint(folder, checkpoint_content(state, epoch, classes), launch.keep_last)
        state.unsaved = False
    except OSError as error:
        state.unsaved = True
        what = f"the checkpoint of step {state.step} could not be saved in {folder} ({error.strerror or error})"
        if not may_fail:
            raise OSError(f"{what}; the one before it is whole") from None
        tqdm.write(f"warning: {what}; the one before it is whole, the next try is after the next epoch")


def sample_during_training(state: TrainState, samples: EpochSamples, epoch: int, log) -> None:
    """`sample_epoch`, which a signal may interrupt: all that is trained is saved."""
    with interruptible(state):
        try:
            sample_epoch(state, samples, epoch, log)
        except OSError as error:  # a full disk, say; the next --resume makes them
            if dist.world_size() > 1:  # the others wait for this process
                raise
            tqdm.write(f"warning: the samples of epoch {epoch + 1} could not be made ({error})")


def due_for_samples(epoch: int, config: TrainConfig, launch: LaunchConfig) -> bool:
    """Is a grid of samples made after this epoch?"""
    return epoch == config.epochs - 1 or (epoch + 1) % launch.eval_freq == 0


def samples_missing(
    state: TrainState, samples: EpochSamples, epoch: int, config: TrainConfig, launch: LaunchConfig
) -> bool:
    """Was this epoch finished without its grid? The same answer on all processes."""
    missing = epoch >= 0 and due_for_samples(epoch, config, launch)
    missing = missing and dist.is_main() and not samples.folder(epoch).with_suffix(".png").is_file()
    return bool(dist.all_sum(torch.tensor(float(missing), device=state.device)))


def sample_epoch(state: TrainState, samples: EpochSamples, epoch: int, log) -> None:
    """A grid of samples with the averaged weights and, with --online_eval, the metrics at cfg 1 and at --cfg."""
    folder, seed = samples.folder(epoch), samples.seed
    columns = min(len(samples.asked), 10)
    fids = []
    with state.averaged() as parts:
        labels = list(samples.asked)[:columns] * 4
        sample_images(parts, samples.sampling, labels, seed, folder / "grid", batch_size=20)
        if dist.is_main():
            sheet = PNGFolder(folder / "grid", len(labels)).grid([samples.asked[label] for label in labels], columns)
            log.image("samples", sheet, state.step)
        if samples.online:
            fids = measure_epoch(state, parts, samples, epoch, log)
    for model in (parts.model, state.model):
        release(model)  # the memory of captures, which training needs
    if dist.is_main():
        if fids and not state.unsaved:
            keep_best(samples.output_dir, min(fids), state.step)
        save_png(folder.with_suffix(".png"), sheet)


def measure_epoch(state: TrainState, parts: Parts, samples: EpochSamples, epoch: int, log) -> list[float]:
    """The metrics at cfg 1 and at the sampling's, logged and printed; the FIDs, on the first process."""
    labels, fids = samples.labels(), []
    reference = samples.reference() if dist.is_main() else None
    for cfg in sorted({1.0, samples.sampling.cfg}):
        sampling = replace(samples.sampling, cfg=cfg)
        place = dict(folder=samples.folder(epoch) / sampling.name(), npz_limit=EPOCH_NPZ_LIMIT)
        result = evaluate(parts, sampling, samples.evaluation, reference, labels, samples.seed, **place)
        metrics = result["metrics"]
        if dist.is_main():
            for name, value in metrics.items():
                log.scalar(f"eval_cfg{cfg:g}/{name}", value, state.step)
            fids += [metrics["fid"]] if "fid" in metrics else []
            tqdm.write(samples.protocol(labels, reference, parts))
            tqdm.write(f"epoch {epoch + 1}, cfg {cfg:g}: {metrics_line(metrics)}")
    return fids


def count_broken(state: TrainState, dataset) -> int:
    """Unreadable files that any process has met."""
    broken = dataset.broken.float().to(state.device)
    if not state.interrupted:  # then the other processes may be anywhere
        dist.all_sum(broken)  # each process has met its own broken files
    return int((broken > 0).sum())


def say_broken(state: TrainState, dataset) -> None:
    """Say how many unreadable files there are, if any."""
    note = broken_note(count_broken(state, dataset), len(dataset))
    if note and dist.is_main():
        tqdm.write(note)


def stop_number(state: TrainState) -> signal.Signals:
    """The signal that stopped the run; it may have gone to another process."""
    return signal.Signals(state.stop_signal or signal.SIGTERM)


def print_end(state: TrainState, output_dir: str, broken: str, rate: float) -> None:
    """What a run has to say at its end; broken: of unreadable files."""
    notes = [broken] if broken else []
    notes += [f"{state.bad_steps} steps without a finite gradient were skipped"] if state.bad_steps else []
    where = checkpoint_path(output_dir)
    if state.stopping:
        stopped = f"stopped by {stop_number(state).name} after step {state.step}, saved {where}"
        notes += [f"{stopped}; continue with the same command and\n  --resume {output_dir}"]
    else:
        notes += [f"trained to step {state.step} at {rate:.0f} images/s: {where}"]
    print("\n".join(notes), flush=True)
