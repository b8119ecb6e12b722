"""What the training command line means: its flags, the presets, and how they become one resolved configuration."""

from dataclasses import dataclass, fields, replace

from heads.policy import SCOPES, PolicyHeads
from heads.schedules import RuleOptions
from models.mar import MAR_CONFIGS, MARConfig
from models.tokenizers.ldm import KL16_PATH
from sampling.settings import SampleConfig
from training.objectives.head_losses import HeadLossConfig
from training.objectives.visiting import MaskConfig, Visits
from util import dist
from util.args import defaults, flag, parse_range, pick
from util.evaluation.protocol import EvalConfig
from util.images.datasets import DATASETS


@dataclass(frozen=True)
class TrainConfig:
    """Data, optimisation and housekeeping of a training run."""

    preset: str | None = flag(None, "defaults of a known setting; flags given by hand win")
    data: str | None = flag(None, "data set (default: digits, or imagefolder with --data_path)", choices=DATASETS)
    data_path: str | None = flag(None, "folder of the data: DIR/train/<class>/* for imagefolder")
    tokenizer: str | None = flag(None, "pixel, kl16, vq16, diffusers:PATH_OR_REPO (default: kl16 for imagefolder)")
    vae_path: str | None = flag(None, "weights of the autoencoder (default for kl16: MAR's place for them)")
    vae_scale: str | None = flag(
        None, "factor of the latents, or one a channel (default: the tokenizer's)", metavar="X"
    )
    vae_mean: str | None = flag(None, "subtracted from the latents, or one a channel", metavar="X[,...]")
    use_cached: bool = flag(False, "train on cached latents")
    cached_path: str = flag("", "folder of the cached latents")
    num_workers: int = flag(10, "processes that load images", low=0)
    pin_mem: bool = flag(True, "copy to the GPU from pinned memory")

    model: str = flag("mar_large", "model size", choices=MAR_CONFIGS)
    batch_size: int = flag(16, "images a step and process (with accum_iter: at a time)", low=1)
    accum_iter: int = flag(1, "batches whose gradients are added up to one step", low=1)
    epochs: int = flag(400, "passes over the data", low=1)
    lr: float | None = flag(None, "learning rate (default: blr · global batch / 256)", low=0)
    blr: float = flag(1e-4, "base learning rate, for a global batch of 256", low=0)
    min_lr: float = flag(0.0, "where the cosine schedule ends", low=0)
    lr_schedule: str = flag("constant", "after the warm-up", choices=("constant", "cosine"))
    warmup_epochs: float = flag(100, "epochs of linear warm-up", low=0)
    weight_decay: float = flag(0.02, "AdamW weight decay", low=0)
    ema_rate: float = flag(0.9999, "averaging rate of the weights, approached from below", low=0, high=1)
    grad_clip: float = flag(3.0, "largest gradient norm; 0 = no clipping", low=0)
    freeze_backbone: bool = flag(False, "do not train the transformer")
    train_diffloss: bool = flag(True, "train the diffusion MLP")
    learn: str = flag("", "comma list of heads to train: order, group, tau, cfg")
    heads_from: float = flag(0.0, "epoch from which they are trained; until then hand-made rules make the masks", low=0)
    tau_mode: str = flag("global", "one temperature an image, or one a token", choices=SCOPES)
    cfg_mode: str = flag("global", "one guidance scale an image, or one a token", choices=SCOPES)
    rho_min: float = flag(0.0, "smallest share of the unknown tokens that the group head takes", low=0, high=1)
    rho_max: float = flag(1.0, "largest share of the unknown tokens that the group head takes", low=0, high=1)
    tau_min: float = flag(0.9, "smallest temperature of the tau head", low=0)
    tau_max: float = flag(1.05, "largest temperature of the tau head", low=0)
    cfg_min: float = flag(0.0, "smallest guidance scale of the cfg head", low=0)
    cfg_max: float = flag(4.0, "largest guidance scale of the cfg head", low=0)
    train_num_iter: str = flag("2,16", "lo,hi: autoregressive steps to train for, where masks or heads depend on them")
    cfg_train_max: float = flag(2.0, "largest guidance scale that the heads are trained for", low=1)
    mask_ratio_per_image: bool = flag(False, "draw a mask ratio for each image instead of each batch")

    eval_freq: int = flag(40, "epochs between sample grids (and metrics, with --online_eval)", low=1)
    save_last_freq: int = flag(5, "epochs between checkpoints", low=1)
    keep_last: int = flag(2, "how many of the last checkpoints stay (one of them is checkpoint-last.pth)", low=1)
    online_eval: bool = flag(False, "compute the metrics during training")
    evaluate: bool = flag(False, "sample and compute the metrics of the checkpoint in --resume, without training")
    output_dir: str = flag("./output_dir", "where checkpoints and pictures go")
    log_dir: str | None = flag(None, "where TensorBoard's files go (default: output_dir)")
    resume: str = flag("", "folder or file to continue from; without a checkpoint there, a fresh start")
    allow_mismatch: bool = flag(False, "resume although sizes, tokenizer or classes are not the checkpoint's")
    init_from: str = flag("", "folder or file whose weights start a new run; --resume wins where it has a checkpoint")
    start_epoch: int = flag(0, "first epoch of a fresh start", low=0)
    seed: int = flag(1, "seed of everything random", low=0, high=2**63 - 1)
    device: str = flag("auto", "auto, cuda, mps, cpu")
    dtype: str | None = flag(None, "arithmetic (default: bf16 where CUDA has it, else fp32)", choices=dist.FLOATS)
    compile: bool = flag(False, "compile the transformer blocks and the diffusion MLP")
    deterministic: bool = flag(False, "the same bits in every run on the same machine (slower on GPUs)")
    dry_run: bool = flag(False, "print the resolved configuration and stop")

    world_size: int = flag(1, "set by the launcher; here for MAR's command lines", low=1)
    local_rank: int = flag(-1, "set by the launcher; here for MAR's command lines")
    dist_url: str = flag("env://", "where processes meet")
    dist_on_itp: bool = flag(False, "read ranks from Open MPI's environment")

    @property
    def num_iter_range(self) -> tuple[int, int]:
        """train_num_iter as two numbers."""
        return parse_range("train_num_iter", self.train_num_iter, int, low=1)

    def heads(self, dim: int) -> PolicyHeads | None:
        """The heads that --learn names, fresh, for z of width dim; None for none."""
        if not self.learn:
            return None
        bounds = dict(
            rho=(self.rho_min, self.rho_max), tau=(self.tau_min, self.tau_max), cfg=(self.cfg_min, self.cfg_max)
        )
        modes = dict(tau_mode=self.tau_mode, cfg_mode=self.cfg_mode)
        return PolicyHeads(dim, tuple(self.learn.split(",")), **modes, **bounds)


