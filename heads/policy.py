"""Inference modes: which of the four rules are hand-made and which learned; the settings of a sampling run."""

from dataclasses import asdict, dataclass, fields
from functools import partial

from diffusion.solvers import SOLVERS
from heads.rules import CFGS, GROUPS, ORDERS, TAUS, RuleOptions, Rules
from util.args import flag

# mode:       order      group      tau         cfg
INFER_MODES = {
    "baseline": ("random", "cosine", "constant", "linear"),
    "policy": ("learned", "learned", "constant", "linear"),
    "guidance": ("random", "cosine", "learned", "learned"),
    "both": ("learned", "learned", "learned", "learned"),
}


def build_rules(
    mode: str,
    heads=None,
    *,
    order: str | None = None,
    group: str | None = None,
    tau_schedule: str | None = None,
    cfg_schedule: str | None = None,
    **options,
) -> Rules:
    """The rules of an inference mode, any of the four replaced by the one named.

    options are the fields of `heads.rules.RuleOptions` (cfg, temperature, …). An unknown mode or rule, or a learned
    rule without its head in `heads`, raises ValueError.
    """
    if mode not in INFER_MODES:
        raise ValueError(f"unknown infer_mode {mode!r}; valid: {', '.join(INFER_MODES)}")
    options = RuleOptions(**options)
    overrides = (order, group, tau_schedule, cfg_schedule)
    tables = {"order": ORDERS, "group": GROUPS, "tau": TAUS, "cfg": CFGS}
    rules = {}
    for (kind, table), default, override in zip(tables.items(), INFER_MODES[mode], overrides):
        name = override or default
        if name == "learned":
            raise ValueError(f"infer_mode {mode!r} needs the learned {kind} head, which this checkpoint does not have")
        if name not in table:
            raise ValueError(f"unknown {kind} rule {name!r}; valid: {', '.join(table)}")
        rules[kind] = partial(table[name], options=options) if kind != "order" else table[name]
    return Rules(**rules)


@dataclass(frozen=True)
class SampleConfig(RuleOptions):
    """How images are sampled: everything that an image depends on but weights, label and seed."""

    infer_mode: str = flag("baseline", "which rules are learned", choices=INFER_MODES)
    order: str | None = flag(None, "order of the tokens, instead of the mode's", choices=ORDERS)
    group: str | None = flag(None, "how many tokens a step, instead of the mode's", choices=GROUPS)
    tau_schedule: str | None = flag(None, "temperature schedule, instead of the mode's", choices=TAUS)
    cfg_schedule: str | None = flag(None, "guidance schedule, instead of the mode's", choices=CFGS)
    num_iter: int = flag(64, "autoregressive steps", low=1)
    num_sampling_steps: int = flag(100, "diffusion steps when sampling", low=1, high=1000)
    solver: str = flag("ddpm", "solver of the diffusion head", choices=SOLVERS)

    def rules(self, heads=None) -> Rules:
        """The rules these settings name; see `build_rules` for what raises ValueError."""
        options = {f.name: getattr(self, f.name) for f in fields(RuleOptions)}
        names = ("order", "group", "tau_schedule", "cfg_schedule")
        return build_rules(self.infer_mode, heads, **{n: getattr(self, n) for n in names}, **options)

    def name(self) -> str:
        """A folder name that tells settings apart: the usual ones always, the others where they are not the default."""
        usual = f"{self.infer_mode}_iter{self.num_iter}_steps{self.num_sampling_steps}_cfg{self.cfg:g}"
        defaults = asdict(SampleConfig())
        shown = ("infer_mode", "num_iter", "num_sampling_steps", "cfg")
        rest = {k: v for k, v in asdict(self).items() if k not in shown and v != defaults[k]}
        return usual + "".join(f"_{k}-{v:g}" if isinstance(v, float) else f"_{k}-{v}" for k, v in rest.items())
