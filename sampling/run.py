"""A folder of images: batches shared between processes, files that are there skipped, what went wrong reported."""

import time
from collections import Counter
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from sampling.guards import complain, draw_finite, is_plain
from sampling.loop import generate
from sampling.trace import Trace
from util import dist
from util.checkpoint import weights_hash
from util.dist import autocast
from util.images.pictures import image_path, is_readable, prepare_folder, save_png, to_uint8
from util.rng import image_seeds


@torch.no_grad()
def sample_images(
    mar,
    tokenizer,
    sampling,
    labels,
    seed: int,
    folder: Path,
    *,
    batch_size,
    device,
    dtype,
    num_traced=0,
    heads=None,
    edit=None,
) -> dict:
    """Write image i of labels[i] to folder/<i>.png for all i, sharing the batches between the processes.

    Image i depends on (seed, i), its label, the weights and the settings only (in int8, by less than its rounding, on
    its batch too, see models/int8.py); these stand in folder/run.json, and files of another run are removed. A batch
    whose files are all there and whole is skipped, any other is made again whole. num_traced: the growth of so many
    images goes to folder/trace.npz (see `sampling.trace`); where that is missing their batches, which all belong to
    the first process, are made again. edit, a `sampling.editing.Edit`: all images are made of its source, whose known
    tokens (the mean of the tokenizer's posterior) stay as they are, and so do the pixels that belong to them. Returns
    {weights (their hash), num_made, seconds, images_per_second}, summed over processes, and the network evaluations
    that an image took on average, counted (see `generate`; None where no image was made): mar_evals, mlp_evals. Of the
    images made it also counts redone_fp32, those drawn twice (`draw_finite`; a trace shows the first time), not_finite,
    those in vain, which are black, and one_colour, as a model that has learned little makes them; the last two are
    named on stderr.
    """
    rules = sampling.rules(heads)
    run = dict(asdict(sampling), seed=seed, labels=labels, batch_size=batch_size, dtype=str(dtype), device=device.type)
    run["weights"] = weights_hash({**mar.state_dict(), **(heads.state_dict() if heads else {})})
    run["tokenizer"] = tokenizer.describe()
    tokens = mask = None
    if edit is not None:
        run |= edit.hashes
        tokens = mar.patchify(tokenizer.encode(edit.images().to(device), sample=False))
        mask = torch.from_numpy(edit.unknown).reshape(1, -1)
    if dist.is_main():
        prepare_folder(folder, run)
    dist.barrier()
    batches = [range(i, min(i + batch_size, len(labels))) for i in range(0, len(labels), batch_size)]
    trace = Trace(folder, labels[:num_traced], mar.config.seq_len, sampling.num_iter)
    to_trace = [batch for batch in batches if batch.start < num_traced]
    mine = to_trace if dist.is_main() else []
    redo = [] if trace.is_saved() else mine
    mine = mine + batches[len(to_trace) :][dist.rank() :: dist.world_size()]
    mine = [batch for batch in mine if batch in redo or not all(is_readable(image_path(folder, i)) for i in batch)]
    num_made, evals, began = 0, Counter(), time.perf_counter()
    redone, broken, plain = [], [], []  # numbers of images
    quiet = not (mine and dist.is_main())
    with tqdm(total=sum(map(len, mine)), unit="image", desc="sampling", disable=quiet, leave=False) as progress:

        def after_step(step, *details):
            progress.set_postfix_str(f"step {step + 1}/{sampling.num_iter}")
            trace.record(step, *details)

        def pictures(latents):
            images = to_uint8(tokenizer.decode(latents))
            return images if edit is None else edit.paste(images)

        def draw(batch, rows, dtype):
            images = [batch[row] for row in rows]
            with autocast(device, dtype):
                return generate(
                    mar,
                    torch.tensor([labels[i] for i in images]),
                    rules,
                    num_iter=sampling.num_iter,
                    num_steps=sampling.num_sampling_steps,
                    seeds=image_seeds(seed, images),
                    callback=None if trace.steps else after_step,  # a second time it would be traced twice
                    solver=sampling.solver,
                    spacing=sampling.spacing,
                    refresh_every=sampling.refresh_every,
                    clip=tokenizer.clip,
                    tokens=None if edit is None else tokens.expand(len(images), -1, -1),
                    mask=None if edit is None else mask.expand(len(images), -1),
                    evals=evals,
                )

        for batch in mine:
            trace.begin(batch if batch in redo else None)
            latents, twice, lost = draw_finite(partial(draw, batch), len(batch), dtype)
            images = pictures(latents)
            images[lost] = 0
            redone += [batch[row] for row in twice]
            broken += [batch[row] for row in lost]
            plain += [i for i, image in zip(batch, images) if is_plain(image)]
            trace.end(lambda tokens: pictures(mar.unpatchify(tokens)), images)
            for i, image in zip(batch, images):
                save_png(image_path(folder, i), image)
            num_made += len(batch)
            progress.update(len(batch))
    seconds = time.perf_counter() - began
    rate = dist.all_sum(torch.tensor(num_made / seconds, device=device)).item()
    tried = " in float32 too" if dist.is_half(dtype) else ""
    complain(f"have numbers that are not finite{tried} and are left black", broken, num_made)
    complain("are of one colour, which a model makes that has learned little", plain, num_made)
    notes = {"redone_fp32": len(redone), "not_finite": len(broken), "one_colour": len(plain)}
    # whole numbers, since they are too large for float32; parts of a pass as thousandths
    counts = [num_made, *notes.values(), round(1000 * evals["mar"]), evals["mlp"]]
    num_made, *counts, mar_evals, mlp_evals = dist.all_sum(torch.tensor(counts, device=device)).tolist()
    dist.barrier()
    found = {"weights": run["weights"], "num_made": num_made, "seconds": round(seconds, 3)}
    found["images_per_second"] = round(rate, 3) if num_made else None
    found |= dict(zip(notes, counts))
    for name, count in (("mar_evals", mar_evals / 1000), ("mlp_evals", mlp_evals)):
        found[name] = round(count / num_made, 3) if num_made else None
    return found
