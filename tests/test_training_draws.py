"""The draws of a training step: independent of the batch, masks of the published distribution, seeds."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, chi2, truncnorm

from diffusion.schedule import NUM_TRAIN_STEPS
from tests.helpers_training import CHANNELS, LENGTH, REPEATS, draws
from training.objectives.draws import mask_ratio
from util.rng import image_seeds, seed_of


def of_image(d, i):
    """All that draws d say about the i-th image, positions instead of rows."""
    mine = d.tokens.rows // d.mask.shape[1] == i
    return [
        d.flip[i],
        d.drop[i],
        d.mask[i],
        d.tokens.rows[mine] % d.mask.shape[1],
        d.tokens.draws["t"][:, mine],
        d.tokens.draws["noise"][:, mine],
    ]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b))


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
    assert torch.equal(
        d.tokens.rows.sort()[0], d.mask.flatten().nonzero().flatten()
    )  # each masked token once, no other
    n = len(d.tokens.rows)
    assert d.tokens.draws["t"].shape == (REPEATS, n) and d.tokens.draws["noise"].shape == (REPEATS, n, CHANNELS)
    assert (
        d.tokens.draws["t"].dtype == torch.long
        and d.tokens.draws["t"].min() >= 0
        and d.tokens.draws["t"].max() < NUM_TRAIN_STEPS
    )
    assert d.flip.shape == d.drop.shape == (batch,) and d.flip.dtype == d.drop.dtype == torch.bool


def test_seed_step_and_sample_each_change_the_draws():
    base = draws([5])
    assert same(of_image(base, 0), of_image(draws([5]), 0))
    for other in (draws([6]), draws([5], step=1), draws([5], seed=1)):
        assert not torch.equal(base.mask, other.mask) or not torch.equal(base.tokens.rows, other.tokens.rows)
        n = min(len(base.tokens.rows), len(other.tokens.rows))
        assert not torch.equal(base.tokens.draws["noise"][:, :n], other.tokens.draws["noise"][:, :n])


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
        d = draws(range(n), seq_len=length, mask_ratio_per_image=True, repeats=1, channels=1)
        counts = d.mask.sum(1).double().numpy()
    else:
        options = dict(seq_len=length, repeats=1, channels=1)
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
    rows, times, noise = d.tokens.rows, *d.tokens.draws.values()
    assert binomtest(int(d.flip.sum()), 2000, 0.5).pvalue > 1e-4
    assert binomtest(int(d.drop.sum()), 2000, 0.3).pvalue > 1e-4
    assert binomtest(int((d.flip & d.drop).sum()), 2000, 0.15).pvalue > 1e-4  # independent
    assert times.min() == 0 and times.max() == 999
    assert all(uniform_enough(t, NUM_TRAIN_STEPS) for t in times)
    assert uniform_enough(rows % LENGTH, LENGTH, LENGTH) and uniform_enough(
        rows[:: d.mask[0].sum()] % LENGTH, LENGTH, LENGTH
    )
    size = noise.numel()
    assert abs(noise.double().mean()) < 5 / math.sqrt(size)
    assert abs(noise.double().square().mean() - 1) < 5 * math.sqrt(2 / size)
    assert not torch.equal(noise[0], noise[1]) and not torch.equal(times[0], times[1])  # fresh for each repeat
    assert not draws(range(200), label_drop_prob=0.0).drop.any() and draws(range(200), label_drop_prob=1.0).drop.all()


def test_moving_draws_keeps_them():
    d = draws([1, 2])
    moved = d.to("meta")
    assert moved.num_visible == d.num_visible
    pairs = [(getattr(d, name), getattr(moved, name)) for name in ("flip", "drop", "mask")]
    pairs += [(d.tokens.rows, moved.tokens.rows)] + [(v, moved.tokens.draws[k]) for k, v in d.tokens.draws.items()]
    assert len(pairs) == 6
    for before, after in pairs:
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
