"""The gradient of what ids are drawn with, by the cost of the codes that they stand for."""

from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from heads.policy import build_rules
from sampling.loop import decode
from tests.helpers_ids import ENTRIES, GreyIds, tiny_ids
from tests.helpers_maskgil import tiny_maskgil
from training.objectives.decisions import ExpectedCost
from training.objectives.image import ImageObjective
from training.objectives.settings import RewardConfig

LABELS, SEEDS = torch.tensor([0, 2, -1]), [1, 2, 3]
WEIGHTS = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def drawn(model, values, num_iter, **options):
    """(ids, the `ExpectedCost` of them, plans with rows) at these τ and w."""
    tau, w = values
    rules = replace(
        build_rules("baseline", **options.pop("rules", {})),
        tau=lambda state: tau.expand(len(state.mask), 1),
        cfg=lambda state, after: w.expand(len(state.mask), 1),
    )
    expected, plans = ExpectedCost(), []

    def listen(step, rows, plan, tokens):
        expected.drawn(rows, plan)
        plans.append((rows, plan, tokens))

    model.requires_grad_(False)
    ids = decode(model, LABELS, rules, num_iter, seeds=SEEDS, callback=listen, **options)
    return ids, expected, plans


def slopes(model, num_iter):
    """d(loss)/d(τ, w) of a cost that is linear in the picture."""
    values = torch.tensor([0.8, 1.6], requires_grad=True)
    ids, expected, _ = drawn(model, values, num_iter, local=True)
    cost = (expected.render(GreyIds(), ids) * WEIGHTS).flatten(1).sum(dim=1)
    return torch.autograd.grad(expected.loss(cost), values)[0]


def expectation(model, values):
    """E[cost] of pictures made in one step, by the probabilities of all ids."""
    _, _, ((rows, plan, _),) = drawn(model, values.requires_grad_(), 1, local=True)
    weights = WEIGHTS.unfold(2, 2, 2).unfold(3, 2, 2).sum(dim=(1, 4, 5)).flatten(1)  # (B, L): of a cell
    greys = torch.linspace(-1, 1, ENTRIES)
    return ((plan.ids.exp() @ greys).double() * weights[rows[:, 0], rows[:, 1]]).sum().item()


def test_of_a_linear_cost_it_is_the_gradient_of_the_expectation():
    model = tiny_ids()
    found = slopes(model, 1)
    for i in range(2):
        ends = [expectation(model, torch.tensor([0.8, 1.6]) + sign * 1e-2 * torch.eye(2)[i]) for sign in (1, -1)]
        assert found[i].item() == pytest.approx((ends[0] - ends[1]) / 2e-2, rel=1e-2)
    assert slopes(model, 4).abs().min() > 0


def test_of_any_cost_it_is_that_of_the_tangent_at_what_was_drawn():
    """By enumeration: two tokens of four ids, a cost that is no sum over tokens."""
    codes, ids = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)), torch.tensor([[2, 0]])
    tokenizer = SimpleNamespace(codes=lambda: codes, render_codes=lambda vectors: vectors)
    logits = torch.randn(2, 4, generator=torch.Generator().manual_seed(2)).requires_grad_()

    def cost(vectors):
        return vectors.prod(dim=1).sin().sum(dim=-1)

    expected = ExpectedCost()
    expected.drawn(torch.tensor([[0, 0], [0, 1]]), SimpleNamespace(ids=logits.log_softmax(dim=1)))
    found = torch.autograd.grad(expected.loss(cost(expected.render(tokenizer, ids))), logits)[0]

    at = codes[ids].requires_grad_()
    (tangent,) = torch.autograd.grad(cost(at).sum(), at)
    p, mean = logits.softmax(dim=1), 0
    for pair in product(range(4), repeat=2):
        linear = (tangent[0] * (codes[list(pair)] - codes[ids[0]])).sum()
        mean = mean + p[0, pair[0]] * p[1, pair[1]] * linear
    torch.testing.assert_close(found, torch.autograd.grad(mean, logits)[0])


@pytest.mark.parametrize("model, rules", [(tiny_ids(), {}), (tiny_maskgil(), dict(order="confidence"))])
@pytest.mark.parametrize("local", [True, False])
def test_a_step_has_p_of_the_tokens_that_it_keeps(model, rules, local):
    """And not the log-probability of the choice of ids, which learns by the score function, too."""
    values = torch.tensor([0.8, 1.6], requires_grad=True)
    _, _, plans = drawn(model, values, 3, rules=rules, local=local)
    for rows, plan, _ in plans:
        assert plan.ids.shape == (len(rows), ENTRIES) and plan.ids.requires_grad
        torch.testing.assert_close(plan.ids.exp().sum(dim=1), torch.ones(len(rows)))
        assert (plan.log_prob is None) == local
    if rules == {} and not local:  # nothing is drawn and left
        sums = torch.zeros(3)
        for rows, plan, tokens in plans:
            log_p = plan.ids.gather(1, tokens[rows[:, 0], rows[:, 1]].unsqueeze(1)).squeeze(1)
            sums = sums.index_add(0, rows[:, 0], log_p)
        torch.testing.assert_close(sums, sum(plan.log_prob for _, plan, _ in plans))
    with torch.no_grad():
        assert drawn(model, values, 3, rules=rules)[2][0][1].ids is None


@pytest.mark.parametrize("discrete", [True, False])
@pytest.mark.parametrize("pathwise", [None, "full", "local"])
def test_ids_learn_by_it_unless_told_otherwise(discrete, pathwise):
    made = SimpleNamespace(
        settings=SimpleNamespace(reward=RewardConfig(pathwise=pathwise)),
        model=SimpleNamespace(token_head=SimpleNamespace(discrete=discrete)),
    )
    assert ImageObjective.local.fget(made) == ((pathwise or ("local" if discrete else "full")) == "local")
