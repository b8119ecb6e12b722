"""Train MAR, or evaluate a checkpoint with --evaluate. `python main_mar.py --help` lists the flags.

MAR's flags keep their published spelling, default and meaning; --preset fills in the defaults of a known setting.
"""

import contextlib
import json
import signal
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from engine_mar import evaluate, train_one_epoch
from heads.policy import load_heads
from sampling.run import sample_images
from sampling.settings import SampleConfig
from training.build import build_data, build_model, check_resume, data_place, find_checkpoint, find_reference, new_state
from training.config import CONFIGS, TrainConfig, mar_config, resolve
from training.keeping import forget_best_after, keep_best, keep_checkpoint
from training.run_log import RunLog
from training.state import TrainState, checkpoint_content, restore, restore_weights
from util import dist
from util.args import check_folder, make_parser, pick, run_main
from util.checkpoint import checkpoint_path
from util.evaluation.metrics import metrics_line
from util.evaluation.protocol import EvalConfig, protocol, protocol_line
from util.images.datasets import EpochSampler
from util.images.pictures import PNGFolder, save_png


def measured_how(values: dict, state: TrainState, labels, reference) -> str:
    """The line that says what the figures of the averaged weights are to be quoted with."""
    data = " ".join(filter(None, (values["data"], data_place(values))))
    how = protocol(
        "generation", pick(EvalConfig, values), labels, reference, data, ema=True, dtype=dist.dtype_name(state.dtype)
    )
    return protocol_line(how)


def train(values: dict, state: TrainState, dataset, first: int) -> int:
    """Epoch after epoch from `first` on, with checkpoints, grids, metrics; 0, or 128 + the signal that ended it."""
    args = pick(TrainConfig, values)
    if first >= args.epochs and not samples_missing(values, state, first - 1):
        if dist.is_main():
            print(f"{checkpoint_path(values['resume'])} is trained already: {first} epochs, step {state.step}")
        return 0
    per_process = args.batch_size * args.accum_iter
    sampler = EpochSampler(len(dataset), per_process, args.seed, dist.rank(), dist.world_size())
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=args.num_workers,
        pin_memory=args.pin_mem and state.device.type == "cuda",
        persistent_workers=args.num_workers > 0,
        worker_init_fn=_leave_signals_to_the_main_process,
    )
    log = RunLog(args.output_dir, args.log_dir, state.step) if dist.is_main() else None
    # Steps done and to do: another batch size on resume makes other epochs than those behind. Closing the bar late
    # keeps one estimate of the time left for the whole run.
    total = state.step + (args.epochs - first) * len(sampler) - state.batch
    progress = tqdm(total=total, initial=state.step, unit="step", disable=not dist.is_main())
    progress.set_description("training")
    began, first_step = time.perf_counter(), state.step
    if dist.is_main():
        forget_best_after(args.output_dir, state.step)
    with progress, signals_noted(state):
        if state.batch == 0 and samples_missing(values, state, first - 1):  # the last run was stopped while sampling
            sample_during_training(values, state, dataset, first - 1, log)
        for epoch in range(first, args.epochs):
            if state.stopping:
                break
            sampler.set_epoch(epoch, state.batch)
            state.module.train()
            whole = train_one_epoch(state, loader, epoch, args, dataset.flip, progress, log)
            to_sample = due_for_samples(epoch, args)
            due = state.stopping or to_sample or (epoch + 1) % args.save_last_freq == 0
            if dist.is_main() and (due or state.unsaved):
                log.sync()
                last = state.stopping or epoch + 1 == args.epochs
                save(state, values, epoch if whole else epoch - 1, dataset.classes, may_fail=not last)
            if due:
                dist.barrier()
            if to_sample and not state.stopping:
                sample_during_training(values, state, dataset, epoch, log)
                if state.stopping and state.unsaved:
                    save(state, values, epoch, dataset.classes, may_fail=False)
    if log is not None:
        log.close()
    broken = dataset.broken.float().to(state.device)
    if not state.interrupted:  # then the other processes may be anywhere
        dist.all_sum(broken)  # each process has met its own broken files
    num_broken = int((broken > 0).sum())
    number = signal.Signals(state.stop_signal or signal.SIGTERM)  # it may have gone to another process
    code = 128 + number if state.stopping else 0
    if not dist.is_main():
        return code
    rate = (state.step - first_step) * per_process * dist.world_size() / (time.perf_counter() - began)
    notes = [f"{num_broken} broken images were skipped"] if num_broken else []
    notes += [f"{state.bad_steps} steps without a finite gradient were skipped"] if state.bad_steps else []
    where = checkpoint_path(args.output_dir)
    if state.stopping:
        notes.append(
            f"stopped by {number.name} after step {state.step}, saved {where}; continue with the same command and"
        )
        print("\n".join(notes) + f"\n  --resume {args.output_dir}", flush=True)
        return code
    print("\n".join([*notes, f"trained to step {state.step} at {rate:.0f} images/s: {where}"]))
    return 0


