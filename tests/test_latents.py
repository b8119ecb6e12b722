"""Cached latents: what is on disk, interrupted and damaged caches, and training from them."""

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import build
import engine_mar
import main_mar
from models.tokenizers import build_tokenizer
from models.tokenizers.latent import Tokenizer
from scripts import bench_loader, cache_latents
from util import dist, latent_files
from util.args import run_main
from util.data import MemoryDataset, build_dataset
from util.fid_stats import FIDStats, save_fid_stats
from util.latent_files import WRITERS, image_names
from util.latents import npz_path, open_latents

FORMATS = list(WRITERS)
# the same name in several classes, in a folder of a class, with two endings; names that are no ASCII
NAMES = [f"{c}/{n}" for c in ("7", "a b", "Été ☀") for n in ("0.png", "1.png", "ñ'\".png", "1.jpg.png")] + [
    "Été ☀/deep/0.png"
]
NUM = len(NAMES)
SMALL = "--data imagefolder --tokenizer pixel --img_size 8 --device cpu --num_workers 0".split()
CACHE = [*SMALL, "--batch_size", "2", "--shard_size", "6"]  # units of packed: 0..5, 6..11, 12
TRAIN = "--model mar_tiny --buffer_size 2 --attn_dropout 0 --proj_dropout 0 --diffloss_w 16 --diffloss_d 1".split()
TRAIN += "--diffusion_batch_mul 1 --batch_size 4 --epochs 2 --blr 0.02 --warmup_epochs 0 --num_iter 2".split()
TRAIN += "--num_sampling_steps 2 --eval_freq 100".split()


class TinyKL(Tokenizer):
    """A tokenizer with a posterior, as KL-16 has: one convolution at stride 2; other seeds are other weights."""

    def __init__(self, seed: int = 0):
        super().__init__("tiny", stride=2, channels=2, image_channels=3, gaussian=True, scale=0.5)
        torch.manual_seed(seed)
        self.conv = torch.nn.Conv2d(3, 4, 2, stride=2).requires_grad_(False)

    def _moments(self, images):
        return self.conv(images)

    def _images(self, raw):
        return torch.nn.functional.interpolate(raw[:, [0, 1, 0]], scale_factor=2)


@pytest.fixture
def tiny_kl(monkeypatch):
    """--tokenizer tiny:SEED; the function changes the flags of a command."""

    def tokenizer_of(settings, channels):
        kind, _, seed = settings["tokenizer"].partition(":")
        return TinyKL(int(seed)) if kind == "tiny" else build_tokenizer(kind, channels=channels)

    monkeypatch.setattr(build, "tokenizer_of", tokenizer_of)


def write_image(path: Path, seed: int, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, format="png")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i, name in enumerate(NAMES):
        write_image(folder / "train" / name, i)
    return folder


@pytest.fixture
def some(tmp_path, pictures):
    """A copy of the pictures, to change."""
    return shutil.copytree(pictures, tmp_path / "some")


def cache(data, folder, *flags) -> Path:
    """Run cache_latents.py, which must end well."""
    argv = [*CACHE, "--data_path", str(data), "--cached_path", str(folder), *map(str, flags)]
    assert run_main(cache_latents.main, argv) == 0
    return folder


