"""What must not change image i: the order of the flags, and what other tests of this list say.

Data workers: test_train.py. Batch size when sampling: test_generate.py (the draws, bit for bit), test_sample.py. World
size: test_sample.py, test_train.py. Two runs of one command: test_train.py, tests of resuming.
"""

import random

import pytest
import torch

import main_mar
import sample
from tests.test_sample import train_tiny
from util import dist
from util.checkpoint import load_checkpoint


@pytest.fixture(autouse=True)
def as_before():
    yield
    dist.set_deterministic(False)


def shuffled(pairs, seed):
    """The words of (flag, value) pairs in another order of the flags."""
    pairs = list(pairs)
    random.Random(seed).shuffle(pairs)
    return [str(word) for pair in pairs for word in pair]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return train_tiny(tmp_path_factory.mktemp("checkpoint"))


def test_the_order_of_flags_changes_no_image(checkpoint, tmp_path):
    flags = {"checkpoint": checkpoint, "num_images": 6, "cfg": 2, "order": "random", "temperature": 0.9, "seed": 3}
    flags |= {"num_iter": 2, "metrics": "none", "eval_bsz": 3, "device": "cpu"}
    found = []
    for seed in (0, 1):
        pairs = [(f"--{name}", value) for name, value in flags.items()]
        out = tmp_path / str(seed)
        assert sample.main([*shuffled(pairs, seed), "--output_dir", str(out), *["--deterministic"] * seed]) == 0
        found.append({str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*.png")})
    assert found[0] == found[1] and len(found[0]) == 7  # with the grid; also: nothing here needs --deterministic


def test_the_order_of_flags_and_deterministic_change_no_training(tmp_path, monkeypatch):
    flags = "--preset digits --epochs 1 --batch_size 600 --diffloss_w 16 --diffloss_d 1 --diffusion_batch_mul 1"
    flags += " --buffer_size 2 --num_iter 2 --num_sampling_steps 2 --learn order,group,tau,cfg --device cpu"
    words = flags.split()
    seen = []
    make = main_mar.new_state
    monkeypatch.setattr(
        main_mar, "new_state", lambda *a: seen.append(torch.are_deterministic_algorithms_enabled()) or make(*a)
    )
    found = []
    for seed in (0, 1):
        pairs = zip(words[::2], words[1::2])
        out = ["--output_dir", str(tmp_path / str(seed)), *["--deterministic"] * seed]
        assert main_mar.main([*shuffled(pairs, seed), *out]) == 0
        found.append(load_checkpoint(tmp_path / str(seed)))
    assert seen == [False, True]
    for key in ("model", "model_ema", "heads"):
        assert all(torch.equal(found[0][key][name], found[1][key][name]) for name in found[0][key])
    assert (tmp_path / "0" / "log.jsonl").read_bytes() == (tmp_path / "1" / "log.jsonl").read_bytes()
