"""A differentiable top-k with a fractional k (docs/heads.md).

Legend: B images, L tokens an image, n valid tokens of an image.
"""

import torch


def soft_topk_frac(scores, k, valid, temperature):
    """Soft membership of the k highest scores, and a penalty on its size.

    scores (B, L), k (B,) float in [1, n], valid (B, L) bool, temperature > 0. Returns (soft (B, L) in [0, 1], 0 where
    not valid; size_penalty, a scalar). With m_j the midpoint between the j-th and (j+1)-th highest valid score (the
    end extended by one temperature) and f = k − ⌊k⌋,

        soft = σ((s − θ) / temperature),  θ = (1 − f)·m_⌊k⌋ + f·m_⌊k⌋+1,  penalty = mean((Σ soft − k)²).

    As temperature → 0 at whole k this is the hard top-k. Gradients reach scores through both, k through soft only:
    the penalty is about the scores.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    n = valid.sum(dim=1, keepdim=True)  # (B, 1)
    k = k.unsqueeze(1).clamp(min=1).minimum(n.clamp(min=1).to(k.dtype))  # (B, 1)
    midpoints = _midpoints(scores, valid, n, temperature)

    def soften(k):
        whole = k.detach().floor()
        share = k - whole
        low = midpoints.gather(1, whole.long() - 1)
        high = midpoints.gather(1, torch.minimum(whole.long(), (n - 1).clamp(min=0)))
        threshold = (1 - share) * low + share * high  # (B, 1)
        return torch.sigmoid((scores - threshold) / temperature) * valid

    soft = soften(k)
    fixed = soften(k.detach())  # the same numbers; the penalty's gradient must not reach k
    return soft, (fixed.sum(dim=1) - k.detach().squeeze(1)).square().mean()


def _midpoints(scores, valid, n, temperature):
    """m_1 … m_L (B, L) in columns 0 … L−1; those beyond m_n are never used."""
    # Invalid scores sort to the end as the lowest valid one, so that no infinity meets a gradient.
    lowest = scores.masked_fill(~valid, torch.finfo(scores.dtype).max).amin(dim=1, keepdim=True).detach()
    ranked = torch.where(valid, scores, torch.where(n > 0, lowest, 0.0) - 1.0)
    order = torch.argsort(ranked.detach(), dim=1, descending=True, stable=True)
    ranked = ranked.gather(1, order)  # (B, L), the first n are the valid ones
    following = torch.cat([ranked[:, 1:], ranked[:, -1:]], dim=1)
    rank = torch.arange(1, scores.shape[1] + 1, device=scores.device)
    return torch.where(rank == n, ranked - temperature, (ranked + following) / 2)
