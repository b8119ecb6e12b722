"""An image does not depend on its batch: not on the others' counts of known tokens, their seeds, labels or orders."""

import multiprocessing

import pytest
import torch

from models.diffloss import DiffusionSampler
from tests.helpers import randn
from tests.helpers_generate import BATCH, LABELS, LENGTH, check_decode, ragged_rules, recorded, rules_of, run
from util import rng


@torch.no_grad()
@pytest.mark.parametrize("counts", [(0, 1, 5), (9, 0, 4), (8, 8, 2)])
def test_ragged_encode_decode_equals_each_image_alone(mar, counts):
    tokens, rank = randn(BATCH, LENGTH, 1), randn(BATCH, LENGTH, seed=1).argsort(1)
    mask = rank >= torch.tensor(counts).unsqueeze(1)
    garbage = torch.where(mask.unsqueeze(-1), 1e3 * randn(BATCH, LENGTH, 1, seed=2), tokens)
    for labels in (LABELS, None):
        expected = torch.cat(
            [
                mar.encode_decode(tokens[i, None], mask[i, None], None if labels is None else labels[i, None])
                for i in range(3)
            ]
        )
        for content in (tokens, garbage):
            z = mar.encode_decode(content, mask, labels)
            torch.testing.assert_close(z, expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(mar.encode_decode(content, mask, labels, list(counts)), z, rtol=0, atol=0)
            padded = mar.encode_decode(content, mask, labels, (0, 12))  # bounds on the counts
            torch.testing.assert_close(padded, z, rtol=1e-4, atol=1e-5)
    assert (expected[0] - expected[1]).abs().max() > 0.1  # the images do differ


@torch.no_grad()
def test_encode_decode_labels(mar):
    """−1 is None; and a visible token, the label and the position of a token all matter."""
    tokens, mask = randn(1, LENGTH, 1), torch.arange(LENGTH).unsqueeze(0) >= 4
    z = [
        mar.encode_decode(tokens, mask, None if label is None else torch.tensor([label])) for label in (None, -1, 0, 1)
    ]
    assert torch.equal(z[0], z[1]) and not torch.allclose(z[1], z[2]) and not torch.allclose(z[2], z[3])
    assert not torch.allclose(mar.encode_decode(tokens.flip(1), mask), z[0])


def recorded_noise(monkeypatch):
    """A list to which every (images, noise) that generate() draws is added."""
    drawn, original = [], DiffusionSampler.noise

    def draw(self, generators, rows, num_steps):
        noise = original(self, generators, rows, num_steps)
        drawn.append((rows, noise))
        return noise

    monkeypatch.setattr(DiffusionSampler, "noise", draw)
    return drawn


def by_image(drawn, first):
    """{image: [(positions, noise) of each step]}, images counted from first."""
    result = {}
    for rows, noise in drawn:
        for i in rows[:, 0].unique().tolist():
            mine = rows[:, 0] == i
            result.setdefault(first + i, []).append((rows[mine, 1], noise[:, mine]))
    return result


@pytest.mark.parametrize("ragged", [False, True])
def test_an_image_does_not_depend_on_its_batch(mar, monkeypatch, ragged):
    """The draws are the same bits in batches of 5, 3 and 1; the tokens agree within rounding."""
    labels, seeds, sizes = (
        torch.tensor([0, 1, 2, -1, 0]),
        [5, 3, 2**32 - 1, 7, 0],
        torch.tensor([1.0, 3.0, 9.0, 2.0, 4.0]),
    )
    drawn = recorded_noise(monkeypatch)
    results = {}
    for batch_size in (5, 3, 1):
        tokens, draws = [], {}
        for start in range(0, 5, batch_size):
            part = slice(start, start + batch_size)
            rules = ragged_rules(sizes[part], cfg=2.0) if ragged else rules_of(cfg=2.0)
            drawn.clear()
            out, steps = recorded(mar, rules, 7, labels[part], seeds[part])
            check_decode(steps, torch.ones(len(out), LENGTH, dtype=torch.bool), 7)
            draws |= by_image(drawn, start)
            tokens.append(out)
        results[batch_size] = torch.cat(tokens), draws
    whole, whole_draws = results.pop(5)
    assert [len(whole_draws[i]) for i in range(5)] == ([7, 3, 1, 5, 3] if ragged else [7] * 5)
    for tokens, draws in results.values():
        torch.testing.assert_close(tokens, whole, rtol=1e-4, atol=1e-4)
        for i, steps in whole_draws.items():
            assert len(draws[i]) == len(steps)
            for (positions, noise), (other_positions, other_noise) in zip(steps, draws[i]):
                assert torch.equal(positions, other_positions) and torch.equal(noise, other_noise)


def test_seeds(mar):
    runs = [run(mar, rules_of(), 3, LABELS[:2], seeds) for seeds in ([1, 2], [1, 2], [1, 3], [2, 1])]
    assert torch.equal(runs[0], runs[1])
    torch.testing.assert_close(runs[2][0], runs[0][0], rtol=1e-4, atol=1e-5)
    for other in runs[2:]:
        assert not torch.allclose(other[1], runs[0][1], atol=1e-2)
    same_label = run(mar, rules_of(), 3, torch.tensor([1, 1]), [1, 2])
    assert not torch.allclose(same_label[0], same_label[1], atol=1e-2)


def test_without_seeds_every_call_is_another(mar):
    first, second = (run(mar, rules_of(), 2, seeds=None) for _ in range(2))
    assert not torch.allclose(first, second, atol=1e-2)


def test_orders_reveal_their_last_entries_first(mar):
    orders = torch.stack([torch.randperm(LENGTH, generator=torch.Generator().manual_seed(i)) for i in range(BATCH)])
    for num_iter in (3, LENGTH):
        steps = recorded(mar, rules_of(), num_iter, orders=orders)[1]
        for i in range(BATCH):
            left = orders[i].tolist()
            for _, rows in steps:
                now = set(rows[rows[:, 0] == i, 1].tolist())
                assert now == set(left[-len(now) :])
                left = left[: -len(now)]
            assert not left


def test_orders_stay_with_their_image_when_others_are_finished(mar):
    """The first image is complete after one step; the third reveals its unknown tokens by its own order."""
    orders = torch.stack([torch.arange(LENGTH), torch.arange(LENGTH), torch.arange(LENGTH).flip(0)])
    mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    mask[0, 1:], mask[2, ::2] = False, False
    _, steps = recorded(mar, rules_of(), LENGTH, orders=orders, tokens=randn(BATCH, LENGTH, 1), mask=mask)
    revealed = [torch.cat([rows[rows[:, 0] == i, 1] for _, rows in steps]).tolist() for i in range(BATCH)]
    assert revealed == [[0], [8, 7, 6, 5, 4, 3, 2, 1, 0], [1, 3, 5, 7]]


def test_draws_in_threads_are_those_of_one(monkeypatch):
    """Of images with different numbers of rows, one with none; the generators go on from the same place."""
    counts = torch.tensor([3, 1, 0, 40, 7, 2, 2, 9])
    rows = torch.stack([torch.arange(8).repeat_interleave(counts), torch.zeros(64, dtype=torch.long)], dim=1)
    made, drawn = [], rng.draw_by_image

    def draws():
        generators = [rng.generator(seed) for seed in range(8)]
        return torch.cat([drawn(generators, rows, lambda k: (5, k, 4), dim=1) for _ in range(2)])

    for limit in (10**9, 1):
        monkeypatch.setattr(rng, "THREADED_FROM", limit)
        made.append(draws())
    assert made[0].equal(made[1]) and made[0].shape == (10, 64, 4)
    child = multiprocessing.get_context("fork").Process(target=draws)  # which has none of this process's threads
    child.start()
    child.join(60)
    waits = child.is_alive()
    child.kill()
    child.join()
    assert not waits and child.exitcode == 0
