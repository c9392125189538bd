"""Overlapping tiles of logits to one class a pixel, row of tiles by row of tiles, for maps of any height.

Where tiles overlap, their logits are averaged by the weights of inference.py. What is not finished yet lies in a file:
memory does not grow with the number of classes.
"""

from pathlib import Path

import numpy as np

from dinoscope.segment.class_map import array_on_disk

__all__ = ["RowBlender"]

_CHUNK_PX = 4096  # columns that are decided at once


class RowBlender:
    """Sums weighted logits of a band of the map and decides the rows that no further tile reaches.

    Args:
        num_classes: C.
        tile_px: Height of the band.
        width: Of the map in pixels; at least `tile_px`.
        scratch: A folder for the band's file.
    """

    def __init__(self, num_classes: int, tile_px: int, width: int, scratch: Path) -> None:
        self._tile_px, self._width = tile_px, width
        self._sums = array_on_disk(scratch / "logits", np.float32, (num_classes, tile_px, width))
        self._covered = np.zeros((tile_px, width), bool)
        self.top = 0

    def add(self, left: int, weighted_logits: np.ndarray) -> None:
        """Adds a tile whose upper left corner is at (`left`, `top`); float32 (C, tile_px, tile_px)."""
        columns = slice(left, left + self._tile_px)
        self._sums[:, :, columns] += weighted_logits
        self._covered[:, columns] = True

    def move_to(self, top: int, unknown: int) -> np.ndarray:
        """Moves the band down and returns the classes of the rows that it leaves.

        Args:
            top: The first row of the next tiles; to finish, the band's end.
            unknown: Class of pixels that no tile covered.

        Returns:
            uint8 (rows, width): rows `self.top`, as it was before, to at most a band's height.
        """
        count = min(top - self.top, self._tile_px)
        classes = np.full((count, self._width), unknown, np.uint8)
        for left in range(0, self._width, _CHUNK_PX):
            columns = slice(left, left + _CHUNK_PX)
            if not self._covered[:, columns].any():
                continue
            np.copyto(classes[:, columns], self._best(count, columns), where=self._covered[:count, columns])
            for of_class in self._sums:
                of_class[: self._tile_px - count, columns] = of_class[count:, columns].copy()
                of_class[self._tile_px - count :, columns] = 0
        self._covered[: self._tile_px - count] = self._covered[count:].copy()
        self._covered[self._tile_px - count :] = False
        self.top = top
        return classes

    def _best(self, count: int, columns: slice) -> np.ndarray:
        """The class with the largest sum in the first rows; class by class, because argmax would copy all of them."""
        most = self._sums[0, :count, columns].copy()
        best = np.zeros(most.shape, np.uint8)
        for index, of_class in enumerate(self._sums[1:], start=1):
            best[of_class[:count, columns] > most] = index
            np.maximum(most, of_class[:count, columns], out=most)
        return best
