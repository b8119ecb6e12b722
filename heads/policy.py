"""Learned heads, and the inference modes that say which rules are hand-made and which learned.

Legend: B images, L tokens an image, D width of z, n tokens unknown now. r is a head's raw output; every head moves the
value of the hand-made rule it replaces, and r = 0 leaves that value bit for bit as it is.
"""

from functools import partial

import torch
from torch import nn

from heads.forms import FORMS
from heads.luce import PlackettLuce
from heads.orders import AFTER_DRAW, ORDERS, LearnedConfidence
from heads.rules import Rules
from heads.schedules import CFGS, GROUPS, PROFILES, TAUS, RuleOptions
from heads.searched import schedule_values
from heads.step import StepState
from util.checkpoint import load_checkpoint, load_weights
from util.dist import send

HEADS = ("order", "group", "tau", "cfg")  # the columns of INFER_MODES
LEARNABLE = (*HEADS, "profile")
SCOPES = ("global", "token")  # one value an image, or one a token

# mode:       order      group      tau         cfg; where cfg is learned, so is the profile if there is a head for it
INFER_MODES = {
    "baseline": ("random", "cosine", "constant", "linear"),
    "maskgil": ("confidence", "step_arccos", "constant", "ramp"),  # that family's own hand-made rules
    "policy": ("learned", "learned", "constant", "linear"),
    "guidance": ("random", "cosine", "learned", "learned"),
    "both": ("learned", "learned", "learned", "learned"),
}


class PolicyHeads(nn.Module):
    """The learned heads: order, group size, τ, guidance and its profile, those of them that `learn` names.

    dim: width of z. form: a row of `heads.forms.FORMS`. tau_mode, cfg_mode: global (one value an image) or token. rho,
    tau, cfg: bounds (low, high) of the group-size ratio, the temperature and the guidance scale. An unknown name, one
    that the form has no head for, or a bound out of order is a ValueError.
    """

    def __init__(
        self,
        dim: int,
        learn=HEADS,
        *,
        form: str = "bounded",
        tau_mode: str = "global",
        cfg_mode: str = "global",
        rho=(0, 1),
        tau=(0.9, 1.05),
        cfg=(0, 4),
    ):
        super().__init__()
        if form not in FORMS:
            raise ValueError(f"unknown form of heads {form!r}; valid: {', '.join(FORMS)}")
        unknown = [name for name in learn if name not in FORMS[form].heads]
        if unknown:
            reason = f" of the form {form}" if unknown[0] in LEARNABLE else ""
            raise ValueError(f"unknown head {unknown[0]!r}{reason}; valid: {', '.join(FORMS[form].heads)}")
        for name, scope in (("tau_mode", tau_mode), ("cfg_mode", cfg_mode)):
            if scope not in SCOPES:
                raise ValueError(f"unknown {name} {scope!r}; valid: {', '.join(SCOPES)}")
        for name, (low, high) in (("rho", rho), ("tau", tau), ("cfg", cfg)):
            if not 0 <= low <= high or (name == "rho" and high > 1):
                limit = " <= 1" if name == "rho" else ""
                raise ValueError(f"bounds of {name} must be 0 <= low <= high{limit}, got {low, high}")
        self.learn = tuple(name for name in LEARNABLE if name in learn)
        self.form = form
        self.scope = {"order": "token", "group": "global", "tau": tau_mode, "cfg": cfg_mode}
        self.bounds = {"group": tuple(rho), "tau": tuple(tau), "cfg": tuple(cfg)}
        self.heads = nn.ModuleDict({name: FORMS[form].heads[name](dim) for name in self.learn})

    def settings(self) -> dict:
        """The constructor's arguments but dim, for a checkpoint."""
        return {
            "learn": list(self.learn),
            "form": self.form,
            "tau_mode": self.scope["tau"],
            "cfg_mode": self.scope["cfg"],
            "rho": list(self.bounds["group"]),
            "tau": list(self.bounds["tau"]),
            "cfg": list(self.bounds["cfg"]),
        }

    def raw(self, name: str, state: StepState, base_cfg) -> torch.Tensor:
        """r of a head, float32: (B, L) for one value a token, (B, 1) for one an image (a mean over masked tokens).

        Inputs are z, detached, and what tells the step: the share of tokens revealed, num_iter, the base cfg.
        """
        with torch.autocast(state.z.device.type, enabled=False):
            head = self.heads[name]
            r = head(state.z.detach().float(), state.numbers(base_cfg)).squeeze(-1)
            if self.scope[name] == "global":
                masked, count = state.masked
                r = ((r * masked).sum(dim=1) / count).unsqueeze(1)
            return self.explored(name, state, head.shared(state) + self.adaptive(name, state, r))

    @staticmethod
    def explored(name: str, state: StepState, r: torch.Tensor) -> torch.Tensor:
        """What becomes of r (B, L) or (B, 1): it stays as it is; training may add noise."""
        return r

    @staticmethod
    def adaptive(name: str, state: StepState, a: torch.Tensor) -> torch.Tensor:
        """What becomes of the part of r that depends on the image, (B, L) or (B, 1): it stays as it is."""
        return a

    def logits(self, state: StepState, base_cfg) -> torch.Tensor:
        """What the order head adds to the ranking of the tokens (B, L)."""
        return self.raw("order", state, base_cfg)

    def group_size(self, state: StepState, base_k, base_cfg) -> torch.Tensor:
        """k (B,), not rounded; base_k (B,) is the hand-made rule's."""
        r = self.raw("group", state, base_cfg).squeeze(1)
        k = FORMS[self.form].group(state, base_k, r, *self.bounds["group"])
        return torch.minimum(k.clamp(min=1), state.num_unknown)

    def temperature(self, state: StepState, base, base_cfg) -> torch.Tensor:
        """τ (B, 1) or (B, L) around the base (B, 1)."""
        return FORMS[self.form].tau(base, self.raw("tau", state, base_cfg), *self.bounds["tau"])

    def guidance(self, state: StepState, base, base_cfg) -> torch.Tensor:
        """w (B, 1) or (B, L) around the hand-made schedule's value (B, 1); base_cfg is that schedule's scale."""
        return FORMS[self.form].cfg(base, self.raw("cfg", state, base_cfg), *self.bounds["cfg"])

    def profile(self, base):
        """The profile m, as `heads.step.StepPlan` has it: the hand-made one times 1 + tanh(r)."""
        learned = self.heads["profile"]()
        return learned if base is None else lambda share: base(share) * learned(share)


