import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinoscope.errors import FeaturesError
from dinoscope.features.writers import read_features, read_info
from dinoscope.visualize.pca import DARKEST, balanced_quotas, fit_basis, load_basis, rounding_note, save_basis
from dinoscope.visualize.pca_map import (
    FOOTER_PX,
    HEADER_PX,
    LONGEST_PX,
    MARGIN_PX,
    draw_map,
    read_thumbnail,
    scale_bar_um,
    without_title,
)
from feature_samples import INFO, grid_coords, write_sample

SCRIPT = Path(__file__).parents[2] / "workflow_scripts" / "pca.py"


def structured(num_tiles: int, seed: int, width: int = 32, offset: float = 5.0) -> np.ndarray:
    """Features with three directions of unlike spread over small noise, far from the origin."""
    generator = np.random.default_rng(seed)
    directions = np.linalg.qr(np.random.default_rng(99).normal(size=(width, 4)))[0].T
    scores = generator.normal(size=(num_tiles, 3)) * [4, 2, 1]
    noise = 0.05 * generator.normal(size=(num_tiles, width))
    return (offset * directions[3] + scores @ directions[:3] + noise).astype(np.float32)


@pytest.fixture
def slides(tmp_path):
    return [write_sample(tmp_path / f"{name}.h5", structured(60 + 40 * i, i)) for i, name in enumerate("ABC")]


@pytest.fixture
def basis(slides):
    return fit_basis(slides)


