"""results.jsonl: one line a result, with its whole configuration."""

import json
import math
import subprocess
from pathlib import Path

from util.evaluation.metrics import metrics_line
from util.evaluation.protocol import protocol_line
from util.images.pictures import read_run

# what a line says of the bytes of a classifier's file: the setting that names the file
CLASSIFIERS = {"features_content": "fid_weights", "judge_content": "judge"}
LATER = {"reference_content", *CLASSIFIERS}  # keys that lines of before them lack


def git_commit() -> str | None:
    """The commit of this repository, None outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def numbered_results(path: Path) -> list[tuple[int, dict]]:
    """(number of the line, counted from 1; the dict in it) for each line of a results file that holds one.

    A line cut short by a crash is left out, a byte order mark is passed over. A file that is not UTF-8 raises
    ValueError with its name and the line, and so does what is no file; one that is not there has none.
    """
    if path.is_dir() or (path.is_symlink() and not path.exists()):
        what = "is a folder" if path.is_dir() else "is a link to nothing"
        raise ValueError(f"{path} {what}: results are lines of a file")
    rows = []
    for number, data in enumerate(path.read_bytes().split(b"\n") if path.is_file() else (), start=1):
        try:
            line = data.decode("utf-8").strip("\ufeff \t\r")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no UTF-8 text: line {number} has {error.object[error.start]:#04x}") from None
        try:
            rows.append((number, json.loads(line)))
        except (ValueError, RecursionError):
            continue
    return [(number, row) for number, row in rows if isinstance(row, dict)]


def read_results(path: Path) -> list[dict]:
    """The dicts in the lines of a results file, as in `numbered_results`."""
    return [row for _, row in numbered_results(path)]


def is_folder_name(name) -> bool:
    """Is it a plain folder name, which cannot lead out of the folder it is joined to?"""
    return isinstance(name, str) and name == Path(name).name and name != ".."


def read_named(path: Path) -> list[dict]:
    """The lines of a results file that name the folder of their images."""
    return [row for row in read_results(path) if is_folder_name(row.get("name"))]


def find_result(rows: list[dict], wanted: dict, defaults: dict | None = None) -> dict | None:
    """The first of the rows that has all keys and values of wanted, but for LATER in old rows; None if none has.

    defaults: values of settings, for rows that are older than the flag of a setting. How many images were sampled
    together, eval_bsz, makes no other result, but in int8.
    """
    free = set() if wanted.get("settings", {}).get("dtype") == "int8" else {"eval_bsz"}

    def compared(value):
        return {k: v for k, v in value.items() if k not in free} if isinstance(value, dict) else value

    old = {k: wanted[k] for k in LATER & wanted.keys()}
    for row in rows:
        whole = {**old, **row}
        if isinstance(row.get("settings"), dict):
            whole["settings"] = {**(defaults or {}), **row["settings"]}
        if all(compared(whole.get(key)) == compared(value) for key, value in wanted.items()):
            return row
    return None


def other_weights(folder: Path, rows: list[dict], own: Path) -> set[str]:
    """Hashes of the weights of other checkpoints than the file `own` (resolved) that a setting's folder is of.

    rows: of the results file beside it. A run that has no row yet is known from the folder's run.json; one of before
    that named the checkpoint is taken for another's.
    """
    rows = [row for row in rows if row.get("name") == folder.name]
    places = [(str(row.get("weights")), row.get("checkpoint", own)) for row in rows]
    run = read_run(folder)
    weights = str(run.get("weights"))
    if run.get("checkpoint") or (run and weights not in dict(places)):
        places.append((weights, run.get("checkpoint") or folder))
    return {weights for weights, place in places if Path(str(place)).resolve() != own}


def append_result(path: Path, row: dict) -> None:
    """Add one line, after a line break if a crash cut the last one short. NaN and infinities are written as null."""
    data = path.read_bytes() if path.is_file() else b""
    with open(path, "ab") as file:
        line = json.dumps(finite(row), allow_nan=False)
        file.write((("" if not data or data.endswith(b"\n") else "\n") + line + "\n").encode())


def finite(value):
    """A value for JSON, which has no NaN and no infinities: None in their place."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def report(row: dict, folder: Path) -> None:
    """Print a result for people: measured how, how many, how fast, how good, where the picture is."""
    if "protocol" in row:  # older lines have none
        print(protocol_line(row["protocol"]))
    speed = f", {row['images_per_second']:.1f} images/s" if row["images_per_second"] else " already"
    print(f"{row['settings']['num_images']} images in {folder}{speed}")
    for name in ("redone_fp32", "not_finite", "one_colour"):
        if row.get(name):
            print(f"{name}: {row[name]} of the {row['num_made']} images made")
    print(metrics_line(row["metrics"]) or "no metrics asked for")
    print(f"picture: {folder / 'grid.png'}")
