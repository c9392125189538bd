"""The tiles of slides as training images, and their manifest as three memory-mapped columns for all processes.

Twelve bytes a tile: the kind of tile (slide, level, sizes, mpp: one of few), x and y. The parquet manifest is streamed
once into an uncompressed Arrow file named by the manifest's digest; workers map it and copy nothing. Its header says
which rows are of one slide: they follow each other.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dinoscope.data.sources import Window
from dinoscope.errors import ConfigError, ManifestError, SlideError
from dinoscope.files import atomic_path
from dinoscope.slides.manifest import manifest_digest
from dinoscope.slides.padding import read_tile
from dinoscope.slides.privacy import without_file_name
from dinoscope.slides.reader import Slide, SlidePool
from dinoscope.slides.skipping import Attempt
from dinoscope.slides.table import SlideRecord, read_slide_table
from dinoscope.slides.user_reader import serves, source_digest

__all__ = [
    *("MappedTiles", "SlideAccess", "SlideRows", "SlideTiles", "Tile", "TileKind", "find_tiles", "map_manifest"),
    "open_tiles",
]

_log = logging.getLogger(__name__)
_MAX_REPLACEMENTS, _MAX_SEARCH = 20, 200
_SCHEMA = pa.schema([("kind", pa.int32()), ("x", pa.int32()), ("y", pa.int32())])
_KIND_COLUMNS = ["level", "read_px", "tile_px", "mpp", "footprint_px"]


@dataclass(frozen=True)
class TileKind:
    """What all tiles of one slide at one mpp have in common (units as in the manifest)."""

    slide_id: str
    level: int
    read_px: int
    tile_px: int
    mpp: float
    footprint_px: int


@dataclass(frozen=True)
class Tile:
    """One tile: its kind and its top-left corner in level-0 pixels."""

    kind: TileKind
    x: int
    y: int


@dataclass(frozen=True)
class SlideRows:
    """The rows of one slide, `start` to before `start + count`, and the stratum (site, scanner, stain) it is of."""

    slide_id: str
    stratum: str
    start: int
    count: int


@dataclass(frozen=True)
class SlideAccess:
    """How slides are opened, and what becomes of tiles that cannot be read.

    Attributes:
        reader: module:Class of a reader for formats that OpenSlide lacks.
        on_error: "fail", or "skip": another tile stands in for one that cannot be read.
        records: Folder in which slides with such tiles are written down, in a part of the run's name.
        run: The run's name.
    """

    reader: str | None = None
    on_error: str = "fail"
    records: Path | None = None
    run: str = "training"


class MappedTiles:
    """The tiles of a manifest by number; indexing takes microseconds and no memory of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open()

    def _open(self) -> None:
        reader = pa.ipc.open_file(pa.memory_map(str(self.path)))
        self.kinds = [TileKind(**kind) for kind in json.loads(reader.schema.metadata[b"kinds"])]
        batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
        self._columns = [[_values(column) for column in batch.columns] for batch in batches]
        self._ends = np.cumsum([batch.num_rows for batch in batches])

    def __getstate__(self) -> Path:
        return self.path

    def __setstate__(self, path: Path) -> None:
        self.__init__(path)

    def slide_runs(self) -> list[tuple[str, int, int]]:
        """Slide, first row and number of rows of every slide that has any, in the order of rows.

        Raises:
            ManifestError: The file was mapped by a version of dinoscope that did not note that.
        """
        with pa.ipc.open_file(pa.memory_map(str(self.path))) as reader:
            runs = reader.schema.metadata.get(b"runs")
        if runs is None:
            raise ManifestError(f"{self.path} was made by an earlier version of dinoscope: delete it")
        return [tuple(run) for run in json.loads(runs)]

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def kind_runs(self) -> list[tuple[TileKind, int, int]]:
        """Kind, first row and number of rows of every stretch of rows that are of one kind."""
        runs, row = [], 0
        for kinds, _, _ in self._columns:
            bounds = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(kinds)]
            runs += [(self.kinds[kinds[a]], row + a, b - a) for a, b in pairwise(bounds) if b > a]
            row += len(kinds)
        return runs

    def __getitem__(self, index: int) -> Tile:
        batch = int(np.searchsorted(self._ends, index, side="right"))
        kind, x, y = self._columns[batch]
        row = index - (int(self._ends[batch - 1]) if batch else 0)
        return Tile(self.kinds[kind[row]], int(x[row]), int(y[row]))


