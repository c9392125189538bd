"""Tiles packed as JPEG, one Arrow file a slide, for training from slow storage: memory-mapped, read without the slides.

A packed file holds the rows of a slide's tile manifest in their order, with their pixels. An index ties the files of a
tile set to one merged manifest, so that a run on packed tiles draws the same tiles in the same order as one on slides;
only the pixels differ, by what JPEG changes.
"""

import hashlib
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from dinoscope.data.tiles import MappedTiles, SlideAccess, SlideTiles, find_tiles, map_manifest
from dinoscope.errors import ConfigError, ManifestError, SlideError
from dinoscope.files import atomic_path, read_json, write_json
from dinoscope.progress import progress
from dinoscope.slides.manifest import manifest_digest, read_tiles
from dinoscope.slides.padding import read_tile
from dinoscope.slides.reader import Slide
from dinoscope.slides.table import SlideRecord

__all__ = [
    "SUBSAMPLINGS",
    "PackedIndex",
    "PackedTiles",
    "decode_jpeg",
    "encode_jpeg",
    "open_packed",
    "pack_slide",
    "write_index",
]

log = logging.getLogger(__name__)
SUBSAMPLINGS = {
    "4:4:4": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    "4:2:2": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422,
    "4:2:0": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
}
_VERSION = 1
_ROWS_PER_BATCH = 64
_SCHEMA = pa.schema(
    [("x", pa.int32()), ("y", pa.int32()), ("tile_px", pa.int32()), ("footprint_px", pa.int32()), ("jpeg", pa.binary())]
)
_COORDINATES = _SCHEMA.names[:-1]


def encode_jpeg(image: np.ndarray, quality: int, subsampling: str) -> bytes:
    """uint8 RGB (h, w, 3) as JPEG; `subsampling` is a key of `SUBSAMPLINGS`."""
    options = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, SUBSAMPLINGS[subsampling]]
    encoded, stream = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)
    assert encoded
    return stream.tobytes()


def decode_jpeg(stream: np.ndarray) -> np.ndarray | None:
    """uint8 RGB of the bytes of a JPEG; None where they are none."""
    try:
        return cv2.imdecode(stream, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        return None


# ---- writing


def pack_slide(
    slide_id: str,
    opened: Callable[[], AbstractContextManager[Slide]],
    tiles: Path,
    output: Path,
    *,
    quality: int,
    subsampling: str,
    skip_unreadable: bool = False,
) -> int:
    """Writes the tiles of one slide.

    Args:
        slide_id: The slide.
        opened: Opens it; not called for a slide without tiles, which may have been skipped.
        tiles: Its tile manifest.
        output: Arrow file to write.
        quality: Of the JPEGs, 1 to 100.
        subsampling: Of their colour, a key of `SUBSAMPLINGS`.
        skip_unreadable: Leaves the place of a tile that cannot be read empty; training has another stand in for it.

    Returns:
        Bytes of all JPEGs together.

    Raises:
        ManifestError: The manifest cannot be read, or is of another slide.
        SlideError: A tile, or with `skip_unreadable` the slide, cannot be read.
    """
    table = read_tiles(tiles)
    _require_slide(table, slide_id, tiles)
    header = {"version": _VERSION, "slide_id": slide_id, "num_tiles": table.num_rows}
    schema = _SCHEMA.with_metadata({"packed": json.dumps(header | {"quality": quality, "subsampling": subsampling})})
    digest, num_bytes = hashlib.sha256(), 0
    starts = range(0, max(table.num_rows, 1), _ROWS_PER_BATCH)
    with (
        atomic_path(output) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, schema) as writer,
        progress(f"packing {slide_id}", table.num_rows, unit="tiles") as shown,
        opened() if table.num_rows else nullcontext() as slide,
    ):
        for start in starts:
            rows = table.slice(start, _ROWS_PER_BATCH)
            streams = [_packed(slide, row, quality, subsampling, skip_unreadable) for row in _rows(rows)]
            for stream in streams:
                digest.update(stream)
                num_bytes += len(stream)
            batch = _batch(rows, streams, schema)
            ends = {"digest": digest.hexdigest()} if start == starts[-1] else {}
            writer.write_batch(batch, custom_metadata=ends)
            shown.advance(rows.num_rows)
    return num_bytes


def _require_slide(table: pa.Table, slide_id: str, tiles: Path) -> None:
    other = [name for name in table["slide_id"].unique().to_pylist() if name != slide_id]
    if other:
        raise ManifestError(
            f"{tiles.name} has tiles of slide {other[0]}, not of {slide_id}: give the tiles of the slide"
        )


def _rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    columns = {name: table[name].to_numpy() for name in ("x", "y", "level", "read_px", "tile_px", "footprint_px")}
    for row in range(table.num_rows):
        yield {name: int(values[row]) for name, values in columns.items()}


def _packed(slide: Slide, row: dict[str, int], quality: int, subsampling: str, skip_unreadable: bool) -> bytes:
    try:
        return encode_jpeg(_read(slide, row), quality, subsampling)
    except SlideError as error:
        if not skip_unreadable:
            raise
        log.warning("%s: its place stays empty", error)
        return b""


def _read(slide: Slide, row: dict[str, int]) -> np.ndarray:
    return read_tile(slide, row["x"], row["y"], row["level"], row["read_px"], row["tile_px"], row["footprint_px"])


def _batch(rows: pa.Table, streams: list[bytes], schema: pa.Schema) -> pa.RecordBatch:
    numbers = [pa.array(rows[name].to_numpy().astype(np.int32)) for name in _COORDINATES]
    return pa.record_batch([*numbers, pa.array(streams, pa.binary())], schema=schema)


