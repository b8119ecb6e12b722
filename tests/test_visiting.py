"""Training masks that a schedule visits: the same states as sampling, for hand-made and for learned rules."""

import itertools
import math

import pytest
import torch

from heads.orders import ORDERS
from heads.policy import PolicyHeads, build_rules
from heads.schedules import GROUPS, MIN_STEPS
from heads.step import StepState
from models.diffloss import DiffLoss
from tests.helpers import tiny_mar
from tests.helpers_generate import SCHEDULE
from tests.helpers_training import terms_of
from training.config import resolve
from training.objectives.draws import DrawSettings, training_draws
from training.objectives.head_losses import HeadLossConfig
from training.objectives.token import TokenObjective
from training.objectives.visiting import MaskConfig, Visits, make_visits

LENGTH = 64


def draws_of(samples=range(12), num_iter=(1, 9), seq_len=LENGTH, **options):
    usual = dict(seq_len=seq_len, mask_ratio_min=0.7, label_drop_prob=0.0, num_iter=num_iter, cfg_max=3.0)
    head = DiffLoss(1, 1, depth=1, width=2, repeats=2)
    return training_draws(3, 5, list(samples), head, DrawSettings(**usual, every_token=True, **options))


def random_heads(dim=16, learn=("order", "group")):
    heads = PolicyHeads(dim, learn)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in heads.parameters():
            p.copy_(torch.randn(p.shape, generator=g))
    return heads


def trajectory(rules, draws, i, encode=None):
    """(mask, next group) before each step of image i, as generate() would meet them, one image at a time."""
    mask, num_iter, states = torch.ones(1, draws.mask.shape[1], dtype=torch.bool), int(draws.policy.num_iter[i]), []
    for step in range(num_iter):
        if not mask.any():
            break
        n = mask.sum(1).float()
        z = encode(i, mask) if encode else None
        start = torch.full((1,), float(mask.shape[1]))
        state = StepState(
            step, num_iter, mask, n, start, draws.policy.gumbel[i : i + 1], z, torch.zeros(1, dtype=torch.long)
        )
        select = rules(state).select
        states.append((mask[0], select[0]))
        mask = mask & ~select
    return states


def visits_of(config, heads):
    return make_visits(config.masks, config.sampling, heads)


def no_pass(mask, num_visible):
    raise AssertionError("hand-made rules need no network")


@pytest.mark.parametrize("order, group", itertools.product(ORDERS, [name for name in GROUPS if name != "scale"]))
def test_visited_masks_are_the_states_of_the_schedule(order, group):
    draws = draws_of(num_iter=(MIN_STEPS.get(group, 1), 9))
    schedule = SCHEDULE if group == "schedule" else None
    visit = Visits(MaskConfig(train_masks="visited", train_targets="next"), None, order, group, schedule=schedule)
    found = visit(draws, no_pass)
    targets = torch.zeros(found.mask.numel(), dtype=torch.bool)
    targets[found.tokens.rows] = True
    rules = build_rules("baseline", order=order, group=group, schedule=schedule)
    for i, step in enumerate(found.policy.step.tolist()):
        assert step == int(draws.policy.place[i] * draws.policy.num_iter[i])
        mask, following = trajectory(rules, draws, i)[step]
        assert torch.equal(found.mask[i], mask)
        assert torch.equal(targets.view_as(found.mask)[i], following)
    assert found.num_visible == (~found.mask).sum(1).tolist() and found.tokens.num_others == 0
    assert len(set(found.num_visible)) > 3


