"""How images are sampled: the settings of a run, and those that --fast stands for."""

from dataclasses import asdict, dataclass, fields, replace

from diffusion.schedule import SPACINGS, num_steps_setting
from diffusion.solvers import SOLVERS
from heads.orders import Confidence, check_square
from heads.policy import FLAGS, HEADS, INFER_MODES, build_rules, choices, moved_rule, rule_names
from heads.rules import Rules, has_square_images
from heads.schedules import NUM_ITER, READ_BY, RuleOptions, check_num_iter, default_num_iter, needed_steps
from heads.searched import schedule_name
from models.token_head import check_no_profile
from util import dist
from util.args import flag


@dataclass(frozen=True)
class SampleConfig(RuleOptions):
    """How images are sampled: everything that an image depends on but weights, label and seed."""

    infer_mode: str = flag("baseline", "which rules are learned", choices=INFER_MODES)
    order: str | None = flag(None, "order of the tokens, instead of the mode's", choices=choices("order"))
    group: str | None = flag(None, "how many tokens a step, instead of the mode's", choices=choices("group"))
    tau_schedule: str | None = flag(None, "temperature schedule, instead of the mode's", choices=choices("tau"))
    cfg_schedule: str | None = flag(None, "guidance schedule, instead of the mode's", choices=choices("cfg"))
    cfg_profile: str | None = flag(
        None, "share of the guidance over the diffusion steps, instead of constant", choices=choices("profile")
    )
    heads_adaptive: str = flag(
        "on", "off: learned rules say of each image what they say of all at that step", choices=("on", "off")
    )
    num_iter: int | None = flag(
        None,
        f"autoregressive steps (default: {NUM_ITER}; as many as an image has tokens, where a model draws one a step)",
        low=1,
    )
    num_sampling_steps: int | str = flag(
        100,
        "diffusion steps when sampling; A:B = from A at the first autoregressive step to B at the last",
        type=num_steps_setting,
        metavar="T|A:B",
    )
    solver: str = flag("ddpm", "solver of the diffusion head", choices=SOLVERS)
    spacing: str | None = flag(None, "timesteps of the diffusion steps, instead of the solver's", choices=SPACINGS)
    top_k: int = flag(0, "ids are drawn from so many, the likeliest ones; 0 = from all", low=0)
    top_p: float = flag(1.0, "ids are drawn from the likeliest that hold this share; 0 or 1 = from all", low=0, high=1)
    smooth: bool = flag(False, "of models that draw scales: mixtures of codes in place of the ids drawn, for pictures")
    refresh_every: int = flag(
        1, "steps between passes over all tokens; between them only those that changed or are drawn", low=1
    )

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "num_sampling_steps", num_steps_setting(self.num_sampling_steps))

    def fitted(self, fixed_rules: dict[str, str], model: str, length: int | None = None) -> "SampleConfig":
        """The same settings with the rules that a model cannot do without; others that are named raise ValueError.

        And with the number of steps that it has by default, for which length is needed, see `default_num_iter`.
        """
        for kind, rule in fixed_rules.items():
            if getattr(self, kind) not in (None, rule):
                raise ValueError(f"--{kind} {getattr(self, kind)} does not fit {model}, which needs {rule}")
        self._check_mode(fixed_rules, model)
        if self.group == "scale" and fixed_rules.get("group") != "scale":
            raise ValueError(f"--group scale does not fit {model}, whose tokens are of one scale")
        num_iter = default_num_iter(fixed_rules, length) if self.num_iter is None else self.num_iter
        # of a model that draws scales the linear schedule counts these, of others tokens
        linear = self.cfg_schedule == "linear" and fixed_rules.get("group") == "scale"
        ramp = dict(cfg_schedule="ramp") if linear else {}
        return replace(self, **fixed_rules, **ramp, num_iter=num_iter)

    def _check_mode(self, fixed_rules: dict[str, str], model: str) -> None:
        """Raise ValueError where the model has fixed rules for all that the mode decides of order and groups."""
        usual = rule_names("baseline")

        def fits(mode: str) -> bool:
            own = {kind: rule for kind, rule in rule_names(mode).items() if kind in ("order", "group")}
            own = {kind: rule for kind, rule in own.items() if rule != usual[kind]}
            return not own or any(fixed_rules.get(kind, rule) == rule for kind, rule in own.items())

        if not fits(self.infer_mode):
            valid = ", ".join(filter(fits, INFER_MODES))
            raise ValueError(
                f"--infer_mode {self.infer_mode} does not fit {model}, whose order and groups are fixed; valid: {valid}"
            )

    def rules(self, heads=None) -> Rules:
        """The rules these settings name; see `build_rules` for what raises ValueError."""
        options = {f.name: getattr(self, f.name) for f in fields(RuleOptions)}
        group = self.resolved().group
        check_num_iter(moved_rule("group", self) if group == "learned" else group, self.num_iter)
        return build_rules(self.infer_mode, heads, **{n: getattr(self, n) for n in FLAGS.values()}, **options)

    def check(self, model, heads=None) -> None:
        """Raise ValueError for what `generate` would refuse of these settings at the first images of a model.

        model: a `models.families.Backbone`; heads: the policy heads to sample with.
        """
        rules, length = self.rules(heads), needed_steps(model)
        num_iter = default_num_iter(model.fixed_rules, length) if self.num_iter is None else self.num_iter
        if model.fixed_rules.get("group") == "one" and num_iter < length:
            raise ValueError(
                f"--num_iter {self.num_iter} is too small: this model draws one token a step, an image has {length}"
            )
        if model.fixed_rules.get("group") == "scale" and num_iter != length:
            raise ValueError(
                f"--num_iter {num_iter} must be {length}: this model draws a scale a step, and has so many"
            )
        if self.smooth and model.fixed_rules.get("group") != "scale":
            raise ValueError("--smooth has no meaning for this model: it mixes the codes of models that draw scales")
        self.check_confidence(rules.order)
        rules.check(model)
        if not has_square_images(model.config):
            self.check_shape()
        model.token_head.sampler(num_steps=self.num_sampling_steps, **self.token_head_options())
        if not model.token_head.has_steps:
            check_no_profile(rules.profile(None))

    def check_confidence(self, order) -> None:
        """Raise ValueError for an order by what a model is sure of, and nothing else, where it is sure of everything.

        At temperature 0 all that is drawn has probability 1, and ties would go row by row.
        """
        by_that_alone = type(order) is Confidence and (
            order.score in ("none", "warm_up") or (order.score == "linear" and order.noise == 0)
        )
        if by_that_alone and self.temperature == 0 and self.resolved().tau_schedule == "constant":
            raise ValueError(
                "--temperature 0 makes a model equally sure of all that it draws, and --order confidence chooses by "
                "that: use one above 0, or --confidence_score linear with --confidence_noise above 0"
            )

    def check_shape(self) -> None:
        """Raise ValueError for orders that images which are not square do not have."""
        order = self.resolved().order
        learned = order == "learned"
        check_square(self.order_base if learned else order, "order_base" if learned else "order")

    def token_head_options(self) -> dict:
        """The settings that `TokenHead.sampler` takes, beside the number of steps and what is the tokenizer's."""
        return dict(solver=self.solver, spacing=self.spacing, top_k=self.top_k, top_p=self.top_p)

    def resolved(self) -> "SampleConfig":
        """The same settings with the names of rules and spacing filled in, so that equal settings compare equal.

        And with the number of steps of a model with free groups; of another one the settings must be `fitted` before.
        """
        names = {FLAGS[kind]: name for kind, name in rule_names(self.infer_mode, self.schedule, self.cfg_base).items()}
        names["spacing"] = SOLVERS[self.solver].spacing
        names["num_iter"] = NUM_ITER
        return replace(self, **{name: getattr(self, name) or default for name, default in names.items()})

    def acting(self) -> dict[str, set[str]]:
        """{kind: the rule that decides, with the one that it moves if it is learned}."""
        resolved, acting = self.resolved(), {}
        for kind, rule in FLAGS.items():
            name = getattr(resolved, rule)
            acting[kind] = {"learned", moved_rule(kind, self)} if name in ("learned", None) else {name}
        return acting

    def name(self) -> str:
        """A folder name that tells settings apart: the usual ones always, the others where they are not the default."""
        steps = str(self.num_sampling_steps).replace(":", "-")  # a colon is no part of a file name everywhere
        resolved = self.resolved()
        usual = f"{self.infer_mode}_iter{resolved.num_iter}_steps{steps}_cfg{self.cfg:g}"
        implied = {name: getattr(self, name) for name in ("infer_mode", "solver", "schedule", "cfg_base")}
        implied = SampleConfig(**implied)
        defaults = asdict(implied.resolved()) | {"solver": SampleConfig.solver, "schedule": None}
        shown = ("infer_mode", "num_iter", "num_sampling_steps", "cfg")
        rest = {k: v for k, v in asdict(resolved).items() if k not in shown and v != defaults[k]}
        rest |= {"schedule": schedule_name(self.schedule)} if self.schedule is not None else {}
        return usual + "".join(f"_{k}-{v:g}" if isinstance(v, float) else f"_{k}-{v}" for k, v in rest.items())


