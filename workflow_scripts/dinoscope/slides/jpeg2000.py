"""Decodes no more of a JPEG 2000 tile than is wanted, which takes two thirds of the time for a quarter of a tile.

imagecodecs decodes whole images only. The OpenJPEG that it brings can do better and is asked directly (ctypes, its
interface of version 2). Where it is not to be had, imagecodecs decodes and the window is cut out.
"""

import ctypes
import functools
from typing import NamedTuple

import imagecodecs
import numpy as np

__all__ = ["Window", "decode_planes"]

_CODESTREAM = b"\xff\x4f\xff\x51"
_CODEC_CODESTREAM = 0
_END = ctypes.c_size_t(-1).value
_PARAMETERS_BYTES = 1 << 16  # of a structure that has 8 KiB, most of it two file names
_MIN_BUFFER_BYTES = 1 << 10


class Window(NamedTuple):
    """A rectangle in pixels of a tile."""

    left: int
    top: int
    right: int
    bottom: int


class _Component(ctypes.Structure):
    """opj_image_comp_t."""

    _names = ("dx", "dy", "w", "h", "x0", "y0", "prec", "bpp", "sgnd", "resno_decoded", "factor")
    _fields_ = [
        *((name, ctypes.c_uint32) for name in _names),
        ("data", ctypes.POINTER(ctypes.c_int32)),
        ("alpha", ctypes.c_uint16),
    ]


class _Image(ctypes.Structure):
    """opj_image_t."""

    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("x0", "y0", "x1", "y1", "numcomps")),
        ("color_space", ctypes.c_int),
        ("comps", ctypes.POINTER(_Component)),
        ("icc_profile_buf", ctypes.c_void_p),
        ("icc_profile_len", ctypes.c_uint32),
    ]


class _Source:
    """What the decoder reads from."""

    def __init__(self, stream: bytes) -> None:
        self.stream, self.position = stream, 0


_READ = ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t, ctypes.py_object)
_SKIP = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.py_object)
_SEEK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int64, ctypes.py_object)


@_READ
def _read(buffer: int, length: int, source: _Source) -> int:
    part = source.stream[source.position : source.position + length]
    ctypes.memmove(buffer, part, len(part))
    source.position += len(part)
    return len(part) or _END


@_SKIP
def _skip(length: int, source: _Source) -> int:
    source.position += length
    return length


@_SEEK
def _seek(position: int, source: _Source) -> int:
    source.position = position
    return 1


_POINTER, _INT, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
_IMAGE = ctypes.POINTER(_Image)
_FUNCTIONS = {
    "opj_version": (ctypes.c_char_p, []),
    "opj_create_decompress": (_POINTER, [_INT]),
    "opj_destroy_codec": (None, [_POINTER]),
    "opj_set_default_decoder_parameters": (None, [_POINTER]),
    "opj_setup_decoder": (_INT, [_POINTER, _POINTER]),
    "opj_read_header": (_INT, [_POINTER, _POINTER, ctypes.POINTER(_IMAGE)]),
    "opj_set_decode_area": (_INT, [_POINTER, _IMAGE, *4 * (ctypes.c_int32,)]),
    "opj_decode": (_INT, [_POINTER, _POINTER, _IMAGE]),
    "opj_image_destroy": (None, [_IMAGE]),
    "opj_stream_create": (_POINTER, [_SIZE, _INT]),
    "opj_stream_destroy": (None, [_POINTER]),
    "opj_stream_set_read_function": (None, [_POINTER, _READ]),
    "opj_stream_set_skip_function": (None, [_POINTER, _SKIP]),
    "opj_stream_set_seek_function": (None, [_POINTER, _SEEK]),
    "opj_stream_set_user_data": (None, [_POINTER, ctypes.py_object, _POINTER]),
    "opj_stream_set_user_data_length": (None, [_POINTER, ctypes.c_uint64]),
}


@functools.cache
def _openjpeg() -> tuple[ctypes.CDLL, ctypes.Array] | None:
    """OpenJPEG, found among what imagecodecs' own library is linked with, and its default parameters."""
    try:
        imagecodecs.jpeg2k_decode  # noqa: B018 (imports the module below)
        library = ctypes.CDLL(imagecodecs._jpeg2k.__file__)
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (AttributeError, OSError):
        return None
    if not library.opj_version().startswith(b"2."):
        return None
    parameters = ctypes.create_string_buffer(_PARAMETERS_BYTES)
    library.opj_set_default_decoder_parameters(parameters)
    return library, parameters