CONFIGS = (TrainConfig, MaskConfig, HeadLossConfig, SampleConfig, EvalConfig, MARConfig)
# where MAR's command line and its constructor disagree, the command line counts
_CLI_DEFAULTS = dict(diffloss_d=12, diffloss_w=1536, diffusion_batch_mul=1)
_PIXELS = dict(tokenizer="pixel", model="mar_tiny", vae_stride=1, num_workers=0, label_drop_prob=0.1, buffer_size=4)
_PIXELS |= dict(diffloss_d=3, diffloss_w=128, diffusion_batch_mul=4, attn_dropout=0.0, proj_dropout=0.0)
_PIXELS |= dict(batch_size=64, blr=8e-3, lr_schedule="cosine", ema_rate=0.999, num_sampling_steps=25, num_iter=8)
_GREY_28 = _PIXELS | dict(img_size=28, patch_size=2, vae_embed_dim=1, epochs=40, warmup_epochs=1, num_images=10000)
_IMAGENET = dict(data="imagefolder", epochs=800, warmup_epochs=100, batch_size=64, diffusion_batch_mul=4)
_IMAGENET |= dict(num_iter=256, eval_bsz=256, temperature=1.0)
PRESETS = {
    "digits": _PIXELS
    | dict(data="digits", img_size=8, patch_size=1, vae_embed_dim=1, epochs=45, warmup_epochs=3)
    | dict(diffloss_w=64, diffusion_batch_mul=2, eval_freq=20, save_last_freq=10)
    | dict(cfg=1.5, num_images=1800, eval_bsz=300, features="digits"),
    "mnist": _GREY_28 | dict(data="mnist"),
    "fashion_mnist": _GREY_28 | dict(data="fashion_mnist"),
    "cifar10": _PIXELS
    | dict(data="cifar10", model="mar_mini", img_size=32, patch_size=4, vae_embed_dim=3, diffloss_w=192)
    | dict(batch_size=32, diffusion_batch_mul=1, blr=8e-3, epochs=100, warmup_epochs=2, num_images=10000),
    "mar_base": _IMAGENET | dict(model="mar_base", diffloss_d=6, diffloss_w=1024, cfg=2.9),  # published FID 2.31
    "mar_large": _IMAGENET | dict(model="mar_large", diffloss_d=8, diffloss_w=1280, cfg=3.0),  # published FID 1.78
    "mar_huge": _IMAGENET | dict(model="mar_huge", diffloss_d=12, diffloss_w=1536, cfg=3.2),  # published FID 1.55
}


