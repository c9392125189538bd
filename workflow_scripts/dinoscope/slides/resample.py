"""Area averaging, the only resampling that keeps the mean colour of what it shrinks."""

import math

import cv2
import numpy as np

__all__ = ["average_squares", "resample_square"]


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


def resample_square(region: np.ndarray, left: float, top: float, side: float, tile_px: int) -> np.ndarray:
    """Brings the square of `side` pixels at (left, top) of a region to `tile_px` pixels.

    Shrinks by area averages, exact also where the square's borders cut through pixels; enlarges linearly.

    Args:
        region: uint8 (height, width, 3), no larger than needed.
        left, top: Corner of the square in pixels of the region, from 0 to below 1.
        side: Side of the square in pixels of the region, not necessarily whole.
        tile_px: Side of the result in pixels.

    Returns:
        uint8 (tile_px, tile_px, 3).
    """
    whole = max(abs(left), abs(top), abs(side - region.shape[0]), abs(side - region.shape[1])) < 1e-3
    if whole and region.shape[0] == tile_px:
        return region
    if whole or side < tile_px:
        interpolation = cv2.INTER_AREA if side >= tile_px else cv2.INTER_LINEAR
        return cv2.resize(region, (tile_px, tile_px), interpolation=interpolation)
    rows, columns = (
        _area_weights(n, start, side, tile_px) for n, start in zip(region.shape[:2], (top, left), strict=True)
    )
    shrunk = rows @ region.reshape(region.shape[0], -1).astype(np.float32)
    shrunk = shrunk.reshape(tile_px, region.shape[1], 3).transpose(1, 0, 2).reshape(region.shape[1], -1)
    shrunk = (columns @ shrunk).reshape(tile_px, tile_px, 3).transpose(1, 0, 2)
    return np.ascontiguousarray(np.clip(np.rint(shrunk), 0, 255).astype(np.uint8))


def _area_weights(length: int, start: float, side: float, count: int) -> np.ndarray:
    """Share of each of `length` pixels in each of the `count` equal parts of [start, start + side): (count, length)."""
    edges = start + side * np.arange(count + 1)[:, None] / count
    pixels = np.arange(length)
    overlap = np.minimum(edges[1:], pixels + 1) - np.maximum(edges[:-1], pixels)
    weights = np.clip(overlap, 0, None)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
