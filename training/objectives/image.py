"""The objective of whole images: learned rules move the Fréchet distance of what they sample (docs/heads.md).

Legend: b images, K = num_iter, N images in the bank, P features of all kinds together. The backbone stays as it is; the
gradient of the reward passes through `sampling.loop.decode` into temperature, guidance and its profile, and order and
group size learn from the reward of what they chose.
"""

import copy
from dataclasses import dataclass, fields, replace

import torch
from torch import nn

from heads.policy import FLAGS, PolicyHeads
from models.coding import render
from models.text import reads_text
from sampling.loop import decode
from training.objectives.decisions import Decisions, ExpectedCost, score_loss
from training.objectives.draws import log_uniform
from training.objectives.head_losses import HeadLossConfig
from training.objectives.reward import Bank, Reward
from training.objectives.settings import ObjectiveSettings, RewardConfig
from training.objectives.visiting import MaskConfig
from training.optim import CosineAdam, TailAverage
from util import dist
from util.evaluation.features import check_differentiable
from util.evaluation.reward import reward_kinds, reward_weights
from util.graphs import release
from util.images.datasets import labels_of
from util.rng import generator, seed_of

EXPLORATION = (0.2, 0.1)  # standard deviation of the noise on the group head's r, at the first and at the last step
PATIENCE = 100  # steps in a row with the reward distance above its start, before training stops


@dataclass(frozen=True)
class Rollout:
    """Images to sample: labels (b,), seeds (b), num_iter; tokenizer: what makes images of their latents.

    sigma: standard deviation of the noise on what the group head says. step: that of the optimizer.
    """

    labels: torch.Tensor
    seeds: list[int]
    num_iter: int
    tokenizer: nn.Module
    sigma: float = EXPLORATION[0]
    step: int = 0

    @property
    def num_targets(self) -> int:
        """Number of images, over which the loss is a mean."""
        return len(self.labels)


