"""The transformer's block: timm's, value for value, in training and not, with and without a mask; what is refused."""

import pytest
import torch
from timm.models.vision_transformer import Block as TimmBlock
from torch import nn

from models.vit import Block


def pair(attn_dropout=0.0, proj_dropout=0.0):
    torch.manual_seed(0)
    rates = dict(attn_drop=attn_dropout, proj_drop=proj_dropout)
    theirs = TimmBlock(
        24, 3, 2.5, qkv_bias=True, norm_layer=lambda dim, **kw: nn.LayerNorm(dim, eps=1e-6, **kw), **rates
    )
    torch.manual_seed(0)
    ours = Block(24, 3, 2.5, attn_dropout, proj_dropout)
    return ours, theirs


def test_starts_with_the_same_weights_under_the_same_names():
    ours, theirs = (block.state_dict() for block in pair())
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rates", [(0.0, 0.0), (0.3, 0.0), (0.0, 0.3), (0.2, 0.4)])
def test_equals_timms(rates, masked):
    x = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(7, 7, dtype=torch.bool).tril() if masked else None
    results = []
    for block in pair(*rates):
        torch.manual_seed(2)
        trained, evaluated = block(x, attn_mask=mask), block.eval()(x, attn_mask=mask)
        trained.square().sum().backward()
        results.append((trained, evaluated, *(p.grad for p in block.parameters())))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results))
    assert torch.equal(trained, evaluated) == (rates == (0.0, 0.0))


def test_parts_around_the_attention_are_the_block():
    block, _ = pair()
    x = torch.randn(2, 7, 24)
    query, key, value = (part.transpose(1, 2) for part in block.before_attention(x).unbind(dim=2))
    looked = (query @ key.transpose(2, 3) / 8**0.5).softmax(dim=-1) @ value
    torch.testing.assert_close(block.after_attention(x, looked.transpose(1, 2)), block(x), rtol=1e-5, atol=1e-5)


def test_width_that_the_heads_cannot_share():
    with pytest.raises(ValueError, match="a width of 10 cannot be shared among 3 heads"):
        Block(10, 3, 4.0, 0.0, 0.0)
