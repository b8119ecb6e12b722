"""results.jsonl: one line a result, with its whole configuration."""

import json
import subprocess
from pathlib import Path


def git_commit() -> str | None:
    """The commit of this repository, None outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def read_results(path: Path) -> list[dict]:
    """The dicts in the lines of a results file; a last line cut short by a crash is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [row for row in rows if isinstance(row, dict)]


def is_folder_name(name) -> bool:
    """Is it a plain folder name, which cannot lead out of the folder it is joined to?"""
    return isinstance(name, str) and name == Path(name).name and name != ".."


def find_result(rows: list[dict], wanted: dict) -> dict | None:
    """The first of the rows that has all keys and values of wanted; None if none has."""
    return next((row for row in rows if all(row.get(k) == v for k, v in wanted.items())), None)


def append_result(path: Path, row: dict) -> None:
    """Add one line, after a line break if a crash cut the last line short."""
    text = path.read_text() if path.is_file() else ""
    with open(path, "a") as file:
        file.write(("" if not text or text.endswith("\n") else "\n") + json.dumps(row) + "\n")
