"""What training logs of its samples, and that `--evaluate` and sample.py make the same pictures of its checkpoint."""

import io

import numpy as np
import pytest
from PIL import Image

import sample
from tests.test_sample import METRICS, NUM_EVAL, checkpoint, draw, folder_of, pngs, rows, train_tiny  # noqa: F401, a fixture
from util.checkpoint import load_checkpoint


def test_training_logs_every_loss_term_and_every_metric(checkpoint):  # noqa: F811
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(checkpoint))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    steps = load_checkpoint(checkpoint)["step"]
    for name in ("loss", "mse", "vb", "lr", "grad_norm", "images_per_second"):
        values = [e.value for e in events.Scalars(f"train/{name}")]
        assert len(values) == steps and all(np.isfinite(values)) and max(values) > 0
    parts = [[e.value for e in events.Scalars(f"train/{name}")] for name in ("loss", "mse", "vb")]
    assert np.allclose(parts[0], np.add(parts[1], parts[2]), rtol=1e-5)
    assert {t for t in tags if t.startswith("eval")} == {f"eval_cfg{cfg}/{m}" for cfg in (1, 2) for m in METRICS}

    sheet = checkpoint / "samples" / "epoch0001.png"
    (shown,) = events.Images("samples")
    shown = np.asarray(Image.open(io.BytesIO(shown.encoded_image_string)))
    assert np.array_equal(shown, np.asarray(Image.open(sheet))) and len(np.unique(shown)) > 10


@pytest.mark.parametrize("cfg", [1, 2])
def test_the_online_metrics_are_those_of_sampling_from_the_checkpoint(checkpoint, tmp_path, cfg):  # noqa: F811
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = ["--checkpoint", str(checkpoint), "--output_dir", str(tmp_path), "--seed", "1", "--cfg", str(cfg)]
    assert sample.main(flags) == 0  # number of images, steps, metrics: from the checkpoint
    assert len(pngs(folder_of(tmp_path))) == NUM_EVAL
    events = EventAccumulator(str(checkpoint))
    events.Reload()
    for name, value in rows(tmp_path)[0]["metrics"].items():
        (logged,) = events.Scalars(f"eval_cfg{cfg}/{name}")
        assert logged.value == pytest.approx(value, rel=1e-3, abs=1e-5)


def test_evaluate_makes_the_pictures_that_sampling_makes(checkpoint, tmp_path, capsys):  # noqa: F811
    flags = ["--resume", checkpoint, "--num_images", 12, "--eval_bsz", 8, "--cfg", 2, "--metrics", "fid", "--evaluate"]
    train_tiny(tmp_path / "a", *flags)
    assert "FID" in capsys.readouterr().out
    (folder,) = (tmp_path / "a" / "evaluation").iterdir()
    flags = ["--num_images", 12, "--seed", 1, "--num_iter", 2, "--num_sampling_steps", 25]
    assert draw(checkpoint, tmp_path / "b", *flags) == 0
    assert pngs(folder) == pngs(folder_of(tmp_path / "b")) and len(pngs(folder)) == 12
    assert not (tmp_path / "a" / "checkpoint-last.pth").exists()  # nothing was trained
