"""The parts of a training run: draws, loss, optimizer, averages, checkpoints, command-line flags."""

import argparse
import math
import pickle
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, chi2, truncnorm
from torch import nn

from diffusion.schedule import NUM_TRAIN_STEPS
from heads.training import TrainingLoss
from models.masking import mask_ratio, training_draws
from tests.helpers import tiny_mar
from util.args import defaults, flag, make_parser, pick, run_main
from util.checkpoint import FILE_NAME, load_checkpoint, load_weights, save_checkpoint, weights_hash
from util.optim import EMA, lr_at, make_optimizer
from util.rng import image_seeds, seed_of

LENGTH, CHANNELS, REPEATS = 16, 2, 3


def draws(samples, seed=0, step=0, **kwargs):
    usual = dict(seq_len=LENGTH, token_dim=CHANNELS, diffusion_batch_mul=REPEATS)
    return training_draws(seed, step, samples, **usual | dict(mask_ratio_min=0.7, label_drop_prob=0.1) | kwargs)


def of_image(d, i):
    """All that draws d say about the i-th image, positions instead of rows."""
    mine = d.rows // d.mask.shape[1] == i
    return [d.flip[i], d.drop[i], d.mask[i], d.rows[mine] % d.mask.shape[1], d.t[:, mine], d.noise[:, mine]]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b))


# --------------------------------------------------------------------------------------------------- training draws


@settings(max_examples=15, deadline=None)
@given(
    samples=st.lists(st.integers(0, 10**6), min_size=1, max_size=6, unique=True),
    step=st.integers(0, 10**6),
    seed=st.integers(0, 2**31),
    ratio_min=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    per_image=st.booleans(),
)
def test_draws_of_an_image_do_not_depend_on_its_batch(samples, step, seed, ratio_min, per_image):
    options = dict(seed=seed, step=step, mask_ratio_min=ratio_min, mask_ratio_per_image=per_image)
    whole = draws(samples, **options)
    backwards = draws(samples[::-1], **options)
    for i, sample in enumerate(samples):
        assert same(of_image(whole, i), of_image(draws([sample], **options), 0))
        assert same(of_image(whole, i), of_image(backwards, len(samples) - 1 - i))


@settings(max_examples=25, deadline=None)
@given(
    seq_len=st.integers(1, 40),
    ratio_min=st.floats(0, 1),
    batch=st.integers(1, 5),
    step=st.integers(0, 10**6),
    per_image=st.booleans(),
)
def test_shapes_and_consistency_of_the_draws(seq_len, ratio_min, batch, step, per_image):
    d = draws(range(batch), step=step, seq_len=seq_len, mask_ratio_min=ratio_min, mask_ratio_per_image=per_image)
    counts = d.mask.sum(1)
    assert d.mask.shape == (batch, seq_len) and d.mask.dtype == torch.bool
    assert d.num_visible == (seq_len - counts).tolist()
    assert (counts >= math.ceil(seq_len * ratio_min)).all() and (counts <= seq_len).all()
    assert per_image or len(counts.unique()) == 1
    assert torch.equal(d.rows.sort()[0], d.mask.flatten().nonzero().flatten())  # each masked token once, no other
    n = len(d.rows)
    assert d.t.shape == (REPEATS, n) and d.noise.shape == (REPEATS, n, CHANNELS)
    assert d.t.dtype == torch.long and d.t.min() >= 0 and d.t.max() < NUM_TRAIN_STEPS
    assert d.flip.shape == d.drop.shape == (batch,) and d.flip.dtype == d.drop.dtype == torch.bool


def test_seed_step_and_sample_each_change_the_draws():
    base = draws([5])
    assert same(of_image(base, 0), of_image(draws([5]), 0))
    for other in (draws([6]), draws([5], step=1), draws([5], seed=1)):
        assert not torch.equal(base.mask, other.mask) or not torch.equal(base.rows, other.rows)
        n = min(len(base.rows), len(other.rows))
        assert not torch.equal(base.noise[:, :n], other.noise[:, :n])