class ImageObjective(nn.Module):
    """Minimises the mean influence of sampled images on the reward distance; see `training.objectives`."""

    form = "knots"
    keeps_model = True
    unused = {field.name for field in (*fields(MaskConfig), *fields(HeadLossConfig))} | {"heads_from", "cfg_train_max"}

    def __init__(self, model, heads: PolicyHeads, settings: ObjectiveSettings):
        super().__init__()
        self.model, self.heads, self.settings = model, heads, settings
        self.reward = self.weights = None  # made at the first step
        self.bank = Bank(settings.reward.bank)
        self.starts, self.above = None, 0  # {kind: distance of the first bank}; steps in a row above it
        self.watched = None  # the last of them
        self.directions = None  # of the features in the bank of a checkpoint
        low, high = settings.heads.num_iter_range()
        self.num_iter = (low, high)
        names = {FLAGS[kind]: "learned" for kind in heads.learn} if heads is not None else {}
        self.sampling = replace(settings.sampling, infer_mode="baseline", **names)

    @classmethod
    def build(cls, model, heads: PolicyHeads | None, settings: ObjectiveSettings) -> "ImageObjective":
        """The objective of a run, see `training.objectives`; a model of text raises ValueError."""
        if reads_text(model):
            raise ValueError("--objective image does not fit a model of text: use --objective token")
        return cls(model, heads, settings)

    @staticmethod
    def defaults(chosen: dict) -> dict:
        """Settings of this objective where the flags give none; see `training.objectives`."""
        adaptive = chosen["adaptive"]
        optimisation = dict(batch_size=256, lr=4e-3 if adaptive else 1e-2, lr_schedule="late_cosine", min_lr=0.0)
        optimisation |= dict(warmup_epochs=0, weight_decay=0.0, grad_clip=1.0, dtype="fp32", grad_checkpointing=True)
        frozen = dict(freeze_backbone=True, train_diffloss=False)
        bounds = dict(tau_min=0.4, tau_max=1.6, cfg_min=0.0, cfg_max=8.0)
        num_iter = chosen["num_iter"]  # None: the default of a model whose tokens are not known yet
        steps = dict(train_num_iter=f"{num_iter},{num_iter}" if num_iter else None)
        return optimisation | frozen | bounds | steps | dict(reward=f"{chosen['features']},pixels")

    @staticmethod
    def check(heads: PolicyHeads | None, settings: ObjectiveSettings) -> None:
        """Raise ValueError for settings that contradict each other."""
        if heads is None:
            raise ValueError("--objective image trains heads: name some with --learn")
        sampling = settings.sampling
        if sampling.smooth:
            raise ValueError("--smooth does not fit --objective image, which learns from the ids that are drawn")
        if "order" in heads.learn and (sampling.order_base != "random" or not sampling.order_noise):
            raise ValueError("--objective image --learn order needs --order_base random and --order_noise above 0")
        if "order" in heads.learn and not settings.reward.adaptive:
            raise ValueError("--learn order has no meaning with --no-adaptive: an order differs between tokens")
        if not settings.train.freeze_backbone or settings.train.train_diffloss:
            raise ValueError("--objective image needs --freeze_backbone --no-train_diffloss: it trains heads alone")
        kinds_and_weights(settings.reward)

    def train(self, mode: bool = True):
        """As ever, but the model, which does not learn, stays in eval mode, for passes that are computed again too."""
        super().train(mode)
        self.model.eval()
        return self

    def optimizer(self) -> torch.optim.Optimizer:
        """Adam (0.5, 0.98) with a group for what all images share, along cosines, and one for the adaptive part."""
        reward = self.settings.reward
        curves, adaptive = [], []
        for name, parameter in self.heads.named_parameters():
            shared = name.endswith(".values")
            parameter.requires_grad_(shared or reward.adaptive)
            if parameter.requires_grad:
                (curves if shared else adaptive).append(parameter)
        groups = [
            {"params": curves, "lr_share": 1.0, "cosines": True},
            {"params": adaptive, "lr_share": reward.adaptive_lr},
        ]
        groups = [group for group in groups if group["params"]]
        return CosineAdam(groups, lr=self.settings.train.lr, betas=(0.5, 0.98))

    def average_heads(self) -> TailAverage:
        """The mean of the last 40 % of the iterations."""
        return TailAverage(self.heads, 0.4)

    def memory(self) -> dict:
        """What a checkpoint keeps beside the weights: {} before the first step."""
        if not self.bank.is_full:
            return {}
        kept = {"bank": self.bank.rows, "next": self.bank.next, "starts": self.starts, "above": self.above}
        directions = self.directions if self.reward is None else self.reward.kept_directions()
        return kept | {"rates": self._rates(), "directions": directions}

    def remember(self, memory: dict) -> None:
        """Go on with the memory of a checkpoint; another size of the bank or other kinds raise ValueError."""
        if not memory:
            return
        if len(memory["bank"]) != self.bank.size:
            raise ValueError(f"the checkpoint has a bank of {len(memory['bank'])} images, not of {self.bank.size}")
        kinds, _ = kinds_and_weights(self.settings.reward)
        if tuple(memory["starts"]) != kinds:
            stored = f"the checkpoint has a reward of {','.join(memory['starts'])}, --reward has {','.join(kinds)}"
            raise ValueError(f"{stored}: --init_from starts anew from its weights")
        self.bank.rows, self.bank.next = memory["bank"].clone(), memory["next"]
        self.starts, self.directions = memory["starts"], memory.get("directions")
        # Patience begins anew with another learning rate, which is what the message of its end asks for.
        self.above = memory["above"] if memory.get("rates", self._rates()) == self._rates() else 0

    def _rates(self) -> list[float]:
        return [self.settings.train.lr, self.settings.reward.adaptive_lr]

    @torch.no_grad()
    def prepare(self, state, batch, labels, indices) -> Rollout:
        """What to sample in this step: as many images as were read, with their labels. Fills the bank before the first.

        state: a `training.state.TrainState`; batch, the images read, plays no part.
        """
        seed, step = state.seed, state.step
        if self.reward is None:
            self._begin(state, len(labels))
        uniform = torch.rand((), generator=generator(seed_of("num_iter", seed, step))).item()
        seeds = [seed_of("rollout", seed, step, sample) for sample in indices.tolist()]
        done, (first, last) = state.step / state.num_steps, EXPLORATION
        sigma = first + (last - first) * done
        return Rollout(labels, seeds, log_uniform(uniform, *self.num_iter), state.tokenizer, sigma, step)

    def foresee(self, state, step: int, batch, indices) -> None:
        """Nothing: an image's draws are made while it is sampled."""

    def _begin(self, state, batch_size: int) -> None:
        """Statistics of the real images; a bank of images with the labels of real ones, unless there is one."""
        real = self.settings.real()
        kinds, self.weights = kinds_and_weights(self.settings.reward)
        with dist.main_first():
            self.reward = Reward(real, kinds, state.device, self.directions)
        state.tokenizer.requires_grad_(False)
        if self.bank.is_full:
            self.reward.split(self.bank.rows)  # does it fit?
            return
        labels, seed = torch.tensor(labels_of(real)), seed_of("bank", state.seed)
        labels = labels[torch.randint(len(labels), (self.bank.size,), generator=generator(seed))]
        shares = torch.arange(self.bank.size).tensor_split(dist.world_size())
        rows = []
        for numbers in shares[dist.rank()].split(batch_size):
            seeds = [seed_of("bank", state.seed, number) for number in numbers.tolist()]
            uniform = torch.rand((), generator=generator(seeds[0])).item()
            rollout = Rollout(labels[numbers], seeds, log_uniform(uniform, *self.num_iter), state.tokenizer)
            with dist.autocast(state.device, state.dtype):
                images = self.images(rollout, Decisions(rollout, state.device))
            rows.append(self.reward.features(images.float()))
        self.bank.push(finite(gathered(torch.cat(rows))))
        if not self.bank.is_full:
            lost = self.bank.size - len(self.bank.rows)
            raise FloatingPointError(
                f"{lost} of the first {self.bank.size} images are not finite: use --dtype fp32, or a smaller --cfg"
            )
        release(self.model)  # captures that no step of training uses
        self.starts = {kind: distance for kind, (distance, _) in self.reward.against(self.bank.rows).items()}

    def images(self, rollout: Rollout, decisions: Decisions, callback=None, expected=None) -> torch.Tensor:
        """Images (b, C, H, W) in [−1, 1] of a rollout, differentiable in the heads where gradients are on.

        Of ids they are differentiable in the codes, if an `ExpectedCost` is given.
        """
        sampling, grad = self.sampling, torch.is_grad_enabled()
        heads = copy.copy(self.heads)  # the same networks
        heads.explored = decisions.explored
        heads.adaptive = centred
        latents = decode(
            self.model,
            rollout.labels,
            sampling.rules(heads),
            num_iter=rollout.num_iter,
            num_steps=sampling.num_sampling_steps,
            seeds=rollout.seeds,
            callback=callback,
            clip=rollout.tokenizer.clip,
            tokenizer=rollout.tokenizer,
            refresh_every=sampling.refresh_every,
            **sampling.token_head_options(),
            recompute=grad and self.model.config.grad_checkpointing,
            local=self.local,
        )
        draw = render if expected is None else expected.render
        return draw(rollout.tokenizer, latents).clamp(-1, 1)

    def forward(self, rollout: Rollout, num_targets) -> dict[str, torch.Tensor]:
        """The summed influence of the images of a rollout over num_targets, and what is logged of them."""
        chosen, said = [], {"tau": [], "w": []} | ({"group": []} if "group" in self.heads.learn else {})
        decisions = Decisions(rollout, next(self.model.parameters()).device)
        expected = ExpectedCost() if self.local and self.model.token_head.discrete else None

        def listen(step, rows, plan, tokens):
            decisions.chosen(rows, plan)
            if expected is not None:
                expected.drawn(rows, plan)
            chosen.append(plan.select.flatten())
            for name, values in (("tau", plan.tau), ("w", plan.cfg)):
                said[name].append(values.detach().flatten())
            if "group" in said:
                said["group"].append(plan.select.sum(dim=1).float())

        images = self.images(rollout, decisions, listen, expected)
        with torch.autocast(images.device.type, enabled=False):
            features = self.reward.features(images.float())
            self.bank.push(finite(gathered(features.detach())))  # of one that is not, the gradient is not: no step
            against = self.reward.against(self.bank.rows)
            parts = self.reward.split(features)
            cost = sum(self.scale(kind) * against[kind][1](parts[kind]) for kind in parts)  # (b,)
        said |= {"order": decisions.logits} if decisions.logits else {}
        said = {name: torch.cat(values) for name, values in said.items()}
        if "group" in said:
            said["group"] = said["group"][said["group"] > 0]  # not of images that are done
        if "order" in said:
            said["order"] = said["order"][~said["order"].isnan()]
        chosen = torch.cat(chosen)  # looked up once: each time waits for the device
        said |= {name: said[name][chosen] for name in ("tau", "w")}
        distances = self._distances(against)
        if rollout.step != self.watched:  # not again for each micro-batch
            self.watched = rollout.step
            self._watch(distances["reward"])
        logged = distances | _spread(said)
        if "profile" in self.heads.learn:
            logged |= _spread({"profile": 1 + torch.tanh(self.heads.heads["profile"].values.detach())})
        share = len(rollout.labels) / num_targets  # so that the micro-batches of a step add up to their mean
        logged = {name: _filled(value, images.device) * share for name, value in logged.items()}
        unused = sum(p.sum() for p in self.heads.parameters() if p.requires_grad)  # DistributedDataParallel waits
        pathwise = cost.sum() if expected is None else expected.loss(cost)
        loss = (pathwise + score_loss(cost, decisions.log_prob)) / num_targets
        return {"loss": loss + 0.0 * unused, **logged}

    @property
    def local(self) -> bool:
        """Does a step learn from its own tokens alone?"""
        chosen = self.settings.reward.pathwise
        return chosen == "local" or chosen is None and self.model.token_head.discrete

    def scale(self, kind: str) -> float:
        """Weight of a kind's distance: its share of all weights over the distance that it starts from."""
        return self.weights[kind] / sum(self.weights.values()) / self.starts[kind]

    def _distances(self, against) -> dict[str, float]:
        """The distances of the bank, and their weighted mean, 1 at the start, which is watched."""
        distances = {f"distance_{kind}": distance for kind, (distance, _) in against.items()}
        relative = sum(self.scale(kind) * distance for kind, (distance, _) in against.items())
        return distances | {"reward": relative}

    def _watch(self, relative: float) -> None:
        """Count the steps with a reward distance above its start; many in a row raise FloatingPointError."""
        self.above = self.above + 1 if relative > 1 else 0
        if self.above >= PATIENCE:
            raise FloatingPointError(
                f"the reward distance has been above its start for {PATIENCE} steps in a row, now {relative:.2f} times "
                "it: lower --lr or --adaptive_lr, or raise --batch_size"
            )


