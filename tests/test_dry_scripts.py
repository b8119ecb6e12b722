"""scripts/*.sh with --dry_run: each shows the commands that it would run, one a line, and runs, installs and writes
nothing. It is run in a copy of the repository's scripts where every program notes that it was called."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

import main_mar
from tests.test_cli import commands_in

ROOT = Path(__file__).resolve().parents[1]
SOURCED = {"setup_env", "paper_env"}
SCRIPTS = sorted({path.stem for path in ROOT.glob("scripts/*.sh")} - SOURCED)
PROGRAMS = ("python", "python3", "torchrun", "ruff", "pip")
PRESETS = {"paper": ("digits", "imagenet"), "ablate_infer_mode": ("digits", "mar_base"), "ablate_speed": ("",)}
PRESETS |= {"train_policy": ("digits", "cifar10", "mar_base"), "quickstart": ("",), "test": ("",), "test_gpu": ("",)}
PRESETS |= {name: ("",) for name in ("quickstart_var", "quickstart_maskgil", "demo_text", "demo_shapes")}
PRESETS |= {"search_grid": ("digits", "cifar10"), "train_heads": ("digits", "cifar10")}
PRESETS |= {"leaderboard": ("digits", "cifar10")}
PRESETS |= {"ablate_prefix": ("digits", "cifar10")}
CASES = [(s, preset) for s in SCRIPTS for preset in PRESETS["paper" if s.startswith("paper_") else s]]


@pytest.fixture
def place(tmp_path):
    """(the copy, a function that runs one of its scripts: (exit code, output, errors, calls of programs))."""
    copy, bin_, log = tmp_path / "copy", tmp_path / "bin", tmp_path / "log"
    shutil.copytree(ROOT / "scripts", copy / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "requirements.txt", copy)
    bin_.mkdir()
    for name in PROGRAMS:
        (bin_ / name).write_text(f"#!/bin/sh\nprintf '%s\\t' {name} \"$@\" >> {log}\necho >> {log}\n")
        (bin_ / name).chmod(0o755)

    def run(script, *arguments, **variables):
        log.write_text("")
        command = ["bash", str(copy / "scripts" / f"{script}.sh"), *arguments]
        environment = dict(PATH=f"{bin_}:{os.environ['PATH']}", HOME=str(tmp_path), **variables)
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        return (
            done.returncode,
            done.stdout,
            done.stderr,
            [line.split("\t")[:-1] for line in log.read_text().splitlines()],
        )

    return copy, run


def tree(folder: Path) -> dict:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != "log"}


def test_the_sourced_files_are_named_here():
    for script in SCRIPTS:
        assert (
            "BASH_SOURCE" in (ROOT / "scripts" / f"{script}.sh").read_text()
        )  # it takes --dry_run through setup_env.sh


@pytest.mark.parametrize("script, preset", CASES)
def test_a_dry_run_shows_commands_and_does_nothing(script, preset, place, tmp_path, monkeypatch, capsys):
    copy, run = place
    before = tree(tmp_path)
    code, shown, errors, calls = run(script, "--dry_run", **(dict(PRESET=preset) if preset else {}))
    assert code == 0 and not calls and tree(tmp_path) == before
    assert all(line.startswith("# no GPU here") for line in errors.splitlines())
    cd, *lines = shown.splitlines()
    assert cd == f"cd {copy}"
    assert lines[:2] == ["python3 -m venv .venv", "source .venv/bin/activate"] and "pip install" in lines[2]
    programs = [name for line in lines for name in re.findall(r"\S+\.py|pytest|ruff", line.split(" | ")[0])]
    assert programs and all(
        name in ("pytest", "ruff") or (ROOT / name).is_file() for name in programs if "/" not in name
    )
    known = ("python", "torchrun", "ruff", "cp")
    assert all(shlex.split(line)[0] in known and "--dry_run" not in line for line in lines[2:])
    monkeypatch.chdir(tmp_path)
    for arguments in {
        tuple(arguments) for line in lines for name, arguments in commands_in(line) if name == "main_mar.py"
    }:
        for flag, value in zip(arguments, arguments[1:]):
            if flag == "--schedule":  # which a command before it makes
                Path(value).parent.mkdir(parents=True, exist_ok=True)
                Path(value).write_text('{"values": {"tau": [1.0, 0.9]}}')
        assert main_mar.main([*arguments, "--dry_run"]) == 0
    capsys.readouterr()


@pytest.mark.parametrize("script, preset", CASES)
def test_what_is_shown_is_what_runs(script, preset, place, tmp_path):
    """In an environment that has everything, whatever else is given, and wherever --dry_run stands.

    What checks the flags of a later command, by its --dry_run, is not shown.
    """
    _, run = place
    venv, out = tmp_path / "venv", tmp_path / "out"
    for folder in (venv, out / "heads" / "modes"):
        folder.mkdir(parents=True)
    shutil.copy(ROOT / "requirements.txt", venv / ".mar_requirements")
    variables = dict(VIRTUAL_ENV=str(venv), OUT=str(out), GPUS="4", VQ16_SCALE="0.2")
    variables |= dict(PRESET=preset) if preset else {}
    more = ["--output_dir", str(out)] if script.startswith("quickstart") else ["--blr", "1e-4"]
    code, shown, errors, calls = run(script, "--dry_run", *more, "--class_labels", "a b", **variables)
    assert (code, errors, calls) == (0, "", [])
    _, *lines = shown.splitlines()
    code, _, errors, calls = run(script, *more, "--class_labels", "a b", **variables)
    assert (code, errors) == (0, "")
    checks, calls = [[c for c in calls if (c[-1] == "--dry_run") == is_check] for is_check in (True, False)]
    assert bool(checks) == (script in ("quickstart", "quickstart_var", "quickstart_maskgil"))
    assert all(any(call[: len(check) - 1] == check[:-1] for call in calls) for check in checks)
    assert [shlex.split(line.split(" | tee ")[0]) for line in lines] == calls
    assert script == "ablate_speed" or any("a b" in words for words in calls)
    assert {word for line in lines if " | tee " in line for word in [Path(line.split(" | tee ")[1])]} <= {
        *out.rglob("*.md")
    }


def test_an_environment_that_is_there_is_neither_made_nor_installed_again(place):
    copy, run = place
    (copy / ".venv" / "bin").mkdir(parents=True)
    (copy / ".venv" / "bin" / "activate").write_text(f"VIRTUAL_ENV={copy}/.venv\n")
    shutil.copy(copy / "requirements.txt", copy / ".venv" / ".mar_requirements")
    code, shown, errors, _ = run("test", "-k", "ragged", "--dry_run")
    assert (code, errors) == (0, "")
    assert shown.splitlines() == [
        f"cd {copy}", "source .venv/bin/activate", "ruff check .", "ruff format --check .", "python -m pytest -k ragged"
    ]  # fmt: skip
    code, _, _, calls = run("test", "-k", "ragged")
    assert code == 0 and calls[-1] == ["python", "-m", "pytest", "-k", "ragged"] and len(calls) == 3


@pytest.mark.parametrize(
    "gpus, shown", [("", "no GPU here; GPUS says how many"), ("two", "'two'"), ("0", "no GPU here")]
)
def test_gpus_that_are_not_there_are_one_line(gpus, shown, place, tmp_path):
    _, run = place
    venv = tmp_path / "venv"
    venv.mkdir()
    shutil.copy(ROOT / "requirements.txt", venv / ".mar_requirements")
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "bin" / "nvidia-smi").chmod(0o755)
    variables = dict(VIRTUAL_ENV=str(venv), PRESET="imagenet", GPUS=gpus)
    code, _, errors, calls = run("paper_mar", **variables)
    assert code == 2 and not calls and len(errors.splitlines()) == 1 and shown in errors


def test_the_leaderboard_keeps_its_steps_from_the_grid(place):
    code, shown, _, _ = place[1]("leaderboard", "--dry_run", STEPS="4 8")
    sampled = [line for line in shown.splitlines() if "sample.py" in line]
    assert code == 0 and all("--num_sampling_steps 8" in line for line in sampled)
    assert {"--num_iter 4 ", "--num_iter 8 ", "--num_iter 4,8"} == {
        name for name in ("--num_iter 4 ", "--num_iter 8 ", "--num_iter 4,8") if any(name in line for line in sampled)
    }


def test_the_demonstration_of_text_measures_one_setting(place, tmp_path):
    """Samples of other flags in the same folder would be measured in place of those asked for."""
    venv, out = tmp_path / "venv", tmp_path / "out"
    for name in ("a_prompts1", "b_prompts1"):
        (out / "samples" / name).mkdir(parents=True)
    venv.mkdir()
    shutil.copy(ROOT / "requirements.txt", venv / ".mar_requirements")
    code, _, errors, calls = place[1]("demo_text", VIRTUAL_ENV=str(venv), OUT=str(out))
    assert code == 2 and errors == f"error: {out}/samples has 2 settings, the table is of one: give another OUT\n"
    assert not [words for words in calls if "--samples" in words]


def test_presets_have_folders_of_their_own(place):
    """Else the second one would go on from the models of the first."""
    shown = [place[1]("ablate_prefix", "--dry_run", PRESET=preset)[1] for preset in ("digits", "cifar10")]
    outs = [{word for word in shlex.split(text) if "output_dir/" in word} for text in shown]
    assert all(outs) and not outs[0] & outs[1]