def test_one_mask_ratio_a_step_unless_asked_for_one_an_image():
    counts = torch.stack([draws(range(6), step=s, seq_len=64).mask.sum(1) for s in range(20)])
    assert (counts == counts[:, :1]).all() and len(counts[:, 0].unique()) > 5
    for step in range(3):
        assert len(draws(range(6), step=step, seq_len=64, mask_ratio_per_image=True).mask.sum(1).unique()) > 1


@pytest.mark.parametrize("minimum", [0.0, 0.5, 0.7])
def test_mask_ratio_is_the_inverse_of_the_published_distribution(minimum):
    """Published: scipy.stats.truncnorm((mask_ratio_min − 1) / 0.25, 0, loc=1, scale=0.25)."""
    published = truncnorm((minimum - 1) / 0.25, 0, loc=1.0, scale=0.25)
    uniform = np.linspace(0, 1, 101)
    np.testing.assert_allclose([mask_ratio(u, minimum) for u in uniform], published.ppf(uniform), rtol=1e-9, atol=1e-9)
    assert mask_ratio(0.0, minimum) == minimum and mask_ratio(1.0, minimum) == 1.0
    assert mask_ratio(0.3, 1.0) == 1.0


@pytest.mark.parametrize("per_image", [False, True])
def test_mean_mask_count(per_image):
    """Over steps (or images): the mean of ⌈L·ratio⌉ under the published distribution, within 4 standard errors."""
    published = truncnorm(-0.3 / 0.25, 0, loc=1.0, scale=0.25)
    n, length = 1500, 64
    if per_image:
        d = draws(range(n), seq_len=length, mask_ratio_per_image=True, diffusion_batch_mul=1, token_dim=1)
        counts = d.mask.sum(1).double().numpy()
    else:
        options = dict(seq_len=length, diffusion_batch_mul=1, token_dim=1)
        counts = np.array([float(draws([0], step=s, **options).mask.sum()) for s in range(n)])
    possible = np.arange(0, length + 1)
    probability = np.diff(published.cdf(possible / length), prepend=0.0)
    mean = (possible * probability).sum()
    spread = math.sqrt(((possible - mean) ** 2 * probability).sum())
    assert abs(counts.mean() - mean) < 4 * spread / math.sqrt(n)
    assert counts.std() == pytest.approx(spread, rel=0.1)


