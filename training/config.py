"""What the training command line means: flags and presets become one `RunConfig`, and a function takes its part.

    given by hand -> choose_preset -> derive -> RunConfig.from_flat -> check

A flat dict of all settings exists in here, in the parser's output, and in a checkpoint's `args`.
"""

from dataclasses import asdict, dataclass, field, fields, replace

from heads.policy import FLAGS, SCOPES, PolicyHeads
from heads.schedules import default_num_iter, needed_steps
from models.families import FAMILIES, SIZES, Family, rules_of
from models.mar import PUBLISHED
from models.tokenizers import NAMES
from models.tokenizers.ldm import PLACES
from sampling.settings import SampleConfig
from training.objectives import OBJECTIVES
from training.objectives.head_losses import HeadLossConfig
from training.objectives.settings import ObjectiveSettings, RewardConfig, check_learned_rules
from training.objectives.visiting import MaskConfig
from training.presets import CLI_DEFAULTS, KL16, OF_IMAGES, PRESETS, PUBLISHED_DEFAULTS
from training.schedules import ScheduleConfig
from util import dist
from util.args import defaults, flag, parse_range, pick
from util.evaluation.protocol import EvalConfig
from util.images.datasets import DATASETS
from util.images.reading import Reading
from util.rng import DEFAULT_SEED
from util.sizes import Size, bucket_sizes


@dataclass(frozen=True)
class DataConfig(Reading):
    """What is trained on, and how its images are read."""

    data: str | None = flag(None, "data set (default: digits, or imagefolder with --data_path)", choices=DATASETS)
    data_path: str | None = flag(None, "folder of the data: DIR/train/<class>/* for imagefolder")
    buckets: str | None = flag(
        None,
        "sizes of the images, HxW or ratios W:H with about the pixels of --img_size, a batch being of one of them "
        "(default: --img_size)",
        type=bucket_sizes,
        metavar="SIZE,...",
    )
    use_cached: bool = flag(False, "train on cached latents")
    cached_path: str = flag("", "folder of the cached latents")
    cached_text: str = flag("", "folder of the features of captions (scripts/cache_text.py), for a model of text")
    num_workers: int = flag(10, **dist.WORKERS)
    pin_mem: bool = flag(True, "copy to the GPU from pinned memory")

    @property
    def place(self) -> str | None:
        """Where the data set is; None for its own place."""
        return self.data_path or ("./data/imagenet" if self.data == "imagefolder" else None)


@dataclass(frozen=True)
class TokenizerConfig:
    """Which autoencoder makes the latents."""

    tokenizer: str | None = flag(
        None,
        f"one of {NAMES} (default: kl16 for imagefolder)",
    )
    vae_path: str | None = flag(None, "weights of the autoencoder (default: download_weights.py's place for them)")
    vae_scale: str | None = flag(
        None, "factor of the latents, or one a channel (default: the tokenizer's)", metavar="X"
    )
    vae_mean: str | None = flag(None, "subtracted from the latents, or one a channel", metavar="X[,...]")


@dataclass(frozen=True)
class ModelConfig:
    """A size of a family, and the fields of its configuration that flags or a preset set."""

    model: str = flag("mar_large", "model size", choices=SIZES)
    given: dict = field(default_factory=dict)  # by name; vae_stride, vae_embed_dim, vocab_size None: the tokenizer's

    @property
    def family_name(self) -> str:
        """The row of FAMILIES that the size belongs to."""
        return SIZES[self.model]

    @property
    def family(self) -> Family:
        """That row."""
        return FAMILIES[self.family_name]

    @property
    def settings(self) -> dict:
        """The value of each field of the family's configuration: the one given, else that of the size's row."""
        row = self.family.sizes[self.model]
        return {field.name: self.given.get(field.name, getattr(row, field.name)) for field in fields(row)}

    @property
    def reads_text(self) -> bool:
        """Is the model's condition a caption?"""
        return self.settings.get("model_type") == "t2i"

    @property
    def fixed_rules(self) -> dict[str, str]:
        """The rules that the model cannot do without."""
        return rules_of(self.family_name, self.settings)

    @property
    def img_size(self) -> Size:
        """Of an image, see util/sizes.py."""
        return self.settings["img_size"]

    def build(self, **known):
        """The family's configuration: the size's row, what is given, and what data and tokenizer say."""
        return replace(self.family.sizes[self.model], **{**self.given, **known})


