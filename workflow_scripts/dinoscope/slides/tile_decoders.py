"""Decodes single tiles of a TIFF file to the RGB that OpenSlide makes of them: JPEG, and JPEG 2000 as of Aperio."""

import struct
from collections.abc import Callable

import cv2
import imagecodecs
import numpy as np

from dinoscope.slides.tiff_directory import TiledImage

__all__ = ["Decoder", "decoder"]

_JPEG, _APERIO_YCBCR, _APERIO_RGB = 7, 33003, 33005
_RGB, _YCBCR = 2, 6  # photometric
_MAX_TILE_PIXELS = 1 << 24

# how the header of a JPEG's baseline frame of 8-bit samples begins, and where its components say how they are sampled;
# the start of a scan of three components; the marker of restarts; the end
_FRAME, _SAMPLING = b"\xff\xc0\x00\x11\x08", (11, 14, 17)
_SCAN, _RESTARTS, _END = b"\xff\xda\x00\x0c\x03", b"\xff\xdd\x00\x04", b"\xff\xd9"
_BLOCK, _NO_DATA = 8, 128

Decoder = Callable[[bytes, TiledImage], np.ndarray | None]


def decoder(image: TiledImage) -> Decoder | None:
    """What makes uint8 (tile_height, tile_width, 3) of a tile, or None if it cannot; None for unknown kinds."""
    if image.tile_width * image.tile_height > _MAX_TILE_PIXELS:
        return None
    if image.compression == _JPEG and image.photometric in (_RGB, _YCBCR):
        return _decode_jpeg
    if image.compression == _APERIO_RGB:
        return _decode_jpeg2000
    if image.compression == _APERIO_YCBCR:
        return _decode_jpeg2000_ycbcr
    return None


def _decode_jpeg(stream: bytes, image: TiledImage) -> np.ndarray | None:
    """Decodes a JPEG. None also where its data end too early, of which libjpeg only warns, and nobody hears.

    It fills what is missing with the grey of no data, which shows in the last block unless the data end within that.
    Where the picture stays the same (no averaging of chroma over rows), the tile is therefore said to be one row of
    blocks higher than it is: the first of these blocks is grey only if data were missing before it.
    """
    if stream.rfind(_END) < 0:
        return None
    # what the directory says of the colours counts, whatever the stream's own markers say (as for OpenSlide)
    colours = "RGB" if image.photometric == _RGB else "YCBCR"
    longer = _one_block_higher(stream, image)
    extra = _BLOCK if longer else 0
    tile = np.empty((image.tile_height + extra, image.tile_width, 3), np.uint8)
    try:
        imagecodecs.jpeg8_decode(
            longer or stream, tables=image.tables, colorspace=colours, outcolorspace="RGB", out=tile
        )
    except (imagecodecs.Jpeg8Error, ValueError):
        return None
    last = tile[-_BLOCK:, :_BLOCK] if longer else tile[-_BLOCK:, -_BLOCK:]
    cut_short = last[0, 0, 0] == _NO_DATA and (last == _NO_DATA).all()
    return None if cut_short else tile[: image.tile_height]


def _one_block_higher(stream: bytes, image: TiledImage) -> bytearray | None:
    """The stream of a baseline JPEG with 8 rows more in its header; None where that would change the picture."""
    size = struct.pack(">HHB", image.tile_height, image.tile_width, 3)
    frame, scan = stream.find(_FRAME + size), stream.find(_SCAN)
    plain = 0 < frame < scan and _RESTARTS not in stream[:scan] and image.tile_height % _BLOCK == 0
    if not plain or any(stream[frame + place] & 15 != 1 for place in _SAMPLING):
        return None
    longer = bytearray(stream)
    struct.pack_into(">H", longer, frame + len(_FRAME), image.tile_height + _BLOCK)
    return longer


def _decode_jpeg2000(stream: bytes, image: TiledImage) -> np.ndarray | None:
    planes = _planes(stream, image)
    return None if planes is None else cv2.merge(planes)


def _decode_jpeg2000_ycbcr(stream: bytes, image: TiledImage) -> np.ndarray | None:
    planes = _planes(stream, image)
    if planes is None:
        return None
    luma, blue, red = planes
    # saturating sums of the luma and of what the chroma adds to it
    red_green_blue = (
        cv2.add(luma, cv2.LUT(red, _RED), dtype=cv2.CV_8U),
        cv2.add(luma, _GREEN.take(blue.astype(np.uint16) * 256 + red), dtype=cv2.CV_8U),
        cv2.add(luma, cv2.LUT(blue, _BLUE), dtype=cv2.CV_8U),
    )
    return cv2.merge(red_green_blue)


def _planes(stream: bytes, image: TiledImage) -> tuple[np.ndarray, ...] | None:
    """The three components of a JPEG 2000, uint8 (tile_height, tile_width) each."""
    planes = np.empty((3, image.tile_height, image.tile_width), np.uint8)
    try:
        return tuple(imagecodecs.jpeg2k_decode(stream, planar=True, out=planes))
    except (imagecodecs.Jpeg2kError, ValueError):
        return None


# what a chroma value adds, rounded as OpenSlide does (compared with it for all 2**24 colours): red and blue in fixed
# point of 16 bits as in libjpeg, green in floating point
_CHROMA = np.arange(256) - 128
_RED, _BLUE = ((round(factor * 65536) * _CHROMA + 32768 >> 16).astype(np.int16) for factor in (1.402, 1.772))
_GREEN = np.floor(0.5 - (0.34414 * _CHROMA[:, None] + 0.71414 * _CHROMA)).astype(np.int16)