def uniform_enough(values, num_values, num_bins=10):
    counts = np.bincount(np.asarray(values) * num_bins // num_values, minlength=num_bins)
    return chi2.sf(((counts - counts.mean()) ** 2 / counts.mean()).sum(), num_bins - 1) > 1e-4


def test_frequencies():
    d = draws(range(2000), label_drop_prob=0.3)
    assert binomtest(int(d.flip.sum()), 2000, 0.5).pvalue > 1e-4
    assert binomtest(int(d.drop.sum()), 2000, 0.3).pvalue > 1e-4
    assert binomtest(int((d.flip & d.drop).sum()), 2000, 0.15).pvalue > 1e-4  # independent
    assert d.t.min() == 0 and d.t.max() == 999
    assert all(uniform_enough(t, NUM_TRAIN_STEPS) for t in d.t)
    assert uniform_enough(d.rows % LENGTH, LENGTH, LENGTH) and uniform_enough(
        d.rows[:: d.mask[0].sum()] % LENGTH, LENGTH, LENGTH
    )
    size = d.noise.numel()
    assert abs(d.noise.double().mean()) < 5 / math.sqrt(size)
    assert abs(d.noise.double().square().mean() - 1) < 5 * math.sqrt(2 / size)
    assert not torch.equal(d.noise[0], d.noise[1]) and not torch.equal(d.t[0], d.t[1])  # fresh for each repeat
    assert not draws(range(200), label_drop_prob=0.0).drop.any() and draws(range(200), label_drop_prob=1.0).drop.all()


def test_moving_draws_keeps_them():
    d = draws([1, 2])
    moved = d.to("meta")
    assert moved.num_visible == d.num_visible
    for name in ("flip", "drop", "mask", "rows", "t", "noise"):
        before, after = getattr(d, name), getattr(moved, name)
        assert after.device.type == "meta" and after.shape == before.shape and after.dtype == before.dtype
        assert before.device.type == "cpu"


def test_seed_names():
    keys = [
        ("train", 0, 1),
        ("train", 1, 0),
        ("train", 0, 11),
        ("train", 0, 1, 1),
        ("trai", "n", 0, 1),
        ("train", "0", 1),
    ]
    seeds = [seed_of(*key) for key in keys]
    assert len(set(seeds)) == len(keys) and seeds == [seed_of(*key) for key in keys]
    assert all(0 <= s < 2**32 for s in seeds)
    images = image_seeds(3, range(5000))
    assert len(set(images)) == 5000 and all(0 <= s < 2**32 for s in images)
    assert image_seeds(3, [4711]) == [images[4711]] and image_seeds(4, range(5)) != images[:5]
    assert image_seeds(3, torch.tensor([7])) == image_seeds(3, np.array([7])) == [images[7]]


# ---------------------------------------------------------------------------------------------------- training loss


@pytest.fixture
def mar():
    return tiny_mar(img_size=4, vae_embed_dim=CHANNELS)  # L = 16


def batch(size=3):
    g = torch.Generator().manual_seed(0)
    return torch.randn(size, LENGTH, CHANNELS, generator=g).clamp(-1, 1), torch.tensor([0, -1, 2])[:size]


@pytest.mark.parametrize("per_image", [False, True])
def test_training_loss_is_the_published_masked_mean(mar, per_image):
    """All rows, times the mask, over its sum; t and noise of unmasked rows are free to be anything."""
    tokens, labels = batch()
    d = draws([3, 1, 2], mask_ratio_min=0.3, mask_ratio_per_image=per_image)
    assert 0 < len(d.rows) < d.mask.numel() and (len(set(d.num_visible)) > 1) is per_image
    terms = TrainingLoss(mar)(tokens, labels, d, len(d.rows))

    t = torch.full((REPEATS, 3 * LENGTH), 17)
    noise = torch.full((REPEATS, 3 * LENGTH, CHANNELS), 0.5)
    t[:, d.rows], noise[:, d.rows] = d.t, d.noise
    z = mar.encode_decode(tokens, d.mask, labels).flatten(0, 1).repeat(REPEATS, 1)
    target = tokens.flatten(0, 1).repeat(REPEATS, 1)
    mask = d.mask.flatten().repeat(REPEATS)
    loss = mar.diffloss.token_loss(target, z, t.flatten(), noise.flatten(0, 1))
    expected = (loss * mask).sum() / mask.sum()
    torch.testing.assert_close(terms["loss"], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(terms["mse"] + terms["vb"], terms["loss"].detach())
    assert terms["loss"].requires_grad and not terms["mse"].requires_grad and not terms["vb"].requires_grad

    gradients = [torch.autograd.grad(x, list(mar.parameters()), allow_unused=True) for x in (terms["loss"], expected)]
    for ours, published in zip(*gradients):
        torch.testing.assert_close(ours, published, rtol=1e-3, atol=1e-5)


def test_training_loss_reads_each_masked_row_with_its_own_draws(mar):
    tokens, labels = batch()
    d = draws([3, 1, 2], mask_ratio_min=0.3, mask_ratio_per_image=True)
    module = TrainingLoss(mar)
    base = module(tokens, labels, d, 1)["loss"]
    shuffled = torch.randperm(len(d.rows), generator=torch.Generator().manual_seed(1))
    together = draws([3, 1, 2], mask_ratio_min=0.3, mask_ratio_per_image=True)
    together.rows, together.t, together.noise = d.rows[shuffled], d.t[:, shuffled], d.noise[:, shuffled]
    torch.testing.assert_close(module(tokens, labels, together, 1)["loss"], base, rtol=1e-5, atol=1e-5)
    together.rows = d.rows  # now rows and their noise no longer belong together
    assert (module(tokens, labels, together, 1)["loss"] - base).abs() > 1e-3
    torch.testing.assert_close(module(tokens, labels, d, 10.0)["loss"], base / 10)


def test_masked_tokens_are_targets_but_not_seen(mar):
    """Two contents of the masked tokens give the same z, hence the same gradient of z; and two losses."""
    tokens, labels = batch()
    d = draws([3, 1, 2], mask_ratio_min=0.3)
    other = torch.where(d.mask.unsqueeze(-1), -tokens, tokens)
    z = [mar.encode_decode(x, d.mask, labels) for x in (tokens, other)]
    assert torch.equal(*z)
    losses = [TrainingLoss(mar)(x, labels, d, len(d.rows))["loss"] for x in (tokens, other)]
    assert (losses[0] - losses[1]).abs() > 1e-3


def test_micro_batches_add_up_to_the_whole(mar):
    """With one global count of rows, the loss of a batch is the sum over its parts, however unequal their masks."""
    tokens, labels = batch()
    samples = [3, 1, 2]
    options = dict(mask_ratio_min=0.3, mask_ratio_per_image=True)
    whole = draws(samples, **options)
    module, n = TrainingLoss(mar), len(whole.rows)
    expected = module(tokens, labels, whole, n)["loss"]
    parts = [module(tokens[i, None], labels[i, None], draws([samples[i]], **options), n)["loss"] for i in range(3)]
    torch.testing.assert_close(sum(parts), expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ optimizer and rate


def test_what_decays(mar):
    mar.fake_latent.requires_grad_(False)
    optimizer = make_optimizer(mar, lr=0.5, weight_decay=0.02)
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


# ------------------------------------------------------------------------------------------------------- checkpoints


def content(mar):
    """A checkpoint as a run writes it, with optimizer moments and random state."""
    optimizer = make_optimizer(mar, 1e-3, 0.02)
    tokens, labels = batch()
    d = draws([0, 1, 2])
    TrainingLoss(mar)(tokens, labels, d, len(d.rows))["loss"].backward()
    optimizer.step()
    ema = EMA(mar, 0.9).weights
    state = {"model": mar.state_dict(), "model_ema": ema, "optimizer": optimizer.state_dict(), "epoch": 3, "scaler": {}}
    return {
        **state,
        "args": {"lr": 1e-3, "resume": "", "lists": [1, None, True]},
        "rng": torch.get_rng_state(),
        "step": 7,
    }


def equal(a, b):
    """Bitwise, through containers."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def refused(place):
    """The one line that load_checkpoint says about a bad file."""
    with pytest.raises(ValueError) as error:
        load_checkpoint(place)
    message = str(error.value)
    assert str(place) in message and "\n" not in message and len(message) < 400
    return message


def test_checkpoint_round_trip(mar, tmp_path):
    saved = content(mar)
    folder = tmp_path / "new" / "run"
    path = save_checkpoint(folder, saved)
    assert path == folder / FILE_NAME and [p.name for p in folder.iterdir()] == [FILE_NAME]
    for place in (folder, str(folder), path, str(path)):
        assert equal(load_checkpoint(place), saved)
    save_checkpoint(folder, {**saved, "epoch": 4})
    assert load_checkpoint(folder)["epoch"] == 4 and len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("exists", [True, False])
def test_interrupted_save_leaves_the_old_file_whole(tmp_path, monkeypatch, error, exists):
    if exists:
        save_checkpoint(tmp_path, {"model": {"a": torch.arange(3.0)}})
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def failing(content, file):
        file.write(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(type(error)):
        save_checkpoint(tmp_path, {"model": {}})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before and len(before) == exists


def test_published_file_loads(mar, tmp_path):
    """MAR writes args as a Namespace, model_ema as an OrderedDict, and none of our own keys."""
    saved = content(mar)
    published = {k: saved[k] for k in ("model", "model_ema", "optimizer", "epoch", "scaler")}
    published["model_ema"] = OrderedDict(published["model_ema"])
    published["args"] = argparse.Namespace(lr=None, batch_size=64, output_dir="./out", cfg=2.9, pin_mem=True)
    torch.save(published, tmp_path / FILE_NAME)
    loaded = load_checkpoint(tmp_path)
    assert loaded["args"] == published["args"]
    assert equal({k: v for k, v in loaded.items() if k != "args"}, {k: v for k, v in published.items() if k != "args"})
    other = tiny_mar(img_size=4, vae_embed_dim=CHANNELS)
    load_weights(other, loaded["model"], tmp_path)
    assert weights_hash(other.state_dict()) == weights_hash(mar.state_dict())


@pytest.mark.parametrize("legacy", [False, True])
def test_truncated_file(mar, tmp_path, legacy):
    path = tmp_path / FILE_NAME
    torch.save(content(mar), path, _use_new_zipfile_serialization=not legacy)
    assert load_checkpoint(tmp_path)["step"] == 7
    whole = path.read_bytes()
    for size in [0, 1, 2, 20, 50, 100, 500, *(len(whole) * k // 16 for k in range(1, 16)), len(whole) - 1]:
        path.write_bytes(whole[:size])
        refused(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_garbage_file(tmp_path):
    path = tmp_path / FILE_NAME
    rng = np.random.default_rng(0)
    texts = [
        b"version https://git-lfs.github.com/spec/v1\n",
        b"<html>404</html>",
        b"PK\x03\x04" + bytes(50),
        bytes(500),
    ]
    pickles = [b"\x80\x02]q\x00.", b"\x80\x02(.", b"\x80\x02.", b"\x80\x02K", b"\x80\x02a.", b"\x80\x02}K\x00K\x00s."]
    for garbage in texts + pickles + [rng.bytes(rng.integers(1, 60)) for _ in range(200)]:
        path.write_bytes(garbage)
        refused(path)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle"])
def test_nothing_in_a_file_is_executed(tmp_path, how):
    victim, path = tmp_path / "victim", tmp_path / FILE_NAME
    bad = {"model": {}, "args": Malicious(victim)}
    if how == "pickle":
        path.write_bytes(pickle.dumps(bad, protocol=2))
        pickle.loads(path.read_bytes())["args"].close()
        assert victim.exists()  # it does what it should not, where it is allowed to
        victim.unlink()
    else:
        torch.save(bad, path, _use_new_zipfile_serialization=how == "zip")
    refused(path)
    assert not victim.exists()


def test_missing_and_foreign_files(tmp_path):
    assert "no checkpoint" in refused(tmp_path)
    assert "no checkpoint" in refused(tmp_path / "nowhere" / "x.pth")
    for foreign in ({"state_dict": {}}, [1, 2], torch.zeros(3)):
        torch.save(foreign, tmp_path / FILE_NAME)
        assert "'model'" in refused(tmp_path)


def test_load_weights_names_what_differs():
    def mismatch(weights, *words):
        model = nn.Linear(2, 3)
        before = weights_hash(model.state_dict())
        with pytest.raises(ValueError) as error:
            load_weights(model, weights, "some/place")
        message = str(error.value)
        assert "\n" not in message and all(word in message for word in ("some/place", *words)), message
        assert weights_hash(model.state_dict()) == before

    good = nn.Linear(2, 3).state_dict()
    mismatch({"weight": good["weight"]}, "bias")
    mismatch({**good, "extra.bias": good["bias"]}, "extra.bias")
    mismatch({**good, "weight": torch.zeros(3, 5)}, "weight", "(3, 5)", "(3, 2)")
    model = nn.Linear(2, 3)
    load_weights(model, dict(reversed(good.items())), "some/place")
    assert all(torch.equal(model.state_dict()[name], good[name]) for name in good)


def test_weights_hash():
    weights = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(2)}
    base = weights_hash(weights)
    assert len(base) == 16 and int(base, 16) >= 0
    assert weights_hash(dict(reversed(weights.items()))) == base
    assert weights_hash({k: v.clone().requires_grad_() for k, v in weights.items()}) == base
    assert weights_hash({**weights, "a": weights["a"].t().contiguous().t()}) == base  # memory layout is not content
    changed = weights["a"].clone()
    changed[1, 2] = torch.nextafter(changed[1, 2], torch.tensor(9.0))
    others = [
        {**weights, "a": changed},
        {**weights, "a": weights["a"].reshape(3, 2)},
        {"a": weights["a"], "c": weights["b"]},
        {"a": weights["a"]},
        {"b": weights["a"], "a": weights["b"]},
    ]
    assert len({base, *map(weights_hash, others)}) == 6


# ------------------------------------------------------------------------------------------------------ command line


@dataclass(frozen=True)
class Settings:
    count: int = flag(3, "a count", low=1, high=10)
    scale: float = flag(1.5, "a scale of 100%", low=0)
    free: float | None = flag(None, "a number or nothing")
    kind: str = flag("red", "a colour", choices={"red": 1, "blue": 2})
    steps: int | str = flag("100", "digits kept as a text", type=str)
    fast: bool = flag(False, "be quick")
    safe: bool = flag(True, "be careful")
    hidden: int = 7


@dataclass(frozen=True)
class More:
    count: int = flag(99, "the same flag again", low=1, high=10)
    other: int = flag(0, "another")


def parse(*argv):
    return vars(make_parser("prog", "what it does", Settings, More).parse_args(argv))


def test_flags_given_and_not_given():
    assert parse() == {}
    given = parse(
        "--count", "10", "--scale=0", "--free", "-1000", "--kind", "blue", "--steps", "25", "--fast", "--other", "-4"
    )
    assert given == dict(count=10, scale=0.0, free=-1000.0, kind="blue", steps="25", fast=True, other=-4)
    assert type(given["scale"]) is float and type(given["count"]) is int
    assert pick(Settings, given) == Settings(10, 0.0, -1000.0, "blue", "25", True)
    assert pick(More, given, other=5) == More(10, 5)
    expected = dict(count=3, scale=1.5, free=None, kind="red", steps="100", fast=False, safe=True, other=0)
    assert defaults(Settings, More) == expected
    assert defaults(More, Settings)["count"] == 99


@pytest.mark.parametrize(
    "name, no", [("safe", "--no_safe"), ("safe", "--no-safe"), ("fast", "--no_fast"), ("fast", "--no-fast")]
)
def test_switches(name, no):
    assert parse(no) == {name: False} and parse(f"--{name}") == {name: True}
    assert parse(f"--{name}", no) == {name: False} and parse(no, f"--{name}") == {name: True}


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--count", "0"], ["--count", "'0'", "a whole number", "at least 1", "at most 10"]),
        (["--count", "11"], ["--count", "'11'", "at most 10"]),
        (["--count", "2.5"], ["--count", "'2.5'", "a whole number"]),
        (["--count", "many"], ["--count", "'many'"]),
        (["--count", "nan"], ["--count", "'nan'"]),
        (["--count", ""], ["--count", "''"]),
        (["--count"], ["--count"]),
        (["--scale", "-0.1"], ["--scale", "'-0.1'", "a number", "at least 0"]),
        (["--scale", "nan"], ["--scale", "'nan'"]),
        (["--scale", "inf"], ["--scale", "'inf'"]),
        (["--scale=-inf"], ["--scale", "'-inf'"]),
        (["--scale", "1e999"], ["--scale", "'1e999'"]),
        (["--free", "nan"], ["--free", "'nan'", "a number"]),
        (["--free", "x\ny"], ["--free", r"'x\ny'"]),
        (["--kind", "green"], ["--kind", "'green'", "red, blue"]),
        (["--fast=1"], ["--fast"]),
        (["--cou", "3"], ["--cou"]),
        (["--unknown", "3"], ["--unknown"]),
        (["stray"], ["stray"]),
    ],
)
def test_bad_flags_are_one_line_and_code_2(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.count("\n") == 1 and err.endswith("\n") and err.startswith("prog: error: ")
    assert all(word in err for word in words), err


def test_help_names_every_flag_and_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for part in (
        "--count",
        "a count (default: 3)",
        "a scale of 100% (default: 1.5)",
        "{red,blue}",
        "--no_safe",
        "what it does",
    ):
        assert part in text
    assert "hidden" not in text and "--no_fast" not in text


def test_run_main(capsys):
    def main(argv):
        if argv:
            raise ValueError("first\nsecond")
        return 3

    assert run_main(main, []) == 3 and capsys.readouterr().err == ""
    assert run_main(main, ["x"]) == 2 and capsys.readouterr().err == "error: first second\n"
    with pytest.raises(RuntimeError):  # a bug is not the user's fault, and keeps its traceback
        run_main(lambda argv: (_ for _ in ()).throw(RuntimeError("bug")))
