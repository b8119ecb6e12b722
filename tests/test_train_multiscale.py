"""Training VAR's tokenizer: what a run leaves behind, its codebook by scale, and settings that are refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from models.tokenizers import build_tokenizer
from models.tokenizers.multiscale import SCALES as SCALES_OF
from models.tokenizers.multiscale import STATISTICS, save_multiscale
from models.tokenizers.multiscale_vq import MultiScaleVQ, MultiScaleVQConfig
from scripts import cache_latents, measure_latents, measure_reconstruction, train_tokenizer
from tests.helpers_latents import NUM, cache
from tests.helpers_tokenizers import images, message, save
from training.autoencoders import LOSSES, make_autoencoder, revive, start_codebook, watched
from training.discriminator import Discriminator
from util.checkpoint import FILE_NAME, read_file
from util.door import run_main
from util.evaluation.reconstruction import codebook_scores
from util.images.datasets import build_dataset
from util.images.latents import open_latents

pytestmark = pytest.mark.on_cpu("runs are compared bit for bit, which a GPU promises with --deterministic alone")

SCALES = (1, 2, 3, 4, 6, 8)
FLAGS = "--data digits --stride 1 --multiscale --patch_nums 1,2,3,4,6,8 --latent_channels 4 --width 4"
FLAGS = f"{FLAGS} --codebook_size 32 --batch_size 60 --lr 1e-2 --epochs 0.8 --num_eval 60".split()


def digits() -> torch.Tensor:
    return build_dataset("digits").images.float() / 127.5 - 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a short run on the digits."""
    folder = tmp_path_factory.mktemp("multiscale")
    assert train_tokenizer.main([*FLAGS, "--output_dir", str(folder)]) == 0
    return folder