def load_heads(checkpoint, *, ema: bool = True) -> PolicyHeads | None:
    """The heads of a checkpoint folder or file, or its content, on the CPU and in eval mode; None where it has none."""
    content = load_checkpoint(checkpoint)
    config = content.get("config", {})
    if not config.get("heads"):
        return None
    weights = content.get("heads_ema" if ema else "heads") or {}
    try:
        widths = [len(value) for name, value in weights.items() if name.endswith("norm.weight")]
        settings = dict(config["heads"])
        widths += [1] if settings.get("learn") == ["profile"] else []  # whose head has no width
        heads = PolicyHeads(*widths[:1], **settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the checkpoint is damaged: its heads cannot be made ({error})") from None
    load_weights(heads, weights, "the checkpoint's heads")
    return heads.eval()


def column(value, state: StepState) -> torch.Tensor:
    """A number, or (B, 1), as (B, 1) float32 on the device of the mask."""
    shape = len(state.mask), 1
    if not isinstance(value, torch.Tensor):  # filled there: a copy would wait for the device
        return torch.full(shape, float(value), device=state.mask.device)
    return send(value.float(), state.mask.device).expand(shape)


def base_scores(state: StepState, options: RuleOptions, log_prob=None) -> torch.Tensor:
    """order_noise·g (B, L), to which the order head adds its logits; g are the Gumbel draws that make the random order.

    Of another order_base the j-th token has the j-th largest of L evenly spread quantiles of that distribution; of one
    that looks at what is drawn, its score of log_prob (B, L).
    """
    if options.order_base == "random":
        return options.order_noise * state.gumbel
    if options.order_base in AFTER_DRAW:
        return options.order_noise * hand_made("order", options.order_base, options).scores(
            state, log_prob, state.gumbel
        )
    rank = ORDERS[options.order_base](state).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    share = 1 - (rank + 0.5) / rank.shape[1]  # the first token has the largest
    return options.order_noise * -(-share.log()).log()


def learned_order(heads, base, options):
    """Rank by logit + order_noise·g; where the form renews g, as a `PlackettLuce`; or as a `LearnedConfidence`."""

    if options.order_base in AFTER_DRAW:
        logits = partial(heads.logits, base_cfg=options.cfg)
        return LearnedConfidence(options.confidence_noise, options.confidence_score, logits, options.order_noise)

    def scores(state):
        return heads.logits(state, options.cfg) + base_scores(state, options)

    if not FORMS[heads.form].renews or options.order_base != "random" or options.order_noise == 0:
        return scores
    return PlackettLuce(scores, options.order_noise)


def learned_group(heads, base, options):
    """k, rounded; `Rules` keeps it between 1 and n."""
    return lambda state: heads.group_size(state, base(state), options.cfg).round()


def learned_tau(heads, base, options):
    """τ around the hand-made temperature."""
    return lambda state: heads.temperature(state, column(base(state), state), options.cfg)


def learned_cfg(heads, base, options):
    """w around the hand-made schedule."""
    return lambda state, after: heads.guidance(state, column(base(state, after), state), options.cfg)


def learned_profile(heads, base, options):
    """m around the hand-made profile."""
    return lambda state: heads.profile(base(state))


# kind: (hand-made rules, the learned one, the rule that the learned one moves: a schedule's where one is given)
RULES = {
    "order": (ORDERS | AFTER_DRAW, learned_order, "random"),  # or RuleOptions.order_base
    "group": (GROUPS, learned_group, "cosine"),  # or RuleOptions.group_base
    "tau": (TAUS, learned_tau, "constant"),
    "cfg": (CFGS, learned_cfg, "linear"),  # or RuleOptions.cfg_base
    "profile": (PROFILES, learned_profile, "constant"),
}
FLAGS = {"order": "order", "group": "group", "tau": "tau_schedule", "cfg": "cfg_schedule", "profile": "cfg_profile"}


def rule_names(mode: str, schedule: str | None = None, cfg_base: str | None = None) -> dict[str, str | None]:
    """{kind: name of the rule} of an inference mode, "schedule" for what is hand-made and has values in the schedule.

    None for a profile that is learned where the heads have one, else hand-made. schedule, cfg_base: as in
    `RuleOptions`. An unknown mode raises ValueError.
    """
    if mode not in INFER_MODES:
        raise ValueError(f"unknown infer_mode {mode!r}; valid: {', '.join(INFER_MODES)}")
    names = dict(zip(HEADS, INFER_MODES[mode]))
    if names["cfg"] != "learned" and cfg_base is not None:
        names["cfg"] = cfg_base
    names["profile"] = None if names["cfg"] == "learned" else RULES["profile"][2]
    searched = schedule_values(schedule)
    searched = {kind for kind in searched if names[kind] not in ("learned", None)}
    return {kind: "schedule" if kind in searched else names[kind] for kind in RULES}


def moved_rule(kind: str, options: RuleOptions) -> str:
    """Name of the hand-made rule that the learned one moves: the schedule's where it has values, else its base."""
    if kind in schedule_values(options.schedule):
        return "schedule"
    bases = {"order": options.order_base, "group": options.group_base, "cfg": options.cfg_base}
    return bases.get(kind) or RULES[kind][2]


def hand_made(kind: str, name: str, options: RuleOptions):
    """The rule of this name, to be called as `Rules` does; one of a schedule without values raises ValueError."""
    if name == "schedule" and kind not in schedule_values(options.schedule):
        raise ValueError(f"the {kind} rule 'schedule' needs --schedule FILE with values of {kind}")
    rule = RULES[kind][0][name]
    if name in AFTER_DRAW:
        return rule(options.confidence_noise, options.confidence_score)
    return rule if kind == "order" else partial(rule, options=options)


def choices(kind: str) -> tuple[str, ...]:
    """The names of the rules of a kind."""
    return (*RULES[kind][0], "learned")


def build_rules(
    mode: str,
    heads: PolicyHeads | None = None,
    *,
    order: str | None = None,
    group: str | None = None,
    tau_schedule: str | None = None,
    cfg_schedule: str | None = None,
    cfg_profile: str | None = None,
    **options,
) -> Rules:
    """The rules of an inference mode, any of the five replaced by the one named, "learned" included.

    options are the fields of `heads.schedules.RuleOptions` (cfg, temperature, …). An unknown mode or rule, or a learned
    rule without its head in `heads`, raises ValueError.
    """
    options = RuleOptions(**options)
    names = rule_names(mode, options.schedule, options.cfg_base)
    rules = {}
    for kind, override in zip(RULES, (order, group, tau_schedule, cfg_schedule, cfg_profile)):
        name = override or names[kind]
        if name is None:
            name = "learned" if heads and kind in heads.learn else moved_rule(kind, options)
        if name not in choices(kind):
            raise ValueError(f"unknown {kind} rule {name!r}; valid: {', '.join(choices(kind))}")
        moved = moved_rule(kind, options)
        rule = hand_made(kind, moved if name == "learned" else name, options)
        if name == "learned":
            if heads is None or kind not in heads.learn:
                by_mode = names[kind] in ("learned", None)
                asking = f"infer_mode {mode!r}" if by_mode else f"--{FLAGS[kind]} learned"
                raise ValueError(
                    f"{asking} needs the learned {kind} head, which this checkpoint does not have; train it "
                    f"with main_mar.py --init_from DIR --objective image --learn {kind}"
                )
            rule = RULES[kind][1](heads, rule, options)
        rules[kind] = rule
    return Rules(**rules)
