import itertools
from pathlib import Path

import numpy as np
import pytest
import yaml

from dinoscope.errors import ConfigError, FeaturesError
from dinoscope.features.writers import read_features
from dinoscope.visualize.color_basis import BACKGROUND_COLOR, BACKGROUNDS, fit_colors, otsu_threshold
from dinoscope.visualize.pca import fit_basis, load_basis, save_basis
from feature_samples import write_sample


def two_kinds(num_background=80, num_foreground=120, width=16, seed=0):
    """Background that is all alike and far from a foreground with three directions; which rows are background."""
    generator = np.random.default_rng(seed)
    apart, *directions = np.linalg.qr(np.random.default_rng(5).normal(size=(width, width)))[0].T
    foreground = generator.normal(size=(num_foreground, 3)) * [2, 1, 0.5] @ np.stack(directions[:3])
    background = 30 * apart + 0.05 * generator.normal(size=(num_background, width))
    rows = np.concatenate([background, foreground + 0.01 * generator.normal(size=(*foreground.shape[:1], width))])
    is_background = np.arange(len(rows)) < num_background
    order = generator.permutation(len(rows))
    return (rows[order] + 3).astype(np.float32), is_background[order], np.stack(directions[:3])


def side_of(rows, is_background):
    """The side of the first component, as a map made with keep shows it, on which the background is."""
    first = fit_colors(rows.copy(), "x").project(rows)[:, 0]
    return "high" if first[is_background].mean() > first[~is_background].mean() else "low"


@pytest.mark.parametrize("seed", range(3))
def test_otsu_parts_where_the_variance_between_is_largest(seed):
    values = np.random.default_rng(seed).normal(size=60) + 3 * (np.arange(60) % 3 == 0)
    threshold = otsu_threshold(values)

    def between(cut):
        low, high = values[values < cut], values[values >= cut]
        return len(low) * len(high) * (low.mean() - high.mean()) ** 2 if len(low) and len(high) else 0

    ordered = np.sort(values)
    best = max(between((a + b) / 2) for a, b in itertools.pairwise(ordered))
    assert between(threshold) == pytest.approx(best)


def test_background_is_left_out_and_colours_are_of_the_rest():
    rows, is_background, directions = two_kinds()
    kept = fit_colors(rows.copy(), "x")
    basis = fit_colors(rows.copy(), "x", background=side_of(rows, is_background))
    np.testing.assert_array_equal(basis.is_background(rows), is_background)
    assert not kept.is_background(rows).any()
    np.testing.assert_array_equal(basis.colors(rows)[is_background], BACKGROUND_COLOR)
    overlap = np.abs(basis.components[:3] @ directions.T)
    np.testing.assert_allclose(overlap, np.eye(3), atol=0.15)  # the directions of the foreground, in their order
    assert basis.info["num_tiles_fitted"] == np.count_nonzero(~is_background)
    alone = fit_colors(rows[~is_background].copy(), "x")
    np.testing.assert_allclose(basis.colors(rows[~is_background]), alone.colors(rows[~is_background]), atol=1)


def test_low_and_high_are_the_sides_of_the_first_component():
    rows, is_background, _ = two_kinds()
    side = side_of(rows, is_background)
    named = fit_colors(rows.copy(), "x", background=side)
    np.testing.assert_array_equal(named.is_background(rows), is_background)
    other = fit_colors(rows.copy(), "x", background={"low": "high", "high": "low"}[side])
    np.testing.assert_array_equal(other.is_background(rows), ~is_background)


def test_the_side_is_named_not_guessed():
    rows, _, _ = two_kinds()
    with pytest.raises(ConfigError, match=r"background 'auto' is none of keep, low, high"):
        fit_colors(rows, "x", background="auto")
    schema = yaml.safe_load((Path(__file__).parents[2] / "config" / "schemas" / "config.schema.yaml").read_text())
    for key in ("background", "region_background"):
        assert schema["properties"]["pca"]["properties"][key]["enum"] == list(BACKGROUNDS)


def test_a_basis_without_background_is_saved_whole(tmp_path):
    rows, is_background, _ = two_kinds()
    path = write_sample(tmp_path / "A.h5", rows)
    basis = fit_basis([path], background=side_of(rows, is_background))
    save_basis(basis, tmp_path / "pca")
    loaded = load_basis(tmp_path / "pca")
    features = read_features(path).features
    np.testing.assert_array_equal(loaded.is_background(features), is_background)
    np.testing.assert_array_equal(loaded.colors(features), basis.colors(features))
    assert basis.info["num_tiles_background"] == 80 and basis.info["background"] in ("low", "high")
    np.testing.assert_allclose(basis.info["mean"], rows[~is_background].mean(axis=0, dtype=np.float64), atol=1e-5)


def test_hardly_any_foreground_is_refused():
    rows, is_background, _ = two_kinds(num_background=80, num_foreground=3)
    with pytest.raises(FeaturesError, match=r"sets apart all but 3 rows as background"):
        fit_colors(rows, "model 'gram'", background=side_of(rows, is_background))


def test_a_slide_twice_and_other_overlaps_are_refused(tmp_path):
    rows, _, _ = two_kinds()
    first = write_sample(tmp_path / "A.h5", rows)
    again = write_sample(tmp_path / "again" / "A.h5", rows, manifest_hash="c" * 64)
    with pytest.raises(
        FeaturesError, match=r"again/A\.h5: these are features of slide 'A', as are those of .*A\.h5; give one"
    ):
        fit_basis([first, again])
    overlapping = write_sample(tmp_path / "B.h5", rows, overlap_px=112)
    with pytest.raises(FeaturesError, match=r"B\.h5: its tiles overlap by 112 px, those of .*A\.h5 by 0 px"):
        fit_basis([first, overlapping])


def test_a_file_cut_short_is_refused_by_name(tmp_path):
    rows, _, _ = two_kinds(num_foreground=4000)
    whole, cut = write_sample(tmp_path / "A.h5", rows), write_sample(tmp_path / "B.h5", rows)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    with pytest.raises(FeaturesError, match=r"B\.h5: a damaged or cut-short HDF5 file"):
        fit_basis([whole, cut])
