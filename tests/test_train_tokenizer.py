"""Training a tokenizer: what a run leaves behind, exact resumption, the loss, centred latents, and bad input."""

import json
import re
import shlex

import numpy as np
import pytest
import torch
from PIL import Image

import main_mar
from models.tokenizers import build_tokenizer
from scripts import train_tokenizer
from training.autoencoders import LOSSES, centre_latents, make_autoencoder, revive, start_codebook, watched
from util.checkpoint import FILE_NAME, read_file, save_checkpoint
from util.door import run_main
from util.evaluation.perceptual import Perceptual, build_perceptual
from util.evaluation.reconstruction import warn_of_usage
from util.images.datasets import MemoryDataset, build_dataset, in_memory
from util.images.pictures import save_png

pytestmark = pytest.mark.on_cpu("runs are compared bit for bit, which a GPU promises with --deterministic alone")

# one epoch is three steps
TINY = "--data digits --stride 2 --latent_channels 3 --width 4 --codebook_size 16 --batch_size 500 --num_eval 20"
TINY = f"{TINY} --lr 1e-2 --epochs 0.6".split()
MULTISCALE = ["--multiscale", "--patch_nums", "1,2,4", "--adversarial_weight", "0.1", "--adversarial_start", "0.4"]
CLASS_FLAGS = {"AutoencoderKL": [], "VQModel": ["--vq"], "MultiScaleVQ": MULTISCALE}
DIFFUSERS = ["AutoencoderKL", "VQModel"]


def train(folder, *flags) -> dict:
    """Run the program; its checkpoint."""
    assert train_tokenizer.main([*TINY, "--output_dir", str(folder), *map(str, flags)]) == 0
    return read_file(folder / FILE_NAME)


