"""Searched schedules: a file gives the values of each step, the same for all images (docs/heads.md).

The file is a JSON object {"provenance": {…}, "values": {…}}, as scripts/search_schedule.py writes it. Values, of which
any may be absent, for K autoregressive steps and P knots (each with a K or P of its own):

    group    (K,) share of the tokens that is known after each step, rising to 1
    tau      (K,) temperature of each step
    cfg      (K,) guidance scale of each step
    profile  (P,) m at P places of t / 1000, evenly spread over [0, 1]

A setting holds the values and not the name of the file, so that a line of results or a checkpoint has them, and an
edited file is another setting.
"""

import functools
import json
from pathlib import Path

import numpy as np

from util.rng import seed_of

KINDS = ("group", "tau", "cfg", "profile")
LARGEST = 1000


def schedule_setting(text: str) -> str:
    """The values of a schedule as JSON in their one form: of a file whose name is given, or of such a JSON itself.

    A file that cannot be read and values that are no schedule raise ValueError.
    """
    if not text.strip():
        raise ValueError(f"invalid value {text!r}: must be the file of a schedule, or its values as JSON")
    if text.lstrip().startswith("{"):
        values, source = _json(text, "a schedule"), "a schedule"
    else:
        source = f"the schedule {text}"
        values = read_schedule(text)["values"]
    return json.dumps(checked_values(values, source), sort_keys=True)


def read_schedule(path) -> dict:
    """What a schedule's file holds; one that is missing, or no JSON object with "values", raises ValueError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"the schedule {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"the schedule {path} is no text") from None
    content = _json(text, f"the schedule {path}")
    if not isinstance(content, dict) or "values" not in content:
        raise ValueError(f"the schedule {path} has no 'values': scripts/search_schedule.py writes files that have")
    return content


def _json(text: str, source: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{source} is no JSON: {text[:40]!r}") from None


def checked_values(values, source: str) -> dict[str, list[float]]:
    """The values of a schedule as lists of floats; what is none raises ValueError, which begins with the source."""
    if not isinstance(values, dict) or not values:
        raise ValueError(f"{source} has no values: they are lists of numbers for some of {', '.join(KINDS)}")
    for kind, numbers in values.items():
        if kind not in KINDS:
            raise ValueError(f"{source} has values of {kind!r}; valid: {', '.join(KINDS)}")
        right = isinstance(numbers, list) and numbers and all(type(x) in (int, float) for x in numbers)
        if not right or not all(0 <= x <= LARGEST for x in numbers):
            raise ValueError(f"{source}: {kind} must be a list of numbers from 0 to {LARGEST}, got {str(numbers)[:60]}")
    group = values.get("group", [1])
    if group != sorted(group) or group[-1] != 1:
        raise ValueError(f"{source}: group must be shares that rise to 1, got {str(group)[:60]}")
    return {kind: [float(x) for x in numbers] for kind, numbers in values.items()}


@functools.lru_cache(maxsize=64)
def schedule_values(setting: str | None) -> dict[str, np.ndarray]:
    """{kind: float64 (K,) or (P,)} of a schedule's setting; {} for None."""
    values = {} if setting is None else json.loads(setting)
    return {kind: np.array(numbers) for kind, numbers in values.items()}


def schedule_name(setting: str) -> str:
    """8 hex digits that tell a schedule's setting from others in the name of a folder."""
    return f"{seed_of(setting):08x}"
