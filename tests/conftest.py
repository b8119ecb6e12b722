"""One thread: the tests' operations are tiny, and several threads spend their time waiting for each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

torch.set_num_threads(1)