def _values(column: pa.Array) -> np.ndarray:
    """The values of an int32 column without nulls; `to_numpy` would import pandas, 28 MB in every worker."""
    return np.frombuffer(column.buffers()[1], np.int32, len(column), 4 * column.offset)


class SlideTiles:
    """The tiles of a manifest, read from their slides (a `TrainingImages`)."""

    def __init__(
        self, tiles: MappedTiles, slides: Sequence[SlideRecord], digest: str, access: SlideAccess | None = None
    ) -> None:
        """Takes the tiles, the slides that they are on, and the manifest's digest."""
        self.tiles, self._digest, self._access = tiles, digest, access or SlideAccess()
        self._unreadable: set[str] = set()
        self.slide_ids = sorted({kind.slide_id for kind in tiles.kinds})
        records = {slide.slide_id: slide for slide in slides}
        used = [records[slide_id] for slide_id in self.slide_ids]
        self._stains = {slide.slide_id: slide.stain for slide in used}
        self._strata = {slide.slide_id: _stratum(slide) for slide in used}
        self._slides = SlidePool(
            {slide.slide_id: slide.path for slide in used},
            {slide.slide_id: slide.mpp for slide in used if slide.mpp is not None},
            reader=self._access.reader,
        )

    @property
    def windows(self) -> list[Window]:
        """The distinct sizes and resolutions of tiles."""
        return [Window(px, px, mpp) for px, mpp in sorted({(kind.tile_px, kind.mpp) for kind in self.tiles.kinds})]

    def __len__(self) -> int:
        return len(self.tiles)

    def read(self, index: int) -> tuple[np.ndarray, str]:
        """The tile, resampled, and its id: slide_id@x,y in level-0 pixels.

        Where slides are skipped on error, a tile that cannot be read is replaced by another of the same stain, always
        by the same one.

        Raises:
            SlideError: The slide cannot be read there; where slides are skipped, not even many others can.
        """
        for draw in range(_MAX_REPLACEMENTS):
            try:
                return self._read(index)
            except SlideError as error:
                if self._access.on_error == "fail" or draw == _MAX_REPLACEMENTS - 1:
                    # what training says is kept in the run's folder, which may be passed on
                    slide_id = self.tiles[index].kind.slide_id
                    raise SlideError(without_file_name(error, self._slides.path(slide_id), slide_id)) from None
                self._note(index, error)
                index = self._replacement(index, draw)
        raise AssertionError

    def _read(self, index: int) -> tuple[np.ndarray, str]:
        tile = self.tiles[index]
        kind = tile.kind
        slide = self._slides[kind.slide_id]
        image = read_tile(slide, tile.x, tile.y, kind.level, kind.read_px, kind.tile_px, kind.footprint_px)
        return image, self.sample_id(index)

    def _replacement(self, index: int, draw: int) -> int:
        """A tile of the same stain, drawn from the number of the one that cannot be read, of another slide if any."""
        stain, slide_id = self.stain(index), self.tiles[index].kind.slide_id
        candidates = np.random.default_rng([index, draw]).integers(len(self), size=_MAX_SEARCH).tolist()
        alike = [other for other in candidates if self.stain(other) == stain]
        others = [other for other in alike if self.tiles[other].kind.slide_id != slide_id]
        return (others or alike or candidates)[0]

    def _note(self, index: int, error: SlideError) -> None:
        """Writes down, once a process, that tiles of a slide cannot be read."""
        slide_id = self.tiles[index].kind.slide_id
        if slide_id in self._unreadable:
            return
        self._unreadable.add(slide_id)
        record = None
        if self._access.records is not None:
            record = self._access.records / f"training_{self._access.run}" / f"{slide_id}.json"
        attempt = Attempt(self._slides.path(slide_id), slide_id, f"training_{self._access.run}", "skip", 0, record)
        attempt.end(f"other tiles stand in for those that cannot be read: {error}")

    def sample_id(self, index: int) -> str:
        """slide_id@x,y in level-0 pixels."""
        tile = self.tiles[index]
        return f"{tile.kind.slide_id}@{tile.x},{tile.y}"

    def stain(self, index: int) -> str | None:
        """The stain of the tile's slide."""
        return self._stains[self.tiles[index].kind.slide_id]

    def slide_stains(self) -> dict[str, str | None]:
        """slide_id -> stain of the slides that have tiles."""
        return dict(self._stains)

    def slide(self, slide_id: str) -> Slide:
        """An open slide, which stays this object's. Raises SlideError when it cannot be opened."""
        return self._slides[slide_id]

    def slide_rows(self) -> list[SlideRows]:
        """Which rows are of which slide and stratum, in the order of rows.

        Raises:
            ManifestError: See `MappedTiles.slide_runs`.
        """
        return [SlideRows(slide, self._strata[slide], start, count) for slide, start, count in self.tiles.slide_runs()]

    def rows_of_mpps(self) -> dict[float, list[tuple[int, int]]]:
        """mpp -> first row and number of rows of every stretch of tiles of that mpp."""
        rows: dict[float, list[tuple[int, int]]] = {}
        for kind, start, count in self.tiles.kind_runs():
            rows.setdefault(kind.mpp, []).append((start, count))
        return rows

    def digest(self) -> str:
        """Of the manifest."""
        return self._digest

    def reader_digest(self) -> str | None:
        """Of the user's own reader (`source_digest`), where it reads any of the slides; None where OpenSlide reads all.

        Raises:
            ConfigError: There is no such reader.
        """
        reader = self._access.reader
        used = any(serves(reader, self._slides.path(slide_id)) for slide_id in self.slide_ids)
        return source_digest(reader) if used else None


