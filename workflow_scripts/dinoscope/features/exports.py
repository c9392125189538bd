"""Feature files in the layouts of other tools. Each is made on request; results/features stays what all are made of.

clam      pt_files/SLIDE.pt, a bare float32 tensor (N, D), and h5_files/SLIDE.h5 with `features` and int32 `coords`
          (Lu et al. 2021, doi:10.1038/s41551-020-00682-w; its training reads pt_files alone)
anndata   SLIDE.h5ad: X float32, obs the columns of the tile manifest, obsm["spatial"] centres in level-0 pixels
          (on-disk format of anndata 0.8 and later)
stamp     SLIDE.h5: `feats` float16, `coords` in micrometres (El Nahhas et al. 2024, doi:10.1038/s41596-024-01047-2)
parquet   SLIDE.parquet: the columns of the tile manifest and `features`, a list of float32 a row
wsidata   SLIDE.zarr, a SpatialData store, written by the package wsidata alone

Rows are those of the feature file, in its order; a slide without tiles gives valid files without rows.
"""

import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dinoscope import __version__
from dinoscope.errors import FeaturesError
from dinoscope.features.disk import new_h5
from dinoscope.features.writers import FeatureInfo, open_features
from dinoscope.files import atomic_path, atomic_paths, writing
from dinoscope.slides.manifest import manifest_digest, read_tiles

__all__ = ["FORMATS", "export_features"]

_ROWS = 16_384  # that are in memory at once
STAMP_VERSION = "2.1.0"  # of the layout; STAMP refuses files of newer versions than its own


