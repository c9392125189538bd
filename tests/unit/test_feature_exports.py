"""Exports, each read back by its format's own rules; where a tool's own reader is installed, by that too."""

import importlib.util
import resource
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from dinoscope.errors import FeaturesError
from dinoscope.features.exports import FORMATS, export_features
from dinoscope.slides.manifest import manifest_digest, tile_table, write_tiles
from feature_samples import grid_coords, write_sample

SCRIPT = Path(__file__).parents[2] / "workflow_scripts" / "export_features.py"
STEP = 449


@pytest.fixture(params=[37, 0], ids=["tiles", "no tiles"])
def sample(request, tmp_path):
    """A feature file, its manifest, and the rows."""
    count = request.param
    features = np.random.default_rng(0).normal(size=(count, 12)).astype(np.float16)
    coords = grid_coords(count, 1, STEP)
    tiles = tmp_path / "tiles" / "S 1.parquet"
    columns = {"x": coords[:, 0], "y": coords[:, 1], "level": 0, "read_px": STEP, "tile_px": 224, "mpp": 0.5}
    columns |= {"footprint_px": STEP, "tissue_fraction": np.linspace(0.5, 1, count)}
    write_tiles(tiles, tile_table("S 1", columns), {"slide_id": "S 1", "tile_set": "features"})
    path = write_sample(tmp_path / "S 1.h5", features, coords, manifest_hash=manifest_digest(tiles))
    return path, tiles, features, coords


def export(sample, name, folder):
    return export_features(name, sample[0], sample[1], folder)


def test_clam(sample, tmp_path):
    written = export(sample, "clam", tmp_path / "clam")
    assert written == [tmp_path / "clam/pt_files/S 1.pt", tmp_path / "clam/h5_files/S 1.h5"]
    tensor = torch.load(written[0], weights_only=True)
    assert type(tensor) is torch.Tensor and tensor.dtype == torch.float32
    np.testing.assert_array_equal(tensor, sample[2].astype(np.float32).reshape(-1, 12))
    with h5py.File(written[1]) as file:
        assert set(file) == {"features", "coords"}
        assert (file["features"].dtype, file["coords"].dtype) == (np.float32, np.int32)
        np.testing.assert_array_equal(file["features"][:], tensor)
        np.testing.assert_array_equal(file["coords"][:], sample[3].reshape(-1, 2))


def test_stamp(sample, tmp_path):
    (path,) = export(sample, "stamp", tmp_path / "stamp")
    with h5py.File(path) as file:
        assert set(file) == {"feats", "coords"}
        assert file["feats"].dtype == np.float16 and file["coords"].dtype == np.float32
        np.testing.assert_array_equal(file["feats"][:], sample[2].reshape(-1, 12))
        np.testing.assert_allclose(file["coords"][:], sample[3].reshape(-1, 2) * 0.2494, rtol=1e-6)
        attributes = dict(file.attrs)
    assert attributes["unit"] == "um" and attributes["feat_type"] == "tile" and attributes["extractor"] == "gram"
    assert attributes["tile_size_px"] == 224 and attributes["tile_size_um"] == 112.0
    assert tuple(map(int, attributes["stamp_version"].split("."))) <= (2, 1, 0) and attributes["code_hash"]


def test_parquet(sample, tmp_path):
    (path,) = export(sample, "parquet", tmp_path / "parquet")
    table = pq.read_table(path)
    manifest = pq.read_table(sample[1])
    assert table.column_names == [*manifest.column_names, "features"]
    rows = np.array(table["features"].to_pylist(), np.float32).reshape(-1, 12)
    np.testing.assert_array_equal(rows, sample[2].astype(np.float32))
    for name in ("x", "y", "tissue_fraction"):
        assert table[name].to_pylist() == manifest[name].to_pylist()
    assert table["slide_id"].to_pylist() == ["S 1"] * len(rows)


def elem(group):
    return group.attrs["encoding-type"], group.attrs["encoding-version"]


