"""A learned order as a Plackett–Luce draw: renewed Gumbel draws, probabilities, and the curve of the group sizes."""

import itertools
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from heads.forms import of_all
from heads.luce import PlackettLuce
from heads.policy import PolicyHeads, build_rules
from tests.helpers_heads import state_of

LOGITS = torch.tensor([0.7, -0.4, 0.1, 1.0])


def gumbel(*shape, seed=0):
    return -torch.empty(shape).exponential_(generator=torch.Generator().manual_seed(seed)).log()


def state(num_images, mask=None, length=4, seed=0):
    mask = torch.ones(num_images, length, dtype=torch.bool) if mask is None else mask
    return replace(state_of(mask, torch.zeros(num_images, length, 16)), gumbel=gumbel(num_images, length, seed=seed))


def luce(logits, noise=1.0):
    return PlackettLuce(lambda s: logits + noise * s.gumbel, noise)


def top(scores, k):
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.topk(k, dim=1).indices, True)


def test_probabilities_of_ordered_choices_are_those_of_drawing_without_replacement():
    """Closed form; they sum to 1 over all choices, and the draws choose with them."""
    number = 40000
    order = luce(LOGITS)
    drawn = state(number)
    scores = order(drawn)
    counts = Counter(map(tuple, scores.topk(2, dim=1).indices.tolist()))
    total = 0.0
    for first, second in itertools.permutations(range(4), 2):
        weights = LOGITS.exp()
        expected = (weights[first] / weights.sum() * weights[second] / (weights.sum() - weights[first])).item()
        ranks = torch.zeros(1, 4)
        ranks[0, first], ranks[0, second] = 9.0, 8.0
        one = replace(state(1), gumbel=ranks - LOGITS)
        log_prob = order.log_prob(one, order(one), top(order(one), 2))
        assert log_prob.exp().item() == pytest.approx(expected, rel=1e-5)
        assert counts[first, second] / number == pytest.approx(expected, abs=4 * math.sqrt(expected / number))
        total += log_prob.exp().item()
    assert total == pytest.approx(1.0)


@pytest.mark.parametrize("noise", [1.0, 0.5])
def test_renewed_draws_are_fresh_given_the_choice(noise):
    """Whatever the first choice under one set of logits, the next one under others is Plackett–Luce of these."""
    number, other = 40000, torch.tensor([0.2, 1.5, -1.0, 0.0])
    first, second = luce(LOGITS, noise), luce(other, noise)
    drawn = state(number)
    scores = first(drawn)
    taken = top(scores, 1)
    fresh = first.renewed(drawn, scores, taken)
    left = replace(drawn, mask=~taken, gumbel=fresh)
    following = second(left).masked_fill(taken, -math.inf).argmax(dim=1)
    for token in range(4):
        rows = taken[:, token]
        weights = (other / noise).exp() * (torch.arange(4) != token)
        for choice in set(range(4)) - {token}:
            expected = (weights[choice] / weights.sum()).item()
            share = (following[rows] == choice).float().mean().item()
            assert share == pytest.approx(expected, abs=4 / math.sqrt(rows.sum().item()))
    values = fresh[~taken]
    assert values.mean().item() == pytest.approx(0.5772, abs=0.02)  # of a Gumbel draw
    assert values.var().item() == pytest.approx(math.pi**2 / 6, abs=0.05)


def test_renewing_keeps_the_order_at_equal_logits_and_leaves_known_tokens():
    order, drawn = luce(torch.zeros(64)), state(5, length=64)
    ranking, known = drawn.gumbel.argsort(dim=1, descending=True), torch.zeros(5, 64, dtype=torch.bool)
    for _ in range(16):
        scores = order(drawn)
        taken = top(scores.masked_fill(known, -math.inf), 4)
        before = drawn.gumbel
        known = known | taken
        drawn = replace(drawn, gumbel=order.renewed(drawn, scores, taken), mask=~known)
        assert torch.equal(drawn.gumbel[known], before.double()[known])
        rest = ranking.gather(1, torch.arange(64).expand(5, -1))[~known.gather(1, ranking)].view(5, -1)
        left = drawn.gumbel.masked_fill(known, -math.inf).argsort(dim=1, descending=True)[:, : rest.shape[1]]
        assert torch.equal(left, rest)


def test_taking_all_that_is_left_is_no_choice():
    order, drawn = luce(LOGITS), state(3)
    assert order.log_prob(drawn, order(drawn), drawn.mask).abs().max() == 0


def test_a_learned_order_renews_its_draws_only_where_it_is_one():
    heads = PolicyHeads(16, ("order",), form="knots")
    drawn = state(2)
    assert build_rules("baseline", heads, order="learned")(drawn).gumbel is not None
    assert build_rules("baseline", heads, order="learned", order_noise=0.0)(drawn).gumbel is None
    assert build_rules("baseline", heads, order="learned", order_base="halton")(drawn).gumbel is None
    assert build_rules("baseline", PolicyHeads(16, ("order",)), order="learned")(drawn).gumbel is None
    assert build_rules("baseline")(drawn).gumbel is None


def test_group_sizes_move_the_cumulative_curve():
    """s' = s + (distance to the end of [0, 1] that r points to)·tanh(r) is the share known afterwards."""
    mask = torch.arange(10).expand(3, -1) >= 4  # 6 of 10 unknown
    drawn, base, r = state(3, mask, length=10), torch.full((3,), 2.0), torch.tensor([0.0, 50.0, -50.0])
    assert of_all(drawn, base, r, 0.0, 1.0).tolist() == pytest.approx([2.0, 6.0, 0.0])
    assert of_all(drawn, base, r[1:2], 0.0, 0.5)[1].item() == 3.0
    half = torch.atanh(torch.tensor([0.5]))
    assert of_all(drawn, base, half, 0.0, 1.0)[0].item() == pytest.approx(4.0)  # from 0.6 to 0.8