def save(state: TrainState, values: dict, epoch: int, classes: list[str], may_fail: bool) -> None:
    """Save a checkpoint, `epoch` being the last finished one.

    With may_fail a full disk is a warning: the run goes on, and tries again after the next epoch.
    """
    folder = values["output_dir"]
    try:
        keep_checkpoint(folder, checkpoint_content(state, values, epoch, classes), values["keep_last"])
        state.unsaved = False
    except OSError as error:
        state.unsaved = True
        what = f"the checkpoint of step {state.step} could not be saved in {folder} ({error.strerror or error})"
        if not may_fail:
            raise OSError(f"{what}; the one before it is whole") from None
        tqdm.write(f"warning: {what}; the one before it is whole, the next try is after the next epoch")


def _leave_signals_to_the_main_process(worker) -> None:
    """A scheduler's SIGTERM goes to every process of a job; the loading ones must live until the step is finished."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def signals_noted(state: TrainState):
    """SIGTERM and SIGINT are noted in the state, for the end of the step; where it is interruptible, they interrupt."""

    def note(number, frame):
        state.stop_signal = number
        if state.interruptible:
            raise KeyboardInterrupt

    handlers = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def sample_during_training(values, state, dataset, epoch, log) -> None:
    """`sample_epoch`, which a signal may interrupt: all that is trained is saved."""
    state.interruptible = True
    try:
        if state.stop_signal:  # it came since the last step
            raise KeyboardInterrupt
        sample_epoch(values, state, dataset, epoch, log)
    except KeyboardInterrupt:
        state.stopping = state.interrupted = True
    except OSError as error:  # a full disk, say; the next --resume makes them
        if dist.world_size() > 1:  # the others wait for this process
            raise
        tqdm.write(f"warning: the samples of epoch {epoch + 1} could not be made ({error})")
    finally:
        state.interruptible = False


def due_for_samples(epoch: int, args: TrainConfig) -> bool:
    """Is a grid of samples made after this epoch?"""
    return epoch == args.epochs - 1 or (epoch + 1) % args.eval_freq == 0


def samples_missing(values, state, epoch) -> bool:
    """Was this epoch finished without its grid? The same answer on all processes."""
    missing = epoch >= 0 and due_for_samples(epoch, pick(TrainConfig, values))
    missing = missing and dist.is_main() and not samples_folder(values, epoch).with_suffix(".png").is_file()
    return bool(dist.all_sum(torch.tensor(float(missing), device=state.device)))


def samples_folder(values, epoch) -> Path:
    """Where an epoch's samples go; the grid beside it, of the same name with .png, is written last."""
    return Path(values["output_dir"]) / "samples" / f"epoch{epoch + 1:04d}"


def sample_epoch(values, state, dataset, epoch, log) -> None:
    """A grid of samples with the averaged weights and, with --online_eval, the metrics at cfg 1 and at --cfg."""
    sampling, evaluation = pick(SampleConfig, values), pick(EvalConfig, values)
    folder = samples_folder(values, epoch)
    options = dict(heads=state.heads, device=state.device, dtype=state.dtype)
    columns = min(dataset.num_classes, 10)
    fids = []
    with state.averaged():
        labels = [i % columns for i in range(4 * columns)]
        sample_images(
            state.mar, state.tokenizer, sampling, labels, values["seed"], folder / "grid", batch_size=20, **options
        )
        if dist.is_main():
            sheet = PNGFolder(folder / "grid", len(labels)).grid([dataset.classes[k] for k in labels], columns)
            log.image("samples", sheet, state.step)
        labels = [i % dataset.num_classes for i in range(evaluation.num_images)]
        reference = find_reference(values, dataset) if values["online_eval"] and dist.is_main() else None
        for cfg in sorted({1.0, sampling.cfg}) if values["online_eval"] else ():
            now = replace(sampling, cfg=cfg)
            where = folder / now.name()
            found = evaluate(
                state.mar, state.tokenizer, now, evaluation, reference, labels, values["seed"], where, **options
            )
            if dist.is_main():
                for name, value in found["metrics"].items():
                    log.scalar(f"eval_cfg{cfg:g}/{name}", value, state.step)
                fids += [found["metrics"][name] for name in ("fid",) if name in found["metrics"]]
                tqdm.write(measured_how(values, state, labels, reference))
                tqdm.write(f"epoch {epoch + 1}, cfg {cfg:g}: {metrics_line(found['metrics'])}")
    if dist.is_main():
        if fids and not state.unsaved:
            keep_best(values["output_dir"], min(fids), state.step)
        save_png(folder.with_suffix(".png"), sheet)


