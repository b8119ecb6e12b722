"""A causal model draws the first rows of an image, another one completes it (arXiv 2507.13032 names it, no more).

Legend: B images, L tokens an image. The causal model is sampled with the settings of its checkpoint, where no flags
say otherwise.
"""

import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import cached_property

import torch
from torch import nn

from heads.policy import FLAGS
from heads.schedules import needed_steps
from models.families import SIZES
from models.loading import LoadArgs, load_model
from sampling.loop import generate
from sampling.settings import SampleConfig
from util.args import check_values, flag, pick
from util.checkpoint import load_checkpoint, weights_hash
from util.rng import seed_of

DEFAULT_SHARE = 0.25
SETTINGS = ("cfg", "temperature", "top_k")  # of the causal model, that flags replace


@dataclass(frozen=True)
class PrefixArgs(LoadArgs):
    """Which causal model draws the first rows, how many, and how."""

    prefix_from: str | None = flag(None, "folder or file of a causal model that draws the first rows of each image")
    prefix_share: float | None = flag(
        None, f"share of the tokens that it draws, raised to whole rows (default: {DEFAULT_SHARE})", low=0, high=1
    )
    prefix_model: str | None = flag(None, "its size, for a published file, which does not carry it", choices=SIZES)
    prefix_cfg: float | None = flag(None, "its guidance scale, instead of its checkpoint's", low=0)
    prefix_temperature: float | None = flag(None, "its temperature, instead of its checkpoint's", low=0)
    prefix_top_k: int | None = flag(None, "its top_k, instead of its checkpoint's", low=0)

    def prefix_settings(self) -> dict:
        """Those of SETTINGS that are given."""
        given = {name: getattr(self, f"prefix_{name}") for name in SETTINGS}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class Prefix:
    """The first num_tokens of images, drawn by a causal model of ids.

    share: of all tokens, as asked for; given: those of SETTINGS that flags say.
    """

    model: nn.Module
    sampling: SampleConfig
    share: float
    num_tokens: int
    given: dict = field(default_factory=dict)

    @cached_property
    def hashes(self) -> dict:
        """What identifies it among the settings of a run."""
        own = seed_of(weights_hash(self.model.state_dict()), sorted(asdict(self.sampling).items()))
        given = {f"prefix_{name}": value for name, value in self.given.items()}
        return dict(prefix=f"{own:08x}", prefix_share=self.share, **given)

    def known(self, labels: torch.Tensor, seeds: list[int], tokenizer, evals: Counter) -> dict[str, torch.Tensor]:
        """tokens (B, L) with these first ones, and mask (B, L) of the others, as `sampling.loop.decode` takes them.

        labels, seeds: B each. evals: see `decode`.
        """
        shape = len(labels), self.model.config.seq_len
        mask = (torch.arange(shape[1]) >= self.num_tokens).expand(shape)
        if not self.num_tokens:
            return dict(tokens=torch.zeros(shape, dtype=torch.long), mask=mask)
        ids = generate(
            self.model,
            labels,
            self.sampling.rules(),
            num_iter=self.sampling.num_iter,
            seeds=seeds,
            tokenizer=tokenizer,
            evals=evals,
            num_taken=self.num_tokens,
            **self.sampling.token_head_options(),
        )
        return dict(tokens=self.model.patchify(ids), mask=mask)

    def completion_seeds(self, seeds: list[int]) -> list[int]:
        """Seeds of what completes the images: other ones than the prefix has used, distinct if these are.

        Where nothing is drawn before, these themselves.
        """
        shift = seed_of("completion") if self.num_tokens else 0
        return [(seed + shift) % 2**32 for seed in seeds]


def whole_rows(share: float, grid: int) -> int:
    """Tokens of the rows of a square grid that a share of its tokens reaches into."""
    return grid * math.ceil(round(share * grid, 9))  # 0.55 · 20 is a little above 11


