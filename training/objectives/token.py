"""The published objective: the token head's loss on masked tokens and, with learned heads, theirs (docs/heads.md).

Legend: b images, L tokens an image, N token rows in all, m draws of the token head for each, D width of z, n tokens
unknown now, K = num_iter. `mask` (b, L) bool is True where a token is masked.
"""

import math
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from heads.policy import PolicyHeads, base_scores, column, hand_made, moved_rule
from heads.rules import whole_group
from heads.schedules import A_STEP, RuleOptions, check_num_iter
from models.families import takes_any_size
from models.text import Text, condition_of, is_known, reads_text
from training.objectives.draws import Draws, DrawSettings, RowsOf, training_draws
from training.objectives.head_losses import HeadLossConfig, budget_loss, guidance_loss, order_and_size_losses
from training.objectives.settings import ObjectiveSettings, RewardConfig
from training.objectives.states import needs_every_loss, training_state
from training.objectives.tokens import grid_of_batch, posterior_shape, tokens_of
from training.objectives.visiting import Visits, make_visits
from training.optim import EMA, make_optimizer
from training.schedules import stage_weights
from util.dist import autocast, send

if TYPE_CHECKING:  # training.config imports the table of objectives
    from training.config import TrainConfig


class HeadPlan:
    """What the heads say about a batch of training masks, and the losses that follow from it.

    tau and w are (b, 1) or (b, L), None where not learned; tau has its gradient for the token head's loss to reach.
    options: order_noise and order_base are those of sampling.
    """

    def __init__(self, heads: PolicyHeads, config: HeadLossConfig, options: RuleOptions, draws: Draws, z):
        self.heads, self.config, self.options, self.rows = heads, config, options, draws.tokens.rows
        self.state = training_state(draws.policy, draws.mask, z, draws.num_visible)
        self.scale = draws.policy.cfg  # (b,), the guidance scale of the image's schedule
        self.base_k = whole_group(self._base("group"), self.state)
        self.k = heads.group_size(self.state, self.base_k, self.scale) if "group" in heads.learn else self.base_k
        self.tau = self.w = None
        if "tau" in heads.learn:
            base = column(self._base("tau", temperature=1.0)(self.state), self.state)
            self.tau = heads.temperature(self.state, base, self.scale)
        if "cfg" in heads.learn:
            after = self.state.num_unknown - self.k.detach().round()
            base = column(self._base("cfg", cfg=self.scale.unsqueeze(1))(self.state, after), self.state)
            self.w = heads.guidance(self.state, base, self.scale)

    def _base(self, kind: str, **numbers):
        """The hand-made rule that the learned one of this kind moves."""
        moved = moved_rule(kind, self.options)
        return hand_made(kind, moved, replace(self.options, **numbers))

    def losses(self, difficulty) -> dict[str, torch.Tensor]:
        """The losses order, size, budget of the heads that are learned; difficulty (N,) of the rows, detached."""
        losses = {}
        mask = self.state.mask
        if needs_every_loss(self.heads):
            difficulty = difficulty.new_zeros(mask.numel()).index_copy(0, self.rows, difficulty).view(mask.shape)
            # where the base looks at what is drawn, the token itself stands for it
            scores = base_scores(self.state, self.options, log_prob=-difficulty)
            if "order" in self.heads.learn:
                scores = scores + self.heads.logits(self.state, self.scale)
            losses["order"], size = order_and_size_losses(scores, self.k, mask, difficulty, self.config)
            if "order" in self.heads.learn:
                losses["size"] = size
        if "group" in self.heads.learn:
            losses["budget"] = budget_loss(self.k, self.base_k)
        return losses

    def statistics(self) -> dict[str, torch.Tensor]:
        """Mean and spread of ρ, τ and w, and of k / k_cosine, of the heads that are learned."""
        outputs = {"tau": self.tau, "w": self.w}
        if "group" in self.heads.learn:
            outputs["rho"] = self.k / self.state.num_unknown
            outputs["k_over_cosine"] = self.k / self.base_k
        statistics = {}
        for name, value in outputs.items():
            if value is not None:
                statistics[f"{name}_mean"] = value.detach().mean()
                statistics[f"{name}_std"] = value.detach().std(correction=0)
        return statistics