@dataclass(frozen=True)
class TrainConfig(ScheduleConfig):
    """Optimisation."""

    objective: str = flag("token", "what is minimised", choices=OBJECTIVES)
    batch_size: int = flag(16, "images a step and process (with accum_iter: at a time)", low=1)
    accum_iter: int = flag(1, "batches whose gradients are added up to one step", low=1)
    start_epoch: int = flag(0, "first epoch of a fresh start", low=0)
    beta2: float = flag(0.95, "AdamW averaging rate of the squared gradient", low=0, high=0.99999)
    ema_rate: float = flag(0.9999, "averaging rate of the weights, approached from below", low=0, high=1)
    grad_clip: float = flag(3.0, "largest gradient norm; 0 = no clipping", low=0)
    freeze_backbone: bool = flag(False, "do not train the transformer")
    train_diffloss: bool = flag(True, "train the diffusion MLP")
    mask_ratio_per_image: bool = flag(False, "draw a mask ratio for each image instead of each batch")
    seed: int = flag(DEFAULT_SEED, "seed of everything random", low=0, high=2**63 - 1)

    @property
    def images_per_process(self) -> int:
        """Images of an optimizer step that one process computes."""
        return self.batch_size * self.accum_iter

    @property
    def global_batch(self) -> int:
        """Images of an optimizer step."""
        return self.images_per_process * dist.world_size()


@dataclass(frozen=True)
class HeadsConfig:
    """Which policy heads are trained, between which bounds, for which settings of sampling."""

    learn: str = flag("", "comma list of heads to train: order, group, tau, cfg, profile")
    heads_from: float = flag(0.0, "epoch from which they are trained; until then hand-made rules make the masks", low=0)
    tau_mode: str = flag("global", "one temperature an image, or one a token", choices=SCOPES)
    cfg_mode: str = flag("global", "one guidance scale an image, or one a token", choices=SCOPES)
    rho_min: float = flag(0.0, "smallest share of the unknown tokens that the group head takes", low=0, high=1)
    rho_max: float = flag(1.0, "largest share of the unknown tokens that the group head takes", low=0, high=1)
    tau_min: float = flag(0.9, "smallest temperature of the tau head", low=0)
    tau_max: float = flag(1.05, "largest temperature of the tau head", low=0)
    cfg_min: float = flag(0.0, "smallest guidance scale of the cfg head", low=0)
    cfg_max: float = flag(4.0, "largest guidance scale of the cfg head", low=0)
    train_num_iter: str | None = flag(  # None: as many as an image has tokens, which are not known yet
        "2,16", "lo,hi: autoregressive steps to train for, where masks or heads depend on them"
    )
    cfg_train_max: float = flag(2.0, "largest guidance scale that the heads are trained for", low=1)

    def __post_init__(self):
        for name in ("rho", "tau", "cfg"):
            low, high = self.bounds(name)
            if low > high:
                raise ValueError(f"--{name}_min {low:g} must be at most --{name}_max {high:g}")
        if self.train_num_iter is not None:
            self.num_iter_range()

    def bounds(self, name: str) -> tuple[float, float]:
        """Of rho, tau or cfg."""
        return getattr(self, f"{name}_min"), getattr(self, f"{name}_max")

    def num_iter_range(self) -> tuple[int, int]:
        """train_num_iter as two numbers; another text raises ValueError."""
        return parse_range("train_num_iter", self.train_num_iter, int, low=1)

    def build(self, dim: int, form: str) -> PolicyHeads | None:
        """The heads that --learn names, fresh, of a row of `heads.forms.FORMS`, for z of width dim; None for none."""
        if not self.learn:
            return None
        options = {name: self.bounds(name) for name in ("rho", "tau", "cfg")}
        options |= dict(form=form, tau_mode=self.tau_mode, cfg_mode=self.cfg_mode)
        return PolicyHeads(dim, tuple(self.learn.split(",")), **options)


@dataclass(frozen=True)
class LaunchConfig:
    """Where and in what way a run runs, what it leaves, and when."""

    preset: str | None = flag(None, "defaults of a known setting; flags given by hand win")
    output_dir: str = flag("./output_dir", "where checkpoints and pictures go")
    log_dir: str | None = flag(None, "where TensorBoard's files go (default: output_dir)")
    resume: str = flag("", "folder or file to continue from; without a checkpoint there, a fresh start")
    allow_mismatch: bool = flag(False, "resume although sizes, tokenizer or classes are not the checkpoint's")
    init_from: str = flag("", "folder or file whose weights start a new run; --resume wins where it has a checkpoint")
    keep_classes: bool = flag(False, "of --init_from keep what belongs to classes of the same names, in any number")
    eval_freq: int = flag(40, "epochs between sample grids (and metrics, with --online_eval)", low=1)
    save_last_freq: int = flag(5, "epochs between checkpoints", low=1)
    keep_last: int = flag(2, "how many of the last checkpoints stay (one of them is checkpoint-last.pth)", low=1)
    online_eval: bool = flag(False, "compute the metrics during training")
    evaluate: bool = flag(False, "sample and compute the metrics of the checkpoint in --resume, without training")
    device: str = flag("auto", "auto, cuda, mps, cpu")
    dtype: str | None = flag(None, "arithmetic (default: bf16 where CUDA has it, else fp32)", choices=dist.FLOATS)
    compile: bool = flag(False, "compile the transformer blocks and the diffusion MLP")
    deterministic: bool = flag(False, "the same bits in every run on a machine (slower on GPUs; no TF32 in training)")
    dry_run: bool = flag(False, "print the resolved configuration and stop")

    world_size: int = flag(1, "set by the launcher; a flag for MAR's command lines", low=1)
    local_rank: int = flag(-1, "set by the launcher; a flag for MAR's command lines")
    dist_url: str = flag("env://", "where processes meet")
    dist_on_itp: bool = flag(False, "read ranks from Open MPI's environment")


