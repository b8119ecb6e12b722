"""Measuring the latents of a tokenizer, training on them, sampling with them, and what each refuses."""

import json
import re
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import main_mar
import sample
from models.tokenizers import build_tokenizer
from scripts import measure_latents
from tests.helpers_tokenizers import TINY, ldm_tensors, message, save
from util.checkpoint import load_checkpoint, save_checkpoint
from util.door import run_main
from util.rng import generator


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Twelve pictures of 16 x 16 in two classes, each one shade plus noise."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(12):
        path = folder / "train" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shade = rng.integers(20, 200, size=(1, 1, 3))
        Image.fromarray((shade + rng.integers(0, 55, (16, 16, 3))).astype(np.uint8)).save(path)
    return folder


@pytest.mark.parametrize("name", ["AutoencoderKL", "AutoencoderDC"])
def test_what_measure_latents_prints_normalises_the_latents(saved, pictures, capsys, name):
    tokenizer = f"diffusers:{saved / name}"
    flags = ["--tokenizer", tokenizer, "--data_path", str(pictures), *"--img_size 16 --num_workers 0".split()]
    assert measure_latents.main([*flags, "--batch_size", "5"]) == 0
    out = capsys.readouterr().out
    scale, mean = re.search(r"--vae_scale (\S+) --vae_mean (\S+)", out).groups()
    normal = build_tokenizer(tokenizer, vae_scale=scale, vae_mean=mean)
    files = sorted(pictures.rglob("*.png"))
    x = torch.stack([torch.from_numpy(np.array(Image.open(f))).movedim(-1, 0) for f in files]).float() / 127.5 - 1
    latents = torch.cat([normal.encode(x, generator=generator(i)) for i in range(20)]).movedim(1, 0).flatten(1)
    assert latents.std().item() == pytest.approx(1, abs=0.05)
    assert latents.mean(dim=1).abs().max() < 0.1
    # alone, the other scale makes the spread about the common mean 1
    alone = re.findall(r"--vae_scale (\S+)$", out, flags=re.M)[-1]
    plain = build_tokenizer(tokenizer, vae_scale=alone, vae_mean=0)
    assert torch.cat([plain.encode(x) for i in range(20)]).std().item() == pytest.approx(1, abs=0.05)


def test_measuring_pixels(pictures, capsys):
    flags = ["--tokenizer", "pixel", "--data_path", str(pictures), *"--img_size 16 --num_workers 0".split()]
    assert measure_latents.main([*flags, "--num_images", "7"]) == 0
    out = capsys.readouterr().out
    assert "7 images" in out and len(re.search(r"--vae_mean (\S+)", out)[1].split(",")) == 3


# a small model on the pictures; the token grid follows from the tokenizer
SMALL = (
    "--model mar_tiny --img_size 16 --buffer_size 2 --diffloss_w 16 --diffloss_d 1 --batch_size 4 --epochs 1".split()
)
SMALL += "--num_sampling_steps 2 --num_iter 2 --attn_dropout 0 --proj_dropout 0 --num_workers 0 --lr 1e-3".split()
SMALL += "--warmup_epochs 0 --metrics none --diffusion_batch_mul 1 --eval_freq 100".split()


@pytest.fixture(scope="module")
def trained(saved, pictures, tmp_path_factory) -> Path:
    """A checkpoint trained on the latents of an AutoencoderKL, whose normalisation was given by hand."""
    folder = tmp_path_factory.mktemp("trained")
    flags = ["--tokenizer", f"diffusers:{saved / 'AutoencoderKL'}", "--data_path", str(pictures)]
    flags += "--vae_scale 2 --vae_mean -0.1,0,0.1,0.2,0.3".split()
    assert main_mar.main([*SMALL, *flags, "--output_dir", str(folder)]) == 0
    return folder


def command(saved, pictures, folder, *more, name="AutoencoderKL") -> list[str]:
    flags = ["--tokenizer", f"diffusers:{saved / name}", "--data_path", str(pictures), "--output_dir", str(folder)]
    return [*SMALL, *flags, *map(str, more)]


def test_training_and_sampling_on_latents(trained, tmp_path):
    content = load_checkpoint(trained)
    assert content["step"] == 3
    sizes = content["config"]["mar"]
    assert (sizes["vae_stride"], sizes["vae_embed_dim"], sizes["patch_size"]) == (2, 5, 1)  # 64 tokens
    names = [*content["model"], *content["model_ema"]]
    assert not [name for name in names if "autoencoder" in name]  # what trains is MAR alone
    assert len(content["optimizer"]["state"]) == len(content["model"])
    out = tmp_path / "out"
    flags = "--num_images 4 --eval_bsz 2 --metrics none".split()
    assert sample.main(["--checkpoint", str(trained), "--output_dir", str(out), *flags]) == 0
    (row,) = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert np.asarray(Image.open(out / row["name"] / "3.png")).shape == (16, 16, 3)
    assert "scale 2.0 mean (-0.1, 0.0, 0.1, 0.2, 0.3)" in row["tokenizer"]


def test_posterior_noise_does_not_depend_on_the_batches(saved, pictures, tmp_path):
    """4 images twice a step equal 8 at once, and a run stopped and continued equals one that was not."""

    def train(folder, *more):
        assert main_mar.main(command(saved, pictures, folder, "--resume", folder, *more)) == 0
        return load_checkpoint(folder)["model"]

    one = train(tmp_path / "one", "--batch_size", 8, "--epochs", 2)
    for name, value in train(tmp_path / "two", "--batch_size", 4, "--accum_iter", 2, "--epochs", 2).items():
        torch.testing.assert_close(value, one[name], rtol=1e-4, atol=1e-4)
    train(tmp_path / "parts", "--batch_size", 8, "--epochs", 1)
    for name, value in train(tmp_path / "parts", "--batch_size", 8, "--epochs", 2).items():
        assert torch.equal(value, one[name])