def test_the_command_for_training_on_it_can_be_pasted(tmp_path, capsys):
    folder = tmp_path / "my images"
    (folder / "train" / "a").mkdir(parents=True)
    for i in range(12):
        save_png(folder / "train" / "a" / f"{i}.png", np.full((8, 8, 3), 20 * i, np.uint8))
    train(tmp_path / "out", "--data", "imagefolder", "--data_path", folder, "--img_size", 8, "--batch_size", 5)
    (command,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("    main_mar.py ")]
    assert main_mar.main([*shlex.split(command)[1:], "--dry_run"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["data"], values["data_path"], values["img_size"]) == ("imagefolder", str(folder), 8)
    assert values["tokenizer"] == f"diffusers:{tmp_path / 'out' / 'autoencoder'}"


def refused(capsys, *flags) -> str:
    """The one line that a run with these flags ends with."""
    capsys.readouterr()
    assert run_main(train_tokenizer.main, [*TINY, *map(str, flags)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def digits() -> torch.Tensor:
    return build_dataset("digits").images.float() / 127.5 - 1


@pytest.fixture(scope="module", params=DIFFUSERS)
def trained(request, tmp_path_factory):
    """(class, folder) of a run of two steps."""
    folder = tmp_path_factory.mktemp(request.param)
    train(folder, *CLASS_FLAGS[request.param], "--features", "digits")
    return request.param, folder


def test_a_run_leaves_a_tokenizer_a_picture_and_a_result(trained):
    class_name, folder = trained
    names = {"autoencoder", "reconstructions.png", "results.jsonl", FILE_NAME}
    assert {path.name for path in folder.iterdir()} == names  # and nothing temporary
    tokenizer = build_tokenizer(f"diffusers:{folder / 'autoencoder'}")
    assert (tokenizer.kind, tokenizer.stride, tokenizer.channels, tokenizer.image_channels) == (class_name, 2, 3, 1)
    (row,) = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert (row["kind"], row["protocol"]["num_images"], row["training"]["steps"]) == ("reconstruction", 20, 2)
    of_codebook = {"usage", "perplexity"} if class_name == "VQModel" else set()
    assert row["metrics"].keys() == {"rfid", "psnr", "ssim"} | of_codebook
    assert np.asarray(Image.open(folder / "reconstructions.png")).std() > 0


def test_the_latents_are_normalised(trained):
    """Of images held out too: mean 0 for each channel, spread 1 over all."""
    latents = build_tokenizer(f"diffusers:{trained[1] / 'autoencoder'}").encode(digits()).movedim(1, 0).flatten(1)
    assert latents.mean(dim=1).abs().max() < 0.05
    assert latents.square().mean().sqrt().item() == pytest.approx(1, abs=0.05)


def test_what_is_saved_decodes_as_what_was_trained(trained):
    """Centring and scaling the latents changes no image, and the figures are those of the images it makes."""
    class_name, folder = trained
    sizes = dict(stride=2, latent_channels=3, width=4, codebook_size=16, image_channels=1, img_size=8)
    raw = make_autoencoder(class_name, **sizes).eval()
    raw.load_state_dict(read_file(folder / FILE_NAME)["autoencoder"])
    x = digits()[::10]
    with torch.no_grad():
        (encoded,) = raw.encode(x, return_dict=False)
        wanted = raw.decode(encoded.mode() if class_name == "AutoencoderKL" else encoded).sample
    tokenizer = build_tokenizer(f"diffusers:{folder / 'autoencoder'}")
    made = tokenizer.decode(tokenizer.encode(x, sample=False))
    # a code may tip over where two are as near
    assert ((made - wanted).abs().amax(dim=(1, 2, 3)) < 1e-4).float().mean() >= 0.97
    grey = [((v + 1) * 127.5).round().clamp(0, 255) for v in (made, x)]
    every = [i * 180 // 20 for i in range(20)]
    mse = (grey[0] - grey[1])[every].double().square().mean(dim=(1, 2, 3))
    row = json.loads((folder / "results.jsonl").read_text())
    assert row["metrics"]["psnr"] == pytest.approx((10 * torch.log10(255**2 / mse)).mean().item(), abs=1e-3)


@pytest.mark.parametrize("class_name", DIFFUSERS)
def test_centring_moves_the_mean_and_keeps_the_images(class_name):
    torch.manual_seed(0)
    sizes = dict(stride=4, latent_channels=3, width=4, codebook_size=8, image_channels=3, img_size=16)
    autoencoder = make_autoencoder(class_name, **sizes).eval()
    x, shift = torch.randn(4, 3, 16, 16), torch.tensor([3.0, -5.0, 0.5])
    with torch.no_grad():
        before = autoencoder.encode(x, return_dict=False)[0]
        before = before.mode() if class_name == "AutoencoderKL" else before
        images = autoencoder.decode(before).sample
        centre_latents(autoencoder, shift)
        after = autoencoder.encode(x, return_dict=False)[0]
        after = after.mode() if class_name == "AutoencoderKL" else after
        torch.testing.assert_close(after, before - shift[:, None, None])
        torch.testing.assert_close(autoencoder.decode(after).sample, images, rtol=1e-4, atol=1e-4)


def test_a_codebook_starts_at_latents():
    torch.manual_seed(0)
    sizes = dict(stride=2, latent_channels=3, width=4, codebook_size=50, image_channels=1, img_size=8)
    autoencoder = make_autoencoder("VQModel", **sizes)
    start_codebook(autoencoder, digits()[:8], torch.Generator().manual_seed(0))
    with torch.no_grad():
        latents = autoencoder.encode(digits()[:8]).latents.movedim(1, -1).reshape(-1, 3)
    nearest = torch.cdist(autoencoder.quantize.embedding.weight, latents).min(dim=1).values
    assert nearest.max() < 1e-3
    assert len(autoencoder.quantize.embedding.weight.unique(dim=0)) > 25


def test_entries_that_no_latent_chooses_are_moved_to_latents():
    """After as many latents as give each entry ten chances; those in use stay as they are."""
    torch.manual_seed(0)
    sizes = dict(stride=2, latent_channels=3, width=4, codebook_size=32, image_channels=1, img_size=8)
    autoencoder = make_autoencoder("VQModel", **sizes)
    start_codebook(autoencoder, digits()[:8], torch.Generator().manual_seed(0))
    codes = autoencoder.quantize.embedding.weight
    with torch.no_grad():
        codes[20:] += 1000
    before, idle, moved, chosen = codes.detach().clone(), torch.zeros(32, dtype=torch.long), [], []
    for step in range(4):  # of 8·16 latents each, so the third gives 320
        with watched(autoencoder) as quantised:
            autoencoder.decode(autoencoder.encode(digits()[:8]).latents)
        ((tokens,),) = quantised
        latents, ids = tokens
        revive(autoencoder, idle, [tokens], torch.Generator().manual_seed(step))
        moved.append((codes != before).any(dim=1))
        chosen.append(ids.unique())
    assert [m.sum() for m in moved[:2]] == [0, 0] and moved[2][20:].all() and torch.equal(moved[2], moved[3])
    assert len(chosen[0]) > 5 and not moved[3][chosen[0]].any()
    assert torch.cdist(codes, latents).min(dim=1).values[20:].max() < 1e-3
    autoencoder.decode(autoencoder.encode(digits()[:8]).latents)
    assert len(quantised) == 1  # nothing is watched outside the block


@pytest.mark.parametrize("usage, num_tokens, warned", [(0.4, 100, True), (0.6, 100, False), (0.3, 50, False)])
def test_low_usage_is_warned_of_as_far_as_the_tokens_can_tell(capsys, usage, num_tokens, warned):
    warn_of_usage(usage, num_tokens, 100)
    line = capsys.readouterr().out
    assert line == ("warning: 100 tokens use 40.0% of 100 entries: lower --codebook_size, or train longer\n" * warned)


# ------------------------------------------------------------------------------------------------------- resumption


@pytest.mark.parametrize("class_name", LOSSES)
def test_resuming_is_exact(tmp_path, monkeypatch, class_name):
    """Stopped in the middle of the second epoch, after a step that no checkpoint has."""
    flags = [*CLASS_FLAGS[class_name], "--epochs", 1.6]  # five steps of three an epoch
    whole = train(tmp_path / "whole", *flags)
    monkeypatch.setattr(train_tokenizer, "SAVE_EVERY", 2)
    step = train_tokenizer.optimize

    def stop(run, pixels):
        if run.step == 4 and not (tmp_path / "stopped").exists():
            (tmp_path / "stopped").touch()
            raise KeyboardInterrupt
        return step(run, pixels)

    monkeypatch.setattr(train_tokenizer, "optimize", stop)
    folder = tmp_path / "parts"
    args = [*TINY, "--output_dir", str(folder), *map(str, flags), "--resume"]
    assert run_main(train_tokenizer.main, args) == 130  # --resume with nothing there starts
    assert read_file(folder / FILE_NAME)["step"] == 4 and not (folder / "autoencoder").exists()
    parts = train(folder, *flags, "--resume")
    assert parts["step"] == whole["step"] == 5
    for name, value in whole["autoencoder"].items():
        assert torch.equal(value, parts["autoencoder"][name]), name
    # once more: nothing to train, nothing to append
    train(folder, *flags, "--resume")
    assert len((folder / "results.jsonl").read_text().splitlines()) == 1


def test_time_limits_a_run(tmp_path):
    assert train(tmp_path, "--epochs", 1000, "--max_minutes", 1e-6)["step"] == 1


# ------------------------------------------------------------------------------------------------------------- loss


def test_the_perceptual_distance_changes_the_training(tmp_path):
    weights = []
    for name in ("none", "digits"):
        autoencoder = train(tmp_path / name, "--perceptual", name)["autoencoder"]
        weights.append(torch.cat([v.flatten() for v in autoencoder.values()]))
    assert not torch.equal(*weights)


def test_perceptual_distance():
    """Zero for the same images, not for others; its gradient reaches the images and no weight."""
    perceptual = build_perceptual("digits", None, 1, 8)
    x, y = digits()[:4].requires_grad_(), digits()[4:8]
    assert perceptual(x, x).item() == 0
    perceptual(x, y).backward()
    assert x.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in perceptual.parameters()) and not perceptual.training
    far, near = (perceptual(digits()[:4] + d * torch.randn(4, 1, 8, 8), digits()[:4]).item() for d in (0.5, 0.05))
    assert far > near > 0


def test_perceptual_layers_are_those_before_a_pooling_and_the_last():
    import torchvision

    with torch.device("meta"):
        vgg = Perceptual(torchvision.models.vgg16().features)
    assert sorted(vgg.taps) == [3, 8, 15, 22, 29] and vgg.min_size == 16  # relu1_2, 2_2, 3_3, 4_3, 5_3, as in LPIPS
    small = Perceptual(torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.MaxPool2d(2), torch.nn.Conv2d(2, 5, 1)))
    assert sorted(small.taps) == [0, 2]
    activations = small.activations(torch.randn(1, 1, 4, 4))  # grey images become colours
    assert [tuple(a.shape) for a in activations] == [(1, 2, 4, 4), (1, 5, 2, 2)]
    torch.testing.assert_close(activations[1].norm(dim=1), torch.ones(1, 2, 2))


def test_vgg_takes_torchvisions_file(tmp_path, monkeypatch):
    """A smaller network under its name; the colours of the images are those that torchvision's networks expect."""
    import torchvision
    from torchvision.transforms import Normalize

    class Small(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.features = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.ReLU(), torch.nn.MaxPool2d(2))
            self.classifier = torch.nn.Linear(4, 2)

    monkeypatch.setattr(torchvision.models, "vgg16", Small)
    torch.manual_seed(0)
    net = Small()
    file = tmp_path / "vgg.pth"
    torch.save(net.state_dict(), file)
    x = torch.rand(2, 3, 8, 8)
    (activation,) = build_perceptual("vgg16", str(file), 3, 8).activations(2 * x - 1)
    wanted = net.features[0](Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(x)).relu()
    torch.testing.assert_close(activation, torch.nn.functional.normalize(wanted, dim=1), rtol=1e-4, atol=1e-5)
    torch.save({**net.state_dict(), "extra": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="vgg.pth refused"):
        build_perceptual("vgg16", str(file), 3, 8)
    torch.save({"x": torch.nn.Linear(1, 1)}, file)  # not only tensors
    with pytest.raises(ValueError, match="vgg.pth refused"):
        build_perceptual("vgg16", str(file), 3, 8)


# -------------------------------------------------------------------------------------------------------- in memory


def test_images_in_memory_are_those_of_the_folder(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for i in range(5):
        path = tmp_path / "train" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (9, 9, 3)).astype(np.uint8)).save(path)
    folder = build_dataset("imagefolder", data_path=str(tmp_path), img_size=8)
    held = in_memory(folder)
    assert isinstance(held, MemoryDataset) and (held.classes, held.flip) == (folder.classes, folder.flip)
    for one, other in zip(folder, held, strict=True):
        assert torch.equal(one[0], other[0]) and one[1:] == other[1:]
    assert in_memory(held) is held
    monkeypatch.setattr("util.images.datasets.MEMORY_LIMIT", 5 * 3 * 64 - 1)
    assert in_memory(folder) is folder


# -------------------------------------------------------------------------------------------------------- bad input


def test_a_run_is_not_overwritten_nor_mixed(tmp_path, capsys):
    train(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    out = ["--output_dir", tmp_path]
    assert "--resume" in refused(capsys, *out)
    assert re.search(r"--width 4, not 8", refused(capsys, *out, "--resume", "--width", 8))
    assert re.search(r"--vq False, not True", refused(capsys, *out, "--resume", "--vq"))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    save_checkpoint(tmp_path, {"model": {}})
    assert "no checkpoint of train_tokenizer.py" in refused(capsys, *out, "--resume")
    (tmp_path / FILE_NAME).write_bytes(b"garbage")
    assert FILE_NAME in refused(capsys, *out, "--resume")


def test_a_run_of_before_the_flags_about_reading_goes_on_in_mars_way(tmp_path, capsys):
    """Its checkpoint has none of them; what is given by hand and is something else is refused."""
    data, out = tmp_path / "images", tmp_path / "out"
    data.mkdir()
    for i in range(11):
        Image.fromarray(np.full((8, 8, 4), 20 * i, np.uint8)).save(data / f"{i}.png")
    flags = ["--data", "imagefolder", "--data_path", data, "--img_size", 8, "--batch_size", 5, "--epochs", 1]
    content = train(out, *flags, "--no_exif", "--background", "none")
    for name in ("value_range", "split_dir", "exif", "background", "flip"):
        del content["settings"][name]
    save_checkpoint(out, content)
    line = refused(capsys, "--output_dir", out, *flags, "--resume", "--background", "red")
    assert "--background none, not red" in line
    settings = train(out, *flags, "--epochs", 2, "--resume")["settings"]
    assert "it goes on in MAR's way, --no_exif --background none\n" in capsys.readouterr().out
    assert (settings["exif"], settings["background"], settings["flip"]) == (False, "none", True)
    train(out, *flags, "--epochs", 3, "--resume", "--no_exif", "--background", "none")
    assert "MAR's way" not in capsys.readouterr().out


def test_diverged_training_ends_in_one_line(tmp_path, capsys, monkeypatch):
    kind = LOSSES["AutoencoderKL"]

    def diverged(*inputs):
        decoded, penalty = kind.terms(*inputs)
        return decoded, penalty * float("nan")

    monkeypatch.setitem(LOSSES, "AutoencoderKL", kind._replace(terms=diverged))
    assert run_main(train_tokenizer.main, [*TINY, "--output_dir", str(tmp_path)]) == 1
    assert "--lr" in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())
