"""Encode a data set once and keep latents or ids on disk, for main_mar.py --use_cached. Takes main_cache.py's flags.

    torchrun --nproc_per_node=8 scripts/cache_latents.py --data_path IMAGENET --vae_path kl16.ckpt --cached_path DIR
    python main_mar.py --use_cached --cached_path DIR ...
    python scripts/cache_latents.py --cached_path DIR --verify

The same command continues an interrupted run and makes damaged files anew. Images that cannot be read are left out;
index.json names them. The formats are described in util/images/latents.py.
"""

import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from training.build import build_images, check_cells, make_tokenizer
from training.config import DataConfig, ModelConfig, RunConfig, TokenizerConfig, resolve
from util import dist
from util.args import flag, make_parser, pick
from util.door import run_main
from util.evaluation.protocol import content_hash, reference_hash
from util.images.buckets import begin_buckets, names_of_parts, open_cache, part_folder
from util.images.datasets import DATASETS, labels_of
from util.images.folders import check_output_folder
from util.images.latent_files import WRITERS, begin, check_is_free, image_names, older_reading, write_json
from util.images.latents import VERSION, open_latents
from util.images.reading import Reading
from util.sizes import Size, bucket_sizes, grid_of, image_size


@dataclass(frozen=True)
class CacheArgs(Reading):
    """The flags: data, tokenizer, and the cache to write."""

    cached_path: str = flag("", "folder for the latents")
    format: str = flag("packed", "packed: a few large files; npz: a file an image, as MAR has it", choices=WRITERS)
    tokens: str | None = flag(
        None,
        "continuous: latents; discrete: ids of the tokenizer's codebook; multiscale: ids of all its scales "
        "(default: latents where it has them)",
        choices=("continuous", "discrete", "multiscale"),
    )
    cache_dtype: str = flag("float32", "numbers of latents on disk", choices=("float32", "float16"))
    shard_size: int = flag(4096, "images a file of the packed format", low=1)
    verify: bool = flag(False, "only read the whole cache and check it")
    data: str | None = flag(None, "data set (default: digits, or imagefolder with --data_path)", choices=DATASETS)
    data_path: str | None = flag(None, "folder of the data: DIR/train/<class>/* for imagefolder")
    img_size: Size = flag(256, "pixels of an image's side, or HxW, height x width", type=image_size, metavar="SIZE")
    buckets: str | None = flag(
        None,
        "of ids: sizes of the images, HxW or ratios W:H with about the pixels of --img_size (default: --img_size)",
        type=bucket_sizes,
        metavar="SIZE,...",
    )
    tokenizer: str | None = flag(None, "what turns images into latents (default: kl16 for imagefolder)")
    vae_path: str | None = flag(None, "weights of the autoencoder")
    vae_stride: int | None = flag(None, "pixels of a latent's side (default: the tokenizer's)", low=1)
    vae_embed_dim: int | None = flag(None, "channels of a latent (default: the tokenizer's)", low=1)
    batch_size: int = flag(16, "images a batch and process", low=1)
    num_workers: int = flag(10, **dist.WORKERS)
    pin_mem: bool = flag(True, "copy to the GPU from pinned memory")
    device: str = flag("auto", "auto, cuda, mps, cpu")
    seed: int = flag(0, "without effect, since nothing is random; for MAR's command lines", high=2**63 - 1)
    dry_run: bool = flag(False, "print the resolved configuration and stop")
    world_size: int = flag(1, "without effect, the launcher sets it; for MAR's command lines", low=1)
    local_rank: int = flag(-1, "without effect, the launcher sets it; for MAR's command lines")
    dist_url: str = flag("env://", "where processes meet")
    dist_on_itp: bool = flag(False, "read ranks from Open MPI's environment")


# flags that main_mar.py does not have
OWN = ("format", "tokens", "cache_dtype", "shard_size", "verify")


@torch.no_grad()
def encode(tokenizer, images, device, dtype: str) -> np.ndarray:
    """Moments (b, 2, c, h, w), or as an unsigned dtype ids (b, 2, …), of images uint8 (b, C, H, W) and mirrored."""
    images = images.to(device, non_blocking=True).float() / 127.5 - 1
    encode_tokens = tokenizer.encode_ids if is_discrete(dtype) else tokenizer.encode_moments
    moments = torch.stack([encode_tokens(pixels).cpu() for pixels in (images, images.flip(-1))], dim=1).numpy()
    with np.errstate(over="ignore"):
        moments = moments.astype(dtype)
    if not np.isfinite(moments).all():
        raise ValueError(f"the tokenizer gives numbers that are not finite, or beyond --cache_dtype {dtype}")
    return moments


