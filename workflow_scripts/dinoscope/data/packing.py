"""Writes tiles as JPEG into Arrow files (see packed.py, which reads them).

A slide has a first file, SLIDE.arrow, that comes into being last: where it is, all others are whole. They are in a
folder beside it, named by the slide and a number, and their digests stand in the first.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from dinoscope.data.packed import (
    COORDINATES,
    ROWS_PER_BATCH,
    VERSION,
    PackedSlide,
    decode_jpeg,
    further_path,
    kept_index,
)
from dinoscope.data.tiles import MappedTiles, map_manifest
from dinoscope.errors import ManifestError, SlideError
from dinoscope.files import atomic_path, write_json
from dinoscope.progress import progress
from dinoscope.slides.manifest import manifest_digest, read_tiles
from dinoscope.slides.padding import read_tile
from dinoscope.slides.reader import Slide

__all__ = ["FILE_BYTES", "SUBSAMPLINGS", "encode_jpeg", "pack_slide", "write_index"]

log = logging.getLogger(__name__)
SUBSAMPLINGS = {
    "4:4:4": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    "4:2:2": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422,
    "4:2:0": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
}
FILE_BYTES = 10**9
_SCHEMA = pa.schema([*((name, pa.int32()) for name in COORDINATES), ("jpeg", pa.binary())])
_COLUMNS = ("x", "y", "level", "read_px", "tile_px", "footprint_px")


def encode_jpeg(image: np.ndarray, quality: int, subsampling: str) -> bytes:
    """uint8 RGB (h, w, 3) as JPEG; `subsampling` is a key of `SUBSAMPLINGS`."""
    options = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, SUBSAMPLINGS[subsampling]]
    encoded, stream = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)
    assert encoded
    return stream.tobytes()


def pack_slide(
    slide_id: str,
    opened: Callable[[], AbstractContextManager[Slide]],
    tiles: Path,
    output: Path,
    *,
    quality: int,
    subsampling: str,
    copy_stored: bool = False,
    file_bytes: int = FILE_BYTES,
    skip_unreadable: bool = False,
) -> int:
    """Writes the tiles of one slide; what an earlier packing left of it is replaced.

    Args:
        slide_id: The slide.
        opened: Opens it; not called for a slide without tiles, which may have been skipped.
        tiles: Its tile manifest.
        output: Arrow file to write; further ones are made in a folder beside it where the tiles are many.
        quality: Of the JPEGs, 1 to 100.
        subsampling: Of their colour, a key of `SUBSAMPLINGS`.
        copy_stored: Whether a tile that the slide stores as such, as JPEG, is copied as it is, without loss.
        file_bytes: JPEGs of about so many bytes go into one file.
        skip_unreadable: Leaves the place of a tile that cannot be read empty; training has another stand in for it.

    Returns:
        Bytes of all JPEGs together.

    Raises:
        ManifestError: The manifest cannot be read, or is of another slide.
        SlideError: A tile, or with `skip_unreadable` the slide, cannot be read.
    """
    table = read_tiles(tiles)
    _require_slide(table, slide_id, tiles)
    header = {"version": VERSION, "slide_id": slide_id, "num_tiles": table.num_rows}
    header |= {"quality": quality, "subsampling": subsampling}
    with (
        _Parts(output, header, file_bytes) as parts,
        progress(f"packing {slide_id}", table.num_rows, unit="tiles") as shown,
        opened() if table.num_rows else nullcontext() as slide,
    ):
        packer = _Packer(slide, quality, subsampling, copy_stored, skip_unreadable)
        for start in range(0, max(table.num_rows, 1), ROWS_PER_BATCH):
            rows = table.slice(start, ROWS_PER_BATCH)
            parts.add(rows, [packer.stream(row) for row in _rows(rows)])
            shown.advance(rows.num_rows)
        parts.finish({"copied": str(packer.copied)})
    return parts.num_bytes


class _Packer:
    """Makes the JPEGs of a slide's tiles."""

    def __init__(
        self, slide: Slide | None, quality: int, subsampling: str, copy_stored: bool, skip_unreadable: bool
    ) -> None:
        self._slide, self._quality, self._subsampling = slide, quality, subsampling
        self._copy_stored, self._skip_unreadable, self.copied = copy_stored, skip_unreadable, 0

    def stream(self, row: dict[str, int]) -> bytes:
        """The JPEG of a tile; empty where it cannot be read and may be left out."""
        try:
            image = read_tile(self._slide, *(row[name] for name in _COLUMNS))
        except SlideError as error:
            if not self._skip_unreadable:
                raise
            log.warning("%s: its place stays empty", error)
            return b""
        stored = self._stored(row, image) if self._copy_stored else None
        self.copied += stored is not None
        return encode_jpeg(image, self._quality, self._subsampling) if stored is None else stored

    def _stored(self, row: dict[str, int], image: np.ndarray) -> bytes | None:
        """The slide's own JPEG of a tile, where there is one and reading it again gives the tile's very pixels."""
        level, side = row["level"], row["tile_px"]
        if row["read_px"] != side or row["footprint_px"] != side * self._slide.level_downsamples[level]:
            return None
        stream = self._slide.stored_jpeg(row["x"], row["y"], level, side)
        found = None if stream is None else decode_jpeg(np.frombuffer(stream, np.uint8))
        return stream if found is not None and np.array_equal(found, image) else None


