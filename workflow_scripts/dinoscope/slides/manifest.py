"""Tile manifests: parquet files with a row a tile, one a slide, and merged over slides for training.

Columns as in `TILE_SCHEMA`; rows of a slide in the order (mpp, y, x), slides in the order of their ids; zstd, row
groups of 65,536. The schema's metadata holds a JSON document under the key `dinoscope`. The columns of `QUALITY_SCHEMA`
say what tiles are like and nothing of their pixels: the digest leaves them out, files made before there were any have
none, and where something was not measured they hold NaN (section_id: 0).
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dinoscope.errors import ManifestError
from dinoscope.files import atomic_path

__all__ = [
    "QUALITY_SCHEMA",
    "SCHEMA_VERSION",
    "TILE_SCHEMA",
    "manifest_digest",
    "merge_manifests",
    "read_metadata",
    "read_tiles",
    "tile_table",
    "write_tiles",
]

SCHEMA_VERSION = 1
QUALITY_SCHEMA = pa.schema(
    [
        ("white_fraction", pa.float32()),
        ("black_fraction", pa.float32()),
        ("grey_fraction", pa.float32()),
        ("pen_fraction", pa.float32()),
        ("focus", pa.float32()),
        ("section_id", pa.int32()),
    ]
)
TILE_SCHEMA = pa.schema(
    [
        ("slide_id", pa.dictionary(pa.int32(), pa.string())),
        ("x", pa.int32()),
        ("y", pa.int32()),
        ("level", pa.int8()),
        ("read_px", pa.int32()),
        ("tile_px", pa.int16()),
        ("mpp", pa.float32()),
        ("footprint_px", pa.int32()),
        ("tissue_fraction", pa.float32()),
        *QUALITY_SCHEMA,
    ]
)
_KEY = b"dinoscope"
_ROW_GROUP = 65_536
_ROW = np.dtype(
    [
        ("x", "<i4"),
        ("y", "<i4"),
        ("level", "i1"),
        ("read_px", "<i4"),
        ("tile_px", "<i2"),
        ("mpp", "<f4"),
        ("footprint_px", "<i4"),
        ("tissue_fraction", "<f4"),
    ]
)
_QUALITY = {name: np.dtype("<i4" if name == "section_id" else "<f4") for name in QUALITY_SCHEMA.names}
_SET_KEYS = ("tile_set", "tile_px", "requested_mpp", "stride_px")


def tile_table(slide_id: str, columns: dict[str, Any]) -> pa.Table:
    """A table of one slide's tiles in the manifest's schema and order.

    Args:
        slide_id: Of the slide.
        columns: Of every other column its values, or one value for all rows; at least one column is a sequence. Those
            of `QUALITY_SCHEMA` may be left out.
    """
    count = max(len(values) for values in columns.values() if np.ndim(values))
    columns = {name: _unmeasured(name) for name in _QUALITY} | columns
    kinds = {name: _ROW[name] for name in _ROW.names} | _QUALITY
    values = {name: np.broadcast_to(columns[name], (count,)).astype(kind) for name, kind in kinds.items()}
    order = np.lexsort((values["x"], values["y"], values["mpp"]))
    # built from buffers, because pa.array imports pandas, which takes longer than tiling a slide
    name_end = np.array([0, len(slide_id.encode())], "<i4")
    names = pa.StringArray.from_buffers(1, pa.py_buffer(name_end), pa.py_buffer(slide_id.encode()))
    codes = _array(pa.int32(), np.zeros(count, "<i4"))
    numbers = [_array(TILE_SCHEMA.field(name).type, values[name][order]) for name in TILE_SCHEMA.names[1:]]
    return pa.Table.from_arrays([pa.DictionaryArray.from_arrays(codes, names), *numbers], schema=TILE_SCHEMA)


def write_tiles(path: str | Path, tiles: pa.Table, metadata: dict[str, Any]) -> None:
    """Writes one slide's tiles.

    Args:
        path: File to write.
        tiles: As `tile_table` makes it; may have no rows.
        metadata: What to keep beside the rows; merging needs `slide_id`, `tile_set`, `tile_px`, `requested_mpp` and
            `stride_px`.
    """
    document = {"schema_version": SCHEMA_VERSION, **metadata, "num_tiles": tiles.num_rows}
    tiles = tiles.replace_schema_metadata({_KEY: json.dumps(document, ensure_ascii=False)})
    with atomic_path(path) as temporary:
        pq.write_table(tiles, temporary, compression="zstd", row_group_size=_ROW_GROUP)


def read_tiles(path: str | Path) -> pa.Table:
    """Reads a manifest, of one slide or merged.

    Raises:
        ManifestError: The file is missing, damaged or no tile manifest.
    """
    read_metadata(path)
    try:
        return pq.read_table(path, schema=TILE_SCHEMA, partitioning=None)
    except (OSError, pa.ArrowException) as error:
        raise _damaged(path, error) from None


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Reads what a manifest says about itself, without its rows.

    Raises:
        ManifestError: The file is missing, damaged or no tile manifest.
    """
    with _opened(path) as file:
        return _metadata(file, path)


