"""HDF5 files on a disk that may be full."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import h5py

__all__ = ["new_h5"]


@contextlib.contextmanager
def new_h5(path: Path) -> Iterator[tuple["h5py.File", Callable[[], None]]]:
    """An HDF5 file to fill, and what raises the system's error once something could not be written; the end does too.

    HDF5 itself ends the process with a segmentation fault when a file with open data sets cannot be closed, as on a
    full disk. So it is never told.
    """
    import h5py  # here, because planning imports this module

    with open(path, "w+b", buffering=0) as raw:
        forgiving = _Forgiving(raw.fileno())
        with h5py.File(forgiving, "w") as file:
            yield file, forgiving.check
        forgiving.check()


class _Forgiving:
    """A file whose writes never fail: the first error is kept for `check`, and nothing is written after it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._position, self._error = descriptor, 0, None

    def check(self) -> None:
        """Raises the first error."""
        if self._error is not None:
            raise self._error

    def write(self, data: memoryview) -> int:
        """Writes all of it."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while len(rest) and self._error is None:
                count = os.pwrite(self._descriptor, rest, self._position + size - len(rest))
                rest = rest[count:]
        except OSError as error:
            self._error = error
        self._position += size
        return size

    def read(self, size: int) -> bytes:
        """As many bytes; h5py takes nothing for a file that lacks it."""
        data = bytearray(size)
        self.readinto(memoryview(data))
        return bytes(data)

    def readinto(self, buffer: memoryview) -> int:
        """Fills the buffer; zeros where nothing has been written."""
        found = os.pread(self._descriptor, len(buffer), self._position)
        buffer[:] = found + bytes(len(buffer) - len(found))
        self._position += len(buffer)
        return len(buffer)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves to a place."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position}.get(whence)
        self._position = offset + (os.fstat(self._descriptor).st_size if start is None else start)
        return self._position

    def tell(self) -> int:
        """The place that is read or written next."""
        return self._position

    def truncate(self, size: int | None = None) -> int:
        """Sets the size."""
        size = self._position if size is None else size
        try:
            if self._error is None:
                os.ftruncate(self._descriptor, size)
        except OSError as error:
            self._error = error
        return size

    def flush(self) -> None:
        """Nothing is held back."""
