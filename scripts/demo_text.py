"""Digits with captions in several wordings, and a tiny random T5 encoder: whether text decides what a model draws.

    python scripts/demo_text.py --output_dir DIR                    captions, prompts and encoder, see below
    python scripts/demo_text.py --output_dir DIR --samples FOLDER   which share of the samples is what was asked for

    DIR/captions.csv    of each digit a caption in each of the wordings to train on, for scripts/cache_text.py
    DIR/prompts.txt     prompts in wordings that are held out, made of the same words, for sample.py --prompts
    DIR/encoder         a T5 encoder with random weights; it has learned nothing, but tells words apart

scripts/demo_text.sh runs all of it.
"""

import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from util.args import check_folder, flag, run_with
from util.checkpoint import atomic_file
from util.door import run_main
from util.evaluation.metrics import digit_metrics
from util.images.datasets import build_dataset
from util.images.latent_files import image_names
from util.images.pictures import load_samples

NAMES = "zero one two three four five six seven eight nine".split()
TRAINED = (
    "a {}",
    "the digit {}",
    "a handwritten {}",
    "a picture of the number {}",
    "the number {} in ink",
    "{} written by hand",
    "this is a {}",
    "an image showing the digit {}",
    "the {} in ink",
    "the handwritten {}",
    "{} in a picture",
    "a number by hand {}",
)
HELD_OUT = (
    "a handwritten picture of the digit {}",
    "this image is showing the number {} written in ink",
    "the {} is handwritten",
    "an image of a handwritten number {}",
)
SIZES = dict(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu")


@dataclass(frozen=True)
class DemoArgs:
    """The flags."""

    output_dir: str = flag("output_dir/demo_text", "folder for captions, prompts and encoder")
    samples: str | None = flag(None, "folder of a setting of sample.py --prompts, which is measured")
    seed: int = flag(0, "of the encoder's weights", low=0, high=2**63 - 1)
    dry_run: bool = flag(False, "print the resolved configuration and stop")


def words_of(digit: int) -> tuple[str, str]:
    """The two words for a digit."""
    return NAMES[digit], str(digit)


def held_out_prompts() -> list[str]:
    """Prompt i asks for the digit i modulo 10."""
    return [
        wording.format(words_of(digit)[number % 2]) for number, wording in enumerate(HELD_OUT) for digit in range(10)
    ]


def write_captions(path: Path) -> list[str]:
    """Write captions.csv of the digits; all captions that are in it."""
    digits, captions = build_dataset("digits"), {}
    with atomic_file(path) as temporary, open(temporary, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "caption"])
        for name, digit in zip(image_names(digits), digits.labels.tolist()):
            for caption in (wording.format(word) for wording in TRAINED for word in words_of(digit)):
                table.writerow([name, caption])
                captions[caption] = None
    return list(captions)


def save_encoder(folder: Path, words: list[str], seed: int, **sizes) -> None:
    """Save a T5 encoder with random weights, and a tokenizer of these words, in transformers' form.

    sizes: fields of a T5Config, in place of SIZES.
    """
    import tokenizers
    import transformers

    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    special = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(seed)
    config = transformers.T5Config(vocab_size=len(vocabulary), **{**SIZES, **sizes})
    transformers.T5EncoderModel(config).save_pretrained(folder)


def make(folder: Path, seed: int) -> None:
    """Write captions, prompts and encoder."""
    folder.mkdir(parents=True, exist_ok=True)
    captions = write_captions(folder / "captions.csv")
    words = dict.fromkeys(word for caption in captions for word in caption.split())
    unknown = {word for prompt in held_out_prompts() for word in prompt.split()} - words.keys()
    assert not unknown, unknown
    with atomic_file(folder / "prompts.txt") as temporary:
        temporary.write_text("".join(f"{prompt}\n" for prompt in held_out_prompts()))
    save_encoder(folder / "encoder", list(words), seed)
    print(f"{len(captions)} captions, {10 * len(HELD_OUT)} prompts in wordings held out, and an encoder: {folder}")


def measure(folder: Path) -> dict[str, float]:
    """The share of the samples that a classifier takes for the digit asked for: of each wording, and "all"."""
    samples, digits = load_samples(folder), build_dataset("digits")
    images, prompts = samples["images"], samples["labels"]
    asked, real = prompts % 10, (digits.images.permute(0, 2, 3, 1).numpy(), digits.labels.numpy())
    if images.shape[1:3] != (8, 8) or prompts.max() >= 10 * len(HELD_OUT):
        raise ValueError(f"--samples {folder} holds no digits sampled with --prompts prompts.txt of this program")
    result = {}
    for wording in (*range(len(HELD_OUT)), "all"):
        some = np.ones(len(prompts), bool) if wording == "all" else prompts // 10 == wording
        name = wording if wording == "all" else HELD_OUT[wording].format("…")
        result[name] = digit_metrics(images[some], asked[some], *real)["svc_accuracy"]
    return result


def check(args: DemoArgs) -> None:
    """Raise ValueError for places that cannot be used."""
    check_folder("output_dir", args.output_dir)
    if args.samples is not None and not args.dry_run and not Path(args.samples).is_dir():
        raise ValueError(f"--samples: there is no folder {args.samples}")


def run(args: DemoArgs) -> int:
    """Make what the demonstration is made of, or measure samples."""
    if args.samples is None:
        make(Path(args.output_dir), args.seed)
        return 0
    result = measure(Path(args.samples))
    for name, accuracy in result.items():
        print(f"{accuracy:7.1%}  {name}")
    path = Path(args.output_dir) / "accuracy.json"
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(result, indent=2))
    return 0


def main(argv=None) -> int:
    """Parse, make or measure; returns the exit code."""
    return run_with(run, DemoArgs, "demo_text.py", __doc__.splitlines()[0], argv, check)


if __name__ == "__main__":
    sys.exit(run_main(main))
