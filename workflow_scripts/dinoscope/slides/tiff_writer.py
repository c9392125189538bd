"""Writes pyramidal, tiled JPEG TIFFs that OpenSlide opens (vendor generic-tiff).

Classic little-endian TIFF 6.0, one image file directory a level, each tile a complete JPEG stream (compression 7).
"""

import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np

__all__ = ["encode_tiles", "write_pyramid"]

_SHORT, _LONG, _RATIONAL = 3, 4, 5
_STRUCT_CODE = {_SHORT: "H", _LONG: "I", _RATIONAL: "II"}
_CENTIMETRE = 3
_JPEG, _YCBCR = 7, 6


def encode_tiles(image: np.ndarray, tile_px: int = 256, quality: int = 85) -> Iterator[bytes]:
    """Cuts an RGB image into tiles in raster order and yields each as a JPEG with full chroma (4:4:4).

    Tiles that reach over the right or lower edge repeat the last column or row, which keeps ringing out of the image.
    """
    height, width = image.shape[:2]
    options = [
        cv2.IMWRITE_JPEG_QUALITY,
        quality,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    ]
    for top in range(0, height, tile_px):
        for left in range(0, width, tile_px):
            tile = image[top : top + tile_px, left : left + tile_px]
            missing = (tile_px - tile.shape[0], tile_px - tile.shape[1])
            if any(missing):
                tile = cv2.copyMakeBorder(tile, 0, missing[0], 0, missing[1], cv2.BORDER_REPLICATE)
            done, stream = cv2.imencode(".jpg", cv2.cvtColor(tile, cv2.COLOR_RGB2BGR), options)
            assert done
            yield stream.tobytes()


def write_pyramid(
    path: str | Path, levels: Iterable[tuple[int, int, Iterable[bytes]]], mpp: float, tile_px: int = 256
) -> None:
    """Writes the levels, finest first, with resolution tags in pixels a centimetre.

    Args:
        path: File to write.
        levels: Of each level its width, height and JPEG tiles in raster order (`encode_tiles`).
        mpp: Micrometres a pixel of the first level.
        tile_px: Side of the tiles, a multiple of 16.

    Raises:
        ValueError: The file would exceed the 4 GiB of a classic TIFF.
    """
    with open(path, "wb") as file:
        file.write(struct.pack("<2sHI", b"II", 42, 0))
        directories = []
        for number, (width, height, tiles) in enumerate(levels):
            if number == 0:
                first_width = width
            offsets, sizes = _write_tiles(file, tiles)
            assert len(offsets) == math.ceil(width / tile_px) * math.ceil(height / tile_px)
            pixels_per_cm = 1e4 / mpp * width / first_width
            directories.append(_tags(number, width, height, tile_px, pixels_per_cm, offsets, sizes))
        pointer = 4
        for tags in directories:
            pointer = _write_directory(file, tags, pointer)


def _write_tiles(file: BinaryIO, tiles: Iterable[bytes]) -> tuple[list[int], list[int]]:
    offsets, sizes = [], []
    for stream in tiles:
        if file.tell() + len(stream) >= 2**32 - 2**20:
            raise ValueError(f"{file.name} would be larger than a classic TIFF can be (4 GiB)")
        offsets.append(file.tell())
        sizes.append(len(stream))
        file.write(stream + b"\0" * (len(stream) % 2))
    return offsets, sizes


def _tags(
    number: int,
    width: int,
    height: int,
    tile_px: int,
    pixels_per_cm: float,
    offsets: Sequence[int],
    sizes: Sequence[int],
) -> list[tuple[int, int, Sequence[int]]]:
    resolution = (round(pixels_per_cm * 1000), 1000)
    return [
        (254, _LONG, [0 if number == 0 else 1]),  # a reduced-resolution copy: what makes OpenSlide see a level
        (256, _LONG, [width]),
        (257, _LONG, [height]),
        (258, _SHORT, [8, 8, 8]),
        (259, _SHORT, [_JPEG]),
        (262, _SHORT, [_YCBCR]),
        (277, _SHORT, [3]),
        (282, _RATIONAL, resolution),
        (283, _RATIONAL, resolution),
        (284, _SHORT, [1]),
        (296, _SHORT, [_CENTIMETRE]),
        (322, _LONG, [tile_px]),
        (323, _LONG, [tile_px]),
        (324, _LONG, offsets),
        (325, _LONG, sizes),
        (530, _SHORT, [1, 1]),
    ]


def _write_directory(file: BinaryIO, tags: list[tuple[int, int, Sequence[int]]], pointer: int) -> int:
    """Appends one directory, stores its position at `pointer`, and returns where the next one's position goes."""
    entries = []
    for tag, kind, values in tags:
        count = len(values) // len(_STRUCT_CODE[kind])
        data = struct.pack(f"<{len(values)}{_STRUCT_CODE[kind][0]}", *values)
        if len(data) > 4:
            position = file.tell()
            file.write(data)
            data = struct.pack("<I", position)
        entries.append(struct.pack("<HHI", tag, kind, count) + data.ljust(4, b"\0"))
    start = file.tell()
    file.write(struct.pack("<H", len(entries)) + b"".join(entries) + struct.pack("<I", 0))
    end = file.tell()
    file.seek(pointer)
    file.write(struct.pack("<I", start))
    file.seek(end)
    return end - 4
