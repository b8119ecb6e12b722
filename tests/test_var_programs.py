"""Training, resuming, sampling, editing and tracing with VAR through the programs, and what these refuse."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import main_mar
import sample
from models import families
from models.loading import load_model, num_parameters
from models.tokenizers.multiscale import save_multiscale
from models.tokenizers.multiscale_vq import SCALES as SIDES
from models.tokenizers.multiscale_vq import MultiScaleVQ, MultiScaleVQConfig
from models.var import VAR, VAR_CONFIGS, VARConfig
from scripts import cache_latents, export_weights, inspector, plot_trace, search_schedule
from tests.helpers_ids import in_two_processes
from tests.test_cli import refused
from util.checkpoint import load_checkpoint, weights_hash

pytestmark = pytest.mark.on_cpu("runs are compared bit for bit, which a GPU promises with --deterministic alone")

SCALES = (1, 2, 4)  # 21 tokens of 2×2 pixels in the last scale
TRAIN = "--data digits --model var_tiny --tokenizer var_vq --batch_size 600 --lr 3e-3 --warmup_epochs 0".split()
TRAIN += "--num_images 4 --metrics none --eval_freq 100 --num_workers 0 --img_size 8".split()
SAMPLE = "--num_images 4 --metrics none --cfg 2.5".split()


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """The file of a small tokenizer with random weights."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=16, z_channels=4, ch=8, in_channels=1, ch_mult=(1, 1), norm_groups=8, v_patch_nums=SCALES)
    path = tmp_path_factory.mktemp("vae") / "vae.pth"
    save_multiscale(path, MultiScaleVQ(MultiScaleVQConfig(**sizes)))
    return ["--vae_path", str(path)]


@pytest.fixture(scope="module")
def run(vae, tmp_path_factory):
    """The folder of a run of two epochs, and the flags of its settings."""
    folder = tmp_path_factory.mktemp("run") / "var"
    extra = "--lr_schedule lin0 --weight_decay 0.05 --wd_end 0.08 --grad_clip 2 --ema_rate 0".split()
    extra += "--epochs 2 --save_last_freq 1".split()
    words = [*TRAIN, *vae, *extra, "--output_dir", str(folder)]
    assert main_mar.main(words) == 0
    return folder, words


def test_it_is_exported_and_read_back(run, tmp_path):
    folder, _ = run
    path = tmp_path / "var.safetensors"
    assert export_weights.main(["--checkpoint", str(folder), "--output", str(path)]) == 0
    (model, _, config), (model_0, _, config_0) = (load_model(place, ema=True) for place in (path, folder))
    assert model.config == model_0.config and isinstance(model.config.patch_nums, tuple)
    assert weights_hash(model.state_dict()) == weights_hash(model_0.state_dict())


def test_modes_with_an_order_of_their_own_are_refused(run, tmp_path, capsys):
    for mode in ("policy", "both", "maskgil"):
        words = ["--checkpoint", str(run[0]), "--output_dir", str(tmp_path / "x"), "--infer_mode", mode]
        line = refused(sample.main, words, capsys)
        assert f"--infer_mode {mode} does not fit" in line and line.endswith("valid: baseline, guidance")
    assert not (tmp_path / "x").exists()


