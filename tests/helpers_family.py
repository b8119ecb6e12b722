"""A family that shares no name with MAR but those of the interfaces: one file, and one row, `ROW`.

z of a token is an MLP of label, place and the mean of the known tokens. Its token head says that a token
is a linear function of z with normal noise, times τ.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from models import families
from models.families import Family
from models.token_head import check_no_filter, check_no_profile, guide
from util.args import flag
from util.rng import draw_by_image


@dataclass(frozen=True)
class MeanConfig:
    img_size: int = flag(8, "pixels of a side", low=1)
    vae_stride: int = 1
    vae_embed_dim: int = 1
    class_num: int = 1000
    label_drop_prob: float = flag(0.2, "probability of training without the label", low=0, high=1)
    diffusion_batch_mul: int = flag(5, "a name of MAR's", low=1)
    mask_ratio_min: float = 0.5
    grad_checkpointing: bool = False
    hidden: int = 16
    noise: float = flag(0.1, "deviation of a token under tau 1", low=0)

    FREE: ClassVar = frozenset({"label_drop_prob"})

    @property
    def grid(self):
        return self.img_size // self.vae_stride

    @property
    def seq_len(self):
        return self.grid**2


class Normal(NamedTuple):
    mean: torch.Tensor
    drawn: torch.Tensor


class NormalHead(nn.Module):
    has_steps, discrete = False, False

    def __init__(self, width, channels, noise):
        super().__init__()
        self.noise = noise
        self.mean = nn.Linear(width, channels)

    def empty(self, batch, length):
        return torch.zeros(batch, length, self.mean.out_features, device=self.mean.weight.device)

    def draws(self, generator, num_tokens):
        return {"noise": torch.randn(1, num_tokens, self.mean.out_features, generator=generator)}

    def predict(self, target, z, draws, tau=None):
        scale = self.noise * (1.0 if tau is None else tau.reshape(-1, 1))
        return Normal(self.mean(z), target + scale * draws["noise"])

    def losses(self, prediction, target, draws):
        return {"square": (prediction.mean - prediction.drawn).square().mean(dim=1)}

    def fit(self, prediction, target, draws):
        return (prediction.mean - prediction.drawn).square().mean(dim=1)

    def measures(self, prediction, target):
        return {}

    def comparable(self, loss, draws):
        return loss

    def guided(self, cond, uncond, w):
        return cond._replace(mean=guide(cond.mean, uncond.mean, w.reshape(-1, 1)))

    def sampler(self, *, num_steps=1, solver="ddpm", spacing=None, clip=None, top_k=0, top_p=1.0):
        check_no_filter(top_k, top_p)
        return NormalSampler(self)


class NormalSampler:
    num_steps = (1, 1)

    def __init__(self, head):
        self.head = head

    def evals(self, num_steps, tokens, guided, profile=None):
        return tokens + guided

    def noise(self, generators, rows, num_steps):
        return draw_by_image(generators, rows, lambda k: (k, self.head.mean.out_features), dim=0)

    def draw(self, z, z_uncond, cfg, tau, noise, num_steps, guided=None, profile=None):
        check_no_profile(profile)
        mean = self.head.mean(z).float()  # under autocast it has 16 bits
        if z_uncond is not None:
            guided = torch.arange(len(z), device=z.device) if guided is None else guided
            free = self.head.mean(z_uncond).float()
            mean = mean.index_copy(0, guided, guide(mean[guided], free, cfg[guided].unsqueeze(1)))
        return mean + self.head.noise * tau.reshape(-1, 1) * noise


class MeanModel(nn.Module):
    fixed_rules, per_class = {"order": "raster"}, ("label.weight",)

    def __init__(self, config):
        super().__init__()
        self.config, self.width, self.head_dim = config, config.hidden, config.hidden
        self.label, self.place = nn.Embedding(config.class_num, self.width), nn.Embedding(config.seq_len, self.width)
        self.known, self.mix = nn.Linear(config.vae_embed_dim, self.width), nn.Linear(self.width, self.width)
        self.token_head = NormalHead(self.width, config.vae_embed_dim, config.noise)
        self.blocks = (self.mix, self.token_head)

    def patchify(self, latents):
        return latents.flatten(2).transpose(1, 2)

    def unpatchify(self, tokens):
        return tokens.transpose(1, 2).unflatten(2, (self.config.grid, -1))

    def encode_decode(self, tokens, mask, labels, num_visible, orders=None):
        known = (~mask).unsqueeze(-1)
        mean = (tokens * known).sum(dim=1) / known.sum(dim=1).clamp(min=1)
        label = 0.0 if labels is None else self.label(labels.clamp(min=0)) * (labels >= 0).unsqueeze(1)
        z = (self.known(mean) + label).unsqueeze(1) + self.place.weight
        return self.mix(F.gelu(z))

    def compile_parts(self):
        raise ValueError("nothing to compile")

    def conditions(self, labels, *, orders=None, tokenizer=None, refresh_every=1, recompute=False):
        return MeanConditions(self, labels)


class MeanConditions:
    def __init__(self, model, labels):
        self.model, self.labels, self.passes = model, labels, 0.0

    def look(self, step, tokens, unknown, images):
        self.passes += len(images)
        mask = unknown[images].to(tokens.device)
        return self.model.encode_decode(tokens[images], mask, self.labels[images], None), None

    def at(self, step, tokens, unknown, rows, guided):
        mask = unknown.to(tokens.device)
        z = [
            self.model.encode_decode(tokens, mask, labels, None)[some[:, 0], some[:, 1]]
            for labels, some in ((self.labels, rows), (None, rows[guided]))
        ]
        return z[0], z[1] if len(guided) else None

    def write(self, step, rows, drawn):
        pass


SIZES = {"mean_small": MeanConfig(hidden=12, noise=0.2), "mean_large": MeanConfig(hidden=24, noise=0.3)}
ROW = Family(MeanModel, MeanConfig, SIZES, ("continuous",))


def add_family(patch) -> None:
    """The row and the sizes of this family, in the tables until pytest's MonkeyPatch `patch` takes them out again."""
    patch.setitem(families.FAMILIES, "mean", ROW)
    for size in SIZES:
        patch.setitem(families.SIZES, size, "mean")
