"""From a checkpoint to a model that samples, ours or a published one."""

import os
from dataclasses import asdict, dataclass, fields, replace

from models.families import FAMILIES, SIZES, family_of, takes_any_size, tokens_of
from models.token_head import LOSSES
from models.tokenizers import tokenizer_of
from util.args import check_values, flag, pick
from util.checkpoint import find_stored, load_checkpoint, load_weights
from util.door import making_a_model
from util.foreign import some_weights, type_of
from util.images.reading import Reading
from util.sizes import Size, image_size

# what a checkpoint of a model of text has in config["text"]
TEXT = dict(encoder=str, fingerprint=str, width=int, num_tokens=int)


@dataclass(frozen=True)
class LoadArgs:
    """Which weights of a checkpoint, and what a published file does not say of itself."""

    no_ema: bool = flag(False, "the raw weights instead of the averaged ones")
    model: str | None = flag(None, "model size, for a published checkpoint, which does not carry it", choices=SIZES)
    img_size: Size | None = flag(
        None,
        "pixels of a side, or HxW: of a model for any size (default: as trained), of a published checkpoint (256)",
        type=image_size,
        metavar="SIZE",
    )
    diffloss_d: int | None = flag(None, "blocks of the diffusion MLP, for a published checkpoint", low=1)
    diffloss_w: int | None = flag(None, "width of the diffusion MLP, for a published checkpoint", low=1)
    vae_path: str | None = flag(None, "weights of the autoencoder (default: the checkpoint's)")

    def load(self, content: dict, place):
        """`load_model` of a content from this place."""
        given = {f.name: getattr(self, f.name) for f in fields(LoadArgs) if f.name != "no_ema"}
        return load_model(content, ema=not self.no_ema, place=place, **given)


def load_mar(checkpoint, **options):
    """`load_model` of a MAR; a checkpoint of another family raises ValueError."""
    model, tokenizer, config = load_model(checkpoint, **options)
    if family_of(config) != "mar":
        raise ValueError(f"the checkpoint is of the family {family_of(config)}, not mar")
    return model, tokenizer, config


@making_a_model()
def load_model(checkpoint, *, ema=True, model=None, vae_path=None, place=None, img_size=None, **sizes):
    """(model, tokenizer, config) of a checkpoint folder or file, or its content, on the CPU and in eval mode.

    ema: the averaged weights rather than the raw ones. config is the dict stored in the checkpoint (sizes, data and
    class names, sampling defaults); published files have none, so theirs is made from model, a name in SIZES, and from
    sizes: fields of its family's configuration that are not that row's (None: they are), such as diffloss_d. img_size
    is one of these too; a model for images of any size makes those of this size, whatever it has. vae_path
    replaces the stored path of the autoencoder. place: where a content is from; relative paths in it are looked for
    there too. An unreadable file, one that does not fit the sizes, a published one without model, or an autoencoder
    that is missing or has other latents raises ValueError.
    """
    content = load_checkpoint(checkpoint)
    place = place if isinstance(checkpoint, dict) else checkpoint
    sizes["img_size"] = img_size
    checkpoint = place or "the checkpoint"
    if "config" in content:
        config = content["config"]
        check_config(config, checkpoint)
        _check_given(config, checkpoint, model, vae_path, sizes)
    elif model is None:
        raise ValueError(f"{checkpoint} does not say what it holds: give --model (and --diffloss_d, --diffloss_w)")
    else:
        config = _published_config(content, model, sizes)
    weights = content.get("model_ema" if ema else "model")
    if weights is None:
        raise ValueError(
            f"{checkpoint} has no averaged weights; --no_ema samples the raw ones"
            if ema
            else f"{checkpoint} has no raw weights, only averaged ones; leave out --no_ema"
        )
    name = family_of(config)
    family = FAMILIES[name]
    sizes = dict(config[name])
    if takes_any_size(family.config) and img_size is not None:
        sizes["img_size"] = img_size
    network = family.model(pick(family.config, sizes))
    load_weights(network, weights, checkpoint)
    config, nowhere = find_places(config, place)
    settings = {**config, "vae_path": vae_path or config.get("vae_path")}
    shape = network.config
    try:
        tokenizer = tokenizer_of(settings, shape.vae_embed_dim if config["tokenizer"] == "pixel" else None)
    except ValueError as error:
        raise ValueError(f"{error}{looked_for(error, nowhere)}") from None
    check_tokens(tokenizer, name, asdict(shape))
    check_latents(tokenizer, asdict(shape), f"the model in {checkpoint}")
    latents = tokenizer.describe()
    if config.get("latents") not in (None, latents):  # of the same shape, yet it would decode noise
        trained = config["latents"]
        raise ValueError(f"the model in {checkpoint} was trained on other latents: those of {trained}, not {latents}")
    return network.eval(), tokenizer, config


