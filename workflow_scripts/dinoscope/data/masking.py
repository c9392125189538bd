"""Which patches of the global crops are hidden from the student (BEiT, arXiv:2106.08254; iBOT, arXiv:2111.07832)."""

import math

import numpy as np

__all__ = ["block_mask", "sample_masks"]

MIN_BLOCK_PATCHES = 4
MIN_BLOCK_ASPECT = 0.3
MAX_BLOCK_SHARE = 0.5
BLOCK_TRIES = 10


def block_mask(grid_hw: tuple[int, int], num_masked: int, rng: np.random.Generator) -> np.ndarray:
    """A mask of rectangular blocks with exactly `num_masked` patches.

    Blocks of at least 4 patches and at most half of the crop, with an aspect log-uniform in [0.3, 1/0.3], are added
    until none of 10 tries fits what is still to be masked; the rest is topped up with single patches at random.

    Args:
        grid_hw: Rows and columns of patches.
        num_masked: Patches to mask, 0 … rows · columns.
        rng: Source of all random draws.

    Returns:
        bool (rows, columns), True where masked.
    """
    rows, columns = grid_hw
    assert 0 <= num_masked <= rows * columns, (grid_hw, num_masked)
    mask = np.zeros(grid_hw, bool)
    remaining = num_masked
    while remaining >= MIN_BLOCK_PATCHES:
        added = _add_block(mask, min(remaining, int(MAX_BLOCK_SHARE * rows * columns)), rng)
        if not added:
            break
        remaining -= added
    if remaining:
        free = np.flatnonzero(~mask)
        mask.ravel()[rng.choice(free, remaining, replace=False)] = True
    return mask


def _add_block(mask: np.ndarray, max_patches: int, rng: np.random.Generator) -> int:
    rows, columns = mask.shape
    log_aspect = math.log(MIN_BLOCK_ASPECT)
    for _ in range(BLOCK_TRIES):
        area = rng.uniform(MIN_BLOCK_PATCHES, max(max_patches, MIN_BLOCK_PATCHES))
        aspect = math.exp(rng.uniform(log_aspect, -log_aspect))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < height < rows and 0 < width < columns):
            continue
        top, left = rng.integers(rows - height + 1), rng.integers(columns - width + 1)
        block = mask[top : top + height, left : left + width]
        added = int(block.size - np.count_nonzero(block))
        if 0 < added <= max_patches:
            block[:] = True
            return added
    return 0


def sample_masks(
    num_crops: int,
    grid_hw: tuple[int, int],
    probability: float,
    ratio_min_max: tuple[float, float],
    rng: np.random.Generator,
    random_circular_shift: bool = False,
) -> np.ndarray:
    """Masks of all global crops of a batch.

    int(num_crops · probability) crops are masked. Their shares of masked patches are the upper edges of as many equal
    intervals of `ratio_min_max`, so that the number of masked patches of a batch is always the same; which crop gets
    which mask is random.

    Args:
        num_crops: Global crops of the batch.
        grid_hw: Rows and columns of patches of a global crop.
        probability: Share of crops that are masked.
        ratio_min_max: Smallest and largest share of masked patches in a masked crop.
        rng: Source of all random draws.
        random_circular_shift: Rolls each mask by a random offset in both directions (around the edges).

    Returns:
        bool (num_crops, rows · columns), True where masked, patches in row order.
    """
    num_masked_crops = int(num_crops * probability)
    masks = np.zeros((num_crops, *grid_hw), bool)
    shares = np.linspace(*ratio_min_max, num_masked_crops + 1)[1:]
    for mask, share in zip(masks, shares, strict=False):
        mask[:] = block_mask(grid_hw, int(grid_hw[0] * grid_hw[1] * share), rng)
        if random_circular_shift:
            mask[:] = np.roll(mask, (rng.integers(grid_hw[0]), rng.integers(grid_hw[1])), axis=(0, 1))
    return masks[rng.permutation(num_crops)].reshape(num_crops, -1)