def is_discrete(dtype: str) -> bool:
    """Are numbers of this type on disk ids?"""
    return np.dtype(dtype).kind == "u"


def choose_dtype(args: CacheArgs, tokenizer) -> str:
    """The type of the numbers on disk: of latents the flag's, of ids the smallest that has all of the codebook's.

    Tokens that the tokenizer does not make, and ids in MAR's layout, raise ValueError.
    """
    tokens = args.tokens or tokenizer.tokens[0]
    if tokens not in tokenizer.tokens:
        made = " or ".join(tokenizer.tokens)
        raise ValueError(f"--tokens {tokens} does not fit the tokenizer {args.tokenizer}, which makes {made} ones")
    if tokens == "continuous":
        return args.cache_dtype
    if args.format != "packed":
        raise ValueError(f"--format {args.format} is MAR's layout, which has no ids: use packed")
    return "uint16" if tokenizer.codebook_size <= 2**16 else "uint32"


def encode_units(units, dataset, tokenizer, writer, args: CacheArgs, device, dtype: str) -> None:
    """Encode and write the images of each unit, batch by batch, as numbers of this dtype."""
    batches = [unit[i : i + args.batch_size] for unit in units for i in range(0, len(unit), args.batch_size)]
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=dist.num_loading(args.num_workers),
        pin_memory=args.pin_mem and device.type == "cuda",
    )
    loaded = iter(loader)
    with tqdm(total=sum(map(len, units)), unit="image", desc="encoding", disable=not dist.is_main()) as progress:
        for unit in units:
            parts, kept = [], []
            for _ in range(math.ceil(len(unit) / args.batch_size)):
                images, _, indices = next(loaded)
                readable = dataset.broken[indices] == 0  # for a broken one `images` has another image
                parts.append(encode(tokenizer, images, device, dtype)[readable.numpy()])
                kept += indices[readable].tolist()
                progress.update(len(images))
            writer.write(unit, kept, np.concatenate(parts))


def finish(folder: Path, settings: dict, about: dict, dataset, names: list[str], writer) -> None:
    """Write index.json, open the cache as training will, and say what it holds."""
    broken = dataset.broken.tolist()
    kept = [i for i in range(len(dataset)) if not broken[i]]
    labels = labels_of(dataset)
    index = {
        **settings,
        **about,
        **writer.index(),
        "names": [names[i] for i in kept],
        "labels": [labels[i] for i in kept],
        "broken": [names[i] for i in range(len(dataset)) if broken[i]],
    }
    write_json(folder / "index.json", index)
    try:
        latents = open_latents(folder, settings["img_size"])
    except ValueError:
        (folder / "index.json").unlink()
        raise
    left_out = f", {len(index['broken'])} that could not be read are left out" if index["broken"] else ""
    tokens = "ids" if latents.codebook_size else "latents"
    print(f"{tokens} of {len(latents)} images in {latents.num_classes} classes{left_out}: {folder}")


def resolve_cache(given: dict) -> tuple[CacheArgs, RunConfig]:
    """The flags, and the settings of main_mar.py that they give.

    A cache that does not say how its images were read is continued in MAR's way, unless a flag says another.
    """
    config = resolve(given)
    if config.data.data == "imagefolder" and given.get("cached_path") and not given.get("verify"):
        config = resolve({**older_reading(Path(given["cached_path"])), **given})
    return pick(CacheArgs, {**config.flat(), **{name: given[name] for name in OWN if name in given}}), config


def run(args: CacheArgs, data: DataConfig, tokenizer: TokenizerConfig, model: ModelConfig) -> int:
    """Make the cache, or its missing units; the settings are those of main_mar.py that these flags give."""
    device = dist.pick_device(args.device)
    folder = Path(args.cached_path)
    dataset = build_images(data, args.img_size)
    tokenizer = make_tokenizer(tokenizer, model, dataset.channels, any_tokens=True).to(device).eval()
    check_cells(dataset, tokenizer)
    dtype = choose_dtype(args, tokenizer)
    if not is_discrete(dtype) and args.buckets:
        raise ValueError(f"--buckets {args.buckets} needs --tokens discrete: models of latents take one size only")
    parts = [(folder, dataset, image_names(dataset))]
    if args.buckets:
        with dist.main_first():
            begin_buckets(folder, dataset.sizes)
        places = [part_folder(folder, size) for size in dataset.sizes]
        parts = zip(places, dataset.parts, names_of_parts(dataset, parts[0][2]))
    for place, images, names in parts:
        cache_images(args, data, tokenizer, place, images, names, dtype)
    if dist.is_main():
        print(f"train on them with --use_cached --cached_path {folder}")
    return 0