def test_basis_is_the_svd_of_the_centred_features(slides, basis):
    features = np.concatenate([read_features(path).features for path in slides]).astype(np.float64)
    centred = features - features.mean(axis=0)
    _, singular, directions = np.linalg.svd(centred, full_matrices=False)
    ratios = singular**2 / (singular**2).sum()
    np.testing.assert_allclose(basis.mean, features.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(np.abs((basis.components[:3] * directions[:3]).sum(axis=1)), 1, atol=1e-4)
    np.testing.assert_allclose(basis.info["explained_variance_ratio"], ratios, atol=2e-6)
    assert basis.info["explained_by_top_3"] == pytest.approx(ratios[:3].sum(), abs=1e-5)
    assert basis.info["explained_by_top_50"] == pytest.approx(1, abs=1e-5)
    assert (basis.info["num_tiles"], basis.info["num_slides"], basis.info["model"]) == (300, 3, "gram")
    assert basis.info["slides"] == sorted(basis.info["slides"])
    assert len(set(basis.info["slides"])) == 3


def test_colours_are_the_scores_between_the_percentiles(slides, basis):
    everything = np.concatenate([read_features(path).features for path in slides]).astype(np.float64)
    scores = (everything - basis.mean) @ basis.components[:3].astype(np.float64).T
    low, high = (np.percentile(scores, q, axis=0) for q in (1, 99))
    features = read_features(slides[1]).features
    own = (features.astype(np.float64) - basis.mean) @ basis.components[:3].T
    expected = DARKEST + (255 - DARKEST) * np.clip((own - low) / (high - low), 0, 1)
    np.testing.assert_allclose(basis.colors(features), expected, atol=0.51 + 0.05)
    outliers = basis.mean + 1000 * np.stack([basis.components[0], -basis.components[0]])
    assert basis.colors(outliers)[:, 0].tolist() == [255, DARKEST]


def test_reruns_give_the_same_bytes_whatever_the_order(tmp_path, slides):
    for name, paths in (("one", slides), ("two", slides[::-1])):
        save_basis(fit_basis(paths), tmp_path / name)
    for file in ("basis.json", "basis.npz"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_signs_do_not_depend_on_the_solver(tmp_path):
    """Wide features take another solver than narrow ones; the convention is the same."""
    narrow = write_sample(tmp_path / "N.h5", structured(200, 0))
    wide = write_sample(tmp_path / "W.h5", structured(60, 0, width=200))
    for path in (narrow, wide):
        components = fit_basis([path]).components
        largest = np.abs(components).argmax(axis=1)
        assert (components[np.arange(len(components)), largest] > 0).all()


def test_a_saved_basis_colours_alike(tmp_path, slides, basis):
    save_basis(basis, tmp_path / "pca")
    loaded = load_basis(tmp_path / "pca")
    features = read_features(slides[0]).features
    np.testing.assert_array_equal(loaded.colors(features), basis.colors(features))
    np.testing.assert_array_equal(loaded.project(features), basis.project(features))
    assert loaded.info == basis.info


@pytest.mark.parametrize(
    ("counts", "total"), [([5, 100, 1000], 60), ([10, 10, 10], 300), ([0, 7, 1000, 1000], 107), ([3], 2)]
)
def test_quotas_are_as_equal_as_the_counts_allow(counts, total):
    quotas = balanced_quotas(counts, total)
    filled = [0] * len(counts)  # one tile at a time to whoever has least and is not used up
    for _ in range(min(total, sum(counts))):
        open_slides = [i for i in range(len(counts)) if filled[i] < counts[i]]
        filled[min(open_slides, key=lambda i: (filled[i], -counts[i]))] += 1
    assert sum(quotas) == sum(filled)
    np.testing.assert_allclose(quotas, filled, atol=1)


def test_a_sample_is_balanced_seeded_and_close_to_the_whole(tmp_path):
    paths = [
        write_sample(tmp_path / "big.h5", structured(5000, 0)),
        write_sample(tmp_path / "small.h5", structured(100, 1)),
    ]
    whole, sample, again, other = (
        fit_basis(paths),
        fit_basis(paths, max_tiles=600),
        fit_basis(paths, max_tiles=600),
        fit_basis(paths, max_tiles=600, seed=1),
    )
    assert sample.info["num_tiles_fitted"] == 600 and sample.info["num_tiles"] == 5100
    np.testing.assert_array_equal(sample.components, again.components)
    assert not np.array_equal(sample.components, other.components)
    np.testing.assert_allclose(sample.components[:3], whole.components[:3], atol=0.1)


def test_tiles_that_differ_get_colours_that_differ(tmp_path):
    """Six kinds of tile in random directions: no picture in one hue, though one direction holds most variance."""
    generator = np.random.default_rng(3)
    centres = generator.normal(size=(6, 64)) + 8 * np.outer(np.arange(6) > 2, generator.normal(size=64))
    kinds = np.repeat(np.arange(6), 50)
    path = write_sample(tmp_path / "A.h5", (centres[kinds] + 0.1 * generator.normal(size=(300, 64))).astype(np.float16))
    colors = fit_basis([path]).colors(read_features(path).features).astype(float)
    means = np.stack([colors[kinds == kind].mean(axis=0) for kind in range(6)])
    distances = np.linalg.norm(means[:, None] - means, axis=2)
    assert distances[~np.eye(6, dtype=bool)].min() > 40
    chroma = colors.max(axis=1) - colors.min(axis=1)
    assert np.median(chroma) > 60 and (colors.std(axis=0) > 40).all()


def test_features_that_cannot_be_fitted_together_are_refused(tmp_path, slides):
    for changes, message in (
        ({"model": "base"}, r"the model.*\(base\).*\(gram\)"),
        ({"weights_sha256": "f" * 64}, "the weights"),
        ({"mpp": 1.0}, "the micrometres a pixel"),
    ):
        other = write_sample(tmp_path / "Z.h5", structured(20, 5), **changes)
        with pytest.raises(FeaturesError, match=rf"Z\.h5: {message}"):
            fit_basis([*slides, other])
    broken = structured(20, 5)
    broken[7, 3] = np.nan
    with pytest.raises(FeaturesError, match=r"NaN\.h5: 1 of 20 tiles"):
        fit_basis([*slides, write_sample(tmp_path / "NaN.h5", broken)])


@pytest.mark.parametrize(("num_tiles", "message"), [(0, "holds no tile"), (3, r"holds only 3 tile\(s\)")])
def test_too_few_tiles_are_refused(tmp_path, num_tiles, message):
    path = write_sample(tmp_path / "A.h5", structured(num_tiles, 0), np.zeros((num_tiles, 2), np.int64))
    with pytest.raises(FeaturesError, match=rf"A\.h5 of model 'gram' {message}"):
        fit_basis([path])
    empty = write_sample(tmp_path / "C.h5", structured(0, 0), np.zeros((0, 2), np.int64))
    with pytest.raises(FeaturesError, match=r"A\.h5 and 1 more feature file\(s\) of model 'gram' hold "):
        fit_basis([empty, path])
    assert fit_basis([path, write_sample(tmp_path / "B.h5", structured(4, 1))]).info["num_slides"] == 2


def test_features_that_are_all_alike_are_refused(tmp_path):
    with pytest.raises(FeaturesError, match="in fewer than 3 directions"):
        fit_basis([write_sample(tmp_path / "A.h5", np.ones((30, 8), np.float16))])


def test_features_blurred_by_rounding_are_told(tmp_path):
    """What an untrained model gives: differences of some steps of float16, nothing in float32."""
    exact = 0.7 + 5e-4 * structured(300, 0, offset=0)
    files = {kind: write_sample(tmp_path / kind / "A.h5", exact.astype(kind)) for kind in ("float16", "float32")}
    bases = {kind: fit_basis([path]) for kind, path in files.items()}
    stored = exact.astype(np.float16).astype(np.float64)
    expected = (stored - exact).var() / stored.var(axis=0).mean()
    assert expected > 0.02
    assert bases["float16"].info["share_lost_in_rounding"] == pytest.approx(expected, rel=0.1)
    assert rounding_note(bases["float32"].info) == "" and "dtype float32" in rounding_note(bases["float16"].info)


def test_a_basis_refuses_features_of_another_model(tmp_path, basis):
    info = read_info(write_sample(tmp_path / "Q.h5", structured(5, 0), model="base"))[0]
    with pytest.raises(FeaturesError, match=r"Q\.h5: its features have model base, .* fitted on model gram"):
        basis.check_fits(info, tmp_path / "Q.h5")


def test_a_damaged_basis_is_refused_by_name(tmp_path, basis):
    save_basis(basis, tmp_path / "pca")
    arrays = tmp_path / "pca" / "basis.npz"
    arrays.write_bytes(arrays.read_bytes()[:300])
    with pytest.raises(FeaturesError, match="pca: no whole PCA basis"):
        load_basis(tmp_path / "pca")
    arrays.unlink()
    with pytest.raises(FeaturesError, match=r"run pca\.py fit again"):
        load_basis(tmp_path / "pca")


def map_of(tmp_path, basis, path, thumbnail, **options):
    """The picture part of a map, (h, w, 3), and the whole page."""
    output = tmp_path / "map.png"
    draw_map(output, read_features(path), basis, thumbnail, **options)
    with Image.open(output) as image:
        page = np.asarray(image.convert("RGB"))
    width = round(thumbnail.shape[1] * LONGEST_PX / max(thumbnail.shape[:2]))
    left = (page.shape[1] - width) // 2
    return page[HEADER_PX : len(page) - FOOTER_PX, left : left + width], page


WHITE = np.full((500, 1000, 3), 255, np.uint8)


def test_each_tile_is_painted_in_its_colour_at_its_place(tmp_path, basis):
    coords = grid_coords(20, 10, 449)[::7]
    features = structured(len(coords), 8)
    path = write_sample(tmp_path / "M.h5", features, coords)
    picture, _ = map_of(tmp_path, basis, path, WHITE)
    assert picture.shape == (800, 1600, 3)
    scale = 1600 / INFO.level0_width
    centres = ((coords + 449 / 2) * scale).astype(int)
    np.testing.assert_allclose(picture[centres[:, 1], centres[:, 0]], basis.colors(features), atol=1)
    painted = (picture.max(axis=2).astype(int) - picture.min(axis=2)) > 3
    expected = np.zeros((800, 1600), bool)
    for (x, y), color in zip(coords * scale, basis.colors(features).astype(int), strict=True):
        expected[round(y) : round(y + 449 * scale), round(x) : round(x + 449 * scale)] = np.ptp(color) > 3
    assert (painted & ~expected).mean() == 0
    assert (painted & expected).sum() > 0.93 * expected.sum()  # the rest are the lines between tiles


def test_overlapping_tiles_share_the_ground_between_them(tmp_path, basis):
    coords = grid_coords(6, 1, 224)
    path = write_sample(tmp_path / "O.h5", structured(6, 2), coords, overlap_px=112)
    picture, _ = map_of(tmp_path, basis, path, WHITE)
    scale = 1600 / INFO.level0_width
    centres = ((coords + 449 / 2) * scale).astype(int)
    np.testing.assert_allclose(
        picture[centres[:, 1], centres[:, 0]], basis.colors(read_features(path).features), atol=1
    )


def test_the_scale_bar_is_as_long_as_it_says(tmp_path, basis):
    path = write_sample(tmp_path / "S.h5", structured(5, 2))
    _, page = map_of(tmp_path, basis, path, WHITE)
    row = page[len(page) - FOOTER_PX // 2]
    bar = np.flatnonzero((row == 0).all(axis=1))
    bar = bar[: np.argmax(np.diff(bar) > 1) + 1]  # the letters come after it
    um_per_px = INFO.level0_mpp * INFO.level0_width / 1600
    assert len(bar) * um_per_px == pytest.approx(200, abs=2 * um_per_px)  # a fifth of 2.24 mm is 0.45 mm, so 0.2 mm
    assert bar[0] == pytest.approx(MARGIN_PX, abs=1)


@pytest.mark.parametrize(
    ("width_um", "length_um"), [(1000, 200), (1100, 200), (2500, 500), (30_000, 5000), (26, 5), (49_999, 5000)]
)
def test_scale_bars_have_round_lengths(width_um, length_um):
    assert scale_bar_um(width_um) == length_um


def test_a_slide_without_tiles_says_so(tmp_path, basis):
    path = write_sample(tmp_path / "E.h5", np.zeros((0, 32), np.float16), np.zeros((0, 2), np.int64))
    picture, _ = map_of(tmp_path, basis, path, WHITE)
    assert (picture[20:80, 400:-400] < 80).all(axis=2).sum() > 300  # the letters
    assert (picture[100:-5, 5:-5] > 250).all()


def test_a_slide_unlike_all_that_was_fitted_says_so(tmp_path, basis):
    features = structured(20, 8)
    assert basis.share_outside(features) == 0
    path = write_sample(tmp_path / "U.h5", np.concatenate([features[:8], features[8:] + 60 * basis.components[0]]))
    assert basis.share_outside(read_features(path).features) == 0.6
    picture, _ = map_of(tmp_path, basis, path, WHITE)
    assert (picture[20:80, 400:-400] < 80).all(axis=2).sum() > 300


@pytest.mark.parametrize("name", ["A $x_1$ & <b>", "Präparat 切片 №7", "x" * 300, "100%"])
@pytest.mark.parametrize("shape", [(1200, 90, 3), (90, 1200, 3)])
def test_awkward_names_and_shapes_fit_the_page(tmp_path, basis, name, shape):
    path = write_sample(tmp_path / "W.h5", structured(3, 2), level0_width=shape[1], level0_height=shape[0])
    _, page = map_of(tmp_path, basis, path, np.full(shape, 255, np.uint8), slide_name=name)
    assert (page[:, : MARGIN_PX - 4] == 255).all() and (page[:, 4 - MARGIN_PX :] == 255).all()
    assert (page[: HEADER_PX // 2] < 100).any()
    cropped = without_title(Image.fromarray(page))
    assert cropped.size == (page.shape[1] - 2 * MARGIN_PX, page.shape[0] - HEADER_PX)


def test_fluorescence_stays_dark_and_its_tiles_bright(tmp_path, basis):
    thumbnail = np.zeros((500, 1000, 3), np.uint8)
    thumbnail[::9, ::9] = (0, 0, 90)
    path = write_sample(tmp_path / "D.h5", structured(10, 2))
    picture, _ = map_of(tmp_path, basis, path, thumbnail)
    assert picture[300:].mean() < 40
    assert picture[10:60, 10:700].max(axis=2).mean() > 80


def test_a_missing_or_broken_thumbnail_is_refused_by_name(tmp_path):
    (tmp_path / "thumb.jpg").write_text("no picture")
    for name in ("thumb.jpg", "gone.jpg"):
        with pytest.raises(FeaturesError, match=rf"{name}: cannot be read as a picture"):
            read_thumbnail(tmp_path / name)


def test_script_fits_and_draws(tmp_path, slides):
    Image.fromarray(WHITE).save(tmp_path / "thumb.jpg")
    common = [sys.executable, str(SCRIPT)]
    folder, picture = tmp_path / "pca", tmp_path / "out" / "B.png"
    subprocess.run([*common, "fit", "--features", *slides, "--basis", folder], check=True)
    options = ["--features", slides[1], "--basis", folder, "--thumbnail", tmp_path / "thumb.jpg", "--slide-name", "B"]
    subprocess.run([*common, "map", *options, "--output", picture], check=True)
    with Image.open(picture) as image:
        assert image.size == (1600 + 2 * MARGIN_PX, 800 + HEADER_PX + FOOTER_PX)
    info = json.loads((folder / "basis.json").read_text())
    assert len(info["explained_variance_ratio"]) == 32 and info["seed"] == 0
    assert {"numpy", "scikit-learn", "python", "dinoscope"} <= info["versions"].keys()

    other = write_sample(tmp_path / "X.h5", structured(9, 5), model="base")
    options[1] = other
    refused = subprocess.run([*common, "map", *options, "--output", picture], capture_output=True, text=True)
    assert refused.returncode == 1 and refused.stderr.startswith("error: ") and "X.h5" in refused.stderr
