"""What must not change image i: the order of the flags, and what other tests of this list say.

Data workers: test_train.py. Batch size when sampling: test_batch_independence.py (the draws, bit for bit) and
test_sample.py. World size: test_sample.py, test_train.py. Two runs of one command: test_train.py, tests of resuming.
"""

import random
from types import SimpleNamespace

import pytest
import torch

import main_mar
import sample
from tests.test_interrupted_training import TRAIN, pictures  # noqa: F401, a fixture
from training import step
from training.objectives.token import TokenObjective
from util import dist
from util.checkpoint import load_checkpoint

pytestmark = pytest.mark.on_cpu("runs are compared bit for bit, which a GPU promises with --deterministic alone")


@pytest.fixture(autouse=True)
def as_before():
    yield
    dist.set_deterministic(False)


def shuffled(pairs, seed):
    """The words of (flag, value) pairs in another order of the flags."""
    pairs = list(pairs)
    random.Random(seed).shuffle(pairs)
    return [str(word) for pair in pairs for word in pair]


def rounding() -> tuple[bool, bool]:
    """Would CUDA round the factors of products, and of convolutions, to TF32?"""
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("deterministic", [False, True])
def test_products_are_rounded_for_a_model_that_learns_in_float32(deterministic):
    before = rounding()
    dist.set_deterministic(deterministic)
    for dtype, keeps_model, inside in (
        (torch.float32, False, (not deterministic,) * 2),
        (torch.bfloat16, False, before),
        (torch.float32, True, before),  # the real images' features, to which its own are compared, are as they were
    ):
        with step.rounding(SimpleNamespace(dtype=dtype, objective=SimpleNamespace(keeps_model=keeps_model))):
            assert rounding() == inside
        assert rounding() == before


def test_rounding_that_somebody_has_chosen_stays(monkeypatch):
    """torch does not let its flags be read once its newer ones are set."""

    class Chosen:
        @property
        def allow_tf32(self):
            raise RuntimeError("mix of the legacy and new APIs")

    before = torch.backends.cudnn.allow_tf32
    monkeypatch.setattr(torch.backends.cuda, "matmul", Chosen())
    with dist.tf32(not before):
        assert torch.backends.cudnn.allow_tf32 == before


def test_the_order_of_flags_and_deterministic_change_nothing(pictures, tmp_path, monkeypatch):  # noqa: F811
    """Of what is trained, and of the images that come of it."""
    words = [*TRAIN, "--data_path", str(pictures), "--learn", "order,group,tau,cfg", "--epochs", "2"]
    seen, make, prepare = [], main_mar.make_state, TokenObjective.prepare

    def noted(*arguments):
        state = make(*arguments)
        deterministic = torch.are_deterministic_algorithms_enabled
        state.objective.register_forward_pre_hook(lambda *_: seen.append((deterministic(), rounding())))
        return state

    def prepared(*arguments):
        assert rounding() == before, "a tokenizer would find other ids"
        return prepare(*arguments)

    monkeypatch.setattr(main_mar, "make_state", noted)
    monkeypatch.setattr(TokenObjective, "prepare", prepared)
    found, images, before = [], [], rounding()
    for seed in (0, 1):
        run, out, more = tmp_path / f"run{seed}", tmp_path / f"out{seed}", ["--deterministic"] * seed
        assert main_mar.main([*shuffled(zip(words[::2], words[1::2]), seed), "--output_dir", str(run), *more]) == 0
        found.append(load_checkpoint(run))
        flags = {"num_images": 6, "cfg": 2, "infer_mode": "both", "temperature": 0.9, "seed": 3, "num_iter": 2}
        flags |= {"checkpoint": run, "metrics": "none", "eval_bsz": 3, "output_dir": out}
        pairs = [(f"--{name}", value) for name, value in flags.items()]
        assert sample.main([*shuffled(pairs, seed), *more]) == 0
        images.append({str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*.png")})
    half = len(seen) // 2
    assert seen == [(False, (True, True))] * half + [(True, (False, False))] * half and half > 0
    assert torch.are_deterministic_algorithms_enabled() and rounding() == before
    for key in ("model", "model_ema", "heads"):
        assert all(torch.equal(found[0][key][name], found[1][key][name]) for name in found[0][key])
    assert (tmp_path / "run0" / "log.jsonl").read_bytes() == (tmp_path / "run1" / "log.jsonl").read_bytes()
    assert images[0] == images[1] and len(images[0]) == 7  # with the grid