def results(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_it_trains_and_resumes_to_the_bit(run, tmp_path):
    folder, words = run
    whole = load_checkpoint(folder)
    assert whole["config"]["family"] == "var" and whole["config"]["var"]["patch_nums"] == SCALES
    assert whole["config"]["sample"]["num_iter"] == 3 and whole["config"]["sample"]["cfg_base"] == "ramp"
    logged = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert logged[-1]["loss"] < logged[0]["loss"] < 3.5
    decays = sorted(group["weight_decay"] for group in whole["optimizer"]["param_groups"])
    assert decays == pytest.approx([0.0, 0.08])  # at the last step
    for name, value in whole["model_ema"].items():  # ema_rate 0: no average
        assert value.equal(whole["model"][name])
    middle = tmp_path / "middle"  # stopped after the first epoch, whose checkpoint is kept
    middle.mkdir()
    first = folder / f"checkpoint-{whole['step'] // 2:08d}.pth"
    (middle / "checkpoint-last.pth").write_bytes(first.read_bytes())
    assert main_mar.main([*words[:-1], str(middle), "--resume", str(middle)]) == 0
    for name, value in load_checkpoint(middle)["model"].items():
        assert value.equal(whole["model"][name])


def test_constants_in_a_file_are_not_counted_as_parameters(run):
    """The scales of tokens, the mask of attention and the bias of keys are published beside the weights."""
    folder, _ = run
    weights = load_checkpoint(folder)["model"]
    constants = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias")
    sizes = [value.numel() for name, value in weights.items() if not name.endswith(constants)]
    assert num_parameters(folder) == sum(sizes) < sum(value.numel() for value in weights.values())


@pytest.mark.slow
def test_two_processes_train_like_one(run, tmp_path):
    """torchrun with gloo against one process at the same global batch, to rounding."""
    folder, words = run
    in_two_processes(tmp_path, [*words[:-1], str(tmp_path / "two"), "--batch_size", "300"])
    alone, together = ([json.loads(line) for line in (f / "log.jsonl").open()] for f in (folder, tmp_path / "two"))
    assert [line["step"] for line in together] == [line["step"] for line in alone]
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in together] == pytest.approx([line[name] for line in alone], rel=2e-3)


def test_it_samples_with_all_its_settings(run, tmp_path):
    folder, _ = run
    out = tmp_path / "out"
    place = ["--checkpoint", str(folder), "--output_dir", str(out), *SAMPLE]
    assert sample.main([*place, "--top_k", "900", "--top_p", "0.96", "--temperature", "0.9"]) == 0
    assert sample.main([*place, "--smooth"]) == 0
    assert sample.main([*place, "--save_trace", "2"]) == 0
    first, smooth, _ = results(out)
    assert (first["settings"]["order"], first["settings"]["group"]) == ("raster", "scale")
    assert first["settings"]["cfg_schedule"] == "ramp" and first["settings"]["num_iter"] == 3
    assert first["mlp_evals"] == 21 + 20 and first["mar_evals"] == pytest.approx(2.0, abs=0.01)
    assert smooth["settings"]["smooth"] and not first["settings"]["smooth"]


def test_a_trace_has_a_picture_of_each_scale(run, tmp_path, capsys):
    folder, _ = run
    place = ["--checkpoint", str(folder), "--output_dir", str(tmp_path / "out"), *SAMPLE, "--save_trace", "2"]
    assert "give one of the two" in refused(sample.main, [*place, "--smooth"], capsys)
    assert sample.main(place) == 0
    (path,) = (tmp_path / "out").glob("*/trace.npz")
    with np.load(path) as trace:
        assert trace["group_size"].tolist() == [[1, 4, 16]] * 2 and trace["frames"].shape == (2, 3, 8, 8, 1)
        assert trace["cfg"][0].tolist() == [1.0] + [1.75] * 4 + [2.5] * 16
        frames = trace["frames"].astype(int)
    made = np.asarray(Image.open(path.parent / "0.png"))
    assert np.array_equal(frames[0, 2].squeeze(), made) and (frames[0, 0] != frames[0, 2]).any()
    pictures = tmp_path / "pictures"
    assert plot_trace.main([str(path), "--out", str(pictures), "--images", "1"]) == 0
    assert sorted(file.name for file in pictures.iterdir()) == ["rules.png", "trace_1.gif", "trace_1.png"]
    with Image.open(pictures / "trace_1.gif") as growing:  # an image a scale, without a mask
        assert growing.n_frames == 3 and growing.width == growing.height
    line = refused(inspector.main, ["--trace", str(path), "--export", str(tmp_path / "page.html")], capsys)
    assert "of several scales" in line and not (tmp_path / "page.html").exists()


