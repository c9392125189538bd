"""The memory-mapped manifest, and its tiles as training images."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import dinoscope
from dinoscope.data.crops import CropSizes
from dinoscope.data.sources import Window
from dinoscope.data.tiles import MappedTiles, SlideRows, SlideTiles, map_manifest, open_tiles
from dinoscope.data.windows import crop_ranges
from dinoscope.errors import ConfigError, ManifestError
from dinoscope.slides.grid import TileSet
from dinoscope.slides.manifest import TILE_SCHEMA, manifest_digest, merge_manifests, tile_table, write_tiles
from dinoscope.slides.reader import Slide
from dinoscope.slides.table import SlideRecord
from dinoscope.slides.tiling import tile_slide
from synthetic_slides import texture, write_lossless
from tiny_slides import write_manifest, write_slide

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


def test_tiles_are_read_from_their_slides(tmp_path: Path) -> None:
    slides = [write_slide(tmp_path / f"{name}.tiff", seed, side=512) for seed, name in enumerate(("b", "a"))]
    write_manifest(tmp_path / "train.parquet", ["b", "a"], slide_px=512, tile_px=128)
    rows = [f"{path.stem}\t{path}\t{stain}" for path, stain in zip(slides, ("Pap", ""), strict=True)]
    table = tmp_path / "slides.tsv"
    table.write_text("\n".join(["slide_id\tpath\tstain", *rows, "c\tunused.tiff\tHE", ""]))
    tiles = pickle.loads(pickle.dumps(open_tiles(tmp_path / "train.parquet", str(table))))
    assert (len(tiles), tiles.slide_ids, tiles.windows) == (32, ["a", "b"], [Window(128, 128, 0.5)])
    assert tiles.digest() == manifest_digest(tmp_path / "train.parquet")
    records = pq.read_table(tmp_path / "train.parquet").to_pylist()
    for index in (0, 9, 31):
        row, (image, sample_id) = records[index], tiles.read(index)
        with Image.open(tmp_path / f"{row['slide_id']}.tiff") as slide:
            whole = np.array(slide)
        assert np.array_equal(image, whole[row["y"] : row["y"] + 128, row["x"] : row["x"] + 128])
        assert sample_id == f"{row['slide_id']}@{row['x']},{row['y']}"
        assert tiles.stain(index) == {"a": None, "b": "Pap"}[row["slide_id"]]
    table.write_text("\n".join(["slide_id\tpath\tstain", rows[0], ""]))
    with pytest.raises(ConfigError, match=r"has tiles of slide a, which .*slides\.tsv does not list"):
        open_tiles(tmp_path / "train.parquet", str(table))


def test_a_mix_of_mpp_is_read_at_each_tiles_own(tmp_path: Path) -> None:
    """Tiled, merged, mapped and read as training reads: every tile equals the average of level 0 under it."""
    image = texture(600, 840)
    path = write_lossless(tmp_path / "s.tiff", image, 0.25, (1, 2, 4))
    with Slide(path, "s") as slide:
        mix = TileSet("train", 96, (0.25, 0.5, 0.7, 1.0), edge="pad")
        tile_slide(slide, [(mix, tmp_path / "s.parquet")], "none")
    merge_manifests([tmp_path / "s.parquet"], tmp_path / "train.parquet")
    (tmp_path / "slides.tsv").write_text(f"slide_id\tpath\ns\t{path}\n")
    tiles = open_tiles(tmp_path / "train.parquet", str(tmp_path / "slides.tsv"))
    assert tiles.windows == [Window(96, 96, pytest.approx(mpp)) for mpp in mix.mpps]
    assert [kind.level for kind in tiles.tiles.kinds] == [0, 1, 1, 2]
    white = np.pad(image, ((0, 400), (0, 400), (0, 0)), constant_values=255)
    rows = pq.read_table(tmp_path / "train.parquet").to_pylist()
    assert len(rows) == len(tiles) and any(row["x"] + row["footprint_px"] > 840 for row in rows)
    for index, row in enumerate(rows):
        side = row["footprint_px"]
        assert side == round(96 * row["mpp"] / 0.25)
        under = white[row["y"] : row["y"] + side, row["x"] : row["x"] + side]
        wanted = cv2.resize(under.astype(np.float32), (96, 96), interpolation=cv2.INTER_AREA)
        assert np.abs(tiles.read(index)[0] - wanted).mean() <= 1
    # and the range of magnification that crops show covers the mix
    kinds = crop_ranges(tiles.windows, [CropSizes(64, 32)])
    assert all(crop.finest_mpp <= 0.25 and crop.coarsest_mpp >= 1.0 for crop in kinds)


def test_rows_of_a_slide_follow_each_other_at_all_resolutions(tmp_path: Path) -> None:
    rng, parts = np.random.default_rng(0), []
    for slide, mpps in (("b", [0.5, 1.0]), ("a", [0.5]), ("c", [1.0, 0.5, 0.25])):
        columns = {"x": rng.integers(0, 999, 40_000), "y": 0, "level": 0, "tile_px": 64, "read_px": 64}
        columns |= {"mpp": rng.choice(mpps, 40_000), "footprint_px": 128, "tissue_fraction": 0.9}
        parts.append(tmp_path / f"{slide}.parquet")
        write_tiles(parts[-1], tile_table(slide, columns), ABOUT | {"slide_id": slide})
    merge_manifests(parts, tmp_path / "train.parquet")
    tiles = map_manifest(tmp_path / "train.parquet", tmp_path / "mapped")
    assert tiles.slide_runs() == [("a", 0, 40_000), ("b", 40_000, 40_000), ("c", 80_000, 40_000)]
    rows = pq.read_table(tmp_path / "train.parquet").to_pandas()
    assert len(tiles.kinds) == len(rows.groupby(["slide_id", "mpp"], observed=True)) == 6
    for index in [*rng.integers(0, 120_000, 300), 39_999, 40_000, 65_535, 65_536, 119_999]:
        row, tile = rows.iloc[index], tiles[index]
        assert (tile.kind.slide_id, tile.kind.mpp, tile.x) == (row.slide_id, row.mpp, row.x)


def test_slides_in_two_places_are_refused(manifest: Path, tmp_path: Path) -> None:
    table = pq.read_table(manifest)
    mixed = pa.concat_tables([table.slice(0, 3), table.slice(5, 10), table.slice(3, 2)])
    about = {"dinoscope": pq.read_metadata(manifest).metadata[b"dinoscope"]}
    pq.write_table(mixed.replace_schema_metadata(about), tmp_path / "mixed.parquet")
    with pytest.raises(ManifestError, match="has tiles of slide a in more than one place; make it again"):
        map_manifest(tmp_path / "mixed.parquet", tmp_path / "mapped")


def test_files_mapped_before_slides_were_noted_still_open(manifest: Path, tmp_path: Path) -> None:
    tiles = map_manifest(manifest, tmp_path / "mapped")
    with pa.ipc.open_file(str(tiles.path)) as reader:
        schema = reader.schema.with_metadata({"kinds": reader.schema.metadata[b"kinds"]})
        table = reader.read_all().replace_schema_metadata(schema.metadata)
    with pa.ipc.new_file(str(tmp_path / "old.arrow"), schema) as writer:
        writer.write_table(table)
    old = MappedTiles(tmp_path / "old.arrow")
    assert old[70_000] == tiles[70_000]
    with pytest.raises(ManifestError, match=r"old\.arrow was made by an earlier version of dinoscope: delete it"):
        old.slide_runs()


def test_strata_are_site_scanner_and_stain(manifest: Path, tmp_path: Path) -> None:
    tiles = map_manifest(manifest, tmp_path / "mapped")
    records = [SlideRecord("a", Path("a"), "a", frozenset(), site="X", stain="HE")]
    records.append(SlideRecord("b [1]", Path("b"), "b", frozenset(), mpp=0.5))
    rows = SlideTiles(tiles, records, "digest").slide_rows()
    assert rows == [SlideRows("a", "X / unknown / HE", 0, 5), SlideRows("b [1]", "unknown", 5, 70_000)]


def test_opening_tiles_does_not_import_pandas(manifest: Path, tmp_path: Path) -> None:
    """It would take 28 MB of every worker's memory."""
    tiles = map_manifest(manifest, tmp_path / "mapped")
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer)[3].x, 'pandas' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(Path(dinoscope.__file__).parents[1])}
    found = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(tiles), capture_output=True, env=environment, check=True
    )
    assert found.stdout.split() == [str(tiles[3].x).encode(), b"False"]
