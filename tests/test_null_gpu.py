"""The tests of CUDA on a GPU that any machine has (`tests/null_gpu`), and what a batch of MAR-B asks of it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.null_gpu import build, environment

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
FILES = [path.name for path in sorted(ROOT.glob("tests/test_*.py")) if "mark.gpu" in path.read_text()]
# its one test asks the profiler for kernels
FILES = [(name, "gpu") for name in FILES if name not in ("test_bench.py", Path(__file__).name)]
FILES += [("test_online_evaluation.py", "not slow")]  # where bf16 is the default


def run(words: list, variables: dict) -> subprocess.CompletedProcess:
    options = dict(cwd=ROOT, env=variables, capture_output=True, text=True, timeout=1800)
    return subprocess.run([sys.executable, *words], **options)


@pytest.fixture(scope="module")
def null_gpu(tmp_path_factory):
    """The environment of a process that has it."""
    if not (torch.version.cuda or "").startswith("13"):
        pytest.skip(f"it is CUDA 13's runtime, this PyTorch has CUDA {torch.version.cuda}")
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    return environment(build(tmp_path_factory.mktemp("null_gpu")))


def counted(call: str, variables: dict) -> list[dict]:
    """What a function of `tests.null_gpu.batches` gives in a process with these variables, those of the GPU."""
    words = f"import json; from tests.null_gpu import batches; print(json.dumps({call}))"
    done = run(["-c", words], variables)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name, marks", FILES)
def test_tests_of_cuda_pass(name, marks, null_gpu):
    """Slow ones of them too."""
    words = ["-m", "pytest", "-p", "tests.null_gpu.emulation", "-q", "-n", "0", "-m", marks, f"tests/{name}"]
    done = run(words, null_gpu)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
    assert " passed" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("mode, most", [("baseline", 110), ("both", 260)])
def test_a_batch_of_mar_b_once_all_is_captured(mode, most, null_gpu):
    """--fast, 16 steps: two whole passes, of which each has a replay with label and one without, and partial ones."""
    first, second, *later = counted(f"batches.sampling(batches.FAST, 16, 16, mode='{mode}')", null_gpu)
    assert second["captures"] > 0 and len(later) == 2
    for batch in later:
        assert batch["captures"] == 0
        assert batch["replays"] == 16 + 2 * 2 + 14  # draws, whole passes, partial ones
        assert batch["waits"] <= 16 + 3
        assert (batch["kernels"] + batch["copies"]) / 16 < most
        assert batch["kernels_in_replays"] < 16 * 1000
        assert batch["gb"] < 3.5  # 1.3 of it are weights


@pytest.mark.parametrize("settings", ["FAST", "PUBLISHED"])
def test_a_compiled_batch_of_mar_b(settings, null_gpu):
    """A few programs, made in the first batch; fewer kernels; else what is asked for is the same."""
    plain, compiled = (counted(f"batches.sampling(batches.{settings}, 4, 8, {way})", null_gpu) for way in (False, True))
    assert 5 < sum(batch["programs"] for batch in compiled) <= 16 and not any(x["programs"] for x in compiled[1:])
    for one, other in zip(plain[2:], compiled[2:]):
        assert all(other[name] == one[name] for name in ("replays", "waits", "captures", "kernels", "copies"))
        assert other["kernels_in_replays"] < 0.9 * one["kernels_in_replays"]


@pytest.mark.parametrize("dtype, compiled, most", [("bf16", False, 2400), ("bf16", True, 2000), ("fp32", False, 1800)])
def test_a_training_step_of_mar_b(dtype, compiled, most, null_gpu):
    steps = counted(f"batches.training('{dtype}', 2, {compiled})", null_gpu)
    assert sum(step["programs"] for step in steps) <= 10 * compiled and not steps[-1]["programs"]
    assert steps[-1]["waits"] == 1 and steps[-1]["allocations"] <= 10
    assert steps[-1]["kernels"] + steps[-1]["copies"] < most
