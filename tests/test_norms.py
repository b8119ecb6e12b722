"""The LayerNorm of MAR's blocks and of the diffusion MLP: torch's in float32, and 16 bits that stay 16 bits."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models.norms import LayerNorm
from util import dist


def norms(width=24, affine=True) -> tuple[LayerNorm, nn.LayerNorm]:
    """Ours and torch's, with the same gains and offsets."""
    ours, theirs = (kind(width, elementwise_affine=affine, eps=1e-6) for kind in (LayerNorm, nn.LayerNorm))
    if affine:
        with torch.no_grad():
            ours.weight.copy_(1 + 0.3 * torch.randn(width))
            ours.bias.copy_(torch.randn(width))
        theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("affine", [True, False])
def test_in_float32_it_is_torchs(affine):
    ours, theirs = norms(affine=affine)
    x = torch.randn(5, 24, requires_grad=True)
    for norm in (ours, theirs):
        norm(x).square().sum().backward()
    assert torch.equal(ours(x), theirs(x)) and ours.state_dict().keys() == theirs.state_dict().keys()
    for mine, other in zip(ours.parameters(), theirs.parameters()):
        assert torch.equal(mine.grad, other.grad)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_stay_16_bits_with_statistics_in_float32(dtype, affine, device):
    """Far from 0, where a sum of squares in 16 bits says nothing of the spread: only the result is rounded."""
    torch.manual_seed(0)
    ours, _ = norms(affine=affine)
    ours.to(device)
    x = (8 + 0.5 * torch.randn(64, 24, device=device)).to(dtype).requires_grad_()
    with dist.autocast(x.device, dtype):
        made = ours(x)
    rounded = [p.detach().to(dtype).double() for p in ours.parameters()] or [None, None]
    expected = F.layer_norm(x.detach().double(), (24,), *rounded, eps=1e-6)
    assert made.dtype == dtype
    torch.testing.assert_close(
        made.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps
    )
    made.float().square().sum().backward()
    assert x.grad.dtype == dtype and x.grad.isfinite().all()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().max() > 0 for p in ours.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_reach_a_norm_of_16_bits(dtype, monkeypatch):
    """What CUDA would widen; a CPU leaves it as it is."""
    seen, layer_norm = [], F.layer_norm

    def watched(x, shape, weight=None, bias=None, eps=1e-5):
        seen.append((x.dtype, weight.dtype, bias.dtype, torch.is_autocast_enabled("cpu")))
        return layer_norm(x, shape, weight, bias, eps)

    monkeypatch.setattr(F, "layer_norm", watched)
    ours, _ = norms()
    with dist.autocast(torch.device("cpu"), torch.bfloat16):
        ours(torch.randn(3, 24, dtype=dtype))
    assert seen == [(dtype, dtype, dtype, dtype == torch.float32)]