def test_anndata_by_its_on_disk_format(sample, tmp_path):
    (path,) = export(sample, "anndata", tmp_path / "anndata")
    count = len(sample[2])
    with h5py.File(path) as file:
        assert elem(file) == ("anndata", "0.1.0")
        assert set(file) == {"X", "obs", "var", "obsm", "varm", "obsp", "varp", "layers", "uns"}
        assert elem(file["X"]) == ("array", "0.2.0") and file["X"].shape == (count, 12)
        np.testing.assert_array_equal(file["X"][:], sample[2].astype(np.float32))
        for name, length in (("obs", count), ("var", 12)):
            assert elem(file[name]) == ("dataframe", "0.2.0")
            index = file[name][file[name].attrs["_index"]]
            assert elem(index) == ("string-array", "0.2.0") and len(set(index[:])) == length
        columns = list(file["obs"].attrs["column-order"])
        assert set(columns) | {"_index"} == set(file["obs"]) and len(file["var"].attrs["column-order"]) == 0
        manifest = pq.read_table(sample[1])
        for name in manifest.column_names[1:]:
            np.testing.assert_array_equal(file["obs"][name][:], manifest[name].to_numpy())
        slide = file["obs/slide_id"]
        assert elem(slide) == ("categorical", "0.2.0") and not slide.attrs["ordered"]
        assert list(slide["categories"].asstr()) == ["S 1"] and slide["codes"][:].tolist() == [0] * count
        np.testing.assert_array_equal(file["obsm/spatial"][:], sample[3].reshape(-1, 2) + STEP / 2)
        assert elem(file["uns/dinoscope"]) == ("dict", "0.1.0")
        assert file["uns/dinoscope/model"].asstr()[()] == "gram"


@pytest.mark.skipif(importlib.util.find_spec("anndata") is None, reason="anndata is not installed")
def test_anndata_by_its_own_reader(sample, tmp_path):
    import anndata

    (path,) = export(sample, "anndata", tmp_path / "anndata")
    data = anndata.read_h5ad(path)
    assert data.shape == (len(sample[2]), 12) and data.X.dtype == np.float32
    np.testing.assert_array_equal(data.X, sample[2].astype(np.float32))
    assert data.obs["slide_id"].tolist() == ["S 1"] * len(sample[2])
    assert data.obs["x"].tolist() == sample[3].reshape(-1, 2)[:, 0].tolist()
    assert data.uns["dinoscope"]["mpp"] == 0.5


def test_wsidata_without_its_package_is_refused(sample, tmp_path):
    if importlib.util.find_spec("wsidata") is not None:
        pytest.skip("wsidata is installed")
    with pytest.raises(FeaturesError, match="not installed: pip install wsidata, or take anndata or parquet"):
        export(sample, "wsidata", tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("wsidata") is None, reason="wsidata is not installed")
