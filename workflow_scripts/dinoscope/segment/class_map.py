"""A map of classes, one a pixel, as a pyramid that OpenSlide, QuPath and tifffile open.

The TIFF holds class indices, 255 for places that were not looked at, with a palette: a viewer shows the classes in
their colours, and whoever reads the samples (tifffile) has the indices. Coarser levels take the most frequent class of
each 2 x 2 pixels. What the indices mean stands as JSON in the ImageDescription.
"""

import itertools
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile

from dinoscope.errors import DinoscopeError
from dinoscope.files import atomic_path, writing

__all__ = ["UNKNOWN", "ClassMap", "array_on_disk", "half_size", "write_class_map"]

UNKNOWN = 255
_TILE_PX, _ROWS, _COARSEST_PX = 256, 256, 1024
_CLASSIC_LIMIT = 2**31  # bytes of samples; files that may come near 4 GB are written as BigTIFF


@dataclass(frozen=True)
class ClassMap:
    """The levels of a map, finest first.

    Attributes:
        levels: uint8 (height, width) each, in memory or mapped from files.
        mpp: Micrometres a pixel of the first level.
        downsample: Level-0 pixels of the slide a pixel of the first level.
        classes: Names, in the order of the indices.
        palette: RGB of each.
    """

    levels: Sequence[np.ndarray]
    mpp: float
    downsample: float
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]

    @classmethod
    def with_levels(
        cls,
        finest: np.ndarray,
        scratch: Path,
        *,
        mpp: float,
        downsample: float,
        classes: Sequence[str],
        palette: Sequence[tuple[int, int, int]],
    ) -> "ClassMap":
        """Makes the coarser levels, each in a file of `scratch`, until the longer side has at most 1024 px."""
        levels = [finest]
        while max(levels[-1].shape) > _COARSEST_PX:
            shape = tuple(-(-side // 2) for side in levels[-1].shape)
            coarser = array_on_disk(scratch / f"level_{len(levels)}", np.uint8, shape)
            for top in range(0, shape[0], _ROWS):
                coarser[top : top + _ROWS] = half_size(levels[-1][2 * top : 2 * (top + _ROWS)])
            levels.append(coarser)
        return cls(levels, mpp, downsample, tuple(classes), tuple(palette))

    def level_below(self, most_pixels: int) -> int:
        """The finest level of at most so many pixels, else the coarsest."""
        sizes = [level.size <= most_pixels for level in self.levels]
        return sizes.index(True) if any(sizes) else len(sizes) - 1

    def areas_mm2(self) -> dict[str, float]:
        """Area of each class in square millimetres, on the finest level."""
        counts = np.zeros(256, np.int64)
        for top in range(0, len(self.levels[0]), _ROWS):
            counts += np.bincount(self.levels[0][top : top + _ROWS].ravel(), minlength=256)
        return {name: float(counts[index]) * (self.mpp / 1000) ** 2 for index, name in enumerate(self.classes)}


def array_on_disk(path: Path, dtype: type[np.generic], shape: tuple[int, ...]) -> np.memmap:
    """A new array of zeros in a file, which can be larger than memory.

    Its space is taken at once: a disk that is full later would end the program with a bus error. The file has no name
    from then on, so that its space is free again when the array is gone, even if the program is killed.

    Args:
        path: The file; there must be none.
        dtype: Of the array.
        shape: Of the array.

    Raises:
        DinoscopeError: There is no space for it.
    """
    with writing(path, DinoscopeError), open(path, "x+b") as file:
        path.unlink()
        os.posix_fallocate(file.fileno(), 0, math.prod(shape) * np.dtype(dtype).itemsize)
        return np.memmap(file, dtype, "r+", shape=shape)


def half_size(classes: np.ndarray) -> np.ndarray:
    """The most frequent of each 2 x 2 pixels; of equally frequent ones the upper left. Odd sides repeat their last."""
    padded = np.pad(classes, [(0, side % 2) for side in classes.shape], mode="edge")
    a, b, c, d = (padded[row::2, column::2] for row in (0, 1) for column in (0, 1))
    a_repeats, b_repeats = (a == b) | (a == c) | (a == d), (b == c) | (b == d)
    return np.where(a_repeats, a, np.where(b_repeats, b, np.where(c == d, c, a)))


def write_class_map(path: str | Path, class_map: ClassMap) -> None:
    """Writes the pyramid, losslessly compressed, with resolution tags in pixels a centimetre; it appears by rename.

    Raises:
        DinoscopeError: It cannot be written.
    """
    about = {"classes": {str(index): name for index, name in enumerate(class_map.classes)}, "not_predicted": UNKNOWN}
    first = class_map.levels[0].shape[1]
    big = class_map.levels[0].size > _CLASSIC_LIMIT
    with (
        writing(path, DinoscopeError),
        atomic_path(path) as temporary,
        tifffile.TiffWriter(temporary, bigtiff=big) as writer,
    ):
        for number, level in enumerate(class_map.levels):
            pixels_per_cm = (round(1e7 / class_map.mpp * level.shape[1] / first), 1000)
            writer.write(
                _tiles(level),
                shape=level.shape,
                dtype=np.uint8,
                tile=(_TILE_PX, _TILE_PX),
                compression="adobe_deflate",
                photometric="palette",
                colormap=_colormap(class_map.palette),
                description=json.dumps(about) if number == 0 else None,
                subfiletype=min(number, 1),  # a reduced-resolution copy: what makes OpenSlide see a level
                resolution=(pixels_per_cm, pixels_per_cm),
                resolutionunit="CENTIMETER",
                metadata=None,
                software=False,
            )


def _tiles(level: np.ndarray) -> Iterator[np.ndarray]:
    """In raster order; those that reach over the right or lower edge are filled up with `UNKNOWN`."""
    height, width = level.shape
    for top, left in itertools.product(range(0, height, _TILE_PX), range(0, width, _TILE_PX)):
        tile = np.full((_TILE_PX, _TILE_PX), UNKNOWN, np.uint8)
        part = level[top : top + _TILE_PX, left : left + _TILE_PX]
        tile[: part.shape[0], : part.shape[1]] = part
        yield tile


def _colormap(palette: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """uint16 (3, 256); indices without a class are white."""
    colors = np.full((256, 3), 255, np.uint16)
    colors[: len(palette)] = np.reshape(palette, (-1, 3))
    return (colors * 257).T
