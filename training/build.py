"""From settings to the parts of a run: data, tokenizer, model, checkpoint, state."""

from dataclasses import asdict, replace

import torch

from heads.schedules import RuleOptions
from models.loading import check_latents
from models.mar import MAR, MARConfig
from models.tokenizers import tokenizer_of
from training.config import mar_config, visits
from training.objectives.head_losses import HeadLossConfig
from training.objectives.token import TrainingLoss
from training.optim import EMA, make_optimizer
from training.state import TrainState
from util import dist
from util.args import pick
from util.checkpoint import checkpoint_path, load_checkpoint
from util.evaluation.protocol import EvalConfig, build_reference
from util.images.datasets import build_dataset
from util.images.latents import open_latents

# fields of MARConfig that may change within a run
FREE = {"mask_ratio_min", "label_drop_prob", "attn_dropout", "proj_dropout", "num_sampling_steps"}
FREE |= {"diffusion_batch_mul", "grad_checkpointing"}
# settings that say where and how a run runs, not what it computes
PLACES = {"resume", "init_from", "output_dir", "log_dir", "allow_mismatch", "device", "num_workers", "pin_mem"}
PLACES |= {"world_size", "local_rank", "dist_url", "dist_on_itp", "keep_last", "preset", "class_num", "deterministic"}


def data_place(values: dict):
    """Where the data set is; None for its own place."""
    return values["data_path"] or ("./data/imagenet" if values["data"] == "imagefolder" else None)


def build_data(values: dict):
    """What training reads: images, or with --use_cached their latents."""
    if not values["use_cached"]:
        return build_images(values)
    latents = open_latents(values["cached_path"], values["img_size"])
    if latents.fingerprint is None and dist.is_main():
        print(f"{latents.folder} does not say which tokenizer made its latents: only their shape is checked")
    return latents


def build_images(values: dict):
    """The data set, downloaded by the first process where it has to be."""
    with dist.main_first():
        return build_dataset(values["data"], data_path=data_place(values), img_size=values["img_size"])


def find_reference(values: dict, dataset):
    """What the metrics compare with: the data set in use, unless it is latents or the flags name something else."""
    evaluation = pick(EvalConfig, values)
    images_in_use = evaluation.fid_stats is None and evaluation.eval_split == "train" and not values["use_cached"]
    if evaluation.metric_names and images_in_use:
        return dataset
    reference = build_reference(evaluation, values["data"], data_place(values), values["img_size"])
    if values["use_cached"] and getattr(reference, "classes", dataset.classes) != dataset.classes:
        raise ValueError(
            f"the {dataset.num_classes} classes of the latents in {values['cached_path']} and the "
            f"{reference.num_classes} of the images in {data_place(values)} that the metrics need are not the same"
        )
    return reference


def make_tokenizer(values: dict, channels: int):
    """The tokenizer for images of so many channels; what the flags say about it and is not so raises ValueError."""
    tokenizer = tokenizer_of(values, channels)
    for key, true in (("vae_stride", tokenizer.stride), ("vae_embed_dim", tokenizer.channels)):
        if values[key] not in (None, true):
            raise ValueError(
                f"--{key} {values[key]} does not fit the tokenizer {values['tokenizer']}, which has {true}"
            )
    return tokenizer


def build_model(values: dict, dataset, content: dict | None):
    """(mar, tokenizer) for these settings, with the class count that the data (or, without data, the weights) have."""
    tokenizer = make_tokenizer(values, dataset.channels)
    if values["use_cached"]:
        dataset.check(tokenizer, values["tokenizer"])
    latents = dict(vae_stride=tokenizer.stride, vae_embed_dim=tokenizer.channels)
    config = replace(mar_config({**values, **latents}), class_num=dataset.num_classes)
    if values["class_num"] not in (dataset.num_classes, MARConfig.class_num):  # the default is no statement
        raise ValueError(
            f"--class_num {values['class_num']} does not fit the data, which have {dataset.num_classes} classes"
        )
    if content is not None:
        trained = len(content["model"]["class_emb.weight"])
        if trained != dataset.num_classes:
            raise ValueError(f"the checkpoint has {trained} classes, the data in use have {dataset.num_classes}")
        if "config" in content:
            check_latents(tokenizer, pick(MARConfig, content["config"]["mar"]), "the checkpoint")
    return MAR(config), tokenizer


def find_checkpoint(values: dict) -> tuple[dict | None, bool]:
    """(content, is it this run's own?) of the checkpoint in --resume, else in --init_from; None for a fresh start."""
    source = values["resume"]
    if source and (values["evaluate"] or checkpoint_path(source).is_file()):
        return load_checkpoint(source), True
    first = values["init_from"]
    if source and dist.is_main():
        print(f"no checkpoint in {source} yet: starting {f'from {first}' if first else 'fresh'}")
    return (load_checkpoint(first) if first else None), False


def check_resume(values: dict, content: dict, mar: MAR, tokenizer, dataset) -> None:
    """Say which settings are not those of the checkpoint that --resume continues.

    Where sizes of the model, tokenizer or classes are others ValueError, unless --allow_mismatch is given. (Sizes that
    change the shape of a weight are refused in any case, when the weights are loaded.)
    """
    config, before = content.get("config", {}), content.get("args")
    sizes, there = asdict(mar.config), config.get("mar", {})
    wrong = [f"{k} {there[k]}, not {sizes[k]}" for k in sizes.keys() & there.keys() - FREE if there[k] != sizes[k]]
    wrong = sorted(wrong)
    if config.get("latents") not in (None, tokenizer.describe()):
        wrong.append(f"latents of {config['latents']}, not {tokenizer.describe()}")
    if config.get("data", {}).get("classes", dataset.classes) != dataset.classes:
        pairs = zip(config["data"]["classes"], dataset.classes)
        first = next(((a, b) for a, b in pairs if a != b), ("another number", "of them"))
        wrong.append(f"other classes, the first is {first[0]!r}, not {first[1]!r}")
    if wrong and not values["allow_mismatch"]:
        raise ValueError(
            f"{values['resume']} was trained on {'; '.join(wrong)}: --init_from starts a new run from its weights, "
            "--allow_mismatch continues it all the same"
        )
    if isinstance(before, dict) and not values["evaluate"] and dist.is_main():
        keys = [k for k in values if k in before and k not in PLACES and before[k] != values[k]]
        if keys:
            print("changed since the checkpoint: " + ", ".join(f"--{k} {before[k]} -> {values[k]}" for k in keys))


def new_state(values: dict, mar, tokenizer, heads, device, dtype) -> TrainState:
    """The state of a run that starts: all parts on the device, those that are not trained frozen."""
    for name, parameter in mar.named_parameters():
        is_mlp = name.startswith("diffloss.")
        parameter.requires_grad_(values["train_diffloss"] if is_mlp else not values["freeze_backbone"])
    module = TrainingLoss(mar, heads, pick(HeadLossConfig, values), pick(RuleOptions, values))
    return TrainState(
        module=module if dist.world_size() == 1 else torch.nn.parallel.DistributedDataParallel(module),
        mar=mar,
        heads=heads,
        tokenizer=tokenizer,
        visits=None if values["evaluate"] else visits(values, heads),
        optimizer=make_optimizer(module, values["lr"], values["weight_decay"]),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        ema=EMA(mar, values["ema_rate"]),
        heads_ema=EMA(heads, values["ema_rate"]) if heads is not None else None,
        device=device,
        dtype=dtype,
    )
