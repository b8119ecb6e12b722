"""Turn captions into features of a T5 encoder, once, for training and sampling that need no encoder.

    python scripts/cache_text.py --data_path DIR --captions beside --text_encoder T5_DIR --cached_text OUT
    python scripts/cache_text.py --captions prompts.txt --text_encoder T5_DIR --cached_text OUT

Captions are those of images (.txt files beside them, a .csv or a .jsonl) or lines of a .txt, for `sample.py --prompts`;
see util/images/captions.py. Interrupted, the same command goes on.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from models.text_encoder import load_text_encoder
from util import dist
from util.args import flag, run_with
from util.door import run_main
from util.images.captions import captions_of_images, check_source, read_lines
from util.images.datasets import ImagesArgs
from util.images.folders import check_output_folder
from util.images.latent_files import image_names, write_json
from util.images.text_cache import VERSION, begin, content_of, open_texts, read_shard_lengths, write_shard


@dataclass(frozen=True)
class CacheTextArgs(ImagesArgs):
    """The flags."""

    captions: str = flag("beside", "where captions come from", metavar="beside|FILE.csv|FILE.jsonl|FILE.txt")
    text_encoder: str = flag("", "folder of a T5 encoder, as transformers saves it")
    cached_text: str = flag("", "folder for the features")
    max_tokens: int = flag(120, "tokens of a caption, the rest is cut off", low=1)
    shard_size: int = flag(4096, "captions a file", low=1)
    dry_run: bool = flag(False, "print the resolved configuration and stop")


def check(args: CacheTextArgs) -> None:
    """Raise ValueError for flags that are missing, or places that cannot be used."""
    for name in ("text_encoder", "cached_text"):
        if not getattr(args, name):
            raise ValueError(f"--{name} DIR is needed")
    if args.dry_run:
        return
    dist.pick_device(args.device)
    check_source(args.captions)
    images = (args.data, args.data_path, args.split_dir)
    check_output_folder("cached_text", args.cached_text, *images, is_cache=True)


def read_captions(args: CacheTextArgs) -> tuple[list[str], list[str], list[list[int]]]:
    """(the captions, each once; names of images; the numbers of the captions of each image)."""
    if Path(args.captions).suffix == ".txt":
        return list(dict.fromkeys(read_lines("captions", Path(args.captions)))), [], []
    dataset = args.images()
    names = image_names(dataset)
    of_images = captions_of_images(args.captions, dataset, names)
    captions = list(dict.fromkeys(caption for own in of_images for caption in own))
    number = {caption: i for i, caption in enumerate(captions)}
    return captions, names, [[number[caption] for caption in own] for own in of_images]


def run(args: CacheTextArgs) -> int:
    """Encode what is missing."""
    captions, names, numbers = read_captions(args)
    encoder = load_text_encoder(args.text_encoder, args.max_tokens, dist.pick_device(args.device))
    folder = Path(args.cached_text)
    settings = dict(
        version=VERSION,
        format="text",
        dtype="float16",
        fingerprint=encoder.fingerprint,
        width=encoder.width,
        num_tokens=args.max_tokens,
        shard_size=args.shard_size,
        num_captions=len(captions),
        content=content_of(captions, names, numbers),
    )
    begin(folder, settings)
    lengths = []
    for number, start in enumerate(tqdm(range(0, len(captions), args.shard_size), unit="file", desc="encoding")):
        part = captions[start : start + args.shard_size]
        done = read_shard_lengths(folder, number, len(part), encoder.width)
        lengths += done or write_shard(folder, number, encoder.encode(part, args.batch_size, quiet=True))
    index = dict(encoder=args.text_encoder, captions=captions, names=names, numbers=numbers, lengths=lengths)
    write_json(folder / "index.json", settings | index)
    texts = open_texts(args.cached_text)
    of_images = f" of {len(names)} images" if names else ""
    print(f"features of {len(texts)} captions{of_images}, at most {max(lengths)} tokens of {texts.width}: {folder}")
    print(f"{'train with --cached_text' if names else 'sample with --prompts'} {folder}")
    return 0


def main(argv=None) -> int:
    """Parse, encode; returns the exit code."""
    return run_with(run, CacheTextArgs, "cache_text.py", __doc__.splitlines()[0], argv, check)


if __name__ == "__main__":
    sys.exit(run_main(main))