def test_a_part_of_a_picture_is_kept(run, tmp_path):
    folder, _ = run
    picture = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "picture.png")
    kept = np.indices((8, 8))[1] >= 4
    Image.fromarray(np.where(kept, 0, 255).astype(np.uint8)).save(tmp_path / "mask.png")
    edit = ["--edit_image", str(tmp_path / "picture.png"), "--edit_mask", str(tmp_path / "mask.png")]
    place = ["--checkpoint", str(folder), "--output_dir", str(tmp_path / "out"), *SAMPLE, *edit, "--save_trace", "1"]
    assert sample.main(place) == 0
    (made,) = (tmp_path / "out").glob("*_edit*/0.png")
    assert np.array_equal(np.asarray(Image.open(made)).squeeze()[kept], picture[kept])
    with np.load(made.parent / "trace.npz") as trace:
        assert trace["group_size"].tolist() == [[0, 2, 8]]  # the scale of one token is kept whole


@pytest.mark.slow
def test_ids_of_a_cache_train_the_same_steps(run, vae, tmp_path):
    folder, words = run
    cache = tmp_path / "cache"
    made = "--data digits --tokenizer var_vq --img_size 8 --tokens multiscale --num_workers 0".split()
    assert cache_latents.main([*made, *vae, "--cached_path", str(cache)]) == 0
    words = [*words[:-1], str(tmp_path / "cached"), "--use_cached", "--cached_path", str(cache), "--no_flip"]
    assert main_mar.main(words) == 0
    for name, value in load_checkpoint(tmp_path / "cached")["model"].items():
        assert value.equal(load_checkpoint(folder)["model"][name])


def test_a_progressive_run_begins_with_the_first_scales(vae, tmp_path):
    words = [*TRAIN, *vae, "--epochs", "2", "--pg", "0.9", "--pg0", "0", "--output_dir", str(tmp_path / "pg")]
    assert main_mar.main(words) == 0
    log = [json.loads(line) for line in (tmp_path / "pg" / "log.jsonl").read_text().splitlines()]
    assert log[0]["loss"] == pytest.approx(np.log(16) / 21, rel=0.1)  # one token of 21
    assert log[-1]["loss"] > 10 * log[0]["loss"]
    assert log[0]["ce_tail"] == pytest.approx(np.log(16), rel=0.1)  # of the last scale there is, whatever it weighs
    assert log[0]["accuracy_tail"] == pytest.approx(log[0]["accuracy"])  # there is one scale


def test_heads_are_learned_on_images(run, tmp_path, capsys):
    folder, words = run
    stage = [*words[:-1], str(tmp_path / "stage"), "--init_from", str(folder), "--epochs", "1", "--cfg", "2.5"]
    on_images = [*stage, *"--objective image --bank 300 --features digits --batch_size 600".split()]
    assert main_mar.main([*on_images, "--learn", "tau,cfg"]) == 0
    heads = load_checkpoint(tmp_path / "stage")["heads"]
    assert any(value.abs().max() > 0 for name, value in heads.items() if name.endswith("values"))
    place = ["--checkpoint", str(tmp_path / "stage"), "--output_dir", str(tmp_path / "out"), *SAMPLE]
    assert sample.main([*place, "--infer_mode", "baseline,guidance"]) == 0
    for kind, rule in (("order", "raster"), ("group", "scale")):
        learn = [*on_images, "--learn", kind, "--output_dir", str(tmp_path / kind)]
        assert f"--learn {kind} does not fit var_tiny, which needs --{kind} {rule}" in refused(
            main_mar.main, learn, capsys
        )
    token = [*stage, "--learn", "cfg", "--freeze_backbone", "--output_dir", str(tmp_path / "token")]
    assert "this model draws a scale a step: use --objective image" in refused(main_mar.main, token, capsys)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--order halton", "--order halton does not fit var_tiny, which needs raster"),
        ("--group cosine", "--group cosine does not fit var_tiny, which needs scale"),
        ("--num_iter 5", "--num_iter 5 must be 3: this model draws a scale a step"),
        ("--lr_schedule steep", "--lr_schedule: invalid value 'steep': must be one of constant, cosine, late_cosine"),
        ("--lr_schedule lin2", "invalid value 'lin2'"),
        ("--wd_end 0.1 --weight_decay 0", "--wd_end 0.1 needs a --weight_decay above 0"),
        ("--model mar_tiny --tokenizer pixel --group scale", "--group scale does not fit mar_tiny"),
        ("--model mar_tiny --tokenizer pixel --pg 0.5", "--pg 0.5 has no meaning for this model"),
        ("--pg 0.5 --pg0 2", "--pg0 2 must be below 2, the last of 3 scales"),
        ("--objective image --learn tau --smooth", "--smooth does not fit --objective image"),
        ("--model mar_tiny --tokenizer pixel --smooth", "--smooth has no meaning for this model"),
        ("--tokenizer pixel", "the tokenizer pixel makes continuous tokens, the family var takes multiscale ones"),
        ("--train_masks visited", "must be random: this model draws a scale a step"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags, message, vae, capsys, tmp_path):
    words = [*TRAIN, *(vae if "pixel" not in flags else []), "--epochs", "1", *flags.split()]
    assert message in refused(main_mar.main, [*words, "--output_dir", str(tmp_path / "run")], capsys)