@dataclass(frozen=True)
class Batch:
    """A prepared micro-batch: tokens (b, L, …), labels (b,) with −1 where dropped, and the draws, all on the device.

    Of a model of text the labels are a `models.text.Text`.
    """

    tokens: torch.Tensor
    labels: torch.Tensor | Text
    draws: Draws
    inputs: torch.Tensor | None = None  # what the model reads of the tokens, where it is not the tokens
    weights: torch.Tensor | None = None  # (L,) of the tokens' losses; None: 1
    tail: int = 0  # so many tokens at the end are the last scale, which is reported apart
    shape: dict = field(default_factory=dict)  # {grid: (h, w)} of images of any size, for `Backbone.encode_decode`

    @property
    def seen(self) -> torch.Tensor:
        """What the model reads of the tokens."""
        return self.tokens if self.inputs is None else self.inputs

    @property
    def num_targets(self) -> int:
        """Over how many tokens its loss is a mean."""
        return self.draws.tokens.num_targets


@dataclass(frozen=True)
class Preparation:
    """What `TokenObjective.prepare` makes batches with.

    flip: may images be mirrored? visits: makes the masks; None for the published ones. heads_from: the epoch from which
    heads decide; before it, hand-made rules do. patch_nums: of a model that draws scales, else None.
    """

    seed: int
    draws: DrawSettings
    flip: bool = False
    visits: Visits | None = None
    heads_from: float = 0.0
    patch_nums: tuple[int, ...] | None = None


