"""A slide as a pyramid of JPEG tiles, which a page that was opened from disk shows without a server.

SLIDE/pyramid.js            size, resolution and which tiles there are; written last
SLIDE/tiles/{z}/{x}_{y}.jpg squares of 512 px; at z = 0 one of them holds the whole slide, each z is twice as fine

A tile of the finest z covers a whole number of level-0 pixels (`footprint`), so that tile (x, y) of z begins exactly at
level-0 pixel (x, y) · footprint · 2^(finest − z). Tiles of one colour (bare glass) are left out. Coarser tiles are
means of finer ones, made on the way, so that the slide is read once and memory holds a few tiles only.
"""

import logging
import math
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from dinoscope.slides.reader import Slide
from dinoscope.slides.resample import resample_square
from dinoscope.visualize.viewer.scripts import write_script

__all__ = ["TILE_PX", "Layout", "plan_layout", "write_placeholder", "write_pyramid"]

log = logging.getLogger(__name__)

TILE_PX = 512
JPEG_QUALITY = 82
BLANK_RANGE = 10  # grey levels between the darkest and the brightest pixel of a tile that is left out


@dataclass(frozen=True)
class Layout:
    """Where the tiles of a pyramid lie.

    Attributes:
        width, height: Of the slide in level-0 pixels.
        footprint: Side of a tile of the finest z in level-0 pixels.
        finest: The largest z.
        level: Level of the slide that the finest tiles are read from.
    """

    width: int
    height: int
    footprint: int
    finest: int
    level: int

    def num_tiles(self, z: int) -> tuple[int, int]:
        """Columns and rows of tiles at a z."""
        side = self.footprint << (self.finest - z)
        return math.ceil(self.width / side), math.ceil(self.height / side)


def plan_layout(slide: Slide, mpp: float) -> Layout:
    """Lays out a pyramid.

    Args:
        slide: The slide.
        mpp: Micrometres a pixel of the finest tiles, at least the slide's own; met to 0.2 % or better.

    Raises:
        SlideError: The slide's own micrometres a pixel are unknown.
    """
    factor = max(1.0, mpp / slide.mpp)
    footprint = round(TILE_PX * factor)
    finest = math.ceil(math.log2(max(1.0, max(slide.width, slide.height) / footprint)))
    usable = [level for level, each in enumerate(slide.level_downsamples) if each <= factor * 1.001]
    return Layout(slide.width, slide.height, footprint, finest, max(usable, default=0))


def write_pyramid(slide: Slide, output: str | os.PathLike[str], mpp: float) -> None:
    """Writes the tiles of a slide and, last, the script that tells of them.

    Args:
        slide: The slide.
        output: The script, SLIDE/pyramid.js; the tiles go to the folder `tiles` beside it, whose old content goes.
        mpp: Micrometres a pixel of the finest tiles.

    Raises:
        SlideError: The slide cannot be read, or its micrometres a pixel are unknown.
    """
    output, started = Path(output), time.perf_counter()
    layout = plan_layout(slide, mpp)
    output.unlink(missing_ok=True)
    folder = output.parent / "tiles"
    partial = output.parent / f".tiles.{os.getpid()}.partial"
    for abandoned in output.parent.glob(".tiles.*.partial"):  # by a process that was killed
        shutil.rmtree(abandoned, ignore_errors=True)
    try:
        builder = _Builder(slide, layout, partial)
        builder.build(0, 0, 0)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    write_script(output, "pyramid", slide.slide_id, _description(slide, layout, builder))
    log.info(
        "slide %r: %d tiles, %.1f MB, %.2f um a pixel, in %.1f s",
        *(slide.slide_id, sum(map(len, builder.present)), builder.num_bytes / 1e6),
        *(slide.mpp * layout.footprint / TILE_PX, time.perf_counter() - started),
    )


def write_placeholder(output: str | os.PathLike[str], slide_id: str, problem: str) -> None:
    """Writes the script of a slide that cannot be read: the page then says why."""
    write_script(output, "pyramid", slide_id, {"problem": problem})