@dataclass(frozen=True)
class RunConfig:
    """All settings of a training run; each function takes the part that it needs."""

    data: DataConfig
    tokenizer: TokenizerConfig
    model: ModelConfig
    train: TrainConfig
    heads: HeadsConfig
    masks: MaskConfig
    losses: HeadLossConfig
    reward: RewardConfig
    sampling: SampleConfig
    evaluation: EvalConfig
    launch: LaunchConfig

    @classmethod
    def from_flat(cls, settings: dict) -> "RunConfig":
        """From one dict with every flag's name; the sampling default num_sampling_steps is the model's too."""
        parts = {part.name: pick(part.type, settings) for part in fields(cls)}
        names = {flag.name for flag in fields(parts["model"].family.config)}
        given = {name: value for name, value in settings.items() if name in names}
        return cls(**parts | {"model": replace(parts["model"], given=given)})

    def for_objective(self, flip: bool, real=None) -> ObjectiveSettings:
        """The parts that objectives are made of; with --evaluate no masks are made, and need no rules."""
        masks = MaskConfig() if self.launch.evaluate else self.masks
        parts = dict(train=self.train, masks=masks, losses=self.losses, heads=self.heads, reward=self.reward)
        return ObjectiveSettings(**parts, sampling=self.sampling, flip=flip, real=real)

    def build_heads(self, dim: int) -> PolicyHeads | None:
        """The heads that --learn names, fresh, for z of width dim, of the objective's form; None for none."""
        return self.heads.build(dim, OBJECTIVES[self.train.objective].form)

    def fitted(self, model) -> "RunConfig":
        """The same settings for a model that is made, whose tokens say what steps it has by default."""
        sampling = self.sampling.fitted(model.fixed_rules, self.model.model, needed_steps(model))
        steps = self.heads.train_num_iter or f"{sampling.num_iter},{sampling.num_iter}"
        return replace(self, sampling=sampling, heads=replace(self.heads, train_num_iter=steps))

    def check_sampling(self, model, heads: PolicyHeads | None) -> None:
        """Raise ValueError for what sampling would refuse at the first images of this model, in training or after."""
        self.sampling.check(model, heads)
        for kind in heads.learn if heads is not None and not self.launch.evaluate else ():
            if kind in model.fixed_rules:
                rule = model.fixed_rules[kind]
                raise ValueError(f"--learn {kind} does not fit {self.model.model}, which needs --{kind} {rule}")
        if OBJECTIVES[self.train.objective].keeps_model and not self.launch.evaluate:  # it samples while it trains
            learned = {FLAGS[kind]: "learned" for kind in heads.learn}
            least = replace(self.sampling, infer_mode="baseline", num_iter=self.heads.num_iter_range()[0], **learned)
            least.check(model, heads)

    def flat(self) -> dict:
        """The dict that `from_flat` takes."""
        flags = defaults(self.model.family.config)
        settings = {name: value for name, value in self.model.settings.items() if name in flags}
        for part in fields(self):
            settings |= asdict(getattr(self, part.name))
        del settings["given"]
        return settings


PARTS = tuple(part.type for part in fields(RunConfig))


def flag_classes() -> tuple:
    """The classes whose fields are the flags of main_mar.py."""
    return (*PARTS, *(family.config for family in FAMILIES.values()))


def resolve(given: dict) -> RunConfig:
    """All settings, from the flags given by hand, the preset they name or imply, and the defaults, in this order."""
    preset = choose_preset(given)
    row = PRESETS.get(preset, {})
    model = given.get("model", row.get("model", ModelConfig.model))
    mars = {**CLI_DEFAULTS, **(PUBLISHED_DEFAULTS if model in PUBLISHED else {}), **row}
    if SIZES[model] != "mar":  # what they say of a model is of MAR's
        of_model = defaults(FAMILIES["mar"].config).keys() - OF_IMAGES
        mars = {name: value for name, value in mars.items() if name not in of_model}
    num_iter = default_num_iter(ModelConfig(model, given).fixed_rules, None)
    if num_iter is None:  # a preset's is for several tokens a step
        mars.pop("num_iter", None)
    base = {**defaults(*PARTS), "num_iter": num_iter, **FAMILIES[SIZES[model]].sampling}
    chosen = {**base, **mars, **given, "preset": preset if preset in PRESETS else None}
    own = OBJECTIVES[chosen["objective"]].defaults(chosen)
    if "blr" in given:
        own.pop("lr", None)
    chosen |= {name: value for name, value in own.items() if name not in given}
    config = RunConfig.from_flat(chosen | derive(chosen, given))
    sampling = config.sampling.fitted(config.model.fixed_rules, config.model.model)
    config = replace(config, sampling=sampling)
    check(config, given)
    return config


