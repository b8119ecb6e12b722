"""The evaluation protocol: statistics files, other features, splits, reconstruction, and that kinds are kept apart."""

import json
import os
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from scipy.ndimage import correlate1d

import engine_mar
import main_mar
import sample
from models.tokenizers import measuring
from scripts import download_weights, make_fid_stats, make_table, measure_reconstruction
from tests.test_cli import ROOT, commands_in, refused, shell_lines
from tests.test_sample import SMALL, draw, folder_of, rows, train_tiny
from tests.test_sweep import line, write
from util import features
from util.checkpoint import load_checkpoint, save_checkpoint
from util.data import build_dataset
from util.evaluation import EvalConfig, build_reference, class_balance, protocol, protocol_line, reference_hash
from util.features import FEATURES, RGBImages, build_extractor, check_features, feature_batches, plain_tensors
from util.fid_stats import FIDStats, Moments, compute_fid_stats, load_fid_stats, save_fid_stats
from util.images import PNGFolder, save_png
from util.metrics import compute_metrics, frechet_distance, gaussian_statistics, possible_metrics
from util.reconstruction import PSNR_MAX, psnr, score_reconstructions, ssim


@pytest.fixture(scope="module")
def digits():
    """The digits in random order, uint8 (1797, 8, 8, 1)."""
    images = build_dataset("digits").images.permute(0, 2, 3, 1).numpy()
    return images[np.random.default_rng(0).permutation(len(images))]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return train_tiny(tmp_path_factory.mktemp("checkpoint"), "--batch_size", 600, "--num_sampling_steps", 2)


@pytest.fixture(scope="module")
def stats_file(tmp_path_factory):
    """Statistics of all digits, made by the program."""
    path = tmp_path_factory.mktemp("stats") / "digits.npz"
    assert make_fid_stats.main(["--data", "digits", "--features", "digits", "--out", str(path), "--device", "cpu"]) == 0
    return path


# ---------------------------------------------------------------------------------------------------- statistics files


@pytest.mark.parametrize("sizes", [[40], [1, 39], [7, 7, 7, 19]])
def test_moments_are_those_of_all_rows_at_once(sizes):
    """However the rows are split into batches, and far from zero."""
    x = np.random.default_rng(0).standard_normal((40, 5)).astype(np.float32) + np.float32(1000)
    moments = Moments()
    for part in np.split(x, np.cumsum(sizes)[:-1]):
        moments.update(torch.from_numpy(part))
    for ours, theirs in zip(moments.result(), gaussian_statistics(x)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)


def test_moments_need_two_rows():
    moments = Moments()
    moments.update(torch.ones(1, 3))
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        moments.result()


def test_fid_from_a_file_is_fid_from_the_images(digits, tmp_path):
    """torch-fidelity against both sets, and against the statistics of one of them: FID and IS are the same."""
    made, real = digits[:300], digits[300:700]
    save_fid_stats(tmp_path / "new" / "a.npz", compute_fid_stats(real, "digits", batch_size=33))
    stats = load_fid_stats(tmp_path / "new" / "a.npz")
    assert (stats.num_images, stats.features, stats.mu.shape, stats.sigma.shape) == (400, "digits", (64,), (64, 64))
    found = compute_metrics(made, stats, features="digits", batch_size=77)
    expected = compute_metrics(made, real, features="digits", metrics=("fid", "isc"))
    assert found == pytest.approx(expected, rel=1e-3) and found["fid"] > 0.01
    itself = compute_metrics(real, stats, features="digits", metrics=("fid",))
    assert itself == {"fid": pytest.approx(0, abs=1e-9)}
    assert compute_metrics(real, stats, features="digits", metrics=("isc",)).keys() == {"is_mean", "is_std"}


