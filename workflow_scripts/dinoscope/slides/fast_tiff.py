"""Decodes the tiles of a TIFF file directly, several times faster than OpenSlide does where they are JPEG or lossless.

OpenSlide composes every region anew, for which it takes three times as long as for decoding it. Where tiles lie edge to
edge and nothing has to be interpolated, copying decoded tiles side by side gives the very same pixels. Whether it does
is not believed but checked on a few regions of every level; what is missing, damaged or unknown here is left to
OpenSlide, whose word on it stays the last.
"""

import itertools
import logging
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from dinoscope.errors import SlideError
from dinoscope.slides.jpeg2000 import Window
from dinoscope.slides.tiff_directory import TiledImage, tiled_images
from dinoscope.slides.tile_cache import TileCache
from dinoscope.slides.tile_decoders import decoder, whole_jpeg, window_decoder

__all__ = ["FastLevels", "FastTiff", "Reference", "agrees"]

log = logging.getLogger(__name__)

_MAX_TILE_BYTES = 1 << 26
_MAX_KEPT_TILES = 16  # a region of more tiles is read once and in one go: it would only push others out of the cache
_STRADDLE_PX = 96

Reference = Callable[[int, int, int, int, int], np.ndarray]
"""What reads through OpenSlide: given x and y in level-0 pixels, level, width and height in pixels of that level."""

# why a level is left to OpenSlide, None where it is not, by the file's identity and the level: a slide that is opened
# again is neither checked nor logged again by the same process
_obstacles: OrderedDict[tuple, str | None] = OrderedDict()
_MAX_OBSTACLES = 100_000
_owners = itertools.count()