def refused(main, capsys, *argv) -> str:
    """The one line on stderr of a command that must end with code 2."""
    capsys.readouterr()
    assert run_main(main, [*map(str, argv)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "%|" not in line]  # a bar
    return line


def content(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def losses(monkeypatch, folder, *flags) -> list[float]:
    """The loss of each training step."""
    found, step = [], engine_mar.forward_backward

    def noted(*arguments):
        terms = step(*arguments)
        found.append(terms["loss"].item())
        return terms

    with monkeypatch.context() as patch:
        patch.setattr(engine_mar, "forward_backward", noted)
        assert main_mar.main([*SMALL, *TRAIN, "--output_dir", str(folder), *map(str, flags)]) == 0
    return found


# ------------------------------------------------------------------------------------------------------ what is on disk


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_cache_holds_the_moments_of_all_images_and_their_mirror_images(pictures, tmp_path, tiny_kl, format, workers):
    folder = cache(pictures, tmp_path / "c", "--format", format, "--tokenizer", "tiny:0", "--num_workers", workers)
    images, latents, tokenizer = (
        build_dataset("imagefolder", data_path=pictures, img_size=8),
        open_latents(folder),
        TinyKL(),
    )
    assert len(latents) == len(images) == NUM and latents.classes == images.classes
    assert (latents.img_size, latents.channels, latents.flip, latents.num_broken) == (8, 3, True, 0)
    for (pair, label, i), (image, expected, j) in zip(latents, images, strict=True):
        pixels = torch.stack([image, image.flip(-1)]).float() / 127.5 - 1
        assert (label, i) == (expected, j) and pair.dtype == torch.float32
        torch.testing.assert_close(pair, tokenizer.encode_moments(pixels))
        assert not torch.equal(pair[0], pair[1])
    latents.check(tokenizer, "tiny")
    index = json.loads((folder / "index.json").read_text())
    assert sorted(index["names"]) == sorted(NAMES) and not index["broken"]
    assert not [name for name in content(folder) if name.endswith(".tmp")]


def test_npz_is_mars_layout(pictures, tmp_path):
    """One file an image, in the class's folder, under the image's whole name."""
    folder = cache(pictures, tmp_path / "c", "--format", "npz")
    assert {name for name in content(folder) if name.endswith(".npz")} == {f"{name}.npz" for name in NAMES}
    for name in NAMES:
        image = np.asarray(Image.open(pictures / "train" / name)).transpose(2, 0, 1) / 127.5 - 1
        with np.load(folder / f"{name}.npz") as file:
            assert set(file) == {"moments", "moments_flip"} and file["moments"].dtype == np.float32
            np.testing.assert_allclose(file["moments"], image, atol=1e-6)
            np.testing.assert_allclose(file["moments_flip"], image[:, :, ::-1], atol=1e-6)


def test_a_cache_that_mar_wrote_is_read(pictures, tmp_path, monkeypatch, capsys):
    """Its folder has no index: classes are the sub-folders, and nobody can say which tokenizer made it."""
    ours = cache(pictures, tmp_path / "ours", "--format", "npz")
    mars = tmp_path / "mars"
    for name in NAMES:
        (mars / name).parent.mkdir(parents=True, exist_ok=True)
        with np.load(ours / f"{name}.npz") as file:
            np.savez(mars / f"{name}.npz", moments=file["moments"], moments_flip=file["moments_flip"])
    latents = open_latents(mars, 8)
    assert latents.classes == ["7", "a b", "Été ☀"] and len(latents) == NUM and latents.flip
    labels = {Path(path).relative_to(mars).as_posix(): label for path, label in latents.samples}
    assert labels == {f"{name}.npz": latents.classes.index(name.split("/")[0]) for name in NAMES}
    capsys.readouterr()
    assert len(losses(monkeypatch, tmp_path / "out", "--use_cached", "--cached_path", mars)) == 2 * (NUM // 4)
    assert "only their shape is checked" in capsys.readouterr().out
    damaged = mars / f"{NAMES[3]}.npz"
    whole = damaged.read_bytes()
    damaged.write_bytes(bytes(300))
    told = refused(cache_latents.main, capsys, "--cached_path", mars, "--verify")
    assert f"{NAMES[3]}.npz is damaged" in told and "main_cache.py" in told and "pickle" not in told
    damaged.write_bytes(whole)
    assert "(3, 8, 8)" in refused(main_mar.main, capsys, *SMALL, *TRAIN, "--use_cached", "--cached_path", mars,
                                  "--img_size", 16, "--output_dir", tmp_path / "no")  # fmt: skip


def test_half_precision_is_half_the_size(pictures, tmp_path):
    whole, half = (open_latents(cache(pictures, tmp_path / d, "--cache_dtype", d)) for d in ("float32", "float16"))
    assert half[3][0].dtype == torch.float16
    torch.testing.assert_close(half[3][0].float(), whole[3][0], rtol=1e-3, atol=1e-3)


def test_workers_that_do_not_fork_get_no_copy_of_the_files(pictures, tmp_path):
    """Pickled, a memory map is all its bytes."""
    import pickle

    latents = open_latents(cache(pictures, tmp_path / "c"))
    again = pickle.loads(pickle.dumps(latents))
    assert not again.open and torch.equal(again[NUM - 1][0], latents[NUM - 1][0])


def test_names_stay_inside_the_folder(tmp_path, pictures, capsys):
    for name in ("../x", "/x", "a/../../x", ""):
        with pytest.raises(ValueError, match="outside"):
            npz_path(tmp_path, name)
    fashion = MemoryDataset(
        torch.zeros(3, 1, 2, 2, dtype=torch.uint8), [0, 1, 0], ["T-shirt/top", "Ankle boot"], flip=True
    )
    assert image_names(fashion) == ["T-shirt%2Ftop/000000", "Ankle boot/000001", "T-shirt%2Ftop/000002"]
    folder = cache(pictures, tmp_path / "c", "--format", "npz")
    index = json.loads((folder / "index.json").read_text())
    index["names"][0] = "../../secret"
    (folder / "index.json").write_text(json.dumps(index))
    assert "secret" in refused(cache_latents.main, capsys, "--cached_path", folder, "--verify")


def test_data_sets_without_files_have_caches_too(tmp_path):
    flags = ["--device", "cpu", "--batch_size", "512", "--cached_path", str(tmp_path / "c")]
    assert cache_latents.main(flags) == 0  # no data set named: the digits, as in main_mar.py
    latents, digits = open_latents(tmp_path / "c", 8), build_dataset("digits")
    assert not latents.flip and latents.channels == 1 and latents.classes == digits.classes
    assert latents.labels == digits.labels.tolist()
    torch.testing.assert_close(latents[5][0][0], digits[5][0].float() / 127.5 - 1)


@pytest.mark.parametrize("format", FORMATS)
def test_images_that_cannot_be_read_are_left_out_and_named(some, tmp_path, capsys, format):
    for name in (NAMES[1], NAMES[12]):  # the latter is a file of the packed format for itself
        (some / "train" / name).write_text("no picture")
    with pytest.warns(UserWarning, match="broken image skipped"):
        folder = cache(some, tmp_path / "c", "--format", format)
    assert "2 that could not be read" in capsys.readouterr().out
    index, latents = json.loads((folder / "index.json").read_text()), open_latents(folder)
    assert index["broken"] == [NAMES[1], NAMES[12]] and set(index["names"]) == set(NAMES) - set(index["broken"])
    images = build_dataset("imagefolder", data_path=some, img_size=8)
    for name, (pair, _, _) in zip(index["names"], latents, strict=True):
        at = [Path(path).relative_to(images.folder).as_posix() for path, _ in images.samples].index(name)
        torch.testing.assert_close(pair[0], images[at][0].float() / 127.5 - 1)
    before = content(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cache(some, folder, "--format", format)
    assert content(folder) == before


# ------------------------------------------------------------------------------------------ interrupted, damaged, other


@pytest.mark.parametrize("format", FORMATS)
def test_an_interrupted_run_goes_on_and_ends_with_the_same_files(pictures, tmp_path, monkeypatch, capsys, format):
    whole = content(cache(pictures, tmp_path / "whole", "--format", format))
    folder, calls = tmp_path / "c", []

    def interrupted(save):
        def saving(file, *arrays, **named):
            calls.append(file)
            if len(calls) == 2:
                file.write(b"half")
                raise KeyboardInterrupt
            save(file, *arrays, **named)

        return saving

    argv = [*CACHE, "--data_path", str(pictures), "--cached_path", str(folder), "--format", format]
    with monkeypatch.context() as patch:
        for name in ("save", "savez"):
            patch.setattr(latent_files.np, name, interrupted(getattr(np, name)))
        assert run_main(cache_latents.main, argv) == 130
    assert not (folder / "index.json").exists()
    assert content(folder).items() < whole.items()  # what is there is whole
    assert "not complete" in refused(main_mar.main, capsys, *SMALL, "--use_cached", "--cached_path", folder)

    (folder / ".left behind.1.tmp").write_text("by a process that was killed")
    encoded, encode = [], cache_latents.encode
    monkeypatch.setattr(
        cache_latents, "encode", lambda t, images, *a: encoded.append(len(images)) or encode(t, images, *a)
    )
    assert cache_latents.main(argv) == 0 and content(folder) == whole
    assert sum(encoded) == (NUM - 6 if format == "packed" else NUM)  # npz: the first batch was not whole
    encoded.clear()
    assert cache_latents.main(argv) == 0 and content(folder) == whole and not encoded


@pytest.mark.parametrize("format", FORMATS)
def test_processes_share_the_work(pictures, tmp_path, monkeypatch, format):
    """Two processes one after the other; the exchange between them is left out."""
    whole = content(cache(pictures, tmp_path / "whole", "--format", format))
    argv = [*CACHE, "--data_path", str(pictures), "--cached_path", str(tmp_path / "c"), "--format", format]
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    written = []
    for rank in (1, 0):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        before = set(content(tmp_path / "c")) if written else set()
        assert cache_latents.main(argv) == 0
        written.append({name for name in set(content(tmp_path / "c")) - before if name.endswith((".npy", ".npz"))})
    assert content(tmp_path / "c") == whole and all(written)


OTHER = {
    "image size": (["--img_size", "16"], "img_size 8 instead of 16"),
    "tokenizer": (["--tokenizer", "tiny:1"], "fingerprint"),
    "numbers": (["--cache_dtype", "float16"], "'float16'"),
    "format": (["--format", "npz"], "'npz'"),
    "file size": (["--shard_size", "7"], "shard_size 6 instead of 7"),
}


@pytest.mark.parametrize("flags, shown", OTHER.values(), ids=OTHER)
def test_a_cache_of_something_else_is_refused(some, tmp_path, tiny_kl, capsys, flags, shown):
    folder = cache(some, tmp_path / "c", "--tokenizer", "tiny:0")
    before = content(folder)
    argv = [*CACHE, "--data_path", some, "--cached_path", folder, "--tokenizer", "tiny:0", *flags]
    assert shown in refused(cache_latents.main, capsys, *argv)
    assert content(folder) == before


def test_a_cache_of_other_images_is_refused(some, tmp_path, capsys):
    folder = cache(some, tmp_path / "c")
    before = content(folder)
    argv = [*CACHE, "--data_path", some, "--cached_path", folder]
    write_image(some / "train" / "new" / "0.png", 99)
    assert "1 classes of the data are not in it, 0 are only in it, the first is 'new'" in refused(
        cache_latents.main, capsys, *argv
    )
    shutil.rmtree(some / "train" / "new")
    shutil.rmtree(some / "train" / "7")
    assert "0 classes of the data are not in it, 1 are only in it, the first is '7'" in refused(
        cache_latents.main, capsys, *argv
    )
    shutil.copytree(some / "train" / "Été ☀", some / "train" / "7")  # as many images would be needed, at least
    assert f"num_images {NUM} instead of {NUM + 1}" in refused(cache_latents.main, capsys, *argv)
    shutil.rmtree(some / "train" / "7" / "deep")
    write_image(some / "train" / "7" / "0.png", 5, (9, 9))
    assert "images" in refused(cache_latents.main, capsys, *argv)
    assert content(folder) == before


def test_a_folder_of_something_else_is_left_alone(pictures, tmp_path, tiny_kl, capsys):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "letter.txt").write_text("mine")
    argv = [*CACHE, "--data_path", pictures, "--cached_path"]
    assert "not empty" in refused(cache_latents.main, capsys, *argv, tmp_path / "c")
    assert content(tmp_path / "c") == {"letter.txt": b"mine"}
    assert "letter.txt" in refused(cache_latents.main, capsys, *argv, tmp_path / "c" / "letter.txt")
    assert "--cached_path" in refused(cache_latents.main, capsys, *CACHE, "--data_path", pictures)
    missing = ["--data_path", tmp_path / "missing", "--cached_path", tmp_path / "new"]
    assert "missing" in refused(cache_latents.main, capsys, *CACHE, *missing)
    bad = ["--data_path", pictures, "--cached_path", tmp_path / "new", "--vae_embed_dim", 4]
    assert "--vae_embed_dim 4" in refused(cache_latents.main, capsys, *CACHE, *bad)
    odd = ["--data_path", pictures, "--cached_path", tmp_path / "new", "--tokenizer", "tiny:0", "--img_size", 7]
    assert "--img_size 7 must be a multiple of the tokenizer's 2" in refused(cache_latents.main, capsys, *CACHE, *odd)
    assert not (tmp_path / "new").exists()


def test_numbers_that_do_not_fit_are_refused(pictures, tmp_path, monkeypatch, capsys):
    class Loud(TinyKL):
        def _moments(self, images):
            return super()._moments(images) * 1e6

    monkeypatch.setattr(build, "tokenizer_of", lambda *_: Loud())
    flags = ["--data_path", pictures, "--cached_path", tmp_path / "c", "--cache_dtype", "float16"]
    flags += ["--vae_stride", 2, "--vae_embed_dim", 2]
    assert "float16" in refused(cache_latents.main, capsys, *CACHE, *flags)
    assert not list((tmp_path / "c").glob("shard*"))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-300] ^= 1
    path.write_bytes(data)


def zeros(path):
    np.save(path, np.zeros((6, 2, 3, 4, 4), np.float32))


# of the packed format: file, what happens to it, is it seen without reading everything?
DAMAGES = [
    ("shard-00001.npy", truncate, True),
    ("shard-00001.npy", Path.unlink, True),
    ("shard-00001.npy", zeros, True),
    ("shard-00001.npy", lambda path: path.write_bytes(b""), True),
    ("shard-00001.npy", lambda path: path.write_text("hello"), True),
    ("shard-00001.npy", flip_a_bit, False),
    ("index.json", truncate, True),
    ("index.json", lambda path: path.write_text("{}"), True),
    ("index.json", lambda path: path.write_bytes(b"\xff\xfe"), True),
]


@pytest.mark.parametrize("name, damage, at_once", DAMAGES)
def test_a_damaged_file_is_one_line_and_is_made_anew(pictures, tmp_path, capsys, name, damage, at_once):
    folder = cache(pictures, tmp_path / "c")
    before = content(folder)
    damage(folder / name)
    assert name in refused(cache_latents.main, capsys, "--cached_path", folder, "--verify")
    if at_once:
        flags = ["--use_cached", "--cached_path", folder, "--output_dir", tmp_path / "out"]
        assert name in refused(main_mar.main, capsys, *SMALL, *TRAIN, *flags)
        assert not (tmp_path / "out").exists()
    assert content(cache(pictures, folder)) == before
    assert cache_latents.main(["--cached_path", str(folder), "--verify"]) == 0


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lambda path: np.savez(path, moments=np.zeros(3))])
def test_a_damaged_npz_file_is_skipped_in_training_and_made_anew(pictures, tmp_path, capsys, damage):
    folder = cache(pictures, tmp_path / "c", "--format", "npz")
    before = content(folder)
    damage(folder / f"{NAMES[4]}.npz")
    latents = open_latents(folder)
    at = [path for path, _ in latents.samples].index(str(folder / f"{NAMES[4]}.npz"))
    with pytest.warns(UserWarning, match="broken image skipped"):
        pair, label, i = latents[at]
    assert torch.equal(pair, latents[at + 1][0]) and i == at and latents.num_broken == 1
    assert NAMES[4] in refused(cache_latents.main, capsys, "--cached_path", folder, "--verify")
    assert content(cache(pictures, folder, "--format", "npz")) == before


