"""The order rules: each a permutation with its own shape, random ones uniform; and the hard top-k that applies them."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from heads import orders
from heads.orders import ORDERS
from heads.rules import hard_topk
from sampling.loop import generate
from tests.helpers_generate import BATCH, LENGTH, Stop, recorded, rules_of, state

# -------------------------------------------------------------------------------------------------------- order rules


def ranking(name, side, seed=0, batch=1):
    """Positions (B, L), first revealed first."""
    scores = ORDERS[name](state([side**2] * batch, length=side**2, seed=seed))
    assert scores.shape == (batch, side**2) and scores.isfinite().all()
    assert all(len(row.unique()) == side**2 for row in scores)  # no ties: a total order
    return scores.argsort(dim=1, descending=True)


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("side", [1, 2, 3, 7, 16])
def test_orders_rank_every_token_once(name, side):
    order = ranking(name, side, batch=3)
    assert torch.equal(order.sort(dim=1)[0], torch.arange(side**2).expand(3, -1))


@pytest.mark.parametrize("name", ORDERS)
def test_which_orders_are_random(name):
    first, other = ranking(name, 4, seed=1, batch=2), ranking(name, 4, seed=2, batch=2)
    fixed = name in ("raster", "halton")
    assert torch.equal(first, other) is fixed and torch.equal(first[0], first[1]) is fixed
    assert torch.equal(first, ranking(name, 4, seed=1, batch=2))


def test_raster_goes_row_by_row(mar):
    assert torch.equal(ranking("raster", 5)[0], torch.arange(25))
    _, steps = recorded(mar, rules_of(order="raster"), LENGTH)
    assert [rows[:, 1].tolist() for _, rows in steps] == [[i] * BATCH for i in range(LENGTH)]


@pytest.mark.parametrize("side", [2, 3, 8])
def test_center_goes_outwards(side):
    order = ranking("center", side)[0]
    middle = (side - 1) / 2
    distance = np.hypot(order // side - middle, order % side - middle)
    assert (np.diff(distance) >= -1e-6).all()


@pytest.mark.parametrize("side", [2, 3, 8, 16])
def test_multiscale_goes_from_coarse_to_fine(side):
    """Every grid of stride 2^k through the corner is complete before a point off it comes."""
    order = ranking("multiscale", side)[0]
    row, column = order // side, order % side
    stride = 1
    while stride < 2 * side:
        size = math.ceil(side / stride) ** 2
        assert ((row[:size] % stride == 0) & (column[:size] % stride == 0)).all()
        stride *= 2


@pytest.mark.parametrize("side", [2, 3, 4, 8, 16])
def test_checkerboard_takes_its_three_classes_in_turn(side):
    """i + j ≡ 0, then 2 (mod 4), then odd; within a class the image's random order, that of its Gumbel draws."""
    current = state([side**2] * 2, length=side**2)
    order = ranking("checkerboard", side, batch=2)
    diagonal = (order // side + order % side) % 4
    level = torch.where(diagonal % 2 == 1, 2, diagonal // 2)
    assert (level.diff(dim=1) >= 0).all()
    draws = current.gumbel.gather(1, order)
    assert (draws.diff(dim=1) < 0)[level.diff(dim=1) == 0].all()


@pytest.mark.parametrize("side", [3, 4, 6, 9, 12, 16])
def test_halton_follows_the_sequence(side):
    """Cells by the first point of the Halton sequence (bases 2 and 3, from point 1) in them, in exact arithmetic."""

    def radical_inverse(i, base):
        value, digit = Fraction(0), Fraction(1, base)
        while i:
            value, i, digit = value + i % base * digit, i // base, digit / base
        return value

    expected, i = {}, 1
    while len(expected) < side**2:
        cell = int(radical_inverse(i, 2) * side) * side + int(radical_inverse(i, 3) * side)
        expected.setdefault(cell, None)
        i += 1
    assert ranking("halton", side)[0].tolist() == list(expected)


def test_halton_spreads_out():
    """On 12×12, the first 6 cells lie in different cells of a 2×3 partition, the first 12 of a 4×3 one."""
    order = ranking("halton", 12)[0]
    for rows, columns in ((2, 3), (4, 3)):
        first = order[: rows * columns]
        coarse = (first // 12 // (12 // rows)) * columns + first % 12 // (12 // columns)
        assert len(coarse.unique()) == rows * columns


def test_random_order_is_uniform_over_positions_and_pairs(mar):
    """Chi-square of the first position, and of the first two together, over images with consecutive seeds."""
    num_images, seen = 9 * 8 * 40, []

    def callback(step, rows, plan, tokens):
        assert len(rows) == num_images
        seen.append(rows[:, 1])
        if step == 1:
            raise Stop

    with pytest.raises(Stop):
        generate(
            mar, torch.zeros(num_images, dtype=torch.long), rules_of(), LENGTH, 1, range(num_images), callback=callback
        )
    pairs = torch.bincount(seen[0] * LENGTH + seen[1], minlength=LENGTH**2).reshape(LENGTH, LENGTH)
    assert (pairs.diagonal() == 0).all()
    for counts in (pairs.sum(1), pairs.sum(0), pairs[~torch.eye(LENGTH, dtype=torch.bool)]):
        counts = counts.double()
        statistic = ((counts - counts.mean()) ** 2 / counts.mean()).sum().item()
        assert chi2.sf(statistic, len(counts) - 1) > 1e-4


# --------------------------------------------------------------------------------------------------------- hard_topk


@pytest.mark.parametrize("length", [1, 2, 7])
def test_hard_topk_against_a_loop(length):
    """Few distinct scores, so ties abound; −∞ is a score like any other."""
    rng = np.random.default_rng(length)
    scores = rng.choice(np.float32([-math.inf, -1.0, 0.0, 0.5, 3.0]), (300, length))
    valid = rng.random((300, length)) < rng.random((300, 1))
    k = rng.integers(0, valid.sum(1) + 1)
    got = hard_topk(*(torch.from_numpy(x) for x in (scores, k.astype(np.float32), valid)))
    for i in range(300):
        candidates = [j for j in range(length) if valid[i, j]]
        best = sorted(candidates, key=lambda j: (-scores[i, j], j))[: k[i]]
        assert got[i].nonzero().flatten().tolist() == sorted(best)


def test_an_order_that_does_not_say_otherwise_is_of_square_images(monkeypatch):
    monkeypatch.setitem(orders.ORDERS, "spiral", orders.raster_order)
    with pytest.raises(ValueError, match="--order spiral is of square images, these are not; valid: random, raster"):
        orders.check_square("spiral")
    orders.check_square("raster"), orders.check_square("confidence"), orders.check_square("learned")