def num_parameters(checkpoint) -> int:
    """Of the model of a checkpoint of ours: what is trained, without the constants that a file has too."""
    network, _, _ = load_model(checkpoint, ema=False)
    return sum(parameter.numel() for parameter in network.parameters())


def find_places(config: dict, place) -> tuple[dict, dict]:
    """(config with the paths in it as `find_stored` finds them, {those found nowhere: the words of it})."""
    nowhere = {}

    def place_of(path):
        if not isinstance(path, str) or not path:
            return path
        path, words = find_stored(path, place)
        nowhere.update({path: words} if words else {})
        return path

    row, colon, folder = config["tokenizer"].partition(":")
    result = {**config, "tokenizer": row + colon + place_of(folder), "data": dict(config["data"])}
    result["data"]["path"] = place_of(config["data"].get("path"))
    result["eval"] = {
        k: place_of(v) if k in ("fid_stats", "fid_weights", "judge") else v for k, v in config["eval"].items()
    }
    if "vae_path" in config:
        result["vae_path"] = place_of(config["vae_path"])
    if config.get("text") is not None:
        result["text"] = {**config["text"], "encoder": place_of(config["text"].get("encoder"))}
    return result, nowhere


def looked_for(error: Exception, nowhere: dict) -> str:
    """Where else the paths that an error names were looked for, as `find_places` says it."""
    return "".join(words for path, words in nowhere.items() if os.path.normpath(path) in str(error))


def stored_model_config(content: dict, family: str) -> dict:
    """The sizes that a checkpoint's content says its model has, which must be of this family (ValueError).

    Of a published file those that its weights say.
    """
    config = content.get("config")
    if config is None:
        return _read_published(content, family)[0]
    if family_of(config) != family:
        raise ValueError(
            f"the checkpoint is of the family {family_of(config)}, the model that --model names of {family}; "
            f"name one of {', '.join(FAMILIES[family_of(config)].sizes)}"
        )
    return _sizes(config)


def _sizes(config: dict) -> dict:
    """Of the model in a checkpoint's config, with the defaults of those that it lacks."""
    family = family_of(config)
    return asdict(pick(FAMILIES[family].config, config[family]))


def _read_published(content: dict, family: str) -> tuple[dict, dict]:
    """What the weights of a file without config say, see `models.families.Family`."""
    read_published = FAMILIES[family].read_published
    if read_published is None:
        raise ValueError(f"the checkpoint has no config, and the family {family} has no published files without one")
    return read_published(some_weights(content))


def check_config(config: dict, source) -> None:
    """Raise ValueError unless the config of a checkpoint has what a model is made of (whoever made the file)."""
    family = family_of(config)
    for key, value_type in ((family, dict), ("tokenizer", str), ("data", dict), ("sample", dict), ("eval", dict)):
        if not isinstance(config.get(key), value_type):
            raise ValueError(f"{source} is damaged or not of this project: its config has no {key!r}")
    if not isinstance(config.get("heads"), dict | None):
        raise ValueError(f"{source} is damaged: the heads in its config are {type_of(config['heads'])}")
    classes = config["data"].get("classes")
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"{source} is damaged: its config has no names of classes")
    if not isinstance(config["data"].get("name"), str) or not isinstance(config["data"].get("path"), str | None):
        raise ValueError(f"{source} is damaged: its config does not name the data")
    if not isinstance(config["data"].get("reading", {}), dict):
        raise ValueError(f"{source} is damaged: its config does not say how images are read")
    check_values(Reading, config["data"].get("reading", {}), source)
    for name, value_type in TEXT.items() if config.get("text") is not None else ():
        if not isinstance(config["text"], dict) or not isinstance(config["text"].get(name), value_type):
            raise ValueError(f"{source} is damaged: its config does not say which features of captions it takes")
    if not isinstance(config.get("vae_path"), str | None):
        raise ValueError(f"{source} is damaged: its vae_path is {type_of(config['vae_path'])}")
    check_values(FAMILIES[family].config, config[family], source)


def _check_given(config: dict, source, model: str | None, vae_path, sizes: dict) -> None:
    """Raise ValueError where what was given contradicts what the checkpoint says."""
    stored = _sizes(config)
    if vae_path and config["tokenizer"] == "pixel":
        raise ValueError(f"--vae_path {vae_path} has no meaning for the tokenizer pixel, whose latents are the pixels")
    for name, value in sizes.items():
        if value is not None and name not in stored:
            raise ValueError(f"--{name} {value} has no meaning for {source}, whose family is {family_of(config)}")
        if name == "img_size" and takes_any_size(FAMILIES[family_of(config)].config):
            continue
        if value not in (None, stored.get(name)):
            raise ValueError(
                f"--{name} {value} does not fit {source}, which has {stored[name]} (the flag can be left out)"
            )
    if model is None:
        return
    row = asdict(FAMILIES[_family_of_size(model)].sizes[model])
    names = row_fields(_family_of_size(model))
    if _family_of_size(model) != family_of(config) or any(row[name] != stored[name] for name in names):
        shown = ", ".join(f"{name} {stored[name]}" for name in row_fields(family_of(config)))
        raise ValueError(f"--model {model} does not fit {source}, which has {shown} (the flag can be left out)")


