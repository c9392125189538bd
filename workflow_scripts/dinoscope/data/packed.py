"""Tiles packed as JPEG, one or more Arrow files a slide, for training from slow storage: memory-mapped.

Packed files hold the rows of a slide's tile manifest in their order, with their pixels (packing.py writes them). An
index ties those of a tile set to one merged manifest, so that a run on packed tiles draws the same tiles in the same
order as one on slides; only the pixels differ, by what JPEG changes.
"""

import json
import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from dinoscope.data.tiles import MappedTiles, SlideAccess, SlideTiles, find_tiles
from dinoscope.errors import ConfigError, ManifestError, SlideError
from dinoscope.files import read_json
from dinoscope.slides.table import SlideRecord

__all__ = [
    "COORDINATES",
    "FURTHER_FOLDER",
    "ROWS_PER_BATCH",
    "VERSION",
    "PackedIndex",
    "PackedSlide",
    "PackedTiles",
    "decode_jpeg",
    "further_path",
    "kept_index",
    "open_packed",
    "read_index",
]

VERSION = 1
ROWS_PER_BATCH = 64
COORDINATES = ("x", "y", "tile_px", "footprint_px")
FURTHER_FOLDER = ".more"


def decode_jpeg(stream: np.ndarray) -> np.ndarray | None:
    """uint8 RGB of the bytes of a JPEG; None where they are none."""
    try:
        return cv2.imdecode(stream, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        return None


class PackedSlide:
    """The packed tiles of one slide, mapped: one file, or where they are many a first one and others that it names.

    Attributes:
        path: The first file.
        digest: Of all JPEGs.
        settings: Quality and subsampling.
        num_tiles: Rows in all files.
        copied: How many of them are JPEGs of the slide itself.
    """

    def __init__(self, path: Path) -> None:
        """Maps the first file; the others when a tile of theirs is wanted.

        Raises:
            ManifestError: It is missing, damaged, or no packed file.
        """
        self.path, self._first = path, _File(path)
        told, header = self._first.last, self._first.header
        try:
            self.digest = told[b"digest"].decode()
            self.settings = int(header["quality"]), str(header["subsampling"])
            self.num_tiles, self.copied = int(header["num_tiles"]), int(told.get(b"copied", 0))
            further = [(int(rows), str(digest)) for rows, digest in json.loads(told.get(b"parts", b"[]"))]
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged_file(path, error) from None
        self._digests = [digest for _, digest in further]
        rows = [self.num_tiles - sum(rows for rows, _ in further), *(rows for rows, _ in further)]
        self._starts = np.cumsum([0, *rows])
        self._files: list[_File | None] = [self._first, *[None] * len(further)]

    @property
    def num_files(self) -> int:
        """Of how many files the packed slide consists."""
        return len(self._files)

    def num_bytes(self) -> int:
        """Of all its files."""
        return sum(path.stat().st_size for path in (self.path, *self._further_paths()))

    def coordinates(self) -> np.ndarray:
        """(tiles, 4) int32: x, y, tile_px and footprint_px of all."""
        return np.concatenate([self._file(number).coordinates() for number in range(self.num_files)])

    def tile(self, row: int) -> tuple[tuple[int, int], np.ndarray]:
        """x and y of a row, and the bytes of its JPEG, where they lie in the file.

        Raises:
            ManifestError: Its file is missing, damaged or not the one that belongs to the first.
        """
        number = int(np.searchsorted(self._starts, row, "right")) - 1
        if not 0 <= number < self.num_files:
            raise IndexError(f"there is no row {row}")
        return self._file(number).tile(row - int(self._starts[number]))

    def _file(self, number: int) -> "_File":
        file = self._files[number]
        if file is None:
            file = self._files[number] = _File(further_path(self.path, number + 1))
            if file.last.get(b"digest", b"").decode() != self._digests[number - 1]:
                raise ManifestError(
                    f"packed file {file.path.name} does not belong to {self.path.name}: delete {self.path.name}, so "
                    "that the slide is packed again"
                )
        return file

    def _further_paths(self) -> list[Path]:
        return [further_path(self.path, number) for number in range(2, self.num_files + 1)]


def further_path(first: Path, number: int) -> Path:
    """Where a packed slide's second, third … file is; names that no first file can have."""
    return first.parent / FURTHER_FOLDER / f"{first.stem}.{number}{first.suffix}"


class _File:
    """One Arrow file of packed tiles, mapped.

    Attributes:
        header: What was known before the tiles were.
        last: What the last batch says of all.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._reader = pa.ipc.open_file(pa.memory_map(str(path)))
            self.header = json.loads(self._reader.schema.metadata[b"packed"])
            last = self._reader.get_batch_with_custom_metadata(self._reader.num_record_batches - 1)
            self.last = dict(last.custom_metadata or {})
        except FileNotFoundError:
            raise ManifestError(
                f"packed file {path.name} is missing from {path.parent.name}: pack the slide again (pack_tiles.py)"
            ) from None
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise _damaged_file(path, error) from None

    def coordinates(self) -> np.ndarray:
        """(tiles, 4) int32: x, y, tile_px and footprint_px of all."""
        batches = [self._reader.get_batch(index) for index in range(self._reader.num_record_batches)]
        columns = [np.column_stack([_numbers(batch, name) for name in COORDINATES]) for batch in batches]
        return np.concatenate(columns)

    def tile(self, row: int) -> tuple[tuple[int, int], np.ndarray]:
        """x and y of a row, and the bytes of its JPEG."""
        batch = self._reader.get_batch(row // ROWS_PER_BATCH)
        place = row % ROWS_PER_BATCH
        stream = np.frombuffer(batch.column("jpeg")[place].as_buffer(), np.uint8)
        return (int(_numbers(batch, "x")[place]), int(_numbers(batch, "y")[place])), stream


def _damaged_file(path: Path, error: Exception) -> ManifestError:
    return ManifestError(
        f"packed file {path.name} is damaged or no packed file ({_first_line(error)}): delete it, so that it is packed "
        "again"
    )


def _numbers(batch: pa.RecordBatch, name: str) -> np.ndarray:
    """The values of an int32 column; `to_numpy` would import pandas."""
    column = batch.column(name)
    return np.frombuffer(column.buffers()[1], np.int32, len(column), 4 * column.offset)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def kept_index(folder: Path, digest: str) -> Path:
    """Where the index of an earlier manifest is kept, for runs that go on with it."""
    return folder / ".indexes" / f"{digest[:16]}.json"


@dataclass(frozen=True)
class PackedIndex:
    """The packed files of a manifest.

    Attributes:
        folder: Where they are.
        manifest: Digest of the manifest.
        digest: Of manifest, settings and pixels.
        quality: Of the JPEGs.
        subsampling: Of their colour.
        slides: slide_id -> digest of the slide's JPEGs.
    """

    folder: Path
    manifest: str
    digest: str
    quality: int
    subsampling: str
    slides: dict[str, str]

    @property
    def pixels(self) -> str:
        """What a run is sealed with: other pixels, another text."""
        return f"JPEG {self.quality} {self.subsampling} {self.digest}"


def read_index(path: Path, manifest: str) -> PackedIndex:
    """The index of the packed files of a manifest.

    Args:
        path: As `write_index` wrote it; when it is of another manifest by now, the copy that was kept is taken.
        manifest: Digest of the manifest.

    Raises:
        ManifestError: It is missing or damaged, or the tiles of that manifest were never packed.
    """
    index = _index_of(path)
    if index["manifest"] != manifest:
        kept = kept_index(path.parent, manifest)
        if not kept.is_file():
            raise ManifestError(
                f"packed tiles {path.parent.name} are those of manifest {index['manifest'][:8]}, and {manifest[:8]} is "
                "trained on: pack the tiles of that manifest, or set packing.enabled: false"
            )
        index = _index_of(kept)
    names = ("manifest", "digest", "quality", "subsampling", "slides")
    return PackedIndex(path.parent, **{name: index[name] for name in names})


def _index_of(path: Path) -> dict[str, Any]:
    try:
        index = read_json(path)
        if index["version"] == VERSION and {"manifest", "digest", "quality", "subsampling", "slides"} <= index.keys():
            return index
        problem = f"version {index['version']}"
    except FileNotFoundError:
        raise ManifestError(f"there is no index of packed tiles {path}: make it with pack_index.py") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = _first_line(error)
    raise ManifestError(f"{path} is no index of packed tiles ({problem}): make it again with pack_index.py")


class PackedTiles(SlideTiles):
    """The tiles of a manifest, read from packed files; all else is as with `SlideTiles`."""

    def __init__(
        self,
        tiles: MappedTiles,
        slides: list[SlideRecord],
        digest: str,
        index: PackedIndex,
        access: SlideAccess | None = None,
        max_open: int = 64,
    ) -> None:
        """Takes what `SlideTiles` does, and the index; at most `max_open` files are open at a time."""
        super().__init__(tiles, slides, digest, access)
        self.index, self._max_open = index, max_open
        self._first_row = {slide_id: start for slide_id, start, _ in tiles.slide_runs()}
        self._files: OrderedDict[str, PackedSlide] = OrderedDict()
        self._pid = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_files": OrderedDict()}

    def reader_digest(self) -> None:
        """No reader takes part any more: the pixels themselves are sealed."""
        return

    def _read(self, index: int) -> tuple[np.ndarray, str]:
        """The tile as it was packed, and its id: slide_id@x,y in level-0 pixels.

        Raises:
            ManifestError: Its file is missing or damaged, or no longer what the index says.
            SlideError: Its place is empty.
        """
        tile = self.tiles[index]
        slide_id, sample_id = tile.kind.slide_id, self.sample_id(index)
        file = self._file(slide_id)
        row = index - self._first_row[slide_id]
        try:
            corner, stream = file.tile(row)
        except (pa.ArrowException, OSError, IndexError, ValueError) as error:
            raise _damaged_tile(sample_id, file, _first_line(error)) from None
        if corner != (tile.x, tile.y):
            raise _damaged_tile(sample_id, file, f"in its place is the tile at {corner[0]},{corner[1]}")
        if not len(stream):
            raise SlideError(
                f"tile {sample_id} could not be read from its slide when it was packed: set slides.on_error to skip, "
                f"or repair the slide and delete {file.path.name}, so that it is packed again"
            )
        image = decode_jpeg(stream)
        if image is None or image.shape != (tile.kind.tile_px, tile.kind.tile_px, 3):
            raise _damaged_tile(sample_id, file, "its JPEG cannot be decoded")
        return image, sample_id

    def _file(self, slide_id: str) -> PackedSlide:
        if self._pid != os.getpid():
            self._files, self._pid = OrderedDict(), os.getpid()
        file = self._files.pop(slide_id, None)
        if file is None:
            file = PackedSlide(self.index.folder / f"{slide_id}.arrow")
            if file.digest != self.index.slides.get(slide_id):
                raise ManifestError(
                    f"packed file {file.path.name} is not the one that the index of {file.path.parent.name} names: it "
                    "was packed anew; make the index again (pack_index.py), and start under a new run name"
                )
        self._files[slide_id] = file
        while len(self._files) > self._max_open:
            self._files.popitem(last=False)
        return file


def _damaged_tile(sample_id: str, file: PackedSlide, problem: str) -> ManifestError:
    return ManifestError(
        f"packed tile {sample_id} cannot be read from {file.path.name} ({problem}): delete the file, so that it is "
        "packed again"
    )


def open_packed(
    manifest: Path, slides: str, packed: Path, sealed: str | None = None, access: SlideAccess | None = None
) -> PackedTiles:
    """The tiles of a merged manifest, from packed files.

    Args:
        manifest: The merged manifest; its mapped form is kept in `.mapped` beside it.
        slides: Where the slides are; they are not opened.
        packed: The index of the packed files.
        sealed: Digest of the manifest that a run was started with, when it goes on.
        access: What becomes of tiles that could not be read when they were packed.

    Raises:
        ManifestError: See `map_manifest` and `read_index`.
        ConfigError: The manifest has tiles of a slide that is not among the slides.
    """
    tiles, records, digest = find_tiles(manifest, slides, sealed)
    index = read_index(packed, digest)
    missing = {kind.slide_id for kind in tiles.kinds} - index.slides.keys()
    if missing:
        raise ConfigError(f"slide {min(missing)} is not among the packed tiles of {packed}: pack it (pack_tiles.py)")
    return PackedTiles(tiles, records, digest, index, access)