def open_prefix(args: PrefixArgs, model, tokenizer, config: dict) -> Prefix:
    """The prefix that the flags name for a model with this tokenizer and config.

    Of its checkpoint the averaged weights are taken, unless --no_ema or the file says otherwise. A model that cannot be
    continued, whose ids, images or classes are others, or that cannot be sampled as it says, raises ValueError.
    """
    what = f"--prefix_from {args.prefix_from}"
    if config.get("text") is not None or "group" in model.fixed_rules or not model.token_head.discrete:
        raise ValueError(f"{what} has no meaning for this model: it needs one of ids, classes and free groups")
    try:
        content, (causal, own_tokenizer, own_config) = _load(args, model, config)
    except ValueError as error:
        raise ValueError(f"{what}: {error}".replace("--model ", "--prefix_model ")) from None
    if causal.fixed_rules.get("order") != "raster" or not causal.token_head.discrete:
        raise ValueError(f"{what} must be a causal model of ids, row by row, such as llamagen_ar_b")
    if own_tokenizer.describe() != tokenizer.describe():
        raise ValueError(f"{what} has ids of {own_tokenizer.describe()}, the model those of {tokenizer.describe()}")
    if causal.config.img_size != model.config.img_size:
        raise ValueError(f"{what} makes images of {causal.config.img_size} pixels, the model {model.config.img_size}")
    own, classes = own_config["data"]["classes"], config["data"]["classes"]
    if len(own) != len(classes):
        raise ValueError(f"{what} has {len(own)} classes, the model {len(classes)}")
    if "config" in content and own != classes:  # a published file has no names
        raise ValueError(f"{what} has other classes than the model")
    share = DEFAULT_SHARE if args.prefix_share is None else args.prefix_share
    sampling = _settings(args, content, causal, own_config)
    return Prefix(causal, sampling, share, whole_rows(share, model.config.grid), args.prefix_settings())


def _load(args: PrefixArgs, model, config: dict):
    """(content of a prefix's checkpoint, `load_model` of it); a published one is of the model's tokenizer and size."""
    content = load_checkpoint(args.prefix_from)
    averaged = "model_ema" in content and not (args.no_ema and "model" in content)
    options = dict(ema=averaged, place=args.prefix_from, model=args.prefix_model, vae_path=args.vae_path)
    if "config" not in content:
        if args.prefix_model is None:
            raise ValueError("it does not say what it holds: give --prefix_model")
        options |= dict(vae_path=args.vae_path or config.get("vae_path"), img_size=model.config.img_size)
    return content, load_model(content, **options)


def _settings(args: PrefixArgs, content: dict, causal, config: dict) -> SampleConfig:
    """How the causal model of a content with this config is sampled; what cannot be raises ValueError.

    A published one has the same guidance at all tokens, as LlamaGen's.
    """
    what = f"--prefix_from {args.prefix_from}"
    check_values(SampleConfig, config["sample"], what)
    stored = config["sample"] if "config" in content else dict(cfg_schedule="constant")
    length = needed_steps(causal)
    sampling = pick(SampleConfig, stored, **args.prefix_settings()).fitted(causal.fixed_rules, what, length)
    if learned := [name for name in FLAGS.values() if getattr(sampling.resolved(), name) == "learned"]:
        raise ValueError(f"{what} is sampled with a learned {', '.join(learned)}: a prefix has hand-made rules only")
    try:
        sampling.check(causal)
    except ValueError as error:
        raise ValueError(f"{what} cannot be sampled with the settings in it: {error}") from None
    return sampling


def check_prefix_flags(args: PrefixArgs, edit_image: str | None) -> None:
    """Raise ValueError for flags of a prefix that do not go together."""
    given = dict(share=args.prefix_share, model=args.prefix_model) | args.prefix_settings()
    for name, value in given.items():
        if args.prefix_from is None and value is not None:
            raise ValueError(f"--prefix_{name} {value} needs --prefix_from, the checkpoint of a causal model")
    if args.prefix_from is not None and edit_image is not None:
        raise ValueError("--prefix_from and --edit_image both say which tokens are known: give one of the two")