def _family_of_size(model: str) -> str:
    """The family of the size --model; an unknown one raises ValueError."""
    if model not in SIZES:
        raise ValueError(f"unknown model {model!r}; valid: {', '.join(SIZES)}")
    return SIZES[model]


def row_fields(family: str) -> list[str]:
    """Names of the configuration's fields that tell a family's sizes apart, and are no flags."""
    own = FAMILIES[family]
    rows = [asdict(row) for row in own.sizes.values()]
    names = [field.name for field in fields(own.config) if "help" not in field.metadata]
    return [name for name in names if any(row[name] != rows[0][name] for row in rows)]


def check_tokens(tokenizer, family: str, sizes: dict) -> None:
    """Raise ValueError unless the family's models of these sizes take tokens of a kind that the tokenizer makes."""
    wanted = tokens_of(family, sizes)
    if set(wanted) & set(tokenizer.tokens):
        return
    made = f"the tokenizer {tokenizer.kind} makes {' or '.join(tokenizer.tokens)} tokens"
    if "loss" not in sizes:
        raise ValueError(f"{made}, the family {family} takes {' or '.join(wanted)} ones")
    others = [f"--loss {loss}" for loss, kind in LOSSES.items() if kind in tokenizer.tokens]
    way_out = " or ".join([*others, f"a --tokenizer of {wanted[0]} ones"])
    raise ValueError(f"{made}, --loss {sizes['loss']} takes {wanted[0]} ones: choose {way_out}")


def check_latents(tokenizer, sizes: dict, what: str) -> None:
    """Raise ValueError if a model of these sizes, named by what, is for other latents or ids than the tokenizer's."""
    stride, channels, entries = (sizes.get(name) for name in ("vae_stride", "vae_embed_dim", "vocab_size"))
    if "patch_nums" in sizes and tuple(sizes["patch_nums"]) != tokenizer.scales:
        of_model, own = (",".join(map(str, sides)) for sides in (sizes["patch_nums"], tokenizer.scales))
        raise ValueError(f"{what} is for the scales {of_model}, the tokenizer {tokenizer.kind} has {own}")
    if entries is not None and entries != tokenizer.codebook_size:
        raise ValueError(
            f"{what} is for a codebook of {entries} entries, the tokenizer {tokenizer.kind} has "
            f"{tokenizer.codebook_size}: give the one that it was trained with (--tokenizer, --vae_path)"
        )
    if (tokenizer.stride, tokenizer.channels) != (stride, channels):
        raise ValueError(
            f"{what} is for latents of stride {stride} with {channels} channels, the tokenizer {tokenizer.kind} "
            f"makes stride {tokenizer.stride} with {tokenizer.channels} channels"
        )


def _check_size(model: str, known: dict) -> None:
    """Raise ValueError where a published file's weights are known to be of another size than --model says."""
    rows = FAMILIES[_family_of_size(model)].sizes
    shown = {name: known[name] for name in row_fields(_family_of_size(model)) if name in known}
    fitting = [name for name, row in rows.items() if all(getattr(row, key) == shown[key] for key in shown)]
    if model not in fitting:
        sizes = ", ".join(f"{name} {value}" for name, value in shown.items())
        way_out = f"give --model {' or '.join(fitting)}" if fitting else f"none of {', '.join(rows)} has"
        raise ValueError(f"--model {model} does not fit the checkpoint, whose weights have {sizes}: {way_out}")


def _published_config(content: dict, model: str, sizes: dict) -> dict:
    """The config of a published file of this size."""
    family = _family_of_size(model)
    known, tokenizer = _read_published(content, family)
    _check_size(model, known)
    given = {name: value for name, value in sizes.items() if value is not None}
    for name in given.keys() - {field.name for field in fields(FAMILIES[family].config)}:
        raise ValueError(f"--{name} {given[name]} has no meaning for --model {model}")
    own = replace(FAMILIES[family].sizes[model], **known, **given)
    return {
        "family": family,
        family: asdict(own),
        **tokenizer,
        "data": {"name": "imagefolder", "path": None, "classes": [str(i) for i in range(own.class_num)]},
        "sample": dict(FAMILIES[family].sampling),
        "eval": {},
    }
