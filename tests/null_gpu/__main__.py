"""Run a command on the null GPU: python -m tests.null_gpu COMMAND ..."""

import subprocess
import sys
import tempfile
from pathlib import Path

from tests.null_gpu import build, environment

with tempfile.TemporaryDirectory() as folder:
    sys.exit(subprocess.run(sys.argv[1:], env=environment(build(Path(folder)))).returncode)
