"""Training masks that a schedule visits: the visible sets that rules, hand-made or learned, make (docs/heads.md).

Legend: b images, L tokens an image, K = num_iter of an image. `mask` (b, L) bool is True where a token is masked.
draws is a `training.objectives.draws.Draws` made for every token, with policy draws.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch

from heads.orders import AFTER_DRAW
from heads.policy import PolicyHeads, build_rules, moved_rule
from heads.rules import hard_topk, whole_group
from heads.schedules import RuleOptions
from sampling.settings import SampleConfig
from training.objectives.states import needs_every_loss, training_state
from util.args import flag
from util.dist import send

MASKS = ("random", "visited", "policy", "mix")
TARGETS = ("masked", "next")


@dataclass(frozen=True)
class MaskConfig:
    """Where training masks come from, and which of the masked tokens are targets of the loss."""

    train_masks: str = flag("random", "masks: published, met by hand-made or by current rules, or mixed", choices=MASKS)
    train_targets: str = flag("masked", "what is learned: all masked tokens, or the next group", choices=TARGETS)
    mix_random: float = flag(0.5, "share of random masks with --train_masks mix", low=0, high=1)
    mix_anneal: float = flag(0.0, "epochs over which random masks fade into those of --train_masks", low=0)
    policy_passes: int = flag(1, "scoring passes of --train_masks policy and mix with learned rules", low=1)

    def __post_init__(self):
        if self.train_targets == "next" and self.train_masks == "random":
            raise ValueError(
                "--train_targets next needs --train_masks visited, policy or mix: random ones have no next"
            )
        if self.mix_anneal and self.train_masks == "random":
            raise ValueError("--mix_anneal needs --train_masks visited, policy or mix: masks to fade into")

    def random_share(self, epoch: float) -> float:
        """Share of the images with random masks: falls in a line from 1, over the first mix_anneal epochs."""
        last = self.mix_random if self.train_masks == "mix" else 0.0
        return max(last, 1 - (1 - last) * epoch / self.mix_anneal) if self.mix_anneal else last

    def rule_names(
        self, order: str | None, group: str | None, heads: PolicyHeads | None, options: RuleOptions
    ) -> dict[str, str]:
        """The rules whose states are visited: those named, else learned ones where these masks have them."""
        names = {}
        for kind, name, base in (("order", order, "random"), ("group", group, moved_rule("group", options))):
            if self.train_masks == "visited" and name == "learned":
                raise ValueError(f"--train_masks visited follows hand-made rules; with --{kind} learned use policy")
            if name in AFTER_DRAW:
                raise ValueError(
                    f"--order {name} looks at tokens that the model draws, training masks cannot: use --train_masks "
                    "random, or another order"
                )
            has_head = self.train_masks != "visited" and heads is not None and kind in heads.learn
            names[kind] = name or ("learned" if has_head else base)
        return names


class Visits:
    """Replaces the random masks of training draws by those that rules meet.

    config: which masks. order, group, options: the rules and their numbers, as for `heads.policy.build_rules`. An image
    at step s of its K (s uniform) has had s groups revealed. Hand-made rules need no network. Learned ones need z: each
    of the policy_passes no-gradient passes of a batch serves an equal share of the image's s + 1 plans. With s + 1
    passes the plans are those of sampling; with one, all of them use z of the empty canvas.
    """

    def __init__(self, config: MaskConfig, heads: PolicyHeads | None, order: str | None, group: str | None, **options):
        self.config, self.heads, self.options = config, heads, options
        self.names = config.rule_names(order, group, heads, RuleOptions(**options))
        if self.names["order"] == "learned" and options.get("order_base") in AFTER_DRAW:
            raise ValueError(
                f"--order_base {options['order_base']} looks at tokens that the model draws, training masks cannot: "
                "use --train_masks random, or another order_base"
            )
        self.num_passes = config.policy_passes if "learned" in self.names.values() else 0

    def __call__(self, draws, encode: Callable, device="cpu", epoch: float = math.inf):
        """The draws (on the CPU) on the masks that are met; encode(mask (b, L), num_visible) -> z (b, L, D) on device.

        epoch: how many have been trained, which decides how many images keep their random masks.

        Where learned rules are scored, each plan waits for the device once.
        """
        options = self.options | {"cfg": draws.policy.cfg.unsqueeze(1)}
        heads, names, num_passes = self.heads, self.names, self.num_passes
        if draws.policy.heads_rest:  # the rules that untrained heads reproduce
            bases = {
                "order": options.get("order_base", "random"),
                "group": moved_rule("group", RuleOptions(**options)),
            }
            heads, num_passes = None, 0
            names = {kind: bases[kind] if name == "learned" else name for kind, name in names.items()}
        rules = build_rules("baseline", heads, **names, **options)
        device = device if num_passes else torch.device("cpu")
        policy = replace(draws.policy, gumbel=send(draws.policy.gumbel, device))
        goal = (draws.policy.place * draws.policy.num_iter).long()  # (b,), s
        plan, mask, following, z = torch.zeros_like(goal), torch.ones_like(draws.mask), None, None
        for number in range(max(num_passes, 1)):
            if num_passes:
                z = encode(send(mask, device), (~mask).sum(dim=1).tolist())
            # this pass serves the plans below `until`; the last plan, at the goal, says what comes next
            until = (number + 1) * (goal + 1) // max(num_passes, 1)
            while (active := (plan < until) & (plan <= goal)).any():
                step = plan.minimum(policy.num_iter - 1)  # an image that is done has had its last
                selected = self._select(rules, replace(policy, step=step), send(mask, device), z)
                following = torch.where(active.unsqueeze(1), selected, mask if following is None else following)
                goes_on = active & (plan < goal) & (mask & ~selected).any(dim=1)  # never to an image without a target
                goal = torch.where(active & ~goes_on, plan, goal)
                mask = mask & ~(selected & goes_on.unsqueeze(1))
                plan = plan + active.long()
        return self._narrowed(draws, mask, following, goal, self.config.random_share(epoch))

    def _select(self, rules, policy, mask, z):
        """The group (b, L) bool, on the CPU, that the rules take at the step of these draws."""
        state = training_state(policy, mask, z)
        return hard_topk(rules.order(state), whole_group(rules.group, state), state.mask).cpu()

    def _narrowed(self, draws, mask, following, step, random_share):
        targets = mask if self.config.train_targets == "masked" else following
        if random_share > 0:
            keep = draws.policy.mix < random_share
            mask, targets = (torch.where(keep.unsqueeze(1), draws.mask, new) for new in (mask, targets))
            step = torch.where(keep, training_state(replace(draws.policy, step=None), draws.mask).step, step)
        compared = needs_every_loss(self.heads) and not draws.policy.heads_rest
        return draws.with_mask(mask, step, targets, others=mask if compared else None)


def make_visits(
    masks: MaskConfig, sampling: SampleConfig, heads: PolicyHeads | None, loss_tokens: str = "masked"
) -> Visits | None:
    """What makes the training masks, by the rules that sampling names; None for the published masks.

    loss_tokens: the model's, see `training.objectives.draws.DrawSettings`; all of an image raise ValueError.
    """
    if masks.train_masks == "random":
        return None
    if loss_tokens != "masked":
        raise ValueError(
            f"--loss_tokens {loss_tokens} must be masked with --train_masks {masks.train_masks}: "
            "--train_targets says what is learned of its masks"
        )
    options = {option.name: getattr(sampling, option.name) for option in fields(RuleOptions)}
    return Visits(masks, heads, sampling.order, sampling.group, **options)
