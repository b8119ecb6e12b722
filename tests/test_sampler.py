"""The epoch sampler of util/images/datasets.py: one permutation an epoch, shared between processes, resumed inside."""

import numpy as np
import pytest
from torch.utils.data import DataLoader

from util.images.datasets import EpochSampler, build_dataset


def batches(n, batch_size, seed=0, epoch=0, start_batch=0, **kwargs):
    sampler = EpochSampler(n, batch_size, seed, **kwargs)
    sampler.set_epoch(epoch, start_batch)
    return list(sampler)


def test_sampler_walks_one_permutation():
    epoch = batches(23, 4, seed=5, epoch=2)
    assert len(epoch) == len(EpochSampler(23, 4, 5)) == 5 and all(len(batch) == 4 for batch in epoch)
    expected = np.random.default_rng([5, 2]).permutation(23)[:20]
    assert sum(epoch, []) == expected.tolist() and len(set(expected)) == 20
    assert epoch == batches(23, 4, seed=5, epoch=2)
    assert epoch != batches(23, 4, seed=5, epoch=3) and epoch != batches(23, 4, seed=6, epoch=2)
    assert all(type(i) is int for i in epoch[0])


def test_ranks_together_see_the_batches_of_one_process():
    one = batches(50, 12, seed=1, epoch=4)
    ranks = [batches(50, 4, seed=1, epoch=4, rank=rank, world_size=3) for rank in range(3)]
    assert [sum(parts, []) for parts in zip(*ranks, strict=True)] == one


def test_start_batch_gives_the_tail():
    epoch = batches(23, 4)
    assert all(batches(23, 4, start_batch=k) == epoch[k:] for k in range(6))
    sampler = EpochSampler(23, 4, 0)
    sampler.set_epoch(0, 3)
    sampler.set_epoch(1)  # the next epoch is whole again
    assert len(list(sampler)) == 5
    with pytest.raises(ValueError, match="start_batch is 6"):
        sampler.set_epoch(0, 6)


def test_sampler_bad_arguments():
    with pytest.raises(ValueError, match="7 images .* 8 .*--batch_size"):
        EpochSampler(7, 4, 0, world_size=2)
    assert len(EpochSampler(8, 4, 0, world_size=2)) == 1
    for batch_size, seed in ((0, 0), (4, -1)):
        with pytest.raises(ValueError, match="expected at least"):
            EpochSampler(7, batch_size, seed)


def test_sampler_feeds_a_loader():
    ds = build_dataset("digits")
    sampler = EpochSampler(len(ds), 256, 0)
    seen = [index.tolist() for _, _, index in DataLoader(ds, batch_sampler=sampler)]
    assert seen == list(sampler) and len(seen) == 7