def refused(capsys, program, *flags) -> str:
    capsys.readouterr()
    assert run_main(program.main, [*map(str, flags)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    return line


def tiny(**changes):
    """An untrained tokenizer of scales 1, 2 and 8."""
    torch.manual_seed(0)
    sizes = dict(stride=1, latent_channels=3, width=4, codebook_size=24, image_channels=1, img_size=8, scales=(1, 2, 8))
    return make_autoencoder("MultiScaleVQ", **{**sizes, **changes})


def test_a_run_leaves_a_tokenizer_pictures_and_figures_by_scale(folder):
    names = {"tokenizer.pth", "reconstructions.png", "scales.png", "results.jsonl", FILE_NAME}
    assert {path.name for path in folder.iterdir()} == names
    tokenizer = build_tokenizer("var_vq", vae_path=folder / "tokenizer.pth")
    assert (tokenizer.tokens, tokenizer.scales, tokenizer.codebook_size) == (("multiscale",), SCALES, 32)
    (row,) = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    figures = row["metrics"]
    assert figures.keys() >= {f"{name}_{p}" for name in ("usage", "perplexity") for p in SCALES}
    ids = tokenizer.encode_ids(digits()[::10][[i * 180 // 60 for i in range(60)]])
    of_scales = tokenizer.quantize.split(ids)
    for p, part in zip(SCALES, of_scales):
        wanted = codebook_scores(part.flatten().bincount(minlength=32))
        assert (figures[f"usage_{p}"], figures[f"perplexity_{p}"]) == pytest.approx(
            (wanted["usage"], wanted["perplexity"])
        )
    assert figures["psnr"] > 12
    picture = np.asarray(Image.open(folder / "scales.png"))
    assert picture.shape[1] == 7 * (64 + 4) + 4  # six scales and the original a row


def test_ids_of_a_trained_tokenizer_come_back(folder):
    """The image that ids make is near the image they were of, and has many of their ids again, most at the coarsest.

    (By chance it would be one in twenty.)
    """
    tokenizer = build_tokenizer("var_vq", vae_path=folder / "tokenizer.pth")
    x = digits()[::30]
    ids = tokenizer.encode_ids(x)
    assert (
        ids.shape == (len(x), 130) and ids.dtype == torch.long and torch.equal(tokenizer.encode_ids(x[3:5]), ids[3:5])
    )
    images = tokenizer.decode_ids(ids)
    grown = tokenizer.decode_scales(ids)
    assert torch.equal(grown[-1], images) and images.abs().max() <= 1
    errors = [(image - x).square().mean().item() for image in grown]
    assert errors[-1] < 0.7 * errors[0] and errors[-1] < (x - x.mean(dim=0)).square().mean()
    again = tokenizer.encode_ids(images)
    assert (again == ids).float().mean() > 0.3 and (again[:, 0] == ids[:, 0]).float().mean() > 0.7


def test_a_cache_holds_the_ids_of_all_scales_and_of_mirror_images(pictures, tmp_path, capsys):
    path = tmp_path / "tokenizer.pth"
    save_multiscale(path, tiny(stride=2, image_channels=3, scales=(1, 2, 4)))
    flags = ["--tokenizer", "var_vq", "--vae_path", path]
    ids, tokenizer = open_latents(cache(pictures, tmp_path / "c", *flags)), build_tokenizer("var_vq", vae_path=path)
    assert (tuple(ids.shape), ids.codebook_size, len(ids)) == ((21,), 24, NUM)
    image = build_dataset("imagefolder", data_path=pictures, img_size=8)[3][0].float() / 127.5 - 1
    assert torch.equal(ids[3][0], tokenizer.encode_ids(torch.stack([image, image.flip(-1)])))
    ids.check(tokenizer, "var_vq", discrete=True)
    words = "--data imagefolder --img_size 8 --num_workers 0 --data_path".split() + [pictures, *flags]
    line = refused(capsys, cache_latents, *words, "--cached_path", tmp_path / "d", "--tokens", "discrete")
    assert "makes multiscale ones" in line
    assert "var_vq makes ids alone" in refused(capsys, measure_latents, *words)


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            "--codebook_size 5 --multiscale",
            "--codebook_size 5 must be at least 6, the scales of --patch_nums 1,2,3,4,6,8",
        ),
        ("--patch_nums 1,2,4", "--patch_nums 1,2,4 has no meaning without --multiscale"),
        ("--vq --partial_share 0.5", "--partial_share 0.5 has no meaning without --multiscale"),
        ("--perceptual_weight 3", "--perceptual_weight 3.0 has no meaning without --perceptual"),
        ("--adversarial_start 0.7", "--adversarial_start 0.7 has no meaning without --adversarial_weight"),
        ("--fid_weights nowhere", "--fid_weights nowhere has no meaning without --features"),
        ("--lr 0", "--lr must be above 0"),
        ("--multiscale --kl_weight 3", "--kl_weight 3 has no meaning for ids"),
    ],
)
def test_flags_without_a_meaning_are_refused(flags, message, tmp_path, capsys):
    words = "--data digits --stride 1 --epochs 0.05".split() + flags.split()
    assert message in refused(capsys, train_tokenizer, *words, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_as_many_codes_as_scales_can_be_trained(tmp_path):
    words = "--data digits --stride 1 --multiscale --patch_nums 1,8 --width 4 --latent_channels 4 --codebook_size 2"
    assert train_tokenizer.main([*words.split(), *"--epochs 0.01 --output_dir".split(), str(tmp_path)]) == 0


@pytest.mark.parametrize("change", [dict(norm_groups=0), dict(vocab_size=0), dict(z_channels=0), dict(quant_conv_ks=2),
                                    dict(dropout=1.0), dict(share_quant_resi=-1), dict(norm_groups=True)])  # fmt: skip
def test_sizes_that_cannot_be_are_refused(change):
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=f"{name} must be .*, got {value}"):
        MultiScaleVQConfig(**change)


def test_whole_numbers_are_numbers_of_a_file_too(tmp_path):
    made = MultiScaleVQ(replace(tiny().config, quant_resi=1, beta=2))
    save_multiscale(tmp_path / "t.pth", made)
    config = build_tokenizer("var_vq", vae_path=tmp_path / "t.pth").model.config
    assert (config.quant_resi, config.beta) == (1, 2)


def test_its_reconstructions_are_measured_by_scale(folder, tmp_path, capsys):
    flags = ["--data", "digits", "--tokenizer", "var_vq", "--vae_path", folder / "tokenizer.pth"]
    flags = [*map(str, flags), "--no_rfid", "--num_images", "50", "--output_dir", str(tmp_path)]
    assert measure_reconstruction.main(flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[-6:]] == [f"scale {p}×{p}" for p in SCALES]


# --------------------------------------------------------------------------------------------------------- codebook


def test_a_codebook_starts_at_what_each_scale_is_to_quantise():
    """Codes v, v + 3, … at that of scale v, which the codes of the scales before it leave."""
    model = tiny()
    start_codebook(model, digits()[:8], torch.Generator().manual_seed(0))
    codes = model.quantize.embedding.weight
    with torch.no_grad():
        rows = model.encode_features(digits()[:8]).mean(dim=(2, 3))
    assert torch.cdist(codes[0::3], rows).min(dim=1).values.max() < 1e-5
    assert all(torch.cdist(codes[s::3], rows).min(dim=1).values.max() > 1e-2 for s in (1, 2))


def test_an_entry_is_dead_when_its_scale_had_its_chances_and_moves_to_a_latent_of_it():
    """Of 24 entries and 8 images, an entry of the scale of one token has ten steps, of that of 64 one."""
    model = tiny()
    codes, idle = model.quantize.embedding.weight, torch.zeros(24, dtype=torch.long)
    with torch.no_grad():
        codes.normal_(generator=torch.Generator().manual_seed(0))
        codes[[0, 1, 2]] = 1000 + codes[[0, 1, 2]]
    moved = {}
    for step in range(1, 13):
        with watched(model) as quantised:
            model(digits()[:8])
        before = codes.detach().clone()
        revive(model, idle, quantised[0], torch.Generator().manual_seed(step))
        for v in range(3):
            if not torch.equal(codes[v], before[v]):
                moved.setdefault(v, step)
                assert torch.cdist(codes[v : v + 1], quantised[0][v][0]).min() < 1e-5
    assert moved == {0: 10, 1: 3, 2: 1}


def test_some_images_are_decoded_from_a_part_of_their_scales():
    """Of a random scale, drawn from the generator; all others from all of them."""
    model, seen = tiny(), []
    handle = model.decoder.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    x = digits()[:200]
    for _ in range(2):
        LOSSES["MultiScaleVQ"].terms(model, x, torch.Generator().manual_seed(0), 0.25)
    handle.remove()
    with torch.no_grad():
        f = model.encode_features(x)
        of_scales = [model.decode_features(f_hat) for f_hat in model.ids_to_features(model.features_to_ids(f))]
    near = torch.stack([(seen[0] - image).abs().amax(dim=(1, 2, 3)) < 1e-4 for image in of_scales])  # (S, B)
    assert torch.equal(seen[0], seen[1]) and (near.sum(dim=0) == 1).all()
    shares = near.float().mean(dim=1).tolist()
    assert shares == pytest.approx([0.25 / 3, 0.25 / 3, 1 - 0.5 / 3], abs=0.06)


def test_the_running_mean_of_hits():
    """Of the first step it is a copy; every scale has its own threshold of use."""
    quantize = tiny().quantize
    ids = [torch.zeros(8, 1).long(), torch.arange(32).reshape(8, 4) % 24, torch.arange(512).reshape(8, 64) % 24]
    quantize.count(ids, 0)
    assert quantize.ema_vocab_hit_SV[0].tolist() == [8.0] + 23 * [0.0]
    assert quantize.usage(8).tolist() == pytest.approx([1 / 24, 1, 1])
    quantize.count([part + 1 - part.clamp(max=1) for part in ids], 5)
    assert quantize.ema_vocab_hit_SV[0, :2].tolist() == pytest.approx([7.2, 0.8])
    quantize.count(ids, 200)
    assert quantize.ema_vocab_hit_SV[0, :2].tolist() == pytest.approx([0.99 * 7.2 + 0.08, 0.99 * 0.8])


def test_the_discriminator_learns_to_tell_and_the_autoencoder_to_pass():
    """Each loss reaches its own network alone."""
    torch.manual_seed(0)
    discriminator, images = Discriminator(1), digits()[:16]
    decoded = torch.zeros_like(images).requires_grad_()
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-3)
    losses = []
    for _ in range(15):
        losses.append(discriminator.loss(images, decoded))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0] and decoded.grad is None
    optimizer.zero_grad()
    discriminator.of_generator(decoded).backward()
    assert decoded.grad.abs().sum() > 0 and all(p.grad is None for p in discriminator.parameters())
    assert all(p.requires_grad for p in discriminator.parameters())


