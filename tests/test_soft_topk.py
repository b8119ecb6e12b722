"""The soft top-k: its formula, its hard limit, its gradients."""

import itertools
import math

import numpy as np
import pytest
import torch

from heads.soft_topk import soft_topk_frac


def case(seed=0, batch=6, length=12, dtype=torch.float64):
    rng = np.random.default_rng(seed)
    scores = torch.from_numpy(rng.normal(size=(batch, length))).to(dtype)
    valid = torch.from_numpy(rng.random((batch, length)) < 0.7)
    valid[:, 0] = True
    return scores, valid, rng


@pytest.mark.parametrize("seed", range(5))
def test_soft_topk_becomes_the_hard_one(seed):
    scores, valid, rng = case(seed)
    n = valid.sum(1)
    n[0] += 1 - n[0]  # one image with k = 1
    k = torch.tensor([rng.integers(1, max(m, 2)) for m in n.tolist()], dtype=torch.float64)
    soft, penalty = soft_topk_frac(scores, k, valid, 1e-5)
    for i in range(len(scores)):
        best = scores[i].masked_fill(~valid[i], -math.inf).topk(int(k[i])).indices
        assert soft[i].sum() == pytest.approx(k[i].item()) and soft[i][best].min() > 0.999
    assert penalty < 1e-6 and (soft[~valid] == 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_soft_topk_follows_the_formula(seed):
    scores, valid, rng = case(seed)
    k = torch.tensor([rng.uniform(1, m) for m in valid.sum(1).tolist()], dtype=torch.float64)
    soft, penalty = soft_topk_frac(scores, k, valid, 0.3)
    for i in range(len(scores)):
        s = sorted(scores[i][valid[i]].tolist(), reverse=True)
        m = [None] + [(a + b) / 2 for a, b in itertools.pairwise(s)] + [s[-1] - 0.3]
        whole, f = int(k[i]), float(k[i]) - int(k[i])
        theta = (1 - f) * m[whole] + (f * m[whole + 1] if f else 0)
        expected = torch.sigmoid((scores[i] - theta) / 0.3) * valid[i]
        torch.testing.assert_close(soft[i], expected)
    torch.testing.assert_close(penalty, (soft.sum(1) - k).square().mean())


def test_soft_topk_is_permutation_equivariant():
    scores, valid, _ = case()
    k = torch.full((6,), 1.5, dtype=torch.float64).minimum(valid.sum(1).double())
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    soft, penalty = soft_topk_frac(scores, k, valid, 0.2)
    turned, other = soft_topk_frac(scores[:, order], k, valid[:, order], 0.2)
    torch.testing.assert_close(turned, soft[:, order])
    torch.testing.assert_close(other, penalty)


def test_soft_topk_gradients():
    scores, valid, _ = case(3)
    scores.requires_grad_()
    k = (valid.sum(1).double() * 0.37 + 0.63).clamp(min=1.01).minimum(valid.sum(1) - 0.01).requires_grad_()
    keep = valid.sum(1) > 2
    assert torch.autograd.gradcheck(lambda s, k: soft_topk_frac(s, k, valid, 0.5)[0], (scores, k))
    soft, penalty = soft_topk_frac(scores, k, valid, 0.5)
    (by_k,) = torch.autograd.grad(soft.sum(), k, retain_graph=True)
    assert (by_k[keep] > 0).all()  # a larger k lowers the threshold
    by_scores, by_k = torch.autograd.grad(penalty, (scores, k), allow_unused=True)
    assert by_scores.abs().sum() > 0 and (by_k is None or (by_k == 0).all())


def test_soft_topk_survives_infinite_invalid_scores_and_images_without_valid_tokens():
    scores = torch.tensor([[1.0, -math.inf, 0.5], [0.0, 0.0, 0.0]], requires_grad=True)
    valid = torch.tensor([[True, False, True], [False, False, False]])
    soft, penalty = soft_topk_frac(scores, torch.tensor([1.0, 1.0]), valid, 0.1)
    (soft[valid].sum() + 0.0 * penalty).backward()
    assert soft[valid].isfinite().all() and scores.grad[valid].isfinite().all() and (soft[1] == 0).all()
    with pytest.raises(ValueError, match="0"):
        soft_topk_frac(scores, torch.ones(2), valid, 0.0)
