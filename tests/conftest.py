"""One thread, and the fixtures that several files share; those of the whole session are left as they were found.

One thread: the tests' operations are tiny, and several threads spend their time waiting for each other.
"""

import os
import shutil

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

# asserts in these show their values as those in tests do
pytest.register_assert_rewrite(
    *(f"tests.helpers_{topic}" for topic in ("generate", "keeping", "latents", "tokenizers"))
)

from models.diffloss import DiffLoss  # noqa: E402
from models.tokenizers import build_tokenizer, ldm  # noqa: E402
from scripts import make_fid_stats  # noqa: E402
from tests.helpers import named_weights, tiny_mar  # noqa: E402
from tests.helpers_diffusion import CHANNELS, WIDTH  # noqa: E402
from tests.helpers_generate import SIDE  # noqa: E402
from tests.helpers_graphs import Watched  # noqa: E402
from tests.helpers_latents import NAMES, TinyKL, write_image  # noqa: E402
from tests.helpers_tokenizers import TINY  # noqa: E402
from training import build  # noqa: E402
from util import dist, graphs  # noqa: E402
from util.images.datasets import build_dataset  # noqa: E402

torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    """Programs that pick a device by themselves pick the CPU in tests marked on_cpu, and in fixtures made for these."""
    if item.get_closest_marker("on_cpu") is None:
        return (yield)
    pick = dist.pick_device
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "pick_device", lambda name: pick("cpu" if name == "auto" else name))
        return (yield)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA here")


@pytest.fixture(scope="session")
def mar():
    """The MAR of 3×3 tokens that the tests of the sampling loop and its rules run."""
    return tiny_mar(img_size=SIDE)


@pytest.fixture(scope="session")
def diffloss():
    """The DiffLoss that the tests of schedule, solvers, sampling and loss run."""
    return named_weights(DiffLoss(CHANNELS, WIDTH, depth=2, width=16), scale=0.2).eval()


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of 8×8 images in three classes, with the odd names of helpers_latents."""
    folder = tmp_path_factory.mktemp("pictures")
    for i, name in enumerate(NAMES):
        write_image(folder / "train" / name, i)
    return folder


@pytest.fixture
def some(tmp_path, pictures):
    """A copy of the pictures, to change."""
    return shutil.copytree(pictures, tmp_path / "some")


@pytest.fixture
def tiny_kl(monkeypatch):
    """--tokenizer tiny:SEED; the function changes the flags of a command."""

    def tokenizer_of(settings, channels):
        kind, _, seed = settings["tokenizer"].partition(":")
        return TinyKL(int(seed)) if kind == "tiny" else build_tokenizer(kind, channels=channels)

    monkeypatch.setattr(build, "tokenizer_of", tokenizer_of)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A folder with one saved autoencoder of each class, under the name of the class."""
    import diffusers

    folder = tmp_path_factory.mktemp("autoencoders")
    for seed, (name, (settings, *_)) in enumerate(TINY.items()):
        torch.manual_seed(seed)
        getattr(diffusers, name)(**settings).save_pretrained(folder / name)
    return folder


@pytest.fixture
def small(monkeypatch):
    """Networks of KL-16's and VQ-16's shape, but narrow."""
    monkeypatch.setattr(ldm, "WIDTHS", (32,) * 5)


@pytest.fixture(scope="session")
def digits():
    """The digits in random order, uint8 (1797, 8, 8, 1)."""
    images = build_dataset("digits").images.permute(0, 2, 3, 1).numpy()
    return images[np.random.default_rng(0).permutation(len(images))]


@pytest.fixture(scope="session")
def stats_file(tmp_path_factory):
    """Statistics of all digits, made by the program."""
    path = tmp_path_factory.mktemp("stats") / "digits.npz"
    assert make_fid_stats.main(["--data", "digits", "--features", "digits", "--out", str(path)]) == 0
    return path


@pytest.fixture
def captured(monkeypatch, capsys):
    """The CPU captures as a GPU does, under its rules; the list of all captures, none of which may fail."""
    monkeypatch.setattr(Watched, "made", [])
    monkeypatch.setitem(graphs.CAPTURES, "cpu", Watched)
    yield Watched.made
    assert "no more CUDA graphs" not in capsys.readouterr().err
