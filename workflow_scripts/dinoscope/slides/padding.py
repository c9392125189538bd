"""Tiles that reach over the edge of their slide (edge "pad" of a tile set)."""

import math

import numpy as np

from dinoscope.slides.reader import Slide
from dinoscope.slides.resample import resample_square

__all__ = ["read_tile"]


def read_tile(
    slide: Slide, x: float, y: float, level: int, read_px: int, tile_px: int, footprint_px: float
) -> np.ndarray:
    """`Slide.read_tile`; a tile beyond the right or lower edge has the slide's background there.

    `Slide.read_tile` itself takes such a tile for a rounding of its level and moves it inwards.

    Args:
        slide: The slide.
        x, y, level, read_px, tile_px, footprint_px: As in the manifest.

    Returns:
        uint8 (tile_px, tile_px, 3), RGB.

    Raises:
        SlideError: The file is damaged here.
    """
    if x + footprint_px <= slide.width and y + footprint_px <= slide.height:
        return slide.read_tile(x, y, level, read_px, tile_px, footprint_px)
    downsample = slide.level_downsamples[level]
    side = footprint_px / downsample
    (left, column), (top, row) = (_start(place, downsample) for place in (x, y))
    count = math.ceil(side + max(column, row) - 1e-6)
    region = slide.read_region(left, top, level, count, count)
    return resample_square(region, column, row, side, tile_px, averages=level > 0)


def _start(place: float, downsample: float) -> tuple[int, float]:
    """The pixel of the level that a level-0 pixel lies in, in level-0 pixels, and how far inside."""
    start = math.floor(math.floor(place / downsample + 1e-6) * downsample + 1e-6)
    return start, (place - start) / downsample