def run(values: dict) -> int:
    """Build everything, then train or evaluate."""
    device = dist.pick_device(values["device"])
    dtype = dist.pick_dtype(values["dtype"], device)
    for name in ("output_dir", "log_dir"):
        check_folder(name, values[name])
    content, resumed = find_checkpoint(values)
    dataset = build_data(values)
    if values["online_eval"] or values["evaluate"]:
        with dist.main_first():
            pick(EvalConfig, values).check(find_reference(values, dataset), values["img_size"])
    torch.manual_seed(values["seed"])  # the same initial weights on every process
    mar, tokenizer = build_model(values, dataset, content)
    if resumed:
        check_resume(values, content, mar, tokenizer, dataset)
    mar, tokenizer = mar.to(device), tokenizer.to(device)
    if values["compile"]:
        mar.compile_parts()
    args = pick(TrainConfig, values)
    heads = load_heads(content) if args.evaluate else args.heads(mar.config.decoder_embed_dim)
    pick(SampleConfig, values).rules(heads)
    heads = heads.to(device) if heads is not None else None
    state = new_state(values, mar, tokenizer, heads, device, dtype)
    global_batch = values["batch_size"] * values["accum_iter"] * dist.world_size()
    if len(dataset) < global_batch and not values["evaluate"]:
        raise ValueError(
            f"--batch_size: a global batch of {global_batch} is more than the {len(dataset)} images there are"
        )
    state.steps_per_epoch = max(len(dataset) // global_batch, 1)
    first = values["start_epoch"]
    state.step = first * state.steps_per_epoch
    if content is not None and not resumed:
        restore_weights(state, content, values["init_from"], heads_too=False)
    elif content is not None:
        first = restore(state, content, values["resume"])
    if values["evaluate"]:
        return evaluate_checkpoint(values, state, dataset)

    return train(values, state, dataset, first)


def evaluate_checkpoint(values, state, dataset) -> int:
    """--evaluate: sample with the averaged weights, compute the metrics, print them."""
    sampling, evaluation = pick(SampleConfig, values), pick(EvalConfig, values)
    folder = Path(values["output_dir"]) / "evaluation" / sampling.name()
    labels = [i % dataset.num_classes for i in range(evaluation.num_images)]
    options = dict(heads=state.heads, device=state.device, dtype=state.dtype)
    reference = find_reference(values, dataset)
    with state.averaged():
        found = evaluate(
            state.mar, state.tokenizer, sampling, evaluation, reference, labels, values["seed"], folder, **options
        )
    if dist.is_main():
        print(measured_how(values, state, labels, reference))
        print(f"{len(labels)} images in {folder}: {metrics_line(found['metrics']) or 'no metrics asked for'}")
    return 0


def main(argv=None) -> int:
    """Parse, build, train; returns the exit code."""
    given = vars(make_parser("main_mar.py", __doc__.splitlines()[0], *CONFIGS).parse_args(argv))
    dry = given.get("dry_run", False)
    try:
        if not dry:
            dist.set_deterministic(given.get("deterministic", False))
            device = dist.pick_device(given.get("device", "auto"))
            dist.init(device, given.get("dist_url", "env://"), given.get("dist_on_itp", False))
        values = resolve(given)
        if dry:
            known = values["vae_stride"] and values["vae_embed_dim"]  # else they are the tokenizer's, not loaded here
            print(json.dumps({**values, "mar": asdict(mar_config(values)) if known else None}, indent=2))
            return 0
        return run(values)
    finally:
        dist.shutdown()


if __name__ == "__main__":
    sys.exit(run_main(main))