def test_files_that_are_missing_or_too_many_are_refused(pictures, tmp_path, capsys):
    folder = cache(pictures, tmp_path / "c", "--format", "npz")
    flags = [*SMALL, *TRAIN, "--use_cached", "--cached_path", folder, "--output_dir", tmp_path / "out"]
    shutil.copytree(folder / "7", folder / "8")
    line = refused(main_mar.main, capsys, *flags)
    assert "0 files that index.json names are missing and 4 are not in it" in line and "8/0.png.npz" in line
    shutil.rmtree(folder / "8")
    shutil.rmtree(folder / "7")
    line = refused(main_mar.main, capsys, *flags)
    assert "4 files that index.json names are missing" in line and "7/0.png.npz" in line
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("tokenizer, format", [("pixel", "npz"), ("tiny:0", "packed")])
def test_training_on_a_cache_equals_training_on_the_images(pictures, tmp_path, monkeypatch, tiny_kl, format, tokenizer):
    """With mirror images and, for tiny, draws from the posterior, all from the same seeds."""
    shape = [] if tokenizer == "pixel" else ["--vae_stride", 2, "--vae_embed_dim", 2]
    flags = ["--tokenizer", tokenizer, *shape, "--accum_iter", 3, "--epochs", 4, "--lr", 0.03]
    folder = cache(pictures, tmp_path / "c", "--format", format, *flags[: 2 + len(shape)])
    images = losses(monkeypatch, tmp_path / "images", *flags, "--data_path", pictures)
    cached = losses(monkeypatch, tmp_path / "cached", *flags, "--use_cached", "--cached_path", folder)
    assert len(images) == 4 and cached == pytest.approx(images, abs=1e-6)

    unflipped = engine_mar.forward_backward
    with monkeypatch.context() as patch:  # the mirror images do count
        patch.setattr(engine_mar, "forward_backward", lambda *a: unflipped(*a[:-1], False))
        other = losses(patch, tmp_path / "u", *flags, "--use_cached", "--cached_path", folder)
    assert other != pytest.approx(images, abs=1e-3)


