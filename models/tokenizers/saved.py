"""`diffusers:PATH_OR_REPO`: an autoencoder as diffusers saved it, alone or in a pipeline, or as a single file."""

import json
import re
import warnings
from pathlib import Path

import torch

from models.tokenizers.autoencoder import AUTOENCODERS, AutoencoderTokenizer, normalisation
from models.tokenizers.ldm import fill, read_tensors, sizes_of

PARTS = ("vae", "vqvae", "movq")  # sub-folders that pipelines of diffusers have their autoencoder in
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")  # of single files


def load_diffusers(place: str, *, vae_path=None, vae_scale=None, vae_mean=None) -> AutoencoderTokenizer:
    """The autoencoder in `place`; vae_path replaces it. Scale and mean: see `normalisation`.

    place: a folder that diffusers saved an autoencoder in, or a whole pipeline (then the one in its `vae/`), also with
    the weights as a variant (fp16) only; a file (see `load_file`); or a name OWNER/NAME on the hub. A missing or
    damaged autoencoder, and one of a class that is not in AUTOENCODERS, raises ValueError.
    """
    place = str(Path(vae_path or place).expanduser())
    if Path(place).is_file():
        return load_file(Path(place), vae_scale, vae_mean)
    if not Path(place).is_dir() and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", place):
        raise ValueError(
            f"no folder {place} with a diffusers autoencoder, no such file, nor a name like OWNER/NAME on the hub"
        )
    import diffusers

    folder = place
    if Path(place).is_dir() and not Path(place, "config.json").is_file():
        parts = [str(Path(place, part)) for part in PARTS if Path(place, part, "config.json").is_file()]
        if not parts:
            raise ValueError(f"cannot load an autoencoder from {place}: it has no config.json, nor has its vae/")
        folder = parts[0]
    stored = _attempt(folder, diffusers.AutoencoderKL.load_config, folder)
    name = str(stored.get("_class_name"))
    if name not in AUTOENCODERS:
        raise ValueError(f"{folder} holds no autoencoder but a {name}; valid: {', '.join(AUTOENCODERS)}")
    load = getattr(diffusers, name).from_pretrained
    options = dict(output_loading_info=True, low_cpu_mem_usage=False, variant=variant_in(Path(folder)))
    autoencoder, info = _attempt(folder, load, folder, **options)
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if wrong:  # diffusers leaves missing tensors at random values
        raise ValueError(
            f"the weights in {folder} do not fit its config: {len(wrong)} tensors, the first is {wrong[0]}"
        )
    config = {**autoencoder.config, **stored}  # the class drops settings that it does not know
    return AutoencoderTokenizer(name, autoencoder, **normalisation(folder, config, vae_scale, vae_mean))


def variant_in(folder: Path) -> str | None:
    """The variant whose weights a folder has where it lacks the plain ones, fp16 first; None to load the plain ones."""
    pattern = r"diffusion_pytorch_model(?:\.(\w+))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)"
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    variants = {match[1] for name in names if (match := re.fullmatch(pattern, name))}
    return None if None in variants or not variants else min(variants, key=lambda variant: (variant != "fp16", variant))


def load_file(path: Path, vae_scale=None, vae_mean=None) -> AutoencoderTokenizer:
    """An AutoencoderKL or VQModel from one file, in the tensor names of LDM (also of a whole model) or of diffusers.

    Beside a config.json of diffusers, the network and the scale are those that it says, and the class may be any of
    AUTOENCODERS; else its sizes are those of the tensors, and unless it is given the scale is 1, with a warning.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} is no file with an autoencoder: valid are {', '.join(SUFFIXES)}, or a folder")
    import diffusers

    weights = read_tensors(path)
    config = _config_beside(path)
    if config is None:
        name, settings = sizes_of(weights, path)
        if vae_scale is None:
            measure = "scripts/measure_latents.py measures what to pass as --vae_scale and --vae_mean"
            warnings.warn(f"{path} does not say the scale of its latents, 1 is used; {measure}", stacklevel=2)
    else:
        name, settings = config["_class_name"], config
    with torch.random.fork_rng(devices=[]):  # initial values, which are replaced
        autoencoder = _attempt(str(path), getattr(diffusers, name).from_config, settings)
    fill(autoencoder, weights, f"{path} does not fit {'an ' + name if config is None else 'the config.json beside it'}")
    return AutoencoderTokenizer(name, autoencoder, **normalisation(path, config or {}, vae_scale, vae_mean))


def _config_beside(path: Path) -> dict | None:
    """config.json in the folder of a file, where it is of an autoencoder of diffusers."""
    try:
        config = json.loads((path.parent / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) and config.get("_class_name") in AUTOENCODERS else None


def _attempt(place: str, load, *args, **options):
    """load(*args, **options), whose errors become one ValueError that names the place."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # else it prints several lines about what then becomes a ValueError
    try:
        return load(*args, **options)
    except Exception as error:  # diffusers, safetensors, json and the hub raise many types
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        source = place if Path(place).exists() else f"{place} (no such folder here, so it was looked for on the hub)"
        raise ValueError(f"cannot load an autoencoder from {source}: {reason}") from None
    finally:
        logging.set_verbosity(before)
