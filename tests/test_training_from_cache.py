"""Training from cached latents: equal to training on the images, and what it refuses."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import main_mar
from tests.helpers_latents import SMALL, TRAIN, TinyKL, cache, losses, refused
from training import step as step_module
from training.cached_picture import show_cached
from training.objectives.draws import DrawSettings, training_draws
from training.objectives.tokens import posterior_shape, tokens_of
from util.evaluation.fid_stats import FIDStats, save_fid_stats
from util.images.latents import open_latents
from util.images.pictures import make_grid, read_png
from util.rng import generator, seed_of


@pytest.mark.parametrize("tokenizer, format", [("pixel", "npz"), ("tiny:0", "packed")])
def test_training_on_a_cache_equals_training_on_the_images(pictures, tmp_path, monkeypatch, tiny_kl, format, tokenizer):
    """With mirror images and, for tiny, draws from the posterior, all from the same seeds."""
    shape = [] if tokenizer == "pixel" else ["--vae_stride", 2, "--vae_embed_dim", 2]
    flags = ["--tokenizer", tokenizer, *shape, "--accum_iter", 3, "--epochs", 4, "--lr", 0.03]
    folder = cache(pictures, tmp_path / "c", "--format", format, *flags[: 2 + len(shape)])
    images = losses(monkeypatch, tmp_path / "images", *flags, "--data_path", pictures)
    cached = losses(monkeypatch, tmp_path / "cached", *flags, "--use_cached", "--cached_path", folder)
    assert len(images) == 4 and cached == pytest.approx(images, abs=1e-6)

    step = step_module.forward_backward

    def plain(state, *arguments):
        state.objective.preparation = replace(state.objective.preparation, flip=False)
        return step(state, *arguments)

    with monkeypatch.context() as patch:  # the mirror images do count
        patch.setattr(step_module, "forward_backward", plain)
        other = losses(patch, tmp_path / "u", *flags, "--use_cached", "--cached_path", folder)
    assert other != pytest.approx(images, abs=1e-3)


def test_a_run_shows_what_its_cache_decodes_to(pictures, tmp_path, monkeypatch, tiny_kl):
    """The images and their mirror images, spread over the cache, beside the checkpoints; one that is there stays."""
    folder, out = cache(pictures, tmp_path / "c", "--tokenizer", "pixel"), tmp_path / "run"
    flags = ["--tokenizer", "pixel", "--use_cached", "--cached_path", folder, "--epochs", 1]
    losses(monkeypatch, out, *flags)
    latents = open_latents(folder)
    shown = [latents[i] for i in np.linspace(0, len(latents) - 1, 8).astype(int)]
    images = [
        ((pair[way] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy() for way in (0, 1) for pair, _, _ in shown
    ]
    names = [f"{latents.classes[label]}{way}" for way in ("", " mirrored") for _, label, _ in shown]
    assert np.array_equal(read_png(out / "cached.png"), make_grid(np.stack(images), names, 8))

    show_cached(latents, None, "cpu", out)  # which would need a tokenizer
    losses(monkeypatch, tmp_path / "plain", *flags, "--no-flip")
    assert np.array_equal(read_png(tmp_path / "plain/cached.png"), make_grid(np.stack(images[:8]), names[:8], 8))


def test_cached_moments_have_a_draw_for_each_image_and_step(pictures, tmp_path, tiny_kl):
    """The noise of the posterior comes from a seed for each image: another seed, other tokens; not the batch."""
    latents = open_latents(cache(pictures, tmp_path / "c", "--tokenizer", "tiny:0"))
    batch, _, _ = next(iter(DataLoader(latents, batch_size=4)))
    model = SimpleNamespace(
        patchify=lambda latents: latents, token_head=SimpleNamespace(discrete=False, draws=lambda g, n: {})
    )

    def tokens(batch, flip, samples):
        shape = posterior_shape(batch, TinyKL(), model)
        noise = training_draws(0, 1, samples, model.token_head, DrawSettings(4, 0.5, 0.0, posterior=shape)).posterior
        made = tokens_of(batch, flip, noise, TinyKL(), model)
        seeds = [generator(seed_of("posterior", 0, 1, sample)) for sample in samples]
        moments = batch[torch.arange(len(batch)), 0 if flip is None else flip.long()]
        assert torch.equal(made, TinyKL().from_moments(moments, generator=seeds))
        return made

    a = tokens(batch, None, [1, 2, 3, 4])
    assert torch.equal(a[[2, 0]], tokens(batch[[2, 0]], None, [3, 1]))
    assert not torch.equal(a, tokens(batch, None, [1, 2, 3, 5]))
    flip = torch.tensor([True, False, True, False])
    mixed = tokens(batch, flip, [1, 2, 3, 4])
    assert torch.equal(mixed[1], a[1]) and not torch.equal(mixed[0], a[0])
    assert torch.equal(mixed[0], tokens(batch[:, [1, 0]], None, [1, 2, 3, 4])[0])


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
    with pytest.raises(SystemExit):
        main_mar.main([*map(str, flags), "--cached_path", ""])
    assert "--cached_path" in capsys.readouterr().err
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
    flags += ["digits", "--fid_stats", stats, "--num_images", 6, "--cfg", 1, "--dtype", "fp32"]
    losses(monkeypatch, tmp_path / "out", *flags)
    told = (
        f"6 images (2 of each of 3 classes, EMA weights, fp32) against 9 images of statistics in {stats} (split: val)"
    )
    assert f"generation of {told}, features: digits\nepoch 2, cfg 1: FID " in capsys.readouterr().out.replace("\r", "")