def test_cached_moments_have_a_draw_for_each_image_and_step(pictures, tmp_path, tiny_kl):
    """The noise of the posterior comes from a seed for each image: another seed, other tokens; not the batch."""
    from train_state import TrainState

    latents = open_latents(cache(pictures, tmp_path / "c", "--tokenizer", "tiny:0"))
    batch, _, _ = next(iter(DataLoader(latents, batch_size=4)))
    fields = dict.fromkeys(TrainState.__dataclass_fields__)
    state = TrainState(
        **{**fields, "tokenizer": TinyKL(), "mar": type("M", (), {"patchify": staticmethod(lambda x: x)})}
    )
    a = state.tokens(batch, None, [1, 2, 3, 4])
    assert torch.equal(a[[2, 0]], state.tokens(batch[[2, 0]], None, [3, 1]))
    assert not torch.equal(a, state.tokens(batch, None, [1, 2, 3, 5]))
    flip = torch.tensor([True, False, True, False])
    mixed = state.tokens(batch, flip, [1, 2, 3, 4])
    assert torch.equal(mixed[1], a[1]) and not torch.equal(mixed[0], a[0])
    assert torch.equal(mixed[0], state.tokens(batch[:, [1, 0]], None, [1, 2, 3, 4])[0])


def test_training_refuses_latents_of_something_else(pictures, tmp_path, tiny_kl, capsys):
    folder = cache(pictures, tmp_path / "c", "--tokenizer", "tiny:0")
    flags = [*SMALL, *TRAIN, "--use_cached", "--cached_path", folder, "--output_dir", tmp_path / "out"]
    flags += ["--vae_stride", 2, "--vae_embed_dim", 2]
    assert "another tokenizer than tiny:1" in refused(main_mar.main, capsys, *flags, "--tokenizer", "tiny:1")
    pixel = ["--vae_stride", 1, "--vae_embed_dim", 3]
    assert "(4, 4, 4)" in refused(main_mar.main, capsys, *flags, *pixel)
    assert "not of 16" in refused(main_mar.main, capsys, *flags, "--img_size", 16)
    gone = ["--cached_path", tmp_path / "gone"]
    assert "gone" in refused(main_mar.main, capsys, *flags, *gone)
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(main_mar.main, capsys, *flags, "--cached_path", tmp_path / "empty")
    assert "--cached_path" in refused(main_mar.main, capsys, *flags, "--cached_path", "")
    assert not (tmp_path / "out").exists()


