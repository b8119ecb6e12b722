"""A folder of images: batches shared between processes, files that are there skipped, what went wrong reported.

Legend: B images of a batch, L tokens an image, C channels a token.
"""

import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from heads.policy import FLAGS, PolicyHeads
from models.coding import encode, render
from models.families import takes_any_size
from models.text import reads_text
from sampling.adaptive import Spread, without_adaptive
from sampling.guards import complain, draw_finite, is_plain
from sampling.loop import generate
from sampling.prefix import Prefix
from sampling.settings import SampleConfig
from sampling.trace import GREY, Trace, over_pixels
from util import dist
from util.checkpoint import weights_hash
from util.evaluation.results import other_weights
from util.images.pictures import FULL, Writer, begin_folder, image_path, is_readable, prepare_folder, to_uint8
from util.lock import written_by_one
from util.rng import image_seeds


@dataclass(frozen=True)
class Parts:
    """What makes an image: a `models.families.Backbone`, its tokenizer, its policy heads, and what it starts from.

    All of it is on the device, or RuntimeError is raised.
    """

    model: nn.Module
    tokenizer: nn.Module
    device: torch.device
    dtype: torch.dtype
    heads: PolicyHeads | None = None
    checkpoint: str | None = None  # the file that has them, for run.json
    prefix: Prefix | None = None  # draws the first tokens of each image

    def __post_init__(self):
        causal = self.prefix and self.prefix.model
        dist.check_devices(self.device, model=self.model, tokenizer=self.tokenizer, heads=self.heads, prefix=causal)

    def weights_hash(self) -> str:
        """16 hex digits that change with the weights of model and heads."""
        return weights_hash({**self.model.state_dict(), **(self.heads.state_dict() if self.heads else {})})


def own_folder(folder: Path, parts: Parts, rows: list[dict] = ()) -> Path:
    """A setting's folder; where that is another checkpoint's, with other weights, one named by these weights too.

    rows: of the results file beside it, if there is one.
    """
    taken = other_weights(folder, rows, Path(parts.checkpoint))
    if taken and taken != {weights := parts.weights_hash()}:
        return folder.with_name(f"{folder.name}_weights{weights[:8]}")
    return folder


def claim_folder(folder: Path, parts: Parts, rows: list[dict] = ()) -> Path:
    """`own_folder`, made and marked as this checkpoint's: a process of another one that asks later gets another."""
    with dist.main_first():
        for _ in range(2 if dist.is_main() else 0):  # the first time another process may be quicker
            begin_folder(own_folder(folder, parts, rows), {"checkpoint": parts.checkpoint})
        return own_folder(folder, parts, rows)


def size_of_images(model) -> dict:
    """What a run says of the size of its images: {img_size} of a model for any, {} of one that has a single one."""
    return dict(img_size=model.config.img_size) if takes_any_size(model.config) else {}


def identity(parts: Parts, edit=None) -> dict:
    """What tells the images of a run apart beside settings and weights: an edit, a prefix, prompts, their size."""
    result = (edit.hashes if edit else {}) | (parts.prefix.hashes if parts.prefix else {})
    result |= dict(prompts=parts.model.prompts.content) if reads_text(parts.model) else {}
    return result | size_of_images(parts.model)


