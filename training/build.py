"""From settings to the parts of a run: data, tokenizer, model, objective, state."""

from dataclasses import asdict, fields, replace

import torch
from torch import nn

from heads.orders import check_square
from models.families import takes_any_size, tokens_of
from models.loading import check_latents, check_tokens, stored_model_config
from models.tokenizers import Tokenizer, tokenizer_of
from training.config import DataConfig, ModelConfig, RunConfig, TokenizerConfig, TrainConfig
from training.optim import EMA
from training.state import TrainState
from util import dist
from util.door import making_a_model
from util.evaluation.protocol import EvalConfig, build_reference
from util.images.buckets import build_buckets, open_cache
from util.images.datasets import build_dataset
from util.images.latent_files import image_names
from util.images.reading import Reading
from util.images.text_cache import CachedTexts, captions_for
from util.sizes import Size, grid_of, sizes_of


def build_data(data: DataConfig, img_size: Size):
    """What training reads: images, or with --use_cached their latents."""
    if not data.use_cached:
        return build_images(data, img_size)
    latents = open_cache(data.cached_path, img_size)
    if latents.fingerprint is None and dist.is_main():
        print(f"{latents.folder} does not say which tokenizer made its latents: only their shape is checked")
    latents.flip = latents.flip and data.flip
    return latents


def build_images(data: DataConfig, img_size: Size):
    """The data set, downloaded by the first process where it has to be, which says what it recognised in a folder."""
    where = dict(data_path=data.place, reading=data.reading)
    with dist.main_first():
        if data.buckets is None:
            images = build_dataset(data.data, img_size=img_size, **where)
        else:
            images = build_buckets(data.data, sizes_of(data.buckets, img_size), **where)
    if dist.is_main() and getattr(images, "layout", ""):
        print(images.layout)
    return images


def as_cached(data: DataConfig, latents, img_size: Size) -> DataConfig:
    """The settings with those by which the images of cached latents were read; flags that say otherwise: ValueError.

    And with the sizes of a cache of several; ratios in --buckets are of images of img_size.
    """
    if not data.use_cached:
        return data
    data = replace(data, buckets=_stored_buckets(data, latents, img_size))
    if latents.reading is None:
        return data
    stored = asdict(latents.reading)
    for field in fields(Reading):
        value = getattr(data, field.name)
        if field.name not in ("flip", "split_dir") and value not in (field.default, stored[field.name]):
            raise ValueError(
                f"the latents in {data.cached_path} were made with --{field.name} {stored[field.name]}, not {value}: "
                "leave the flag out, or make another cache"
            )
    split_dir = data.split_dir or stored["split_dir"]  # of the images for the metrics, which may lie elsewhere
    return replace(data, **stored | dict(split_dir=split_dir, flip=data.flip and stored["flip"]))


def _stored_buckets(data: DataConfig, latents, img_size: Size) -> str | None:
    """The sizes of cached latents as --buckets says them, None for one; a flag that says otherwise: ValueError."""
    sizes = latents.sizes if len(latents.counts) > 1 else ()
    stored = ",".join(map(str, sizes)) or None
    if data.buckets is not None and sizes_of(data.buckets, img_size) != sizes:
        held = f"the sizes {stored}" if stored else "one size"
        raise ValueError(
            f"--buckets {data.buckets} does not fit --cached_path {data.cached_path}, which has {held}: leave the flag "
            "out, or make another cache"
        )
    return stored


def check_sizes(config: RunConfig) -> None:
    """Raise ValueError for sizes of images that the model, the objective or the rules cannot have."""
    model, buckets, size = config.model, config.data.buckets, config.model.img_size
    shaped = f"--buckets {buckets}" if buckets else f"--img_size {size}"
    if not buckets and not isinstance(size, str):
        return
    if not takes_any_size(model.family.config):
        raise ValueError(f"{shaped} does not fit --model {model.model}, whose images are square and of one size")
    if config.train.objective != "token":
        raise ValueError(f"{shaped} needs --objective token: {config.train.objective} is for squares of one size")
    if "order" in config.heads.learn.split(","):
        check_square(config.sampling.order_base, "order_base")
    if config.masks.train_masks != "random":
        config.sampling.check_shape()


def check_cells(dataset, tokenizer: Tokenizer) -> None:
    """Raise ValueError for a size of several that whole latents do not fill."""
    for size in dataset.sizes if len(dataset.counts) > 1 else ():
        if grid_of(size, tokenizer.stride) is None:
            raise ValueError(f"--buckets: the sides of {size} must be multiples of the tokenizer's {tokenizer.stride}")


def real_images(data: DataConfig, img_size: Size, dataset):
    """The images that a run is trained on, none mirrored, whether it reads them or their latents."""
    return (build_images(data, img_size) if data.use_cached else dataset).as_reference()


def find_reference(evaluation: EvalConfig, data: DataConfig, img_size: Size, dataset):
    """What the metrics compare with: the data set in use, unless it is latents or the flags name something else."""
    images_in_use = evaluation.fid_stats is None and evaluation.eval_split == "train" and not data.use_cached
    images_in_use = images_in_use and len(dataset.counts) == 1  # of the size that is sampled
    if evaluation.metric_names and images_in_use:
        return dataset.as_reference()
    reference = build_reference(evaluation, data.data, data.place, img_size, data.reading)
    if data.use_cached and getattr(reference, "classes", dataset.classes) != dataset.classes:
        raise ValueError(
            f"the {dataset.num_classes} classes of the latents in {data.cached_path} and the "
            f"{reference.num_classes} of the images in {data.place} that the metrics need are not the same"
        )
    return reference


