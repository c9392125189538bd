"""Manifests: columns, digests, merging that depends on nothing but the rows, errors."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dinoscope.errors import ManifestError
from dinoscope.slides import manifest
from dinoscope.slides.manifest import (
    QUALITY_SCHEMA,
    TILE_SCHEMA,
    manifest_digest,
    merge_manifests,
    read_metadata,
    read_tiles,
    tile_table,
    write_tiles,
)
from dinoscope.slides.summary import write_slide_summary
from dinoscope.slides.table import SlideRecord


def tiles_of(slide_id: str, count: int) -> pa.Table:
    rng = np.random.default_rng(count + len(slide_id))
    columns = {
        "x": rng.integers(0, 100_000, count),
        "y": rng.integers(0, 90_000, count),
        "tissue_fraction": rng.random(count),
        **{name: rng.random(count) for name in QUALITY_SCHEMA.names if name != "section_id"},
        "section_id": rng.integers(0, 9, count),
        "level": 1,
        "read_px": 512,
        "tile_px": 256,
        "mpp": 0.5,
        "footprint_px": 1024,
    }
    return tile_table(slide_id, columns)


def write(folder: Path, slide_id: str, count: int, changes: dict | None = None) -> Path:
    metadata = {
        "slide_id": slide_id,
        "width": 100_000,
        "height": 90_000,
        "mpp_x": 0.25,
        "mpp_y": 0.2502,
        "num_levels": 3,
        "vendor": "aperio",
        "tile_set": "train",
        "tile_px": 256,
        "requested_mpp": 0.5,
        "stride_px": 256,
    }
    path = folder / f"{slide_id}.parquet"
    write_tiles(path, tiles_of(slide_id, count), metadata | (changes or {}))
    return path


def test_columns_are_those_of_the_format(tmp_path: Path) -> None:
    path = write(tmp_path, "S [1] ß", 1000)
    expected = [
        ("slide_id", "dictionary<values=string, indices=int32, ordered=0>"),
        ("x", "int32"),
        ("y", "int32"),
        ("level", "int8"),
        ("read_px", "int32"),
        ("tile_px", "int16"),
        ("mpp", "float"),
        ("footprint_px", "int32"),
        ("tissue_fraction", "float"),
        *((name, "float") for name in ("white_fraction", "black_fraction", "grey_fraction", "pen_fraction", "focus")),
        ("section_id", "int32"),
    ]
    schema = pq.read_schema(path)
    assert [(field.name, str(field.type)) for field in schema] == expected
    assert json.loads(schema.metadata[b"dinoscope"])["schema_version"] == 1
    assert pq.ParquetFile(path).metadata.row_group(0).column(1).compression == "ZSTD"
    tiles = read_tiles(path)
    assert tiles.schema.equals(TILE_SCHEMA) and tiles.num_rows == read_metadata(path)["num_tiles"] == 1000
    places = list(zip(tiles["y"].to_pylist(), tiles["x"].to_pylist(), strict=True))
    assert places == sorted(places)


def test_row_groups(tmp_path: Path) -> None:
    paths = [write(tmp_path, name, count) for name, count in (("a", 100_000), ("b", 40), ("c", 70_000))]
    merge_manifests(paths, tmp_path / "m.parquet")
    for path, rows in ((paths[0], [65_536, 34_464]), (tmp_path / "m.parquet", [65_536, 65_536, 38_968])):
        stored = pq.ParquetFile(path).metadata
        assert [stored.row_group(number).num_rows for number in range(stored.num_row_groups)] == rows


def test_a_manifest_without_tiles(tmp_path: Path) -> None:
    path = write(tmp_path, "empty", 0)
    assert read_tiles(path).num_rows == 0 and read_tiles(path).schema.equals(TILE_SCHEMA)
    assert read_metadata(path)["num_tiles"] == 0
    assert manifest_digest(path) == hashlib.sha256().hexdigest()


def test_merged_rows_are_sorted_by_slide_and_else_as_they_were(tmp_path: Path) -> None:
    counts = {"b": 70_001, "a": 12, "é [2]": 0, "B": 500, "c": 3}
    paths = [write(tmp_path, name, count) for name, count in counts.items()]
    digest = merge_manifests(paths, tmp_path / "m.parquet")
    merged = read_tiles(tmp_path / "m.parquet")
    wanted = pa.concat_tables([read_tiles(tmp_path / f"{name}.parquet") for name in sorted(counts)])
    assert merged.unify_dictionaries().to_pylist() == wanted.unify_dictionaries().to_pylist()
    metadata = read_metadata(tmp_path / "m.parquet")
    assert metadata["digest"] == digest == manifest_digest(tmp_path / "m.parquet")
    assert (metadata["num_slides"], metadata["num_tiles"]) == (5, sum(counts.values()))
    assert {name: metadata[name] for name in ("tile_set", "tile_px", "requested_mpp")} == {
        "tile_set": "train",
        "tile_px": 256,
        "requested_mpp": 0.5,
    }


def test_neither_order_nor_encoding_changes_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [write(tmp_path, f"s{number}", 1000 * number + 5) for number in range(6)]
    digest = merge_manifests(paths, tmp_path / "m.parquet")
    assert merge_manifests(paths[::-1], tmp_path / "n.parquet") == digest
    assert (tmp_path / "m.parquet").read_bytes() == (tmp_path / "n.parquet").read_bytes()
    monkeypatch.setattr(manifest, "_ROW_GROUP", 777)
    assert merge_manifests(paths, tmp_path / "o.parquet") == digest
    tiles = read_tiles(tmp_path / "m.parquet").unify_dictionaries()
    recoded = tmp_path / "recoded.parquet"
    pq.write_table(tiles.replace_schema_metadata({b"dinoscope": b'{"schema_version": 1}'}), recoded, compression="none")
    assert manifest_digest(recoded) == digest


@pytest.mark.parametrize("seed", range(8))
def test_random_slides_made_and_given_in_random_orders_merge_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(manifest, "_ROW_GROUP", 100)
    rng = np.random.default_rng(seed)
    counts = {f"{number}é {seed}"[-4:]: int(rng.integers(0, 350)) for number in rng.permutation(12)} | {"last": 1}
    results = []
    for attempt in "abc":
        (tmp_path / attempt).mkdir()
        names = list(rng.permutation(sorted(counts)))
        paths = [write(tmp_path / attempt, name, counts[name]) for name in names]
        order = rng.permutation(len(paths))
        digest = merge_manifests([paths[index] for index in order], tmp_path / f"{attempt}.parquet")
        results.append((digest, (tmp_path / f"{attempt}.parquet").read_bytes()))
    assert results[0] == results[1] == results[2]
    wanted = pa.concat_tables([tiles_of(name, counts[name]) for name in sorted(counts)]).unify_dictionaries()
    assert read_tiles(tmp_path / "a.parquet").to_pylist() == wanted.to_pylist()
    sizes = pq.read_metadata(tmp_path / "a.parquet")
    groups = [sizes.row_group(number).num_rows for number in range(sizes.num_row_groups)]
    assert groups[:-1] == [100] * (len(wanted) // 100) and sum(groups) == len(wanted)


def test_a_row_group_names_its_own_slides_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the names of all slides before it would stand in each: of ten thousand in every one of 1,500."""
    monkeypatch.setattr(manifest, "_ROW_GROUP", 100)
    tables = [tiles_of(f"s{number:02}", 30) for number in range(50)]
    for group in manifest._full_row_groups(iter(tables)):
        (chunk, *_), named = group["slide_id"].chunks, set(group["slide_id"].to_pylist())
        assert set(chunk.dictionary.to_pylist()) == named
        assert len(named) <= 5