# ------------------------------------------------------------------------------------------------------------ files


def test_files_that_do_not_fit_are_one_line(folder, tmp_path):
    content = read_file(folder / "tokenizer.pth")

    def said(name="var_vq", config=None, **changes) -> str:
        changed = {"model": {**content["model"], **changes}, "config": {**content["config"], **(config or {})}}
        return message(build_tokenizer, name, vae_path=save(tmp_path / "f.pth", changed))

    key = "decoder.mid.attn_1.qkv.weight"
    assert f"{key} is (3,) there" in said(**{key: torch.zeros(3)})
    assert "1 unknown tensors, the first is extra" in said(extra=torch.zeros(1))
    assert "its v_patch_nums is '[1, 2]'" in said(config={"v_patch_nums": [1, 2]})
    assert "v_patch_nums (3, 2) must be two or more whole numbers, each larger" in said(config={"v_patch_nums": (3, 2)})
    assert "its quant_resi is 'x'" in said(config={"quant_resi": "x"})
    assert "groups of its normalisation" in said(config={"norm_groups": 3})
    assert "scales 1,2,3,4,6,8; use --tokenizer var_vq" in said("var_vq_512")
    assert "lacks 'quantize.embedding.weight'" in message(
        build_tokenizer,
        "var_vq",
        vae_path=save(tmp_path / "g.pth", {"encoder.conv_in.weight": torch.zeros(4, 3, 3, 3)}),
    )
    assert "needs --vae_path" in message(build_tokenizer, "var_vq")
    assert "--vae_mean has no meaning" in message(
        build_tokenizer, "var_vq", vae_path=folder / "tokenizer.pth", vae_mean="0.5"
    )


