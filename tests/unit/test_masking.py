import numpy as np
import pytest

from dinoscope.data.masking import block_mask, sample_masks


@pytest.mark.parametrize("grid_hw", [(14, 14), (7, 20), (4, 4), (2, 2), (1, 3)])
def test_exact_count_for_every_count(grid_hw):
    rng = np.random.default_rng(0)
    for num_masked in range(grid_hw[0] * grid_hw[1] + 1):
        mask = block_mask(grid_hw, num_masked, rng)
        assert mask.shape == grid_hw
        assert mask.dtype == bool
        assert mask.sum() == num_masked


def test_first_block_follows_beit(monkeypatch):
    """Seen alone, blocks have log-uniform aspects in [0.3, 1/0.3], areas up to half of the crop, and lie anywhere."""
    rng = np.random.default_rng(1)
    heights, widths, centres = [], [], []
    from dinoscope.data import masking

    for _ in range(4000):
        mask = np.zeros((32, 32), bool)
        assert masking._add_block(mask, 512, rng)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert mask.sum() == len(rows) * len(columns) <= 512
        heights.append(len(rows)), widths.append(len(columns))
        centres.append((rows.mean() + 0.5, columns.mean() + 0.5))
    heights, widths = np.array(heights), np.array(widths)
    assert (heights * widths).min() >= 3  # area 4 in whole rows and columns: 1 × 3 or 2 × 2
    large = (heights * widths) > 100
    log_aspect = np.log(heights / widths)[large]
    assert abs(log_aspect).max() < np.log(1 / 0.3) + 0.2
    # log-uniform over ±log(0.3): mean 0, standard deviation 2·1.204/sqrt(12) = 0.695; tall ones do not always fit
    assert abs(log_aspect.mean()) < 0.05
    assert 0.6 < log_aspect.std() < 0.75
    assert 220 < (heights * widths).mean() < 270
    np.testing.assert_allclose(np.mean(centres, axis=0), 16, atol=0.3)


def test_masks_are_blocks_rather_than_single_patches():
    rng = np.random.default_rng(2)
    same_neighbour = []
    for _ in range(200):
        mask = block_mask((16, 16), 77, rng)
        same_neighbour.append((mask[:, 1:] == mask[:, :-1]).mean())
    # 77 of 256 patches at random would agree with their neighbour 58 % of the time
    assert np.mean(same_neighbour) > 0.8


def test_every_patch_is_masked_sometimes():
    rng = np.random.default_rng(3)
    rate = np.mean([block_mask((14, 14), 59, rng) for _ in range(3000)], axis=0)
    assert abs(rate.mean() - 59 / 196) < 1e-12
    assert rate.min() > 0.03  # blocks lie inside: corners are rare
    assert rate.max() < 0.6
    np.testing.assert_allclose(rate, rate[::-1], atol=0.06)
    np.testing.assert_allclose(rate, rate[:, ::-1], atol=0.06)
    np.testing.assert_allclose(rate, rate.T, atol=0.06)


def test_counts_of_a_batch():
    masks = sample_masks(8, (4, 4), 0.5, (0.1, 0.5), np.random.default_rng(0))
    assert masks.shape == (8, 16)
    assert sorted(masks.sum(1)) == [0, 0, 0, 0, 3, 4, 6, 8]  # int(16 · {.2, .3, .4, .5})
    masks = sample_masks(64, (14, 14), 0.5, (0.1, 0.45), np.random.default_rng(0))
    counts = np.sort(masks.sum(1))
    assert (counts[:32] == 0).all()
    assert counts[32] == int(196 * (0.1 + 0.35 / 32))
    assert counts[-1] == int(196 * 0.45)


@pytest.mark.parametrize(("num_crops", "probability", "masked"), [(6, 0.0, 0), (6, 1.0, 6), (5, 0.5, 2), (1, 0.5, 0)])
def test_number_of_masked_crops(num_crops, probability, masked):
    masks = sample_masks(num_crops, (8, 8), probability, (0.2, 0.4), np.random.default_rng(0))
    assert masks.any(1).sum() == masked


def test_masks_are_spread_over_the_crops():
    rng = np.random.default_rng(4)
    counts = np.mean([sample_masks(8, (6, 6), 0.5, (0.1, 0.5), rng).sum(1) for _ in range(3000)], axis=0)
    np.testing.assert_allclose(counts, counts.mean(), rtol=0.06)


def test_depends_on_the_generator_alone():
    first, again, other = (
        sample_masks(16, (14, 14), 0.5, (0.1, 0.5), np.random.default_rng(seed)) for seed in (5, 5, 6)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_circular_shift_keeps_counts_and_evens_out_the_edges():
    rng = np.random.default_rng(7)
    rates = {
        shift: np.mean([sample_masks(2, (10, 10), 1.0, (0.3, 0.3), rng, shift) for _ in range(3000)], axis=(0, 1))
        for shift in (False, True)
    }
    assert abs(rates[True].mean() - 0.3) < 1e-12
    assert rates[False].std() > 0.05
    assert rates[True].std() < 0.01