def test_digest_against_a_plain_reimplementation(tmp_path: Path) -> None:
    paths = [write(tmp_path, name, count) for name, count in (("ß", 70_000), ("a", 10))]
    digest = merge_manifests(paths, tmp_path / "m.parquet")
    total = b""
    for name in ("a", "ß"):
        rows = read_tiles(tmp_path / f"{name}.parquet").select(TILE_SCHEMA.names[1:9]).to_pandas()
        layout = np.dtype("<i4,<i4,i1,<i4,<i2,<f4,<i4,<f4")
        plain = np.array([tuple(row) for row in rows.itertuples(index=False)], layout).tobytes()
        total += hashlib.sha256(name.encode()).digest() + hashlib.sha256(plain).digest()
    assert hashlib.sha256(total).hexdigest() == digest


@pytest.mark.parametrize("column", ["x", "y", "level", "read_px", "tile_px", "mpp", "footprint_px", "tissue_fraction"])
def test_every_column_counts_in_the_digest(tmp_path: Path, column: str) -> None:
    path = write(tmp_path, "a", 50)
    before = manifest_digest(path)
    tiles = read_tiles(path)
    values = tiles[column].to_numpy().copy()
    values[17] += 1
    position = tiles.schema.get_field_index(column)
    write_tiles(path, tiles.set_column(position, column, pa.array(values)), read_metadata(path))
    assert manifest_digest(path) != before


