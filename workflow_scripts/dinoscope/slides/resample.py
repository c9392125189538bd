"""Area averaging, the only resampling that keeps the mean colour of what it shrinks."""

import functools
import math

import cv2
import numpy as np

__all__ = ["average_squares", "resample_square", "square_shares"]


def average_squares(block: np.ndarray, factor: int) -> np.ndarray:
    """Averages squares of `factor` pixels; squares that reach over the edge repeat its last row or column.

    Args:
        block: uint8 (height, width, 3).
        factor: Side of a square in pixels.

    Returns:
        uint8 (ceil(height / factor), ceil(width / factor), 3).
    """
    rows, columns = (math.ceil(side / factor) for side in block.shape[:2])
    missing = (rows * factor - block.shape[0], columns * factor - block.shape[1])
    if any(missing):
        block = cv2.copyMakeBorder(block, 0, missing[0], 0, missing[1], cv2.BORDER_REPLICATE)
    return cv2.resize(block, (columns, rows), interpolation=cv2.INTER_AREA) if factor > 1 else block


def resample_square(
    region: np.ndarray, left: float, top: float, side: float, tile_px: int, averages: bool
) -> np.ndarray:
    """Brings the square of `side` pixels at (left, top) of a region to `tile_px` pixels.

    Averages over the areas of the new pixels, whose borders may cut through old ones. Where the old pixels are averages
    themselves (a level above 0), what lies within a cut pixel is estimated from its neighbours: cubic interpolation of
    the running sums, which keeps the mean colour and halves the distance to what averaging level 0 would give.

    Args:
        region: uint8 (height, width, 3), no larger than needed.
        left, top: Corner of the square in pixels of the region.
        side: Side of the square in pixels of the region, not necessarily whole.
        tile_px: Side of the result in pixels.
        averages: Whether the region's pixels are averages of finer ones.

    Returns:
        uint8 (tile_px, tile_px, 3).
    """
    whole = max(abs(left), abs(top), abs(side - region.shape[0]), abs(side - region.shape[1])) < 1e-3
    if whole and region.shape[0] == tile_px:
        return region
    if whole and not averages:
        interpolation = cv2.INTER_AREA if side > tile_px else cv2.INTER_LINEAR
        return cv2.resize(region, (tile_px, tile_px), interpolation=interpolation)
    knots = 4 if averages and min(region.shape[:2]) > 4 else 2
    for start in (round(top, 6), round(left, 6)):
        # the second pass works on the columns, and turns the picture back
        region = _averaged_rows(region, *_taps(region.shape[0], start, side, tile_px, knots)).transpose(1, 0, 2)
    return np.clip(np.rint(region), 0, 255).astype(np.uint8, order="C")


def square_shares(sums: np.ndarray, downsample: float, x: np.ndarray, y: np.ndarray, side: int) -> np.ndarray:
    """Share of every square that a mask covers, mask pixels that its border cuts counting in part.

    Args:
        sums: Running sums of the mask, with a row and a column of zeros before (`cv2.integral`).
        downsample: Side of a mask pixel in level-0 pixels.
        x, y: Left ends of the columns and top ends of the rows of squares, level-0 pixels.
        side: Of a square, level-0 pixels. What lies outside of the mask counts as not covered.

    Returns:
        float64 (rows, columns).
    """
    down = _spans(sums, y / downsample, side / downsample)
    return np.clip(_spans(down.T, x / downsample, side / downsample).T / (side / downsample) ** 2, 0, 1)


def _spans(sums: np.ndarray, starts: np.ndarray, side: float) -> np.ndarray:
    """Differences of running sums over `side` rows from each of `starts` on."""
    ends = starts + side
    if (np.abs(ends[:-1] - starts[1:]) < 1e-6).all():  # tiles that touch share their edges
        return np.diff(_between(sums, np.append(starts, ends[-1:])), axis=0)
    return _between(sums, ends) - _between(sums, starts)


def _between(sums: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Rows of running sums at fractional places; linear in between, which is exact for sums of whole pixels."""
    places = np.minimum(places, len(sums) - 1)
    before = np.minimum(places.astype(int), len(sums) - 2)
    share = (places - before)[:, None]
    return sums[before] * (1 - share) + sums[before + 1] * share


def _averaged_rows(region: np.ndarray, first: np.ndarray, weights: np.ndarray) -> np.ndarray:
    region = np.ascontiguousarray(region, np.float32)
    total = np.zeros((len(first), *region.shape[1:]), np.float32)
    for number, weight in enumerate(weights.T):
        total += region[first + number] * weight[:, None, None]
    return total


@functools.lru_cache(maxsize=256)
def _taps(length: int, start: float, side: float, count: int, knots: int) -> tuple[np.ndarray, np.ndarray]:
    """How [start, start + side) of a row of `length` pixels is averaged to `count` pixels.

    The running sum of the pixels, known at their borders, is interpolated at the borders of the new pixels by the
    polynomial through `knots` neighbours (Lagrange); a new pixel is a difference of two such sums.

    Returns:
        Of each new pixel the first old one that it depends on, (count,), and the weights of the old ones from there
        on, float32 (count, taps).
    """
    edges = np.clip(start + side * np.arange(count + 1) / count, 0, length)
    first = np.clip(np.floor(edges).astype(int) - (knots // 2 - 1), 0, length + 1 - knots)
    sums = np.zeros((count + 1, length + 1))
    for one in range(knots):
        share = np.ones(count + 1)
        for other in range(knots):
            if other != one:
                share *= (edges - first - other) / (one - other)
        sums[np.arange(count + 1), first + one] = share
    # pixel j is part of all running sums after it
    weights = np.diff(sums, axis=0)[:, :0:-1].cumsum(axis=1)[:, ::-1]
    weights /= weights.sum(axis=1, keepdims=True)
    taps = int((first[1:] - first[:-1]).max()) + knots - 1
    begin = np.minimum(first[:-1], length - taps)
    return begin, np.take_along_axis(weights, begin[:, None] + np.arange(taps), axis=1).astype(np.float32)