def test_wsidata_by_its_own_reader(sample, tmp_path):
    import spatialdata
    import tifffile

    slide = tmp_path / "Jane Doe.tiff"
    options = {"tile": (256, 256), "photometric": "rgb", "resolution": (40000, 40000), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(slide, np.full((512, 17_000, 3), 200, np.uint8), compression="jpeg", **options)
    (path,) = export_features("wsidata", sample[0], sample[1], tmp_path / "wsidata", slide=slide)
    store = spatialdata.read_zarr(path)
    assert (set(store.shapes), set(store.tables)) == (({"tiles"}, {"gram_tiles"}) if len(sample[2]) else (set(), set()))
    if len(sample[2]):
        np.testing.assert_array_equal(store["gram_tiles"].X, sample[2].astype(np.float32))
        bounds = store["tiles"].bounds
        np.testing.assert_array_equal(bounds[["minx", "miny"]], sample[3])
        np.testing.assert_array_equal(bounds["maxx"] - bounds["minx"], STEP)
    assert not [file for file in path.rglob("*") if file.is_file() and b"Jane" in file.read_bytes()]


@pytest.mark.parametrize("name", ["clam", "anndata", "stamp", "parquet"])
def test_what_cannot_be_exported_is_refused_by_name_and_leaves_nothing(tmp_path, name):
    coords = grid_coords(3, 1, STEP)
    tiles = tmp_path / "B.parquet"
    columns = {"x": coords[:, 0], "y": 0, "level": 0, "read_px": STEP, "tile_px": 224, "mpp": 0.5}
    about = {"slide_id": "B", "tile_set": "features"}
    write_tiles(tiles, tile_table("B", columns | {"footprint_px": STEP, "tissue_fraction": 1.0}), about)
    features = np.zeros((3, 4), np.float32)
    other = write_sample(tmp_path / "B.h5", features, coords)
    with pytest.raises(FeaturesError, match=r"B\.h5 holds the features of other tiles than .*B\.parquet"):
        export_features(name, other, tiles, tmp_path / "out")
    features[1, 2] = np.nan
    broken = write_sample(tmp_path / "B.h5", features, coords, manifest_hash=manifest_digest(tiles))
    with pytest.raises(FeaturesError, match=r"B\.h5: features of model 'gram' are not finite in rows 0 to 2"):
        export_features(name, broken, tiles, tmp_path / "out")
    whole = write_sample(
        tmp_path / "B.h5", np.full((3, 4), 7e4, np.float32), coords, manifest_hash=manifest_digest(tiles)
    )
    if name == "stamp":
        with pytest.raises(FeaturesError, match=r"B\.h5: features overflow float16"):
            export_features(name, whole, tiles, tmp_path / "out")
        with pytest.raises(FeaturesError, match="would overwrite the features"):
            export_features(name, whole, tiles, tmp_path)
    whole.write_bytes(whole.read_bytes()[:700])
    with pytest.raises(FeaturesError, match=r"B\.h5.*damaged or cut-short"):
        export_features(name, whole, tiles, tmp_path / "out")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", ["clam", "anndata", "stamp", "parquet"])
def test_a_slide_skipped_while_its_tiles_were_read_gives_empty_files(tmp_path, name):
    coords = grid_coords(3, 1, STEP)
    columns = {"x": coords[:, 0], "y": 0, "level": 0, "read_px": STEP, "tile_px": 224, "mpp": 0.5}
    table = tile_table("B", columns | {"footprint_px": STEP, "tissue_fraction": 1.0})
    write_tiles(tmp_path / "B.parquet", table, {"slide_id": "B", "tile_set": "features"})
    digest = manifest_digest(tmp_path / "B.parquet")
    path = write_sample(tmp_path / "B.h5", np.zeros((0, 4), np.float16), coords[:0], manifest_hash=digest)
    (*_, written) = export_features(name, path, tmp_path / "B.parquet", tmp_path / "out")
    if name == "parquet":
        assert pq.read_table(written).num_rows == 0
    else:
        with h5py.File(written) as file:
            assert file[{"clam": "features", "anndata": "X", "stamp": "feats"}[name]].shape == (0, 4)


@pytest.mark.parametrize("name", ["clam", "anndata", "stamp", "parquet"])
@pytest.mark.parametrize("limit", [300, 70_000])
def test_a_full_disk_is_told_in_a_sentence_and_leaves_nothing(tmp_path, name, limit):
    coords = grid_coords(500, 1, STEP)
    columns = {"x": coords[:, 0], "y": 0, "level": 0, "read_px": STEP, "tile_px": 224, "mpp": 0.5}
    table = tile_table("B", columns | {"footprint_px": STEP, "tissue_fraction": 1.0})
    write_tiles(tmp_path / "B.parquet", table, {"slide_id": "B", "tile_set": "features"})
    features = np.random.default_rng(0).normal(size=(500, 100)).astype(np.float32)
    digest = manifest_digest(tmp_path / "B.parquet")
    path = write_sample(tmp_path / "B.h5", features, coords, manifest_hash=digest)
    words = [sys.executable, SCRIPT, "--format", name, "--features", path, "--tiles", tmp_path / "B.parquet"]
    words += ["--output-dir", tmp_path / "out"]
    done = subprocess.run(
        list(map(str, words)),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 1 and f"B ({name}) cannot be written (File too large); free" in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_script_exports_many_slides(sample, tmp_path):
    def run(*arguments):
        command = [sys.executable, str(SCRIPT), *map(str, arguments), "--output-dir", str(tmp_path / "out")]
        return subprocess.run(command, capture_output=True, text=True)

    path, tiles = sample[:2]
    done = run("--format", "parquet", "--features", path, path, "--tiles", tiles, tiles)
    assert done.returncode == 0, done.stderr
    assert pq.read_table(tmp_path / "out" / "S 1.parquet").num_rows == len(sample[2])
    done = run("--format", "parquet", "--features", path, path, "--tiles", tiles)
    assert done.returncode == 1 and "error: 2 --features, 1 --tiles: give as many of each" in done.stderr


def test_the_script_goes_on_after_a_bad_slide(sample, tmp_path):
    path, tiles = sample[:2]
    bad = [tmp_path / "bad 1.h5", tmp_path / "bad 2.h5"]
    for file in bad:
        file.write_bytes(b"no HDF5")
    words = [sys.executable, SCRIPT, "--format", "parquet", "--features", bad[0], path, bad[1], "--tiles", *[tiles] * 3]
    done = subprocess.run(list(map(str, [*words, "--output-dir", tmp_path / "out"])), capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert str(bad[0]) in done.stderr and str(bad[1]) in done.stderr and "2 of 3 files failed" in done.stderr
    assert pq.read_table(tmp_path / "out" / "S 1.parquet").num_rows == len(sample[2])


def test_the_script_knows_all_formats():
    done = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True)
    assert all(name in done.stdout for name in FORMATS)