def test_quality_says_nothing_of_pixels_and_does_not_count_in_the_digest(tmp_path: Path) -> None:
    path = write(tmp_path, "a", 50)
    before = manifest_digest(path)
    for column in QUALITY_SCHEMA.names:
        tiles = read_tiles(path)
        values = pa.array(tiles[column].to_numpy() + 1)
        write_tiles(path, tiles.set_column(tiles.schema.get_field_index(column), column, values), read_metadata(path))
    assert manifest_digest(path) == before


def test_manifests_from_before_quality_was_measured_are_read_and_merged(tmp_path: Path) -> None:
    old, new = write(tmp_path, "a", 50), write(tmp_path, "b", 70)
    before, measured = manifest_digest(old), read_tiles(new).select(QUALITY_SCHEMA.names)
    write_tiles(old, read_tiles(old).drop_columns(QUALITY_SCHEMA.names), read_metadata(old))
    assert read_tiles(old).num_rows == 50 and manifest_digest(old) == before
    merge_manifests([old, new], tmp_path / "m.parquet")
    merged = read_tiles(tmp_path / "m.parquet")
    assert np.isnan(merged["focus"].to_numpy()[:50]).all() and not merged["section_id"].to_numpy()[:50].any()
    assert merged.slice(50).select(QUALITY_SCHEMA.names).combine_chunks().equals(measured.combine_chunks())


def test_what_was_not_measured_is_nan() -> None:
    columns = dict.fromkeys(("y", "level", "read_px", "tile_px", "mpp", "footprint_px", "tissue_fraction"), 1)
    tiles = tile_table("a", columns | {"x": [1, 2, 3]})
    assert all(np.isnan(tiles[name].to_numpy()).all() for name in QUALITY_SCHEMA.names if name != "section_id")
    assert tiles["section_id"].to_pylist() == [0, 0, 0]


def test_slide_ids_count_in_the_digest(tmp_path: Path) -> None:
    one, other = write(tmp_path, "a", 50), tmp_path / "renamed.parquet"
    tiles = read_tiles(one)
    renamed = tiles.set_column(0, "slide_id", pa.array(["b"] * 50).dictionary_encode())
    write_tiles(other, renamed, read_metadata(one) | {"slide_id": "b"})
    assert manifest_digest(one) != manifest_digest(other)