def note_top_k(settings: list[SampleConfig], model) -> None:
    """Say once of all the settings of a run which top_k are above the entries of the codebook of a model of ids."""
    entries = getattr(model.config, "vocab_size", None)
    above = sorted({setting.top_k for setting in settings if entries and setting.top_k > entries})
    if above and dist.is_main():
        values = ", ".join(map(str, above))
        print(f"--top_k {values} is above the {entries} entries of the codebook: ids are drawn from all of them")


# What --fast stands for, besides the dtype; quality and speed of each: docs/speed.md
FAST = dict(solver="dpmpp_sde", num_sampling_steps="12:5", refresh_every=8)


def check_read(given: dict, settings: list[SampleConfig]) -> None:
    """Raise ValueError for a number of single rules, given by hand and not its default, that none of these reads.

    given: {flag: value or, of a sweep, values}.
    """
    acting = [each.acting() for each in settings]
    learned = any("learned" in each[kind] for each in acting for kind in HEADS)
    if "off" in given.get("heads_adaptive", ()) and not learned:
        raise ValueError("--heads_adaptive off has no meaning without a learned rule (--infer_mode guidance, both)")
    for name in sorted(READ_BY.keys() & given.keys()):
        kind, rules = READ_BY[name]
        others = [getattr(each, name) for each in settings if _number(each, name) != _number(SampleConfig(), name)]
        if others and not any(each[kind].intersection(rules) for each in acting):
            readers = " or ".join(f"--{FLAGS[kind]} {rule}" for rule in rules if rule != "learned")
            readers = readers or f"a learned {kind} (--infer_mode policy, both)"
            raise ValueError(f"--{name} {others[0]} has no meaning without {readers}")


def _number(setting: SampleConfig, name: str):
    """The value of a number of rules; of an interval its two numbers, whatever its text."""
    intervals = dict(cfg_interval=setting.interval, cfg_t_interval=setting.t_interval)
    return intervals[name]() if name in intervals else getattr(setting, name)
