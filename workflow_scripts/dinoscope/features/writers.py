"""Feature files: one HDF5 file a slide and model, in TRIDENT's layout.

features        (N, D)        float16 or float32, rows in the order of the tile manifest
coords          (N, 2)        int64, top-left corners in level-0 pixels, x before y; carries TRIDENT's attributes
patch_features  (N, h, w, D)  float16, only when asked for; row h runs down, column w to the right

TRIDENT: Zhang et al. 2025, arXiv:2502.06750. Its slide encoders read `patch_size_level0` off the coords dataset. There
it follows from a nominal magnification; here it is the true side of a tile in level-0 pixels.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import h5py
import numpy as np

from dinoscope.errors import FeaturesError
from dinoscope.features.disk import new_h5
from dinoscope.files import atomic_path, writing

__all__ = [
    "FeatureFile",
    "FeatureInfo",
    "FeatureWriter",
    "check_same_kind",
    "open_features",
    "read_features",
    "read_info",
    "write_features",
]

CHUNK_ROWS = 512
NOMINAL_MAGNIFICATIONS = (5, 10, 20, 40, 60, 80)


@dataclass(frozen=True)
class FeatureInfo:
    """What a feature file says about itself.

    Attributes:
        slide_id: Name of the slide; its path is never stored.
        model: Name of the model, e.g. "pretrain".
        weights_sha256: Digest of the model's weights and of what else changes its features (`LoadedEncoder.sha256`).
        manifest_hash: Digest of the tile manifest.
        pooling: Which tokens a row holds: "cls", "mean", "cls+mean" or "cls+storage".
        mpp: Micrometres a pixel of a tile.
        tile_px: Side of a tile in its own pixels.
        overlap_px: Overlap of neighbouring tiles in tile pixels.
        patch_size_level0: Side of a tile in level-0 pixels.
        level0_mpp: Micrometres a level-0 pixel.
        level0_width: Width of the slide in level-0 pixels.
        level0_height: Height of the slide in level-0 pixels.
        precision: Number format that the model computed in.
    """

    slide_id: str
    model: str
    weights_sha256: str
    manifest_hash: str
    pooling: str
    mpp: float
    tile_px: int
    overlap_px: int
    patch_size_level0: int
    level0_mpp: float
    level0_width: int
    level0_height: int
    precision: str = "float32"


# where each field of FeatureInfo lives; the names on the coords dataset are TRIDENT's
_FILE_ATTRIBUTES = ("slide_id", "model", "weights_sha256", "manifest_hash", "pooling", "mpp", "precision")
_COORDS_ATTRIBUTES = {
    "patch_size": "tile_px",
    "overlap": "overlap_px",
    "patch_size_level0": "patch_size_level0",
    "level0_mpp": "level0_mpp",
    "level0_width": "level0_width",
    "level0_height": "level0_height",
}


@dataclass(frozen=True)
class FeatureFile:
    """The rows of a feature file.

    Attributes:
        info: What the file says about itself.
        features: (N, D), float16 or float32 as stored.
        coords: (N, 2), int64.
    """

    info: FeatureInfo
    features: np.ndarray
    coords: np.ndarray


class FeatureWriter:
    """Fills a feature file batch by batch; `write_features` makes one."""

    def __init__(
        self, file: h5py.File, num_tiles: int, path: str | os.PathLike[str], check: Callable[[], None]
    ) -> None:
        self._file, self._num_tiles, self.num_written = file, num_tiles, 0
        self._path, self._check = path, check

    def append(self, features: np.ndarray, coords: np.ndarray, patch_features: np.ndarray | None = None) -> None:
        """Writes the next rows: features (B, D), coords (B, 2) and, in a dense file, patch features (B, h, w, D)."""
        rows = slice(self.num_written, self.num_written + len(features))
        assert len(coords) == len(features) and rows.stop <= self._num_tiles
        assert (patch_features is not None) == ("patch_features" in self._file)
        self._file["features"][rows] = features
        self._file["coords"][rows] = coords
        if patch_features is not None:
            self._file["patch_features"][rows] = patch_features
        with writing(self._path, FeaturesError):
            self._check()  # here, so that a full disk does not show at the end alone
        self.num_written = rows.stop


@contextlib.contextmanager
def write_features(
    path: str | os.PathLike[str],
    info: FeatureInfo,
    num_tiles: int,
    embed_dim: int,
    *,
    dtype: str = "float16",
    patch_shape: tuple[int, int, int] | None = None,
) -> Iterator[FeatureWriter]:
    """Opens a feature file for writing; it appears at `path` when the block ends well, whole or not at all.

    Args:
        info: Written into the file's attributes.
        num_tiles: Number of rows; exactly as many must be appended. 0 gives a valid file of shapes (0, D) and (0, 2).
        embed_dim: D, the length of a row.
        dtype: "float16" or "float32".
        patch_shape: (h, w, D) of the dense patch features, or None for none.

    Raises:
        FeaturesError: The file cannot be written.
    """
    read: OSError | None = None  # an error of what is read meanwhile, which is not the file's
    try:
        with writing(path, FeaturesError), atomic_path(path) as temporary, new_h5(temporary) as (file, check):
            _make_datasets(file, num_tiles, embed_dim, dtype, patch_shape)
            _write_attributes(file, info)
            writer = FeatureWriter(file, num_tiles, path, check)
            try:
                yield writer
            except OSError as error:
                read = error
                raise
            assert writer.num_written == num_tiles, f"{writer.num_written} of {num_tiles} rows written"
    except FeaturesError as error:
        raise (error if read is None else read) from None


def _make_datasets(
    file: h5py.File, num_tiles: int, embed_dim: int, dtype: str, patch_shape: tuple[int, int, int] | None
) -> None:
    chunk_rows = min(CHUNK_ROWS, max(num_tiles, 1))
    for name, width, kind in (("features", embed_dim, dtype), ("coords", 2, "int64")):
        shape, chunks = (num_tiles, width), (chunk_rows, width)
        file.create_dataset(name, shape, dtype=kind, chunks=chunks, maxshape=(None, width))
    if patch_shape is not None:
        shape, chunks = (num_tiles, *patch_shape), (1, *patch_shape)
        file.create_dataset("patch_features", shape, dtype="float16", chunks=chunks, maxshape=(None, *patch_shape))


def _write_attributes(file: h5py.File, info: FeatureInfo) -> None:
    for name in _FILE_ATTRIBUTES:
        file.attrs[name] = getattr(info, name)
    # savetodir is TRIDENT's; it stays empty because results hold no paths
    file["features"].attrs.update({"name": info.slide_id, "savetodir": "", "encoder": info.model})
    coords = file["coords"].attrs
    coords.update({"name": info.slide_id, "savetodir": ""})
    coords.update({name: getattr(info, field) for name, field in _COORDS_ATTRIBUTES.items()})
    coords["level0_magnification"] = _nominal_magnification(info.level0_mpp)
    coords["target_magnification"] = _nominal_magnification(info.mpp)


def _nominal_magnification(mpp: float) -> int:
    return min(NOMINAL_MAGNIFICATIONS, key=lambda magnification: abs(np.log(magnification * mpp / 10)))


@contextlib.contextmanager
def open_features(path: str | os.PathLike[str]) -> Iterator[tuple[h5py.File, FeatureInfo]]:
    """Opens a feature file, checks its layout and gives the HDF5 file and what it says about itself.

    Raises:
        FeaturesError: The file is missing, cut short, or not a feature file of ours.
    """
    try:
        file = h5py.File(path, "r")
    except FileNotFoundError:
        raise FeaturesError(f"{path}: no such feature file; run extract_features.py first") from None
    except OSError as error:
        raise FeaturesError(
            f"{path}: a damaged or cut-short HDF5 file ({error}); delete it and extract again"
        ) from error
    with file:
        yield file, _checked_info(file, path)


def read_info(path: str | os.PathLike[str]) -> tuple[FeatureInfo, int, int]:
    """What a feature file says about itself, its number of rows and their length, without reading the rows."""
    with open_features(path) as (file, info):
        return info, *file["features"].shape


def read_features(path: str | os.PathLike[str], rows: np.ndarray | slice = slice(None)) -> FeatureFile:
    """Reads a feature file, or only some of its rows.

    Args:
        rows: A slice, or row numbers in ascending order.

    Raises:
        FeaturesError: The file is missing, damaged, or holds values that are not finite.
    """
    with open_features(path) as (file, info):
        try:
            features, coords = file["features"][rows], file["coords"][rows]
        except OSError as error:
            raise FeaturesError(f"{path}: cannot be read to its end ({error}); delete it and extract again") from error
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(bad):
        raise FeaturesError(
            f"{path}: {len(bad)} of {len(features)} tiles of slide {info.slide_id!r} have features of model "
            f"{info.model!r} that are not finite; check the model's weights and extract again"
        )
    return FeatureFile(info, features, coords)


def check_same_kind(infos: Mapping[str | os.PathLike[str], FeatureInfo]) -> None:
    """Refuses feature files that cannot share one colour space.

    Args:
        infos: Path -> what the file says about itself.

    Raises:
        FeaturesError: Two files differ in model, weights, pooling, mpp or tile size, or are of the same slide.
    """
    (first_path, first), *others = infos.items()
    names = {
        "model": "the model",
        "weights_sha256": "the weights",
        "pooling": "the pooling",
        "mpp": "the micrometres a pixel",
        "tile_px": "the tile size in pixels",
    }
    seen = {first.slide_id: first_path}
    for path, info in others:
        if info.slide_id in seen:
            raise FeaturesError(
                f"{path}: these are features of slide {info.slide_id!r}, as are those of {seen[info.slide_id]}; give "
                "one file a slide, from one manifest of its tiles"
            )
        seen[info.slide_id] = path
        for field, what in names.items():
            ours, theirs = getattr(first, field), getattr(info, field)
            if ours != theirs:
                raise FeaturesError(
                    f"{path}: {what} of these features ({theirs}) differs from that of {first_path} ({ours}); "
                    "give files of one model and one tile set only"
                )


def _checked_info(file: h5py.File, path: str | os.PathLike[str]) -> FeatureInfo:
    _check_shapes(file, path)
    found = {name: file.attrs.get(name) for name in _FILE_ATTRIBUTES}
    found |= {field: file["coords"].attrs.get(name) for name, field in _COORDS_ATTRIBUTES.items()}
    missing = sorted(name for name, value in found.items() if value is None)
    if missing:
        raise FeaturesError(f"{path}: lacks the attributes {', '.join(missing)}; extract the features again")
    return FeatureInfo(**{field.name: field.type(found[field.name]) for field in fields(FeatureInfo)})


def _check_shapes(file: h5py.File, path: str | os.PathLike[str]) -> None:
    features, coords = file.get("features"), file.get("coords")
    if not isinstance(features, h5py.Dataset) or not isinstance(coords, h5py.Dataset):
        names: Sequence[str] = sorted(file)
        raise FeaturesError(f"{Path(path)}: has no datasets 'features' and 'coords' (it holds {', '.join(names)})")
    if features.ndim != 2 or features.dtype.kind != "f" or coords.shape != (len(features), 2):
        raise FeaturesError(
            f"{path}: features {features.dtype} {features.shape} and coords {coords.shape} are not one row of floats "
            "and one (x, y) a tile"
        )
