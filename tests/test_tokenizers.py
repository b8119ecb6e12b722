"""Latent tokenizers: parity of KL-16, every autoencoder class, normalisation, posterior noise, and training on them."""

import json
import re
import sys
import types
import zlib
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import main_mar
import sample
from models.tokenizers import build_tokenizer, ldm
from models.tokenizers.autoencoder import AUTOENCODERS
from scripts import measure_latents
from util.args import run_main
from util.checkpoint import load_checkpoint, read_file, save_checkpoint
from util.rng import generator

REFERENCE = np.load(Path(__file__).parent / "fixtures" / "kl16_reference.npz")

# the smallest of each class, of stride 2 but for DC's 4: (settings, channels of the latents, stride, scale, mean)
LEVELS = dict(block_out_channels=(8, 8), norm_num_groups=4)
BLOCKS = dict(down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2)
TINY = {
    "AutoencoderKL": (
        dict(**LEVELS, **BLOCKS, latent_channels=5, scaling_factor=0.5, shift_factor=0.25), 5, 2, 0.5, 0.25,
    ),
    "AutoencoderTiny": (
        dict(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1))
        | dict(num_decoder_blocks=(1, 1), latent_channels=3), 3, 2, 1.0, 0.0,
    ),
    "AutoencoderDC": (
        dict(encoder_block_out_channels=(8, 8, 16), decoder_block_out_channels=(8, 8, 16), latent_channels=8)
        | dict(encoder_layers_per_block=(1,) * 3, decoder_layers_per_block=(1,) * 3, scaling_factor=0.4)
        | dict(encoder_qkv_multiscales=((),) * 3, decoder_qkv_multiscales=((),) * 3), 8, 4, 0.4, 0.0,
    ),
    "ConsistencyDecoderVAE": (
        dict(encoder_block_out_channels=(8, 8), encoder_down_block_types=["DownEncoderBlock2D"] * 2)
        | dict(encoder_layers_per_block=1, encoder_norm_num_groups=4, decoder_block_out_channels=(8, 8))
        | dict(decoder_down_block_types=["ResnetDownsampleBlock2D"] * 2, decoder_norm_num_groups=4)
        | dict(decoder_up_block_types=["ResnetUpsampleBlock2D"] * 2, decoder_layers_per_block=1), 4, 2, 0.18215, 0.0,
    ),
    "VQModel": (dict(**LEVELS, **BLOCKS, latent_channels=6, vq_embed_dim=3, num_vq_embeddings=7), 3, 2, 0.18215, 0.0),
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder with one saved autoencoder of each class, under the name of the class."""
    folder = tmp_path_factory.mktemp("autoencoders")
    for seed, (name, (settings, *_)) in enumerate(TINY.items()):
        torch.manual_seed(seed)
        getattr(diffusers, name)(**settings).save_pretrained(folder / name)
    return folder


@pytest.fixture
def small(monkeypatch):
    """Networks of KL-16's and VQ-16's shape, but narrow."""
    monkeypatch.setattr(ldm, "WIDTHS", (32,) * 5)


def images(batch=3, height=16, width=8, seed=0):
    return torch.rand(batch, 3, height, width, generator=generator(seed)) * 2 - 1


def ldm_tensors(name, decoder_attention=False, seed=0) -> dict:
    """Tensors as an LDM file of this tokenizer names and shapes them."""
    sizes = {"decoder.up.4.attn.": 0} if decoder_attention else {}
    if name == "vq16":
        sizes |= {"quantize.embedding.weight": torch.zeros(20, 6), "decoder.conv_in.weight": torch.zeros(32, 8, 3, 3)}
    torch.manual_seed(seed)
    tensors = ldm._build(ldm.LDM[name][0], sizes).state_dict()
    linear = re.compile(r"attn.*(q|k|v|proj_out)\.weight")
    named = {ldm.ldm_name(key): value for key, value in tensors.items()}
    return {key: value[..., None, None] if linear.search(key) else value for key, value in named.items()}


def save(path, content) -> Path:
    torch.save(content, path)
    return path


def message(call, *args, **options) -> str:
    """The one line of the ValueError that the call must raise."""
    with pytest.raises(ValueError) as error:
        call(*args, **options)
    assert str(error.value) and "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------------- KL-16 and VQ-16


def test_kl16_is_at_parity_with_the_published_one(tmp_path):
    """All 312 tensors of the file, and an image that is not square, which shows on which side the strides pad."""
    weights = {"loss.logvar": torch.zeros(())}
    for entry in REFERENCE["keys"]:
        key, shape = re.fullmatch(r"(\S+) \((.*)\)", entry).groups()
        shape = tuple(int(n) for n in shape.split(",") if n.strip())
        g = np.random.RandomState(zlib.crc32(key.encode()) & 0xFFFFFFFF)
        fan_in = 400 if len(shape) == 1 else np.prod(shape[1:])
        value = g.standard_normal(shape) / np.sqrt(fan_in) + (len(shape) == 1 and key.endswith("weight"))
        weights[key] = torch.from_numpy(value.astype(np.float32))
    file = save(tmp_path / "kl16.ckpt", {"model": weights})
    tokenizer = build_tokenizer("kl16", vae_path=file)
    file.unlink()  # 270 MB
    assert (tokenizer.stride, tokenizer.channels, tokenizer.moment_channels, tokenizer.clip) == (16, 16, 32, None)
    assert (tokenizer.scale, tokenizer.mean) == (0.2325, 0.0)
    assert not tokenizer.training and not any(p.requires_grad for p in tokenizer.parameters())

    moments = tokenizer.encode_moments(torch.from_numpy(REFERENCE["image"]))
    np.testing.assert_allclose(moments.numpy(), REFERENCE["moments"], rtol=1e-4, atol=1e-5)
    latents = tokenizer.from_moments(moments, sample=False)
    torch.testing.assert_close(latents, moments[:, :16] * 0.2325)
    np.testing.assert_allclose(
        tokenizer.decode(latents).numpy(), REFERENCE["reconstruction_of_mode"], rtol=1e-4, atol=5e-5
    )


@pytest.mark.parametrize("name, channels", [("kl16", 16), ("vq16", 6)])
@pytest.mark.parametrize("key, decoder_attention", [("model", False), ("state_dict", True)])
def test_files_of_mar_and_of_ldm_load(tmp_path, small, name, channels, key, decoder_attention):
    tensors = ldm_tensors(name, decoder_attention)
    assert ("decoder.up.4.attn.2.proj_out.weight" in tensors) == decoder_attention
    tokenizer = build_tokenizer(name, vae_path=save(tmp_path / "f", {key: {**tensors, "loss.a.b": torch.ones(3)}}))
    assert (tokenizer.stride, tokenizer.channels) == (16, channels)
    for ours, value in tokenizer.autoencoder.state_dict().items():
        assert torch.equal(value.flatten(), tensors[ldm.ldm_name(ours)].flatten())
    assert tokenizer.encode(images(1, 32, 16)).shape == (1, channels, 2, 1)


def test_a_file_that_lightning_wrote_loads_without_lightning(tmp_path, small, monkeypatch):
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    content = {"callbacks": {module.ModelCheckpoint: {"best": None}}, "state_dict": ldm_tensors("vq16")}
    with monkeypatch.context() as patch:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
            patch.setitem(sys.modules, name, module)
        file = save(tmp_path / "f", content)
    assert build_tokenizer("vq16", vae_path=file).channels == 6
    assert "cannot read" in message(read_file, file)  # nowhere else


def test_vq16_is_continuous_and_quantised_by_the_decoder(tmp_path, small):
    tensors = ldm_tensors("vq16")
    tensors["quantize.embedding.weight"] = torch.randn(tensors["quantize.embedding.weight"].shape)
    tokenizer = build_tokenizer("vq16", vae_path=save(tmp_path / "f", {"state_dict": tensors}))
    model, x = tokenizer.autoencoder, images(2, 32, 32)
    latents = tokenizer.encode(x)
    assert torch.equal(latents, model.encode(x).latents) and tokenizer.moment_channels == tokenizer.channels
    codes = torch.cdist(latents.movedim(1, -1), model.quantize.embedding.weight).argmin(-1)
    nearest = model.quantize.embedding.weight[codes].movedim(-1, 1)
    assert not torch.allclose(nearest, latents)
    decoded = tokenizer.decode(latents)
    torch.testing.assert_close(decoded, model.decode(nearest, force_not_quantize=True).sample, rtol=1e-3, atol=1e-3)
    assert (decoded - model.decode(latents, force_not_quantize=True).sample).abs().max() > 0.1


BAD_FILES = {
    "lacks decoder.mid.attn_1.q.bias": lambda t: t.pop("decoder.mid.attn_1.q.bias"),
    "lacks encoder.down.4.attn.1.k.weight": lambda t: t.pop("encoder.down.4.attn.1.k.weight"),
    "unknown tensors, the first is encoder.extra": lambda t: t.update({"encoder.extra": torch.ones(1)}),
    "unknown tensors, the first is model_ema.decay": lambda t: t.update({"model_ema.decay": torch.ones(1)}),
    "decoder.conv_in.weight is (3,) there and (32, 16, 3, 3) here": lambda t: t.update(
        {"decoder.conv_in.weight": torch.ones(3)}
    ),
    "quant_conv.bias is (7,) there and (32,) here": lambda t: t.update({"quant_conv.bias": torch.ones(7)}),
}


@pytest.mark.parametrize("shown", BAD_FILES)
def test_a_file_that_does_not_fit_is_named_with_the_tensor(tmp_path, small, shown):
    tensors = ldm_tensors("kl16")
    BAD_FILES[shown](tensors)
    file = save(tmp_path / "f", {"model": tensors})
    line = message(build_tokenizer, "kl16", vae_path=file)
    assert shown in line and str(file) in line


@pytest.mark.parametrize("content", [{"weights": {}}, {"model": 3}, [1], {"model": {"a": "text"}}])
def test_a_file_without_tensors_is_no_autoencoder(tmp_path, content):
    file = save(tmp_path / "f", content)
    assert f"{file} is no autoencoder" in message(build_tokenizer, "kl16", vae_path=file)


def test_files_that_cannot_be_read(tmp_path, small):
    assert "--vae_path" in message(build_tokenizer, "vq16")
    assert str(tmp_path / "no") in message(build_tokenizer, "kl16", vae_path=tmp_path / "no")
    whole = save(tmp_path / "whole", {"model": ldm_tensors("kl16")}).read_bytes()
    for data in (b"this is text", whole[: len(whole) // 2]):
        (tmp_path / "broken").write_bytes(data)
        said = message(build_tokenizer, "kl16", vae_path=tmp_path / "broken")
        assert str(tmp_path / "broken") in said and ("cannot read" in said or "is damaged" in said)


# ------------------------------------------------------------------------------------------- classes of diffusers


def test_every_class_is_tested():
    assert TINY.keys() == AUTOENCODERS.keys()


@pytest.mark.parametrize("name", TINY)
def test_an_autoencoder_of_each_class(saved, name):
    _, channels, stride, scale, mean = TINY[name]
    tokenizer = build_tokenizer(f"diffusers:{saved / name}")
    assert (tokenizer.stride, tokenizer.channels, tokenizer.image_channels) == (stride, channels, 3)
    assert tokenizer.scale == pytest.approx(scale) and tokenizer.mean == pytest.approx(mean) and tokenizer.clip is None
    assert not tokenizer.training and not any(p.requires_grad for p in tokenizer.parameters())

    x = images()
    moments = tokenizer.encode_moments(x)
    assert moments.shape == (3, tokenizer.moment_channels, 16 // stride, 8 // stride)
    gaussian = name in ("AutoencoderKL", "ConsistencyDecoderVAE")
    assert tokenizer.moment_channels == channels * (2 if gaussian else 1)
    for draw in (lambda: generator(1), lambda: [generator(i) for i in (5, 6, 7)]):
        latents = tokenizer.encode(x, generator=draw())
        assert torch.equal(latents, tokenizer.from_moments(moments, generator=draw()))
    assert latents.shape == (3, channels, 16 // stride, 8 // stride)
    torch.testing.assert_close(tokenizer.encode(x, sample=False), (moments[:, :channels] - mean) * scale)

    decoded = tokenizer.decode(latents)
    assert decoded.shape == x.shape and decoded.dtype == torch.float32
    assert torch.equal(decoded, tokenizer.decode(latents))  # also where decoding draws noise
    torch.testing.assert_close(decoded[1:2], tokenizer.decode(latents[1:2]), rtol=1e-4, atol=1e-5)


def test_sampling_the_posterior_is_its_mean_plus_its_deviation_times_the_draw(saved):
    tokenizer = build_tokenizer(f"diffusers:{saved / 'AutoencoderKL'}", vae_scale=1, vae_mean=0)
    mean, log_variance = torch.randn(2, 1, 5, 4, 4)
    moments = torch.cat([mean, log_variance], dim=1)
    drawn = tokenizer.from_moments(moments, generator=generator(3))
    expected = mean + (0.5 * log_variance).exp() * torch.randn(1, 5, 4, 4, generator=generator(3))
    torch.testing.assert_close(drawn, expected)
    assert torch.equal(tokenizer.from_moments(moments, sample=False), mean)


def test_an_image_with_its_own_generator_has_the_same_latents_in_any_batch(saved):
    tokenizer = build_tokenizer(f"diffusers:{saved / 'AutoencoderKL'}")
    moments = tokenizer.encode_moments(images(4))
    together = tokenizer.from_moments(moments, generator=[generator(i) for i in range(4)])
    for i in (2, 0):
        alone = tokenizer.from_moments(moments[i : i + 1], generator=[generator(i)])
        assert torch.equal(alone[0], together[i])
    pair = tokenizer.from_moments(moments[[3, 1]], generator=[generator(3), generator(1)])
    assert torch.equal(pair, together[[3, 1]])
    assert not torch.equal(together, tokenizer.from_moments(moments, sample=False))
    assert "2 generators" in message(tokenizer.from_moments, moments, generator=[generator(0)] * 2)


@pytest.mark.parametrize("mean", [0.5, [0.1, -0.2, 0.3, 0.0, 2.0], "0.1,-0.2,0.3,0,2"])
def test_scale_and_mean_can_be_given_and_cancel_in_the_decoder(saved, mean):
    name = f"diffusers:{saved / 'AutoencoderKL'}"
    plain, other = build_tokenizer(name, vae_scale=1, vae_mean=0), build_tokenizer(name, vae_scale="3", vae_mean=mean)
    x = images()
    raw, latents = plain.encode(x, sample=False), other.encode(x, sample=False)
    column = torch.tensor(0.5 if mean == 0.5 else [0.1, -0.2, 0.3, 0.0, 2.0]).reshape(-1, 1, 1)
    torch.testing.assert_close(latents, (raw - column) * 3)
    assert other.scale == 3 and (other.mean == 0.5 or other.mean == (0.1, -0.2, 0.3, 0.0, 2.0))
    torch.testing.assert_close(other.decode(latents), plain.decode(raw), rtol=1e-4, atol=1e-5)


BAD_NUMBERS = [("vae_scale", 0), ("vae_scale", -1), ("vae_scale", "x"), ("vae_scale", "1,1,1,1,0"), ("vae_mean", "1,2")]
BAD_NUMBERS += [("vae_mean", [1.0, 2.0]), ("vae_mean", "nan"), ("vae_mean", "1,,2,3,4")]


@pytest.mark.parametrize("key, value", BAD_NUMBERS)
def test_bad_scale_or_mean_is_one_line(saved, key, value):
    assert key in message(build_tokenizer, f"diffusers:{saved / 'AutoencoderKL'}", **{key: value})


def test_the_fingerprint_is_of_the_weights_not_of_the_normalisation(saved, tmp_path):
    name = f"diffusers:{saved / 'AutoencoderKL'}"
    first = build_tokenizer(name)
    moved = tmp_path / "elsewhere"
    first.autoencoder.save_pretrained(moved)
    same = [build_tokenizer(name, vae_scale=7, vae_mean=1), build_tokenizer(f"diffusers:{moved}")]
    same.append(build_tokenizer("diffusers:gone", vae_path=moved))
    assert {t.fingerprint for t in same} == {first.fingerprint} and re.fullmatch(r"[0-9a-f]{16}", first.fingerprint)
    assert same[0].describe() != first.describe() == same[1].describe()
    with torch.no_grad():
        first.autoencoder.quant_conv.bias[0] += 1
    first.autoencoder.save_pretrained(moved)
    others = [build_tokenizer(f"diffusers:{p}") for p in (moved, saved / "ConsistencyDecoderVAE", saved / "VQModel")]
    others += [build_tokenizer("pixel", channels=1), build_tokenizer("pixel", channels=3)]
    assert len({t.fingerprint for t in [*same, *others]}) == 1 + len(others)


def test_pixels_have_moments_too():
    tokenizer, x = build_tokenizer("pixel", channels=3), images()
    assert torch.equal(tokenizer.encode(x, generator=[generator(0)] * 3), x) and torch.equal(tokenizer.decode(x), x)
    assert torch.equal(tokenizer.from_moments(tokenizer.encode_moments(x)), x) and tokenizer.moment_channels == 3
    assert (tokenizer.scale, tokenizer.mean, tokenizer.stride, tokenizer.clip) == (1, 0, 1, (-1, 1))


@pytest.mark.parametrize("shape", [(1, 3, 15, 16), (1, 3, 16, 9), (1, 1, 16, 16), (3, 16, 16)])
def test_images_that_do_not_fit_are_one_line(saved, shape):
    tokenizer = build_tokenizer(f"diffusers:{saved / 'AutoencoderKL'}")
    line = message(tokenizer.encode, torch.zeros(shape))
    assert "AutoencoderKL" in line and str(shape[2] if len(shape) == 4 and shape[1] == 3 else shape) in line
    message(tokenizer.from_moments, torch.zeros(1, 9, 4, 4))


def test_what_is_no_autoencoder_of_diffusers_is_one_line(saved, tmp_path):
    for name in ("nope", "diffusers", "diffusers:", "pixel:x", "kl16:x"):
        assert repr(name) in message(build_tokenizer, name)
    missing = tmp_path / "missing"
    assert str(missing) in message(build_tokenizer, f"diffusers:{missing}")
    assert str(tmp_path) in message(build_tokenizer, f"diffusers:{tmp_path}")  # a folder without config.json
    config = json.loads((saved / "AutoencoderKL" / "config.json").read_text())
    weights = next((saved / "AutoencoderKL").glob("*.safetensors"))
    copy = tmp_path / weights.name
    for settings, data, shown in (
        ({**config, "_class_name": "UNet2DModel"}, weights.read_bytes(), "UNet2DModel"),
        ({**config, "latent_channels": 7}, weights.read_bytes(), "conv"),
        ({**config, "block_out_channels": [8, 8, 8]}, weights.read_bytes(), "tmp"),
        (config, weights.read_bytes()[:1000], "cannot load"),
        (config, b"", "cannot load"),
        (config, None, "cannot load"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(settings))
        copy.unlink(missing_ok=True)
        if data is not None:
            copy.write_bytes(data)
        assert shown in message(build_tokenizer, f"diffusers:{tmp_path}")
    (tmp_path / "config.json").write_text("{")
    assert str(tmp_path) in message(build_tokenizer, f"diffusers:{tmp_path}")


def test_tensors_that_are_missing_are_not_left_at_random(saved, tmp_path):
    build_tokenizer(f"diffusers:{saved / 'AutoencoderTiny'}").autoencoder.save_pretrained(
        tmp_path, safe_serialization=False
    )
    file = tmp_path / "diffusion_pytorch_model.bin"
    weights = torch.load(file, weights_only=True)
    key = sorted(weights)[3]
    save(file, {k: v for k, v in weights.items() if k != key})
    assert key in message(build_tokenizer, f"diffusers:{tmp_path}")


# ---------------------------------------------------------------------------------- measuring, training, sampling


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
    assert measure_latents.main([*flags, "--batch_size", "5", "--device", "cpu"]) == 0
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
    assert measure_latents.main([*flags, "--num_images", "7", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "7 images" in out and len(re.search(r"--vae_mean (\S+)", out)[1].split(",")) == 3


# a small model on the pictures; the token grid follows from the tokenizer
SMALL = (
    "--model mar_tiny --img_size 16 --buffer_size 2 --diffloss_w 16 --diffloss_d 1 --batch_size 4 --epochs 1".split()
)
SMALL += "--num_sampling_steps 2 --num_iter 2 --attn_dropout 0 --proj_dropout 0 --num_workers 0 --lr 1e-3".split()
SMALL += "--warmup_epochs 0 --metrics none --device cpu --diffusion_batch_mul 1 --eval_freq 100".split()


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
    flags = "--num_images 4 --eval_bsz 2 --metrics none --device cpu".split()
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
    assert sample.main([*sampling, "--vae_path", str(moved), "--metrics", "none", "--device", "cpu"]) == 0
    assert str(file) in message(sample.main, [*sampling, "--device", "cpu"])


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
    monkeypatch.setattr(main_mar, "train_one_epoch", lambda *a, **k: pytest.fail("training had started"))
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
    assert run_main(sample.main, [*map(str, flags), "--device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert shown in line and not (tmp_path / "out").exists()


def test_sampling_with_other_weights_of_the_tokenizer_is_one_line(trained, tmp_path, capsys):
    """Latents of the same shape, which the decoder would make noise of."""
    torch.manual_seed(99)
    diffusers.AutoencoderKL(**TINY["AutoencoderKL"][0]).save_pretrained(tmp_path / "vae")
    flags = ["--checkpoint", trained, "--output_dir", tmp_path / "out", "--vae_path", tmp_path / "vae"]
    assert run_main(sample.main, [*map(str, flags), "--device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "was trained on other latents: those of AutoencoderKL" in line and not (tmp_path / "out").exists()


def test_a_dry_run_says_what_is_left_to_the_tokenizer(capsys):
    assert main_mar.main("--data_path X --tokenizer diffusers:owner/name --img_size 24 --dry_run".split()) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["vae_stride"], values["vae_embed_dim"], values["mar"]) == (None, None, None)
    assert main_mar.main("--data cifar10 --tokenizer kl16 --dry_run".split()) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["vae_stride"], values["vae_embed_dim"], values["patch_size"]) == (16, 16, 1)