def _stratum(slide: SlideRecord) -> str:
    """Site, scanner and stain in one name; "unknown" where nothing is known."""
    known = (slide.site, slide.scanner, slide.stain)
    return " / ".join(part or "unknown" for part in known) if any(known) else "unknown"


def open_tiles(manifest: Path, slides: str, sealed: str | None = None, access: SlideAccess | None = None) -> SlideTiles:
    """The tiles of a merged manifest on the slides of a table, a folder or a glob.

    Args:
        manifest: The merged manifest; its mapped form is kept in `.mapped` beside it.
        slides: Where the slides are.
        sealed: Digest of the manifest that a run was started with, when it goes on.
        access: How slides are opened.

    Raises:
        ManifestError: See `map_manifest`.
        ConfigError: The manifest has tiles of a slide that is not among the slides.
    """
    return SlideTiles(*find_tiles(manifest, slides, sealed), access)


def find_tiles(manifest: Path, slides: str, sealed: str | None) -> tuple[MappedTiles, list[SlideRecord], str]:
    """What `open_tiles` gives to `SlideTiles`: the tiles, the slides they may be on, and the manifest's digest."""
    tiles = map_manifest(manifest, manifest.parent / ".mapped", sealed)
    records = read_slide_table(slides)
    unknown = {kind.slide_id for kind in tiles.kinds} - {slide.slide_id for slide in records}
    if unknown:
        raise ConfigError(f"the manifest has tiles of slide {min(unknown)}, which {slides} does not list")
    return tiles, records, sealed or manifest_digest(manifest)