class _Parts:
    """The files of one slide, written one after the other; a context manager that leaves all of them or none."""

    def __init__(self, output: Path, header: dict[str, Any], file_bytes: int) -> None:
        self._output, self._header, self._file_bytes = output, header, file_bytes
        self._digest, self.num_bytes, self._further = hashlib.sha256(), 0, []

    def __enter__(self) -> "_Parts":
        self._stack = ExitStack()
        temporary = self._stack.enter_context(atomic_path(self._output))
        self._first = self._current = self._stack.enter_context(_Part(temporary, self._header))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        whole = False
        try:
            self._stack.__exit__(kind, error, trace)  # the first file gets its name, or is removed
            whole = kind is None
        finally:
            if whole or not self._output.exists():  # else an earlier packing stays, with all its files
                _remove_further(self._output, len(self._further) + 2 if whole else 2)

    def add(self, rows: pa.Table, streams: list[bytes]) -> None:
        """Writes a batch, into a new file where the current one has enough."""
        if self._current.num_bytes >= self._file_bytes:
            self._end_current()
            self._start_another()
        for stream in streams:
            self._digest.update(stream)
            self.num_bytes += len(stream)
        self._current.add(rows, streams)

    def finish(self, told: dict[str, str]) -> None:
        """Ends the last file, then the first, which says what belongs to it."""
        self._end_current()
        if self._further:
            told = told | {"parts": json.dumps(self._further)}
        self._first.end(told | {"digest": self._digest.hexdigest()})

    def _start_another(self) -> None:
        # of a slide that is packed anew, the earlier first file must not be found beside other files' new content
        self._output.unlink(missing_ok=True)
        path = further_path(self._output, len(self._further) + 2)
        self._another = ExitStack()
        temporary = self._another.enter_context(atomic_path(path))
        self._current = self._another.enter_context(_Part(temporary, self._header))
        self._stack.push(self._abandon)

    def _abandon(self, *exception: object) -> None:
        """Where the packing fails, the file that is being written goes too."""
        self._another.__exit__(*exception)

    def _end_current(self) -> None:
        if self._current is self._first:
            return
        self._further.append((self._current.num_rows, self._current.digest.hexdigest()))
        self._current.end({"digest": self._current.digest.hexdigest()})
        self._another.close()


class _Part:
    """One Arrow file that is being written; its last batch waits for what is only known in the end."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self._schema = _SCHEMA.with_metadata({"packed": json.dumps(header)})
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._sink, self._schema)
        self._waiting: pa.RecordBatch | None = None
        self.digest, self.num_bytes, self.num_rows = hashlib.sha256(), 0, 0

    def __enter__(self) -> "_Part":
        return self

    def __exit__(self, *exception: object) -> None:
        self._writer.close()
        self._sink.close()

    def add(self, rows: pa.Table, streams: list[bytes]) -> None:
        """Takes a batch and writes the one before."""
        if self._waiting is not None:
            self._writer.write_batch(self._waiting)
        numbers = [pa.array(rows[name].to_numpy().astype(np.int32)) for name in COORDINATES]
        self._waiting = pa.record_batch([*numbers, pa.array(streams, pa.binary())], schema=self._schema)
        for stream in streams:
            self.digest.update(stream)
            self.num_bytes += len(stream)
        self.num_rows += len(streams)

    def end(self, told: dict[str, str]) -> None:
        """Writes the last batch, with what it tells of all."""
        self._writer.write_batch(self._waiting, custom_metadata=told)


def _remove_further(first: Path, start: int) -> None:
    """Removes a slide's further files from a number on: of an earlier packing that had more, or of one that failed."""
    number = start
    while (path := further_path(first, number)).exists():
        path.unlink()
        number += 1


def _require_slide(table: pa.Table, slide_id: str, tiles: Path) -> None:
    other = [name for name in table["slide_id"].unique().to_pylist() if name != slide_id]
    if other:
        raise ManifestError(
            f"{tiles.name} has tiles of slide {other[0]}, not of {slide_id}: give the tiles of the slide"
        )


def _rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    columns = {name: table[name].to_numpy() for name in _COLUMNS}
    for row in range(table.num_rows):
        yield {name: int(values[row]) for name, values in columns.items()}


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
    digest, entries, settings = manifest_digest(manifest), {}, None
    totals = {"bytes": 0, "files": 0, "copied": 0}
    for slide_id, start, count in tiles.slide_runs():
        file = PackedSlide(folder / f"{slide_id}.arrow")
        _require_same_tiles(file, tiles, slide_id, start, count)
        if file.settings != (settings := settings or file.settings):
            raise ManifestError(
                f"packed file {file.path.name} has {_told(file.settings)}, others of {folder.name} have "
                f"{_told(settings)}: delete it, so that it is packed again"
            )
        entries[slide_id] = file.digest
        for name, value in (("bytes", file.num_bytes()), ("files", file.num_files), ("copied", file.copied)):
            totals[name] += value
    content = hashlib.sha256(json.dumps([digest, settings, sorted(entries.items())]).encode()).hexdigest()
    index = {"version": VERSION, "manifest": digest, "digest": content, "num_tiles": len(tiles)} | totals
    index |= {"quality": settings[0], "subsampling": settings[1], "slides": entries}
    write_json(kept_index(folder, digest), index)
    write_json(output, index)
    return index


def _require_same_tiles(file: "PackedSlide", tiles: MappedTiles, slide_id: str, start: int, count: int) -> None:
    wanted = [tiles[row] for row in range(start, start + count)]
    found = file.coordinates()
    expected = [(tile.x, tile.y, tile.kind.tile_px, tile.kind.footprint_px) for tile in wanted]
    if not np.array_equal(found, np.array(expected, np.int32).reshape(-1, len(COORDINATES))):
        raise ManifestError(
            f"packed file {file.path.name} holds other tiles of slide {slide_id} than the manifest: delete it, so that "
            "it is packed again"
        )


def _told(settings: tuple[int, str]) -> str:
    return f"JPEG quality {settings[0]} with {settings[1]}"
