"""The training loss: the published masked mean, of each masked row with its own draws, also in micro-batches."""

from dataclasses import replace

import pytest
import torch

from tests.helpers import tiny_mar
from tests.helpers_training import CHANNELS, LENGTH, REPEATS, batch, draws, terms_of
from training.objectives.draws import TokenDraws
from training.objectives.token import TokenObjective


@pytest.fixture
def mar():
    return tiny_mar(img_size=4, vae_embed_dim=CHANNELS)  # L = 16


@pytest.mark.parametrize("per_image", [False, True])
def test_training_loss_is_the_published_masked_mean(mar, per_image):
    """All rows, times the mask, over its sum; t and noise of unmasked rows are free to be anything."""
    tokens, labels = batch()
    d = draws([3, 1, 2], mask_ratio_min=0.3, mask_ratio_per_image=per_image)
    assert 0 < len(d.tokens.rows) < d.mask.numel() and (len(set(d.num_visible)) > 1) is per_image
    terms = terms_of(TokenObjective(mar), tokens, labels, d, len(d.tokens.rows))

    t = torch.full((REPEATS, 3 * LENGTH), 17)
    noise = torch.full((REPEATS, 3 * LENGTH, CHANNELS), 0.5)
    t[:, d.tokens.rows], noise[:, d.tokens.rows] = d.tokens.draws["t"], d.tokens.draws["noise"]
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
    module = TokenObjective(mar)
    base = terms_of(module, tokens, labels, d, 1)["loss"]
    shuffled = torch.randperm(len(d.tokens.rows), generator=torch.Generator().manual_seed(1))
    together = draws([3, 1, 2], mask_ratio_min=0.3, mask_ratio_per_image=True)
    mixed = {name: value[:, shuffled] for name, value in d.tokens.draws.items()}
    together = replace(together, tokens=TokenDraws(d.tokens.rows[shuffled], mixed))
    torch.testing.assert_close(terms_of(module, tokens, labels, together, 1)["loss"], base, rtol=1e-5, atol=1e-5)
    apart = replace(together, tokens=TokenDraws(d.tokens.rows, mixed))  # rows and their noise do not belong together
    assert (terms_of(module, tokens, labels, apart, 1)["loss"] - base).abs() > 1e-3
    torch.testing.assert_close(terms_of(module, tokens, labels, d, 10.0)["loss"], base / 10)


def test_masked_tokens_are_targets_but_not_seen(mar):
    """Two contents of the masked tokens give the same z, hence the same gradient of z; and two losses."""
    tokens, labels = batch()
    d = draws([3, 1, 2], mask_ratio_min=0.3)
    other = torch.where(d.mask.unsqueeze(-1), -tokens, tokens)
    z = [mar.encode_decode(x, d.mask, labels) for x in (tokens, other)]
    assert torch.equal(*z)
    losses = [terms_of(TokenObjective(mar), x, labels, d, len(d.tokens.rows))["loss"] for x in (tokens, other)]
    assert (losses[0] - losses[1]).abs() > 1e-3


def test_micro_batches_add_up_to_the_whole(mar):
    """With one global count of rows, the loss of a batch is the sum over its parts, however unequal their masks."""
    tokens, labels = batch()
    samples = [3, 1, 2]
    options = dict(mask_ratio_min=0.3, mask_ratio_per_image=True)
    whole = draws(samples, **options)
    module, n = TokenObjective(mar), len(whole.tokens.rows)
    expected = terms_of(module, tokens, labels, whole, n)["loss"]
    parts = [
        terms_of(module, tokens[i, None], labels[i, None], draws([samples[i]], **options), n)["loss"] for i in range(3)
    ]
    torch.testing.assert_close(sum(parts), expected, rtol=1e-4, atol=1e-5)
