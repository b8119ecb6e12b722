"""README and docs: README is short, a table stands in one place only, what is linked exists."""

import re
from collections import Counter
from pathlib import Path

import pytest

from diffusion.solvers import SOLVERS
from heads.policy import FLAGS, RULES

ROOT = Path(__file__).resolve().parents[1]
DOCS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
SEPARATOR = re.compile(r"\|[|: -]+\|")


def test_readme_has_at_most_10_kilobytes():
    assert len(DOCS[0].read_bytes()) <= 10_000


def test_a_table_stands_in_one_place_only():
    """The heads of two tables may be equal, not the first rows below them too."""
    tables = Counter()
    for path in DOCS:
        lines = path.read_text().splitlines()
        tables.update(tuple(lines[i - 1 : i + 2]) for i, text in enumerate(lines) if SEPARATOR.fullmatch(text))
    assert not [table for table, count in tables.items() if count > 1]


def test_the_rules_and_solvers_there_are_stand_in_the_table_of_commands():
    lines = (ROOT / "docs/commands.md").read_text().splitlines()
    tables = {f"--{FLAGS[kind]}`": rules for kind, (rules, *_) in RULES.items()} | {"--solver`": SOLVERS}
    for flag, names in tables.items():
        row = next(line for line in lines if line.startswith("| ") and f"`{flag}" in line)
        assert not [name for name in names if f"`{name}`" not in row], flag


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_what_is_linked_exists(path):
    places = re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text())
    assert not [place for place in places if not (path.parent / place).is_file()]
