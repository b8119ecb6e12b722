"""Metrics of a request: sample.py itself, in a process of its own, which ends when nobody waits for its figures."""

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from sampling.inspector.spec import Spec
from sampling.inspector.work import Busy
from util.evaluation.results import read_results

PROGRAM = Path(__file__).resolve().parents[2] / "sample.py"
LEAST, MOST = 4, 50000  # images that are measured
PAUSE = 0.3  # seconds between two looks at what it has made


class Measuring:
    """Runs one measurement at a time; the worker that draws pictures goes on meanwhile."""

    def __init__(self):
        self.one = threading.Lock()
        self.process = None

    def measure(self, spec: Spec, num_images: int, emit: Callable) -> None:
        """Sample and measure as sample.py does; emit(event), which may raise, says how far it is, then the figures."""
        if spec.changes or spec.redo or spec.edit:
            raise ValueError("steered and edited images are not measured: sample.py has no flags for them")
        if spec.loaded.encoder is not None:
            raise ValueError("images of prompts are not measured: there are no others to compare them with")
        if not self.one.acquire(blocking=False):
            raise Busy("something is being measured already: cancel it, or wait for it")
        try:
            with tempfile.TemporaryDirectory() as folder:
                self._run(spec, num_images, Path(folder), emit)
        finally:
            self.one.release()

    def _run(self, spec: Spec, num_images: int, folder: Path, emit: Callable) -> None:
        command = [sys.executable, str(PROGRAM), *spec.flags(str(folder)), "--num_images", str(num_images)]
        with open(folder / "errors", "w+") as errors:
            options = dict(stdout=subprocess.DEVNULL, stderr=errors, stdin=subprocess.DEVNULL)
            options["env"] = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # see `share_cores`
            self.process = subprocess.Popen(command, **options)
            try:
                while self.process.poll() is None:
                    emit({"made": sum(1 for _ in folder.glob("*/[0-9]*.png")), "of": num_images})
                    with suppress(subprocess.TimeoutExpired):
                        self.process.wait(timeout=PAUSE)
            finally:
                self.stop()
            errors.seek(0)
            lines = [line for line in errors.read().splitlines() if line.startswith(("error:", "sample.py: error:"))]
        if self.process.returncode:
            raise ValueError(lines[-1] if lines else f"sample.py ended with code {self.process.returncode}")
        (row,) = read_results(folder / "results.jsonl")
        kept = ("metrics", "mar_evals", "mlp_evals", "images_per_second", "protocol")
        emit({"measured": {name: row.get(name) for name in kept}})

    def stop(self) -> None:
        """End the process, if one runs."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()  # what it has made goes with its folder
            self.process.wait(timeout=10)
