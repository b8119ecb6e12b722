"""--objective image: what is logged and kept, runs that stop and go on, order and group by the score function."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

import main_mar
from models.tokenizers import build_tokenizer
from tests.helpers import tiny_mar, torchrun, untrained
from training.config import resolve
from training.objectives.decisions import Decisions, score_loss
from training.objectives.image import PATIENCE, ImageObjective, Rollout, centred, gathered
from training.optim import TailAverage
from util import dist
from util.checkpoint import load_checkpoint, save_checkpoint
from util.images.datasets import build_dataset

pytestmark = pytest.mark.on_cpu("runs are compared bit for bit, which a GPU promises with --deterministic alone")

# --------------------------------------------------------------------------------------------------------- the runs

TRAIN = """
    --preset digits --patch_size 2 --diffloss_w 16 --diffloss_d 1 --buffer_size 2 --num_iter 2 --num_sampling_steps 2
    --cfg 1.5 --solver dpmpp_sde --batch_size 600 --bank 700 --eval_freq 100 --save_last_freq 1
    --objective image
"""
TRAIN = [*TRAIN.split(), "--learn", "tau,cfg,profile"]


def train(folder, base, *flags):
    where = ["--init_from", base, "--output_dir", folder, "--resume", folder]
    return main_mar.main([*map(str, (*TRAIN, *where, *flags))])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint whose averaged weights are not its weights."""
    folder = untrained(tmp_path_factory.mktemp("base"), "--patch_size", "2")
    content = load_checkpoint(folder)
    content["model_ema"] = {k: v + 0.01 * torch.randn_like(v) for k, v in content["model_ema"].items()}
    save_checkpoint(folder, content)
    return folder


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_run_that_stops_and_goes_on_is_the_run_that_never_stopped(base, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(whole, base, "--epochs", 2, "--save_last_freq", 1, "--keep_last", 3) == 0
    shutil.copytree(whole, parts)
    for name in ("checkpoint-last.pth", "checkpoints.sha256"):
        (parts / name).unlink()
    first = min(parts.glob("checkpoint-*.pth"))  # after one epoch
    assert load_checkpoint(first)["epoch"] == 0
    first.rename(parts / "checkpoint-last.pth")
    for other in parts.glob("checkpoint-0*.pth"):
        other.unlink()
    assert train(parts, base, "--epochs", 2) == 0
    a, b = load_checkpoint(whole), load_checkpoint(parts)
    for key in ("heads", "heads_ema", "model"):
        assert all(torch.equal(a[key][name], b[key][name]) for name in a[key])
    assert torch.equal(a["objective"]["bank"], b["objective"]["bank"])
    assert a["objective"]["starts"] == b["objective"]["starts"] and lines(whole) == lines(parts)
    start, stored = load_checkpoint(base)["model_ema"], a["model"]
    assert all(torch.equal(stored[name], value) for name, value in start.items())  # averaged weights, and untouched
    assert any(value.abs().max() > 0 for name, value in a["heads"].items() if name.endswith("values"))
    row = lines(whole)[-1]
    assert {
        "reward",
        "distance_digits",
        "distance_pixels",
        "tau_mean",
        "w_std",
        "profile_mean",
        "grad_norm",
    } <= row.keys()


@pytest.mark.slow
def test_without_the_adaptive_part_it_stays_as_it_is_and_a_next_stage_starts_from_the_average(base, tmp_path):
    assert train(tmp_path / "one", base, "--epochs", 1, "--no-adaptive") == 0
    content = load_checkpoint(tmp_path / "one")
    assert lines(tmp_path / "one")[0]["lr"] == 1e-2
    assert content["heads"]["heads.tau.out.weight"].abs().max() == 0 < content["heads"]["heads.tau.values"].abs().max()
    names = [name for name in content["heads"] if name.endswith("values")]
    content["heads_ema"] = {name: value + name.endswith("values") for name, value in content["heads_ema"].items()}
    save_checkpoint(tmp_path / "one", content)
    (tmp_path / "one" / "checkpoints.sha256").unlink()
    assert train(tmp_path / "two", tmp_path / "one", "--epochs", 1, "--lr", 1e-9) == 0
    after = load_checkpoint(tmp_path / "two")["heads"]
    for name in names:
        torch.testing.assert_close(after[name], content["heads_ema"][name], atol=1e-6, rtol=0)


def test_a_step_of_micro_batches_and_another_bank_or_reward_which_are_refused(base, tmp_path):
    """What is logged is the mean over the halves."""
    assert train(tmp_path / "halves", base, "--epochs", 1, "--batch_size", 300, "--accum_iter", 2) == 0
    assert 0.5 < lines(tmp_path / "halves")[0]["reward"] < 1.5
    with pytest.raises(ValueError, match="a bank of 700 images, not of 600"):
        train(tmp_path / "halves", base, "--epochs", 2, "--bank", 600)
    with pytest.raises(ValueError, match="reward of digits,pixels, --reward has pixels,digits: --init_from starts"):
        train(tmp_path / "halves", base, "--epochs", 2, "--reward", "pixels,digits")


def objective(bank=64, **flags):
    """An objective of digits with a tiny MAR, and a state for it."""
    given = dict(
        preset="digits", objective="image", learn="tau,cfg,profile", num_iter=2, num_sampling_steps=2, bank=bank
    )
    config = resolve(given | dict(solver="dpmpp_sde", cfg=1.5) | flags)
    data = build_dataset("digits")
    mar = tiny_mar(class_num=10)
    made = ImageObjective.build(mar, config.build_heads(mar.width), config.for_objective(False, lambda: data))
    tokenizer = build_tokenizer("pixel", channels=1)
    state = SimpleNamespace(
        seed=1, step=0, device=torch.device("cpu"), dtype=torch.float32, tokenizer=tokenizer, num_steps=10
    )
    return made.eval(), state


def test_the_bank_is_filled_by_the_policy_before_the_first_step_with_labels_of_the_data():
    made, state = objective()
    labels, indices = torch.arange(8), torch.arange(8)
    first = made.prepare(state, None, labels, indices)
    assert made.bank.is_full and first.num_targets == 8 and first.num_iter == 2
    assert set(made.starts) == {"digits", "pixels"} and min(made.starts.values()) > 0
    before = made.bank.rows.clone()
    again, state = objective()
    again.prepare(state, None, labels[:4], indices[:4])  # the batch size plays no part
    torch.testing.assert_close(again.bank.rows, before, rtol=1e-4, atol=1e-4)
    made.train()
    assert not any(module.training for module in made.model.modules())
    terms = made(first, torch.tensor(8.0))
    assert torch.equal(made.bank.rows[8:], before[8:]) and not torch.equal(made.bank.rows[:8], before[:8])
    terms["loss"].backward()
    assert all(p.grad is not None for p in made.heads.parameters())
    assert terms["tau_mean"].item() == 1.0 and 0.5 < terms["reward"] < 2
    seeds = made.prepare(state, None, labels, indices).seeds
    state.step = 1
    assert not set(seeds) & set(made.prepare(state, None, labels, indices).seeds) and len(set(seeds)) == 8


def test_the_loss_has_the_gradient_of_the_banks_distance():
    """With the whole bank in the batch: the weighted sum of F over their starts, by finite differences in τ."""
    made, state = objective(bank=48)
    labels = torch.arange(48) % 10
    rollout = made.prepare(state, None, labels, torch.arange(48))
    made.heads.heads["tau"].values.data.fill_(0.1)
    made(rollout, torch.tensor(48.0))["loss"].backward()
    slope = made.heads.heads["tau"].values.grad.sum().item()

    def distance(shift):
        made.heads.heads["tau"].values.data.fill_(0.1 + shift)
        with torch.no_grad():
            features = made.reward.features(made.images(rollout, Decisions(rollout, "cpu")))
        against = made.reward.against(features)
        return sum(made.scale(kind) * value for kind, (value, _) in against.items())

    assert slope == pytest.approx((distance(0.01) - distance(-0.01)) / 0.02, rel=0.05)


@pytest.mark.parametrize("length", [1, 4])
def test_the_adaptive_part_learns_what_differs_between_images(length):
    """Its gradient has no part that all masked tokens share, so that v(u) alone moves them together; not so orders."""
    g = torch.Generator().manual_seed(0)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    state, slope = SimpleNamespace(mask=mask), torch.randn(2, length, generator=g)
    slope = slope if length == 1 else slope * mask
    for name in ("tau", "cfg", "group", "order"):
        a = torch.randn(2, length, generator=g, requires_grad=True)
        said = centred(name, state, a * 1)
        assert torch.equal(said, a)
        (said * slope).sum().backward()
        counted = torch.ones_like(slope) if length == 1 else mask.float()
        shared = 0 if name == "order" else counted * slope.sum() / counted.sum()
        torch.testing.assert_close(a.grad, slope - shared)


def test_a_distance_above_its_start_for_long_ends_the_run_with_one_line():
    made, _ = objective()
    for _ in range(PATIENCE - 1):
        made._watch(1.1)
    made._watch(0.9)
    for _ in range(PATIENCE - 1):
        made._watch(1.1)
    assert made.above == PATIENCE - 1
    with pytest.raises(
        FloatingPointError, match="above its start for 100 steps in a row, now 1.10 times it: lower --lr"
    ):
        made._watch(1.1)


def test_one_set_of_heads_for_a_range_of_steps():
    made, state = objective(train_num_iter="1,4")
    numbers = set()
    for state.step in range(40):
        numbers.add(made.prepare(state, None, torch.arange(2), torch.arange(2)).num_iter)
    assert numbers == {1, 2, 3, 4}


def test_flags_of_this_objective_have_their_own_defaults_and_given_ones_win():
    given = dict(preset="digits", objective="image", learn="tau", num_iter=5)
    config = resolve(given)
    assert (config.train.lr, config.train.batch_size, config.train.grad_clip) == (4e-3, 256, 1.0)
    assert config.heads.train_num_iter == "5,5" and config.heads.bounds("tau") == (0.4, 1.6)
    assert config.reward.reward == "digits,pixels" and config.train.freeze_backbone and not config.train.train_diffloss
    assert resolve(given | dict(adaptive=False)).train.lr == 1e-2
    assert resolve(given | dict(blr=1.0)).train.lr == 1.0 and resolve(given | dict(lr=0.5)).train.lr == 0.5
    assert resolve(given | dict(tau_max=1.1)).heads.bounds("tau") == (0.4, 1.1)
    assert resolve(dict(preset="digits")).heads.bounds("tau") == (0.9, 1.05)


def test_the_average_is_the_mean_of_the_last_steps():
    layer = torch.nn.Linear(1, 1, bias=False)
    average = TailAverage(layer, 0.4)
    for step in range(1, 11):
        layer.weight.data.fill_(float(step))
        average.update(layer, step, 10)
        expected = float(step) if step <= 7 else (7 + step) / 2
        assert average.weights["weight"].item() == pytest.approx(expected)


def test_features_of_several_processes_are_put_in_a_row(monkeypatch):
    """Each process adds its rows, of which it may have one less than the first, to zeros."""
    parts, counts, results = [torch.ones(2, 3), 2 * torch.ones(1, 3)], torch.tensor([2, 1]), []
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_sum", lambda tensor: counts if tensor.dim() == 1 else tensor)
    for rank in (0, 1):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        results.append(gathered(parts[rank]))
    assert torch.equal(results[0] + results[1], torch.cat(parts))


@pytest.mark.slow
def test_two_processes_equal_one(base, tmp_path, monkeypatch):
    """torchrun with gloo against one process at the same global batch; the bank has the same images.

    The adaptive part has its gradient centred over the images of a process (`centred`): over those of each half here.
    """

    def by_halves(name, state, a):
        halves = [state.images < 500, state.images >= 500]
        parts = [centred(name, SimpleNamespace(mask=state.mask[half]), a[half]) for half in halves]
        return torch.zeros_like(a).index_put((halves[0],), parts[0]).index_put((halves[1],), parts[1])

    monkeypatch.setattr("training.objectives.image.centred", by_halves)
    heads = ["--learn", "group,tau,cfg,profile"]
    assert train(tmp_path / "one", base, "--epochs", 1, "--batch_size", 1000, *heads) == 0
    where = ["--init_from", base, "--output_dir", tmp_path / "two", "--batch_size", 500, "--epochs", 1]
    torchrun("main_mar.py", *TRAIN, *where, *heads)
    one, two = (load_checkpoint(tmp_path / name) for name in ("one", "two"))
    # One step, and its gradients (Adam's first moments), equal to rounding: a step of Adam itself is of one length for
    # gradients of any size, so that rounding decides where one is near zero. That of a bias of the adaptive part is 0,
    # since it is centred.
    assert one["step"] == two["step"] == 1
    first, second = (content["optimizer"]["state"] for content in (one, two))
    for group in one["optimizer"]["param_groups"]:
        pairs = [(first[number]["exp_avg"], second[number]["exp_avg"]) for number in group["params"]]
        zero = 1e-5 * max(ours.norm() for ours, _ in pairs)
        assert zero > 0
        for number, (ours, theirs) in zip(group["params"], pairs):
            if ours.norm() < zero:
                assert theirs.norm() < zero, number
            else:
                assert (theirs - ours).norm() < 1e-5 * ours.norm(), number
    sums = [content["objective"]["bank"].sum(dim=0) for content in (one, two)]
    torch.testing.assert_close(*sums, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(
        lines(tmp_path / "two")[0]["reward"], lines(tmp_path / "one")[0]["reward"], rtol=1e-4, atol=0
    )


# -------------------------------------------------------------------------------------- order and group: score function


def test_the_score_is_the_gradient_of_the_expected_cost():
    """Of a choice between two costs: with P = σ(θ), dE[c]/dθ = P (1 − P)(c₁ − c₀), up to the deviation of c."""
    theta, taken = torch.tensor(0.3, requires_grad=True), torch.rand(200000, generator=torch.Generator().manual_seed(0))
    p = torch.sigmoid(theta)
    first = taken < p.detach()
    cost = torch.where(first, 5.0, 2.0)
    log_prob = torch.where(first, p.log(), (1 - p).log()).double()
    (slope,) = torch.autograd.grad(score_loss(cost, log_prob) / len(cost), theta)
    expected = p * (1 - p) * 3 / cost.std(correction=0)
    assert slope.item() == pytest.approx(expected.item(), rel=0.02)


def test_group_heads_explore_with_their_own_density():
    rollout = Rollout(torch.arange(3), [1, 2, 3], 4, None, sigma=0.5)
    decisions = Decisions(rollout, "cpu")
    r = torch.zeros(2, 1, requires_grad=True)
    state = SimpleNamespace(images=torch.tensor([0, 2]), step=1)
    x = decisions.explored("group", state, r)
    assert decisions.explored("tau", state, r) is r and not x.requires_grad
    expected = torch.distributions.Normal(0.0, 0.5).log_prob(x.squeeze(1))
    constant = torch.distributions.Normal(0.0, 0.5).log_prob(torch.tensor(0.0))
    torch.testing.assert_close(decisions.log_prob[[0, 2]], expected - constant)
    assert decisions.log_prob[1] == 0
    (slope,) = torch.autograd.grad(decisions.log_prob.sum(), r)
    torch.testing.assert_close(slope, x / 0.25)
    again = Decisions(rollout, "cpu")
    assert torch.equal(again.explored("group", state, r), x)


def test_all_heads_get_a_gradient_and_learn(base, tmp_path):
    made, state = objective(learn="order,group,tau,cfg,profile", num_iter=3)
    rollout = made.prepare(state, None, torch.arange(8), torch.arange(8))
    made(rollout, torch.tensor(8.0))["loss"].backward()
    for name in ("heads.order.out.weight", "heads.group.out.weight", "heads.group.values", "heads.tau.values"):
        assert made.heads.get_parameter(name).grad.abs().max() > 0, name
    assert train(tmp_path / "all", base, "--epochs", 1, "--learn", "order,group,tau,cfg,profile") == 0
    stored = load_checkpoint(tmp_path / "all")["heads"]
    assert stored["heads.order.out.weight"].abs().max() > 0 < stored["heads.group.values"].abs().max()