@contextmanager
def full_disk_named(folder: Path):
    """A disk that is full in the block raises an OSError that names the folder, and says what continues."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        kept = "the images that are whole are kept, and the same command makes the others"
        raise OSError(f"{folder} cannot be written ({error.strerror}): {kept}") from None


@torch.no_grad()
def sample_images(
    parts: Parts, sampling: SampleConfig, labels, seed: int, folder: Path, *, batch_size: int, num_traced=0, edit=None
) -> dict:
    """Write image i of labels[i] to folder/<i>.png for all i, sharing the batches between the processes.

    Image i depends on (seed, i), its label, the weights and the settings only (in int8, by less than its rounding, on
    its batch too, see `models.low_precision`); these stand in folder/run.json, and files of another run are removed. A
    batch whose files are all there and whole is skipped, any other is made again. num_traced: the growth of so many
    images goes to folder/trace.npz (see `sampling.trace`); where that is missing their batches, which all belong to
    the first process, are made again. edit, a `sampling.editing.Edit`: all images are made of its source, whose known
    tokens (the mean of the tokenizer's posterior) stay as they are, and so do the pixels that belong to them. Returns
    {weights (their hash), num_made, seconds, images_per_second}, summed over processes, and the network evaluations
    that an image took on average, counted (see `decode`; None where no image was made): mar_evals, mlp_evals. Of the
    images made it also counts redone_fp32, those drawn twice (`draw_finite`; a trace shows the first time), not_finite,
    those in vain, which are black, and one_colour, as a model that has learned little makes them; the last two are
    named on stderr.
    """
    settings = dict(asdict(sampling), seed=seed, labels=labels, batch_size=batch_size)
    settings |= dict(dtype=str(parts.dtype), device=parts.device.type, weights=parts.weights_hash())
    settings |= dict(tokenizer=parts.tokenizer.describe(), **identity(parts, edit))
    settings["checkpoint"] = parts.checkpoint
    run = SamplingRun(parts, sampling, labels, seed, folder, edit)
    with written_by_one(folder):
        if dist.is_main():
            prepare_folder(folder, settings)
        dist.barrier()
        trace = Trace(folder, labels[:num_traced], parts.model.config.seq_len, sampling.num_iter)
        batches = [range(i, min(i + batch_size, len(labels))) for i in range(0, len(labels), batch_size)]
        run.make(batches, trace)
        return {"weights": settings["weights"], **run.report()}


class SamplingRun:
    """The images of one setting as this process makes them, and what it counts while it does."""

    def __init__(self, parts: Parts, sampling: SampleConfig, labels, seed: int, folder: Path, edit):
        self.parts, self.sampling, self.edit = parts, sampling, edit
        self.labels, self.seed, self.folder = labels, seed, folder
        learned = {kind for kind in ("tau", "cfg") if getattr(sampling.resolved(), FLAGS[kind]) == "learned"}
        self.spread = Spread(name for kind, name in (("tau", "tau"), ("cfg", "w")) if kind in learned)
        quiet = sampling.heads_adaptive == "off" and parts.heads is not None
        self.rules = sampling.rules(without_adaptive(parts, sampling) if quiet else parts.heads)
        self.known = {}  # of an edit: tokens (1, L, …) and mask (1, L)
        if edit is not None:
            self.known["tokens"] = encode(parts.model, parts.tokenizer, edit.images().to(parts.device))
            self.known["mask"] = parts.tokenizer.unknown_tokens(torch.from_numpy(edit.unknown))[None]
        self.num_made, self.seconds, self.evals = 0, 0.0, Counter()
        self.redone, self.broken, self.plain = [], [], []  # numbers of images

    def make(self, batches: list[range], trace: Trace) -> None:
        """Make the batches that are this process's and are not made already; those to be traced are the first one's."""
        to_trace = [batch for batch in batches if batch.start < len(trace.labels)]
        traced = to_trace if dist.is_main() else []
        again = [] if trace.is_saved() else traced
        mine = traced + batches[len(to_trace) :][dist.rank() :: dist.world_size()]
        mine = [batch for batch in mine if batch in again or not self.is_made(batch)]
        began, quiet = time.perf_counter(), not (mine and dist.is_main())
        bar = tqdm(total=sum(map(len, mine)), unit="image", desc="sampling", disable=quiet, leave=False)
        with bar as progress, Writer() as writer:
            for batch in mine:
                trace.begin(batch if batch in again else None)
                images = self.draw_batch(batch, trace, progress)
                trace.end(self.growth, images)
                writer.save([image_path(self.folder, i) for i in batch], images)
                progress.update(len(batch))
        self.seconds = time.perf_counter() - began

    def is_made(self, batch: range) -> bool:
        """Are all files of a batch there and whole?"""
        return all(is_readable(image_path(self.folder, i)) for i in batch)

    def draw_batch(self, batch: range, trace: Trace, progress):
        """The images uint8 (B, H, W, C) of a batch, what is wrong with them noted."""
        latents, twice, lost = draw_finite(partial(self.latents, batch, trace, progress), len(batch), self.parts.dtype)
        images = self.pictures(latents)
        images[lost] = 0
        self.spread.end_batch()
        self.redone += [batch[row] for row in twice]
        self.broken += [batch[row] for row in lost]
        self.plain += [i for i, image in zip(batch, images) if is_plain(image)]
        self.num_made += len(batch)
        return images

    def latents(self, batch: range, trace: Trace, progress, rows, dtype) -> torch.Tensor:
        """Latents (b, c, h, w), or ids (b, h, w), of the images at these rows of a batch, computed in this dtype."""
        images = [batch[row] for row in rows]
        sampling, parts = self.sampling, self.parts

        def after_step(step, rows, plan, tokens):
            progress.set_postfix_str(f"step {step + 1}/{sampling.num_iter}")
            self.spread.record(step, plan)
            trace.record(step, rows, plan, tokens)

        labels, seeds = torch.tensor([self.labels[i] for i in images]), image_seeds(self.seed, images)
        with dist.autocast(parts.device, dtype):
            known = {name: known.expand(len(images), *known.shape[1:]) for name, known in self.known.items()}
            if parts.prefix is not None:
                known = parts.prefix.known(labels, seeds, parts.tokenizer, self.evals)
                seeds = parts.prefix.completion_seeds(seeds)
            return generate(
                parts.model,
                labels,
                self.rules,
                num_iter=sampling.num_iter,
                num_steps=sampling.num_sampling_steps,
                seeds=seeds,
                callback=None if trace.steps else after_step,  # a second time it would be traced twice
                clip=parts.tokenizer.clip,
                tokenizer=parts.tokenizer,
                smooth=sampling.smooth,
                refresh_every=sampling.refresh_every,
                **sampling.token_head_options(),
                evals=self.evals,
                **known,
            )

    def pictures(self, latents) -> torch.Tensor:
        """uint8 (B, H, W, C) of latents (B, c, h, w) or ids (B, h, w)."""
        images = to_uint8(render(self.parts.tokenizer, latents))
        return images if self.edit is None else self.edit.paste(images)

    @torch.no_grad()
    def growth(self, tokens, unknown: np.ndarray) -> np.ndarray:
        """uint8 (B, H, W, C) of unfinished images of tokens (B, L, …), of which unknown (B, L) bool are grey.

        Of several scales it is what those before the first unknown one make.
        """
        if self.parts.tokenizer.scales:
            images = to_uint8(self.parts.tokenizer.images_so_far(tokens, torch.from_numpy(unknown)))
            return images if self.edit is None else self.edit.paste(images)
        pictures = self.pictures(self.parts.model.unpatchify(tokens))
        return np.where(over_pixels(unknown, pictures.shape), GREY, pictures)

    def report(self) -> dict:
        """The figures of `sample_images`, summed over the processes."""
        tried = " in float32 too" if dist.is_half(self.parts.dtype) else ""
        complain(f"have numbers that are not finite{tried} and are left black", self.broken, self.num_made)
        complain("are of one colour, which a model makes that has learned little", self.plain, self.num_made)
        rate = dist.all_sum(torch.tensor(self.num_made / self.seconds, device=self.parts.device)).item()
        problems = {"redone_fp32": len(self.redone), "not_finite": len(self.broken), "one_colour": len(self.plain)}
        # whole numbers, since they are too large for float32; parts of a pass as thousandths
        counts = [self.num_made, *problems.values(), round(1000 * self.evals["mar"]), self.evals["mlp"]]
        counts = dist.all_sum(torch.tensor(counts, device=self.parts.device)).tolist()
        num_made, *counts, mar_evals, mlp_evals = counts
        dist.barrier()
        figures = {"num_made": num_made, "seconds": round(self.seconds, 3)}
        figures["images_per_second"] = round(rate, 3) if num_made else None
        figures |= dict(zip(problems, counts))
        for name, count in (("mar_evals", mar_evals / 1000), ("mlp_evals", mlp_evals)):
            figures[name] = round(count / num_made, 3) if num_made else None
        return figures | self.spread.report(self.sampling.num_iter, self.parts.device)
