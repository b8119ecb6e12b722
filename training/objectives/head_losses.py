"""What the learned heads are trained on (docs/heads.md); every loss is a scalar mean over images.

Legend: B images, L tokens an image, N rows (m draws of the token head for each masked token).
`mask` (B, L) bool is True where a token is masked.
"""

from dataclasses import dataclass

from heads.soft_topk import soft_topk_frac
from util.args import flag

ORDER_OBJECTIVES = {"easy": 1.0, "hard": -1.0}


@dataclass(frozen=True)
class HeadLossConfig:
    """Weights and shapes of the heads' losses."""

    lambda_order: float = flag(1.0, "weight of the order loss", low=0)
    lambda_size: float = flag(0.01, "weight of the penalty on the size of the soft selection", low=0)
    lambda_budget: float = flag(10.0, "weight of the budget that holds the mean group size at the cosine one", low=0)
    lambda_cfg: float = flag(
        1.0, "weight of the guidance head's misfit: epsilon consistency, or cross-entropy of ids", low=0
    )
    order_objective: str = flag("easy", "tokens that the order head puts first", choices=ORDER_OBJECTIVES)
    topk_temperature: float = flag(0.1, "temperature of the soft top-k", low=1e-4)


def order_and_size_losses(scores, k, mask, difficulty, config: HeadLossConfig):
    """(order loss, size penalty): the mean difficulty (B, L) of the softly selected k (B,) tokens, and soft_topk's."""
    soft, penalty = soft_topk_frac(scores, k, mask, config.topk_temperature)
    picked = (soft * difficulty).sum(dim=1) / soft.sum(dim=1).clamp(min=1e-6)
    return ORDER_OBJECTIVES[config.order_objective] * picked.mean(), penalty


def budget_loss(k, base_k):
    """(mean of k / k_cosine − 1)²: some images may take more tokens a step, others fewer, but not all fewer."""
    return ((k / base_k).mean() - 1).square()


def guidance_loss(fit, keep):
    """Mean of fit (N,), the misfit of guided predictions (ε-consistency, or cross-entropy of ids), over the rows that
    keep (N,) bool names."""
    return (fit * keep).sum() / keep.sum().clamp(min=1)