def choose_preset(given: dict) -> str | None:
    """The preset that flags name or imply; an unknown one raises ValueError.

    MAR's commands never pass --data: what they do pass implies the image folder and the published defaults.
    """
    preset = given.get("preset")
    if preset is not None:
        if preset not in PRESETS:
            raise ValueError(f"unknown --preset {preset!r}; valid: {', '.join(PRESETS)}")
        return preset
    published = any(given.get(name) for name in ("data_path", "use_cached", "vae_path"))
    published = published or given.get("model", "mar_tiny") != "mar_tiny"
    return given.get("data", None if published else "digits")


def derive(chosen: dict, given: dict) -> dict:
    """The settings that follow from others, where they are not given by hand."""
    data, tokenizer = chosen["data"] or "imagefolder", chosen["tokenizer"] or "kl16"
    derived = dict(data=data, tokenizer=tokenizer, log_dir=chosen["log_dir"] or chosen["output_dir"])
    if tokenizer in PLACES:
        derived["vae_path"] = chosen["vae_path"] or PLACES[tokenizer]
    if tokenizer == "pixel":  # the image itself decides these
        channels = PRESETS.get(data, {}).get("vae_embed_dim", 3)
        derived |= dict(vae_stride=given.get("vae_stride", 1), vae_embed_dim=given.get("vae_embed_dim", channels))
    else:  # a preset may be for pixels; None: what the tokenizer has, which is not loaded yet
        published = KL16 if tokenizer == "kl16" else {}
        for name in ("vae_stride", "vae_embed_dim"):
            derived[name] = given.get(name, published.get(name))
        derived |= dict(vocab_size=given.get("vocab_size"), patch_size=given.get("patch_size", 1))
    if chosen["lr"] is None:
        derived["lr"] = chosen["blr"] * chosen["batch_size"] * chosen["accum_iter"] * dist.world_size() / 256
    return derived


def check(config: RunConfig, given: dict) -> None:
    """Raise ValueError for settings that contradict each other, or that sampling and measuring could not use later."""
    train, launch = config.train, config.launch
    if train.min_lr > train.lr:
        raise ValueError(f"--min_lr {train.min_lr:g} must be at most the learning rate {train.lr:g}")
    if train.start_epoch >= train.epochs and not launch.evaluate:
        raise ValueError(f"--start_epoch {train.start_epoch} must be below --epochs {train.epochs}")
    if launch.evaluate and not launch.resume:
        raise ValueError("--evaluate needs --resume DIR, the checkpoint to evaluate")
    if launch.keep_classes and not launch.init_from:
        raise ValueError("--keep_classes needs --init_from DIR, whose classes are kept")
    if given.get("data_path") and config.data.data == "digits":
        raise ValueError(f"--data_path {config.data.data_path} has no meaning for --data digits, which need no folder")
    of_others = defaults(*flag_classes()).keys() - defaults(*PARTS, config.model.family.config).keys()
    for name in sorted(of_others & given.keys()):
        raise ValueError(f"--{name} {given[name]} has no meaning for --model {config.model.model}")
    if config.model.reads_text and not config.data.cached_text:
        raise ValueError(
            f"--model {config.model.model} is of text and needs --cached_text DIR, which scripts/cache_text.py makes"
        )
    if config.data.cached_text and not config.model.reads_text:
        raise ValueError(f"--cached_text {config.data.cached_text} has no meaning for --model {config.model.model}")
    usual = defaults(*PARTS)
    for name in sorted(OBJECTIVES[train.objective].unused & given.keys()):
        if given[name] != usual[name]:
            raise ValueError(f"--{name} {given[name]} has no meaning for --objective {train.objective}")
    config.data.check(config.data.data)
    config.evaluation.resolved()
    if launch.evaluate:  # with the heads of the checkpoint
        return
    heads = config.build_heads(1)
    config.sampling.rules(heads)
    if train.objective != "token" or config.masks.train_masks == "random":  # else they make the masks
        check_learned_rules(heads, given)
    OBJECTIVES[train.objective].check(heads, config.for_objective(flip=False))
    if train.freeze_backbone and not train.train_diffloss and not config.heads.learn:
        raise ValueError("--freeze_backbone --no-train_diffloss leaves nothing to train; name heads with --learn")
