"""Samples of the slides' tiles, a file a slide: what changed copies are made of where slides are asked about.

Tiles are kept as PNG, so that all models see the same pixels at whatever time they are asked.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from dinoscope.arrays import damage_named, document_in, document_of, read_arrays, write_arrays
from dinoscope.errors import FeaturesError

__all__ = ["SampledTiles", "write_sample"]


def write_sample(path: Path, slide_id: str, tile_px: int, rows: Sequence[int], tiles: Iterable[np.ndarray]) -> None:
    """Writes the sample of one slide, by rename.

    Args:
        path: The .npz.
        slide_id: Name of the slide.
        tile_px: Side of its tiles.
        rows: Of the slide's tile manifest.
        tiles: uint8 RGB (tile_px, tile_px, 3), one a row.
    """
    streams = [cv2.imencode(".png", cv2.cvtColor(tile, cv2.COLOR_RGB2BGR))[1].ravel() for tile in tiles]
    ends = np.cumsum([len(stream) for stream in streams], dtype=np.int64)
    about = {"slide_id": slide_id, "tile_px": tile_px, "rows": [int(row) for row in rows]}
    pixels = np.concatenate([np.zeros(0, np.uint8), *streams])
    write_arrays(path, about=document_in(about), ends=ends, streams=pixels)


@dataclass(frozen=True)
class _Sample:
    slide_id: str
    tile_px: int
    rows: list[int]
    ends: np.ndarray
    streams: np.ndarray


class SampledTiles:
    """The tiles of many samples by number, one slide after the other; of one slide at a time in memory.

    Attributes:
        name: Of all of them, for messages.
        files: (N,) slide and row of the manifest, SLIDE/ROW.
        slides: (N,) slide of each.
        tile_px: Side of all.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        """Takes the files, one a slide.

        Raises:
            FeaturesError: One is missing or damaged, all are empty, or their tiles differ in size.
        """
        self.name = "sampled tiles of slides"
        self._paths: list[Path] = []
        self.files: list[str] = []
        self.slides: list[str] = []
        self._places: list[tuple[int, int]] = []
        self._read: tuple[int, _Sample] | None = None
        sides = set()
        for path in paths:
            sample = _read(path)
            self._places += [(len(self._paths), place) for place in range(len(sample.rows))]
            self.files += [f"{sample.slide_id}/{row}" for row in sample.rows]
            self.slides += [sample.slide_id] * len(sample.rows)
            self._paths.append(path)
            sides |= {sample.tile_px} if sample.rows else set()
        if len(sides) != 1:
            what = f"tiles of {', '.join(map(str, sorted(sides)))} px" if sides else "no tile at all"
            raise FeaturesError(f"the samples of {len(paths)} slides hold {what}, but must be of one tile set")
        (self.tile_px,) = sides

    def __len__(self) -> int:
        return len(self.files)

    def pixels(self, index: int) -> np.ndarray:
        """A tile, uint8 RGB (tile_px, tile_px, 3)."""
        number, place = self._places[index]
        if self._read is None or self._read[0] != number:
            self._read = number, _read(self._paths[number])
        sample = self._read[1]
        stream = sample.streams[sample.ends[place - 1] if place else 0 : sample.ends[place]]
        return cv2.cvtColor(cv2.imdecode(stream, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def _read(path: Path) -> _Sample:
    with damage_named(path, "sample of a slide's tiles", "delete it and sample again"):
        arrays = read_arrays(path)
        return _Sample(**document_of(arrays["about"]), ends=arrays["ends"], streams=arrays["streams"])
