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


def run(words: list, environment: dict) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def null_gpu(tmp_path_factory):
    """The environment of a process that has it."""
    if not (torch.version.cuda or "").startswith("13"):
        pytest.skip(f"it is CUDA 13's runtime, this PyTorch has CUDA {torch.version.cuda}")
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    return environment(build(tmp_path_factory.mktemp("null_gpu")))


@pytest.mark.parametrize("name, marks", FILES)
def test_tests_of_cuda_pass(name, marks, null_gpu):
    """Slow ones of them too."""
    words = ["-m", "pytest", "-p", "tests.null_gpu.emulation", "-q", "-n", "0", "-m", marks, f"tests/{name}"]
    done = run(words, null_gpu)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
    assert " passed" in done.stdout.splitlines()[-1]


def test_a_batch_of_mar_b_once_all_is_captured(null_gpu):
    """--fast, 16 steps: two whole passes, of which each has a replay with label and one without, and partial ones."""
    words = "import json; from tests.null_gpu import batches; print(json.dumps(batches.sampling(batches.FAST, 16, 16)))"
    done = run(["-c", words], null_gpu)
    assert done.returncode == 0, done.stderr[-5000:]
    first, second, *later = json.loads(done.stdout)
    assert second["captures"] > 0 and len(later) == 2
    for batch in later:
        assert batch["captures"] == 0
        assert batch["replays"] == 16 + 2 * 2 + 14  # draws, whole passes, partial ones
        assert batch["waits"] <= 16 + 3
        assert (batch["kernels"] + batch["copies"]) / 16 < 110
        assert batch["kernels_in_replays"] < 16 * 1000
        assert batch["gb"] < 3.5  # 1.3 of it are weights


@pytest.mark.parametrize("dtype, most", [("bf16", 2500), ("fp32", 1800)])
def test_a_training_step_of_mar_b(dtype, most, null_gpu):
    words = f"import json; from tests.null_gpu import batches; print(json.dumps(batches.training('{dtype}', 2)))"
    done = run(["-c", words], null_gpu)
    assert done.returncode == 0, done.stderr[-5000:]
    last = json.loads(done.stdout)[-1]
    assert last["waits"] == 1 and last["allocations"] <= 10
    assert last["kernels"] + last["copies"] < most
