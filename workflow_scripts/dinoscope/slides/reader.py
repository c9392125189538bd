"""Slides: levels, micrometres a pixel, and regions as RGB arrays. The only module that knows OpenSlide.

Coordinates are level-0 pixels, x before y; sizes are pixels of the level that is read. Label and macro images are
never touched, and of a file's properties only those in `_ALLOWED` are looked at: the rest may hold names and dates.
Formats that OpenSlide lacks are read by a class of the user's own (user_reader.py).
"""

import ctypes
import logging
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Self

import cv2
import numpy as np
import openslide
from openslide import lowlevel

from dinoscope.errors import SlideError
from dinoscope.slides.fast_tiff import FastLevels
from dinoscope.slides.focal_planes import PLANE_PROPERTIES
from dinoscope.slides.members import dicom_series, file_to_open, mirax_members, unsupported_format, vms_members
from dinoscope.slides.resample import average_squares, resample_square
from dinoscope.slides.resolution import Resolution, find_resolution, positive_number
from dinoscope.slides.scanners import MODEL_PROPERTIES, scanner_model
from dinoscope.slides.tile_cache import TileCache
from dinoscope.slides.user_reader import UserReader, serves

__all__ = ["OPENSLIDE_VERSION", "Slide", "SlidePool"]

log = logging.getLogger(__name__)

OPENSLIDE_VERSION: str = openslide.__library_version__
_BLOCK_PX = (4096, 1024)
_VENDORS_OF_PLAIN_TIFF = frozenset({"aperio", "generic-tiff"})  # levels are images of their own, tiles edge to edge
_SETS_OF_FILES = {".mrxs", ".vms", ".vmu", ".dcm", ""}
_MAX_KEPT_PIXELS = 1 << 20
_kept = threading.local()
_MAX_SIDE = 2**31  # coordinates are stored in 32 bits
_MOST_PIXELS_PER_BYTE = 100_000  # far above what any compression of empty glass reaches
_ALLOWED = frozenset(
    {
        "dicom.SeriesInstanceUID",
        "openslide.background-color",
        "openslide.bounds-height",
        "openslide.bounds-width",
        "openslide.bounds-x",
        "openslide.bounds-y",
        "openslide.icc-size",
        "openslide.mpp-x",
        "openslide.mpp-y",
        "openslide.objective-power",
        "openslide.vendor",
        "tiff.ResolutionUnit",
        "tiff.XResolution",
        "tiff.YResolution",
        *MODEL_PROPERTIES,
        *PLANE_PROPERTIES,
    }
)


