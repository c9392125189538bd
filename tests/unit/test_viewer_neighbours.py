"""Nearest tiles of the viewer against brute force in float64, and what its data files hold."""

import base64
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dinoscope.errors import FeaturesError
from dinoscope.features.writers import read_features
from dinoscope.visualize.pca import fit_basis, load_basis, save_basis
from dinoscope.visualize.viewer.clusters import read_clusters
from dinoscope.visualize.viewer.neighbours import NONE, draw_sample, load_sample, nearest_tiles, save_sample
from dinoscope.visualize.viewer.scripts import packed, read_script
from dinoscope.visualize.viewer.tiles import write_sample_script, write_tiles_script
from feature_samples import grid_coords, write_sample

SCRIPT = Path(__file__).parents[2] / "workflow_scripts" / "build_viewer.py"


def write_slides(folder, counts, width=24, seed=0, **changes):
    """Feature files of slides with so many tiles each."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(6, width))
    files = {}
    for slide_id, count in counts.items():
        features = centres[rng.integers(0, 6, count)] + 0.5 * rng.normal(size=(count, width)) + 1
        files[slide_id] = write_sample(folder / f"{slide_id}.h5", features.astype(np.float16), **changes)
    return files


def unpacked(text, dtype):
    return np.frombuffer(base64.b64decode(text), np.dtype(dtype).newbyteorder("<"))


def by_brute_force(file, sample, num, elsewhere):
    """Neighbours of each tile, one tile at a time, in float64."""
    rows = sample.features.astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    slides = np.array(sample.slides)[sample.slide]
    for features, corner in zip(file.features.astype(np.float64), file.coords, strict=True):
        cosines = rows @ features / np.linalg.norm(features)
        same = slides == file.info.slide_id
        out = same if elsewhere else same & (sample.coords == corner).all(axis=1)
        order = np.argsort(np.where(out, -np.inf, cosines))[::-1][: min(num, int((~out).sum()))]
        yield order, cosines[order]


@pytest.mark.parametrize(
    ("counts", "max_tiles"),
    [
        ({"A": 40, "B": 25, "C": 3}, 50_000),
        ({"A": 400, "B": 90, "C": 5}, 120),
        ({"A": 1500, "B": 1301}, 50_000),  # enough for blocks, and no whole number of them
        ({"A": 5}, 50_000),
        ({"A": 1, "B": 0}, 50_000),
    ],
)
def test_neighbours_are_those_of_brute_force(tmp_path, counts, max_tiles):
    files = write_slides(tmp_path, counts)
    sample = draw_sample(list(files.values()), max_tiles=max_tiles)
    for path in files.values():
        file = read_features(path)
        for found, elsewhere in zip(nearest_tiles(file, sample, 6), (False, True), strict=True):
            assert found.tiles.shape == found.cosines.shape == (len(file.coords), 6)
            wanted = by_brute_force(file, sample, 6, elsewhere)
            for tiles, cosines, (order, true) in zip(found.tiles, found.cosines, wanted, strict=True):
                assert (tiles[len(order) :] == NONE).all() and len(set(tiles[: len(order)])) == len(order)
                np.testing.assert_allclose(cosines[: len(order)], true, atol=1e-5)
                np.testing.assert_array_equal(np.sort(-cosines[: len(order)]), -cosines[: len(order)])
                if (np.diff(true) < -1e-5).all():  # no ties
                    np.testing.assert_array_equal(tiles[: len(order)], order)


def test_neighbours_do_not_depend_on_the_chunks(tmp_path, monkeypatch):
    files = write_slides(tmp_path, {"A": 200, "B": 150})
    sample, file = draw_sample(list(files.values())), read_features(files["A"])
    whole = nearest_tiles(file, sample, 4)
    monkeypatch.setattr("dinoscope.visualize.viewer.neighbours._CHUNK_VALUES", 7 * 384)
    for one, other in zip(whole, nearest_tiles(file, sample, 4), strict=True):
        np.testing.assert_allclose(one.cosines, other.cosines, atol=1e-6)
        assert (one.tiles == other.tiles).mean() > 0.999


def test_the_sample_is_balanced_seeded_and_does_not_depend_on_order(tmp_path):
    files = list(write_slides(tmp_path, {"A": 500, "B": 300, "C": 20}).values())
    sample = draw_sample(files, seed=3, max_tiles=220)
    assert np.bincount(sample.slide).tolist() == [100, 100, 20] and sample.counts.tolist() == [500, 300, 20]
    again, other = draw_sample(files[::-1], seed=3, max_tiles=220), draw_sample(files, seed=4, max_tiles=220)
    np.testing.assert_array_equal(sample.coords, again.coords)
    np.testing.assert_array_equal(sample.features, again.features)
    assert (sample.coords != other.coords).any()
    assert len(draw_sample(files, max_tiles=10**6).slide) == 820
    for number, path in enumerate(files):
        rows = sample.rows_of("ABC"[number])
        stored = {tuple(corner): row for corner, row in zip(*reversed(features_and_coords(path)), strict=True)}
        for corner, row in zip(sample.coords[rows], sample.features[rows], strict=True):
            np.testing.assert_array_equal(stored[tuple(corner)], row)


def features_and_coords(path):
    file = read_features(path)
    return [file.features, map(tuple, file.coords.tolist())]


def test_a_slide_that_came_later_finds_neighbours_in_the_old_sample(tmp_path):
    files = write_slides(tmp_path, {"A": 30, "B": 30, "new": 12})
    sample = draw_sample([files["A"], files["B"]])
    file = read_features(files["new"])
    found, elsewhere = nearest_tiles(file, sample, 5)
    np.testing.assert_array_equal(found.tiles, elsewhere.tiles)
    assert (found.tiles < 60).all()


def test_a_sample_survives_the_disk(tmp_path):
    sample = draw_sample(list(write_slides(tmp_path, {"A": 9, "Ü b": 4}).values()), max_tiles=12)
    save_sample(sample, tmp_path / "neighbours" / "gram.npz")
    again = load_sample(tmp_path / "neighbours" / "gram.npz")
    assert (again.slides, again.kind, again.max_tiles) == (sample.slides, sample.kind, 12)
    for name in ("sides", "counts", "slide", "coords", "features"):
        np.testing.assert_array_equal(getattr(again, name), getattr(sample, name))
    about = json.loads((tmp_path / "neighbours" / "gram.json").read_text())
    assert about["slides"] == ["A", "Ü b"] and (about["num_tiles"], about["num_tiles_sampled"]) == (13, 12)


def test_bad_input_is_named(tmp_path):
    files = write_slides(tmp_path, {"A": 9, "B": 9})
    sample = draw_sample(list(files.values()))
    other = write_slides(tmp_path / "other", {"C": 5}, model="base")["C"]
    with pytest.raises(FeaturesError, match=r"C\.h5: the model of these features \(base\) differs from that of .*gram"):
        draw_sample([*files.values(), other])
    with pytest.raises(FeaturesError, match=r"C\.h5: its features have model base, but the sample .* model gram"):
        sample.check_fits(read_features(other).info, other)
    with pytest.raises(FeaturesError, match=r"run build_viewer\.py sample again"):
        load_sample(tmp_path / "none.npz")
    save_sample(sample, tmp_path / "cut.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:300])
    with pytest.raises(FeaturesError, match="no whole sample"):
        load_sample(tmp_path / "cut.npz")


@pytest.fixture
def parts(tmp_path):
    files = write_slides(tmp_path, {"A": 60, "B": 45, "empty": 0})
    basis = fit_basis(list(files.values()))
    save_basis(basis, tmp_path / "basis")
    return files, basis, draw_sample(list(files.values()))


def test_the_files_hold_what_the_page_shows(tmp_path, parts):
    files, basis, sample = parts
    file = read_features(files["A"])
    np.savez(tmp_path / "A.npz", labels=np.arange(60, dtype=np.int16) % 3 - 1)
    (tmp_path / "clusters.json").write_text('{"colors": ["#010203", "#0a0b0c"], "names": ["fat", "<b>"]}')
    clusters = read_clusters(tmp_path / "A.npz", tmp_path / "clusters.json", "A", 60)
    write_tiles_script(tmp_path / "A.js", file, basis, sample, num_neighbours=4, clusters=clusters)
    assert "<" not in (tmp_path / "A.js").read_text()
    kind, key, value = read_script(tmp_path / "A.js")
    assert (kind, key, value["count"], value["sampled"]) == ("tiles", "gram/A", 60, True)
    np.testing.assert_array_equal(unpacked(value["coords"], "i4").reshape(-1, 2), file.coords)
    np.testing.assert_array_equal(unpacked(value["colors"], "u1").reshape(-1, 3), basis.colors(file.features))
    assert (value["side"], value["step"], value["inset"]) == (449, 449, 0)
    np.testing.assert_array_equal(unpacked(value["clusters"]["labels"], "i2"), np.arange(60) % 3 - 1)
    assert value["clusters"]["names"] == ["fat", "<b>"]
    for name, found in zip(("nearest", "elsewhere"), nearest_tiles(file, sample, 4), strict=True):
        stored = value[name]
        np.testing.assert_array_equal(unpacked(stored["tiles"], "u2").reshape(-1, 4), found.tiles)
        steps = unpacked(stored["cosines"], "u1").reshape(-1, 4)
        cosines = stored["low"] + (stored["high"] - stored["low"]) * steps / 255
        np.testing.assert_allclose(cosines, found.cosines, atol=(stored["high"] - stored["low"]) / 500)
    write_sample_script(tmp_path / "sample.js", sample)
    kind, key, value = read_script(tmp_path / "sample.js")
    assert (kind, key, value["slides"], value["total"]) == ("sample", "gram", ["A", "B", "empty"], 105)
    assert value["max_tiles"] == 50_000
    np.testing.assert_array_equal(unpacked(value["slide"], "i4"), np.repeat([0, 1], [60, 45]))


def test_background_is_black_in_the_files(tmp_path, parts):
    files, _, sample = parts
    file, basis = read_features(files["A"]), fit_basis(list(files.values()), background="low")
    background = basis.is_background(file.features)
    write_tiles_script(tmp_path / "A.js", file, basis, sample)
    stored = unpacked(read_script(tmp_path / "A.js")[2]["colors"], "u1").reshape(-1, 3)
    assert 0 < background.sum() < 60 and not stored[background].any()
    np.testing.assert_array_equal(stored[~background], basis.colors(file.features)[~background])


def test_a_slide_without_tiles_has_a_file_too(tmp_path, parts):
    files, basis, sample = parts
    write_tiles_script(tmp_path / "empty.js", read_features(files["empty"]), basis, sample)
    _, _, value = read_script(tmp_path / "empty.js")
    assert value["count"] == 0 and value["coords"] == value["colors"] == "" and "nearest" not in value


def test_overlapping_tiles_are_painted_without_overlap(tmp_path):
    coords = grid_coords(4, 4, 300)
    features = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    path = write_sample(tmp_path / "A.h5", features, coords, overlap_px=56, patch_size_level0=400)
    write_tiles_script(tmp_path / "A.js", read_features(path), fit_basis([path]), draw_sample([path]))
    _, _, value = read_script(tmp_path / "A.js")
    assert (value["side"], value["step"], value["inset"]) == (400, 300, 50)


@pytest.mark.parametrize(
    ("labels", "legend", "problem"),
    [
        (
            np.zeros(4, np.int16),
            '{"colors": ["#010203"]}',
            r"\(4,\) are not one integer for each of the 5",
        ),
        (np.zeros(5), '{"colors": ["#010203"]}', "float64"),
        (np.full(5, 2), '{"colors": ["#010203"]}', "labels from 2 to 2 of slide 'A' do not fit the 1 clusters"),
        (np.zeros(5, np.int16), '{"colors": ["red"]}', "must be a list of '#rrggbb'"),
        (np.zeros(5, np.int16), '{"colors": ["#010203"], "names": ["a", "b"]}', "as many"),
        (np.zeros(5, np.int16), '{"other": 1}', "no colours of clusters"),
        (np.zeros(5, np.int16), "{", "no colours of clusters"),
        (None, '{"colors": ["#010203"]}', "no whole clusters of tiles"),
    ],
)
def test_clusters_that_do_not_fit_are_refused(tmp_path, labels, legend, problem):
    if labels is not None:
        np.savez(tmp_path / "A.npz", labels=labels)
    (tmp_path / "clusters.json").write_text(legend)
    with pytest.raises(FeaturesError, match=problem):
        read_clusters(tmp_path / "A.npz", tmp_path / "clusters.json", "A", 5)


def run_script(*arguments):
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True)


def test_the_script_does_each_step_and_names_what_is_missing(tmp_path, parts):
    files, _, _ = parts
    npz, js = tmp_path / "neighbours" / "gram.npz", tmp_path / "v" / "models" / "gram" / "sample.js"
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"{path}\n" for path in files.values()))
    done = run_script("sample", "--features", f"@{listed}", "--max-tiles", 40, "--output", npz, "--script", js)
    assert done.returncode == 0 and "model gram: 40 of 105 tiles of 3 slides" in done.stderr
    assert load_sample(npz).coords.shape == (40, 2)
    assert (read_script(js)[2]["total"], read_script(js)[2]["max_tiles"]) == (105, 40)
    common = ("tiles", "--features", files["A"], "--sample", npz, "--output", tmp_path / "A.js")
    done = run_script(*common, "--basis", tmp_path / "nowhere")
    assert done.returncode == 1 and "no whole PCA basis" in done.stderr and not (tmp_path / "A.js").exists()
    done = run_script(*common, "--basis", tmp_path / "basis", "--clusters", tmp_path / "A.npz")
    assert done.returncode == 1 and "give both, or neither" in done.stderr
    missing = ("tiles", "--features", tmp_path / "X.h5", "--sample", npz, "--output", tmp_path / "X.js")
    done = run_script(*missing, "--basis", tmp_path / "basis")
    assert done.returncode == 1 and "X.h5: no such feature file" in done.stderr
    done = run_script(*common, "--basis", tmp_path / "basis")
    assert done.returncode == 0, done.stderr
    assert read_script(tmp_path / "A.js")[2]["count"] == 60
    assert load_basis(tmp_path / "basis").info["num_tiles"] == 105


def test_numbers_are_little_endian():
    assert base64.b64decode(packed(np.array([1, 258], ">i4"))) == b"\1\0\0\0\2\1\0\0"
