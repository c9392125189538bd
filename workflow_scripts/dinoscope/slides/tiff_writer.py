"""Writes pyramidal, tiled JPEG TIFFs that OpenSlide opens (vendor generic-tiff)."""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import tifffile

__all__ = ["encode_tiles", "write_pyramid"]


def encode_tiles(image: np.ndarray, tile_px: int = 256, quality: int = 85) -> Iterator[bytes]:
    """Cuts an RGB image into tiles in raster order and yields each as a JPEG with full chroma (4:4:4).

    Tiles that reach over the right or lower edge repeat the last column or row, which keeps ringing out of the image.
    """
    height, width = image.shape[:2]
    for top, left in itertools.product(range(0, height, tile_px), range(0, width, tile_px)):
        tile = image[top : top + tile_px, left : left + tile_px]
        missing = (tile_px - tile.shape[0], tile_px - tile.shape[1])
        tile = cv2.copyMakeBorder(tile, 0, missing[0], 0, missing[1], cv2.BORDER_REPLICATE)
        yield imagecodecs.jpeg8_encode(tile, level=quality, subsampling="444")


def write_pyramid(
    path: str | Path, levels: Iterable[tuple[int, int, Iterable[bytes]]], mpp: float, tile_px: int = 256
) -> None:
    """Writes the levels, finest first, with resolution tags in pixels a centimetre.

    Args:
        path: File to write.
        levels: Of each level its width, height and JPEG tiles in raster order (`encode_tiles`).
        mpp: Micrometres a pixel of the first level.
        tile_px: Side of the tiles, a multiple of 16.
    """
    with tifffile.TiffWriter(path) as writer:
        for number, (width, height, tiles) in enumerate(levels):
            if number == 0:
                first_width = width
            pixels_per_cm = (round(1e7 / mpp * width / first_width), 1000)
            writer.write(
                iter(tiles),
                shape=(height, width, 3),
                dtype=np.uint8,
                tile=(tile_px, tile_px),
                compression="jpeg",
                photometric="ycbcr",
                subsampling=(1, 1),
                subfiletype=min(number, 1),  # a reduced-resolution copy: what makes OpenSlide see a level
                resolution=(pixels_per_cm, pixels_per_cm),
                resolutionunit="CENTIMETER",
                metadata=None,
                software=False,
            )
