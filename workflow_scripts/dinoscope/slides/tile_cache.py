"""Decoded tiles kept for reuse: the least recently used go when there are too many bytes."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future

import numpy as np

__all__ = ["CACHE_BYTES", "TileCache"]

CACHE_BYTES = 32 << 20  # 170 tiles of 256 px: a row of tiles of a slide that is 43,000 px wide
_WORTHWHILE = 0.1  # share of tiles found again below which keeping them costs more than it saves
_MEMORY = 64  # tiles over which that share is averaged


class TileCache:
    """Arrays by key, at most `max_bytes` of them; any number of slides and threads may share one.

    What one thread is making, others wait for rather than make again. Not for use after a fork: another thread may have
    held the lock.
    """

    def __init__(self, max_bytes: int = CACHE_BYTES) -> None:
        self.max_bytes = max_bytes
        self._bytes = 0
        self._found = 1.0
        self._lock = threading.Lock()
        self._tiles: OrderedDict[Hashable, Future[np.ndarray | None]] = OrderedDict()
        self._passed: OrderedDict[Hashable, None] = OrderedDict()  # keys of tiles that were read and not kept

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays that are kept."""
        return self._bytes

    def __len__(self) -> int:
        return len(self._tiles)

    def worthwhile(self) -> bool:
        """Whether to keep the tiles of the next read: are tiles found again, or would they be if they were kept?

        Tiles at random places of a large slide are not: writing each to memory that no other use keeps warm makes
        decoding a tenth slower, and of those that are not kept, a part may do.
        """
        return self._found > _WORTHWHILE

    def passed(self, key: Hashable, num_bytes: int) -> None:
        """Notes that an array of this key was read and is not to be kept: only whether it comes again is."""
        with self._lock:
            again = key in self._passed or key in self._tiles
            self._found += (again - self._found) / _MEMORY
            self._passed[key] = None
            self._passed.move_to_end(key)
            while len(self._passed) * num_bytes > self.max_bytes:
                self._passed.popitem(last=False)

    def get(self, key: Hashable, make: Callable[[], np.ndarray | None]) -> np.ndarray | None:
        """The array of this key, made when it is not there. What `make` answers with None is not kept.

        The array is shared: it must not be written to.
        """
        with self._lock:
            tile = self._tiles.get(key)
            self._found += ((tile is not None) - self._found) / _MEMORY
            if tile is not None:
                self._tiles.move_to_end(key)
            else:
                mine = self._tiles[key] = Future()
        return tile.result() if tile is not None else self._make(key, mine, make)

    def peek(self, key: Hashable) -> np.ndarray | None:
        """The array of this key if it is kept."""
        with self._lock:
            tile = self._tiles.get(key)
        return tile.result() if tile is not None else None

    def discard(self, owner: Hashable) -> None:
        """Forgets all arrays whose key is a tuple that begins with `owner`."""
        with self._lock:
            for key in [key for key, tile in self._tiles.items() if key[0] == owner and tile.done()]:
                self._remove(key)
            for key in [key for key in self._passed if key[0] == owner]:
                del self._passed[key]

    def _make(
        self, key: Hashable, tile: "Future[np.ndarray | None]", make: Callable[[], np.ndarray | None]
    ) -> np.ndarray | None:
        try:
            array = make()
        except BaseException as error:
            with self._lock:
                self._tiles.pop(key, None)
            tile.set_exception(error)
            raise
        with self._lock:
            if array is None:
                self._tiles.pop(key, None)
            else:
                self._bytes += array.nbytes
            tile.set_result(array)
            self._evict()
        return array

    def _evict(self) -> None:
        """Drops the oldest; those that are still being made have no bytes yet, and stay."""
        if self._bytes <= self.max_bytes:
            return
        for key in list(self._tiles):
            if self._tiles[key].done():
                self._remove(key)
                if self._bytes <= self.max_bytes:
                    return

    def _remove(self, key: Hashable) -> None:
        self._bytes -= self._tiles.pop(key).result().nbytes