def manifest_digest(path: str | Path) -> str:
    """SHA-256 over the rows of a manifest, in hexadecimal; merged manifests carry it, others are read through.

    It depends on nothing but the rows, without what `QUALITY_SCHEMA` says of them: not on the order in which slides
    were merged, nor on how a file was encoded.

    Raises:
        ManifestError: The file is missing, damaged or no tile manifest.
    """
    with _opened(path) as file:
        stored = _metadata(file, path).get("digest")
        return stored or _digest(_batches(file, path))


def merge_manifests(inputs: Sequence[str | Path], output: str | Path) -> str:
    """Joins the manifests of many slides into one, sorted by slide id; holds no more than a row group in memory.

    Neither the order of the inputs nor when they were made counts: the same tiles give the same bytes.

    Args:
        inputs: Manifests of one slide and one tile set each, in any order.
        output: File to write.

    Returns:
        The digest of the result (`manifest_digest`).

    Raises:
        ManifestError: An input is damaged, two are of the same slide or of different tile sets or schema versions, or
            there is no row in all of them.
    """
    documents = [(_merging_part(read_metadata(path)), path) for path in inputs]
    _check_mergeable(documents)
    documents.sort(key=lambda document: document[0]["slide_id"])
    shared = {key: documents[0][0][key] for key in _SET_KEYS}
    document = {"schema_version": SCHEMA_VERSION, **shared, "num_slides": len(documents)}
    document["num_tiles"] = sum(metadata["num_tiles"] for metadata, _ in documents)
    digests = _RowDigest()
    with (
        atomic_path(output) as temporary,
        pq.ParquetWriter(temporary, TILE_SCHEMA, compression="zstd") as writer,
    ):
        for batch in _full_row_groups(_checked_rows(documents)):
            digests.update(batch)
            writer.write_table(batch, row_group_size=_ROW_GROUP)
        document["digest"] = digests.hexdigest()
        writer.add_key_value_metadata({_KEY.decode(): json.dumps(document, ensure_ascii=False)})
    return document["digest"]


class _RowDigest:
    """Hashes rows slide by slide, however they are cut into tables."""

    def __init__(self) -> None:
        self._all, self._slide, self._slide_id = hashlib.sha256(), hashlib.sha256(), None

    def update(self, tiles: pa.Table) -> None:
        ids = tiles.column("slide_id").unify_dictionaries().combine_chunks()
        rows = np.empty(len(tiles), _ROW)
        for name in _ROW.names:
            rows[name] = tiles.column(name).to_numpy()
        codes = ids.indices.to_numpy()
        starts = np.flatnonzero(np.append(True, codes[1:] != codes[:-1])) if len(codes) else []
        for start, end in zip(starts, [*starts[1:], len(codes)], strict=True):
            slide_id = ids.dictionary[codes[start]].as_py()
            if slide_id != self._slide_id:
                self._finish_slide()
                self._slide_id = slide_id
            self._slide.update(rows[start:end])

    def hexdigest(self) -> str:
        self._finish_slide()
        return self._all.hexdigest()

    def _finish_slide(self) -> None:
        if self._slide_id is not None:
            self._all.update(hashlib.sha256(self._slide_id.encode()).digest() + self._slide.digest())
        self._slide, self._slide_id = hashlib.sha256(), None


def _unmeasured(name: str) -> float:
    return 0 if name == "section_id" else np.nan


def _array(kind: pa.DataType, values: np.ndarray) -> pa.Array:
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(np.ascontiguousarray(values))])


