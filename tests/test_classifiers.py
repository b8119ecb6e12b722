"""The committed classifiers, and the script that trains them."""

import numpy as np
import pytest
import torch

from scripts import train_classifier
from util.evaluation.classifiers import (
    CIFAR10_WEIGHTS,
    DIGITS_WEIGHTS,
    Cifar10Classifier,
    DigitClassifier,
    load_classifier,
)


def test_committed_classifier():
    assert DIGITS_WEIGHTS.stat().st_size <= 300_000
    with np.load(DIGITS_WEIGHTS, allow_pickle=False) as arrays:
        assert {arrays[name].dtype for name in arrays.files} == {np.dtype(np.float32)}
    x, y = train_classifier.load_images()
    net = load_classifier()
    features, logits = net(x)
    assert features.shape == (1797, 64) and logits.shape == (1797, 10)
    assert features.square().mean().sqrt().item() == pytest.approx(1, abs=1e-3)
    assert train_classifier.accuracy(net, x, y) >= 0.98


def test_committed_cifar10_classifier_takes_what_its_script_gives():
    assert CIFAR10_WEIGHTS.stat().st_size <= 500_000
    net = load_classifier(Cifar10Classifier, CIFAR10_WEIGHTS)
    recipe = train_classifier.RECIPES["cifar10"]
    assert recipe.net is Cifar10Classifier and recipe.weights == CIFAR10_WEIGHTS
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x = train_classifier.augment(images, torch.Generator().manual_seed(0), recipe.shift, recipe.flip)
    features, logits = net(x)
    assert features.shape == (8, 64) and logits.shape == (8, 10) and features.min() >= 0
    assert features.dtype == torch.float32 and features.std() > 0 and logits.isfinite().all()


def test_training_script(tmp_path, capsys):
    before, output = torch.get_rng_state(), tmp_path / "new" / "net.npz"
    assert train_classifier.main(["--epochs", "2", "--output", str(output)]) == 0
    assert "held-out accuracy" in capsys.readouterr().out
    assert list(output.parent.iterdir()) == [output]  # no partial file left
    quick = tmp_path / "quick.npz"
    assert train_classifier.main(["--epochs", "2", "--no-held_out", "--output", str(quick)]) == 0
    assert "held-out" not in capsys.readouterr().out
    states = [load_classifier(DigitClassifier, path).state_dict() for path in (output, quick)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    x, y = train_classifier.load_images()
    assert train_classifier.accuracy(load_classifier(DigitClassifier, output), x, y) > 0.5
    first, second = (train_classifier.train(x[:200], y[:200], 2, seed=3).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(before, torch.get_rng_state())


def test_augmentation_shifts_by_at_most_one_pixel():
    x = torch.full((200, 1, 8, 8), -1.0)
    x[:, 0, 3, 4] = 9.0  # far above the noise
    shifted = train_classifier.augment(x, torch.Generator().manual_seed(0))
    places = {divmod(i, 8) for i in shifted.flatten(1).argmax(1).tolist()}
    assert places == {(row, column) for row in (2, 3, 4) for column in (3, 4, 5)}
