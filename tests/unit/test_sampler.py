"""The computed order of samples."""

from collections import Counter

import numpy as np
import pytest

from dinoscope.data.sampler import StepSampler, permuted_index, tile_of_sample


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_every_pass_is_a_permutation(size: int) -> None:
    for epoch in range(3):
        assert sorted(permuted_index(i, size, 7, epoch) for i in range(size)) == list(range(size))


def test_passes_and_seeds_differ() -> None:
    orders = {tuple(permuted_index(i, 100, seed, epoch) for i in range(100)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_positions_are_uniform() -> None:
    """Where index 0 of 16 lands over many passes: chi-square with 15 degrees of freedom, 99.99 % quantile 44.3."""
    counts = np.bincount([permuted_index(0, 16, 0, epoch) for epoch in range(3200)], minlength=16)
    assert ((counts - 200) ** 2 / 200).sum() < 44.3


def test_order_is_not_correlated_with_the_index() -> None:
    order = np.array([permuted_index(i, 5000, 1, 0) for i in range(5000)])
    assert abs(np.corrcoef(np.arange(5000), order)[0, 1]) < 0.06  # 4 standard errors
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.06


def test_index_outside_is_refused() -> None:
    with pytest.raises(IndexError):
        permuted_index(5, 5, 0, 0)


def test_each_tile_is_seen_once_a_pass() -> None:
    assert set(Counter(tile_of_sample(sample, 30, 3) for sample in range(90)).values()) == {3}


def test_ranks_share_the_samples_of_a_step() -> None:
    together = list(StepSampler(4, 9, 6, 0, 1))
    parts = [list(StepSampler(4, 9, 2, rank, 3)) for rank in range(3)]
    assert [[*first, *second, *third] for first, second, third in zip(*parts, strict=True)] == together
    assert together[0] == list(range(24, 30))


def test_a_resumed_sampler_goes_on_where_it_stopped() -> None:
    assert list(StepSampler(0, 10, 4, 1, 2))[6:] == list(StepSampler(6, 10, 4, 1, 2))