def test_images_and_ids_that_do_not_fit_are_one_line(folder):
    tokenizer = build_tokenizer("var_vq", vae_path=folder / "tokenizer.pth")
    assert "for images of 8 pixels, got 16" in message(tokenizer.encode_ids, torch.zeros(1, 1, 16, 16))
    assert "must be (B, 130), got (1, 5)" in message(tokenizer.decode_ids, torch.zeros(1, 5).long())
    assert "0 to 31, got 32" in message(tokenizer.decode_ids, torch.full((1, 130), 32))
    assert "makes ids alone" in message(tokenizer.encode, torch.zeros(1, 1, 8, 8))


def test_the_published_file_has_the_scales_of_its_row(tmp_path):
    """A flat dict of tensors without sizes: those of the tensors are used, and statistics of as many scales."""
    config = MultiScaleVQConfig(vocab_size=48, z_channels=4, ch=32)
    torch.manual_seed(0)
    weights = MultiScaleVQ(config).state_dict()
    weights[STATISTICS] += 1
    path = save(tmp_path / "vae_ch32v48z4.pth", weights)
    tokenizer = build_tokenizer("var_vq", vae_path=path)
    assert (tokenizer.model.config, tokenizer.stride, tokenizer.scales) == (config, 16, SCALES_OF["var_vq"])
    assert all(torch.equal(value, weights[key]) for key, value in tokenizer.model.state_dict().items())
    for name, size, tokens in (("var_vq", 256, 680), ("var_vq_512", 512, 2240), ("var_vq_1024", 1024, 9451)):
        row = build_tokenizer(name, vae_path=path)
        assert row.ids_shape(size) == (tokens,) and torch.equal(
            row.quantize.embedding.weight, tokenizer.quantize.embedding.weight
        )
    assert not row.quantize.ema_vocab_hit_SV.any()  # of 14 scales, the file has those of 10
    del weights[STATISTICS]
    assert not build_tokenizer("var_vq", vae_path=save(path, weights)).quantize.ema_vocab_hit_SV.any()


@pytest.mark.parametrize("options", [dict(share_quant_resi=k) for k in (0, 1, 3)] + [dict(quant_resi=0.0)], ids=str)
def test_each_arrangement_of_phi_comes_back_from_a_file(options, tmp_path):
    config = MultiScaleVQConfig(
        vocab_size=8, z_channels=4, ch=4, norm_groups=1, ch_mult=(1, 2), v_patch_nums=(1, 3), **options
    )
    model = MultiScaleVQ(config).eval()
    save_multiscale(tmp_path / "tokenizer.pth", model)
    loaded = build_tokenizer("var_vq", vae_path=tmp_path / "tokenizer.pth")
    x = images(2, 6, 6)
    assert loaded.quantize.phi_index == model.quantize.phi_index
    assert torch.equal(loaded.encode_ids(x), torch.cat(model.encode(x), dim=1))
