"""Decodes single tiles of a TIFF file to the RGB that OpenSlide makes of them.

JPEG, JPEG 2000 as of Aperio, and RGB that is stored as it is, deflated or packed with LZW.
"""

import struct
from collections.abc import Callable

import cv2
import imagecodecs
import numpy as np

from dinoscope.slides.jpeg2000 import Window, decode_planes
from dinoscope.slides.tiff_directory import TiledImage

__all__ = ["Decoder", "WindowDecoder", "decoder", "whole_jpeg", "window_decoder"]

_NONE, _LZW, _JPEG, _DEFLATE, _OLD_DEFLATE, _APERIO_YCBCR, _APERIO_RGB = 1, 5, 7, 8, 32946, 33003, 33005
_DIFFERENCES = 2  # predictor: every sample says what it is more than that of the pixel to the left
_RGB, _YCBCR = 2, 6  # photometric
_MAX_TILE_PIXELS = 1 << 24

# how the header of a JPEG's baseline frame of 8-bit samples begins, and where its components say how they are sampled;
# the start of a scan of three components; the marker of restarts; the end
_FRAME, _SAMPLING = b"\xff\xc0\x00\x11\x08", (11, 14, 17)
_SCAN, _RESTARTS, _END = b"\xff\xda\x00\x0c\x03", b"\xff\xdd\x00\x04", b"\xff\xd9"
_BLOCK, _NO_DATA = 8, 128

# segments that say nothing about pixels: metadata of applications, comments
_APPLICATION, _COMMENT, _START_OF_SCAN = range(0xE0, 0xF0), 0xFE, 0xDA
# Adobe's segment, by whose last byte all decoders know whether the colours are RGB (0) or YCbCr (1)
_ADOBE = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"

Decoder = Callable[[bytes, TiledImage], np.ndarray | None]
WindowDecoder = Callable[[bytes, TiledImage, Window], np.ndarray | None]


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
    if image.compression in _UNPACKERS and image.photometric == _RGB and image.predictor in (1, _DIFFERENCES):
        return _decode_lossless
    return None


def window_decoder(image: TiledImage) -> WindowDecoder | None:
    """What decodes a part of a tile in less time than all of it; None where nothing does."""
    return {_APERIO_RGB: _decode_jpeg2000, _APERIO_YCBCR: _decode_jpeg2000_ycbcr}.get(image.compression)


def whole_jpeg(stream: bytes, image: TiledImage) -> bytes | None:
    """A JPEG tile as an image of its own: with the tables that tiles share, and what the directory says of colours.

    Metadata of applications and comments are left out. None for tiles that are no such JPEG.
    """
    if image.compression != _JPEG or image.photometric not in (_RGB, _YCBCR) or not stream.startswith(b"\xff\xd8"):
        return None
    kept, place = [], 2
    while stream[place : place + 1] == b"\xff" and len(stream) >= place + 4:
        marker, end = stream[place + 1], place + 2 + int.from_bytes(stream[place + 2 : place + 4], "big")
        if marker == _START_OF_SCAN:
            colours = bytes([0 if image.photometric == _RGB else 1])
            tables = (image.tables or b"")[2:-2]  # between its markers of start and end
            return b"".join((b"\xff\xd8", _ADOBE, colours, tables, *kept, stream[place:]))
        if marker not in _APPLICATION and marker != _COMMENT:
            kept.append(stream[place:end])
        place = end
    return None


def _decode_lossless(stream: bytes, image: TiledImage) -> np.ndarray | None:
    shape = (image.tile_height, image.tile_width, 3)
    samples = np.empty(image.tile_height * image.tile_width * 3, np.uint8)
    try:
        unpacked = _UNPACKERS[image.compression](stream, samples)
    except (RuntimeError, ValueError):  # all of imagecodecs' errors
        return None
    if len(unpacked) != len(samples):
        return None
    tile = unpacked.reshape(shape)
    return imagecodecs.delta_decode(tile, axis=1, out=tile) if image.predictor == _DIFFERENCES else tile


# what unpacks the bytes of a tile into an array and gives as much of that as they fill
_UNPACKERS: dict[int, Callable[[bytes, np.ndarray], np.ndarray]] = {
    _NONE: lambda stream, samples: np.frombuffer(bytearray(stream), np.uint8),
    _LZW: lambda stream, samples: imagecodecs.lzw_decode(stream, out=samples),
    _DEFLATE: lambda stream, samples: imagecodecs.deflate_decode(stream, out=samples),
    _OLD_DEFLATE: lambda stream, samples: imagecodecs.deflate_decode(stream, out=samples),
}


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


def _decode_jpeg2000(stream: bytes, image: TiledImage, window: Window | None = None) -> np.ndarray | None:
    planes = decode_planes(stream, image.tile_width, image.tile_height, window)
    return None if planes is None else cv2.merge(planes)


def _decode_jpeg2000_ycbcr(stream: bytes, image: TiledImage, window: Window | None = None) -> np.ndarray | None:
    planes = decode_planes(stream, image.tile_width, image.tile_height, window)
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


# what a chroma value adds, rounded as OpenSlide does (compared with it for all 2**24 colours): red and blue in fixed
# point of 16 bits as in libjpeg, green in floating point
_CHROMA = np.arange(256) - 128
_RED, _BLUE = ((round(factor * 65536) * _CHROMA + 32768 >> 16).astype(np.int16) for factor in (1.402, 1.772))
_GREEN = np.floor(0.5 - (0.34414 * _CHROMA[:, None] + 0.71414 * _CHROMA)).astype(np.int16)