def _description(slide: Slide, layout: Layout, builder: "_Builder") -> dict[str, Any]:
    present = []
    for z in range(layout.finest + 1):
        columns, rows = layout.num_tiles(z)
        there = np.zeros((rows, columns), np.uint8)
        for x, y in builder.present[z]:
            there[y, x] = 1
        present.append("".join(map(str, there.ravel().tolist())))
    return {
        "width": layout.width,
        "height": layout.height,
        "mpp": round(slide.mpp, 6),
        "tile_px": TILE_PX,
        "footprint": layout.footprint,
        "present": present,  # for each z, row by row: 1 where there is a file
        "background": "#{:02x}{:02x}{:02x}".format(*builder.background()),
    }


@dataclass
class _Builder:
    """Makes tiles depth first: a tile is done as soon as the four below it are."""

    slide: Slide
    layout: Layout
    folder: Path
    present: list[list[tuple[int, int]]] = field(default_factory=list)
    num_bytes: int = 0
    blanks: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.present = [[] for _ in range(self.layout.finest + 1)]
        self.folder.mkdir(parents=True, exist_ok=True)
        for z in range(self.layout.finest + 1):
            (self.folder / str(z)).mkdir()

    def build(self, z: int, x: int, y: int) -> np.ndarray | None:
        """Makes tile (x, y) of a z and all below it; None where the slide has ended."""
        columns, rows = self.layout.num_tiles(z)
        if x >= columns or y >= rows:
            return None
        tile = self._read(x, y) if z == self.layout.finest else self._mean_of_four(z, x, y)
        self._save(tile, z, x, y)
        return tile

    def background(self) -> tuple[int, ...]:
        """Mean colour of the tiles that were left out; the slide's own where there are none."""
        return tuple(np.rint(np.median(self.blanks, axis=0)).astype(int)) if self.blanks else self.slide.background

    def _read(self, x: int, y: int) -> np.ndarray:
        """A finest tile; `Slide.read_tile` would move one that reaches far over the slide's edge inwards."""
        level, side = self.layout.level, self.layout.footprint
        downsample = self.slide.level_downsamples[level]
        spans = [_span(index * side / downsample, side / downsample, downsample) for index in (x, y)]
        (left, columns, from_x), (top, rows, from_y) = spans
        region = self.slide.read_region(left, top, level, columns, rows)
        tile = resample_square(region, from_x, from_y, side / downsample, TILE_PX, averages=level > 0)
        columns, rows = (self.layout.width - x * side), (self.layout.height - y * side)
        return _filled(tile, columns * TILE_PX // side, rows * TILE_PX // side)

    def _mean_of_four(self, z: int, x: int, y: int) -> np.ndarray:
        canvas = np.empty((2 * TILE_PX, 2 * TILE_PX, 3), np.uint8)
        columns = rows = 0
        for row in range(2):
            for column in range(2):
                tile = self.build(z + 1, 2 * x + column, 2 * y + row)
                if tile is not None:
                    top, left = row * TILE_PX, column * TILE_PX
                    canvas[top : top + TILE_PX, left : left + TILE_PX] = tile
                    columns, rows = max(columns, left + TILE_PX), max(rows, top + TILE_PX)
        _filled(canvas, columns, rows)
        return cv2.resize(canvas, (TILE_PX, TILE_PX), interpolation=cv2.INTER_AREA)

    def _save(self, tile: np.ndarray, z: int, x: int, y: int) -> None:
        if z and int(np.ptp(tile, axis=(0, 1)).max()) <= BLANK_RANGE:
            self.blanks.append(tile.mean(axis=(0, 1)))
            return
        data = cv2.imencode(".jpg", tile[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes()
        (self.folder / str(z) / f"{x}_{y}.jpg").write_bytes(data)
        self.present[z].append((x, y))
        self.num_bytes += len(data)


def _span(start: float, side: float, downsample: float) -> tuple[int, int, float]:
    """What to read for a level's pixels from `start` to `start + side`.

    Returns:
        First pixel in level-0 pixels, number of pixels, and where among them `start` is.
    """
    level0 = math.floor(math.floor(start + 1e-6) * downsample + 1e-6)
    begin = level0 / downsample
    return level0, math.ceil(start + side - begin - 1e-6), start - begin


def _filled(tile: np.ndarray, columns: int, rows: int) -> np.ndarray:
    """Repeats the last whole column and row of the slide to the end of a tile, so that glass stays of one colour."""
    columns, rows = max(columns, 1), max(rows, 1)
    tile[:, columns:] = tile[:, columns - 1 : columns]
    tile[rows:] = tile[rows - 1 : rows]
    return tile