def decode_planes(stream: bytes, width: int, height: int, window: Window | None = None) -> list[np.ndarray] | None:
    """The three components of a JPEG 2000.

    Args:
        stream: Its bytes.
        width, height: Size of the whole image, which must be that.
        window: What is wanted of it; all where None.

    Returns:
        Three uint8 arrays (window's height, window's width), components of fewer pixels repeated; None where the stream
        is damaged or of another kind.
    """
    window = window or Window(0, 0, width, height)
    if _openjpeg() is None or not stream.startswith(_CODESTREAM):
        return _decode_all(stream, width, height, window)
    library, parameters = _openjpeg()
    source, image = _Source(stream), _IMAGE()
    opened, codec = _open(library, source), library.opj_create_decompress(_CODEC_CODESTREAM)
    try:
        ready = library.opj_setup_decoder(codec, parameters) and library.opj_read_header(
            opened, codec, ctypes.byref(image)
        )
        components = _components(image.contents, width, height) if ready else None
        if components is None:
            return None
        around = _whole_samples(components, window, width, height)
        if around != (0, 0, width, height) and not library.opj_set_decode_area(codec, image, *around):
            return None
        if not library.opj_decode(codec, opened, image):
            return None
        return [_plane(component, around, window) for component in components]
    finally:
        library.opj_stream_destroy(opened)
        library.opj_destroy_codec(codec)
        if image:
            library.opj_image_destroy(image)


def _open(library: ctypes.CDLL, source: _Source) -> int:
    stream = library.opj_stream_create(max(len(source.stream), _MIN_BUFFER_BYTES), 1)
    library.opj_stream_set_read_function(stream, _read)
    library.opj_stream_set_skip_function(stream, _skip)
    library.opj_stream_set_seek_function(stream, _seek)
    library.opj_stream_set_user_data(stream, source, None)
    library.opj_stream_set_user_data_length(stream, len(source.stream))
    return stream


def _components(image: _Image, width: int, height: int) -> list[_Component] | None:
    """Its components, if they are three of eight bits, of this size or a whole part of it; else None."""
    if (image.x0, image.y0, image.x1, image.y1, image.numcomps) != (0, 0, width, height, 3):
        return None
    components = image.comps[:3]
    for each in components:
        dx, dy = each.dx, each.dy
        if each.prec != 8 or each.sgnd or not (dx and dy) or width % dx or height % dy:
            return None
    return components


def _whole_samples(components: list[_Component], window: Window, width: int, height: int) -> Window:
    """The window made larger where it would cut through a sample of a component of fewer pixels."""
    dx, dy = max(each.dx for each in components), max(each.dy for each in components)
    if dx == dy == 1:
        return window
    left, top = window.left // dx * dx, window.top // dy * dy
    return Window(left, top, min(-(-window.right // dx) * dx, width), min(-(-window.bottom // dy) * dy, height))


def _plane(component: _Component, decoded: Window, window: Window) -> np.ndarray:
    rows, columns = component.h, component.w
    samples = (ctypes.c_int32 * (rows * columns)).from_address(ctypes.addressof(component.data.contents))
    plane = np.frombuffer(samples, np.int32).reshape(rows, columns).astype(np.uint8)
    for axis, times in ((0, component.dy), (1, component.dx)):
        if times > 1:
            plane = plane.repeat(times, axis)
    if decoded == window:
        return plane
    left, top = window.left - decoded.left, window.top - decoded.top
    rows, columns = window.bottom - window.top, window.right - window.left
    return np.ascontiguousarray(plane[top : top + rows, left : left + columns])


def _decode_all(stream: bytes, width: int, height: int, window: Window) -> list[np.ndarray] | None:
    planes = np.empty((3, height, width), np.uint8)
    try:
        imagecodecs.jpeg2k_decode(stream, planar=True, out=planes)
    except (imagecodecs.Jpeg2kError, ValueError):
        return None
    return [np.ascontiguousarray(plane[window.top : window.bottom, window.left : window.right]) for plane in planes]
