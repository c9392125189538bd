"""The directories of a TIFF file: how large its images are and where their tiles lie, in a few reads.

Classic TIFF and BigTIFF, either byte order. Only the tags that reading tiles takes are looked at.
"""

import os
import struct
from dataclasses import dataclass

import numpy as np

__all__ = ["TiledImage", "tiled_images"]

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 256, 257, 258, 259, 262
_SAMPLES, _PLANAR, _TILE_WIDTH, _TILE_HEIGHT, _OFFSETS, _SIZES, _JPEG_TABLES = 277, 284, 322, 323, 324, 325, 347
_PREDICTOR = 317
_NEEDED = (_WIDTH, _HEIGHT, _COMPRESSION, _PHOTOMETRIC, _TILE_WIDTH, _TILE_HEIGHT, _OFFSETS, _SIZES)
_TAGS = frozenset((*_NEEDED, _BITS, _SAMPLES, _PLANAR, _JPEG_TABLES, _PREDICTOR))
_CODES = {1: "u1", 3: "u2", 4: "u4", 7: "u1", 16: "u8"}  # BYTE, SHORT, LONG, UNDEFINED, LONG8
_MAX_DIRECTORIES = 1000
_MAX_VALUES_BYTES = 1 << 27  # of one tag; more is damage, or a slide of 16 million tiles


@dataclass(frozen=True)
class TiledImage:
    """One image of a file, cut into tiles of three interleaved 8-bit samples.

    Attributes:
        width, height: Pixels of the image.
        tile_width, tile_height: Pixels of every tile, those at the edges included.
        compression, photometric: The numbers that TIFF gives them.
        offsets, sizes: Of every tile in raster order, bytes from the start of the file and bytes; size 0 is no tile.
        tables: JPEG tables that all tiles share, or None.
        predictor: How samples follow from their neighbours, the number that TIFF gives it; 1 is not at all.
    """

    width: int
    height: int
    tile_width: int
    tile_height: int
    compression: int
    photometric: int
    offsets: np.ndarray
    sizes: np.ndarray
    tables: bytes | None
    predictor: int = 1

    @property
    def columns(self) -> int:
        """Number of tiles side by side."""
        return -(-self.width // self.tile_width)


def tiled_images(file: int) -> list[TiledImage]:
    """All tiled images of three interleaved 8-bit samples in a TIFF file.

    Args:
        file: An open file descriptor; its position is not used.

    Returns:
        In the order of the file. What cannot be made sense of is left out; a file that is no TIFF has none.
    """
    try:
        images = [_image(tags) for tags in _Directories(file)]
    except (struct.error, ValueError, KeyError, OSError):
        return []
    return [image for image in images if image is not None]


class _Directories:
    """Iterates over a file's directories, each as {tag: values}."""

    def __init__(self, file: int) -> None:
        self._file, self._length = file, os.fstat(file).st_size
        head = self._bytes(0, 16)
        self._order = {b"II": "<", b"MM": ">"}[head[:2]]
        (magic,) = struct.unpack(self._order + "H", head[2:4])
        self._big = {42: False, 43: True}[magic]
        first = head[8:16] if self._big else head[4:8]
        self._pointer, self._count, self._entry = ("Q", "Q", "HHQ8s") if self._big else ("I", "H", "HHI4s")
        (self._first,) = struct.unpack(self._order + self._pointer, first)

    def __iter__(self):
        position, seen = self._first, set()
        while position and position not in seen and len(seen) < _MAX_DIRECTORIES:
            seen.add(position)
            tags, position = self._directory(position)
            yield tags

    def _directory(self, position: int) -> tuple[dict[int, np.ndarray], int]:
        head, pointer, entry = (struct.Struct(self._order + code) for code in (self._count, self._pointer, self._entry))
        (count,) = head.unpack(self._bytes(position, head.size))
        start, length = position + head.size, count * entry.size
        data = self._bytes(start, length + pointer.size)
        tags = {}
        for tag, kind, number, value in entry.iter_unpack(data[:length]):
            if tag in _TAGS and kind in _CODES:
                tags[tag] = self._values(np.dtype(self._order + _CODES[kind]), number, value)
        return tags, pointer.unpack(data[length:])[0]

    def _values(self, dtype: np.dtype, number: int, value: bytes) -> np.ndarray:
        length = number * dtype.itemsize
        if length > len(value):
            value = self._bytes(*struct.unpack(self._order + self._pointer, value), length)
        return np.frombuffer(value, dtype, number)

    def _bytes(self, position: int, length: int) -> bytes:
        if position + length > self._length or length > _MAX_VALUES_BYTES:
            raise ValueError("a TIFF directory reaches over the end of the file")
        return os.pread(self._file, length, position)


def _image(tags: dict[int, np.ndarray]) -> TiledImage | None:
    if not all(tag in tags and len(tags[tag]) for tag in _NEEDED):
        return None
    interleaved = tags.get(_PLANAR, [1])[0] == 1 and tags.get(_SAMPLES, [1])[0] == 3
    if not interleaved or list(tags.get(_BITS, [1])) != [8, 8, 8]:
        return None
    width, height, compression, photometric, tile_width, tile_height = (int(tags[tag][0]) for tag in _NEEDED[:6])
    if not (tile_width and tile_height):
        return None
    num_tiles = -(-width // tile_width) * -(-height // tile_height)
    if not num_tiles == len(tags[_OFFSETS]) == len(tags[_SIZES]):
        return None
    tables = tags[_JPEG_TABLES].tobytes() if _JPEG_TABLES in tags else None
    return TiledImage(
        width,
        height,
        tile_width,
        tile_height,
        compression,
        photometric,
        tags[_OFFSETS],
        tags[_SIZES],
        tables,
        int(tags.get(_PREDICTOR, [1])[0]),
    )