def cache_images(args: CacheArgs, data: DataConfig, tokenizer, folder: Path, dataset, names, dtype: str) -> None:
    """Make the cache of images of one size with these names, or its missing units, as numbers of this dtype."""
    device, size = dist.pick_device(args.device), dataset.img_size
    grid = grid_of(size, tokenizer.stride)
    if grid is None:
        raise ValueError(f"--img_size {size} must be a multiple of the tokenizer's {tokenizer.stride}")
    settings = dict(
        version=VERSION,
        format=args.format,
        dtype=dtype,
        img_size=size,
        shape=list(tokenizer.ids_shape(size)) if is_discrete(dtype) else [tokenizer.moment_channels, *grid],
        codebook_size=tokenizer.codebook_size if is_discrete(dtype) else 0,
        fingerprint=tokenizer.fingerprint,
        reading=asdict(data.reading) if data.data == "imagefolder" else None,
        classes=dataset.classes,
        num_images=len(dataset),
        images=reference_hash(dataset),
        content=content_hash(dataset),
        shard_size=args.shard_size if args.format == "packed" else None,
    )
    about = dict(tokenizer=args.tokenizer, channels=dataset.channels, flip=dataset.flip)
    writer = WRITERS[args.format](folder, settings, names)
    with dist.main_first():
        begin(folder, settings)
    words = pick(Reading, older_reading(folder)).flags()
    if words and dist.is_main():
        print(f"{folder} does not say how its images were read: it goes on in MAR's way, {' '.join(words)}")

    todo = missing_units(folder, dataset, writer, args.batch_size, device)
    if todo:
        encode_units(todo, dataset, tokenizer, writer, args, device, dtype)
    broken = dist.all_sum(dataset.broken.int().to(device))  # each process knows those of its own units
    dataset.broken.copy_(broken > 0)
    if dist.is_main():
        finish(folder, settings, about, dataset, names, writer)
    dist.barrier()


def missing_units(folder: Path, dataset, writer, batch_size: int, device) -> list[range]:
    """The units of this process that are missing or damaged. dataset.broken gets the broken images of the others.

    If any process has such a unit, index.json is removed before this returns.
    """
    size = writer.unit_size(batch_size)
    units = [range(i, min(i + size, len(dataset))) for i in range(0, len(dataset), size)]
    own, missing = units[dist.rank() :: dist.world_size()], []
    for unit in tqdm(own, desc="checking", leave=False, disable=not dist.is_main()):
        broken = writer.broken(unit)
        if broken is None:
            missing.append(unit)
        else:
            dataset.broken[broken] = 1
    num_missing = int(dist.all_sum(torch.tensor(len(missing), device=device)))
    if dist.is_main() and num_missing:
        (folder / "index.json").unlink(missing_ok=True)
        if num_missing < len(units):
            print(f"{num_missing} of {len(units)} parts of {folder} are still to do")
    dist.barrier()
    return missing


def main(argv=None) -> int:
    """Parse, encode; returns the exit code."""
    given = vars(make_parser("cache_latents.py", __doc__.splitlines()[0], CacheArgs).parse_args(argv))
    args, config = resolve_cache(given)
    if args.cached_path and not args.verify:
        data = config.data
        check_output_folder("cached_path", args.cached_path, data.data, data.place, args.split_dir, is_cache=True)
        if not args.buckets:
            check_is_free(Path(args.cached_path))
    if args.dry_run:
        print(json.dumps(asdict(args), indent=2))
        return 0
    if not args.cached_path:
        raise ValueError("--cached_path DIR is needed, the folder for the latents")
    if args.verify:
        latents = open_cache(args.cached_path)
        for part in getattr(latents, "parts", (latents,)):
            part.verify()
        print(f"{len(latents)} images in {latents.num_classes} classes, all files are whole: {latents.folder}")
        return 0
    try:
        dist.init(dist.pick_device(args.device), args.dist_url, args.dist_on_itp)
        return run(args, config.data, config.tokenizer, config.model)
    finally:
        dist.shutdown()


if __name__ == "__main__":
    sys.exit(run_main(main))
