"""Files from strangers: nothing in them is run, nothing is written where they say, and each is refused in one line."""

import ast
import json
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main_mar
import sample
from sampling.trace import KEYS
from scripts import cache_latents, make_fid_stats, plot_trace, train_tokenizer
from tests.helpers import Malicious, untrained
from tests.test_architecture import ROOT, SOURCES, tree_of
from tests.test_cli import TINY, files, refused
from util.checkpoint import FILE_NAME, load_checkpoint, save_checkpoint
from util.evaluation.classifiers import DIGITS_WEIGHTS, load_classifier
from util.evaluation.features import check_features
from util.images.datasets import build_dataset
from util.images.pictures import is_readable


def objects(victim) -> np.ndarray:
    return np.array([Malicious(victim)] * 4, dtype=object)


def put(path: Path, write) -> Path:
    """The path, after its folder was made and write(path) has written it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path)
    return path


def saved(thing):
    return lambda path: torch.save(thing, path)


def pickled(thing):
    return lambda path: path.write_bytes(pickle.dumps(thing, protocol=2))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return untrained(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def victim(tmp_path):
    """The folder that malicious files make."""
    path = tmp_path / "victim"
    pickle.loads(pickle.dumps(Malicious(path)))
    path.rmdir()  # it was made where that is allowed
    return path


# ------------------------------------------------------------------------------------------------------- no pickles


def kl16(folder, victim, write):
    file = put(folder / "kl16.ckpt", write({"model": {"a": Malicious(victim)}}))
    flags = f"--data digits --img_size 8 --tokenizer kl16 --vae_stride 16 --vae_path {file}"
    return main_mar.main, [*TINY, *flags.split()], file


def diffusers_bin(folder, victim, write):
    """An autoencoder saved by diffusers, its weights a pickle."""
    from diffusers import AutoencoderTiny

    sizes = dict(encoder_block_out_channels=(4, 4), decoder_block_out_channels=(4, 4), latent_channels=3)
    sizes |= dict(num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    AutoencoderTiny(**sizes).save_pretrained(folder / "tiny", safe_serialization=False)
    put(folder / "tiny" / "diffusion_pytorch_model.bin", write({"encoder": Malicious(victim)}))
    flags = f"--data cifar10 --data_path {folder} --tokenizer diffusers:{folder / 'tiny'}"
    Image.new("RGB", (8, 8)).save(folder / "0.png")
    flags = flags.replace("cifar10", "imagefolder")
    return main_mar.main, [*TINY, *flags.split(), "--batch_size", "1"], folder / "tiny"


def resumed(folder, victim, write):
    file = put(folder / FILE_NAME, write({"model": {"class_emb.weight": torch.zeros(1)}, "rng": Malicious(victim)}))
    return main_mar.main, [*TINY, "--resume", str(folder)], file


def sampled(folder, victim, write):
    main, argv, file = resumed(folder, victim, write)
    return sample.main, ["--checkpoint", str(folder), "--output_dir", "{out}"], file


def tokenizer_run(folder, victim, write):
    """The checkpoint that scripts/train_tokenizer.py --resume continues."""
    file = put(folder / FILE_NAME, write({"autoencoder": Malicious(victim)}))
    flags = f"--data digits --stride 2 --latent_channels 2 --width 4 --resume --output_dir {folder}"
    return train_tokenizer.main, flags.split(), file


def fid_weights(folder, victim, write):
    file = put(folder / "w.pth", write({"fc.weight": Malicious(victim)}))
    flags = f"--data digits --features inception --fid_weights {file} --out {{out}}/stats.npz"
    return make_fid_stats.main, flags.split(), file


def perceptual_weights(folder, victim, write):
    file = put(folder / "w.pth", write({"features.0.weight": Malicious(victim)}))
    flags = "--data digits --stride 2 --latent_channels 2 --width 4 --output_dir {out}"
    flags += f" --perceptual vgg16 --perceptual_weights {file}"
    return train_tokenizer.main, flags.split(), file


PICKLES = [kl16, diffusers_bin, resumed, sampled, tokenizer_run, fid_weights, perceptual_weights]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [saved, pickled], ids=["torch.save", "pickle"])
@pytest.mark.parametrize("case", PICKLES, ids=lambda case: case.__name__)
def test_pickles_are_one_line_and_not_run(case, write, victim, tmp_path, capsys):
    main, argv, file = case(tmp_path / "in", victim, write)
    before = files(tmp_path)
    line = refused(main, [word.format(out=tmp_path / "out") for word in argv], capsys)
    assert str(file) in line and len(line) < 700
    assert not victim.exists() and files(tmp_path) == before


def trace(folder, victim):
    file = put(folder / "trace.npz", lambda path: np.savez(path, **{k: objects(victim) for k in KEYS}))
    return plot_trace.main, [str(file), "--out", "{out}"], file


def packed_latents(folder, victim):
    """A cache that this program wrote, one of whose files was replaced."""
    flags = f"--data digits --tokenizer pixel --img_size 8 --num_workers 0 --cached_path {folder / 'c'}"
    assert cache_latents.main(flags.split()) == 0
    np.save(folder / "c" / "shard-00000.npy", objects(victim))
    return main_mar.main, [*TINY, "--use_cached", "--cached_path", str(folder / "c")], folder / "c" / "shard-00000.npy"


def npz_latents(folder, victim):
    for name in ("moments", "moments_flip"):
        arrays = {"moments": np.zeros((1, 8, 8)), "moments_flip": np.zeros((1, 8, 8)), name: objects(victim)}
        put(folder / "c" / "a" / f"{name}.npz", lambda path, arrays=arrays: np.savez(path, **arrays))
    return main_mar.main, [*TINY, "--use_cached", "--cached_path", str(folder / "c"), "--img_size", "8"], folder / "c"


def plain_pickle_as_shard(folder, victim):
    main, argv, file = packed_latents(folder, victim)
    file.write_bytes(pickle.dumps(Malicious(victim)))
    return main, argv, file


def fid_stats(folder, victim):
    file = put(folder / "s.npz", lambda path: np.savez(path, mu=objects(victim), sigma=np.eye(4)))
    return main_mar.main, [*TINY, "--online_eval", "--features", "digits", "--fid_stats", str(file)], file


OBJECTS = [trace, packed_latents, npz_latents, plain_pickle_as_shard, fid_stats]


@pytest.mark.filterwarnings("ignore:broken image skipped")
@pytest.mark.parametrize("case", OBJECTS, ids=lambda case: case.__name__)
def test_arrays_of_objects_are_one_line_and_not_run(case, victim, tmp_path, capsys):
    main, argv, file = case(tmp_path / "in", victim)
    before = files(tmp_path)
    argv = [word.format(out=tmp_path / "out") for word in argv]
    line = refused(main, argv, capsys)
    assert str(file) in line
    assert not victim.exists() and files(tmp_path) == before


def test_a_classifier_is_plain_arrays(victim, tmp_path):
    with np.load(DIGITS_WEIGHTS, allow_pickle=False) as file:
        arrays = dict(file) | {"head.bias": objects(victim)}
    np.savez(tmp_path / "c.npz", **arrays)
    with pytest.raises(ValueError, match="allow_pickle"):
        load_classifier(path=tmp_path / "c.npz")
    assert not victim.exists()


def test_inception_takes_no_safetensors(tmp_path):
    """A file may be these and a pickle at once, and torch-fidelity, which reads it after the check, trusts pickles."""
    file = tmp_path / "w.safetensors"
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ValueError, match="refused: .*a .pth file"):
        check_features("inception", file)


def test_torchvisions_cifar_archive_is_checked_before_it_is_unpickled(victim, tmp_path):
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]:
        put(tmp_path / "cifar-10-batches-py" / name, pickled({"data": Malicious(victim)}))
    with pytest.raises(ValueError, match="cannot read CIFAR10"):
        build_dataset("cifar10", data_path=tmp_path, download=False)
    assert not victim.exists()


def test_mnist_files_of_old_versions_are_not_run(victim, tmp_path):
    for name in ("training.pt", "test.pt"):
        put(tmp_path / "MNIST" / "processed" / name, saved((Malicious(victim), 0)))
    with pytest.raises(ValueError, match="cannot read MNIST"):
        build_dataset("mnist", data_path=tmp_path, download=False)
    assert not victim.exists()


def test_nothing_in_the_source_trusts_a_pickle():
    """Every torch.load says weights_only=True, every np.load allow_pickle=False, and nobody imports pickle."""
    loads = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
    seen, wrong = set(), []
    for path in SOURCES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Call) and (name := ast.unparse(node.func)) in loads:
                keyword, value = loads[name]
                seen.add(name)
                if {k.arg: ast.unparse(k.value) for k in node.keywords}.get(keyword) != str(value):
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            wrong += [
                f"{path.relative_to(ROOT)} imports {n}" for n in names if n in ("pickle", "joblib", "shelve", "dill")
            ]
    assert seen == set(loads) and not wrong


# ----------------------------------------------------------------------------------------------- decompression bombs


def bomb(path: Path, side: int = 30_000) -> Path:
    """A PNG that says it has side² pixels, in less than 100 bytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b""))
    return path