def with_text(config: ModelConfig, texts: CachedTexts, content: dict | None) -> ModelConfig:
    """The model's settings with the sizes of its captions; flags, or a checkpoint's content, of others: ValueError."""
    sizes = dict(caption_dim=texts.width, cls_token_num=texts.num_tokens)
    stored = {} if content is None else stored_model_config(content, config.family_name)
    for name, value in sizes.items():
        for of_others, what in ((config.given, f"--{name} {config.given.get(name)}"), (stored, "the checkpoint")):
            if of_others.get(name, value) != value:
                raise ValueError(
                    f"{what} does not fit --cached_text {texts.folder}, whose features have {name} {value}, not "
                    f"{of_others[name]}"
                )
    return replace(config, given={**config.given, **sizes})


def give_captions(state: TrainState, texts: CachedTexts, dataset) -> None:
    """Let a state whose model has these texts as prompts train on the captions of a data set's images."""
    names = dataset.names if hasattr(dataset, "names") else image_names(dataset)
    state.captions = captions_for(texts, dataset, names)
    state.stored["config"]["text"] = texts.describe()


def make_tokenizer(config: TokenizerConfig, model: ModelConfig, channels: int, any_tokens: bool = False) -> Tokenizer:
    """The tokenizer for images of so many channels; one that does not fit the model or the flags raises ValueError.

    any_tokens: it may make others than the model takes.
    """
    tokenizer = tokenizer_of(vars(config), channels)
    if not any_tokens:
        check_tokens(tokenizer, model.family_name, model.settings)
    for name, true in latents_of(tokenizer, model).items():
        if model.given.get(name) not in (None, true):
            raise ValueError(
                f"--{name} {model.given[name]} does not fit the tokenizer {config.tokenizer}, which has {true}"
            )
    return tokenizer


def takes_ids(model: ModelConfig) -> bool:
    """Are the model's tokens ids?"""
    return "continuous" not in tokens_of(model.family_name, model.settings)


def latents_of(tokenizer: Tokenizer, model: ModelConfig) -> dict:
    """Fields of the model's configuration that the tokenizer decides."""
    known = dict(vae_stride=tokenizer.stride, vae_embed_dim=tokenizer.channels)
    if takes_ids(model):
        known["vocab_size"] = tokenizer.codebook_size
    if tokenizer.scales:
        known["patch_nums"] = tokenizer.scales
    return known


def on_device(device: torch.device, *modules) -> None:
    """Move these to a device, None being none of them; memory that is too small for them raises ModelTooLarge."""
    with making_a_model():
        for module in filter(None, modules):
            module.to(device)


@making_a_model()
def build_model(
    config: ModelConfig, tokenizer: Tokenizer, num_classes: int, content: dict | None, resumed: bool
) -> nn.Module:
    """The model for the tokenizer's latents and so many classes.

    A checkpoint's content, if given, must fit these latents, and where its run is resumed the number of classes.
    """
    wanted = config.settings["class_num"]
    if wanted not in (num_classes, config.family.config.class_num):  # the default is no statement
        raise ValueError(f"--class_num {wanted} does not fit the data, which have {num_classes} classes")
    if content is not None:
        stored = stored_model_config(content, config.family_name)
        if resumed and stored["class_num"] != num_classes:
            raise ValueError(
                f"the checkpoint has {stored['class_num']} classes, the data in use have {num_classes}: --init_from "
                "starts a new run from its other weights"
            )
        if "vae_stride" in stored:
            check_latents(tokenizer, stored, "the checkpoint")
    return config.family.model(config.build(**latents_of(tokenizer, config), class_num=num_classes))


def freeze(model, train: TrainConfig) -> None:
    """Let no parameter ask for a gradient that --freeze_backbone or --no-train_diffloss (the token head) exempts."""
    of_token_head = {id(parameter) for parameter in model.token_head.parameters()}
    for parameter in model.parameters():
        learns = train.train_diffloss if id(parameter) in of_token_head else not train.freeze_backbone
        parameter.requires_grad_(learns)


def distributed(objective: nn.Module) -> nn.Module:
    """The objective with gradients that are means over processes; its buffers are constants, sent once."""
    wrapped = nn.parallel.DistributedDataParallel(objective)
    wrapped.broadcast_buffers = False  # the argument of this name gives a warning from torch 2.14 on
    return wrapped


def new_state(objective: nn.Module, tokenizer: Tokenizer, train: TrainConfig, dtype: torch.dtype) -> TrainState:
    """The state of a run that starts, for an objective whose parts are on their device; it lacks `stored`."""
    model, heads = objective.model, objective.heads
    device = next(model.parameters()).device
    freeze(model, train)
    return TrainState(
        objective=objective,
        wrapped=objective if dist.world_size() == 1 else distributed(objective),
        model=model,
        heads=heads,
        tokenizer=tokenizer,
        optimizer=objective.optimizer(),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        ema=EMA(model, train.ema_rate),
        heads_ema=objective.average_heads() if heads is not None else None,
        device=device,
        dtype=dtype,
        seed=train.seed,
    )
