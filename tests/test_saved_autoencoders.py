"""`diffusers:PLACE`: what a config says of the latents, pipelines, variants, and single files in either naming."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

from models.tokenizers import build_tokenizer, ldm
from models.tokenizers.measuring import measure_latents
from tests.helpers_tokenizers import images, message, save
from util.rng import generator

safetensors = pytest.importorskip("safetensors.torch")  # comes with diffusers
load_file, save_file = safetensors.load_file, safetensors.save_file
FILE = "diffusion_pytorch_model.safetensors"


class Pictures(torch.utils.data.Dataset):
    """Six images as a data set gives them."""

    images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=generator(2))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i], 0, i


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the AutoencoderKL of five channels, to change."""
    return shutil.copytree(saved / "AutoencoderKL", tmp_path / "kl")


def configure(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return f"diffusers:{folder}"


# ------------------------------------------------------------------------------------------------------- normalisation


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_latents_mean_and_std_of_a_config_normalise_what_measure_latents_finds(folder, factor):
    """To mean 0 and the deviation scaling_factor, as in diffusers' StableDiffusionXLPipeline."""
    raw = build_tokenizer(f"diffusers:{folder}", vae_scale=1, vae_mean=0)
    mean, variance = measure_latents(raw, Pictures(), num_images=6)
    name = configure(folder, latents_mean=mean.tolist(), latents_std=np.sqrt(variance).tolist(), scaling_factor=factor)
    tokenizer = build_tokenizer(name)
    assert tokenizer.mean == pytest.approx(mean) and tokenizer.scale == pytest.approx(factor / np.sqrt(variance))
    mean, variance = measure_latents(tokenizer, Pictures(), num_images=6)
    np.testing.assert_allclose(mean, 0, atol=1e-5)
    np.testing.assert_allclose(variance, factor**2, rtol=1e-4)
    latents = tokenizer.encode(images(), sample=False)
    torch.testing.assert_close(
        tokenizer.decode(latents), raw.decode(raw.encode(images(), sample=False)), rtol=1e-4, atol=1e-5
    )
    assert tokenizer.fingerprint == raw.fingerprint  # of the moments, which are the same


def test_what_is_given_by_hand_wins(folder):
    name = configure(folder, latents_mean=[0.1] * 5, latents_std=[2.0] * 5, scaling_factor=1.0)
    assert build_tokenizer(name, vae_scale=3).scale == 3 and build_tokenizer(name, vae_mean=7).mean == 7
    assert build_tokenizer(name, vae_scale=3).mean == pytest.approx((0.1,) * 5)
    assert build_tokenizer(name, vae_mean=7).scale == pytest.approx((0.5,) * 5)


def test_half_of_the_statistics_are_not_used(folder):
    """As in diffusers: scaling_factor and shift_factor stand in for them."""
    for key in ("latents_mean", "latents_std"):
        name = configure(folder, **dict(latents_mean=None, latents_std=None, **{})) and configure(
            folder, **{key: [2.0] * 5}
        )
        tokenizer = build_tokenizer(name)
        assert (tokenizer.scale, tokenizer.mean) == (0.5, 0.25)


def test_a_class_without_the_settings_has_them_used_too(saved, tmp_path):
    folder = shutil.copytree(saved / "AutoencoderTiny", tmp_path / "tiny")
    tokenizer = build_tokenizer(configure(folder, latents_mean=[1.0, 2.0, 3.0], latents_std=[2.0, 4.0, 8.0]))
    assert tokenizer.mean == (1, 2, 3) and tokenizer.scale == (0.5, 0.25, 0.125)


@pytest.mark.parametrize(
    "changes, shown",
    [
        (dict(latents_std=[1.0] * 4), "latents_std of {} must be a number or 5 of them"),
        (dict(latents_mean="x"), "latents_mean of {} must be a number or 5 of them"),
        (dict(latents_std=[1.0] * 4 + [0.0]), "latents_std of {} must be above 0, got 0.0"),
    ],
)
def test_bad_statistics_are_one_line_and_do_not_keep_measure_latents_from_running(folder, changes, shown):
    name = configure(folder, **{**dict(latents_mean=[0.0] * 5, latents_std=[1.0] * 5), **changes})
    assert shown.format(folder) in message(build_tokenizer, name)
    assert build_tokenizer(name, vae_scale=1.0, vae_mean=0.0).channels == 5


# ------------------------------------------------------------------------------------------------ pipelines, variants


def moments(place, **options):
    return build_tokenizer(f"diffusers:{place}", **options).encode_moments(images())


@pytest.mark.parametrize("part, name", [("vae", "AutoencoderKL"), ("vqvae", "VQModel"), ("vae", "AutoencoderDC")])
def test_a_pipeline_folder_has_its_autoencoder_used(saved, tmp_path, part, name):
    pipeline = tmp_path / "pipeline"
    shutil.copytree(saved / name, pipeline / part)
    (pipeline / "unet").mkdir()
    (pipeline / "unet" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    (pipeline / "model_index.json").write_text('{"_class_name": "SomePipeline"}')
    tokenizer, alone = (build_tokenizer(f"diffusers:{place}") for place in (pipeline, saved / name))
    assert tokenizer.describe() == alone.describe()
    assert build_tokenizer("diffusers:gone", vae_path=pipeline).describe() == alone.describe()
    shutil.rmtree(pipeline / part)
    assert str(pipeline) in (said := message(build_tokenizer, f"diffusers:{pipeline}")) and "vae/" in said


def test_weights_as_a_variant_only(folder):
    expected = moments(folder)
    tensors = load_file(folder / FILE)
    (folder / FILE).unlink()
    for variant, shift in (("fp16", 0), ("bf16", 1)):
        halves = {key: (value + shift).half() for key, value in tensors.items()}
        save_file(halves, folder / f"diffusion_pytorch_model.{variant}.safetensors", metadata={"format": "pt"})
    tokenizer = build_tokenizer(f"diffusers:{folder}")  # fp16 first
    assert {parameter.dtype for parameter in tokenizer.parameters()} == {torch.float32}
    torch.testing.assert_close(tokenizer.encode_moments(images()), expected, rtol=0.02, atol=0.02)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    assert torch.equal(moments(folder), expected)  # the plain ones before any variant


# -------------------------------------------------------------------------------------------------------- single files

KL = dict(
    block_out_channels=(32, 64, 32),
    down_block_types=["DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
    up_block_types=["AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"],
    layers_per_block=1,
    latent_channels=6,
)
NETWORKS = {
    "kl": ("AutoencoderKL", KL),
    "kl without what Flux and SD3 lack": (
        "AutoencoderKL",
        dict(KL, use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False),
    ),
    "kl of grey images": ("AutoencoderKL", dict(KL, in_channels=1, out_channels=1, layers_per_block=2)),
    "kl without attention in its levels": (
        "AutoencoderKL",
        dict(KL, down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3),
    ),
    "vq": ("VQModel", dict(KL, vq_embed_dim=5, num_vq_embeddings=11)),
}


def network(name):
    import diffusers

    kind, settings = NETWORKS[name]
    torch.manual_seed(3)
    return getattr(diffusers, kind)(**settings).eval()


def in_ldm_names(autoencoder) -> dict:
    """Its tensors as LDM names and shapes them."""
    named = {ldm.ldm_name(key, last=2): value for key, value in autoencoder.state_dict().items()}
    linear = re.compile(r"attn.*\.(q|k|v|proj_out)\.weight")
    return {key: (value[..., None, None] if linear.search(key) else value).clone() for key, value in named.items()}


def test_the_names_are_those_of_ldm():
    names = in_ldm_names(network("kl")).keys()
    assert names >= {
        "encoder.down.0.block.0.norm1.weight", "encoder.down.1.downsample.conv.bias", "encoder.down.2.attn.0.q.weight",
        "encoder.mid.attn_1.proj_out.weight", "encoder.mid.block_2.conv2.bias", "encoder.norm_out.weight",
        "decoder.up.2.attn.1.norm.weight", "decoder.up.1.upsample.conv.weight", "decoder.up.0.block.0.norm1.bias",
        "decoder.up.0.block.0.nin_shortcut.bias", "quant_conv.weight", "post_quant_conv.bias",
    }  # fmt: skip


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_single_file_without_a_config_has_its_sizes_read_from_the_tensors(name, suffix, tmp_path):
    autoencoder = network(name)
    tensors, path = in_ldm_names(autoencoder), tmp_path / f"file{suffix}"
    whole = {f"first_stage_model.{key}": value for key, value in tensors.items()}
    whole |= {"model.diffusion_model.input_blocks.0.weight": torch.ones(3), "first_stage_model.loss.a": torch.ones(1)}
    halves = {key: value.half() for key, value in tensors.items()}
    state = autoencoder.state_dict()
    contents = dict(bare=tensors, whole=whole, half=halves, diffusers=state)
    if suffix == ".ckpt":
        contents |= {"of LDM": {"state_dict": whole, "global_step": 3}, "of MAR": {"model": tensors}}
    channels = 1 if "grey" in name else 3
    x = images()[:, :channels]
    for source, content in contents.items():
        save_file(content, path) if suffix == ".safetensors" else save(path, content)
        with pytest.warns(UserWarning, match="does not say the scale"):
            tokenizer = build_tokenizer(f"diffusers:{path}")
        assert (tokenizer.scale, tokenizer.mean, tokenizer.stride) == (1, 0, 4)
        assert (tokenizer.channels, tokenizer.image_channels) == (5 if name == "vq" else 6, channels)
        with torch.no_grad():
            encoded = autoencoder.encode(x)
            expected = encoded.latents if name == "vq" else encoded.latent_dist.parameters
            rough = dict(rtol=0.05, atol=0.05) if source == "half" else {}
            torch.testing.assert_close(tokenizer.encode_moments(x), expected, **rough)
            latents = expected[:, : tokenizer.channels]
            if source != "half":
                torch.testing.assert_close(tokenizer.decode(latents), autoencoder.decode(latents).sample)


def test_a_scale_given_by_hand_needs_no_warning(tmp_path, recwarn):
    path = tmp_path / "f.safetensors"
    save_file(in_ldm_names(network("kl")), path)
    assert build_tokenizer("diffusers:x", vae_path=path, vae_scale=0.3, vae_mean=0.1).scale == 0.3
    assert not [w for w in recwarn if "scale" in str(w.message)]


@pytest.mark.parametrize("name", ["AutoencoderKL", "AutoencoderTiny", "AutoencoderDC", "ConsistencyDecoderVAE"])
def test_a_file_beside_its_config_is_that_of_the_folder(saved, tmp_path, name, recwarn):
    state = torch.get_rng_state()
    one, other = (build_tokenizer(f"diffusers:{place}") for place in (saved / name / FILE, saved / name))
    assert (one.scale, one.mean, one.kind) == (other.scale, other.mean, other.kind)
    assert torch.equal(one.encode_moments(images()), other.encode_moments(images()))
    latents = other.encode(images(), sample=False)
    assert torch.equal(one.decode(latents), other.decode(latents))
    build_tokenizer(f"diffusers:{saved / name / FILE}")
    assert torch.equal(torch.get_rng_state(), state) and not [w for w in recwarn if "scale" in str(w.message)]


def test_single_files_that_do_not_fit_are_one_line(saved, tmp_path):
    tensors = in_ldm_names(network("kl"))
    path = tmp_path / "f.safetensors"

    def said(content, path=path):
        save_file(content, path)
        line = message(build_tokenizer, f"diffusers:{path}", vae_scale=1)
        assert str(path) in line
        return line

    assert "lacks decoder.mid.block_1.conv1.bias" in said(
        {key: value for key, value in tensors.items() if key != "decoder.mid.block_1.conv1.bias"}
    )
    assert "1 unknown tensors, the first is extra" in said({**tensors, "extra": torch.ones(1)})
    assert "lacks 'decoder.conv_out.weight'" in said({k: v for k, v in tensors.items() if "conv_out" not in k})
    assert "is no AutoencoderKL" in said(load_file(saved / "AutoencoderTiny" / FILE))
    assert "divisible by 32" in said(load_file(saved / "AutoencoderKL" / FILE))  # groups are in its config only
    assert "valid are .safetensors" in said(tensors, tmp_path / "f.onnx")
    for content in (b"<html>", b""):
        path.write_bytes(content)
        assert f"cannot read {path}" in message(build_tokenizer, f"diffusers:{path}")
        (tmp_path / "f.ckpt").write_bytes(content)
        assert str(tmp_path / "f.ckpt") in message(build_tokenizer, f"diffusers:{tmp_path / 'f.ckpt'}")


def test_kl16_is_read_from_safetensors_and_from_whole_models_too(tmp_path, small):
    from tests.helpers_tokenizers import ldm_tensors

    tensors = {key: value.contiguous() for key, value in ldm_tensors("kl16").items()}
    for prefix in ("", "first_stage_model."):
        save_file({prefix + key: value for key, value in tensors.items()}, tmp_path / "f.safetensors")
        tokenizer = build_tokenizer("kl16", vae_path=tmp_path / "f.safetensors")
        assert (tokenizer.channels, tokenizer.scale) == (16, 0.2325)
