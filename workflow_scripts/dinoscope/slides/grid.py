"""Where the tiles lie: a grid at exactly the requested micrometres a pixel, whatever levels the slide has.

Coordinates and sizes are level-0 pixels, x before y, unless their name says otherwise.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from dinoscope.errors import ConfigError, SlideError
from dinoscope.slides.quality import NO_LIMITS, SHARES, QualityLimits, QualityMaps
from dinoscope.slides.reader import Slide
from dinoscope.slides.resample import square_shares
from dinoscope.slides.tissue import Tissue

__all__ = [
    "EDGES",
    "MAX_UPSAMPLE",
    "Grid",
    "Reading",
    "TileSet",
    "default_min_tissue",
    "drop_blurred",
    "make_grid",
    "plan_reading",
]

MAX_UPSAMPLE = 1.05
EDGES = ("drop", "shift", "pad")
_MAX_TILE_PX = 2**15 - 1
_MAX_ANISOTROPY = 0.01
_LEVEL_TOLERANCE = 1.001  # levels are rounded to whole pixels: 4.0003 is meant to be 4
_LEAST_CELL_UM2 = 30.0
_PLACES = 4  # a side, looked at in a tile to tell its section


@dataclass(frozen=True)
class TileSet:
    """One set of tiles that is wanted of every slide.

    Attributes:
        name: Of the set, e.g. "train".
        tile_px: Side of a tile in pixels at `mpp`.
        mpp: Micrometres a pixel of a tile; several for a mix of resolutions, a grid each.
        min_tissue: Least share of tissue, 0 to 1, for a tile to be kept; None for `default_min_tissue` of the method.
        stride_px: Distance of neighbouring tiles in pixels at `mpp`; `tile_px` (no overlap, no gap) when None.
        edge: What becomes of the strip at the right and lower edge that holds no whole step of the grid. "drop" leaves
            it out, "shift" moves a last row and column of tiles inwards until they end at the edge, "pad" lets them
            reach over it, where they are white (or what the slide says is its background).
        max_upsample: How many times a slide's finest level may be enlarged.

    Raises:
        ConfigError: There can be no such tiles.
    """

    name: str
    tile_px: int
    mpp: float | tuple[float, ...]
    min_tissue: float | None = None
    stride_px: int | None = None
    edge: str = "drop"
    max_upsample: float = MAX_UPSAMPLE

    def __post_init__(self) -> None:
        assert self.edge in EDGES
        wanted = f"tile set {self.name} has tiles of {self.tile_px} px at mpp {self.mpp_text}"
        if not (0 < self.tile_px <= _MAX_TILE_PX and self.mpps and min(self.mpps) > 0):
            raise ConfigError(f"{wanted}: wanted 1 to {_MAX_TILE_PX} px and an mpp above 0")
        if len(set(self.mpps)) < len(self.mpps):
            raise ConfigError(f"{wanted}: give each mpp once")

    @property
    def mpps(self) -> tuple[float, ...]:
        """All micrometres a pixel that are wanted."""
        return self.mpp if isinstance(self.mpp, tuple) else (self.mpp,)

    @property
    def mpp_text(self) -> str:
        """The same in words."""
        return ", ".join(f"{mpp:g}" for mpp in self.mpps)

    def single(self) -> Iterator["TileSet"]:
        """The set at each of its resolutions."""
        return (replace(self, mpp=mpp) for mpp in self.mpps)


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
    """The tiles of one set, at one resolution, on one slide.

    Attributes:
        tile_set: What was asked for; one mpp.
        reading: How they are read.
        min_tissue: Least share of tissue of those that are kept.
        x, y: Top-left corners of the kept tiles in raster order; int32.
        tissue_fraction: Share of tissue of the kept tiles; float32.
        section: Connected piece of tissue that each kept tile lies on (`Tissue.sections`), 0 for none; int32.
        quality: `white_fraction` and so on, and `focus`, of the kept tiles, float32; empty where nothing was measured.
        dropped: Why -> (x, y) of the tiles that hold tissue and were left out, int32 (number, 2).
        num_candidates: Number of tiles that fit on the slide.
    """

    tile_set: TileSet
    reading: Reading
    min_tissue: float
    x: np.ndarray
    y: np.ndarray
    tissue_fraction: np.ndarray
    section: np.ndarray
    num_candidates: int
    quality: dict[str, np.ndarray] = field(default_factory=dict)
    dropped: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.x)


def default_min_tissue(method: str, tile_set: TileSet) -> float:
    """Least share of tissue for a tile: half; of fluorescence a quarter; of a smear 30 um2 of cells, a third of one.

    A share of the tile would lose single small cells in large tiles.
    """
    if method == "cytology":
        return min(1.0, _LEAST_CELL_UM2 / (tile_set.tile_px * tile_set.mpp) ** 2)
    return {"fluorescence": 0.25, "none": 0.0}.get(method, 0.5)


def plan_reading(slide: Slide, tile_set: TileSet) -> Reading:
    """Decides what to read of a slide for the tiles of a set.

    Raises:
        SlideError: The slide is too coarse or too small for such tiles, or its pixels are not square.
    """
    name = f"slide {slide.slide_id!r}, tile set {tile_set.name}"
    mpp = _square_mpp(slide)
    upsample = mpp / tile_set.mpp
    if upsample > tile_set.max_upsample * (1 + 1e-9):
        raise SlideError(
            f"{name}: tiles at mpp {tile_set.mpp:g} would have to be enlarged {upsample:.3g} times, since the slide "
            f"has only mpp {mpp:.4g} (at most {tile_set.max_upsample:g} times is allowed): ask for a coarser mpp, "
            "raise max_upsample or leave the slide out"
        )
    footprint_px = round(tile_set.tile_px * tile_set.mpp / mpp)
    if footprint_px > min(slide.width, slide.height) and tile_set.edge != "pad":
        raise SlideError(
            f"{name}: a tile of {tile_set.tile_px} px at mpp {tile_set.mpp:g} covers {footprint_px} x {footprint_px} "
            f"pixels and the slide has only {slide.width} x {slide.height} (mpp {mpp:.4g}): ask for smaller tiles, "
            "correct the mpp, set edge to pad or leave the slide out"
        )
    shrink = footprint_px / tile_set.tile_px
    fine_enough = [level for level, step in enumerate(slide.level_downsamples) if step <= shrink * _LEVEL_TOLERANCE]
    level = max(fine_enough, default=0)
    stride_px = max(1, round((tile_set.stride_px or tile_set.tile_px) * tile_set.mpp / mpp))
    return Reading(level, round(footprint_px / slide.level_downsamples[level]), footprint_px, stride_px)


def make_grid(
    slide: Slide,
    tissue: Tissue,
    tile_set: TileSet,
    maps: QualityMaps | None = None,
    limits: QualityLimits = NO_LIMITS,
) -> Grid:
    """Lays a grid of tiles over the slide and keeps those with enough tissue; only with edge "pad" do they leave it.

    Args:
        slide: The slide.
        tissue: Its tissue.
        tile_set: What is wanted, at one mpp.
        maps: What the quality is measured on; None, it is not.
        limits: What tiles may be like; that of focus counts in `drop_blurred`.

    Raises:
        SlideError: As `plan_reading`.
    """
    reading = plan_reading(slide, tile_set)
    side = reading.footprint_px
    min_tissue = default_min_tissue(tissue.method, tile_set) if tile_set.min_tissue is None else tile_set.min_tissue
    columns, rows = (_starts(length, reading, tile_set.edge) for length in (slide.width, slide.height))
    fraction = square_shares(tissue.sums, tissue.downsample, columns, rows, side)
    shares = {name: maps.shares(name, columns, rows, side) for name in SHARES} if maps is not None else {}
    keep = fraction >= min_tissue
    dropped = {"tissue": (fraction > 0) & ~keep}
    for name, share in shares.items():
        most = limits.most(name)
        if most is not None:
            dropped[name] = keep & (share > most)
            keep &= share <= most
    row, column = np.nonzero(keep)
    x, y = columns[column].astype(np.int32), rows[row].astype(np.int32)
    return Grid(
        tile_set=tile_set,
        reading=reading,
        min_tissue=min_tissue,
        x=x,
        y=y,
        tissue_fraction=fraction[row, column].astype(np.float32),
        section=_sections(tissue, x, y, side),
        num_candidates=fraction.size,
        quality={f"{name}_fraction": share[row, column].astype(np.float32) for name, share in shares.items()},
        dropped={reason: _corners(where, columns, rows) for reason, where in dropped.items() if where.any()},
    )


def drop_blurred(grid: Grid, focus: np.ndarray, min_focus: float | None) -> Grid:
    """The grid with the focus of its tiles (in their order), without those that have less than `min_focus`."""
    keep = np.ones(len(grid), bool) if min_focus is None else focus >= min_focus
    dropped = dict(grid.dropped)
    if not keep.all():
        dropped["focus"] = np.stack([grid.x[~keep], grid.y[~keep]], axis=1)
    quality = grid.quality | {"focus": focus.astype(np.float32)}
    columns = {name: getattr(grid, name)[keep] for name in ("x", "y", "tissue_fraction", "section")}
    return replace(grid, **columns, quality={name: each[keep] for name, each in quality.items()}, dropped=dropped)


def _starts(length: int, reading: Reading, edge: str) -> np.ndarray:
    """Where tiles begin along a side of the slide."""
    last = length - reading.footprint_px
    starts = np.arange(0, last + 1, reading.stride_px)
    following = len(starts) * reading.stride_px
    covered = starts[-1] + reading.footprint_px if len(starts) else 0
    if edge == "drop" or covered >= length or following >= length:
        return starts
    return np.append(starts, last if edge == "shift" else following)


def _corners(where: np.ndarray, columns: np.ndarray, rows: np.ndarray) -> np.ndarray:
    row, column = np.nonzero(where)
    return np.stack([columns[column], rows[row]], axis=1).astype(np.int32)


def _sections(tissue: Tissue, x: np.ndarray, y: np.ndarray, side: int) -> np.ndarray:
    """The piece of tissue that holds most of 4 x 4 places of each tile; where all miss, the largest inside."""
    inside = (np.arange(_PLACES) + 0.5) * side / _PLACES
    height, width = tissue.mask.shape
    rows, columns = (
        np.minimum((start[:, None] + inside) / tissue.downsample, length - 1).astype(np.intp)
        for start, length in ((y, height), (x, width))
    )
    found = tissue.sections.ravel().take((rows * width)[:, :, None] + columns[:, None, :]).reshape(len(x), _PLACES**2)
    section = found.max(axis=1, initial=0)
    several = np.flatnonzero(((found != section[:, None]) & (found > 0)).any(axis=1))
    for tile in several:
        section[tile] = _most_frequent(found[tile])
    step = math.ceil(side / tissue.downsample) + 1
    for tile in np.flatnonzero(section == 0):
        top, left = int(y[tile] / tissue.downsample), int(x[tile] / tissue.downsample)
        section[tile] = _most_frequent(tissue.sections[top : top + step, left : left + step])
    return section


def _most_frequent(labels: np.ndarray) -> int:
    counts = np.bincount(labels.ravel())
    return int(counts[1:].argmax()) + 1 if len(counts) > 1 else 0


def _square_mpp(slide: Slide) -> float:
    if abs(slide.mpp_x - slide.mpp_y) > _MAX_ANISOTROPY * slide.mpp:
        raise SlideError(
            f"slide {slide.slide_id!r} has mpp {slide.mpp_x:.4g} horizontally and {slide.mpp_y:.4g} vertically, more "
            "than 1 % apart: give the one to use in column mpp of slides.tsv"
        )
    return slide.mpp
