"""Images of one label and one noise, whose orders and group sizes are compared with each other."""

import pytest
import torch

from models.diffloss import DiffLoss
from tests.helpers_ids import tiny_ids
from tests.test_image_objective import base, objective, train  # noqa: F401
from training.config import resolve
from training.objectives.decisions import Decisions, noise_by_place, score_loss
from util.checkpoint import load_checkpoint

IMAGE = dict(preset="digits", objective="image", num_iter=4)
LABELS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])


def sampler_of(kind: str):
    """(what draws tokens, the dimension of its noise that tokens are along)."""
    if kind == "ids":
        return tiny_ids().token_head.sampler(), 0
    return DiffLoss(3, 8, 1, 8).sampler(num_steps="4:2", solver="ddpm"), 1


@pytest.mark.parametrize("kind", ["latents", "ids"])
def test_noise_is_of_a_seed_and_a_place_alone(kind):
    sampler, dim = sampler_of(kind)
    noise = noise_by_place(sampler, [7, 7, 8], num_iter=3)
    rows = torch.tensor([[0, 2], [0, 5], [1, 2], [1, 9], [2, 2], [2, 5]])
    first, of_one = noise(0, rows), noise(0, rows[3:5])
    assert first.shape[dim] == 6
    twin, other, place = (first.select(dim, i) for i in (2, 4, 1))
    assert first.select(dim, 0).equal(twin) and not twin.equal(other) and not twin.equal(place)
    assert first.narrow(dim, 3, 2).equal(of_one)
    if kind == "latents":
        assert [len(noise(step, rows)) for step in range(3)] == [5, 4, 3]  # T + 1, of a T that falls
        assert abs(float(noise(0, torch.cartesian_prod(torch.arange(3), torch.arange(300))).std()) - 1) < 0.05


def test_the_score_of_twins_is_that_of_their_difference():
    """Of a choice between two costs, with what an image costs besides: E[slope] = (1 − 1/2) P (1 − P)(c₁ − c₀)."""
    g = torch.Generator().manual_seed(0)
    theta, besides = torch.tensor(0.3, requires_grad=True), 100 * torch.randn(100000, generator=g).repeat_interleave(2)
    p = torch.sigmoid(theta)
    first = torch.rand(200000, generator=g) < p.detach()
    cost = torch.where(first, 5.0, 2.0).double() + besides
    log_prob = torch.where(first, p.log(), (1 - p).log()).double()
    (slope,) = torch.autograd.grad(score_loss(cost, log_prob, 2) / len(cost), theta)
    pairs = cost.view(-1, 2)
    deviation = (pairs - pairs.mean(dim=1, keepdim=True)).square().mean().sqrt()
    assert slope.item() == pytest.approx((p * (1 - p) * 3 / 2 / deviation).item(), rel=0.03)
    (odd,) = torch.autograd.grad(score_loss(torch.tensor([1.0, 3.0, 50.0]), theta * torch.arange(3.0), 2), theta)
    assert odd.item() == pytest.approx(1 / (2 / 3) ** 0.5)  # the third has no twin, and counts nothing


def test_twins_have_a_label_a_noise_and_decisions_of_their_own():
    made, state = objective(learn="order,group,tau", twins=3)
    rollout = made.prepare(state, None, LABELS, torch.arange(8))
    assert rollout.labels.tolist() == [3, 3, 3, 1, 1, 1, 2, 2]
    assert rollout.noise == [rollout.seeds[i] for i in (0, 0, 0, 3, 3, 3, 6, 6)] and len(set(rollout.seeds)) == 8
    alone, state = objective(learn="order,group,tau")
    assert alone.prepare(state, None, LABELS, torch.arange(8)).noise is None


def test_twins_that_decide_alike_are_the_same_image():
    made, state = objective(learn="order,group,tau", twins=2)
    rollout = made.prepare(state, None, LABELS, torch.arange(8))
    with torch.no_grad():
        images = made.images(rollout, Decisions(rollout, "cpu"))
        assert not any(a.allclose(b, atol=1e-3) for a, b in zip(images[::2], images[1::2]))
        rollout.seeds[1::2] = rollout.seeds[::2]  # the same random order, and exploration
        images = made.images(rollout, Decisions(rollout, "cpu"))
    torch.testing.assert_close(images[::2], images[1::2], rtol=1e-4, atol=1e-4)


def test_what_order_and_group_decide_has_a_learning_rate_of_its_own():
    shares = {}
    for flags in ({}, {"decision_lr": 0.5}):
        made, _ = objective(learn="order,group,tau,profile", **flags)
        names = {id(parameter): name for name, parameter in made.heads.named_parameters()}
        for group in made.optimizer().param_groups:
            for parameter in group["params"]:
                shares.setdefault(names.pop(id(parameter)), []).append(group["lr_share"])
        assert not names
    changed = {name for name, (before, after) in shares.items() if before != after}
    assert changed and changed == {
        name for name in shares if name.split(".")[1] in ("order", "group") and not name.endswith(".values")
    }
    assert all(shares[name] == [0.1, 0.5] for name in changed)


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(IMAGE, learn="tau", twins=2), "--twins is of the heads order and group: name one of them"),
        (dict(IMAGE, learn="tau", decision_lr=0.1), "--decision_lr is of the heads order and group"),
        (
            dict(IMAGE, learn="group", adaptive=False, decision_lr=0.1),
            "--decision_lr has no meaning with --no-adaptive",
        ),
        (dict(IMAGE, learn="group", batch_size=3, twins=4), "--twins 4 needs a --batch_size of as many images"),
        (dict(preset="digits", learn="group", twins=2), "--twins 2 has no meaning for --objective token"),
    ],
)
def test_flags_that_would_not_be_obeyed_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        resolve(given)


@pytest.mark.slow
def test_a_run_with_twins_goes_on(base, tmp_path):  # noqa: F811
    flags = ["--learn", "order,group,tau", "--twins", 2, "--decision_lr", 0.2]
    for epochs in (1, 2):
        assert train(tmp_path, base, *flags, "--epochs", epochs) == 0
    stored = load_checkpoint(tmp_path)
    assert [group["lr_share"] for group in stored["optimizer"]["param_groups"]] == [1.0, 0.1, 0.2]
    assert stored["args"]["twins"] == 2 and stored["step"] == 4
