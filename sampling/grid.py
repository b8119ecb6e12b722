"""The settings of a run of sample.py: every combination of its comma lists, each with a folder's name."""

import itertools
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from heads.policy import FLAGS
from sampling.settings import SampleConfig
from util.args import check_values
from util.evaluation.protocol import EvalConfig
from util.evaluation.results import read_results
from util.rng import DEFAULT_SEED

# flags that take a comma list
SWEEPS = ("infer_mode", "order", "group", "tau_schedule", "cfg_schedule", "cfg_profile", "cfg", "temperature")
SWEEPS += (
    "heads_adaptive",
    "num_iter",
    "num_sampling_steps",
    "solver",
    "spacing",
    "order_noise",
    "order_base",
    "group_base",
    "confidence_noise",
    "confidence_score",
    "top_k",
    "top_p",
    "refresh_every",
    "seed",
)


@dataclass
class Setting:
    """One point of the grid: how it is sampled, and what identifies it."""

    seed: int
    sampling: SampleConfig
    name: str = ""  # of its folder
    row: dict = field(default_factory=dict)  # of results.jsonl, before anything is measured
    present: dict | None = None  # the finished row, where results.jsonl has it already


def span(
    given: dict, base: SampleConfig, fixed_rules: dict[str, str], has_heads: bool = False, length: int | None = None
) -> list[Setting]:
    """All combinations of the comma lists among the flags given, in their order; base has the values of the others.

    fixed_rules: of the model; length: its tokens an image. The baseline of a checkpoint with heads has no searched
    values, unless flags give them.
    """
    lists = {name: values for name, values in given.items() if name in SWEEPS}
    settings = []
    for values in itertools.product(*lists.values()):
        point = dict(zip(lists, values))
        seed = point.pop("seed", DEFAULT_SEED)
        sampling = replace(base, **point)
        if has_heads and "schedule" not in given:
            sampling = without_searched(sampling, given)
        settings.append(Setting(seed, sampling.fitted(fixed_rules, "the model", length).resolved()))
    return settings


def name_settings(settings: list[Setting], suffix: str) -> None:
    """Give each setting its folder name; two with the same one (numbers alike in 6 digits) raise ValueError."""
    for setting in settings:
        setting.name = f"{setting.sampling.name()}_seed{setting.seed}{suffix}"
    names = [setting.name for setting in settings]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two settings of the sweep would share the folder {name}: their values are too close")


def settings_of(path: str | None, given=()) -> list[dict]:
    """How the lines of a results file were sampled, but for seeds and the names given, each once; [{}] for None.

    A file that is missing, or has no results or damaged ones, raises ValueError.
    """
    if path is None:
        return [{}]
    names = {f.name for f in fields(SampleConfig)} - set(given)
    rows = [row["settings"] for row in read_results(Path(path)) if isinstance(row.get("settings"), dict)]
    if not rows:
        raise ValueError(f"--settings_of {path} holds no results of sample.py")
    for row in rows:
        check_values(SampleConfig, row, path)
    points = [{k: v for k, v in row.items() if k in names} for row in rows]
    return [point for i, point in enumerate(points) if point not in points[:i]]


def unset_settings() -> dict:
    """What settings of a line of results are where no flag says otherwise, for lines that are older than a flag."""
    return asdict(SampleConfig().resolved()) | asdict(EvalConfig().resolved())


def without_searched(sampling: SampleConfig, given=()) -> SampleConfig:
    """The settings without a searched schedule, where their mode is baseline; rules given by hand stay."""
    if sampling.infer_mode != "baseline":
        return sampling
    searched = [flag for flag in FLAGS.values() if getattr(sampling, flag) == "schedule" and flag not in given]
    return replace(sampling, schedule=None, **dict.fromkeys(searched))
