"""Where the tiles lie: a grid at exactly the requested micrometres a pixel, whatever levels the slide has.

Coordinates and sizes are level-0 pixels, x before y, unless their name says otherwise.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dinoscope.errors import ConfigError, SlideError
from dinoscope.slides.reader import Slide
from dinoscope.slides.tissue import Tissue

__all__ = ["MAX_UPSAMPLE", "Grid", "Reading", "TileSet", "default_min_tissue", "make_grid", "plan_reading"]

MAX_UPSAMPLE = 1.05
_MAX_TILE_PX = 2**15 - 1
_MAX_ANISOTROPY = 0.01
_LEVEL_TOLERANCE = 1.001  # levels are rounded to whole pixels: 4.0003 is meant to be 4


@dataclass(frozen=True)
class TileSet:
    """One set of tiles that is wanted of every slide.

    Attributes:
        name: Of the set, e.g. "train".
        tile_px: Side of a tile in pixels at `mpp`.
        mpp: Micrometres a pixel of a tile.
        min_tissue: Least share of tissue, 0 to 1, for a tile to be kept; None for `default_min_tissue` of the method.
        stride_px: Distance of neighbouring tiles in pixels at `mpp`; `tile_px` (no overlap, no gap) when None.

    Raises:
        ConfigError: There can be no such tiles.
    """

    name: str
    tile_px: int
    mpp: float
    min_tissue: float | None = None
    stride_px: int | None = None

    def __post_init__(self) -> None:
        if not (0 < self.tile_px <= _MAX_TILE_PX and self.mpp > 0):
            raise ConfigError(
                f"tile set {self.name} has tiles of {self.tile_px} px at mpp {self.mpp:g}: wanted 1 to {_MAX_TILE_PX} "
                "px and an mpp above 0"
            )


class Reading(NamedTuple):
    """How the tiles of a set are read from a slide.

    Attributes:
        level: Pyramid level: the coarsest that is at least as fine as the tile.
        read_px: Side of the region in pixels of that level.
        footprint_px: Side in level-0 pixels.
        stride_px: Distance of neighbouring tiles in level-0 pixels.
    """

    level: int
    read_px: int
    footprint_px: int
    stride_px: int


@dataclass(frozen=True)
class Grid:
    """The tiles of one set on one slide.

    Attributes:
        tile_set: What was asked for.
        reading: How they are read.
        min_tissue: Least share of tissue of those that are kept.
        x, y: Top-left corners of the kept tiles in raster order; int32.
        tissue_fraction: Share of tissue of the kept tiles; float32.
        num_candidates: Number of tiles that fit on the slide.
    """

    tile_set: TileSet
    reading: Reading
    min_tissue: float
    x: np.ndarray
    y: np.ndarray
    tissue_fraction: np.ndarray
    num_candidates: int

    def __len__(self) -> int:
        return len(self.x)


def default_min_tissue(method: str) -> float:
    """Least share of tissue for a tile: half; of a smear 3 % cells, of a fluorescence slide a quarter of signal."""
    return {"cytology": 0.03, "fluorescence": 0.25, "none": 0.0}.get(method, 0.5)


def plan_reading(slide: Slide, tile_set: TileSet) -> Reading:
    """Decides what to read of a slide for the tiles of a set.

    Raises:
        SlideError: The slide is too coarse or too small for such tiles, or its pixels are not square.
    """
    name = f"slide {slide.slide_id!r}, tile set {tile_set.name}"
    mpp = _square_mpp(slide)
    upsample = mpp / tile_set.mpp
    if upsample > MAX_UPSAMPLE:
        raise SlideError(
            f"{name}: tiles at mpp {tile_set.mpp:g} would have to be enlarged {upsample:.3g} times, since the slide "
            f"has only mpp {mpp:.4g} (at most {MAX_UPSAMPLE:g} times is allowed): ask for a coarser mpp or leave the "
            "slide out"
        )
    footprint_px = round(tile_set.tile_px * tile_set.mpp / mpp)
    if footprint_px > min(slide.width, slide.height):
        raise SlideError(
            f"{name}: a tile of {tile_set.tile_px} px at mpp {tile_set.mpp:g} covers {footprint_px} x {footprint_px} "
            f"pixels and the slide has only {slide.width} x {slide.height} (mpp {mpp:.4g}): ask for smaller tiles, "
            "correct the mpp or leave the slide out"
        )
    shrink = footprint_px / tile_set.tile_px
    fine_enough = [level for level, step in enumerate(slide.level_downsamples) if step <= shrink * _LEVEL_TOLERANCE]
    level = max(fine_enough, default=0)
    stride_px = max(1, round((tile_set.stride_px or tile_set.tile_px) * tile_set.mpp / mpp))
    return Reading(level, round(footprint_px / slide.level_downsamples[level]), footprint_px, stride_px)


def make_grid(slide: Slide, tissue: Tissue, tile_set: TileSet) -> Grid:
    """Lays a grid of tiles over the slide and keeps those with enough tissue. No tile leaves the slide.

    Raises:
        SlideError: As `plan_reading`.
    """
    reading = plan_reading(slide, tile_set)
    min_tissue = default_min_tissue(tissue.method) if tile_set.min_tissue is None else tile_set.min_tissue
    columns = np.arange(0, slide.width - reading.footprint_px + 1, reading.stride_px)
    rows = np.arange(0, slide.height - reading.footprint_px + 1, reading.stride_px)
    fraction = _tissue_fractions(tissue, columns, rows, reading.footprint_px)
    row, column = np.nonzero(fraction >= min_tissue)
    return Grid(
        tile_set=tile_set,
        reading=reading,
        min_tissue=min_tissue,
        x=columns[column].astype(np.int32),
        y=rows[row].astype(np.int32),
        tissue_fraction=fraction[row, column].astype(np.float32),
        num_candidates=fraction.size,
    )


def _square_mpp(slide: Slide) -> float:
    if abs(slide.mpp_x - slide.mpp_y) > _MAX_ANISOTROPY * slide.mpp:
        raise SlideError(
            f"slide {slide.slide_id!r} has mpp {slide.mpp_x:.4g} horizontally and {slide.mpp_y:.4g} vertically, more "
            "than 1 % apart: give the one to use in column mpp of slides.tsv"
        )
    return slide.mpp


def _tissue_fractions(tissue: Tissue, x: np.ndarray, y: np.ndarray, side: int) -> np.ndarray:
    """Share of tissue of every square, mask pixels that its border cuts counting in part; float64 (rows, columns)."""
    sums = np.pad(tissue.mask.astype(np.float64).cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    across = _between(sums, (x + side) / tissue.downsample) - _between(sums, x / tissue.downsample)
    squares = _between(across.T, (y + side) / tissue.downsample) - _between(across.T, y / tissue.downsample)
    return np.clip(squares.T / (side / tissue.downsample) ** 2, 0, 1)


def _between(sums: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Columns of running sums at fractional places; linear in between, which is exact for sums of whole pixels."""
    places = np.minimum(places, sums.shape[1] - 1)
    before = np.minimum(places.astype(int), sums.shape[1] - 2)
    share = places - before
    return sums[:, before] * (1 - share) + sums[:, before + 1] * share
