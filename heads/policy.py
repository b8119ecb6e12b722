"""Inference modes: which of the four rules are hand-made and which learned."""

from functools import partial

from heads.rules import CFGS, GROUPS, ORDERS, TAUS, RuleOptions, Rules

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