@dataclass(frozen=True)
class _Source:
    """An open feature file and the manifest of its tiles."""

    path: Path
    file: h5py.File
    info: FeatureInfo
    tiles: pa.Table
    slide: Path | None

    @property
    def shape(self) -> tuple[int, int]:
        return self.file["features"].shape

    @property
    def coords(self) -> np.ndarray:
        return self.file["coords"][:]

    def rows(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Features in pieces, as stored."""
        for start in range(0, self.shape[0], _ROWS):
            rows = slice(start, min(start + _ROWS, self.shape[0]))
            try:
                features = self.file["features"][rows]
            except OSError as error:
                raise FeaturesError(f"{self.path}: cannot be read ({error}); delete it and extract again") from error
            if not np.isfinite(features).all():
                raise FeaturesError(
                    f"{self.path}: features of model {self.info.model!r} are not finite in rows {rows.start} to "
                    f"{rows.stop - 1}; check the model's weights and extract again"
                )
            yield rows, features


def export_features(
    format_name: str, features: Path, tiles: Path, output_dir: Path, *, slide: Path | None = None
) -> list[Path]:
    """Writes the features of one slide in another tool's layout.

    Args:
        format_name: One of `FORMATS`.
        features: Feature file.
        tiles: Manifest of its tiles.
        output_dir: Folder of the layout.
        slide: The slide itself, which only wsidata needs.

    Returns:
        The files written.

    Raises:
        FeaturesError: The feature file is damaged, or of other tiles than the manifest; a package is missing; or the
            files cannot be written.
        ManifestError: The manifest is missing or damaged.
    """
    table = read_tiles(tiles)
    with open_features(features) as (file, info):
        if not len(file["features"]):  # a slide that was skipped while its tiles were read
            table = table.slice(0, 0)
        coords = np.stack([table["x"].to_numpy(), table["y"].to_numpy()], axis=1)
        if info.manifest_hash != manifest_digest(tiles) or not np.array_equal(coords, file["coords"][:]):
            raise FeaturesError(
                f"{features} holds the features of other tiles than {tiles} has; extract them again, or give the "
                "manifest that they were made from"
            )
        with writing(output_dir / f"{info.slide_id} ({format_name})", FeaturesError):
            return FORMATS[format_name](_Source(features, file, info, table, slide), output_dir)


def _clam(source: _Source, folder: Path) -> list[Path]:
    import torch

    from dinoscope.train.disk_errors import disk_error

    name, (count, width) = source.info.slide_id, source.shape
    tensor_path, h5_path = folder / "pt_files" / f"{name}.pt", folder / "h5_files" / f"{name}.h5"
    whole = torch.empty(count, width)
    with atomic_paths(tensor_path, h5_path) as (temporary, h5_temporary), new_h5(h5_temporary) as (file, check):
        file.create_dataset("coords", data=source.coords.astype(np.int32), maxshape=(None, 2))
        stored = file.create_dataset("features", (count, width), dtype="float32", maxshape=(None, width))
        for rows, features in source.rows():
            stored[rows] = features
            check()
            whole[rows] = torch.from_numpy(features.astype(np.float32))
        try:
            with open(temporary, "wb") as opened:  # given a name, torch does not tell what the system said
                torch.save(whole, opened)
        except RuntimeError as error:  # torch's own, raised from the system's
            raise disk_error(error) or error from None
    return [tensor_path, h5_path]


def _stamp(source: _Source, folder: Path) -> list[Path]:
    info, path = source.info, folder / f"{source.info.slide_id}.h5"
    if path.resolve() == source.path.resolve():
        raise FeaturesError(f"{path} would overwrite the features that are exported: give another --output-dir")
    with atomic_path(path) as temporary, new_h5(temporary) as (file, check):
        file.create_dataset("coords", data=(source.coords * info.level0_mpp).astype(np.float32))
        stored = file.create_dataset("feats", source.shape, dtype="float16")
        for rows, features in source.rows():
            with np.errstate(over="ignore"):
                half = features.astype(np.float16)
            if not np.isfinite(half).all():
                raise FeaturesError(f"{source.path}: features overflow float16, which is all that STAMP stores")
            stored[rows] = half
            check()
        file.attrs.update(
            stamp_version=STAMP_VERSION,
            extractor=info.model,
            unit="um",
            tile_size_um=info.tile_px * info.mpp,
            tile_size_px=info.tile_px,
            code_hash=info.weights_sha256[:8],
            feat_type="tile",
        )
    return [path]


def _parquet(source: _Source, folder: Path) -> list[Path]:
    path, width = folder / f"{source.info.slide_id}.parquet", source.shape[1]
    kind = pa.list_(pa.float32(), width)
    metadata = {b"dinoscope": json.dumps(asdict(source.info), ensure_ascii=False)}
    schema = source.tiles.schema.append(pa.field("features", kind)).with_metadata(metadata)
    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for rows, features in source.rows():
            values = pa.FixedSizeListArray.from_arrays(pa.array(features.astype(np.float32).reshape(-1)), width)
            piece = source.tiles.slice(rows.start, rows.stop - rows.start)
            writer.write_table(piece.append_column("features", values.cast(kind)).cast(schema))
    return [path]


def _anndata(source: _Source, folder: Path) -> list[Path]:
    path, count = folder / f"{source.info.slide_id}.h5ad", source.shape[0]
    with atomic_path(path) as temporary, new_h5(temporary) as (file, check):
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        stored = _array(file, "X", np.empty((0, source.shape[1]), np.float32), shape=source.shape)
        for rows, features in source.rows():
            stored[rows] = features
            check()
        columns = {name: source.tiles[name].to_numpy() for name in source.tiles.column_names if name != "slide_id"}
        obs = _dataframe(file, "obs", [str(row) for row in range(count)], [*columns, "slide_id"])
        for name, values in columns.items():
            _array(obs, name, values)
        _categorical(obs, "slide_id", source.info.slide_id, count)
        _dataframe(file, "var", [f"feature_{column}" for column in range(source.shape[1])], [])
        _group(file, "obsm", "dict", "0.1.0")
        centres = source.coords + source.info.patch_size_level0 / 2
        _array(file["obsm"], "spatial", centres.astype(np.float64))
        for name in ("varm", "obsp", "varp", "layers", "uns"):
            _group(file, name, "dict", "0.1.0")
        about = _group(file["uns"], "dinoscope", "dict", "0.1.0")
        for name, value in (asdict(source.info) | {"made_with": f"dinoscope {__version__}"}).items():
            kind = "string" if isinstance(value, str) else "numeric-scalar"
            about[name] = value
            about[name].attrs.update({"encoding-type": kind, "encoding-version": "0.2.0"})
    return [path]


def _group(parent: h5py.Group, name: str, kind: str, version: str) -> h5py.Group:
    group = parent.create_group(name)
    group.attrs.update({"encoding-type": kind, "encoding-version": version})
    return group


def _array(parent: h5py.Group, name: str, values: np.ndarray, *, shape: tuple[int, ...] | None = None) -> h5py.Dataset:
    dataset = parent.create_dataset(name, shape, values.dtype) if shape else parent.create_dataset(name, data=values)
    dataset.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    return dataset


def _strings(parent: h5py.Group, name: str, values: list[str]) -> None:
    dataset = parent.create_dataset(name, data=values, dtype=h5py.string_dtype(), shape=(len(values),))
    dataset.attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})


def _dataframe(parent: h5py.Group, name: str, index: list[str], columns: list[str]) -> h5py.Group:
    group = _group(parent, name, "dataframe", "0.2.0")
    group.attrs["_index"] = "_index"
    group.attrs["column-order"] = np.array(columns, dtype=h5py.string_dtype())
    _strings(group, "_index", index)
    return group


def _categorical(parent: h5py.Group, name: str, value: str, count: int) -> None:
    group = _group(parent, name, "categorical", "0.2.0")
    group.attrs["ordered"] = False
    _array(group, "codes", np.zeros(count, np.int8))
    _strings(group, "categories", [value])


def _wsidata(source: _Source, folder: Path) -> list[Path]:
    if importlib.util.find_spec("wsidata") is None:
        raise FeaturesError(
            "format wsidata is written by the package wsidata alone, which is not installed: pip install wsidata, or "
            "take anndata or parquet"
        )
    path = folder / f"{source.info.slide_id}.zarr"
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.partial.zarr")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _write_store(source, temporary)
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return [path]


def _write_store(source: _Source, path: Path) -> None:
    """Tiles as shapes `tiles`, features as table `MODEL_tiles`; without tiles an empty store."""
    from spatialdata import SpatialData
    from wsidata import TileSpec, open_wsi
    from wsidata.io import add_features, add_tiles

    count, info = source.shape[0], source.info
    if not count:
        SpatialData().write(path)
        return
    if source.slide is None:
        raise FeaturesError(f"format wsidata needs the slide of {source.path} besides: give it as --slide")
    store = open_wsi(source.slide, store=None)
    stride = info.tile_px - info.overlap_px
    spec = TileSpec(
        height=info.tile_px,
        width=info.tile_px,
        stride_height=stride,
        stride_width=stride,
        mpp=info.mpp,
        ops_level=int(source.tiles["level"][0].as_py()),
        ops_downsample=source.tiles["read_px"][0].as_py() / info.tile_px,
        base_downsample=info.patch_size_level0 / info.tile_px,
    )
    sections = np.zeros(count, int)
    if "section_id" in source.tiles.column_names:
        sections = source.tiles["section_id"].to_numpy()
    add_tiles(store, "tiles", source.coords, spec, sections)
    whole = np.empty(source.shape, np.float32)
    for rows, features in source.rows():
        whole[rows] = features
    add_features(store, f"{info.model}_tiles", "tiles", whole)
    store.write(path)


FORMATS: dict[str, Callable[[_Source, Path], list[Path]]] = {
    "clam": _clam,
    "anndata": _anndata,
    "stamp": _stamp,
    "parquet": _parquet,
    "wsidata": _wsidata,
}