@pytest.mark.parametrize("shared", [False, True])
def test_published_files_load_by_their_shapes(shared, tmp_path, monkeypatch):
    """A flat state dict without a config, as published, of a size that is small."""
    torch.manual_seed(0)
    vae = MultiScaleVQ(MultiScaleVQConfig(vocab_size=64, z_channels=8, ch=32))
    sizes = dict(depth=2, embed_dim=64, num_heads=2, class_num=7, attn_l2_norm=True, shared_aln=shared)
    var = VAR(VARConfig(**sizes, vocab_size=64, vae_embed_dim=8, patch_nums=SIDES["var_vq"]))
    torch.save(vae.state_dict(), tmp_path / "vae.pth")
    torch.save(var.state_dict(), tmp_path / "var.pth")
    monkeypatch.setitem(VAR_CONFIGS, "var_small", replace(var.config, class_num=1000))
    monkeypatch.setitem(families.SIZES, "var_small", "var")
    options = dict(model="var_small", vae_path=str(tmp_path / "vae.pth"))
    model, tokenizer, config = load_model(tmp_path / "var.pth", **options)
    assert model.head.weight.equal(var.head.weight) and tokenizer.scales == SIDES["var_vq"]
    assert {name: config["var"][name] for name in sizes} == sizes and len(config["data"]["classes"]) == 7
    weights = var.state_dict()
    del weights["head.bias"]
    torch.save(weights, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="do not fit the model .1 names missing, 0 unknown, the first is head.bias"):
        load_model(tmp_path / "other.pth", **options)
    torch.save({"weight": torch.zeros(3)}, tmp_path / "none.pth")
    with pytest.raises(ValueError, match="the checkpoint is not one of VAR"):
        load_model(tmp_path / "none.pth", **options)


def test_tau_and_w_of_each_scale_are_searched(run, tmp_path):
    flags = "--num_iter 3 --num_images 16 --batch_size 16 --popsize 4 --iterations 1".split()
    out, checkpoint = tmp_path / "s.json", ["--checkpoint", str(run[0])]
    assert search_schedule.main([*checkpoint, "--out", str(out), *flags]) == 0
    assert {kind: len(values) for kind, values in json.loads(out.read_text())["values"].items()} == dict(tau=3, cfg=3)
    assert sample.main([*checkpoint, *SAMPLE, "--schedule", str(out), "--output_dir", str(tmp_path / "o")]) == 0


def test_a_search_needs_a_step_for_each_scale(run, tmp_path, capsys):
    line = refused(search_schedule.main, ["--checkpoint", str(run[0]), "--out", str(tmp_path / "s.json")], capsys)
    assert "--num_iter 4 must be 3" in line