def test_the_program_makes_plain_arrays_and_nothing_else(stats_file, digits):
    assert [p.name for p in stats_file.parent.iterdir()] == ["digits.npz"]
    with np.load(stats_file, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    assert arrays.keys() == {"mu", "sigma", "num_images", "features", "img_size", "split"}
    assert [arrays[k].item() for k in ("num_images", "features", "img_size", "split")] == [1797, "digits", 8, "train"]
    found = np.concatenate([f.numpy() for (f,) in feature_batches(RGBImages(digits, "all"), "digits")])
    mu, sigma = gaussian_statistics(found)
    np.testing.assert_allclose(arrays["mu"], mu, rtol=1e-6)
    np.testing.assert_allclose(arrays["sigma"], sigma, rtol=1e-5, atol=1e-8)


def image_folder(root: Path, sizes: dict[str, int], seed=0) -> Path:
    """Two classes of so many 12 x 10 RGB images in each split."""
    draws = np.random.default_rng(seed)
    for split, count in sizes.items():
        for name in ("dark", "light"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = draws.integers(0, 128, (12, 10, 3)) + (127 if name == "light" else 0)
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i}.png")
    return root


def test_statistics_of_a_folder_at_another_size_and_of_the_other_split(tmp_path, monkeypatch, capsys):
    folder = image_folder(tmp_path / "images", {"train": 6, "val": 4})
    flags = ["--data_path", str(folder), "--img_size", "8", "--features", "digits", "--device", "cpu"]
    out = tmp_path / "val.npz"
    assert make_fid_stats.main([*flags, "--split", "val", "--out", str(out)]) == 0
    assert "digits features of 8 val images of imagefolder at 8x8" in capsys.readouterr().out
    stats = load_fid_stats(out)
    assert (stats.num_images, stats.img_size, stats.split) == (8, 8, "val")
    expected = compute_fid_stats(build_dataset("imagefolder", data_path=folder, img_size=8, split="val"), "digits")
    np.testing.assert_array_equal(stats.mu, expected.mu)

    monkeypatch.setattr(np, "savez", lambda file, **arrays: file.write(b"half") and 1 / 0)  # a crash while writing
    with pytest.raises(ZeroDivisionError):
        make_fid_stats.main([*flags, "--out", str(tmp_path / "train.npz")])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "val.npz"]


def test_adms_files_are_read_and_no_more_of_them_than_is_needed(tmp_path):
    """They also hold sFID's statistics and sample images; what is not needed may be anything."""
    mu, sigma = np.zeros(2048), np.eye(2048)
    more = dict(mu_s=np.zeros(9), sigma_s=np.eye(9), arr_0=np.array([Malicious("never")], dtype=object))
    np.savez(tmp_path / "adm.npz", mu=mu, sigma=sigma, **more)
    stats = load_fid_stats(tmp_path / "adm.npz")
    assert (stats.features, stats.num_images, stats.img_size) == (None, None, None)
    stats.check("inception", 256)
    with pytest.raises(ValueError, match="adm.npz holds statistics of 2048 features, digits has 64"):
        stats.check("digits")


class Malicious:
    """Unpickling it makes a folder."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


def damaged(kind: str, path: Path) -> None:
    """Write a statistics file that is no good in this way."""
    mu, sigma = np.zeros(4), np.eye(4)
    if kind in ("text", "truncated", "array"):
        np.savez(path, mu=mu, sigma=sigma)
        whole = path.read_bytes()
        path.write_bytes({"text": b"mu = 0", "truncated": whole[:300], "array": b""}[kind])
        if kind == "array":
            with open(path, "wb") as file:
                np.save(file, mu)
        return
    objects = np.array([Malicious(path.parent / "executed")] * 4, dtype=object)
    changes = {
        "objects": dict(mu=objects),
        "object features": dict(features=objects[:1]),
        "two features": dict(features=np.array(["a", "b"])),
        "no sigma": dict(sigma=None),
        "nan": dict(mu=mu * np.nan),
        "whole numbers": dict(mu=np.zeros(4, int)),
        "matrix mu": dict(mu=sigma),
        "other sizes": dict(sigma=np.eye(5)),
    }
    arrays = {"mu": mu, "sigma": sigma} | changes[kind]
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})


DAMAGES = ["text", "truncated", "array", "objects", "object features", "two features", "no sigma", "nan"]
DAMAGES += ["whole numbers", "matrix mu", "other sizes"]


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_and_unsafe_statistics_are_one_line(kind, tmp_path):
    path = tmp_path / "bad.npz"
    damaged(kind, path)
    with pytest.raises(ValueError, match=r"bad\.npz refused: [^\n]+$"):
        load_fid_stats(path)
    assert not (tmp_path / "executed").exists()


def test_statistics_of_something_else_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no statistics at .*missing.npz"):
        load_fid_stats(tmp_path / "missing.npz")
    stats = FIDStats(np.zeros(64), np.eye(64), features="digits", img_size=8, source="a.npz")
    for call, message in (
        (lambda: stats.check("inception"), "a.npz holds statistics of digits features, not of inception"),
        (lambda: stats.check("digits", 16), "a.npz is of images of 8 pixels, those here have 16"),
        (lambda: FIDStats(np.zeros(9), np.eye(9)).check("digits"), "statistics of 9 features, digits has 64"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# ------------------------------------------------------------------------------------------------------------ features


def hankel(shape, mean=0.0) -> torch.Tensor:
    """Random numbers of any shape out of a few thousand, so that files of large networks are small."""
    base = torch.randn(sum(shape) + 1, generator=torch.Generator().manual_seed(len(shape) + shape[0]))
    return (0.02 * base + mean).as_strided(shape, (1,) * len(shape))


def vgg16_state():
    with torch.device("meta"):
        net = torchvision.models.vgg16()
    return {k: hankel(tuple(v.shape)) for k, v in net.state_dict().items()}


def dinov2_state():
    """As published: for 37 x 37 patches, with a mask token."""
    with torch.device("meta"):
        net = timm.create_model(features.DINOV2_MODEL, num_classes=0)
    state = {k: hankel(tuple(v.shape), k.endswith("weight") and v.ndim == 1) for k, v in net.state_dict().items()}
    return {**state, "mask_token": torch.zeros(1, 384)}


def clip_state():
    """As published, with the first of the text tower's tensors; norms and biases are drawn too."""
    state = {k: hankel(shape) for k, shape in features.CLIP_SHAPES.items()}
    state |= {"visual.class_embedding": hankel((768,)), "text_projection": hankel((512, 512))}
    state |= {f"visual.ln_{end}.{kind}": torch.ones(768) for end in ("pre", "post") for kind in ("weight", "bias")}
    for i in range(12):
        block = f"visual.transformer.resblocks.{i}"
        state |= {f"{block}.attn.in_proj_weight": hankel((2304, 768)), f"{block}.attn.in_proj_bias": hankel((2304,))}
        linears = {"attn.out_proj": (768, 768), "mlp.c_fc": (3072, 768), "mlp.c_proj": (768, 3072)}
        for name, shape in linears.items():
            state |= {f"{block}.{name}.weight": hankel(shape), f"{block}.{name}.bias": hankel(shape[:1])}
        state |= {f"{block}.ln_{j}.{kind}": torch.ones(768) for j in (1, 2) for kind in ("weight", "bias")}
    return state | {"logit_scale": torch.tensor(4.6), "ln_final.weight": torch.ones(512)}