def centred(name: str, state, a: torch.Tensor) -> torch.Tensor:
    """a (B, 1) or (B, L) as it is, and its gradient less the mean over the masked tokens of all B images.

    What all images share is for v(u) to learn: the adaptive part, whose many weights would move it in large steps, gets
    the gradient of the differences. An order head has no v. The mean is over a process's own micro-batch: images that
    finish early leave it, so that processes may not all take part in a step, and none waits for another.
    """
    if name != "order" and a.requires_grad:
        weight = state.mask.to(a.dtype) if a.shape[1] > 1 else torch.ones_like(a)
        a.register_hook(lambda g: g - weight * (g.sum() / weight.sum().clamp(min=1)))
    return a


def _filled(value, device) -> torch.Tensor:
    """A number as a tensor (), made on the device since a copy would wait for it; a tensor as it is."""
    return value if isinstance(value, torch.Tensor) else torch.full((), value, device=device)


def _spread(values: dict) -> dict:
    """Mean and standard deviation of each tensor."""
    means = {f"{name}_mean": value.mean() for name, value in values.items()}
    return means | {f"{name}_std": value.std(correction=0) for name, value in values.items()}


def kinds_and_weights(config: RewardConfig) -> tuple[tuple[str, ...], dict[str, float]]:
    """The kinds of features of the reward, and {kind: weight}; kinds without a gradient raise ValueError."""
    kinds = reward_kinds(config.reward or "")
    for kind in kinds:
        if kind != "pixels":
            check_differentiable(kind)
    return kinds, reward_weights(config.reward_weights, kinds)


def finite(features: torch.Tensor) -> torch.Tensor:
    """The rows (n, P) of features without NaN and infinities."""
    return features[features.isfinite().all(dim=1)]


def gathered(features: torch.Tensor) -> torch.Tensor:
    """Features (n, P) of all processes one after the other; n may differ by one between them."""
    size = dist.world_size()
    if size == 1:
        return features
    counts = torch.zeros(size, dtype=torch.long, device=features.device)
    counts[dist.rank()] = len(features)
    counts = dist.all_sum(counts).tolist()
    whole = features.new_zeros(sum(counts), features.shape[1])
    first = sum(counts[: dist.rank()])
    whole[first : first + len(features)] = features
    return dist.all_sum(whole)