class Slide:
    """An open slide. A context manager, and for several threads; not for use after a fork (see `SlidePool`).

    The tiles of Aperio and generic tiled TIFFs (JPEG, JPEG 2000, lossless RGB) are decoded directly where that gives
    OpenSlide's very pixels, which is several times faster; decoded ones are kept for reuse, 32 MB of them a slide or
    pool.

    Attributes:
        slide_id: The name used in messages and results, never the file's unless no other was given.
        width, height: Size of level 0 in pixels.
        level_dimensions: (width, height) of every level in pixels.
        level_downsamples: Level-0 pixels a pixel, of every level.
        mpp_source: "file", "table" (given by the user), "objective" (a guess from its power) or None when unknown.
        mpp_problem: Why `mpp` cannot be used, as the end of a sentence about the slide, or None when it can.
        vendor: OpenSlide's name of the format.
        objective_power: Nominal magnification, or None.
        scanner: Model of the scanner, one of `scanners.MODELS`, or None.
        bounds: Left, top, width and height of what was scanned, in level-0 pixels; all of the slide where unknown.
        background: RGB of places that were never scanned.
        warnings: Sentences about what looks odd.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        slide_id: str | None = None,
        mpp: float | None = None,
        cache: TileCache | None = None,
        reader: str | None = None,
    ) -> None:
        """Opens the slide at `path`: a file, or the folder of one DICOM series.

        Args:
            path: The slide.
            slide_id: Its name in messages; the file's stem when not given.
            mpp: Micrometres a pixel of level 0, in place of what the file says.
            cache: Where decoded tiles are kept; one of its own when not given.
            reader: module:Class of a reader for formats that OpenSlide lacks (see user_reader.py).

        Raises:
            SlideError: The slide is missing, empty, damaged, unknown to OpenSlide, or `mpp` is implausible.
            ConfigError: There is no such reader.
        """
        self.path = Path(path)
        self.slide_id = slide_id if slide_id is not None else self.path.stem
        self._name = f"slide {self.slide_id!r} (file {self.path.name})"
        self.warnings: list[str] = []
        own = serves(reader, self.path)
        self._file = file_to_open(self.path, self._name, any_folder=own)
        self._fast: FastLevels | None = None
        self._openslide, self._closed = UserReader(reader, self.path, self._name) if own else self._open(), False
        self.level_dimensions = self._openslide.level_dimensions
        self.level_downsamples = self._openslide.level_downsamples
        self.num_levels = len(self.level_dimensions)
        self.width, self.height = self.level_dimensions[0]
        self._refuse_impossible_size()
        self.vendor = self._property("openslide.vendor") or "unknown"
        self.objective_power = positive_number(self._property("openslide.objective-power"))
        self.has_icc_profile = self._property("openslide.icc-size") is not None
        self.background = _colour(self._property("openslide.background-color"))
        self.scanner = scanner_model({name: self._property(name) for name in MODEL_PROPERTIES})
        self.bounds = self._scanned_bounds()
        self._resolution = find_resolution({name: self._property(name) for name in _ALLOWED}, mpp)
        self.mpp_source, self.mpp_problem = self._resolution.source, self._resolution.problem
        if self._resolution.warning:
            self.warnings.append(self._resolution.warning)
            log.warning("slide %r: %s", self.slide_id, self._resolution.warning)
        if mpp is not None:
            self._known_resolution()
        if self.path.is_dir() and self.vendor == "dicom":
            self._refuse_second_series()
        if self.vendor in _VENDORS_OF_PLAIN_TIFF and not own:
            self._fast = FastLevels(self._file, self.slide_id, self.level_dimensions, self.level_downsamples, cache)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the slide. May be called twice."""
        if not self._closed:
            self._closed = True
            self._openslide.close()
            if self._fast is not None:
                self._fast.close()

    def decodes_directly(self, level: int) -> bool:
        """Whether this level's tiles are decoded without OpenSlide; the first time, a few regions are compared."""
        return self._fast is not None and self._fast.usable(level, self._reference)

    @property
    def mpp_x(self) -> float:
        """Micrometres a level-0 pixel, horizontally. Raises SlideError when unknown or implausible."""
        return self._known_resolution().x

    @property
    def mpp_y(self) -> float:
        """Micrometres a level-0 pixel, vertically. Raises SlideError when unknown or implausible."""
        return self._known_resolution().y

    @property
    def mpp(self) -> float:
        """Mean of `mpp_x` and `mpp_y`. Raises SlideError when unknown or implausible."""
        return (self.mpp_x + self.mpp_y) / 2

    def read_region(self, x: int, y: int, level: int, width_px: int, height_px: int) -> np.ndarray:
        """Reads a rectangle of one level.

        What lies outside the slide or its bounds, and what was never scanned, has the slide's background colour.

        Args:
            x, y: Top-left corner in level-0 pixels; may be negative.
            level: Pyramid level.
            width_px, height_px: Size in pixels of that level.

        Returns:
            uint8 array (height_px, width_px, 3), RGB.

        Raises:
            SlideError: The file is damaged here.
        """
        downsample = self.level_downsamples[level]
        (first_x, scanned_x), (first_y, scanned_y) = self._bounds_of(level)
        left, right = _inside(x / downsample - first_x, width_px, scanned_x)
        top, bottom = _inside(y / downsample - first_y, height_px, scanned_y)
        if (left, top, right, bottom) == (0, 0, width_px, height_px):
            return self._read(x, y, level, width_px, height_px)
        image = np.empty((height_px, width_px, 3), np.uint8)
        image[:] = self.background
        if right > left and bottom > top:
            start = (round(x + left * downsample), round(y + top * downsample))
            image[top:bottom, left:right] = self._read(*start, level, right - left, bottom - top)
        return image

    def read_tile(
        self, x: float, y: float, level: int, read_px: int, tile_px: int, footprint_px: float | None = None
    ) -> np.ndarray:
        """Reads a square and brings it to `tile_px` by averaging areas (linearly where it must be enlarged).

        Args:
            x, y: Top-left corner in level-0 pixels, not necessarily whole.
            level: Pyramid level to read.
            read_px: Side of the square in pixels of that level.
            tile_px: Side of the result.
            footprint_px: Side in level-0 pixels. When given, the square has exactly this side even where it is no whole
                number of the level's pixels; pixels that lie partly inside count by their share.

        Returns:
            uint8 array (tile_px, tile_px, 3), RGB.

        Raises:
            SlideError: The file is damaged here.
        """
        downsample = self.level_downsamples[level]
        side = read_px if footprint_px is None else footprint_px / downsample
        spans = [
            _span(start / downsample, side, length, downsample)
            for start, length in zip((x, y), self.level_dimensions[level], strict=True)
        ]
        (left, columns, column_offset), (top, rows, row_offset) = spans
        region = self.read_region(left, top, level, columns, rows)
        return resample_square(region, column_offset, row_offset, side, tile_px, averages=level > 0)

    def stored_jpeg(self, x: int, y: int, level: int, side_px: int) -> bytes | None:
        """A square that the file stores as one JPEG, as it lies there: with its tables, without texts and metadata.

        Args:
            x, y: Top-left corner in level-0 pixels.
            level: Pyramid level.
            side_px: Side of the square in pixels of that level.

        Returns:
            A JPEG that any decoder reads; None where nothing is stored that is just this square.
        """
        return None if self._fast is None else self._fast.stored_jpeg(x, y, level, side_px, self._reference)

    def thumbnail(self, max_px: int) -> np.ndarray:
        """The whole slide, area-averaged to at most `max_px` on its longer side; uint8 (height, width, 3), RGB."""
        longest = max(self.width, self.height)
        scale = min(1.0, max_px / longest)
        size = (max(1, round(self.width * scale)), max(1, round(self.height * scale)))
        level = max(level for level, sides in enumerate(self.level_dimensions) if max(sides) >= longest * scale)
        image = self.shrunk(level, max(1, math.floor(max(self.level_dimensions[level]) / max(size))))
        return cv2.resize(image, size, interpolation=cv2.INTER_AREA)

    def num_blocks(self, level: int, factor: int) -> int:
        """Number of blocks that `shrunk` reads."""
        return sum(1 for _ in self._blocks(level, factor))

    def shrunk(self, level: int, factor: int, advance: Callable[[], object] | None = None) -> np.ndarray:
        """A whole level, with squares of `factor` pixels averaged to one.

        Reads block by block, so that memory stays bounded by the result and a few million pixels.

        Args:
            level: Pyramid level to read.
            factor: Pixels of the level a pixel of the result.
            advance: Called after each of the `num_blocks(level, factor)` blocks.

        Returns:
            uint8 array (ceil(height / factor), ceil(width / factor), 3), RGB.
        """
        width, height = self.level_dimensions[level]
        image = np.empty((math.ceil(height / factor), math.ceil(width / factor), 3), np.uint8)
        downsample = self.level_downsamples[level]
        for left, top, columns, rows in self._blocks(level, factor):
            block = self.read_region(round(left * downsample), round(top * downsample), level, columns, rows)
            place = image[
                top // factor : (top + rows - 1) // factor + 1, left // factor : (left + columns - 1) // factor + 1
            ]
            place[:] = average_squares(block, factor)
            if advance is not None:
                advance()
        return image

    def files(self) -> list[Path]:
        """All files that make up the slide: one, or those of a MIRAX, VMS or DICOM slide."""
        if isinstance(self._openslide, UserReader):
            return self._openslide.files()
        if self.vendor == "mirax":
            return mirax_members(self._file)
        if self.vendor == "hamamatsu" and self._file.suffix.lower() in {".vms", ".vmu"}:
            return vms_members(self._file)
        if self.vendor == "dicom":
            return [path for path, same in self._dicom_files() if same]
        return [self._file]

    def _open(self) -> openslide.OpenSlide:
        try:
            return openslide.OpenSlide(str(self._file))
        except openslide.OpenSlideUnsupportedFormatError:
            if converter := unsupported_format(self._file):
                raise SlideError(f"{self._name} {converter}") from None
            size = self._file.stat().st_size
            raise SlideError(
                f"{self._name} is not a slide that OpenSlide can open, or it is cut short ({size:,} bytes): compare "
                "its size with the original and copy it again, or convert it to a pyramidal TIFF"
            ) from None
        except openslide.OpenSlideError as error:
            raise self._damaged("cannot be opened", error) from None

    def _read(self, x: int, y: int, level: int, width_px: int, height_px: int) -> np.ndarray:
        """Reads a rectangle that lies on the level."""
        if isinstance(self._openslide, UserReader):
            return self._openslide.read_region(x, y, level, width_px, height_px, self.background)
        if self._fast is not None:
            region = self._fast.read(x, y, level, width_px, height_px, self._reference)
            if region is not None:
                return region
        return self._compose(x, y, level, width_px, height_px)

    def _compose(self, x: int, y: int, level: int, width_px: int, height_px: int) -> np.ndarray:
        """Reads a rectangle through OpenSlide, without the detour over a PIL image."""
        argb, address = _argb_buffer(height_px * width_px)
        try:
            lowlevel._read_region(self._openslide._osr, address, x, y, level, width_px, height_px)
        except openslide.OpenSlideError as error:
            raise self._damaged(f"cannot be read at x {x}, y {y} of level {level}", error) from None
        return _opaque(argb.reshape(height_px, width_px), self.background)

    def _reference(self, x: int, y: int, level: int, width_px: int, height_px: int) -> np.ndarray:
        """What `FastLevels` compares with."""
        try:
            return self._compose(x, y, level, width_px, height_px)
        except SlideError:
            # after an error an OpenSlide handle answers nothing else, but nobody asked for this place
            self._openslide = self._open()
            raise

    def _damaged(self, what: str, error: Exception) -> SlideError:
        reason = str(error).replace(str(self._file), "the file").replace(f"{self._file.parent}/", "")
        return SlideError(f"{self._name} {what}, it is damaged or cut short ({reason}): copy it again from the scanner")

    def _scanned_bounds(self) -> tuple[int, int, int, int]:
        """The file's bounds, where it has any that lie on the slide."""
        whole = (0, 0, self.width, self.height)
        try:
            given = (int(self._property(f"openslide.bounds-{name}") or "") for name in ("x", "y", "width", "height"))
            left, top, width, height = given
        except ValueError:
            return whole
        right, bottom = min(left + width, self.width), min(top + height, self.height)
        left, top = max(left, 0), max(top, 0)
        return (left, top, right - left, bottom - top) if right > left and bottom > top else whole

    def _bounds_of(self, level: int) -> tuple[tuple[float, float], tuple[float, float]]:
        """First pixel of a level and number of its pixels inside the bounds, horizontally and vertically."""
        left, top, width, height = self.bounds
        downsample = self.level_downsamples[level]
        return tuple(
            (0, pixels) if (first, count) == (0, side) else (first / downsample, count / downsample)
            for first, count, side, pixels in zip(
                (left, top), (width, height), (self.width, self.height), self.level_dimensions[level], strict=True
            )
        )

    def properties_of_planes(self) -> dict[str, str | None]:
        """What the file says of its focal planes (`focal_planes.PLANE_PROPERTIES`)."""
        return {name: self._property(name) for name in PLANE_PROPERTIES}

    def _property(self, name: str) -> str | None:
        assert name in _ALLOWED, f"property {name} is not on the list of those that hold no personal data"
        return self._openslide.properties.get(name)

    def _blocks(self, level: int, factor: int) -> Iterator[tuple[int, int, int, int]]:
        width, height = self.level_dimensions[level]
        step_x, step_y = (max(1, side // factor) * factor for side in _BLOCK_PX)
        for top in range(0, height, step_y):
            for left in range(0, width, step_x):
                yield left, top, min(step_x, width - left), min(step_y, height - top)

    def _known_resolution(self) -> Resolution:
        if self._resolution.problem:
            raise SlideError(f"{self._name} {self._resolution.problem}")
        return self._resolution

    def _dicom_files(self) -> Iterator[tuple[Path, bool]]:
        return dicom_series(self._file.parent, self._property("dicom.SeriesInstanceUID") or "")

    def _refuse_impossible_size(self) -> None:
        """Refuses a size that the file cannot hold, before anyone reserves memory for it; sets of files are trusted."""
        if isinstance(self._openslide, UserReader) or self._file.suffix.lower() in _SETS_OF_FILES:
            return
        num_bytes = self._file.stat().st_size
        too_many = self.width * self.height > _MOST_PIXELS_PER_BYTE * num_bytes
        if too_many or max(self.width, self.height) >= _MAX_SIDE:
            self.close()
            raise SlideError(
                f"{self._name} says that it has {self.width:,} x {self.height:,} pixels, but has only {num_bytes:,} "
                "bytes: it is damaged; copy it again from the scanner"
            )

    def _refuse_second_series(self) -> None:
        if not all(same for _, same in self._dicom_files()):
            self.close()
            raise SlideError(
                f"{self._name} is a folder with more than one DICOM series: give one file of the wanted series in "
                "column path of slides.tsv"
            )


class SlidePool:
    """Slides by their id, opened when first asked for, the least recently used closed beyond `max_open`.

    May be pickled and used after a fork: every process opens handles of its own. All slides share one cache of decoded
    tiles (32 MB).
    """

    def __init__(
        self,
        paths: Mapping[str, str | os.PathLike[str]],
        mpp: Mapping[str, float] | None = None,
        max_open: int = 16,
        reader: str | None = None,
    ) -> None:
        """Takes the files by slide id, and micrometres a pixel for those slides whose file is to be overruled.

        `reader` is module:Class of a reader for formats that OpenSlide lacks.
        """
        self._paths, self._mpp, self._max_open, self._reader = dict(paths), dict(mpp or {}), max_open, reader
        self._open: OrderedDict[str, Slide] = OrderedDict()
        self._pid, self._cache = os.getpid(), TileCache()

    def __getitem__(self, slide_id: str) -> Slide:
        """The open slide. Raises SlideError when it cannot be opened, KeyError when it is not one of the pool's."""
        if self._pid != os.getpid():
            self._open, self._pid, self._cache = OrderedDict(), os.getpid(), TileCache()
        slide = self._open.pop(slide_id, None)
        if slide is None:
            slide = Slide(self._paths[slide_id], slide_id, self._mpp.get(slide_id), self._cache, self._reader)
        self._open[slide_id] = slide
        while len(self._open) > self._max_open:
            self._open.popitem(last=False)[1].close()
        return slide

    def path(self, slide_id: str) -> Path:
        """Where a slide lies."""
        return Path(self._paths[slide_id])

    def __getstate__(self) -> tuple[dict, dict, int, str | None]:
        return self._paths, self._mpp, self._max_open, self._reader

    def __setstate__(self, state: tuple[dict, dict, int, str | None]) -> None:
        self.__init__(*state)

    def close(self) -> None:
        """Closes all open slides; the pool stays usable."""
        while self._open:
            self._open.popitem()[1].close()


def _colour(text: str | None) -> tuple[int, int, int]:
    try:
        red, green, blue = bytes.fromhex((text or "").removeprefix("#"))
    except ValueError:
        return 255, 255, 255
    return red, green, blue


def _argb_buffer(num_pixels: int) -> tuple[np.ndarray, "ctypes._Pointer"]:
    """Memory for pixels that OpenSlide composes, uint32 (num_pixels,), and where it is.

    That of tiles is kept for the next one of the thread: fresh memory would cost more than all else is done here.
    """
    pixels = getattr(_kept, "pixels", None)
    if pixels is None or len(pixels) < num_pixels:
        pixels = np.empty(num_pixels, np.uint32)
        address = pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint32))
        if num_pixels > _MAX_KEPT_PIXELS:
            return pixels, address
        _kept.pixels, _kept.address = pixels, address
    return _kept.pixels[:num_pixels], _kept.address