STATES = {"vgg16": vgg16_state, "dinov2": dinov2_state, "clip": clip_state}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """{features: file of random weights of the published names and shapes}."""
    folder = tmp_path_factory.mktemp("weights")
    for name, make in STATES.items():
        torch.save(make(), folder / f"{name}.pth")
        assert (folder / f"{name}.pth").stat().st_size < 2e6
    return {name: folder / f"{name}.pth" for name in STATES}


IMAGES = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)


def normalized(mean, std):
    x = torch.from_numpy(IMAGES).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def of_vgg16(state):
    with torch.device("meta"):
        net = torchvision.models.vgg16()
    net.load_state_dict(state, assign=True)
    x = net.eval().features(normalized((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return net.classifier[:4](net.avgpool(x).flatten(1)).relu()


def of_dinov2(state):
    with torch.device("meta"):
        net = timm.create_model(features.DINOV2_MODEL, img_size=224, num_classes=0).eval()
    state = {k: v for k, v in state.items() if k != "mask_token"}
    position = state["pos_embed"]
    grid = position[:, 1:].reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, (16, 16), mode="bicubic", antialias=True)
    state["pos_embed"] = torch.cat([position[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
    net.load_state_dict(state, assign=True)
    return net.forward_features(normalized((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))[:, 0]


def of_clip(state):
    """timm's network of the same architecture, with its own map of OpenAI's names."""
    with torch.device("meta"):
        net = timm.create_model("vit_base_patch32_clip_quickgelu_224", num_classes=512).eval()
    state = {k: v.half().float() for k, v in state.items()}  # what OpenAI's file holds
    net.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(state, net), assign=True)
    return net(normalized((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))


@pytest.mark.parametrize("name, expected", [("vgg16", of_vgg16), ("dinov2", of_dinov2), ("clip", of_clip)])
@torch.no_grad()
def test_features_are_those_of_the_network(name, expected, weights):
    """At the network's own size nothing is resized: the library's network on normalised pixels."""
    before = torch.get_rng_state()
    ((found,),) = list(feature_batches(RGBImages(IMAGES, "test"), name, weights[name]))
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng():
        theirs = expected(torch.load(weights[name], weights_only=True))
    assert found.shape == (2, FEATURES[name].dim) and found.dtype == torch.float32
    spread = found.std()
    assert spread > 0 and not torch.allclose(found[0], found[1], atol=1e-6 * float(spread))
    torch.testing.assert_close(found, theirs, rtol=1e-3, atol=2e-3 * float(spread))


def test_other_features_go_through_torch_fidelity(weights):
    sets = np.random.default_rng(1).integers(0, 256, (2, 2, 16, 16, 3), dtype=np.uint8)
    found = compute_metrics(*sets, features="dinov2", weights=weights["dinov2"], metrics=("kid",))
    assert found.keys() == {"kid_mean", "kid_std"} and np.isfinite(list(found.values())).all()


def test_safetensors_are_weights_too(tmp_path):
    """Length of the header, header, numbers."""
    file, header = tmp_path / "small.safetensors", b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}'
    file.write_bytes(len(header).to_bytes(8, "little") + header + np.arange(3, dtype="<f4").tobytes())
    assert plain_tensors(file)["a"].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match=r"small\.safetensors refused"):
        check_features("vgg16", file)


class Named(torch.nn.Module):
    """One tensor under a name of CLIP's."""

    def __init__(self, value):
        super().__init__()
        self.visual = torch.nn.Module()
        self.visual.proj = torch.nn.Parameter(value.contiguous())

    def forward(self, x):
        return x + self.visual.proj.sum()


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("kind", ["pickle", "torchscript", "other shapes", "a tensor too few", "no tensors", "text"])
def test_other_files_are_refused_and_not_run(name, kind, weights, tmp_path):
    file, target = tmp_path / "weights.pth", tmp_path / "executed"
    if kind == "torchscript":  # a program, which could do anything when loaded
        with warnings.catch_warnings(action="ignore"):
            torch.jit.trace(Named(clip_state()["visual.proj"]), torch.zeros(1)).save(file)
    elif kind == "text":
        file.write_text("weights")
    else:
        state = torch.load(weights[name], weights_only=True)
        victim = next(k for k in state if k.endswith("weight"))
        changed = {
            "pickle": state | {victim: Malicious(target)},
            "other shapes": state | {victim: torch.zeros(3, 3, 3, 3)},
            "a tensor too few": {k: v for k, v in state.items() if k != victim},
            "no tensors": {"epoch": 3},
        }
        torch.save(changed[kind], file)
    with (
        pytest.raises(ValueError, match=r"weights\.pth refused: [^\n]+$") as caught,
        warnings.catch_warnings(action="error"),
    ):
        check_features(name, file)
    assert kind != "torchscript" or "weights_only" in str(caught.value)  # refused before it is loaded
    assert not target.exists()


def test_metrics_that_cannot_be_are_dropped_from_the_default_and_refused_by_name():
    assert possible_metrics(None, "inception", False) == ("fid", "isc", "kid", "prc")
    assert possible_metrics(None, "inception", True) == ("fid", "isc")
    assert possible_metrics(None, "clip", False) == ("fid", "kid", "prc")
    assert EvalConfig(features="dinov2", fid_stats="a.npz").resolved().metrics == "fid"
    assert EvalConfig(metrics="none").resolved().metrics == "none" and EvalConfig(metrics="none").metric_names == ()
    for options, message in (
        (
            dict(metrics="fid,kid", fid_stats="a.npz"),
            "kid needs the reference images.*here: --metrics fid,isc",
        ),
        (dict(metrics="prc", fid_stats="a.npz"), "prc needs the reference images"),
        (dict(metrics="isc", features="vgg16"), "vgg16 features come from no classifier.*--metrics fid,kid,prc"),
    ):
        with pytest.raises(ValueError, match=message):
            EvalConfig(**options).resolved()


def test_a_classifier_is_one_row(digits, monkeypatch):
    """Another one under another name gives the features of its own network."""
    monkeypatch.setitem(FEATURES, "test-digits", FEATURES["digits"])
    ((ours,), (theirs,)) = (
        next(feature_batches(RGBImages(digits[:5], "x"), name)) for name in ("test-digits", "digits")
    )
    assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="test-digits features need uint8 images"):
        build_extractor("test-digits")[0](torch.zeros(2, 3, 9, 9, dtype=torch.uint8))


# ---------------------------------------------------------------------------------------------- sampling and measuring


def test_sampling_against_statistics_is_sampling_against_their_images(checkpoint, stats_file, tmp_path, capsys):
    flags = "--features digits --num_images 40 --no_ema".split()  # its own --metrics none comes first
    for name, more in (("images", ["--metrics", "fid,isc"]), ("stats", ["--fid_stats", stats_file])):
        more = [*more] if name == "images" else [*more, "--metrics", "fid,isc"]
        assert draw(checkpoint, tmp_path / name, *flags, *more) == 0
    (images,), (stats,) = rows(tmp_path / "images"), rows(tmp_path / "stats")
    assert stats["metrics"] == pytest.approx({k: images["metrics"][k] for k in ("fid", "is_mean", "is_std")}, rel=1e-3)
    assert images["reference"] != stats["reference"] == load_fid_stats(stats_file).hash()
    how = dict(kind="generation", num_images=40, balance="4 of each of 10 classes", ema=False, dtype="fp32")
    how |= dict(split="train", num_reference=1797, features="digits")
    assert images["protocol"] == how | dict(reference="digits") and images["kind"] == "generation"
    assert stats["protocol"] == how | dict(reference=f"statistics in {stats_file}")
    start = "generation of 40 images (4 of each of 10 classes, raw weights, fp32) against 1797 images of "
    printed = [text for text in capsys.readouterr().out.splitlines() if text.startswith("generation")]
    assert printed == [
        f"{start}{what} (split: train), features: digits" for what in ("digits", f"statistics in {stats_file}")
    ]
    assert draw(checkpoint, tmp_path / "stats", *flags, "--fid_stats", stats_file, "--metrics", "fid,isc") == 0
    assert len(rows(tmp_path / "stats")) == 1 and start in capsys.readouterr().out  # also where it is there already


def test_the_default_metrics_follow_the_reference(checkpoint, stats_file, tmp_path):
    base = ["--checkpoint", str(checkpoint), "--device", "cpu", "--num_images", "4", "--num_sampling_steps", "2"]
    assert sample.main([*base, "--output_dir", str(tmp_path), "--fid_stats", str(stats_file)]) == 0
    (row,) = rows(tmp_path)
    assert row["settings"]["metrics"] == "fid,isc" and row["metrics"].keys() == {"fid", "is_mean", "is_std"}


def test_a_reference_by_hand_replaces_the_checkpoints(checkpoint, tmp_path, capsys):
    """Trained with --fid_stats, then compared with images, and trained with --eval_split val, then with statistics."""
    stored = load_checkpoint(checkpoint)

    def reference(evaluation, *flags):
        stored["config"]["eval"] = {"features": "digits", "metrics": None, **evaluation}
        save_checkpoint(tmp_path, stored)
        assert sample.main(["--checkpoint", str(tmp_path), "--dry_run", *flags]) == 0
        shown = json.loads(capsys.readouterr().out)
        return shown["fid_stats"], shown["eval_split"], shown["metrics"]

    capsys.readouterr()
    assert reference({"fid_stats": "a.npz"}) == ("a.npz", "train", "fid,isc")
    for flags in (["--eval_split", "train"], ["--data_path", "images"]):
        assert reference({"fid_stats": "a.npz"}, *flags) == (None, "train", "fid,isc,kid,prc")
    assert reference({"eval_split": "val"}) == (None, "val", "fid,isc,kid,prc")
    assert reference({"eval_split": "val"}, "--fid_stats", "b.npz") == ("b.npz", "train", "fid,isc")


def test_the_split_is_the_reference(tmp_path, capsys):
    """Against train and against val images: other references, each found again, each said."""
    folder = image_folder(tmp_path / "images", {"train": 12, "val": 5})
    flags = f"--data imagefolder --data_path {folder} --tokenizer pixel --img_size 8 --model mar_tiny --batch_size 12"
    run, out = train_tiny(tmp_path / "run", *flags.split()), tmp_path / "out"
    for split in ("train", "val", "val"):
        assert draw(run, out, "--metrics", "fid", "--features", "digits", "--num_images", 6, "--eval_split", split) == 0
    train, val = rows(out)
    assert [r["protocol"]["num_reference"] for r in (train, val)] == [24, 10]
    assert [r["protocol"]["split"] for r in (train, val)] == ["train", "val"]
    assert train["reference"] != val["reference"] and train["metrics"]["fid"] != val["metrics"]["fid"]
    assert f"against 10 images of imagefolder {folder} (split: val), features: digits" in capsys.readouterr().out
    expected = build_dataset("imagefolder", data_path=folder, img_size=8, split="val")
    assert val["reference"] == reference_hash(expected)

    evaluate = [*SMALL, *flags.split(), "--evaluate", "--resume", str(run), "--output_dir", str(tmp_path / "evaluated")]
    evaluate += "--features digits --metrics fid --num_images 6 --eval_split val --num_sampling_steps 2".split()
    assert main_mar.main(evaluate) == 0
    printed = capsys.readouterr().out
    assert "(3 of each of 2 classes, EMA weights, fp32) against 10 images of imagefolder" in printed
    assert "FID" in printed


@pytest.mark.parametrize(
    "flags, shown",
    [
        ("--fid_stats {tmp}/missing.npz", "{tmp}/missing.npz"),
        ("--fid_stats {text}", "{text}"),
        ("--fid_stats {wide}", "2048"),
        ("--fid_stats {large}", "16"),
        ("--fid_stats {stats} --metrics fid,kid", "kid"),
        ("--fid_stats {stats} --eval_split val", "val"),
        ("--eval_split val", "'val'"),
        ("--eval_split test", "'test'"),
        ("--features vgg16 --fid_weights {text}", "{text}"),
        ("--features clip --metrics isc", "clip"),
    ],
)
def test_bad_references_are_one_line_before_anything_is_sampled(
    flags, shown, checkpoint, stats_file, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("engine_mar.generate", lambda *a, **k: pytest.fail("sampling had started"))
    places = {"tmp": tmp_path, "text": tmp_path / "text", "stats": stats_file}
    places["text"].write_text("hello")
    for name, d, img_size in (("wide", 2048, None), ("large", 64, 16)):
        places[name] = tmp_path / f"{name}.npz"
        save_fid_stats(places[name], FIDStats(np.zeros(d), np.eye(d), img_size=img_size))
    flags = flags.format(**places).split()
    base = ["--checkpoint", str(checkpoint), "--output_dir", str(tmp_path / "out"), "--device", "cpu"]
    assert shown.format(**places) in refused(sample.main, [*base, "--num_images", "8", *flags], capsys)
    base = [*SMALL, "--evaluate", "--resume", str(checkpoint), "--output_dir", str(tmp_path / "out"), *flags]
    assert shown.format(**places) in refused(main_mar.main, [*base, "--num_images", "8"], capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change, found", [("missing", 3), ("one too many", 5)])
def test_another_number_of_images_than_asked_for_is_not_measured(change, found, tmp_path, monkeypatch):
    def made(mar, tokenizer, sampling, labels, seed, folder, **options):
        folder.mkdir()
        for i in range(found):
            save_png(folder / f"{i}.png", np.full((8, 8, 1), i, np.uint8))
        return {}

    monkeypatch.setattr(engine_mar, "sample_images", made)
    monkeypatch.setattr(engine_mar, "score", lambda *a: pytest.fail("measured"))
    options = dict(device=torch.device("cpu"), dtype=torch.float32)
    with pytest.raises(ValueError, match=f"out holds {found} images, expected 4$"):
        engine_mar.evaluate(None, None, None, EvalConfig(num_images=4), None, [0] * 4, 0, tmp_path / "out", **options)
    with pytest.raises(ValueError):
        PNGFolder(tmp_path / "out", 4)


def test_a_truncated_picture_of_the_last_batch_only_is_made_again(checkpoint, tmp_path):
    """Cut by so little that all pixels are still there."""
    assert draw(checkpoint, tmp_path) == 0
    file = folder_of(tmp_path) / "23.png"
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    (tmp_path / "results.jsonl").unlink()
    assert draw(checkpoint, tmp_path) == 0
    assert file.read_bytes() == whole and rows(tmp_path)[0]["num_made"] == 8


@pytest.mark.parametrize(
    "labels, words",
    [
        ([0, 1, 2] * 4, "4 of each of 3 classes"),
        ([0, 1, 2, 0], "1 to 2 of each of 3 classes"),
        ([7] * 5, "5 of each of 1 class"),
        ([-1] * 5, "unconditional"),
        ([-1, 3], "1 of each of 2 classes (one of them unconditional)"),
    ],
)
def test_class_balance_in_words(labels, words):
    assert class_balance(labels) == words


def test_the_protocol_of_no_metrics_names_no_reference():
    config = EvalConfig(metrics="none")
    assert build_reference(config, "digits", None, 8) is None
    found = protocol("generation", config, [0, 1], None, "digits", ema=True, dtype="bf16")
    assert protocol_line(found) == "generation of 2 images (1 of each of 2 classes, EMA weights, bf16)"
    assert json.loads(json.dumps(found)) == found


# ----------------------------------------------------------------------------------------------------------- the table


def tables(path, capsys, *flags) -> dict[str, list[list[str]]]:
    """{heading, "" for none: the cells of the table under it}."""
    capsys.readouterr()
    assert make_table.main([str(path), *flags]) == 0
    found, heading = {}, ""
    for text in capsys.readouterr().out.splitlines():
        if text.endswith(":"):
            heading = text[:-1]
        elif text.startswith("|"):
            found.setdefault(heading, []).append([part.strip() for part in text.strip("|").split("|")])
    return found


def test_kinds_references_and_features_are_not_mixed(tmp_path, capsys):
    lines = [line("both", 8, s, fid) for s, fid in enumerate((1.5, 2.0))]  # from before there were kinds
    lines += [line("both", 8, 2, 2.5, kind="generation"), line("both", 8, 0, 50.0, reference="cc")]
    reconstruction = line("both", 8, 0, 0.0, kind="reconstruction", metrics=dict(rfid=0.5, psnr=25.0, ssim=0.9))
    by_clip = line("both", 8, 0, 70.0)
    by_clip["settings"]["features"] = "clip"
    path = write(tmp_path / "r.jsonl", [*lines, reconstruction, by_clip])
    found = tables(path, capsys)
    assert list(found) == [
        "generation, features None, reference bb",
        "generation, features None, reference cc",
        "reconstruction, features None, reference bb",
        "generation, features clip, reference bb",
    ]
    first, other, rec, clip = ({h: c for h, c in zip(t[0], t[2])} for t in found.values())
    assert (first["FID"], first["seeds"]) == ("2.000 ± 0.500", "3")
    assert (other["FID"], clip["FID"]) == ("50", "70") and all(len(t) == 3 for t in found.values())
    assert (rec["rFID"], rec["PSNR (dB)"], rec["SSIM"]) == ("0.5000", "25", "0.9000")
    assert "FID" not in rec and "rFID" not in first

    line_of_error = refused(make_table.main, [str(path), "--plot", str(tmp_path / "p.png")], capsys)
    assert "cannot be in one plot" in line_of_error and not (tmp_path / "p.png").exists()
    write(path, [*lines[:3], reconstruction])
    assert make_table.main([str(path), "--plot", str(tmp_path / "p.png"), "--csv", str(tmp_path / "t.csv")]) == 0
    assert (tmp_path / "p.png").is_file()
    head, *body = (tmp_path / "t.csv").read_text().splitlines()
    assert head.startswith("kind,") and [text.split(",")[0] for text in body] == ["generation", "reconstruction"]


# -------------------------------------------------------------------------------------------------------- tokenizers


def noise(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def test_psnr_closed_forms():
    x = noise(3, 2, 9, 9).clamp(max=200)
    y = x.clone()
    y[1] += 5  # mse 25
    y[2, 0] += 10  # mse 50
    expected = [PSNR_MAX, 20 * np.log10(255 / 5), 20 * np.log10(255 / np.sqrt(50))]
    assert psnr(x, y).tolist() == pytest.approx(expected)
    assert psnr(torch.zeros(1, 1, 4, 4), torch.full((1, 1, 4, 4), 255)).item() == pytest.approx(0)


def test_ssim_closed_forms():
    x, y = noise(2, 3, 24, 20), noise(2, 3, 24, 20, seed=1)
    assert ssim(x, x).tolist() == pytest.approx([1, 1])
    torch.testing.assert_close(ssim(x, y), ssim(y, x))
    assert ssim(x, y).abs().max() < 0.2  # nothing in common
    a, b, c1 = 60.0, 180.0, 6.5025
    flat = ssim(torch.full((1, 1, 16, 16), a), torch.full((1, 1, 16, 16), b))
    assert flat.item() == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1))
    assert ssim(x, 255 - x).max() < 0  # the structure is inverted
    near = ssim(x, (x.int() + 4).clamp(max=255))
    assert (ssim(x, y) < near).all() and (near < 1).all()


@pytest.mark.parametrize("size, window", [(24, 11), (11, 11), (8, 7), (3, 3)])
def test_ssim_is_wangs_equation(size, window):
    """The equation with scipy's filters; in images smaller than the window, the largest odd one that fits."""
    x, y = noise(1, 1, size, size).double(), noise(1, 1, size, size, seed=1).double()
    y = (x + y) / 2
    kernel = np.exp(-((np.arange(window) - window // 2) ** 2) / (2 * 1.5**2))
    inside = slice(window // 2, size - window // 2)

    def mean(image):
        for axis in (0, 1):
            image = correlate1d(image, kernel / kernel.sum(), axis=axis)
        return image[inside, inside]

    p, q = x[0, 0].numpy(), y[0, 0].numpy()
    mp, mq = mean(p), mean(q)
    vp, vq, c = mean(p**2) - mp**2, mean(q**2) - mq**2, mean(p * q) - mp * mq
    expected = (2 * mp * mq + 6.5025) * (2 * c + 58.5225) / ((mp**2 + mq**2 + 6.5025) * (vp + vq + 58.5225))
    assert ssim(x, y).item() == pytest.approx(expected.mean(), rel=1e-9)


class Rounding(torch.nn.Module):
    """A tokenizer that keeps four grey levels."""

    stride, channels, fingerprint = 1, 1, "rounding"

    def __init__(self):
        super().__init__()
        self.levels = torch.nn.Parameter(torch.tensor(1.5))

    def encode(self, images, sample=True, generator=None):
        assert not sample  # the mean of the distribution, not a draw from it
        return (images * self.levels - 0.5).round() + 0.5

    def decode(self, latents):
        return latents / self.levels


def test_reconstruction_figures_are_those_of_the_images(digits):
    """In batches as all at once: rFID from compute_metrics' distance, PSNR and SSIM of the rounded images."""
    real = torch.from_numpy(digits[:200]).permute(0, 3, 1, 2)
    images = torch.utils.data.TensorDataset(real)
    found = score_reconstructions(Rounding(), images, features="digits", batch_size=33)
    made = Rounding().decode(Rounding().encode(real / 127.5 - 1, sample=False))
    made = ((made + 1) * 127.5).round().to(torch.uint8)
    assert len(made.unique()) == 4
    by_images = compute_metrics(made.permute(0, 2, 3, 1), digits[:200], features="digits", metrics=("fid",))
    assert found["rfid"] == pytest.approx(by_images["fid"], rel=1e-3) and found["rfid"] > 0.001
    assert found["psnr"] == pytest.approx(psnr(made, real).mean().item())
    assert found["ssim"] == pytest.approx(ssim(made, real).mean().item())
    stats = compute_fid_stats(digits[200:], "digits")
    against = score_reconstructions(Rounding(), images, features="digits", stats=stats)
    moved = [
        np.concatenate([f.numpy() for (f,) in feature_batches(RGBImages(x, "x"), "digits")])
        for x in (made.permute(0, 2, 3, 1), digits[200:])
    ]
    expected = frechet_distance(*gaussian_statistics(moved[0]), *gaussian_statistics(moved[1]))
    assert against["rfid"] == pytest.approx(expected, rel=1e-4)


def test_the_program_measures_once_and_says_reconstruction(tmp_path, monkeypatch, capsys):
    base = ["--tokenizer", "pixel", "--data", "digits", "--features", "digits", "--device", "cpu"]
    base += ["--output_dir", str(tmp_path)]
    assert measure_reconstruction.main([*base, "--num_images", "50"]) == 0
    (row,) = rows(tmp_path)
    assert row["kind"] == "reconstruction"
    assert row["metrics"] == {"rfid": pytest.approx(0, abs=1e-9), "psnr": PSNR_MAX, "ssim": pytest.approx(1)}
    how = row["protocol"]
    assert (how["kind"], how["num_images"], how["num_reference"], how["ema"]) == ("reconstruction", 50, 50, None)
    labels = build_dataset("digits").labels.tolist()
    assert how["balance"] == class_balance([labels[i * 1797 // 50] for i in range(50)])
    assert "reconstruction of 50 images" in capsys.readouterr().out

    monkeypatch.setattr(measure_reconstruction, "score_reconstructions", lambda *a, **k: pytest.fail("measured again"))
    assert measure_reconstruction.main([*base, "--num_images", "50"]) == 0
    assert len(rows(tmp_path)) == 1 and "already in" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setattr(measuring, "tokenizer_of", lambda settings, channels: Rounding())
    assert measure_reconstruction.main([*base, "--num_images", "50", "--no_rfid"]) == 0
    second = rows(tmp_path)[1]
    assert second["metrics"].keys() == {"psnr", "ssim"} and second["weights"] != row["weights"]
    assert re.search(r"pixel: PSNR \d+\.\d+ dB  SSIM 0\.\d+\n", capsys.readouterr().out)


def test_an_autoencoder_is_measured_on_a_folder(tmp_path, capsys):
    """An untrained one, in two precisions and on two splits: as many lines, none of them good."""
    import diffusers

    from tests.helpers_tokenizers import TINY

    folder = image_folder(tmp_path / "images", {"train": 3, "val": 2})
    diffusers.AutoencoderKL(**TINY["AutoencoderKL"][0]).save_pretrained(tmp_path / "vae")
    base = ["--tokenizer", f"diffusers:{tmp_path / 'vae'}", "--data_path", str(folder), "--img_size", "8"]
    base += ["--features", "digits", "--device", "cpu", "--output_dir", str(tmp_path / "out")]
    for flags in ([], ["--split", "val"], ["--dtype", "bf16"], ["--split", "val"]):
        assert measure_reconstruction.main([*base, *flags]) == 0
    lines = rows(tmp_path / "out")
    said = [(r["protocol"]["num_images"], r["protocol"]["dtype"]) for r in lines]
    assert said == [(6, "fp32"), (4, "fp32"), (6, "bf16")]
    for row in lines:
        assert 0 < row["metrics"]["psnr"] < 20 and row["metrics"]["rfid"] > 0 and -1 <= row["metrics"]["ssim"] < 0.9
    odd = [*base[:4], "--img_size", "9", *base[6:]]
    assert "9" in refused(measure_reconstruction.main, odd, capsys)


# ------------------------------------------------------------------------------------------------- commands shown


SCRIPTS = {f"{m.__name__.split('.')[1]}.py": m.main for m in (make_fid_stats, measure_reconstruction, download_weights)}
SHOWN = [ROOT / "docs" / "evaluation.md", ROOT / "README.md"]


def test_commands_of_the_documents_are_valid(tmp_path, monkeypatch, capsys):
    """Those of these scripts; test_cli.py has the others."""
    monkeypatch.setattr("tests.test_cli.PROGRAMS", SCRIPTS)
    monkeypatch.chdir(tmp_path)
    names = []
    for path in SHOWN:
        for text in shell_lines(path) if path.is_file() else ():
            for program, arguments in commands_in(text.replace("sample.py", "-").replace("main_mar.py", "-")):
                assert SCRIPTS[program]([*arguments, "--dry_run"]) == 0
                json.loads(capsys.readouterr().out)
                names.append(program)
    assert {"make_fid_stats.py", "measure_reconstruction.py"} <= set(names) and not list(tmp_path.iterdir())
