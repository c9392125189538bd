"""Slides that OpenSlide cannot open, through a class of the user's own (`slides.reader: module:Class`).

The class is called with the slide's path (str). What it must have:

    level_dimensions    (width, height) in pixels of every level, the finest first
    read_region(x, y, level, width, height)
                        numpy uint8 array (height, width, 3) RGB, or (height, width, 4) with straight alpha where parts
                        were never scanned; x and y are level-0 pixels, width and height pixels of the level. It is
                        asked for nothing outside of a level.

and what it may have:

    mpp                 micrometres a level-0 pixel: one number, or (horizontal, vertical)
    suffixes            (on the class) endings of the files that it reads, e.g. (".isyntax",); OpenSlide reads all
                        others. Without it, the class reads every slide
    level_downsamples   level-0 pixels a pixel of every level; else they follow from the dimensions
    objective_power     nominal magnification
    background          RGB of what was never scanned; else white
    files               paths of the files that make up the slide; else the path, or all files of a folder
    thread_safe         True where read_region may be called from several threads at once
    close()             frees what is open

Every process builds instances of its own: nothing is pickled or used after a fork. Any exception that the class raises
becomes a SlideError that names the slide.
"""

import contextlib
import math
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dinoscope import user_code
from dinoscope.errors import ConfigError, SlideError
from dinoscope.files import sha256_file

__all__ = ["UserReader", "check_reader_name", "serves", "source_digest"]


class UserReader:
    """A user's reader with the face of `openslide.OpenSlide`, as far as `Slide` needs it; regions are RGB arrays.

    Attributes:
        level_dimensions: (width, height) of every level in pixels.
        level_downsamples: Level-0 pixels a pixel, of every level.
        properties: What OpenSlide would say under the same names: vendor, mpp, objective power, background.
    """

    def __init__(self, reader: str, path: Path, name: str) -> None:
        """Builds the reader.

        Args:
            reader: module:Class.
            path: What it is to open.
            name: How messages name the slide.

        Raises:
            ConfigError: There is no such class.
            SlideError: The class cannot open the slide, or gives something else than promised.
        """
        self._reader_name, self._path, self._name = reader, path, name
        reader_class = _load(reader)
        with self._told("cannot open it"):
            self._reader = reader_class(str(path))
        with self._told("does not say what levels it has"):
            self.level_dimensions = tuple((int(w), int(h)) for w, h in self._reader.level_dimensions)
        if not self.level_dimensions or min(min(size) for size in self.level_dimensions) < 1:
            raise self._wrong(f"level_dimensions {self.level_dimensions}", "at least one level of at least 1 x 1 pixel")
        with self._told("does not say what it reads"):
            self.level_downsamples = self._downsamples()
            self.properties = dict(self._properties())
        if list(self.level_downsamples) != sorted(self.level_downsamples) or self.level_downsamples[0] != 1:
            raise self._wrong(f"level_downsamples {self.level_downsamples}", "1 for the first, then growing ones")
        if len(self.level_downsamples) != len(self.level_dimensions):
            raise self._wrong(f"level_downsamples {self.level_downsamples}", f"{len(self.level_dimensions)} numbers")
        # an unknown reader may not be made for threads; reading then takes turns
        safe = bool(getattr(self._reader, "thread_safe", False))
        self._turn = contextlib.nullcontext() if safe else threading.Lock()

    def read_region(
        self, x: int, y: int, level: int, width: int, height: int, background: tuple[int, int, int]
    ) -> np.ndarray:
        """A rectangle inside of a level, uint8 (height, width, 3), RGB, with the background where it is transparent.

        Raises:
            SlideError: The reader failed, or gave something else than pixels.
        """
        with self._turn, self._told(f"failed at x {x}, y {y} of level {level}"):
            pixels = self._reader.read_region(x, y, level, width, height)
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim != 3:
            raise self._wrong(f"a {type(pixels).__name__} from read_region", "a numpy array of uint8")
        if pixels.shape not in ((height, width, 3), (height, width, 4)):
            wanted = f"({height}, {width}, 3) or ({height}, {width}, 4)"
            raise self._wrong(f"pixels of shape {pixels.shape} from read_region", f"{wanted}, height before width")
        if pixels.shape[2] == 3:
            return np.ascontiguousarray(pixels)
        opacity = pixels[..., 3:].astype(np.float32) / 255
        return np.rint(pixels[..., :3] * opacity + np.array(background, np.float32) * (1 - opacity)).astype(np.uint8)

    def files(self) -> list[Path]:
        """The files that make up the slide."""
        with self._told("does not say of what files it consists"):
            given = [Path(file) for file in getattr(self._reader, "files", ())]
        if given or not self._path.is_dir():
            return given or [self._path]
        return sorted(file for file in self._path.rglob("*") if file.is_file())

    def close(self) -> None:
        """Closes the reader, if it can be closed."""
        if callable(close := getattr(self._reader, "close", None)):
            with self._told("cannot be closed"):
                close()

    def _downsamples(self) -> tuple[float, ...]:
        given = getattr(self._reader, "level_downsamples", None)
        if given is not None:
            return tuple(float(value) for value in given)
        width, height = self.level_dimensions[0]
        return tuple((width / w + height / h) / 2 for w, h in self.level_dimensions)

    def _properties(self) -> Iterator[tuple[str, str]]:
        yield "openslide.vendor", self._reader_name.partition(":")[2]
        mpp = getattr(self._reader, "mpp", None)
        if mpp is not None:
            mpp_x, mpp_y = (mpp, mpp) if np.ndim(mpp) == 0 else mpp
            yield "openslide.mpp-x", repr(float(mpp_x))
            yield "openslide.mpp-y", repr(float(mpp_y))
        power = getattr(self._reader, "objective_power", None)
        if power is not None and math.isfinite(float(power)):
            yield "openslide.objective-power", repr(float(power))
        background = getattr(self._reader, "background", None)
        if background is not None:
            yield "openslide.background-color", bytes(int(value) for value in background).hex()

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Turns whatever the user's code raises into a sentence about the slide."""
        try:
            yield
        except SlideError:
            raise
        except Exception as error:
            reason = user_code.told(error, __file__).replace(str(self._path), "the file")
            raise SlideError(
                f"{self._name}: reader {self._reader_name} {what} ({reason}): correct the class that slides.reader "
                "names, or the file"
            ) from error

    def _wrong(self, found: str, wanted: str) -> SlideError:
        return SlideError(f"{self._name}: reader {self._reader_name} gave {found}, but wanted was {wanted}")