def write_index(manifest: Path, folder: Path, output: Path) -> dict[str, Any]:
    """Ties packed files to the manifest whose tiles they hold; a copy is kept for runs that go on with that manifest.

    Args:
        manifest: The merged manifest.
        folder: Of the packed files, SLIDE.arrow.
        output: JSON file to write, in the same folder.

    Returns:
        What was written.

    Raises:
        ManifestError: A file is missing or damaged, was packed with other settings than the first, or holds other
            tiles than the manifest.
    """
    tiles = map_manifest(manifest, manifest.parent / ".mapped")
    digest, entries, settings, num_bytes = manifest_digest(manifest), {}, None, 0
    for slide_id, start, count in tiles.slide_runs():
        file = PackedFile(folder / f"{slide_id}.arrow")
        _require_same_tiles(file, tiles, slide_id, start, count)
        if file.settings != (settings := settings or file.settings):
            raise ManifestError(
                f"packed file {file.path.name} has {_told(file.settings)}, others of {folder.name} have "
                f"{_told(settings)}: delete it, so that it is packed again"
            )
        entries[slide_id] = file.digest
        num_bytes += file.path.stat().st_size
    content = hashlib.sha256(json.dumps([digest, settings, sorted(entries.items())]).encode()).hexdigest()
    index = {"version": _VERSION, "manifest": digest, "digest": content, "num_tiles": len(tiles), "bytes": num_bytes}
    index |= {"quality": settings[0], "subsampling": settings[1], "slides": entries}
    write_json(_kept_index(folder, digest), index)
    write_json(output, index)
    return index


def _kept_index(folder: Path, digest: str) -> Path:
    return folder / ".indexes" / f"{digest[:16]}.json"


def _require_same_tiles(file: "PackedFile", tiles: MappedTiles, slide_id: str, start: int, count: int) -> None:
    wanted = [tiles[row] for row in range(start, start + count)]
    found = file.coordinates()
    expected = [(tile.x, tile.y, tile.kind.tile_px, tile.kind.footprint_px) for tile in wanted]
    if not np.array_equal(found, np.array(expected, np.int32).reshape(-1, len(_COORDINATES))):
        raise ManifestError(
            f"packed file {file.path.name} holds other tiles of slide {slide_id} than the manifest: delete it, so that "
            "it is packed again"
        )


def _told(settings: tuple[int, str]) -> str:
    return f"JPEG quality {settings[0]} with {settings[1]}"


# ---- reading


class PackedFile:
    """The packed tiles of one slide, mapped."""

    def __init__(self, path: Path) -> None:
        """Maps a file.

        Raises:
            ManifestError: It is missing, damaged, or no packed file.
        """
        self.path = path
        try:
            self._reader = pa.ipc.open_file(pa.memory_map(str(path)))
            header = json.loads(self._reader.schema.metadata[b"packed"])
            last = self._reader.get_batch_with_custom_metadata(self._reader.num_record_batches - 1)
            self.digest = last.custom_metadata[b"digest"].decode()
            self.settings = int(header["quality"]), str(header["subsampling"])
            self.num_tiles = int(header["num_tiles"])
        except FileNotFoundError:
            raise ManifestError(
                f"packed file {path.name} is missing from {path.parent.name}: pack the slide again (pack_tiles.py)"
            ) from None
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise ManifestError(
                f"packed file {path.name} is damaged or no packed file ({_first_line(error)}): delete it, so that it "
                "is packed again"
            ) from None

    def coordinates(self) -> np.ndarray:
        """(tiles, 4) int32: x, y, tile_px and footprint_px of all."""
        batches = [self._reader.get_batch(index) for index in range(self._reader.num_record_batches)]
        columns = [np.column_stack([_numbers(batch, name) for name in _COORDINATES]) for batch in batches]
        return np.concatenate(columns)

    def tile(self, row: int) -> tuple[tuple[int, int], np.ndarray]:
        """x and y of a row, and the bytes of its JPEG, where they lie in the file."""
        batch = self._reader.get_batch(row // _ROWS_PER_BATCH)
        place = row % _ROWS_PER_BATCH
        stream = np.frombuffer(batch.column("jpeg")[place].as_buffer(), np.uint8)
        return (int(_numbers(batch, "x")[place]), int(_numbers(batch, "y")[place])), stream


def _numbers(batch: pa.RecordBatch, name: str) -> np.ndarray:
    """The values of an int32 column; `to_numpy` would import pandas."""
    column = batch.column(name)
    return np.frombuffer(column.buffers()[1], np.int32, len(column), 4 * column.offset)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


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
        kept = _kept_index(path.parent, manifest)
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
        if index["version"] == _VERSION and {"manifest", "digest", "quality", "subsampling", "slides"} <= index.keys():
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
        self._files: OrderedDict[str, PackedFile] = OrderedDict()
        self._pid = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_files": OrderedDict()}

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

    def _file(self, slide_id: str) -> PackedFile:
        if self._pid != os.getpid():
            self._files, self._pid = OrderedDict(), os.getpid()
        file = self._files.pop(slide_id, None)
        if file is None:
            file = PackedFile(self.index.folder / f"{slide_id}.arrow")
            if file.digest != self.index.slides.get(slide_id):
                raise ManifestError(
                    f"packed file {file.path.name} is not the one that the index of {file.path.parent.name} names: it "
                    "was packed anew; make the index again (pack_index.py), and start under a new run name"
                )
        self._files[slide_id] = file
        while len(self._files) > self._max_open:
            self._files.popitem(last=False)
        return file


def _damaged_tile(sample_id: str, file: PackedFile, problem: str) -> ManifestError:
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
