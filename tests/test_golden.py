"""A silent change of the training step shows here: its losses on fixture weights against those of a committed file.

`python -m tests.test_golden` writes the file anew, for a change that is meant to change them.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from models.mar import MAR, MARConfig
from tests.helpers import TINY, named_weights
from training.objectives.draws import DrawSettings, training_draws
from training.objectives.token import Batch, TokenObjective
from training.optim import EMA, make_optimizer

GOLDEN = Path(__file__).parent / "fixtures" / "golden_loss.json"


def losses(device: str = "cpu") -> list[float]:
    """Loss of ten AdamW steps of the tiny model on ramps, and at the end one with the averaged weights."""
    mar = named_weights(MAR(MARConfig(**{**TINY, "diffusion_batch_mul": 2})), scale=0.1).to(device)
    module, ema = TokenObjective(mar), EMA(mar, 0.99)
    optimizer = make_optimizer(mar, mar.token_head, 1e-3, 0.02)
    images = torch.linspace(-1, 1, 4 * 64).reshape(4, 1, 8, 8).to(device)
    labels = torch.tensor([0, 1, 2, 0], device=device)

    def loss(step):
        settings = DrawSettings(seq_len=64, mask_ratio_min=0.7, label_drop_prob=0.1)
        draws = training_draws(0, step, [5, 6, 7, 8], mar.token_head, settings).to(device)
        dropped = torch.where(draws.drop, -1, labels)
        return module(Batch(mar.patchify(images), dropped, draws), len(draws.tokens.rows))["loss"]

    found = []
    for step in range(10):
        value = loss(step)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(mar, step + 1)
        found.append(value.item())
    with ema.applied_to(mar), torch.no_grad():
        found.append(loss(10).item())
    return found


def test_losses_are_the_committed_ones():
    np.testing.assert_allclose(losses(), json.loads(GOLDEN.read_text()), rtol=1e-4)


@pytest.mark.gpu
def test_losses_on_a_gpu():
    """Sums in another order, from which AdamW's first steps, of the sign of each gradient, go other ways."""
    np.testing.assert_allclose(losses("cuda"), json.loads(GOLDEN.read_text()), rtol=1e-3)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(losses(), indent=1) + "\n")