def map_manifest(manifest: Path, folder: Path, digest: str | None = None) -> MappedTiles:
    """Maps a merged manifest, writing its Arrow form into `folder` unless it is there already.

    Args:
        manifest: The merged manifest.
        folder: Where Arrow files are kept.
        digest: The manifest wanted, for a run that keeps the tiles it started with; None, the one that is there.

    Raises:
        ManifestError: The manifest is missing, damaged or holds no tile, or the one wanted is gone.
    """
    target = folder / f"tiles_{(digest or manifest_digest(manifest))[:16]}.arrow"
    if not target.is_file():
        current = manifest_digest(manifest)
        if digest not in (None, current):
            raise ManifestError(
                f"the run was started on manifest {digest[:8]}, of which nothing is left; {manifest.name} is now "
                f"{current[:8]}: give a new run name, or restore the tiles it was started with"
            )
        with atomic_path(target) as temporary:
            _write_arrow(manifest, temporary)
    tiles = MappedTiles(target)
    if len(tiles) == 0:
        raise ManifestError(f"manifest {manifest.name} holds no tile; lower min_tissue or add slides with use=train")
    return tiles


def _write_arrow(manifest: Path, target: Path) -> None:
    """Two streaming passes: where which kind and slide begins, which stands in the file's header, and the rows."""
    changes, num_rows = _changes(manifest)
    kinds = sorted({kind for kind, _ in changes}, key=astuple)
    code_of = {kind: code for code, kind in enumerate(kinds)}
    codes = np.array([code_of[kind] for kind, _ in changes], np.int32)
    starts = np.array([start for _, start in changes], np.int64)
    header = {
        "kinds": json.dumps([asdict(kind) for kind in kinds]),
        "runs": json.dumps(_slide_runs(changes, num_rows, manifest)),
    }
    row = 0
    with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA.with_metadata(header)) as writer:
        for batch in _batches(manifest, ["x", "y"]):
            kind_of_row = codes[np.searchsorted(starts, np.arange(row, row + batch.num_rows), side="right") - 1]
            writer.write_batch(pa.record_batch([pa.array(kind_of_row), batch["x"], batch["y"]], schema=_SCHEMA))
            row += batch.num_rows


def _changes(manifest: Path) -> tuple[list[tuple[TileKind, int]], int]:
    """Every kind with the row from which on tiles are of it, and the number of rows."""
    changes: list[tuple[TileKind, int]] = []
    row = 0
    for batch in _batches(manifest, ["slide_id", *_KIND_COLUMNS]):
        for kind, start in _batch_changes(batch):
            if not changes or kind != changes[-1][0]:
                changes.append((kind, row + start))
        row += batch.num_rows
    return changes, row


def _batch_changes(batch: pa.RecordBatch) -> Iterator[tuple[TileKind, int]]:
    """Of a batch every row whose kind is not that of the row before, the first included."""
    slides = batch["slide_id"]
    slides = slides if pa.types.is_dictionary(slides.type) else slides.dictionary_encode()
    columns = [slides.indices.to_numpy(), *(batch[name].to_numpy() for name in _KIND_COLUMNS)]
    differs = np.zeros(batch.num_rows, bool)
    differs[:1] = True
    for column in columns:
        differs[1:] |= column[1:] != column[:-1]
    for row in np.flatnonzero(differs):
        name, *numbers = (column[row].item() for column in columns)
        yield TileKind(slides.dictionary[name].as_py(), **dict(zip(_KIND_COLUMNS, numbers, strict=True))), int(row)


def _slide_runs(changes: list[tuple[TileKind, int]], num_rows: int, manifest: Path) -> list[tuple[str, int, int]]:
    """Slide, first row and number of rows."""
    firsts: list[tuple[str, int]] = []
    for kind, start in changes:
        if not firsts or kind.slide_id != firsts[-1][0]:
            firsts.append((kind.slide_id, start))
    twice = next((slide for slide, count in Counter(slide for slide, _ in firsts).items() if count > 1), None)
    if twice is not None:
        raise ManifestError(
            f"manifest {manifest.name} has tiles of slide {twice} in more than one place; make it again with "
            "merge_manifest"
        )
    return [(slide, start, end - start) for (slide, start), (_, end) in pairwise([*firsts, ("", num_rows)])]


def _batches(manifest: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    try:
        with pq.ParquetFile(manifest) as file:
            yield from file.iter_batches(columns=columns)
    except (OSError, pa.ArrowException) as error:
        raise ManifestError(
            f"manifest {manifest.name} cannot be read ({error}); make it again with merge_manifest"
        ) from None