def resolve(given: dict) -> dict:
    """All settings, from the flags given by hand, the preset they name or imply, and the defaults, in this order.

    MAR's commands never pass --data: what they do pass implies the image folder and the published defaults.
    """
    preset = given.get("preset")
    if preset is None:
        published = any(given.get(k) for k in ("data_path", "use_cached", "vae_path"))
        published |= given.get("model", "mar_tiny") != "mar_tiny"
        preset = given.get("data", None if published else "digits")
    elif preset not in PRESETS:
        raise ValueError(f"unknown --preset {preset!r}; valid: {', '.join(PRESETS)}")
    values = {**defaults(*CONFIGS), **_CLI_DEFAULTS, **PRESETS.get(preset, {}), **given}
    values["preset"] = preset if preset in PRESETS else None
    values["data"] = values["data"] or "imagefolder"
    values["tokenizer"] = values["tokenizer"] or "kl16"
    if values["tokenizer"] == "kl16":
        values["vae_path"] = values["vae_path"] or KL16_PATH
    if values["tokenizer"] == "pixel":  # the image itself decides these
        values["vae_stride"] = given.get("vae_stride", 1)
        values["vae_embed_dim"] = given.get("vae_embed_dim", PRESETS.get(values["data"], {}).get("vae_embed_dim", 3))
    else:  # a preset may be for pixels; None: what the tokenizer has, which is not loaded yet
        published = defaults(MARConfig) if values["tokenizer"] == "kl16" else {}
        for key in ("vae_stride", "vae_embed_dim"):
            values[key] = given.get(key, published.get(key))
        values["patch_size"] = given.get("patch_size", 1)
    if values["lr"] is None:
        values["lr"] = values["blr"] * values["batch_size"] * values["accum_iter"] * dist.world_size() / 256
    values["log_dir"] = values["log_dir"] or values["output_dir"]
    if values["min_lr"] > values["lr"]:
        raise ValueError(f"--min_lr {values['min_lr']:g} must be at most the learning rate {values['lr']:g}")
    for name in ("rho", "tau", "cfg"):
        low, high = values[f"{name}_min"], values[f"{name}_max"]
        if low > high:
            raise ValueError(f"--{name}_min {low:g} must be at most --{name}_max {high:g}")
    if values["start_epoch"] >= values["epochs"] and not values["evaluate"]:
        raise ValueError(f"--start_epoch {values['start_epoch']} must be below --epochs {values['epochs']}")
    if values["evaluate"] and not values["resume"]:
        raise ValueError("--evaluate needs --resume DIR, the checkpoint to evaluate")
    if given.get("data_path") and values["data"] == "digits":
        raise ValueError(f"--data_path {values['data_path']} has no meaning for --data digits, which need no folder")
    # what sampling and measuring will need is checked now, not after the first epochs
    args = pick(TrainConfig, values)
    _ = pick(EvalConfig, values).metric_names, args.num_iter_range
    if not args.evaluate:  # that takes the heads of the checkpoint
        heads = args.heads(1)
        pick(SampleConfig, values).rules(heads)
        visits(values, heads)
    if args.freeze_backbone and not args.train_diffloss and not args.learn and not args.evaluate:
        raise ValueError("--freeze_backbone --no-train_diffloss leaves nothing to train; name heads with --learn")
    return values


def visits(values: dict, heads: PolicyHeads | None) -> Visits | None:
    """What makes the training masks of these settings; None for the published ones."""
    masks, sampling = pick(MaskConfig, values), pick(SampleConfig, values)
    if masks.train_masks == "random":
        return None
    options = {f.name: getattr(sampling, f.name) for f in fields(RuleOptions)}
    return Visits(masks, heads, sampling.order, sampling.group, **options)


def mar_config(values: dict) -> MARConfig:
    """The model's configuration: the row of --model with what the flags say about the rest."""
    flags = {k: values[k] for k in defaults(MARConfig)}
    return replace(MAR_CONFIGS[values["model"]], **flags, num_sampling_steps=values["num_sampling_steps"])
