"""Inception's weights: pickles and other files refused, no network, one download; and the features they give."""

import pickle
import shutil
import socket
from contextlib import suppress
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch

from tests.helpers import Malicious, images_of
from util.evaluation.features import build_extractor, check_features
from util.evaluation.metrics import compute_metrics, frechet_distance, gaussian_statistics, possible_metrics


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """torch-fidelity's Inception with random weights, in a file as its own: 90 MB, removed afterwards."""
    from torch_fidelity import feature_extractor_inceptionv3 as fidelity

    class Untrained(fidelity.FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict):
            pass

    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *args, **kwargs: {})
        torch.manual_seed(0)
        net = Untrained("untrained", ["2048"])
        for name, value in net.named_parameters():  # the default initialisation shrinks features to 1e-6
            if name.endswith("conv.weight"):
                torch.nn.init.kaiming_normal_(value)
    torch.save(net.state_dict(), path)
    yield path
    path.unlink()


@pytest.mark.parametrize(
    "write", [torch.save, lambda thing, path: Path(path).write_bytes(pickle.dumps(thing, protocol=2))]
)
def test_pickles_are_refused_and_not_run(tmp_path, write):
    file, target = tmp_path / "weights.pth", tmp_path / "executed"
    write({"fc.weight": Malicious(str(target))}, file)
    for call in (check_features, lambda *args: compute_metrics(*2 * (images_of(4, 8, 8, 3),), weights=args[1])):
        with pytest.raises(ValueError, match="weights.pth refused") as caught:
            call("inception", file)
        assert "\n" not in str(caught.value) and not target.exists()
    with suppress(RuntimeError):
        torch.load(file, weights_only=False)  # what it does to those who trust it
    assert target.exists()


def test_other_weights_are_refused(tmp_path, inception_file):
    file = tmp_path / "weights.pth"
    with pytest.raises(ValueError, match="no inception weights at .*weights.pth"):
        check_features("inception", file)
    file.write_bytes(inception_file.read_bytes()[:100_000])
    with pytest.raises(ValueError, match="weights.pth refused"):
        check_features("inception", file)
    torch.save({"fc.weight": torch.zeros(3)}, file)
    with pytest.raises(ValueError, match="weights.pth refused") as caught:
        check_features("inception", file)
    assert "\n" not in str(caught.value)


def test_no_weights_and_no_network(tmp_path, monkeypatch, capfd):
    def unreachable(*args, **kwargs):
        assert socket.getdefaulttimeout() == 10
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(
        ValueError, match="no network.*no route to host.*--fid_weights FILE.*--features digits"
    ) as caught:
        check_features("inception")
    assert "\n" not in str(caught.value)
    assert socket.getdefaulttimeout() is None
    assert capfd.readouterr() == ("", "")
    check_features("digits")


def test_weights_are_downloaded_to_torch_hub_once(tmp_path, monkeypatch, inception_file):
    calls = []

    def download(url, target, **kwargs):
        calls.append(url)
        shutil.copy(inception_file, target)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    for _ in range(2):
        assert check_features("inception") == str(tmp_path / "checkpoints" / calls[0].rsplit("/", 1)[1])
    assert len(calls) == 1
    shutil.rmtree(tmp_path / "checkpoints")


def tiny_images(seed):
    return np.random.default_rng(seed).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8) // (1 + seed)


def test_inception_features(inception_file):
    names = ("isc", "kid", "prc")
    figures = compute_metrics(tiny_images(0), tiny_images(1), weights=inception_file, metrics=names)
    assert list(figures) == ["is_mean", "is_std", "kid_mean", "kid_std", "precision", "recall"]
    assert np.isfinite(list(figures.values())).all() and figures["is_mean"] >= 1


def test_spatial_features_are_places_of_a_layer_as_in_adm(inception_file):
    """mixed_6/conv of the TensorFlow graph: 17 x 17 places, 7 channels of the first branch, after its ReLU."""
    images = torch.from_numpy(tiny_images(0)[:3]).permute(0, 3, 1, 2)
    extractor, _ = build_extractor("inception", inception_file, ["spatial"])
    (found,) = extractor(images)
    assert found.shape == (3, 2023) and found.dtype == torch.float32 and (found >= 0).all() and found.std() > 0
    kept = []
    hook = extractor.Mixed_6d.register_forward_hook(lambda module, args, output: kept.append(output))
    assert torch.equal(extractor(images)[0], found)
    hook.remove()
    # the branch is the first part of what the block returns
    assert kept[0].shape == (3, 768, 17, 17) and torch.equal(kept[0][:, :7].flatten(1), found)
    assert torch.equal(extractor(images[1:])[0].argmax(1), found[1:].argmax(1))
    (others,) = build_extractor("inception", inception_file, ["2048"])[0](images)
    assert others.shape == (3, 2048)


@pytest.mark.slow  # eigenvalues of 2023 x 2023 matrices
def test_inception_sfid(inception_file):
    sets = [tiny_images(0), tiny_images(1)]
    net = build_extractor("inception", inception_file, ["spatial"])[0]
    statistics = [gaussian_statistics(net(torch.from_numpy(x).permute(0, 3, 1, 2))[0].numpy()) for x in sets]
    expected = frechet_distance(*statistics[0], *statistics[1])
    options = dict(weights=inception_file, batch_size=3)
    found = compute_metrics(*sets, metrics=("sfid", "isc"), **options)
    assert list(found) == ["sfid", "is_mean", "is_std"] and found["sfid"] == pytest.approx(expected, rel=1e-3)
    itself = compute_metrics(sets[0], sets[0], metrics=("sfid",), **options)
    assert itself == {"sfid": pytest.approx(0, abs=1e-6 * expected)} and expected > 0


def test_sfid_is_measured_where_it_is_asked_for_and_possible():
    assert "sfid" not in possible_metrics(None, "inception", False)
    assert possible_metrics(("sfid", "fid"), "inception", False) == ("sfid", "fid")
    with pytest.raises(ValueError, match="digits features keep no places.*--features inception"):
        possible_metrics(("sfid",), "digits", False)
    with pytest.raises(ValueError, match="sfid needs the reference images"):
        possible_metrics(("sfid",), "inception", True)


@pytest.mark.slow  # eigenvalues of 2048 x 2048 matrices
def test_inception_fid(inception_file):
    from torch_fidelity.utils import create_feature_extractor

    net = create_feature_extractor(
        "inception-v3-compat", ["2048"], cuda=False, feature_extractor_weights_path=inception_file, verbose=False
    )
    sets = [tiny_images(0), tiny_images(1)]
    statistics = [gaussian_statistics(net(torch.from_numpy(x).permute(0, 3, 1, 2))[0].numpy()) for x in sets]
    expected = frechet_distance(*statistics[0], *statistics[1])
    figures = compute_metrics(*sets, weights=inception_file, metrics=("fid",), batch_size=8)
    assert figures == {"fid": pytest.approx(expected, rel=1e-3)}
