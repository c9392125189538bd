"""Small feature files for tests."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from dinoscope.features.writers import FeatureInfo, write_features

INFO = FeatureInfo(
    slide_id="A",
    model="gram",
    weights_sha256="a" * 64,
    manifest_hash="b" * 64,
    pooling="cls",
    mpp=0.5,
    tile_px=224,
    overlap_px=0,
    patch_size_level0=449,
    level0_mpp=0.2494,
    level0_width=9000,
    level0_height=4500,
)


def grid_coords(columns: int, rows: int, step: int) -> np.ndarray:
    """Corners of a full grid, row by row, (columns·rows, 2)."""
    y, x = np.mgrid[0:rows, 0:columns] * step
    return np.stack([x.ravel(), y.ravel()], axis=1).astype(np.int64)


def write_sample(path: Path, features: np.ndarray, coords: np.ndarray | None = None, **changes: object) -> Path:
    """A feature file of the given rows; `changes` replace fields of INFO."""
    info = replace(INFO, **{"slide_id": path.stem, **changes})
    if coords is None:
        coords = grid_coords(len(features), 1, info.patch_size_level0)
    with write_features(path, info, len(features), features.shape[1], dtype=features.dtype.name) as writer:
        writer.append(features, coords)
    return path
