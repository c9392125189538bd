"""Reads the tiles of a slide in batches, ahead of whoever uses them."""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dinoscope.errors import ManifestError
from dinoscope.slides.manifest import read_metadata, read_tiles
from dinoscope.slides.padding import read_tile
from dinoscope.slides.reader import Slide

__all__ = ["BatchReader", "SlideTiles", "load_tiles", "read_ahead", "read_batches"]


@dataclass(frozen=True)
class SlideTiles:
    """The tiles of one slide: where each is read, and what all of them share.

    Attributes:
        slide_id: Name of the slide.
        x: (N,) level-0 pixels, as is y.
        level: (N,) pyramid level to read.
        read_px: (N,) side of the region to read, in pixels of that level.
        tile_px: Side of every tile after resampling.
        overlap_px: Overlap of neighbours, in the same pixels.
        mpp: Micrometres a pixel of every tile.
        footprint_px: Side of every tile in level-0 pixels.
        width: Of the slide, level-0 pixels.
        height: Likewise.
        level0_mpp: Micrometres a level-0 pixel.
        skipped: Why the slide was skipped when it was tiled; None if it was not. Its size is 0 x 0 then.
    """

    slide_id: str
    x: np.ndarray
    y: np.ndarray
    level: np.ndarray
    read_px: np.ndarray
    tile_px: int
    overlap_px: int
    mpp: float
    footprint_px: int
    width: int
    height: int
    level0_mpp: float
    skipped: str | None = None

    def __len__(self) -> int:
        return len(self.x)

    @property
    def coords(self) -> np.ndarray:
        """Top-left corners in level-0 pixels, (N, 2) int64, x before y."""
        return np.stack([self.x, self.y], axis=1).astype(np.int64)


def load_tiles(path: Path) -> SlideTiles:
    """Reads the tile manifest of one slide.

    Raises:
        ManifestError: It is missing or damaged, of several slides, or has several kinds of tiles.
    """
    table, metadata = read_tiles(path), read_metadata(path)
    slide_id = metadata.get("slide_id")
    if slide_id is None or set(table["slide_id"].unique().to_pylist()) - {slide_id}:
        raise ManifestError(f"{path} holds the tiles of several slides; give the one of this slide, of results/tiles")
    tile_px, mpp = metadata["tile_px"], metadata["requested_mpp"]
    if isinstance(mpp, list):
        raise ManifestError(
            f"{path}: tile set {metadata['tile_set']} mixes mpp {', '.join(map(str, mpp))}, but a feature file holds "
            "one kind; make a tile set of each"
        )
    skipped = metadata.get("error")
    level0_mpp = mpp if skipped else (metadata["mpp_x"] + metadata["mpp_y"]) / 2
    for name in ("tile_px", "mpp", "footprint_px"):
        values = sorted(table[name].unique().to_pylist())
        if len(values) > 1:
            raise ManifestError(
                f"{path}: tiles of slide {slide_id!r} differ in {name} ({', '.join(map(str, values))}), but a feature "
                "file holds one kind; make a tile set of each"
            )
    footprints = table["footprint_px"].unique().to_pylist()
    return SlideTiles(
        slide_id=slide_id,
        **{name: table[name].to_numpy() for name in ("x", "y", "level", "read_px")},
        tile_px=tile_px,
        overlap_px=max(0, tile_px - metadata["stride_px"]),
        mpp=mpp,
        footprint_px=footprints[0] if footprints else round(tile_px * mpp / level0_mpp),
        width=metadata["width"] or 0,
        height=metadata["height"] or 0,
        level0_mpp=level0_mpp,
        skipped=skipped,
    )


def read_batches(
    slide: Slide, tiles: SlideTiles, batch_size: int, workers: int, *, pin_memory: bool = False
) -> Iterator[tuple[slice, Tensor]]:
    """Yields the rows of each batch and its pixels, (B, tile_px, tile_px, 3) uint8, in manifest order.

    Threads do the reading: decoding and resampling release the interpreter lock, nothing is copied between processes,
    and no worker can outlive the program. At least one whole batch is read ahead, and never more than the threads
    can be busy with, so memory stays bounded whatever the number of tiles.

    Args:
        workers: Number of threads; 0 reads in the caller's thread.
        pin_memory: Page-locked batches, from which a GPU copies while it computes.
    """
    batches = [slice(start, min(start + batch_size, len(tiles))) for start in range(0, len(tiles), batch_size)]
    reader = _Reader(slide, tiles, pin_memory)
    if workers == 0:
        for rows in batches:
            yield rows, reader.read(rows)
    else:
        yield from read_ahead(reader, batches, workers, depth=1 + math.ceil(2 * workers / batch_size))


class BatchReader(Protocol):
    """Where `read_ahead` has its pixels from."""

    def empty(self, rows: slice) -> Tensor:
        """Room for the pixels of these rows."""
        ...

    def read_row(self, row: int, place: Tensor) -> None:
        """Fills the place of one row; called from several threads."""
        ...


@dataclass(frozen=True)
class _Reader:
    slide: Slide
    tiles: SlideTiles
    pin_memory: bool

    def empty(self, rows: slice) -> Tensor:
        shape = (rows.stop - rows.start, self.tiles.tile_px, self.tiles.tile_px, 3)
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self.pin_memory)

    def read_row(self, row: int, place: Tensor) -> None:
        tiles = self.tiles
        where = (int(column[row]) for column in (tiles.x, tiles.y, tiles.level, tiles.read_px))
        place.copy_(torch.from_numpy(read_tile(self.slide, *where, tiles.tile_px, tiles.footprint_px)))

    def read(self, rows: slice) -> Tensor:
        batch = self.empty(rows)
        for row, place in enumerate(batch, start=rows.start):
            self.read_row(row, place)
        return batch


def read_ahead(
    reader: BatchReader, batches: Sequence[slice], workers: int, depth: int
) -> Iterator[tuple[slice, Tensor]]:
    """Yields the rows of each batch and its pixels in order, while threads read up to `depth` further batches."""
    ahead: deque[tuple[slice, Tensor, list[Future]]] = deque()
    threads = ThreadPoolExecutor(workers, thread_name_prefix="read")
    try:
        for rows in batches:
            batch = reader.empty(rows)
            jobs = [
                threads.submit(reader.read_row, row, batch[row - rows.start]) for row in range(rows.start, rows.stop)
            ]
            ahead.append((rows, batch, jobs))
            if len(ahead) > depth:
                yield _wait(*ahead.popleft())
        while ahead:
            yield _wait(*ahead.popleft())
    finally:
        threads.shutdown(cancel_futures=True)


def _wait(rows: slice, batch: Tensor, jobs: list[Future]) -> tuple[slice, Tensor]:
    for job in jobs:
        job.result()
    return rows, batch