class FastLevels:
    """Those levels of a slide whose tiles are decoded directly. For use by several threads, not after a fork."""

    def __init__(
        self,
        path: Path,
        slide_id: str,
        dimensions: Sequence[tuple[int, int]],
        downsamples: Sequence[float],
        cache: TileCache | None = None,
    ) -> None:
        """Opens a slide's file.

        Args:
            path: A TIFF file.
            slide_id: The slide's name in logs.
            dimensions: Width and height of all levels in pixels, as OpenSlide says.
            downsamples: Level-0 pixels a pixel of all levels, likewise.
            cache: Where decoded tiles are kept; one of its own when not given.
        """
        self._tiff = FastTiff(path, cache)
        self._slide_id, self._dimensions, self._downsamples = slide_id, dimensions, downsamples
        self._images: dict[int, TiledImage | None] = {}
        self._checking = threading.Lock()

    def close(self) -> None:
        """Closes the file and forgets its tiles. May be called twice."""
        self._tiff.close()

    def usable(self, level: int, reference: Reference) -> bool:
        """Whether a level is decoded directly; the first time in a process, a few regions are compared."""
        return self._image(level, reference) is not None

    def read(self, x: int, y: int, level: int, width: int, height: int, reference: Reference) -> np.ndarray | None:
        """Pixels of a level.

        Args:
            x, y: Corner in level-0 pixels.
            level: Pyramid level.
            width, height: Size in pixels of that level; the rectangle must lie within it.
            reference: Asked the first time that a level is read.

        Returns:
            uint8 (height, width, 3), RGB; None where only OpenSlide can say.
        """
        image = self._image(level, reference)
        if image is None:
            return None
        step = round(self._downsamples[level])
        if x % step or y % step:  # between two pixels of the level OpenSlide interpolates
            return None
        return self._tiff.read(image, x // step, y // step, width, height)

    def stored_jpeg(self, x: int, y: int, level: int, side: int, reference: Reference) -> bytes | None:
        """The JPEG of a square that is stored as such (see `Slide.stored_jpeg`), None where it is not."""
        image = self._image(level, reference)
        step = round(self._downsamples[level])
        if image is None or x % step or y % step or (image.tile_width, image.tile_height) != (side, side):
            return None
        left, top = x // step, y // step
        outside = min(left, top) < 0 or left + side > image.width or top + side > image.height
        if outside or left % side or top % side:
            return None
        stream = self._tiff.stream(image, top // side * image.columns + left // side)
        return None if stream is None else whole_jpeg(stream, image)

    def _image(self, level: int, reference: Reference) -> TiledImage | None:
        if level not in self._images:
            with self._checking:
                if level not in self._images:
                    self._images[level] = self._find(level, reference)
        return self._images[level]

    def _find(self, level: int, reference: Reference) -> TiledImage | None:
        image = self._tiff.find(*self._dimensions[level])
        key = (*self._tiff.identity, level)
        if key in _obstacles:
            return image if _obstacles[key] is None else None
        why = _obstacles[key] = self._obstacle(image, level, reference)
        how = "decoded directly" if why is None else f"read by OpenSlide: {why}"
        log.debug("slide %r: level %d is %s", self._slide_id, level, how)
        if len(_obstacles) > _MAX_OBSTACLES:
            _obstacles.popitem(last=False)
        return image if why is None else None

    def _obstacle(self, image: TiledImage | None, level: int, reference: Reference) -> str | None:
        """Why a level cannot be decoded directly."""
        if image is None:
            return "it is not stored in tiles that could be decoded directly"
        downsample = self._downsamples[level]
        step = round(downsample)
        if step != downsample:
            return f"it is {downsample:g} times coarser than level 0, which is no whole number"
        same = agrees(
            self._tiff, image, lambda x, y, width, height: reference(x * step, y * step, level, width, height)
        )
        return None if same else "decoding its tiles does not give the same pixels"


class FastTiff:
    """The tiles of an open TIFF file. For use by several threads, not after a fork.

    Attributes:
        identity: Tells the file, as it is now, from all others on this machine.
    """

    def __init__(self, path: Path, cache: TileCache | None = None) -> None:
        """Opens the file and reads where its tiles lie.

        Args:
            path: A TIFF file; any other has no levels.
            cache: Where decoded tiles are kept; one of its own when not given.
        """
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._close = weakref.finalize(self, os.close, self._file)
        self._cache, self._owner = cache if cache is not None else TileCache(), next(_owners)
        status = os.fstat(self._file)
        self.identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        self._length = status.st_size
        self._images = tiled_images(self._file)

    def close(self) -> None:
        """Closes the file and forgets its tiles. May be called twice."""
        if self._close.alive:
            self._cache.discard(self._owner)
            self._close()

    def find(self, width: int, height: int) -> TiledImage | None:
        """The image of this size that can be decoded here; None when there is none, or more than one."""
        images = [image for image in self._images if (image.width, image.height) == (width, height)]
        return images[0] if len(images) == 1 and decoder(images[0]) else None

    def read(
        self, image: TiledImage, left: int, top: int, width: int, height: int, keep: bool | None = None
    ) -> np.ndarray | None:
        """Pixels of an image.

        Args:
            image: One that `find` gave.
            left, top: Corner in pixels of the image.
            width, height: Size; the rectangle must lie within the image.
            keep: Whether to decode whole tiles and keep them; the cache decides where that is not said.

        Returns:
            uint8 (height, width, 3), RGB; None when one of the tiles is missing or damaged.
        """
        places = list(_places(image, left, top, width, height))
        if places == [(places[0][0], 0, 0)] and (width, height) == (image.tile_width, image.tile_height):
            return self._whole_tile(image, places[0][0])
        if keep is None:
            keep = self._keeps(image, [number for number, _, _ in places])
        region = np.empty((height, width, 3), np.uint8)
        for number, x, y in places:
            # where the tile and the region overlap, in pixels of the tile
            window = Window(
                max(-x, 0), max(-y, 0), min(image.tile_width, width - x), min(image.tile_height, height - y)
            )
            part = self._part(image, number, window, keep)
            if part is None:
                return None
            region[y + window.top : y + window.bottom, x + window.left : x + window.right] = part
        return region

    def _whole_tile(self, image: TiledImage, number: int) -> np.ndarray | None:
        """A stored tile that is all of what is asked for: no neighbour will want a part of it, so it is not kept."""
        kept = self._cache.peek((self._owner, id(image), number))
        return self._decode(image, number) if kept is None else kept.copy()

    def _keeps(self, image: TiledImage, numbers: list[int]) -> bool:
        """Whether to keep the tiles of a region; those of a large one are neither kept nor remembered."""
        if len(numbers) > _MAX_KEPT_TILES:
            return False
        keep = self._cache.worthwhile()
        for number in () if keep else numbers:
            self._cache.passed((self._owner, id(image), number), image.tile_width * image.tile_height * 3)
        return keep

    def _part(self, image: TiledImage, number: int, window: Window, keep: bool) -> np.ndarray | None:
        """A part of a tile; all of it is decoded where it is to be kept, or where that takes no longer."""
        key = (self._owner, id(image), number)
        tile = self._cache.get(key, lambda: self._decode(image, number)) if keep else self._cache.peek(key)
        if tile is None and not keep:
            if window_decoder(image) is not None:
                return self._decode(image, number, window)
            tile = self._decode(image, number)
        return None if tile is None else tile[window.top : window.bottom, window.left : window.right]

    def _decode(self, image: TiledImage, number: int, window: Window | None = None) -> np.ndarray | None:
        stream = self.stream(image, number)
        if stream is None:
            return None
        return decoder(image)(stream, image) if window is None else window_decoder(image)(stream, image, window)

    def stream(self, image: TiledImage, number: int) -> bytes | None:
        """The bytes of a tile; None where it has none, or they cannot be read."""
        offset, size = int(image.offsets[number]), int(image.sizes[number])
        if not (self._close.alive and 0 < size <= _MAX_TILE_BYTES and offset + size <= self._length):
            return None
        try:
            stream = os.pread(self._file, size, offset)
        except OSError:
            return None
        return stream if len(stream) == size else None


def agrees(tiff: FastTiff, image: TiledImage, reference: Callable[[int, int, int, int], np.ndarray]) -> bool:
    """Whether reading gives the reference's pixels at three places, always the same for a file.

    They are the tile of most bytes, which has most to get wrong; a corner where tiles meet, of the middle one of those
    that have bytes; and the last tile that has. What cannot be decoded is left to the reference anyhow, but at least
    one place must have been compared.

    Args:
        tiff: The file.
        image: One of its images.
        reference: Given left, top, width and height in pixels of the image, answers with uint8 (height, width, 3).
    """
    stored = np.flatnonzero(image.sizes)
    if not len(stored):
        return False
    middle = _rectangle(image, int(stored[len(stored) // 2]))
    straddling = _clipped(image, middle[0] - _STRADDLE_PX // 2, middle[1] - _STRADDLE_PX // 2, *2 * (_STRADDLE_PX,))
    largest, last = (_rectangle(image, int(number)) for number in (image.sizes.argmax(), stored[-1]))
    compared = 0
    for place in dict.fromkeys((largest, straddling, last)):
        pixels = tiff.read(image, *place, keep=False)  # of the second, parts of tiles are decoded where that is faster
        if pixels is None:
            continue
        try:
            if not np.array_equal(pixels, reference(*place)):
                return False
        except SlideError:
            return False
        compared += 1
    return compared > 0


def _places(image: TiledImage, left: int, top: int, width: int, height: int) -> Iterator[tuple[int, int, int]]:
    """Number of every tile that a rectangle touches, and the tile's corner as seen from the rectangle's."""
    for row in range(top // image.tile_height, (top + height - 1) // image.tile_height + 1):
        for column in range(left // image.tile_width, (left + width - 1) // image.tile_width + 1):
            yield row * image.columns + column, column * image.tile_width - left, row * image.tile_height - top


def _rectangle(image: TiledImage, number: int) -> tuple[int, int, int, int]:
    """Left, top, width and height of what a tile has of the image."""
    row, column = divmod(number, image.columns)
    return _clipped(image, column * image.tile_width, row * image.tile_height, image.tile_width, image.tile_height)


def _clipped(image: TiledImage, left: int, top: int, width: int, height: int) -> tuple[int, int, int, int]:
    left, top = max(left, 0), max(top, 0)
    return left, top, min(width, image.width - left), min(height, image.height - top)