BOMB = "Image size (900000000 pixels) exceeds limit of 178956970 pixels, could be decompression bomb DOS attack"


@pytest.mark.filterwarnings("ignore:broken image skipped")
def test_a_bomb_is_one_line(checkpoint, tmp_path, capsys):
    file = bomb(tmp_path / "in" / "bomb.png")
    flags = ["--checkpoint", str(checkpoint), "--output_dir", str(tmp_path / "out")]
    line = refused(sample.main, [*flags, "--edit_image", str(file), "--edit_mask", str(file)], capsys)
    assert line == f"error: --edit_image {file} cannot be read as a picture: {BOMB}"
    flags = f"--data imagefolder --data_path {file.parent} --tokenizer pixel --output_dir {tmp_path / 'out'}"
    assert "no readable image" in refused(main_mar.main, [*TINY, *flags.split()], capsys)
    assert not (tmp_path / "out").exists()


def test_a_bomb_among_images_is_skipped_and_named(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "0.png")
    bomb(tmp_path / "1.png")
    images = build_dataset("imagefolder", data_path=tmp_path, img_size=8)
    with pytest.warns(UserWarning, match="1.png.*could be decompression bomb"):
        assert torch.equal(images[1][0], images[0][0])
    assert images.num_broken == 1


def test_a_bomb_among_the_pictures_of_a_run_is_made_again(tmp_path):
    assert not is_readable(bomb(tmp_path / "0.png"))


