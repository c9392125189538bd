"""A manifest of any size as three memory-mapped columns that all processes of a node share.

Twelve bytes a tile: the kind of tile (slide, level, sizes, mpp: one of few), x and y. The parquet manifest is streamed
once into an uncompressed Arrow file named by the manifest's digest; workers map it and copy nothing.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dinoscope.errors import ManifestError
from dinoscope.files import atomic_path
from dinoscope.slides.manifest import manifest_digest

__all__ = ["MappedTiles", "Tile", "TileKind", "map_manifest"]

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


class MappedTiles:
    """The tiles of a manifest by number; indexing takes microseconds and no memory of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open()

    def _open(self) -> None:
        reader = pa.ipc.open_file(pa.memory_map(str(self.path)))
        self.kinds = [TileKind(**kind) for kind in json.loads(reader.schema.metadata[b"kinds"])]
        batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
        self._columns = [[column.to_numpy() for column in batch.columns] for batch in batches]
        self._ends = np.cumsum([batch.num_rows for batch in batches])

    def __getstate__(self) -> Path:
        return self.path

    def __setstate__(self, path: Path) -> None:
        self.__init__(path)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Tile:
        batch = int(np.searchsorted(self._ends, index, side="right"))
        kind, x, y = self._columns[batch]
        row = index - (int(self._ends[batch - 1]) if batch else 0)
        return Tile(self.kinds[kind[row]], int(x[row]), int(y[row]))


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
    """Two streaming passes: the kinds, which stand in the file's header, and the rows."""
    kinds = sorted(set(_kinds(manifest)), key=lambda kind: tuple(asdict(kind).values()))
    codes = {kind: code for code, kind in enumerate(kinds)}
    header = json.dumps([asdict(kind) for kind in codes])
    with (
        pa.OSFile(str(target), "wb") as sink,
        pa.ipc.new_file(sink, _SCHEMA.with_metadata({"kinds": header})) as writer,
    ):
        for batch in _batches(manifest, ["slide_id", *_KIND_COLUMNS, "x", "y"]):
            present, inverse = _batch_kinds(batch)
            column = np.array([codes[kind] for kind in present], dtype=np.int32)[inverse]
            writer.write_batch(pa.record_batch([pa.array(column), batch["x"], batch["y"]], schema=_SCHEMA))


def _kinds(manifest: Path) -> Iterator[TileKind]:
    for batch in _batches(manifest, ["slide_id", *_KIND_COLUMNS]):
        yield from _batch_kinds(batch)[0]


def _batches(manifest: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    try:
        with pq.ParquetFile(manifest) as file:
            yield from file.iter_batches(columns=columns)
    except (OSError, pa.ArrowException) as error:
        raise ManifestError(
            f"manifest {manifest.name} cannot be read ({error}); make it again with merge_manifest"
        ) from None


def _batch_kinds(batch: pa.RecordBatch) -> tuple[list[TileKind], np.ndarray]:
    """The distinct kinds of a batch and, for every row, which of them it is."""
    slides = batch["slide_id"]
    slides = slides if pa.types.is_dictionary(slides.type) else slides.dictionary_encode()
    rows = np.empty(batch.num_rows, dtype=[("slide", "i4"), *((name, "f8") for name in _KIND_COLUMNS)])
    rows["slide"] = slides.indices.to_numpy()
    for name in _KIND_COLUMNS:
        rows[name] = batch[name].to_numpy()
    unique, inverse = np.unique(rows, return_inverse=True)
    names = slides.dictionary.to_pylist()
    whole = dict.fromkeys(_KIND_COLUMNS, int) | {"mpp": float}
    kinds = [
        TileKind(names[row["slide"]], **{name: convert(row[name]) for name, convert in whole.items()}) for row in unique
    ]
    return kinds, inverse.ravel()