def test_kl16_trains_from_its_file(pictures, tmp_path, small):
    file = save(tmp_path / "kl16.ckpt", {"model": ldm_tensors("kl16")})
    flags = ["--data_path", str(pictures), "--vae_path", str(file), "--output_dir", str(tmp_path / "out")]
    assert main_mar.main([*SMALL, *flags, "--img_size", "32"]) == 0
    config = load_checkpoint(tmp_path / "out")["config"]
    assert (config["tokenizer"], config["vae_path"], config["mar"]["vae_stride"]) == ("kl16", str(file), 16)
    moved = file.rename(tmp_path / "moved")
    sampling = ["--checkpoint", str(tmp_path / "out"), "--output_dir", str(tmp_path / "samples"), "--num_images", "1"]
    assert sample.main([*sampling, "--vae_path", str(moved), "--metrics", "none"]) == 0
    assert str(file) in message(sample.main, sampling)


# flags after those of a good run -> what the one line on stderr must contain
BAD_TRAINING = [
    ("--vae_stride 4", "--vae_stride 4"),
    ("--vae_embed_dim 16", "--vae_embed_dim 16"),
    ("--img_size 15", "15"),
    ("--img_size 16 --patch_size 3", "16"),
    ("--vae_scale 0", "vae_scale"),
    ("--vae_scale x", "'x'"),
    ("--vae_mean 1,2", "'1,2'"),
    ("--tokenizer diffusers:{tmp}/missing", "{tmp}/missing"),
    ("--tokenizer diffusers:{tmp}", "{tmp}"),
    ("--tokenizer kl16 --vae_path {tmp}/missing.ckpt", "{tmp}/missing.ckpt"),
    ("--tokenizer kl16 --vae_path {tmp}/text", "{tmp}/text"),
    ("--tokenizer vq16", "--vae_path"),
    ("--tokenizer pixel --vae_scale 2", "--vae_scale"),
    ("--tokenizer pixel --resume {trained}", "5 channels"),
    ("--tokenizer diffusers:{saved}/AutoencoderTiny --resume {trained}", "5 channels"),
    ("--tokenizer diffusers:{saved}/AutoencoderTiny --init_from {trained}", "5 channels"),
    ("--resume {trained}", "scale 2.0"),  # trained with another normalisation
    ("--data digits --img_size 8", "3 channels"),
]


@pytest.mark.parametrize("flags, shown", BAD_TRAINING, ids=[flags for flags, _ in BAD_TRAINING])
def test_bad_input_of_training_is_one_line(saved, pictures, trained, tmp_path, capsys, monkeypatch, flags, shown):
    monkeypatch.setattr("engine_mar.train_one_epoch", lambda *a, **k: pytest.fail("training had started"))
    (tmp_path / "text").write_text("this is no autoencoder")
    places = dict(tmp=tmp_path, saved=saved, trained=trained)
    argv = command(saved, pictures, tmp_path / "out", *(word.format(**places) for word in flags.split()))
    if "--data" in argv:
        at = argv.index("--data_path")
        del argv[at : at + 2]
    capsys.readouterr()
    assert run_main(main_mar.main, argv) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1 and shown.format(**places) in lines[0], lines
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, mean, shown", [
    ("AutoencoderTiny", None, "stride 2 with 5 channels, the tokenizer AutoencoderTiny makes stride 2 with 3"),
    ("AutoencoderDC", None, "AutoencoderDC makes stride 4 with 8 channels"),
    ("AutoencoderTiny", "1,2,3,4,5", "'1,2,3,4,5'"),
    ("missing", None, "missing"),
])  # fmt: skip
def test_sampling_with_another_tokenizer_is_one_line(saved, trained, tmp_path, capsys, name, mean, shown):
    content = load_checkpoint(trained)
    content["config"]["vae_mean"] = mean
    save_checkpoint(tmp_path / "in", content)
    flags = ["--checkpoint", tmp_path / "in", "--output_dir", tmp_path / "out", "--vae_path", saved / name]
    assert run_main(sample.main, list(map(str, flags))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert shown in line and not (tmp_path / "out").exists()


def test_sampling_with_other_weights_of_the_tokenizer_is_one_line(trained, tmp_path, capsys):
    """Latents of the same shape, which the decoder would make noise of."""
    torch.manual_seed(99)
    diffusers.AutoencoderKL(**TINY["AutoencoderKL"][0]).save_pretrained(tmp_path / "vae")
    flags = ["--checkpoint", trained, "--output_dir", tmp_path / "out", "--vae_path", tmp_path / "vae"]
    assert run_main(sample.main, list(map(str, flags))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "was trained on other latents: those of AutoencoderKL" in line and not (tmp_path / "out").exists()


def test_a_dry_run_says_what_is_left_to_the_tokenizer(capsys):
    assert main_mar.main("--data_path X --tokenizer diffusers:owner/name --img_size 24 --dry_run".split()) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["vae_stride"], values["vae_embed_dim"], values["mar"]) == (None, None, None)
    assert main_mar.main("--data cifar10 --tokenizer kl16 --dry_run".split()) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["vae_stride"], values["vae_embed_dim"], values["patch_size"]) == (16, 16, 1)