def check_reader_name(reader: str | None) -> None:
    """Refuses a name that does not read module:Class. Raises ConfigError."""
    if reader is not None and not user_code.is_class_name(reader):
        raise ConfigError(f"slides.reader {reader!r} does not read module:Class, e.g. my_formats:ISyntax")


def serves(reader: str | None, path: Path) -> bool:
    """Whether the user's reader, and not OpenSlide, is to open this slide. Raises ConfigError if there is no such."""
    if reader is None:
        return False
    suffixes = getattr(_load(reader), "suffixes", None)
    if isinstance(suffixes, str):
        suffixes = (suffixes,)
    return suffixes is None or path.suffix.lower() in {str(suffix).lower() for suffix in suffixes}


def source_digest(reader: str) -> str:
    """module:Class and the digest of the file that defines the class: another text where it may give other pixels.

    What that file imports is not looked at.

    Raises:
        ConfigError: There is no such class.
    """
    reader_class = _load(reader)
    path = getattr(sys.modules.get(reader_class.__module__), "__file__", None)
    return reader if path is None else f"{reader} {sha256_file(path)[:16]}"


def _load(reader: str) -> type:
    check_reader_name(reader)
    try:
        return user_code.load_class(reader)
    except Exception as error:
        raise ConfigError(
            f"slides.reader {reader} cannot be imported: {user_code.told(error, __file__)}; the module must lie in the "
            "working directory or be installed"
        ) from error