class TokenObjective(nn.Module):
    """What DistributedDataParallel wraps: one forward pass that returns every loss, the heads' included.

    model: a `models.families.Backbone`; losses: weights of the heads' losses; options: the rules' numbers in sampling;
    preparation: None where only `forward` is used.
    """

    form = "bounded"
    keeps_model = False
    unused = {each.name for each in fields(RewardConfig)}

    def __init__(
        self,
        model,
        heads: PolicyHeads | None = None,
        losses: HeadLossConfig | None = None,
        options: RuleOptions | None = None,
        preparation: Preparation | None = None,
        train: "TrainConfig | None" = None,
    ):
        super().__init__()
        self.model = model
        self.heads = heads
        self.losses = losses or HeadLossConfig()
        self.options = options or RuleOptions()
        self.preparation = preparation
        self.settings = train

    @classmethod
    def build(cls, model, heads: PolicyHeads | None, settings: ObjectiveSettings) -> "TokenObjective":
        """The objective of a run, see `training.objectives`; heads that it cannot train raise ValueError."""
        if model.fixed_rules.get("group") in A_STEP:
            check_fixed_groups(model, heads, settings)
        if heads is not None and "tau" in heads.learn and model.token_head.discrete:
            raise ValueError(
                "--learn tau: --objective token learns it by the noise of a diffusion loss; for ids (--loss ce) use "
                "--objective image, or leave tau out"
            )
        train, sizes = settings.train, model.config
        loss_tokens = getattr(sizes, "loss_tokens", "masked")
        visits = make_visits(settings.masks, settings.sampling, heads, loss_tokens)
        draws = DrawSettings(
            seq_len=sizes.seq_len,
            mask_ratio_min=sizes.mask_ratio_min,
            label_drop_prob=sizes.label_drop_prob,
            mask_ratio_per_image=train.mask_ratio_per_image,
            num_iter=None if heads is None and visits is None else settings.heads.num_iter_range(),
            cfg_max=settings.heads.cfg_train_max,
            every_token=visits is not None,
            mask_schedule=getattr(sizes, "mask_schedule", None),
            loss_tokens=loss_tokens,
        )
        if train.pg and model.fixed_rules.get("group") != "scale":
            raise ValueError(f"--pg {train.pg:g} has no meaning for this model, whose tokens are of one scale")
        patch_nums = sizes.patch_nums if model.fixed_rules.get("group") == "scale" else None
        if train.pg and train.pg0 >= len(patch_nums) - 1:
            raise ValueError(
                f"--pg0 {train.pg0} must be below {len(patch_nums) - 1}, the last of {len(patch_nums)} scales"
            )
        preparation = Preparation(train.seed, draws, settings.flip, visits, settings.heads.heads_from, patch_nums)
        return cls(model, heads, settings.losses, settings.sampling, preparation, train)

    @staticmethod
    def defaults(chosen: dict) -> dict:
        """No settings of its own: those of the flags are for this objective."""
        return {}

    @staticmethod
    def check(heads: PolicyHeads | None, settings: ObjectiveSettings) -> None:
        """Raise ValueError for masks that the rules cannot make."""
        make_visits(settings.masks, settings.sampling, heads)
        if settings.masks.train_masks == "random":
            return
        try:
            check_num_iter(settings.sampling.group, settings.heads.num_iter_range()[0])
        except ValueError as error:
            raise ValueError(f"--train_num_iter {settings.heads.train_num_iter}: {error}") from None

    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW as published."""
        train, no_decay = self.settings, getattr(self.model, "no_decay", None)
        return make_optimizer(self, self.model.token_head, train.lr, train.weight_decay, no_decay, train.beta2)

    def average_heads(self) -> EMA:
        """An exponential moving average, as of the model's weights."""
        return EMA(self.heads, self.settings.ema_rate)

    def memory(self) -> dict:
        """Nothing."""
        return {}

    def remember(self, memory: dict) -> None:
        """Nothing to remember."""

    def train(self, mode: bool = True):
        """As ever, but what is wholly frozen stays in eval mode: its dropout would only be noise."""
        super().train(mode)
        for part in self.model.children():
            if mode and not any(p.requires_grad for p in part.parameters()):
                part.eval()
        return self

    @torch.no_grad()
    def prepare(self, state, batch, labels, indices) -> Batch:
        """Images or moments (b, …) with labels and indices (b,) as a Batch; state: a `training.state.TrainState`."""
        preparation, samples = self.preparation, indices.tolist()
        shape = dict(grid=grid_of_batch(batch, state.tokenizer)) if takes_any_size(self.model.config) else {}
        draws = state.ahead.value(*self._draws(state, state.step, batch, samples))
        if draws.policy is not None:
            resting = state.step < preparation.heads_from * state.steps_per_epoch
            draws = replace(draws, policy=replace(draws.policy, heads_rest=resting))
        flips = send(draws.flip, state.device) if preparation.flip else None
        if state.captions is not None:
            labels = state.captions.draw(samples, preparation.seed, state.step)
        images = batch.to(state.device, non_blocking=True)
        noise = None if draws.posterior is None else send(draws.posterior, state.device)
        tokens = tokens_of(images, flips, noise, state.tokenizer, self.model)
        draws = replace(draws, posterior=None)
        inputs = state.tokenizer.inputs_of(tokens)
        labels = torch.where(draws.drop, -1, labels)
        if preparation.visits is not None:
            self.eval()  # no dropout in the scores
            with autocast(state.device, state.dtype):
                score = partial(self._score, tokens, labels, **shape)
                draws = preparation.visits(draws, score, state.device, state.step / state.steps_per_epoch)
            self.train()
        condition = condition_of(self.model, labels, state.device)
        return self._staged(Batch(tokens, condition, draws.to(state.device), inputs, shape=shape), state)

    def foresee(self, state, step: int, batch, indices) -> None:
        """Begin with the draws of a later step's images (b, …) with indices (b,)."""
        state.ahead.begin(*self._draws(state, step, batch, indices.tolist()))

    def _draws(self, state, step: int, batch, samples: list[int]):
        """(a key, a function that makes the draws of these images in this step)."""
        posterior = posterior_shape(batch, state.tokenizer, self.model)
        settings = replace(self.preparation.draws, posterior=posterior)
        if takes_any_size(self.model.config):
            settings = replace(settings, seq_len=math.prod(grid_of_batch(batch, state.tokenizer)))
        arguments = self.preparation.seed, step, samples, self.model.token_head, settings
        return (step, *samples), lambda: training_draws(*arguments).for_device(state.device)

    def _staged(self, batch: Batch, state) -> Batch:
        """The batch, of a progressive run with the scales that it has reached."""
        sides = self.preparation.patch_nums
        if sides is None:
            return batch
        stage, weight = len(sides) - 1, 1.0
        if self.settings.pg:
            stage, weight = self.settings.stage(state.step, state.num_steps, state.steps_per_epoch, len(sides))
        batch = replace(batch, tail=sides[stage] ** 2)
        if stage == len(sides) - 1:
            return batch
        weights = stage_weights(sides, stage, weight).to(state.device)
        num = len(weights)
        inputs = batch.inputs[:, : num - sides[0] ** 2]
        return replace(
            batch, tokens=batch.tokens[:, :num], draws=batch.draws.first(num), inputs=inputs, weights=weights
        )

    def _score(self, tokens, labels, mask, num_visible, **shape):
        """z for labels on the host; where nothing is visible yet, once for each class, not for each image."""
        if any(num_visible) or reads_text(self.model):
            condition = condition_of(self.model, labels, mask.device)
            return self.model.encode_decode(tokens, mask, condition, num_visible, **shape)
        classes, which = (send(x, mask.device) for x in labels.unique(return_inverse=True))
        one = slice(len(classes))
        return self.model.encode_decode(tokens[one], mask[one], classes, num_visible[one], **shape)[which]

    def forward(self, batch: Batch, num_targets) -> dict[str, torch.Tensor]:
        """Sums over the target tokens of the batch divided by num_targets, the number they are a mean over.

        Only the rows that the draws name go through the token head, those that are no targets without gradient. Keys:
        loss (the one to minimise), the token head's terms and measures, with heads their losses and the mean and spread
        of what they say.
        """
        draws, head = batch.draws, self.model.token_head
        z = self.model.encode_decode(
            batch.seen, draws.mask, batch.labels, draws.num_visible, draws.orders, **batch.shape
        )
        plan = None
        if self.heads is not None and not draws.policy.heads_rest:
            plan = HeadPlan(self.heads, self.losses, self.options, draws, z)
        rows = RowsOf(draws)
        tau = rows.spread(plan.tau) if plan and plan.tau is not None else None
        target = rows(batch.tokens)
        prediction = self._predict(target, rows(z), rows.draws, tau, rows)
        losses = head.losses(prediction, target, rows.draws)  # each (m·N,)
        reported = rows.reported(losses, head.measures(prediction, target), batch.tail, num_targets)
        if batch.weights is not None:
            weights = rows.spread(batch.weights.unsqueeze(0))
            losses = {name: loss * weights for name, loss in losses.items()}
        terms = {name: rows.mean(loss, num_targets) for name, loss in losses.items()}
        loss = sum(terms.values())
        if plan:
            difficulty = head.comparable(sum(losses.values()).detach(), rows.draws)
            learned = plan.losses(difficulty.reshape(rows.repeats, -1).mean(dim=0))
            if plan.w is not None:
                learned["cfg"] = self._guidance_loss(plan.w, batch, prediction, target, tau, rows)
            share = batch.num_targets / num_targets  # so that the micro-batches of a step add up to their mean
            learned, said = ({k: v * share for k, v in x.items()} for x in (learned, plan.statistics()))
            loss = loss + sum(getattr(self.losses, f"lambda_{name}") * value for name, value in learned.items())
            terms |= learned | said
        elif self.heads is not None:  # DistributedDataParallel waits for a gradient of every parameter
            loss = loss + 0.0 * sum(p.sum() for p in self.heads.parameters())
        terms |= reported
        return {"loss": loss, **{name: value.detach() for name, value in terms.items()}}

    def _predict(self, target, z, draws, tau, rows):
        """The prediction of all rows (m·N, …); of the targets with gradient, of the others without."""
        parts = rows.with_and_without_gradient()
        if not len(parts[1]):
            return self.model.token_head.predict(target, z, draws, tau)
        predictions = []
        for part, learned in zip(parts, (True, False)):
            with torch.set_grad_enabled(learned and torch.is_grad_enabled()):
                some = {name: value[part] for name, value in draws.items()}
                some_tau = tau if tau is None else tau[part]
                predictions.append(self.model.token_head.predict(target[part], z[part], some, some_tau))
        place = torch.cat(parts).argsort()
        return type(predictions[0])(*(torch.cat(values)[place] for values in zip(*predictions)))

    def _guidance_loss(self, w, batch: Batch, prediction, target, tau, rows):
        """Misfit of the predictions guided by the scales w (b, 1) or (b, L): its gradient reaches w only."""
        draws, head = batch.draws, self.model.token_head
        with torch.no_grad():  # the one extra pass, and only where guidance is learned
            z = self.model.encode_decode(batch.seen, draws.mask, None, draws.num_visible, draws.orders, **batch.shape)
            uncond = head.predict(target, rows(z), rows.draws, tau)
        cond = type(prediction)(*(value.detach() for value in prediction))
        fit = head.fit(head.guided(cond, uncond, rows.spread(w)), target, rows.draws)
        return guidance_loss(fit, rows.spread(is_known(batch.labels).unsqueeze(1) & draws.mask))


def check_fixed_groups(model, heads: PolicyHeads | None, settings: ObjectiveSettings) -> None:
    """Raise ValueError for what is learned on masks, which a model with groups of its own has no use for."""
    drawn = A_STEP[model.fixed_rules["group"]]
    if heads is not None:
        raise ValueError(
            f"--learn {','.join(heads.learn)}: --objective token learns heads on masks, and this model draws {drawn}: "
            "use --objective image"
        )
    if settings.masks.train_masks != "random":
        raise ValueError(
            f"--train_masks {settings.masks.train_masks} must be random: this model draws {drawn}, and learns "
            "all tokens of an image in one pass"
        )