@pytest.mark.parametrize("targets", ["masked", "next"])
@pytest.mark.parametrize("num_iter", [(1, 1), (20, 40)])
def test_every_image_keeps_a_target_even_when_there_are_more_steps_than_tokens(num_iter, targets):
    draws = draws_of(range(40), num_iter, seq_len=16)
    found = Visits(MaskConfig(train_masks="visited", train_targets=targets), None, "halton", "cosine")(draws, no_pass)
    assert set((found.tokens.rows // 16).tolist()) == set(range(40)) and found.mask.flatten()[found.tokens.rows].all()
    for i, step in enumerate(found.policy.step.tolist()):
        assert torch.equal(found.mask[i], trajectory(build_rules("baseline", order="halton"), draws, i)[step][0])


def with_network(passes, learn=("order", "group"), targets="next", masks="policy", order_noise=0.3):
    mar, heads, draws = tiny_mar(), random_heads(learn=learn), draws_of()
    tokens = torch.rand(12, LENGTH, 1, generator=torch.Generator().manual_seed(3)) * 2 - 1
    labels = torch.arange(12) % 3
    calls = []

    def encode(mask, num_visible):
        calls.append(num_visible)
        with torch.no_grad():
            return mar.encode_decode(tokens, mask, labels, num_visible)

    config = MaskConfig(train_masks=masks, train_targets=targets, policy_passes=passes)
    found = Visits(config, heads, None, None, order_noise=order_noise)(draws, encode)
    return found, draws, heads, calls, lambda i, mask: mar.encode_decode(tokens[i : i + 1], mask, labels[i : i + 1])


def test_with_a_pass_for_every_plan_the_learned_states_are_exact():
    found, draws, heads, calls, encode = with_network(passes=9)
    assert len(calls) == 9
    for i, step in enumerate(found.policy.step.tolist()):
        cfg = float(draws.policy.cfg[i])
        rules = build_rules("policy", heads, cfg=cfg, order_noise=0.3)
        with torch.no_grad():
            mask, following = trajectory(rules, draws, i, encode)[step]
        assert torch.equal(found.mask[i], mask)
        here = (
            found.tokens.rows // LENGTH == i
        )  # the order's losses compare all masked tokens, the backbone learns the next
        positions, is_target = (
            found.tokens.rows[here] % LENGTH,
            (torch.arange(len(found.tokens.rows)) < found.tokens.num_targets)[here],
        )
        assert torch.equal(positions.sort().values, mask.nonzero().squeeze(1))
        assert torch.equal(is_target, following[positions])


def test_one_pass_ranks_everything_on_the_empty_canvas():
    found, draws, heads, calls, encode = with_network(passes=1)
    assert calls == [[0] * 12]
    stale = [encode(i, torch.ones(1, LENGTH, dtype=torch.bool)).detach() for i in range(12)]
    for i, step in enumerate(found.policy.step.tolist()):
        rules = build_rules("policy", heads, cfg=float(draws.policy.cfg[i]), order_noise=0.3)
        assert torch.equal(found.mask[i], trajectory(rules, draws, i, lambda i, mask: stale[i])[step][0])


def test_heads_of_another_kind_need_no_pass_and_no_further_rows():
    found, _, _, calls, _ = with_network(passes=2, learn=("tau",))
    assert not calls and len(found.tokens.rows) == found.tokens.num_targets
    assert len(found.tokens.rows) < found.mask.sum()


def test_a_batch_in_parts_meets_the_same_masks():
    whole = Visits(MaskConfig(train_masks="visited"), None, "random", None)(draws_of(), no_pass)
    halves = [Visits(MaskConfig(train_masks="visited"), None, None, None)(draws_of(s), no_pass) for s in
              (range(6), range(6, 12))]  # fmt: skip
    assert torch.equal(whole.mask, torch.cat([h.mask for h in halves]))
    for name, value in whole.tokens.draws.items():
        assert torch.equal(value, torch.cat([h.tokens.draws[name] for h in halves], dim=1))


def test_a_tokens_noise_does_not_depend_on_the_mask():
    draws = draws_of()
    found = Visits(MaskConfig(train_masks="visited"), None, "raster", None)(draws, no_pass)
    for name, value in draws.tokens.draws.items():
        assert torch.equal(found.tokens.draws[name], value[:, found.tokens.rows])
    assert torch.equal(found.tokens.rows, found.mask.flatten().nonzero().squeeze(1))


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_mix_keeps_a_share_of_the_published_masks(share):
    draws = draws_of(range(200))
    found = Visits(MaskConfig(train_masks="mix", mix_random=share, train_targets="next"), None, "halton", None)(
        draws, no_pass
    )
    kept = draws.policy.mix < share
    assert kept.float().mean() == pytest.approx(share, abs=0.12)
    assert torch.equal(found.mask[kept], draws.mask[kept])
    visited = Visits(MaskConfig(train_masks="visited", train_targets="next"), None, "halton", None)(draws, no_pass)
    assert torch.equal(found.mask[~kept], visited.mask[~kept])
    targets = (
        torch.zeros(found.mask.numel(), dtype=torch.bool).index_fill(0, found.tokens.rows, True).view_as(found.mask)
    )
    assert torch.equal(targets[kept], draws.mask[kept])  # of a random mask all masked tokens are learned


@pytest.mark.parametrize("masks, last", [("visited", 0.0), ("mix", 0.4)])
@pytest.mark.parametrize("epoch, left", [(0, 1.0), (1, 0.75), (3, 0.25), (4, 0.0), (9, 0.0)])
def test_random_masks_fade(masks, last, epoch, left):
    """From all images at the start to the share that --train_masks has without --mix_anneal, after four epochs."""
    draws = draws_of(range(100))
    config = MaskConfig(train_masks=masks, mix_random=0.4, mix_anneal=4)
    share = config.random_share(epoch)
    assert share == pytest.approx(max(last, last + (1 - last) * left))
    found = Visits(config, None, "halton", None)(draws, no_pass, epoch=epoch)
    visited = Visits(MaskConfig(train_masks="visited"), None, "halton", None)(draws, no_pass)
    random = (draws.policy.mix < share).unsqueeze(1)
    assert torch.equal(found.mask, torch.where(random, draws.mask, visited.mask))


def test_number_of_steps_is_log_uniform():
    draws = draws_of(range(4000), (2, 16), seq_len=4)
    for low, high in ((2, 3), (4, 7), (8, 16)):
        share = ((draws.policy.num_iter >= low) & (draws.policy.num_iter <= high)).float().mean().item()
        assert share == pytest.approx(math.log((high + 1) / low) / math.log(17 / 2), abs=0.03)
    assert draws.policy.num_iter.min() == 2 and draws.policy.num_iter.max() == 16


def test_the_backbone_learns_the_targets_only():
    """Rows that are there for the heads alone do not change the diffusion loss."""
    mar, tokens = tiny_mar(), torch.rand(12, LENGTH, 1, generator=torch.Generator().manual_seed(3)) * 2 - 1
    draws, labels = draws_of(), torch.arange(12) % 3
    config = MaskConfig(train_masks="visited", train_targets="next")
    losses, gradients = [], []
    for heads in (None, random_heads(learn=("order",))):
        found = Visits(config, heads, "halton", None)(draws, no_pass)
        assert (found.tokens.num_others > 0) == (heads is not None)
        weights = HeadLossConfig(lambda_order=0, lambda_size=0, lambda_budget=0, lambda_cfg=0)
        losses.append(
            terms_of(TokenObjective(mar, heads, weights), tokens, labels, found, float(found.tokens.num_targets))[
                "loss"
            ]
        )
        gradients.append(torch.autograd.grad(losses[-1], list(mar.parameters()), allow_unused=True))
    torch.testing.assert_close(losses[0], losses[1])
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(train_targets="next"), "train_targets next needs --train_masks"),
        (
            dict(train_masks="visited", learn="order", order="learned"),
            "follows hand-made rules.*--order learned",
        ),
        (dict(train_masks="policy", order="learned"), "learned order head"),
        (dict(train_masks="visited", train_num_iter="4"), "train_num_iter must be lo,hi"),
    ],
)
def test_contradictions_are_one_line(given, message):
    with pytest.raises(ValueError, match=message):
        resolve(dict(preset="digits", **given))


