"""--objective image: what is refused, what a changed flag does on resume, and images that are not finite."""

import pytest
import torch

from tests.test_image_objective import base, objective, train  # noqa: F401
from training.config import resolve
from training.objectives.decisions import score_loss
from training.objectives.image import ImageObjective
from training.objectives.reward import Reward
from util import dist
from util.checkpoint import load_checkpoint
from util.evaluation import reward
from util.evaluation.reward import principal_directions
from util.images.datasets import build_dataset

IMAGE = dict(preset="digits", objective="image", num_iter=4)


@pytest.mark.parametrize(
    "given, message",
    [
        (
            dict(IMAGE, learn="group", group="cosine"),
            "--group cosine leaves no place for --learn group: .*--group_base",
        ),
        (dict(IMAGE, learn="order,tau", order="halton"), "--order halton leaves no place for --learn order"),
        (dict(IMAGE, learn="tau", tau_schedule="linear"), "--tau_schedule linear .* leave one of them out$"),
        (dict(IMAGE, learn="cfg", cfg_schedule="constant"), "--cfg_schedule constant leaves no place for --learn cfg"),
        (dict(IMAGE, learn="profile", cfg_profile="interval"), "--cfg_profile interval leaves no place"),
        (dict(preset="digits", learn="group", group="cosine"), "--group cosine leaves no place for --learn group"),
        (dict(IMAGE, learn="tau", heads_from=3.0), "--heads_from 3.0 has no meaning for --objective image"),
        (dict(IMAGE, learn="tau", cfg_train_max=3.0), "--cfg_train_max 3.0 has no meaning for --objective image"),
        (dict(IMAGE, learn="tau", policy_passes=3), "--policy_passes 3 has no meaning for --objective image"),
        (dict(IMAGE, learn="tau", lambda_order=3.0), "--lambda_order 3.0 has no meaning for --objective image"),
        (dict(preset="digits", learn="tau", bank=32), "--bank 32 has no meaning for --objective token"),
        (
            dict(preset="digits", train_masks="visited", group="staged", train_num_iter="2,16"),
            "--train_num_iter 2,16: the group rule staged needs at least 3 steps",
        ),
    ],
)
def test_flags_that_would_not_be_obeyed_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        resolve(given)


def test_rules_of_what_is_not_learned_may_be_named():
    config = resolve(dict(IMAGE, learn="tau,cfg", order="halton", group="staged", mix_random=0.5))
    assert (config.sampling.order, config.sampling.group) == ("halton", "staged")
    masks = dict(preset="digits", train_masks="visited", group="cosine", order="halton", order_base="halton")
    assert resolve(dict(masks, learn="group")).sampling.group == "cosine"  # makes the masks


@pytest.mark.slow
def test_another_learning_rate_of_the_adaptive_part_counts_on_resume(base, tmp_path):  # noqa: F811
    assert train(tmp_path, base, "--epochs", 1, "--adaptive_lr", 0.1) == 0
    assert train(tmp_path, base, "--epochs", 2, "--adaptive_lr", 0.001) == 0
    groups = load_checkpoint(tmp_path)["optimizer"]["param_groups"]
    assert [group["lr_share"] for group in groups] == [1.0, 0.001]


def test_the_watch_counts_steps_and_begins_anew_with_another_learning_rate():
    made, state = objective()
    rollout = made.prepare(state, None, torch.arange(8), torch.arange(8))
    made.starts = {kind: value / 10 for kind, value in made.starts.items()}  # far above its start
    made.above = 5
    for _ in range(3):
        made(rollout, torch.tensor(24.0))  # micro-batches of one step
    assert made.above == 6
    memory = made.memory()
    for flags, expected in (({}, 6), ({"lr": 1e-3}, 0), ({"adaptive_lr": 0.01}, 0)):
        other, _ = objective(**flags)
        other.remember(memory)
        assert other.above == expected


def test_images_that_are_not_finite_leave_the_bank_alone_and_make_no_step(monkeypatch):
    made, state = objective()
    rollout = made.prepare(state, None, torch.arange(8), torch.arange(8))
    before, images = made.bank.rows.clone(), ImageObjective.images

    def broken(self, *args):
        result = images(self, *args)
        return torch.cat([result[:3], result[3:4] * float("nan"), result[4:]])

    monkeypatch.setattr(ImageObjective, "images", broken)
    terms = made(rollout, torch.tensor(8.0))
    assert not terms["loss"].isfinite()  # which `training.step.training_step` skips
    assert made.bank.rows.isfinite().all() and made.bank.next == 7
    assert torch.equal(made.bank.rows[7:], before[7:]) and not torch.equal(made.bank.rows[:7], before[:7])
    made, state = objective()
    with pytest.raises(FloatingPointError, match="of the first 64 images are not finite: use --dtype fp32"):
        made.prepare(state, None, torch.arange(8), torch.arange(8))


def test_what_order_and_group_heads_say_is_logged():
    made, state = objective(learn="order,group,tau", num_iter=4)
    terms = made(made.prepare(state, None, torch.arange(8), torch.arange(8)), torch.tensor(8.0))
    assert terms["order_mean"] == 0 == terms["order_std"]  # untrained
    assert 1 < terms["group_mean"] < made.model.config.seq_len and terms["group_std"] > 0
    assert not {"group_mean", "order_std"} & objective_terms("tau").keys()


def objective_terms(learn):
    made, state = objective(learn=learn)
    return made(made.prepare(state, None, torch.arange(8), torch.arange(8)), torch.tensor(8.0))


def test_the_score_is_over_all_processes(monkeypatch):
    """Two of them, with 3 and 5 costs, against one with all: the sums that they share are given."""
    cost, theta = torch.tensor([1.0, 4.0, 2.0, 8.0, 5.0, 7.0, 1.0, 1.0]), torch.ones(8, requires_grad=True)
    (whole,) = torch.autograd.grad(score_loss(cost, theta), theta)
    mean = cost.mean()
    shared = [torch.tensor([8.0, cost.sum()]), (cost - mean).square().sum()]
    parts = []
    for part in (slice(0, 3), slice(3, 8)):
        sums = iter(shared)
        monkeypatch.setattr(dist, "all_sum", lambda tensor, sums=sums: next(sums))
        parts.append(torch.autograd.grad(score_loss(cost[part], theta[part]), theta)[0])
    torch.testing.assert_close(parts[0] + parts[1], whole)


def test_directions_of_many_features_stay_those_of_the_bank(monkeypatch):
    monkeypatch.setattr(reward, "principal_directions", lambda rows: principal_directions(rows, 5))
    real = build_dataset("digits")
    made = Reward(real, ("digits", "pixels"), "cpu")
    kept = made.kept_directions()
    assert {kind: tuple(rows.shape) for kind, rows in kept.items()} == {"digits": (64, 5), "pixels": (64, 5)}
    turned = {kind: -rows.flip(1) for kind, rows in kept.items()}
    again = Reward(real, ("digits", "pixels"), "cpu", turned)
    images = torch.rand(7, 1, 8, 8) * 2 - 1
    ours, theirs = made.split(made.features(images)), again.split(again.features(images))
    for kind in ours:
        torch.testing.assert_close(theirs[kind], -ours[kind].flip(1), rtol=1e-4, atol=1e-4)
