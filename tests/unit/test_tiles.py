"""The memory-mapped manifest, and crops against their windows."""

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dinoscope.data.crops import CropSizes
from dinoscope.data.tiles import TileKind, map_manifest
from dinoscope.data.windows import crop_ranges
from dinoscope.errors import ConfigError, ManifestError
from dinoscope.slides.manifest import TILE_SCHEMA, merge_manifests, tile_table, write_tiles

ABOUT = {"tile_set": "train", "tile_px": 64, "requested_mpp": 0.5, "mpp": 0.5, "stride_px": 64}
ABOUT |= {"width": 9999, "height": 9999, "slide_mpp": 0.25}


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    parts = []
    for slide, count in (("b [1]", 70_000), ("a", 5), ("c", 0)):
        columns = {"x": rng.integers(0, 9999, count), "y": rng.integers(0, 9999, count), "level": 0, "tile_px": 64}
        columns |= {"read_px": 128 + len(slide), "mpp": 0.5, "footprint_px": 128, "tissue_fraction": 0.9}
        parts.append(tmp_path / f"{len(parts)}.parquet")
        write_tiles(parts[-1], tile_table(slide, columns), ABOUT | {"slide_id": slide})
    merge_manifests(parts, tmp_path / "train.parquet")
    return tmp_path / "train.parquet"


def test_mapped_tiles_are_the_rows_of_the_manifest(manifest: Path, tmp_path: Path) -> None:
    rows = pq.read_table(manifest).to_pandas()
    tiles = map_manifest(manifest, tmp_path / "mapped")
    assert len(tiles) == len(rows) == 70_005
    for index in (0, 4, 5, 6, 65_535, 65_536, 65_541, 70_004):
        row, tile = rows.iloc[index], tiles[index]
        assert (tile.kind.slide_id, tile.x, tile.y) == (row.slide_id, row.x, row.y)
        assert (tile.kind.level, tile.kind.read_px, tile.kind.tile_px) == (row.level, row.read_px, row.tile_px)
    assert {kind.slide_id for kind in tiles.kinds} == {"a", "b [1]"}


def test_mapping_is_done_once_and_costs_twelve_bytes_a_tile(manifest: Path, tmp_path: Path) -> None:
    first = map_manifest(manifest, tmp_path / "mapped")
    stamp = first.path.stat().st_mtime_ns
    assert map_manifest(manifest, tmp_path / "mapped").path.stat().st_mtime_ns == stamp
    assert first.path.stat().st_size < 12.2 * 70_005


def test_workers_get_the_path_and_not_the_rows(manifest: Path, tmp_path: Path) -> None:
    tiles = map_manifest(manifest, tmp_path / "mapped")
    pickled = pickle.dumps(tiles)
    assert len(pickled) < 1000
    assert pickle.loads(pickled)[70_000] == tiles[70_000]


def test_missing_and_empty_manifests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="does not exist"):
        map_manifest(tmp_path / "nowhere.parquet", tmp_path)
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(ManifestError, match="no tile manifest"):
        map_manifest(tmp_path / "other.parquet", tmp_path)
    write_tiles(tmp_path / "empty.parquet", TILE_SCHEMA.empty_table(), ABOUT | {"slide_id": "c"})
    with pytest.raises(ManifestError, match="holds no tile"):
        map_manifest(tmp_path / "empty.parquet", tmp_path)


def sizes(**changes) -> CropSizes:
    values = {"global_px": 96, "local_px": 48, "num_local": 4, "gram_px": None, "global_scale": (0.25, 1.0)}
    values |= {"local_scale": (0.0625, 0.25), "gram_no_distortions": False}
    return CropSizes(**(values | changes))


def test_effective_resolution_of_crops() -> None:
    """A 96-px crop of a quarter to all of a 192-px window at 0.5: 96 to 192 px at 0.5 in 96 px."""
    (whole, local) = crop_ranges([TileKind("a", 0, 192, 192, 0.5, 192)], sizes())
    assert (whole.finest_mpp, whole.coarsest_mpp, whole.upsampled) == (0.5, 1.0, False)
    assert (local.finest_mpp, local.coarsest_mpp, local.upsampled) == (0.5, 1.0, False)
    (enlarged, _) = crop_ranges([TileKind("a", 0, 128, 128, 0.5, 128)], sizes())
    assert enlarged.upsampled
    assert enlarged.finest_mpp == pytest.approx(0.5 * 64 / 96)


def test_a_crop_larger_than_its_window_is_refused() -> None:
    with pytest.raises(ConfigError, match="gram teacher crops are 256 px but the tiles only 192 px"):
        crop_ranges([TileKind("a", 0, 192, 192, 0.5, 192)], sizes(gram_px=256))