@pytest.mark.parametrize(
    "given, names",
    [
        (dict(train_masks="visited"), ("random", "cosine")),
        (dict(train_masks="visited", order="halton", group="exp"), ("halton", "exp")),
        (dict(train_masks="visited", learn="order,group"), ("random", "cosine")),
        (dict(train_masks="policy", learn="order"), ("learned", "cosine")),
        (dict(train_masks="mix", learn="order,group", group="power"), ("learned", "power")),
        (dict(train_masks="policy", order="raster"), ("raster", "cosine")),
    ],
)
def test_which_rules_are_visited(given, names):
    values = resolve(dict(preset="digits", **given))
    heads = PolicyHeads(8, given["learn"].split(",")) if "learn" in given else None
    visit = visits_of(values, heads)
    assert tuple(visit.names.values()) == names and visit.num_passes == int("learned" in names)
    assert visits_of(resolve(dict(preset="digits")), None) is None


@pytest.mark.parametrize("labels", [[0, 2, 1, 0, -1, 2, 2], [1] * 7])
def test_the_empty_canvas_is_scored_once_a_class(monkeypatch, labels):
    mar, labels = tiny_mar(), torch.tensor(labels)
    tokens, mask = torch.randn(7, LENGTH, 1), torch.ones(7, LENGTH, dtype=torch.bool)
    expected = mar.encode_decode(tokens, mask, labels)
    encode_decode, sizes = mar.encode_decode, []
    monkeypatch.setattr(mar, "encode_decode", lambda *args: sizes.append(len(args[0])) or encode_decode(*args))
    torch.testing.assert_close(TokenObjective(mar)._score(tokens, labels, mask, [0] * 7), expected)
    mask[:, 0] = False
    torch.testing.assert_close(
        TokenObjective(mar)._score(tokens, labels, mask, [1] * 7), encode_decode(tokens, mask, labels)
    )
    assert sizes == [len(labels.unique()), 7]
