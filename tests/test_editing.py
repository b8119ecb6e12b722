"""Conditional editing: what is kept stays, the rest is generated, and what cannot be edited is one line."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from heads.policy import PolicyHeads
from models.tokenizers import build_tokenizer
from sampling import run
from sampling.editing import Edit, read_edit
from sampling.run import sample_images
from sampling.settings import SampleConfig
from sampling.trace import KNOWN
from scripts import plot_trace
from tests.helpers import named_weights, on_cpu, tiny_mar
from tests.helpers_tokenizers import TINY
from tests.test_cli import files, refused
from tests.test_sample import draw, folder_of, pngs, rows, train_tiny
from util.images.pictures import read_png
from util.rng import generator

CPU = dict(device=torch.device("cpu"), dtype=torch.float32)


def photo(channels=1, size=8, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, channels), dtype=np.uint8)


def save(path, array) -> str:
    Image.fromarray(array.squeeze()).save(path)
    return str(path)


def lower_half(size=8) -> np.ndarray:
    mask = np.zeros((size, size), np.uint8)
    mask[size // 2 :] = 255
    return mask


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return train_tiny(tmp_path_factory.mktemp("checkpoint"), "--batch_size", 600)


@pytest.fixture
def given(tmp_path):
    """The flags of an edit whose lower half is generated."""
    image, mask = save(tmp_path / "image.png", photo()), save(tmp_path / "mask.png", lower_half())
    return ["--edit_image", image, "--edit_mask", mask]


# ------------------------------------------------------------------------------------------------------ what is kept


def tokenizer_and_mar(name, tmp_path):
    if name == "pixel":
        return build_tokenizer("pixel", channels=1), tiny_mar()
    if name == "patches":
        return build_tokenizer("pixel", channels=3), tiny_mar(vae_embed_dim=3, patch_size=2)
    import diffusers

    torch.manual_seed(0)
    settings, channels, stride, *_ = TINY["AutoencoderKL"]
    diffusers.AutoencoderKL(**settings).save_pretrained(tmp_path / "kl")
    tokenizer = build_tokenizer(f"diffusers:{tmp_path / 'kl'}")
    return tokenizer, tiny_mar(vae_stride=stride, vae_embed_dim=channels)


@pytest.mark.parametrize("mode", ["baseline", "both"])
@pytest.mark.parametrize("name", ["pixel", "patches", "kl"])
def test_known_tokens_and_their_pixels_are_untouched(name, mode, tmp_path, monkeypatch):
    """Under hand-made and learned rules, the latter with groups that differ between images and may finish early."""
    tokenizer, mar = tokenizer_and_mar(name, tmp_path)
    heads = PolicyHeads(16, tau_mode="token", cfg_mode="token", rho=(0.1, 0.9), tau=(0.5, 1.5))
    heads = named_weights(heads, scale=0.15).eval() if mode == "both" else None
    unknown = torch.rand(mar.config.grid, mar.config.grid, generator=generator(1)).numpy() < 0.5
    edit = Edit(photo(tokenizer.image_channels), unknown)
    made = []
    monkeypatch.setattr(run, "generate", lambda *a, **k: made.append(generate(*a, **k)) or made[-1])
    sampling = SampleConfig(infer_mode=mode, cfg=2.0, num_iter=6, num_sampling_steps=2)
    parts = on_cpu(mar, tokenizer, heads)
    sample_images(parts, sampling, [0, 1, 2, -1, 0], 7, tmp_path / "out", batch_size=3, edit=edit)
    latents = torch.cat(made)
    tokens, mask = mar.patchify(latents), torch.from_numpy(unknown).flatten()
    wanted = mar.patchify(tokenizer.encode(edit.images(), sample=False))
    assert len(tokens) == 5 and torch.equal(tokens[:, ~mask], wanted[:, ~mask].expand(5, -1, -1))
    # an untrained model's pixels are clipped, so that some agree
    assert (tokens[:, mask] != wanted[:, mask]).float().mean() > 0.5
    assert len({image.numpy().tobytes() for image in tokens}) == 5  # each has its own draws

    images = np.stack([read_png(tmp_path / "out" / f"{i}.png") for i in range(5)])
    kept = np.broadcast_to(~edit.pixels, edit.source.shape)
    assert kept.mean() == pytest.approx((~unknown).mean()) and 0.3 < kept.mean() < 0.7
    assert (images[:, kept] == edit.source[kept]).all()
    decoded = run.to_uint8(tokenizer.decode(latents))
    assert (images[:, ~kept] == decoded[:, ~kept]).all()
    assert (decoded[:, kept] == edit.source[kept]).all() == (name != "kl")  # which is why they are pasted back


generate = run.generate


def test_a_token_is_unknown_if_any_of_its_pixels_is_to_be_generated(tmp_path):
    mask = np.zeros((8, 8), np.uint8)
    mask[:4, :4], mask[7, 0], mask[4, 4] = 127, 128, 255
    paths = save(tmp_path / "i.png", photo()), save(tmp_path / "m.png", mask)
    edit = read_edit(*paths, img_size=8, channels=1, cell=4)
    assert edit.unknown.tolist() == [[False, False], [True, True]]
    assert edit.pixels[:, :, 0].tolist() == [[False] * 8] * 4 + [[True] * 8] * 4
    assert np.array_equal(edit.source, photo())


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_of_any_mode_are_read(channels, tmp_path):
    photos, mask = Image.fromarray(photo(3)), Image.fromarray(lower_half())
    for mode in ("L", "RGB", "RGBA", "P", "CMYK"):
        photos.convert(mode).save(image := tmp_path / "i.tif")
        for mode in ("1", "L", "P", "RGB", "I;16"):
            wide = np.asarray(mask).astype(np.uint16) * 257
            (Image.fromarray(wide) if mode == "I;16" else mask.convert(mode)).save(tmp_path / "m.png")
            edit = read_edit(image, tmp_path / "m.png", img_size=8, channels=channels, cell=1)
            assert edit.source.shape == (8, 8, channels) and np.array_equal(edit.unknown, lower_half() > 0)
    photos.save(image)
    colours = photo(3) if channels == 3 else np.asarray(photos.convert("L"))[:, :, None]
    assert np.array_equal(read_edit(image, tmp_path / "m.png", img_size=8, channels=channels, cell=1).source, colours)


# -------------------------------------------------------------------------------------------- the command and its files


def test_an_edit_is_one_picture_a_label_in_its_own_folder(checkpoint, given, tmp_path):
    out = tmp_path / "out"
    flags = ["--checkpoint", str(checkpoint), "--output_dir", str(out), "--num_sampling_steps", "2"]
    flags += [*given, "--class_labels", "3,-1,7", "--dtype", "fp32"]
    assert sample.main(flags) == 0  # without --num_images, without --metrics
    (row,), folder = rows(out), folder_of(out)
    assert row["metrics"] == {} and row["kind"] == row["protocol"]["kind"] == "editing" and row["reference"] is None
    assert all(re.fullmatch("[0-9a-f]{16}", row["settings"][key]) for key in ("edit_image", "edit_mask"))
    assert row["settings"]["num_images"] == 3 and pngs(folder).keys() == {"0.png", "1.png", "2.png"}
    assert re.search("_edit[0-9a-f]{8}$", folder.name)
    images = [read_png(folder / f"{i}.png") for i in range(3)]
    assert all(np.array_equal(image[:4], photo()[:4]) for image in images)
    assert len({image[4:].tobytes() for image in images}) == 3

    sheet = np.asarray(Image.open(folder / "grid.png").convert("L"))
    kept = np.where(lower_half()[:, :, None] > 0, 128, photo())
    for i, image in enumerate([photo(), kept, *images]):
        x = 4 + 68 * i
        assert np.array_equal(sheet[20:84:8, x : x + 64 : 8], image[:, :, 0])

    # the same again is there already; another mask, another picture and no edit are not
    assert sample.main(flags) == 0 and len(rows(out)) == 1
    save(tmp_path / "mask.png", 255 - lower_half())
    assert sample.main(flags) == 0
    save(tmp_path / "image.png", photo(seed=1))
    assert sample.main(flags) == 0
    assert draw(checkpoint, out, "--num_images", 3, "--class_labels", "3,-1,7") == 0
    assert len({r["name"] for r in rows(out)}) == 4 and "edit_image" not in rows(out)[-1]["settings"]
    assert np.array_equal(read_png(folder_of(out, 1) / "0.png")[4:], photo()[4:])


def test_an_edited_picture_depends_on_its_number_only(checkpoint, given, tmp_path):
    for size in (2, 5):
        assert draw(checkpoint, tmp_path / str(size), *given, "--num_images", 5, "--eval_bsz", size) == 0
    two, five = (np.stack([read_png(folder_of(tmp_path / s) / f"{i}.png") for i in range(5)]) for s in ("2", "5"))
    assert (np.abs(two.astype(int) - five) <= 1).mean() >= 0.999


def test_an_interrupted_edit_keeps_what_is_finished(checkpoint, given, tmp_path):
    out = tmp_path / "out"
    flags = [*given, "--num_images", 6, "--eval_bsz", 2]
    assert draw(checkpoint, out, *flags) == 0
    folder, before = folder_of(out), pngs(folder_of(out))
    (out / "results.jsonl").unlink()
    (folder / "3.png").write_bytes(before["3.png"][:40])
    times = {i: (folder / f"{i}.png").stat().st_mtime_ns for i in (0, 1, 4, 5)}
    assert draw(checkpoint, out, *flags) == 0
    assert pngs(folder) == before and rows(out)[0]["num_made"] == 2
    assert times == {i: (folder / f"{i}.png").stat().st_mtime_ns for i in times}


def test_a_trace_shows_known_tokens_from_the_start(checkpoint, given, tmp_path):
    flags = [*given, "--num_images", 3, "--num_iter", 4, "--cfg", 2, "--save_trace", 2]
    assert draw(checkpoint, tmp_path / "out", *flags) == 0
    folder = folder_of(tmp_path / "out")
    with np.load(folder / "trace.npz") as file:
        trace = dict(file)
    for i in range(2):
        order, picture = trace["order_step"][i].reshape(8, 8), read_png(folder / f"{i}.png")
        assert (order[:4] == -1).all() and (order[4:] >= 0).all() and trace["group_size"][i].sum() == 32
        assert (trace["cfg"][i][:32] == 1).all() and (trace["cfg"][i][32:] > 1).any()
        for step in range(4):
            assert np.array_equal(trace["frames"][i, step], np.where((order <= step)[..., None], picture, 128))
    assert plot_trace.main([str(folder / "trace.npz"), "--out", str(tmp_path / "plots"), "--images", "0"]) == 0
    with Image.open(tmp_path / "plots" / "trace_0.gif") as image:
        mask = np.asarray(image.convert("RGB")).astype(int)[16::32, 264 + 16 :: 32]
    assert (np.abs(mask[:4] - KNOWN).max(-1) <= 8).all()


# ------------------------------------------------------------------------------------------------------------ bad input

GOOD = "--edit_image {image} --edit_mask {mask}"
BAD = [
    ("--edit_image {image}", "--edit_mask"),
    ("--edit_mask {mask}", "--edit_image"),
    ("--edit_image {missing} --edit_mask {mask}", "{missing}"),
    ("--edit_image {image} --edit_mask {missing}", "{missing}"),
    ("--edit_image {text} --edit_mask {mask}", "{text}"),
    ("--edit_image {image} --edit_mask {text}", "{text}"),
    ("--edit_image {cut} --edit_mask {mask}", "{cut}"),
    ("--edit_image {folder} --edit_mask {mask}", "{folder}"),
    ("--edit_image {wide} --edit_mask {mask}", "9x8"),
    ("--edit_image {image} --edit_mask {wide}", "9x8"),
    ("--edit_image {image} --edit_mask {black}", "{black}"),
    (f"{GOOD} --metrics fid", "fid"),
    (f"{GOOD} --class_labels 10", "'10'"),
    (f"{GOOD} --infer_mode policy", "policy"),
]


@pytest.mark.parametrize("flags, shown", BAD, ids=[flags for flags, _ in BAD])
def test_what_cannot_be_edited_is_one_line_before_anything_happens(
    flags, shown, checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("sampling.run.generate", lambda *a, **k: pytest.fail("sampling had started"))
    arrays = dict(image=photo(), mask=lower_half(), wide=np.full((8, 9), 200, np.uint8), black=np.full((8, 8), 127))
    places = {name: save(tmp_path / f"{name}.png", array.astype(np.uint8)) for name, array in arrays.items()}
    (tmp_path / "text.png").write_text("this is no picture")
    (tmp_path / "cut.png").write_bytes((tmp_path / "image.png").read_bytes()[:60])
    places |= {name: str(tmp_path / f"{name}.png") for name in ("text", "cut", "missing")} | {"folder": str(tmp_path)}
    before = files(tmp_path)
    base = ["--checkpoint", str(checkpoint), "--output_dir", str(tmp_path / "out")]
    assert shown.format(**places) in refused(sample.main, [*base, *flags.format(**places).split()], capsys)
    assert files(tmp_path) == before


@pytest.mark.parametrize("missing", ["image", "mask"])
def test_a_dry_run_without_a_picture_leaves_the_hash_of_the_edit_open(missing, checkpoint, given, tmp_path, capsys):
    (tmp_path / f"{missing}.png").unlink()
    flags = ["--checkpoint", str(checkpoint), "--output_dir", str(tmp_path / "out"), "--class_labels", "3,7", *given]
    flags += ["--dtype", "fp32"]
    capsys.readouterr()
    assert sample.main([*flags, "--dry_run"]) == 0
    config = json.loads(capsys.readouterr().out)
    assert config["num_images"] == 2 and re.search(r"_edit\?{8}$", config["settings"][0])
    assert f"{missing}.png" in refused(sample.main, flags, capsys)


def test_a_dry_run_refuses_pictures_that_cannot_be_edited(checkpoint, given, tmp_path, capsys):
    (tmp_path / "mask.png").write_text("no picture")
    assert "mask.png" in refused(sample.main, ["--checkpoint", str(checkpoint), *given, "--dry_run"], capsys)


def test_a_dry_run_names_the_folder_of_the_edit(checkpoint, tmp_path, given, capsys):
    command = ["--checkpoint", str(checkpoint), "--output_dir", str(tmp_path / "out"), "--num_iter", "2"]
    command += ["--num_sampling_steps", "2", "--class_labels", "3", *map(str, given)]
    assert sample.main([*command, "--dry_run"]) == 0
    (name,) = json.loads(capsys.readouterr().out)["settings"]
    assert sample.main(command) == 0
    assert [path.name for path in (tmp_path / "out").iterdir() if path.is_dir()] == [name]