def test_memory_does_not_grow_with_the_number_of_slides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [write(tmp_path, f"s{number:02}", 70_000) for number in range(12)]
    groups, used = manifest._full_row_groups, []

    def watched(tables):
        for group in groups(tables):
            used.append(pa.total_allocated_bytes())
            yield group

    monkeypatch.setattr(manifest, "_full_row_groups", watched)
    peaks = []
    for count in (4, 12):
        used.clear()
        before = pa.total_allocated_bytes()
        merge_manifests(paths[:count], tmp_path / "m.parquet")
        peaks.append(max(used) - before)
    assert 0 < peaks[1] < 1.3 * peaks[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slide_id": "a"}, "slide 'a' is in both"),
        ({"tile_px": 224}, "tile_px 224 and .* has 256"),
        ({"requested_mpp": 1.0}, "requested_mpp"),
        ({"tile_set": "features"}, "tile_set features"),
        ({"schema_version": 99}, "schema version 99"),
        ({"slide_id": None}, "not the tile manifest of one slide"),
    ],
)
def test_inputs_that_do_not_belong_together(tmp_path: Path, changes: dict, message: str) -> None:
    paths = [write(tmp_path, "a", 10), write(tmp_path, "b", 10, changes)]
    with pytest.raises(ManifestError, match=message):
        merge_manifests(paths, tmp_path / "m.parquet")
    assert not (tmp_path / "m.parquet").exists()


def test_nothing_to_merge(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no tile manifests to merge"):
        merge_manifests([], tmp_path / "m.parquet")
    with pytest.raises(ManifestError, match="none of the 2 slides has a tile in set train"):
        merge_manifests([write(tmp_path, "a", 0), write(tmp_path, "b", 0)], tmp_path / "m.parquet")


@pytest.mark.parametrize(
    "read", [read_tiles, read_metadata, manifest_digest, lambda path: merge_manifests([path], path)]
)
def test_damaged_files(tmp_path: Path, read) -> None:
    good = write(tmp_path, "a", 5000)
    content = good.read_bytes()
    bad = {"empty": b"", "text": b"hello", "cut": content[:-100], "short": content[:50]}
    for name, data in bad.items():
        path = tmp_path / f"{name}.parquet"
        path.write_bytes(data)
        with pytest.raises(
            ManifestError, match=f"{name}.parquet is not a readable tile manifest.*tile the slide again"
        ):
            read(path)
    with pytest.raises(ManifestError, match="does not exist"):
        read(tmp_path / "missing.parquet")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(ManifestError, match="no tile manifest"):
        read(tmp_path / "other.parquet")


def test_damage_in_the_rows_is_found_and_leaves_no_half_file(tmp_path: Path) -> None:
    path = write(tmp_path, "a", 60_000)
    content = bytearray(path.read_bytes())
    content[200:5000] = bytes(4800)
    path.write_bytes(content)
    with pytest.raises(ManifestError, match="not a readable tile manifest"):
        merge_manifests([path, write(tmp_path, "b", 10)], tmp_path / "m.parquet")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.parquet", "b.parquet"]


def test_slide_summary(tmp_path: Path) -> None:
    manifests = [write(tmp_path, name, count) for name, count in (("b", 20), ("a", 0))]
    both = frozenset({"train", "features"})
    records = [
        SlideRecord("a", tmp_path / "secret_a.svs", "case 1", both, stain="HE", site="X"),
        SlideRecord("b", tmp_path / "secret_b.svs", "case 2", both),
        SlideRecord("c", tmp_path / "secret_c.svs", "case 3", both),
    ]
    splits = tmp_path / "splits.tsv"
    splits.write_text("slide_id\tuse\na\teval\nb\ttrain\n")
    write_slide_summary(tmp_path / "slides.parquet", manifests, records, splits)
    rows = pq.read_table(tmp_path / "slides.parquet").to_pylist()
    assert [row["slide_id"] for row in rows] == ["a", "b"]
    assert rows[0] == {
        "slide_id": "a",
        "case_id": "case 1",
        "use": "eval,features",
        "site": "X",
        "scanner": None,
        "stain": "HE",
        "width": 100_000,
        "height": 90_000,
        "mpp": pytest.approx(0.2501),
        "num_levels": 3,
        "vendor": "aperio",
        "num_tiles": 0,
    }
    assert (rows[1]["use"], rows[1]["num_tiles"]) == ("train,features", 20)
    assert b"secret" not in (tmp_path / "slides.parquet").read_bytes()
    with pytest.raises(ManifestError, match="'b', which is not in the slide table"):
        write_slide_summary(tmp_path / "slides.parquet", manifests, records[:1])
