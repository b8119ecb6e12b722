"""What the tests of the learned heads and their losses share: heads that say something, states to say it about."""

import torch

from heads.orders import AFTER_DRAW
from heads.policy import INFER_MODES, PolicyHeads
from heads.step import StepState

SCOPES = ("global", "token")
OF_LATENTS = [mode for mode, rules in INFER_MODES.items() if rules[0] not in AFTER_DRAW]


def trained(dim=16, scale=1.0, **options) -> PolicyHeads:
    """Heads whose every weight is random, so that they say different things about different tokens."""
    heads = PolicyHeads(dim, **options)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in heads.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * scale)
    return heads


def state_of(mask, z, step=1, num_iter=4, seed=0) -> StepState:
    g = torch.Generator().manual_seed(seed)
    return StepState(
        step=step,
        num_iter=num_iter,
        mask=mask,
        num_unknown=mask.sum(1).float(),
        num_start=torch.full((len(mask),), float(mask.shape[1])),
        gumbel=torch.randn(mask.shape, generator=g),
        z=z,
        images=torch.arange(len(mask)),
    )
