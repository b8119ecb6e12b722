"""What trains and how fast: which weights decay, the learning rate, averaged weights."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers import tiny_mar
from tests.helpers_training import CHANNELS
from training.optim import EMA, CosineAdam, lr_at, make_optimizer


@pytest.fixture
def mar():
    return tiny_mar(img_size=4, vae_embed_dim=CHANNELS)  # L = 16


# ------------------------------------------------------------------------------------------------ optimizer and rate


def test_cosine_adam_is_adam_of_the_coefficients():
    """Against autograd through p = Σ q_k s_k c_k, over some steps, with a gradient that depends on p."""
    n, steps = 16, 7
    i = torch.arange(n, dtype=torch.float64)
    rows = [torch.cos(torch.pi * k * (i + 0.5) / n) * (3 / (1 + k / 2) if k else 1.0) for k in range(n)]
    basis = torch.stack([row / torch.cos(torch.pi * k * (i + 0.5) / n).norm() for k, row in enumerate(rows)])
    goal = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q, p = (
        torch.zeros(n, dtype=torch.float64, requires_grad=True),
        torch.nn.Parameter(torch.zeros(n, dtype=torch.float64)),
    )
    plain = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    other = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    reference = torch.optim.Adam([q, other], lr=0.1, betas=(0.5, 0.98))
    optimizer = CosineAdam([{"params": [p], "cosines": True}, {"params": [plain]}], lr=0.1, betas=(0.5, 0.98))
    for _ in range(steps):
        for this, values, free in ((reference, q @ basis, other), (optimizer, p, plain)):
            this.zero_grad()
            ((values - goal).square().sum() + free.square().sum()).backward()
            this.step()
    torch.testing.assert_close(p.detach(), (q @ basis).detach())
    assert torch.equal(plain, other) and p.abs().min() > 0


def test_cosine_adam_goes_on_from_its_state():
    p, again = (torch.nn.Parameter(torch.zeros(8)) for _ in range(2))
    first, second = (CosineAdam([{"params": [x], "cosines": True}], lr=0.1) for x in (p, again))

    def move(optimizer, x, step):
        x.grad = torch.linspace(-1, 2, 8) * (step + 1)
        optimizer.step()

    for step in range(4):
        move(first, p, step)
        if step == 1:
            second.load_state_dict(copy.deepcopy(first.state_dict()))
            again.data.copy_(p.data)
        elif step > 1:
            move(second, again, step)
    assert torch.equal(p, again)


def test_what_decays(mar):
    mar.fake_latent.requires_grad_(False)
    optimizer = make_optimizer(mar, mar.token_head, lr=0.5, weight_decay=0.02)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(decay)
    spared = set()
    for name, module in mar.named_modules():
        if isinstance(module, nn.LayerNorm) or name.startswith("diffloss"):
            spared |= {id(p) for p in module.parameters()}
        if getattr(module, "bias", None) is not None:
            spared.add(id(module.bias))
    expected = {id(p): 0.0 if id(p) in spared else 0.02 for p in mar.parameters() if p is not mar.fake_latent}
    assert decay == expected and set(decay.values()) == {0.0, 0.02}
    assert decay[id(mar.mask_token)] == decay[id(mar.class_emb.weight)] == 0.02
    assert all(group["lr"] == 0.5 and group["betas"] == (0.9, 0.95) for group in optimizer.param_groups)
    assert isinstance(optimizer, torch.optim.AdamW)


def test_learning_rate():
    def at(progress, schedule="cosine", warmup=10.0, epochs=110.0):
        return lr_at(progress, lr=2.0, min_lr=0.5, schedule=schedule, warmup_epochs=warmup, epochs=epochs)

    for schedule in ("cosine", "constant"):
        assert at(0, schedule) == 0 and at(2.5, schedule) == 0.5 and at(10, schedule) == 2.0
        assert at(0, schedule, warmup=0) == 2.0
        assert at(10 - 1e-9, schedule) == pytest.approx(2.0)
    assert at(110) == pytest.approx(0.5) and at(500) == pytest.approx(0.5)
    assert at(60) == pytest.approx(1.25) and at(35) == pytest.approx(0.5 + 1.5 * (1 + math.sqrt(0.5)) / 2)
    assert (np.diff([at(p) for p in np.linspace(10, 110, 50)]) < 0).all()
    assert {at(p, "constant") for p in (10, 50, 110, 500)} == {2.0}
    assert at(5, warmup=5.0, epochs=5.0) == 2.0  # nothing but warm-up


# ----------------------------------------------------------------------------------------------- averaged weights


class Two(nn.Module):
    """Parameters a and b of one shape, registered in either order."""

    def __init__(self, a=0.0, b=0.0, order="ab"):
        super().__init__()
        for name in order:
            self.register_parameter(name, nn.Parameter(torch.full((2,), dict(a=a, b=b)[name])))


@pytest.mark.parametrize("rate", [0.9999, 0.5])
def test_ema_warms_up_and_then_keeps_its_rate(rate):
    """What is left of the start after n steps is Π min(rate, (1+s)/(10+s)); without the cap (n+1)!·10!/(n+10)!."""
    model = Two()
    ema = EMA(model, rate)
    with torch.no_grad():
        model.a.fill_(1.0)
    left = 1.0
    for step in range(1, 31):
        ema.update(model, step)
        left *= min(rate, (1 + step) / (10 + step))
        np.testing.assert_allclose(ema.weights["a"], 1 - left, rtol=1e-5)
        if rate > 0.99:
            closed = math.factorial(step + 1) * math.factorial(10) / math.factorial(step + 10)
            assert left == pytest.approx(closed, rel=1e-9)
    assert (ema.weights["b"] == 0).all()


def test_ema_follows_a_moving_model():
    model, values = Two(), [3.0, -1.0, 2.0, 0.5]
    ema, expected = EMA(model, 0.3), 0.0
    for step, value in enumerate(values, start=1):
        with torch.no_grad():
            model.a.fill_(value)
        ema.update(model, step)
        rate = min(0.3, (1 + step) / (10 + step))
        expected = rate * expected + (1 - rate) * value
    np.testing.assert_allclose(ema.weights["a"], expected, rtol=1e-6)


def test_ema_is_a_copy():
    model = Two(a=1.0)
    ema = EMA(model, 0.9)
    with torch.no_grad():
        model.a.fill_(5.0)
    assert (ema.weights["a"] == 1).all()
    ema.update(model, 1)
    assert (model.a == 5).all() and not ema.weights["a"].requires_grad


def test_ema_matches_by_name():
    ema = EMA(Two(a=1.0, b=2.0), 0.9)
    ema.load({"b": torch.full((2,), 20.0), "a": torch.full((2,), 10.0)})
    assert (ema.weights["a"] == 10).all() and (ema.weights["b"] == 20).all()
    turned = Two(a=0.0, b=0.0, order="ba")
    with ema.applied_to(turned):
        assert (turned.a == 10).all() and (turned.b == 20).all()
    ema = EMA(Two(a=1.0, b=2.0), 0.9)
    ema.update(Two(a=1.0, b=2.0, order="ba"), 1000)
    assert (ema.weights["a"] == 1).all() and (ema.weights["b"] == 2).all()


def test_ema_is_put_in_and_taken_out_again(mar):
    ema = EMA(mar, 0.9)
    with torch.no_grad():
        for p in mar.parameters():
            p.mul_(1.1).add_(0.01)
    own = {name: p.clone() for name, p in mar.state_dict().items()}
    identity = [id(p) for p in mar.parameters()]
    for error in (None, RuntimeError, KeyboardInterrupt):
        with pytest.raises(error) if error else torch.no_grad():
            with ema.applied_to(mar):
                inside = dict(mar.named_parameters())
                assert all(torch.equal(inside[name], value) for name, value in ema.weights.items())
                if error:
                    raise error
        assert all(torch.equal(own[name], value) for name, value in mar.state_dict().items())
        assert [id(p) for p in mar.parameters()] == identity and all(p.requires_grad for p in mar.parameters())


@pytest.mark.parametrize(
    "shapes, odd",
    [
        (dict(a=2), "b"),
        (dict(a=2, b=2, c=2), "c"),
        (dict(b=2, z=2), "a"),
        (dict(a=2, b=3), "b"),
        (dict(a=2, b=1), "b"),  # would broadcast
        ({}, "a"),
    ],
)
def test_ema_refuses_other_names_and_shapes(shapes, odd):
    ema = EMA(Two(a=1.0, b=2.0), 0.9)
    with pytest.raises(ValueError, match=rf"\b{odd}\b"):
        ema.load({name: torch.zeros(size) for name, size in shapes.items()})
    assert (ema.weights["a"] == 1).all() and (ema.weights["b"] == 2).all()
