"""scripts/paper_*.sh, run with stand-ins for python and torchrun that note their arguments: every command is then
given to its program with --dry_run, with the values that the script's loops and variables have put there."""

import os
import subprocess
from pathlib import Path

import pytest

import main_mar
import sample
from scripts import make_table, measure_reconstruction, train_tokenizer
from scripts.download_weights import LLAMAGEN_FILES, VAR_FILES
from tests.test_sample import train_tiny

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path.stem for path in ROOT.glob("scripts/paper_*.sh") if path.stem != "paper_env")
PROGRAMS = {"main_mar.py": main_mar.main, "sample.py": sample.main}
PROGRAMS |= {"scripts/measure_reconstruction.py": measure_reconstruction.main}
PROGRAMS |= {"scripts/train_tokenizer.py": train_tokenizer.main}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return train_tiny(tmp_path_factory.mktemp("checkpoint"), "--batch_size", 600)


@pytest.fixture
def run(tmp_path):
    """(script, variables) -> (exit code, standard error, [(launcher's words, program, arguments)])."""
    log, bin_, venv, out = (tmp_path / name for name in ("log", "bin", "venv", "out"))
    for folder in (bin_, venv, out / "reconstruction"):
        folder.mkdir(parents=True)
    (venv / ".mar_requirements").write_bytes((ROOT / "requirements.txt").read_bytes())  # nothing to install
    for name in ("python", "torchrun"):
        (bin_ / name).write_text(f"#!/bin/sh\nprintf '%s\\t' {name} \"$@\" >> {log}\necho >> {log}\n")
        (bin_ / name).chmod(0o755)

    def run(script, *arguments, **variables):
        log.write_text("")
        environment = dict(PATH=f"{bin_}:{os.environ['PATH']}", VIRTUAL_ENV=str(venv), OUT=str(out), **variables)
        command = ["bash", str(ROOT / "scripts" / f"{script}.sh"), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        commands = []
        for line in log.read_text().splitlines():
            words = line.split("\t")[:-1]
            at = next(i for i, word in enumerate(words) if word.endswith(".py"))
            commands.append((words[:at], words[at], words[at + 1 :]))
        return done.returncode, done.stderr, commands

    return run


def value(arguments, flag):
    """What follows a flag."""
    return arguments[arguments.index(flag) + 1]


IMAGENET = dict(PRESET="imagenet", IMAGENET_PATH="/imagenet", GPUS="8", VQ16_SCALE="0.2")


@pytest.mark.parametrize("variables", [dict(PRESET="digits"), IMAGENET], ids=["digits", "imagenet"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_command_is_valid_and_all_results_reach_the_table(
    script, variables, run, checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("models.loading._check_given", lambda *a, **k: None)  # a tiny one stands in for those named
    code, errors, commands = run(script, **variables)
    assert (code, errors) == (0, "")
    *work, (_, program, table) = commands
    assert program == "scripts/make_table.py"
    written = set()
    for launcher, program, arguments in work:
        if program == "scripts/make_table.py":
            assert make_table.parse(arguments).results
            continue
        assert launcher == (["torchrun", "--nproc_per_node=8"] if variables is IMAGENET else ["python"]) or (
            program == "scripts/measure_reconstruction.py"
        )
        if program == "sample.py":
            written.add(f"{value(arguments, '--output_dir')}/results.jsonl")
            arguments = [*arguments, "--checkpoint", str(checkpoint)]  # the last one counts
        assert PROGRAMS[program]([*arguments, "--dry_run"]) == 0, arguments
    parsed = make_table.parse(table)
    assert {str(path) for path in parsed.results} == written and written
    assert parsed.plot and parsed.csv and parsed.x and parsed.metrics == "fid,is_mean"
    capsys.readouterr()


def test_the_published_settings(run):
    _, _, commands = run("paper_mar", **IMAGENET)
    trained, sampled = (
        {value(a, flag): a for _, program, a in commands if program == name}
        for name, flag in (("main_mar.py", "--preset"), ("sample.py", "--model"))
    )
    assert trained.keys() == sampled.keys() == {"mar_base", "mar_large", "mar_huge"}
    for name, cfg in (("mar_base", "1,2.9"), ("mar_large", "1,3.0"), ("mar_huge", "1,3.2")):
        assert int(value(trained[name], "--accum_iter")) * 8 * 64 == 2048
        assert (value(sampled[name], "--cfg"), value(sampled[name], "--num_iter")) == (cfg, "256")
        assert value(sampled[name], "--num_images") == "50000"
        assert value(sampled[name], "--checkpoint") == value(trained[name], "--output_dir")
    # published weights are not trained
    _, _, commands = run("paper_mar", **IMAGENET, WEIGHTS="published", MODELS="mar_huge")
    (arguments,) = [arguments for _, program, arguments in commands if program != "scripts/make_table.py"]
    assert value(arguments, "--checkpoint") == "published/mar_huge"


BATCHES = dict(paper_mar=2048, paper_mlp_width=2048, paper_tokenizers=2048, paper_llamagen=256, paper_maskgil=256)


@pytest.mark.parametrize("script", BATCHES)
def test_the_published_batch_on_any_number_of_gpus_that_divides_it(script, run):
    for gpus in (1, 4, 32, 128):
        code, _, commands = run(script, **{**IMAGENET, "GPUS": str(gpus)})
        trained = [arguments for _, program, arguments in commands if program == "main_mar.py"]
        assert code == 0 and trained
        for words in trained:
            parts = int(value(words, "--accum_iter")) if "--accum_iter" in words else 1
            assert gpus * int(value(words, "--batch_size")) * parts == BATCHES[script]


@pytest.mark.parametrize("script", [*BATCHES, "paper_var"])
def test_gpus_that_do_not_divide_the_published_batch_are_refused(script, run):
    """Before anything runs; weights that are there are only sampled, on any number of them."""
    code, errors, commands = run(script, **{**IMAGENET, "GPUS": "5"})
    assert code == 2 and not commands and len(errors.splitlines()) == 1 and "got 5; valid up to 64: 1 2" in errors
    if script == "paper_var":  # of whose models the largest has another batch
        assert run(script, **{**IMAGENET, "GPUS": "3"})[::2] == (2, [])
    if script in ("paper_mar", "paper_llamagen", "paper_var"):
        assert run(script, **{**IMAGENET, "GPUS": "5"}, WEIGHTS="published")[0] == 0


def test_the_published_settings_of_llamagen(run):
    models = "llamagen_ar_b,llamagen_ar_xl_384"
    _, _, commands = run("paper_llamagen", **IMAGENET, MODELS=models)
    trained, sampled = ([a for _, program, a in commands if program == name] for name in ("main_mar.py", "sample.py"))
    assert [int(value(a, "--batch_size")) * 8 for a in trained] == [256, 256]
    assert [value(a, "--output_dir") for a in trained] == [value(a, "--checkpoint") for a in sampled]
    for arguments in (trained, sampled):
        assert [(value(a, "--model"), value(a, "--img_size")) for a in arguments] == [
            ("llamagen_ar_b", "256"), ("llamagen_ar_xl", "384")
        ]  # fmt: skip
    assert [(value(a, "--cfg"), value(a, "--cfg_schedule")) for a in sampled] == [
        ("1,2.0", "constant"), ("1,1.75", "constant")
    ]  # fmt: skip
    _, _, commands = run("paper_llamagen", **IMAGENET, MODELS=models, WEIGHTS="pretrained_models")
    files = [value(a, "--checkpoint") for _, program, a in commands if program == "sample.py"]
    names = ("llamagen_ar_b", "llamagen_ar_xl_384")
    assert files == [f"pretrained_models/{LLAMAGEN_FILES[name]}" for name in names] and len(commands) == 3


def test_the_published_settings_of_var(run):
    models = "var_d16,var_d30,var_d36_s"
    for gpus in ("2", "8", "32"):
        _, _, commands = run("paper_var", **{**IMAGENET, "GPUS": gpus}, MODELS=models)
        trained = [arguments for _, program, arguments in commands if program == "main_mar.py"]
        assert [value(a, "--preset") for a in trained] == models.split(",")
        images = [int(gpus) * int(value(a, "--batch_size")) * int(value(a, "--accum_iter")) for a in trained]
        assert images == [768, 1024, 768]
    sampled = [arguments for _, program, arguments in commands if program == "sample.py"]
    assert [value(a, "--checkpoint") for a in sampled] == [value(a, "--output_dir") for a in trained]
    drawn = {tuple(value(a, flag) for flag in ("--cfg", "--top_k", "--top_p")) for a in sampled}
    assert drawn == {("1,2.5", "900", "0.96")}
    _, _, commands = run("paper_var", **IMAGENET, MODELS=models, WEIGHTS="pretrained_models")
    sampled = [arguments for _, program, arguments in commands if program == "sample.py"]
    assert [(value(a, "--model"), value(a, "--checkpoint")) for a in sampled] == [
        (name, f"pretrained_models/{VAR_FILES[name]}") for name in models.split(",")
    ]
    assert len(commands) == 4  # published weights are not trained


def test_variables_make_an_experiment_smaller_and_more_arguments_go_on(run):
    small = dict(PRESET="digits", WIDTHS="8,16", SEEDS="3,4", EPOCHS="2", NUM_IMAGES="20")
    _, _, commands = run("paper_mlp_width", "--batch_size", "32", **small)
    trained = [a for _, program, a in commands if program == "main_mar.py"]
    assert [(value(a, "--diffloss_w"), value(a, "--seed")) for a in trained] == [
        ("8", "3"), ("8", "4"), ("16", "3"), ("16", "4")
    ]  # fmt: skip
    assert all((value(a, "--epochs"), value(a, "--batch_size")) == ("2", "32") for a in trained)
    sampled = [a for _, program, a in commands if program == "sample.py"]
    assert [value(a, "--seed") for a in sampled] == ["3", "4"] * 2
    assert {value(a, "--num_images") for a in sampled} == {"20"}
    assert len({value(a, "--checkpoint") for a in sampled}) == 4


@pytest.mark.parametrize(
    "script, variables, shown",
    [
        ("paper_speed", dict(PRESET="nope"), "'nope'"),
        ("paper_mar", dict(IMAGENET, MODELS="mar_base,mar_big"), "'mar_big'"),
        ("paper_llamagen", dict(IMAGENET, MODELS="llamagen_ar_b,llamagen_ar_h"), "'llamagen_ar_h'"),
        ("paper_var", dict(IMAGENET, MODELS="var_d16,var_d36"), "'var_d36'"),
        ("paper_tokenizers", dict(IMAGENET, TOKENIZERS="kl16,vq17"), "'vq17'"),
        ("paper_tokenizers", dict(IMAGENET, TOKENIZERS="kl16,vq16", VQ16_SCALE=""), "VQ16_SCALE"),
    ],
)
def test_a_wrong_variable_is_one_line_before_any_command(script, variables, shown, run):
    code, errors, commands = run(script, **variables)
    assert code == 2 and shown in errors and len(errors.splitlines()) == 1 and not commands