def test_metrics_need_the_images_that_the_cache_was_made_of(some, tmp_path, capsys, monkeypatch):
    folder = cache(some, tmp_path / "c")
    flags = [*SMALL, *TRAIN, "--use_cached", "--cached_path", folder, "--output_dir", tmp_path / "out"]
    monkeypatch.chdir(tmp_path)
    assert "imagenet" in refused(main_mar.main, capsys, *flags, "--online_eval")  # where MAR looks without --data_path
    shutil.rmtree(some / "train" / "7")
    assert "classes" in refused(main_mar.main, capsys, *flags, "--online_eval", "--data_path", some)
    assert not (tmp_path / "out").exists()
    assert losses(monkeypatch, tmp_path / "out", "--use_cached", "--cached_path", folder, "--online_eval", "--metrics",
                  "none", "--num_images", 2)  # fmt: skip


def test_metrics_against_statistics_need_no_images(pictures, tmp_path, capsys, monkeypatch):
    """--use_cached with --online_eval and --fid_stats, where the images are no longer."""
    folder, stats = cache(pictures, tmp_path / "c"), tmp_path / "stats.npz"
    save_fid_stats(stats, FIDStats(np.zeros(64), np.eye(64), num_images=9, features="digits", split="val"))
    flags = ["--use_cached", "--cached_path", folder, "--data_path", tmp_path / "gone", "--online_eval", "--features"]
    capsys.readouterr()
    losses(monkeypatch, tmp_path / "out", *flags, "digits", "--fid_stats", stats, "--num_images", 6, "--cfg", 1)
    told = (
        f"6 images (2 of each of 3 classes, EMA weights, fp32) against 9 images of statistics in {stats} (split: val)"
    )
    assert f"generation of {told}, features: digits\nepoch 2, cfg 1: FID " in capsys.readouterr().out.replace("\r", "")


