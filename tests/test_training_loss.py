"""The training loss: the published masked mean, of each masked row with its own draws, also in micro-batches."""

import pytest
import torch

from tests.helpers import tiny_mar
from tests.helpers_training import CHANNELS, LENGTH, REPEATS, batch, draws
from training.objectives.token import TrainingLoss


@pytest.fixture
def mar():
    return tiny_mar(img_size=4, vae_embed_dim=CHANNELS)  # L = 16


@pytest.mark.parametrize("per_image", [False, True])
def test_training_loss_is_the_published_masked_mean(mar, per_image):
    """All rows, times the mask, over its sum; t and noise of unmasked rows are free to be anything."""
    tokens, labels = batch()
    d = draws([3, 1, 2], mask_ratio_min=0.3, mask_ratio_per_image=per_image)
    assert 0 < len(d.rows) < d.mask.numel() and (len(set(d.num_visible)) > 1) is per_image
    terms = TrainingLoss(mar)(tokens, labels, d, len(d.rows))

    t = torch.full((REPEATS, 3 * LENGTH), 17)
    noise = torch.full((REPEATS, 3 * LENGTH, CHANNELS), 0.5)
    t[:, d.rows], noise[:, d.rows] = d.t, d.noise
    z = mar.encode_decode(tokens, d.mask, labels).flatten(0, 1).repeat(REPEATS, 1)
    target = tokens.flatten(0, 1).repeat(REPEATS, 1)
    mask = d.mask.flatten().repeat(REPEATS)
    loss = mar.diffloss.token_loss(target, z, t.flatten(), noise.flatten(0, 1))
    expected = (loss * mask).sum() / mask.sum()
    torch.testing.assert_close(terms["loss"], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(terms["mse"] + terms["vb"], terms["loss"].detach())
    assert terms["loss"].requires_grad and not terms["mse"].requires_grad and not terms["vb"].requires_grad

    gradients = [torch.autograd.grad(x, list(mar.parameters()), allow_unused=True) for x in (terms["loss"], expected)]
    for ours, published in zip(*gradients):
        torch.testing.assert_close(ours, published, rtol=1e-3, atol=1e-5)


def test_training_loss_reads_each_masked_row_with_its_own_draws(mar):
    tokens, labels = batch()
    d = draws([3, 1, 2], mask_ratio_min=0.3, mask_ratio_per_image=True)
    module = TrainingLoss(mar)
    base = module(tokens, labels, d, 1)["loss"]
    shuffled = torch.randperm(len(d.rows), generator=torch.Generator().manual_seed(1))
    together = draws([3, 1, 2], mask_ratio_min=0.3, mask_ratio_per_image=True)
    together.rows, together.t, together.noise = d.rows[shuffled], d.t[:, shuffled], d.noise[:, shuffled]
    torch.testing.assert_close(module(tokens, labels, together, 1)["loss"], base, rtol=1e-5, atol=1e-5)
    together.rows = d.rows  # now rows and their noise no longer belong together
    assert (module(tokens, labels, together, 1)["loss"] - base).abs() > 1e-3
    torch.testing.assert_close(module(tokens, labels, d, 10.0)["loss"], base / 10)


def test_masked_tokens_are_targets_but_not_seen(mar):
    """Two contents of the masked tokens give the same z, hence the same gradient of z; and two losses."""
    tokens, labels = batch()
    d = draws([3, 1, 2], mask_ratio_min=0.3)
    other = torch.where(d.mask.unsqueeze(-1), -tokens, tokens)
    z = [mar.encode_decode(x, d.mask, labels) for x in (tokens, other)]
    assert torch.equal(*z)
    losses = [TrainingLoss(mar)(x, labels, d, len(d.rows))["loss"] for x in (tokens, other)]
    assert (losses[0] - losses[1]).abs() > 1e-3


def test_micro_batches_add_up_to_the_whole(mar):
    """With one global count of rows, the loss of a batch is the sum over its parts, however unequal their masks."""
    tokens, labels = batch()
    samples = [3, 1, 2]
    options = dict(mask_ratio_min=0.3, mask_ratio_per_image=True)
    whole = draws(samples, **options)
    module, n = TrainingLoss(mar), len(whole.rows)
    expected = module(tokens, labels, whole, n)["loss"]
    parts = [module(tokens[i, None], labels[i, None], draws([samples[i]], **options), n)["loss"] for i in range(3)]
    torch.testing.assert_close(sum(parts), expected, rtol=1e-4, atol=1e-5)
