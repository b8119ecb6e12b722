"""References and images that are too few, of too few classes, or of the wrong size, for what is computed of them."""

import numpy as np
import pytest
from PIL import Image

import main_mar
import sample
from scripts import train_classifier
from tests.helpers_latents import SMALL, TRAIN, content, refused, write_image
from tests.test_reading_settings import train
from util.evaluation.metrics import digit_metrics
from util.evaluation.protocol import EvalConfig
from util.images.datasets import MemoryDataset, build_dataset

ONE = "--features digits needs reference images of at least 2 classes, got 1: name others with --data_path, or use"
DRAW = "--num_images 4 --num_iter 1 --num_sampling_steps 1 --features digits".split()


def folder_of(root, classes, size=8):
    for i in range(4):
        write_image(root / "train" / f"c{i % classes}" / f"{i}.png", i, (size, size))
    return root


def test_a_reference_of_one_class_is_refused_before_sampling(tmp_path, monkeypatch, capsys):
    """Of the data trained on, and of those that a flag names; with others, and with --metrics none, all goes."""
    one, two = (folder_of(tmp_path / name, classes) for name, classes in (("one", 1), ("two", 2)))
    run, out = train(one, tmp_path / "run"), tmp_path / "out"
    words = ["--checkpoint", run, "--output_dir", out, *DRAW]
    before = content(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("sampling.run.generate", lambda *a, **k: pytest.fail("it had started"))
        assert refused(sample.main, capsys, *words) == f"error: {ONE} --metrics none"
        flags = [*SMALL, *TRAIN, "--data_path", one, "--features", "digits", "--num_images", 4]
        for more in (["--online_eval"], ["--evaluate", "--resume", run]):
            line = refused(main_mar.main, capsys, *flags, *more, "--output_dir", out)
            assert line == f"error: {ONE} --metrics none"
    assert content(tmp_path) == before
    for more in (["--data_path", two], ["--metrics", "none"]):
        assert sample.main([*map(str, words), *map(str, more)]) == 0


def test_the_support_vector_classifier_needs_two_classes():
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8), dtype=np.uint8)
    with pytest.raises(ValueError, match="at least 2 classes, got 1"):
        digit_metrics(images, [0, 1, 0, 1], images, [1, 1, 1, 1])
    assert digit_metrics(images, [1, 1, 1, 1], images, [0, 0, 1, 1])["svc_accuracy"] == 0.5


@pytest.mark.parametrize("features, size", [("digits", 16), ("cifar10", 8)])
def test_images_of_another_size_than_a_classifiers_are_refused_before_sampling(features, size):
    reference = build_dataset("digits")
    with pytest.raises(ValueError, match=f"{features} features need uint8 images"):
        EvalConfig(num_images=4, features=features).check(reference, size)
    EvalConfig(num_images=4, features="digits").check(reference, 8)


def test_a_reference_in_memory_of_one_class_is_refused():
    digits = build_dataset("digits")
    ones = digits.labels == 1
    reference = MemoryDataset(digits.images[ones], digits.labels[ones], digits.classes, flip=False)
    with pytest.raises(ValueError, match="got 1"):
        EvalConfig(num_images=4, features="digits").check(reference, 8)


@pytest.mark.parametrize(
    "classifier, classes, size, words",
    [
        ("cifar10", 1, 32, "tells 2 to 10 classes apart, the images have 1"),
        ("cifar10", 12, 32, "tells 2 to 10 classes apart, the images have 12"),
        ("digits", 2, 32, "takes images of (1, 8, 8) numbers, these have (3, 32, 32)"),
    ],
)
def test_images_that_a_classifier_cannot_learn(classifier, classes, size, words, tmp_path, capsys):
    for i in range(12):
        path = tmp_path / "data" / "train" / f"c{i % classes}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (size, size)).save(path)
    flags = ["--classifier", classifier, "--data_path", tmp_path / "data", "--output", tmp_path / "c.npz"]
    line = refused(train_classifier.main, capsys, *flags)
    assert line == f"error: the classifier {classifier} {words}" and not (tmp_path / "c.npz").exists()