# ------------------------------------------------------------------------------------- nothing outside of the folder


def tampered(checkpoint, folder, change) -> Path:
    """A copy of the checkpoint after change(its config)."""
    content = load_checkpoint(checkpoint)
    change(content["config"])
    save_checkpoint(folder, content)
    return folder


# settings of a checkpoint, of which the names of folders are made, and what is in them
SETTINGS = [
    ("sample", "spacing", "/../../../evil"),
    ("sample", "order", "../../evil"),
    ("sample", "infer_mode", "../evil"),
    ("sample", "solver", "../evil"),
    ("sample", "num_sampling_steps", "../evil"),
    ("sample", "order_base", "../evil"),
    ("sample", "group_base", "../evil"),
    ("sample", "cfg_interval", "../evil"),
    ("sample", "cfg", "../evil"),
    ("sample", "temperature", float("nan")),
    ("sample", "num_iter", 0),
    ("eval", "num_images", "../evil"),
    ("eval", "features", "../evil"),
    ("eval", "eval_split", "../evil"),
    ("mar", "img_size", "8"),
    ("mar", "encoder_depth", None),
    ("mar", "attn_dropout", 2.0),
    ("data", "classes", "../evil"),
    ("data", "classes", [1]),
    ("data", "path", 3),
]


@pytest.mark.parametrize("part, key, value", SETTINGS, ids=[f"{p}-{k}-{v}" for p, k, v in SETTINGS])
def test_settings_in_a_checkpoint_are_checked_like_flags(part, key, value, checkpoint, tmp_path, capsys):
    place = tampered(checkpoint, tmp_path / "in", lambda config: config[part].__setitem__(key, value))
    before = files(tmp_path)
    flags = ["--checkpoint", str(place), "--output_dir", str(tmp_path / "out" / "deep"), "--metrics", "none"]
    line = refused(sample.main, flags, capsys)
    assert key in line or "classes" in line or "data" in line
    assert files(tmp_path) == before


@pytest.mark.parametrize("part", ["mar", "tokenizer", "data", "sample", "eval"])
def test_a_checkpoint_that_lacks_a_part_is_one_line(part, checkpoint, tmp_path, capsys):
    place = tampered(checkpoint, tmp_path / "in", lambda config: config.__delitem__(part))
    line = refused(sample.main, ["--checkpoint", str(place), "--output_dir", str(tmp_path / "out")], capsys)
    assert repr(part) in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize("heads", [{"nope": 1}, {"learn": ["order"]}, {"learn": ["../x"]}, {"learn": 3}, [1]])
def test_heads_that_are_none_are_one_line(heads, checkpoint, tmp_path, capsys):
    place = tampered(checkpoint, tmp_path / "in", lambda config: config.__setitem__("heads", heads))
    assert "heads" in refused(sample.main, ["--checkpoint", str(place), "--output_dir", str(tmp_path / "out")], capsys)


def test_names_of_classes_and_of_finished_settings_stay_inside(checkpoint, tmp_path):
    """Classes are captions only; a line of results.jsonl that names a folder elsewhere counts for nothing."""
    names = ["../../evil", "/evil", "..", "a\nb", "", "x" * 300, "\0", "é" * 200, ".", "C:\\evil"]
    place = tampered(checkpoint, tmp_path / "in", lambda config: config["data"].__setitem__("classes", names))
    out, flags = tmp_path / "deep" / "out", "--num_images 10 --metrics none --num_iter 2 --num_sampling_steps 2"
    argv = ["--checkpoint", str(place), "--output_dir", str(out), *flags.split()]
    before = files(tmp_path)
    assert sample.main(argv) == 0
    (name,) = (folder.name for folder in out.iterdir() if folder.is_dir())
    assert all(Path(path).is_relative_to(out.parent) for path in files(tmp_path).keys() - before.keys())

    row = json.loads((out / "results.jsonl").read_text())
    rows = [{**row, "name": bad} for bad in ("../evil", str(tmp_path / "evil"), "..", 3, None)]
    (out / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*rows, [1], "x"]))
    assert sample.main(argv) == 0
    assert json.loads((out / "results.jsonl").read_text().splitlines()[-1])["name"] == name  # made anew
    assert {path.name for path in tmp_path.iterdir()} == {"in", "deep"} and {p.name for p in out.parent.iterdir()} == {
        "out"
    }