def _opaque(argb: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    """RGB of premultiplied ARGB numbers; what is transparent shows the background."""
    # bytes in memory are B, G, R, A on the little-endian machines that OpenSlide's wheels are for
    image = cv2.cvtColor(argb.view(np.uint8).reshape(*argb.shape, 4), cv2.COLOR_BGRA2RGB)
    if np.bitwise_and.reduce(argb, axis=None) < 0xFF000000:
        alpha = (argb >> 24)[..., None]
        # as straight colours are made of premultiplied ones everywhere: cut, not rounded
        image = np.minimum(image * np.uint32(255) // np.maximum(alpha, 1), 255).astype(np.uint8)
        opacity = alpha.astype(np.float32) / 255
        blended = image * opacity + np.array(background, np.float32) * (1 - opacity)
        image = np.rint(blended).astype(np.uint8)
    return image


def _span(start: float, side: float, length: int, downsample: float) -> tuple[int, int, float]:
    """What to read of a level's `length` pixels for those from `start` to `start + side`.

    Returns:
        First pixel in level-0 pixels, number of pixels, and where among them `start` is.
    """
    if side > length + 1:  # larger than the slide: what is missing will be background
        return round(start * downsample), math.ceil(side), 0.0
    # levels are rounded to whole pixels: a tile at the slide's edge may end a fraction outside its level
    start = max(0.0, min(start, length - side))
    level0 = math.floor(math.floor(start + 1e-6) * downsample + 1e-6)
    begin = level0 / downsample
    count = min(math.ceil(start + side - begin - 1e-6), math.floor(length - begin + 1e-6))
    return level0, count, start - begin


def _inside(start: float, count: int, length: float) -> tuple[int, int]:
    """Which of the `count` pixels from `start` lie on a level of `length` pixels, at least in part."""
    first = math.ceil(-start - 1e-6) if start < 0 else 0
    last = min(count, math.ceil(length - start - 1e-6))
    return min(first, count), max(last, 0)