def _digest(batches: Iterable[pa.Table]) -> str:
    digest = _RowDigest()
    for batch in batches:
        digest.update(batch)
    return digest.hexdigest()


def _merging_part(metadata: dict[str, Any]) -> dict[str, Any]:
    """What merging needs of a document; the rest of ten thousand of them would take more memory than the rows."""
    return {key: metadata.get(key) for key in ("slide_id", "num_tiles", *_SET_KEYS)}


def _check_mergeable(documents: list[tuple[dict[str, Any], str | Path]]) -> None:
    if not documents:
        raise ManifestError("there are no tile manifests to merge: no slide is listed for this set")
    seen: dict[str, str | Path] = {}
    first, first_path = documents[0]
    for metadata, path in documents:
        slide_id = metadata.get("slide_id")
        if slide_id is None:
            raise ManifestError(f"{path} is not the tile manifest of one slide: merge files of results/tiles only")
        if slide_id in seen:
            raise ManifestError(f"slide {slide_id!r} is in both {seen[slide_id]} and {path}: give each slide once")
        seen[slide_id] = path
        for key in _SET_KEYS:
            if metadata.get(key) != first.get(key):
                raise ManifestError(
                    f"{path} has {key} {metadata.get(key)} and {first_path} has {first.get(key)}: merge manifests of "
                    "one tile set, and tile all its slides with the same settings"
                )
    if not sum(metadata["num_tiles"] for metadata, _ in documents):
        raise ManifestError(
            f"none of the {len(documents)} slides has a tile in set {first.get('tile_set')}: lower its min_tissue, or "
            "look at the overview pictures in results/tiles"
        )


def _checked_rows(documents: list[tuple[dict[str, Any], str | Path]]) -> Iterator[pa.Table]:
    for metadata, path in documents:
        count = 0
        with _opened(path) as file:
            for batch in _batches(file, path):
                count += batch.num_rows
                yield batch
        if count != metadata["num_tiles"]:
            raise ManifestError(
                f"{path} has {count} rows and says it has {metadata['num_tiles']}: tile the slide again"
            )


def _full_row_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Joins tables into ones of exactly a row group, the last one excepted."""
    waiting, count = [], 0
    for table in tables:
        while count + table.num_rows >= _ROW_GROUP:
            missing = _ROW_GROUP - count
            yield _joined([*waiting, table.slice(0, missing)])
            waiting, count, table = [], 0, table.slice(missing)
        if table.num_rows:
            waiting.append(table)
            count += table.num_rows
    if count:
        yield _joined(waiting)


def _joined(tables: list[pa.Table]) -> pa.Table:
    """One table whose dictionary names its own slides alone: a slice of a larger one would keep all before it."""
    return pa.concat_tables(tables).unify_dictionaries()


def _opened(path: str | Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except FileNotFoundError:
        raise ManifestError(f"tile manifest {path} does not exist: tile the slide first") from None
    except (OSError, pa.ArrowException) as error:
        raise _damaged(path, error) from None


def _batches(file: pq.ParquetFile, path: str | Path) -> Iterator[pa.Table]:
    try:
        for batch in file.iter_batches(batch_size=_ROW_GROUP):
            table = pa.Table.from_batches([batch])
            for name in set(_QUALITY) - set(table.column_names):
                column = _array(QUALITY_SCHEMA.field(name).type, np.full(len(table), _unmeasured(name), _QUALITY[name]))
                table = table.append_column(name, column)
            yield table.select(TILE_SCHEMA.names).cast(TILE_SCHEMA)
    except (OSError, KeyError, pa.ArrowException) as error:
        raise _damaged(path, error) from None


def _metadata(file: pq.ParquetFile, path: str | Path) -> dict[str, Any]:
    stored = (file.metadata.metadata or {}).get(_KEY)
    if stored is None:
        raise ManifestError(f"{path} is a parquet file but no tile manifest: give a file of results/tiles or manifests")
    metadata = json.loads(stored)
    if metadata.get("schema_version") != SCHEMA_VERSION:
        raise ManifestError(
            f"{path} has schema version {metadata.get('schema_version')} and this version of dinoscope reads "
            f"{SCHEMA_VERSION}: tile the slide again"
        )
    return metadata


def _damaged(path: str | Path, error: Exception) -> ManifestError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ManifestError(f"{path} is not a readable tile manifest ({reason}): tile the slide again")
