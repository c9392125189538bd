import json
import os
import subprocess
import sys
import textwrap
from dataclasses import asdict, replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from dinoscope.errors import FeaturesError
from dinoscope.features.writers import check_same_kind, read_features, read_info, write_features
from feature_samples import INFO, grid_coords, write_sample


@pytest.fixture
def rows():
    generator = np.random.default_rng(0)
    return generator.normal(size=(1300, 24)).astype(np.float32), grid_coords(65, 20, 449)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rows_come_back_in_order_whatever_the_batches(tmp_path, rows, dtype):
    features, coords = rows
    features = features.astype(dtype)
    path = tmp_path / "A.h5"
    with write_features(path, INFO, len(features), 24, dtype=dtype) as writer:
        for start, stop in [(0, 1), (1, 700), (700, 1300)]:
            writer.append(features[start:stop], coords[start:stop])
    file = read_features(path)
    assert file.info == INFO
    assert file.features.dtype == dtype and file.coords.dtype == np.int64
    np.testing.assert_array_equal(file.features, features)
    np.testing.assert_array_equal(file.coords, coords)
    some = np.array([3, 512, 1299])
    np.testing.assert_array_equal(read_features(path, some).features, features[some])
    assert read_info(path) == (INFO, 1300, 24)


def test_layout_is_tridents(tmp_path, rows):
    """Names, places and types as the design's formats.md lists them, read with nothing but h5py."""
    path = write_sample(tmp_path / "A.h5", rows[0].astype(np.float16), rows[1], overlap_px=32)
    with h5py.File(path) as file:
        assert set(file) == {"features", "coords"}
        assert file["features"].chunks == (512, 24)
        assert dict(file["features"].attrs) == {"name": "A", "savetodir": "", "encoder": "gram"}
        attributes = dict(file["coords"].attrs)
        assert attributes.pop("level0_mpp") == INFO.level0_mpp
        assert attributes == {
            "patch_size": 224,
            "patch_size_level0": 449,
            "level0_magnification": 40,
            "target_magnification": 20,
            "overlap": 32,
            "name": "A",
            "savetodir": "",
            "level0_width": 9000,
            "level0_height": 4500,
        }
        for name in ("model", "weights_sha256", "manifest_hash", "mpp", "slide_id"):
            assert file.attrs[name] == getattr(INFO, name)


@pytest.mark.parametrize(
    ("mpp", "magnification"), [(0.2278, 40), (0.5, 20), (0.499, 20), (1.0, 10), (0.11, 80), (8, 5)]
)
def test_magnification_is_the_nearest_nominal_one(tmp_path, mpp, magnification):
    path = write_sample(tmp_path / "A.h5", np.zeros((1, 4), np.float16), level0_mpp=mpp)
    with h5py.File(path) as file:
        assert file["coords"].attrs["level0_magnification"] == magnification


def test_no_tiles_give_a_valid_empty_file(tmp_path):
    path = write_sample(tmp_path / "A.h5", np.zeros((0, 24), np.float16), np.zeros((0, 2), np.int64))
    with h5py.File(path) as file:
        assert file["features"].shape == (0, 24) and file["coords"].shape == (0, 2)
        assert file["coords"].attrs["patch_size_level0"] == 449
    assert read_features(path).features.shape == (0, 24)


def test_dense_features_are_kept_beside(tmp_path):
    patches = np.random.default_rng(1).normal(size=(5, 2, 3, 8)).astype(np.float16)
    path = tmp_path / "A.h5"
    with write_features(path, INFO, 5, 8, patch_shape=(2, 3, 8)) as writer:
        writer.append(np.zeros((2, 8)), np.zeros((2, 2)), patches[:2])
        writer.append(np.zeros((3, 8)), np.zeros((3, 2)), patches[2:])
    with h5py.File(path) as file:
        assert file["patch_features"].dtype == np.float16
        np.testing.assert_array_equal(file["patch_features"][:], patches)


def test_same_input_gives_the_same_bytes(tmp_path, rows):
    first, second = (write_sample(tmp_path / name / "A.h5", rows[0], rows[1]) for name in ("one", "two"))
    assert first.read_bytes() == second.read_bytes()


def test_an_interruption_leaves_what_was_there(tmp_path, rows):
    path = write_sample(tmp_path / "A.h5", rows[0], rows[1])
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt), write_features(path, INFO, 10, 24) as writer:
        writer.append(rows[0][:5], rows[1][:5])
        raise KeyboardInterrupt
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_with_rows_missing_never_appears(tmp_path, rows):
    path = tmp_path / "A.h5"
    with pytest.raises(AssertionError, match="5 of 10 rows"), write_features(path, INFO, 10, 24) as writer:
        writer.append(rows[0][:5], rows[1][:5])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
def test_a_file_cut_short_is_refused_by_name(tmp_path, rows, kept):
    whole = write_sample(tmp_path / "A.h5", rows[0], rows[1]).read_bytes()
    path = tmp_path / "cut.h5"
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(FeaturesError, match=r"cut\.h5.*damaged or cut-short"):
        read_features(path)


