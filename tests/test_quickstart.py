"""What README promises a new user, with a tiny budget: the two commands and the Python example."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TINY = "--epochs 1 --diffloss_w 16 --diffloss_d 1 --diffusion_batch_mul 1 --buffer_size 2 --batch_size 256"
TINY += " --num_images 20 --num_iter 2 --num_sampling_steps 2 --seed 0 --bank 32"


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """(a function that runs it, output of the first run, its folder)."""
    out = tmp_path_factory.mktemp("quickstart")
    shutil.copy(ROOT / "util/evaluation/digits_classifier.npz", out / "judge.npz")  # in place of one that is trained

    def run():
        return output_of("quickstart.sh", *TINY.split(), "--output_dir", str(out))

    return run, run(), out


def ended(script: str, *words: str) -> subprocess.CompletedProcess:
    """A script, run in this environment."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix, "PATH": path}
    command = ["bash", f"scripts/{script}", *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def output_of(script: str, *words: str) -> str:
    """What a script prints that succeeds."""
    done = ended(script, *words)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def check_figures(images: str, figures: str, picture: str, out: Path) -> None:
    """Three lines, which name 20 images, their figures and their picture, which is in the folder."""
    assert images.startswith("20 images in ")
    for name in ("FID", "IS", "KID", "precision", "recall", "SVC accuracy", "Fréchet (pixels)"):
        assert re.search(rf"{re.escape(name)} -?\d", figures)
    check_picture(picture, out)


def check_picture(line: str, out: Path) -> None:
    path = Path(line.removeprefix("picture: "))
    assert path.read_bytes().startswith(b"\x89PNG") and out in path.parents


def table_of(output: str) -> list[str]:
    """What a row of the quickstart's table is of, row after row."""
    return [line.split(" | ")[0].removeprefix("| ") for line in output.splitlines() if line.startswith("| ")][2:]


@pytest.mark.slow
def test_quickstart_ends_with_a_table_of_all_modes_and_the_picture(quickstart):
    _, output, out = quickstart
    lines = output.strip().splitlines()
    check_picture(lines[-1], out)
    assert "/both_" in lines[-1]
    start = max(i for i, line in enumerate(lines) if line.startswith("20 images in "))  # of the last setting: both
    check_figures(*lines[start : start + 3], out)
    rows = table_of(output)
    assert rows[0].startswith("cfg 1.8 linear") and rows[1:4] == ["guidance", "policy", "both"] and len(rows) == 8


@pytest.mark.slow
def test_quickstart_run_again_reuses_what_is_there(quickstart):
    run, first, out = quickstart
    measured = [(out / name / "results.jsonl").read_text() for name in ("hand", "modes")]
    second = run()
    assert "is trained already" in second and "already in" in second
    assert table_of(second) == table_of(first) and second.splitlines()[-1] == first.splitlines()[-1]
    assert [(out / name / "results.jsonl").read_text() for name in ("hand", "modes")] == measured


@pytest.mark.slow
def test_the_quickstart_of_maskgil_ends_with_the_figures(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENIZER_EPOCHS", "0.2")
    words = "--epochs 1 --batch_size 256 --num_images 20 --num_iter 2 --seed 0".split()
    output = output_of("quickstart_maskgil.sh", *words, "--output_dir", str(tmp_path))
    check_figures(*output.strip().splitlines()[-3:], tmp_path)


@pytest.mark.slow
def test_the_quickstart_of_var_and_its_second_run(tmp_path):
    words = "--epochs 1 --batch_size=256 --num_images 20 --cfg 2".split()
    first, second = (output_of("quickstart_var.sh", *words, "--output_dir", str(tmp_path)) for _ in range(2))
    check_figures(*first.strip().splitlines()[-3:], tmp_path)
    assert "_cfg2_" in first and (tmp_path / "tokenizer" / "scales.png").is_file()
    assert "is trained already" in second and second.strip().splitlines()[-3:] == first.strip().splitlines()[-3:]


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, words, shown",
    [
        ("quickstart_var.sh", "--lr -1", "--lr: invalid value '-1'"),
        ("quickstart_maskgil.sh", "--lr -1", "--lr: invalid value '-1'"),
        # of sampling, where --cfg may have several values
        ("quickstart_maskgil.sh", "--cfg 1.5,2 --order nosuch", "--order: invalid value 'nosuch'"),
        ("quickstart.sh", "--epochs -1", "--epochs: invalid value '-1'"),
        ("quickstart.sh", "--reward digits", "at least two kinds, got 'digits'"),  # of the heads
        ("quickstart.sh", "--num_images 0", "--num_images: invalid value '0'"),
        ("quickstart.sh", "--num_images 3", "need 4 images, got 3"),
        ("quickstart.sh", "--seed 1,x", "--seed: invalid value 'x'"),
        ("quickstart.sh", "--output_dir=", "--output_dir: invalid value ''"),
    ],
)
def test_a_wrong_flag_is_an_error_before_anything_is_trained(script, words, shown, tmp_path):
    out = tmp_path / "out"
    done = ended(script, "--output_dir", str(out), *words.split())
    assert done.returncode == 2 and not out.exists()
    assert len(done.stderr.splitlines()) == 1 and shown in done.stderr


@pytest.mark.slow
def test_the_python_example_of_readme(quickstart, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(code.strip().splitlines()) <= 12
    monkeypatch.chdir(quickstart[2])
    exec(code.replace("output_dir/quickstart", str(quickstart[2])), {})
    assert (quickstart[2] / "digits.png").read_bytes().startswith(b"\x89PNG")