# --------------------------------------------------------------------------------------------------------- command line


def test_mars_caching_command_means_what_it_meant(capsys):
    command = """--img_size 256 --vae_path pretrained_models/vae/kl16.ckpt --vae_embed_dim 16 --batch_size 128
        --data_path IMAGENET --cached_path CACHED --num_workers 8 --pin_mem --device cpu --seed 1 --world_size 1
        --local_rank -1 --dist_url env:// --dry_run"""
    capsys.readouterr()
    assert cache_latents.main(command.split()) == 0
    values = json.loads(capsys.readouterr().out)
    expected = dict(img_size=256, vae_path="pretrained_models/vae/kl16.ckpt", vae_embed_dim=16, batch_size=128)
    expected |= dict(data_path="IMAGENET", cached_path="CACHED", tokenizer="kl16", data="imagefolder", format="packed")
    assert {key: values[key] for key in expected} == expected


def test_the_benchmark_prints_a_table(capsys):
    flags = "--num_images 8 --batch_size 4 --repeats 1 --img_size 16".split()
    assert bench_loader.main(flags) == 0
    rows = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert rows == ["read from", "---", "folder", "npz", "packed"]
    assert "--num_images" in refused(bench_loader.main, capsys, "--num_images", 2)


@pytest.mark.slow
def test_torchrun_makes_the_same_cache(some, tmp_path):
    (some / "train" / NAMES[8]).write_text("no picture")  # read by the second process
    with pytest.warns(UserWarning, match="broken image skipped"):
        whole = cache(some, tmp_path / "whole")
    argv = [*CACHE, "--data_path", str(some), "--cached_path", str(tmp_path / "two")]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run([*launch, cache_latents.__file__, *argv], check=True, timeout=120)
    assert content(tmp_path / "two") == content(whole)