def test_foreign_and_missing_files_are_refused_by_name(tmp_path):
    with pytest.raises(FeaturesError, match=r"gone\.h5: no such feature file"):
        read_info(tmp_path / "gone.h5")
    with h5py.File(tmp_path / "clam.h5", "w") as file:
        file["features"], file["coords"] = np.zeros((3, 4), np.float32), np.zeros((3, 2), np.int32)
    with pytest.raises(FeaturesError, match=r"clam\.h5: lacks the attributes .*weights_sha256"):
        read_info(tmp_path / "clam.h5")
    with h5py.File(tmp_path / "stamp.h5", "w") as file:
        file["feats"] = np.zeros((3, 4))
    with pytest.raises(FeaturesError, match=r"stamp\.h5.*holds feats"):
        read_info(tmp_path / "stamp.h5")
    with h5py.File(write_sample(tmp_path / "odd.h5", np.zeros((3, 4), np.float16)), "a") as file:
        file["coords"].resize((2, 2))
    with pytest.raises(FeaturesError, match=r"odd\.h5.*not one row"):
        read_info(tmp_path / "odd.h5")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused_by_name(tmp_path, bad):
    features = np.zeros((5, 4), np.float32)
    features[3, 1] = bad
    path = write_sample(tmp_path / "B.h5", features)
    with pytest.raises(FeaturesError, match=r"B\.h5: 1 of 5 tiles of slide 'B' .* 'gram'"):
        read_features(path)
    assert len(read_features(path, slice(0, 3)).features) == 3


@pytest.mark.parametrize(
    ("field", "value"),
    [("model", "base"), ("weights_sha256", "c" * 64), ("pooling", "mean"), ("mpp", 1.0), ("tile_px", 256)],
)
def test_mixed_kinds_are_refused_naming_both(field, value):
    other = replace(INFO, slide_id="B", manifest_hash="d" * 64, level0_width=1)
    check_same_kind({"A.h5": INFO, "B.h5": other})
    with pytest.raises(FeaturesError) as caught:
        check_same_kind({"A.h5": INFO, "B.h5": replace(other, **{field: value})})
    for part in ("A.h5", "B.h5", str(value), str(getattr(INFO, field))):
        assert part in str(caught.value)


def test_a_slide_given_twice_is_refused_naming_both():
    other = replace(INFO, manifest_hash="d" * 64)
    with pytest.raises(FeaturesError, match=r"^B\.h5: these are features of slide 'A', as are those of A\.h5"):
        check_same_kind({"A.h5": INFO, "B.h5": other})


def test_no_path_is_stored(tmp_path, rows):
    path = write_sample(tmp_path / "A.h5", rows[0], rows[1])
    assert str(tmp_path).encode() not in path.read_bytes()
    assert str(tmp_path) not in json.dumps(asdict(read_info(path)[0]))


FULL = """
    import gc, resource, sys
    import numpy as np
    from dinoscope.errors import FeaturesError
    from dinoscope.features.disk import new_h5
    from dinoscope.features.writers import write_features
    from feature_samples import INFO

    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
    appended = 0
    try:
        with write_features(sys.argv[2], INFO, 20_000, 64) as writer:
            for start in range(0, 20_000, 500):
                writer.append(np.ones((500, 64)), np.zeros((500, 2), int))
                appended += 1
    except FeaturesError as error:
        print(appended, error)
    gc.collect()
"""


@pytest.mark.parametrize("limit", [0, 500, 5_000, 500_000, 2_000_000, 100_000_000])
def test_a_full_disk_is_told_in_a_sentence_and_leaves_nothing(tmp_path, limit):
    """HDF5 alone ends such a process with a segmentation fault."""
    folders = [Path(__file__).parents[2] / "workflow_scripts", Path(__file__).parents[1]]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))}
    command = [sys.executable, "-c", textwrap.dedent(FULL), str(limit), str(tmp_path / "A.h5")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    if limit == 100_000_000:
        assert done.stdout == "" and read_features(tmp_path / "A.h5").features.shape == (20_000, 64)
        return
    appended, sentence = done.stdout.split(" ", 1)
    assert sentence.startswith(f"{tmp_path / 'A.h5'} cannot be written (File too large); free space")
    assert int(appended) < 40 and not list(tmp_path.iterdir())


def test_a_place_that_is_no_folder_is_told_in_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(FeaturesError, match=r"file/A\.h5 cannot be written \(.*\); free space, or give a place"),
        write_features(tmp_path / "file" / "A.h5", INFO, 0, 4),
    ):
        pass


def test_an_error_of_what_is_read_meanwhile_stays_what_it_is(tmp_path):
    with (
        pytest.raises(ConnectionResetError, match="the server of slides"),
        write_features(tmp_path / "A.h5", INFO, 1, 4),
    ):
        raise ConnectionResetError(104, "the server of slides")
    assert not list(tmp_path.iterdir())
