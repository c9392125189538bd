"""Corrupted images: against another library's numbers, formulas written out, and what every kind promises."""

import colorsys
import io
import math

import cv2
import numpy as np
import pytest
from PIL import Image

from corruption_numbers import NUMBERS, picture
from dinoscope.data import color
from dinoscope.errors import ConfigError
from dinoscope.segment import corruption_blurs, corruption_weather, pathology_corruptions
from dinoscope.segment.corruptions import (
    ALL_CORRUPTIONS,
    CORRUPTIONS,
    EXTRA_CORRUPTIONS,
    PATHOLOGY_CORRUPTIONS,
    SEVERITIES,
    corrupt,
    groups_of_kinds,
)


def distance(image, clean):
    """Mean absolute difference in grey levels, and PSNR in dB."""
    difference = np.abs(image.astype(int) - clean)
    return difference.mean(), 10 * math.log10(255**2 / max((difference**2).mean(), 1e-9))


def mean_distance(kind, severity, clean, draws):
    return np.mean([distance(corrupt(clean, kind, severity, 0, index), clean) for index in range(draws)], axis=0)


# ---- all kinds


def test_there_are_the_kinds_of_the_paper():
    common = (
        "gaussian_noise shot_noise impulse_noise defocus_blur glass_blur motion_blur zoom_blur snow frost fog "
        "brightness contrast elastic_transform pixelate jpeg_compression"
    )
    assert common.split() == list(CORRUPTIONS)
    assert EXTRA_CORRUPTIONS == ("speckle_noise", "gaussian_blur", "spatter", "saturate")
    assert PATHOLOGY_CORRUPTIONS == ("stain_shift", "slide_jpeg", "slide_blur", "slide_focus", "mpp_change")
    assert [kind for kinds in groups_of_kinds().values() for kind in kinds] == list(ALL_CORRUPTIONS)
    assert groups_of_kinds()["weather"] == ("snow", "frost", "fog", "brightness")


DRAWN = {kind for kind in ALL_CORRUPTIONS if kind.endswith("noise")} | {
    *("glass_blur", "motion_blur", "snow", "frost", "fog", "elastic_transform", "spatter", "stain_shift")
}


@pytest.mark.parametrize("kind", ALL_CORRUPTIONS)
def test_the_same_arguments_give_the_same_bytes_and_others_others(kind):
    clean = picture()
    before = clean.copy()
    first = corrupt(clean, kind, 3, seed=1, index=2)
    assert np.array_equal(first, corrupt(clean, kind, 3, seed=1, index=2))
    assert np.array_equal(clean, before)
    assert first.dtype == np.uint8 and first.shape == clean.shape and not np.array_equal(first, clean)
    others = [corrupt(clean, kind, 3, 1, 3), corrupt(clean, kind, 3, 2, 2)]
    assert all(np.array_equal(first, other) != (kind in DRAWN) for other in others)
    assert not np.array_equal(first, corrupt(clean, kind, 4, 1, 2))


@pytest.mark.parametrize("kind", ALL_CORRUPTIONS)
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (7, 5), (33, 50), (300, 20)])
def test_images_of_any_size(kind, size):
    clean = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    for severity in (1, 5):
        assert corrupt(clean, kind, severity, 0, 0).shape == clean.shape


@pytest.mark.parametrize("kind", ALL_CORRUPTIONS)
@pytest.mark.parametrize("grey", [0, 255])
def test_black_and_white_images(kind, grey):
    for severity in SEVERITIES:
        assert corrupt(np.full((40, 40, 3), grey, np.uint8), kind, severity, 0, 0).shape == (40, 40, 3)


def test_unknown_kinds_and_severities():
    with pytest.raises(ConfigError, match="did you mean motion_blur"):
        corrupt(picture(), "motion blur", 1, 0, 0)
    for severity in (0, 6, 2.5, "3"):
        with pytest.raises(ConfigError, match="must be 1, 2, 3, 4 or 5"):
            corrupt(picture(), "fog", severity, 0, 0)


# ---- another library's numbers


@pytest.mark.parametrize("kind", NUMBERS)
def test_as_far_from_the_clean_image_as_another_librarys(kind):
    """Within 2 % in grey levels; more where few, large structures are drawn, and where it zooms off its centre."""
    tolerance = {"fog": 0.2, "motion_blur": 0.05, "spatter": 0.12, "elastic_transform": 0.05, "zoom_blur": 0.07}.get(
        kind, 0.02
    )
    clean = picture()
    for severity, (difference, psnr) in zip(SEVERITIES, NUMBERS[kind], strict=True):
        ours = mean_distance(kind, severity, clean, 24 if kind in DRAWN else 1)
        assert ours[0] == pytest.approx(difference, rel=tolerance, abs=0.15), (severity, ours, difference)
        assert ours[1] == pytest.approx(psnr, abs=10 * tolerance), (severity, ours, psnr)


# ---- formulas


def test_noise_has_the_spread_that_its_numbers_say():
    grey = np.full((200, 200, 3), 102, np.uint8)  # 0.4
    noisy = corrupt(grey, "gaussian_noise", 1, 0, 0) / 255
    assert noisy.mean() == pytest.approx(0.4, abs=1e-3) and noisy.std() == pytest.approx(0.08, rel=0.02)
    noisy = corrupt(grey, "shot_noise", 1, 0, 0) / 255
    assert noisy.mean() == pytest.approx(0.4, abs=1e-3) and noisy.var() == pytest.approx(0.4 / 60, rel=0.03)
    noisy = corrupt(grey, "speckle_noise", 1, 0, 0) / 255
    assert noisy.std() == pytest.approx(0.15 * 0.4, rel=0.02)
    noisy = corrupt(grey, "impulse_noise", 5, 0, 0)
    assert (noisy == 0).mean() == pytest.approx(0.135, rel=0.05)
    assert (noisy == 255).mean() == pytest.approx(0.135, rel=0.05)
    assert set(np.unique(noisy)) == {0, 102, 255}


@pytest.mark.parametrize(("kind", "severity"), [("brightness", 2), ("saturate", 2), ("saturate", 3), ("saturate", 5)])
def test_colours_change_in_hue_saturation_and_value(kind, severity):
    clean = np.random.default_rng(0).integers(0, 256, (12, 12, 3)).astype(np.uint8)
    clean[0], clean[1] = clean[0, :, :1], 0  # greys and black
    expected = np.empty(clean.shape)
    gain, more = ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))[severity - 1]
    for place in np.ndindex(12, 12):
        hue, saturation, value = colorsys.rgb_to_hsv(*(clean[place] / 255))
        if kind == "brightness":
            value = min(value + 0.2, 1)
        else:
            saturation = min(max(saturation * gain + more, 0), 1)
        expected[place] = colorsys.hsv_to_rgb(hue, saturation, value)
    assert np.abs(corrupt(clean, kind, severity, 0, 0) - 255 * expected).max() <= 0.51


def test_contrast_keeps_the_mean_of_each_channel():
    clean = picture()
    faint = corrupt(clean, "contrast", 3, 0, 0)
    np.testing.assert_allclose(faint.mean(axis=(0, 1)), clean.mean(axis=(0, 1)), atol=0.2)
    np.testing.assert_allclose(faint.std(axis=(0, 1)), 0.2 * clean.std(axis=(0, 1)), rtol=0.02)


def test_a_point_moves_along_a_line():
    """The kernel of motion blur: as many pixels as it has steps, in one direction, weights that sum to one."""
    point = np.zeros((99, 99), np.float32)
    point[49, 49] = 1
    for degrees in (0, 30, 90, -45):
        line = corruption_blurs.moved(point, 10, 3, degrees)
        assert line.sum() == pytest.approx(1, abs=1e-5)
        rows, columns = np.nonzero(line > 1e-7)
        weights = line[rows, columns]
        far = np.argmax(np.hypot(rows - 49, columns - 49))
        found = math.degrees(math.atan2(49 - rows[far], 49 - columns[far]))
        assert abs(found - degrees) < 4
        # half a Gaussian of sigma 3 has its mean at 3 · sqrt(2 / pi)
        assert (weights * np.hypot(rows - 49, columns - 49)).sum() == pytest.approx(
            3 * math.sqrt(2 / math.pi), abs=0.45
        )


def test_zooming_keeps_the_centre():
    clean = picture()
    symmetric = np.maximum(clean, clean[::-1, ::-1])
    for severity in SEVERITIES:
        zoomed = corrupt(symmetric, "zoom_blur", severity, 0, 0).astype(int)
        assert np.abs(zoomed - zoomed[::-1, ::-1]).max() <= 1


def test_pixels_behind_glass_come_from_near_ones():
    rows, columns = np.meshgrid(np.arange(60.0), np.arange(80.0), indexing="ij")
    ramp = np.stack([rows, columns, 0 * rows], axis=-1).astype(np.float32) / 255
    moved = corruption_blurs.glass(ramp, (1e-3, 2, 1), np.random.default_rng(0)) * 255
    shift = np.abs(moved - ramp * 255)[..., :2]
    assert shift.max() >= 2 and np.percentile(shift, 99) <= 8  # values are passed on by those after them
    assert (shift[3:-3, 3:-3].max(axis=-1) > 0.5).mean() > 0.5


@pytest.mark.parametrize("reach", [1, 2, 4])
def test_values_are_passed_on_as_one_pixel_after_the_other(reach):
    """The published benchmark's loop over rows and columns, with the same draws."""
    height, width, rounds = 23, 31, 3
    values = np.random.default_rng(1).random((height, width, 3)).astype(np.float32)
    values = np.floor(values * 255) / np.float32(255)
    moved = corruption_blurs.glass(values, (1e-3, reach, rounds), np.random.default_rng(2))
    rng, expected = np.random.default_rng(2), np.round(values * 255)
    for _ in range(rounds):
        down, right = rng.integers(-reach, reach, (2, (height - 2 * reach) * (width - 2 * reach)))
        steps = iter(zip(down, right, strict=True))
        for row in range(height - reach, reach, -1):
            for column in range(width - reach, reach, -1):
                dy, dx = next(steps)
                expected[row, column] = expected[row + dy, column + dx]
    assert np.abs(moved * 255 - expected).max() <= 1


def test_elastic_shifts_grow_and_have_no_direction():
    rows, columns = np.meshgrid(np.arange(120.0), np.arange(120.0), indexing="ij")
    ramp = np.stack([rows, columns, rows], axis=-1).round().astype(np.uint8)
    spreads = []
    for severity in SEVERITIES:
        shifts = corrupt(ramp, "elastic_transform", severity, 0, 0)[20:-20, 20:-20].astype(float)
        shifts = shifts - ramp[20:-20, 20:-20]
        assert np.abs(shifts.mean(axis=(0, 1))).max() < 0.6
        spreads.append(shifts.std())
    assert np.all(np.diff(spreads) > 0) and spreads[-1] < 5
    assert spreads[4] / spreads[0] == pytest.approx(30 / 12.5, rel=0.15)


# ---- weather


def test_plasma_is_rougher_the_less_it_decays():
    """Each structure of half the size is `decay` times weaker: spread of what a step of one pixel changes."""
    roughness = []
    for decay in (4, 2, 1.5):
        clouds = [corruption_weather.plasma(100, decay, np.random.default_rng(seed)) for seed in range(10)]
        assert all(cloud.shape == (128, 128) and cloud.min() == 0 and cloud.max() == 1 for cloud in clouds)
        roughness.append(np.mean([np.diff(cloud, axis=1).std() / cloud.std() for cloud in clouds]))
    assert roughness[0] < 0.6 * roughness[1] < 0.6 * roughness[2]


def test_ice_has_the_colours_and_spreads_it_was_given():
    seen = set()
    for seed in range(30):
        drawn = corruption_weather.ice(150, 200, np.random.default_rng(seed)) * 255
        mean, spread = drawn.mean(axis=(0, 1)), drawn.mean(axis=2).std()
        colour, of_photograph = min(corruption_weather._ICES, key=lambda each: np.abs(np.array(each[0]) - mean).sum())
        np.testing.assert_allclose(mean, colour, atol=2)
        assert spread == pytest.approx(of_photograph, rel=0.08)
        seen.add(colour)
    assert len(seen) == 4


def test_frost_adds_its_ice():
    clean = picture()
    ice = corruption_weather.ice(96, 128, np.random.default_rng(0))
    mixed = corruption_weather.frost(clean / np.float32(255), (0.7, 0.25), np.random.default_rng(0))
    np.testing.assert_allclose(mixed, 0.7 * clean / 255 + 0.25 * ice, atol=1e-6)


# ---- pathology


@pytest.fixture(scope="module")
def tissue():
    """Painted H&E: blue nuclei on pink on white."""
    image = np.full((128, 160, 3), 240, np.uint8)
    cv2.circle(image, (80, 64), 55, (226, 160, 196), -1, cv2.LINE_AA)
    rng = np.random.default_rng(0)
    for _ in range(40):
        centre = (int(rng.integers(40, 120)), int(rng.integers(24, 104)))
        cv2.circle(image, centre, int(rng.integers(2, 6)), (92, 64, 140), -1, cv2.LINE_AA)
    return image


@pytest.mark.parametrize("kind", PATHOLOGY_CORRUPTIONS)
def test_severities_are_in_their_order(kind, tissue):
    distances = np.array([mean_distance(kind, severity, tissue, 24) for severity in SEVERITIES])
    assert np.all(np.diff(distances[:, 0]) > 0) and np.all(np.diff(distances[:, 1]) < 0)
    assert distances[0, 0] < 8 and distances[0, 1] > 27  # the first is what other laboratories bring


# rows as scikit-image 0.26 has them (skimage.color.rgb_from_hed)
RGB_FROM_HED = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])


def amounts(image):
    """Optical densities of haematoxylin, eosin and DAB: -log10(I / 255) = amounts @ RGB_FROM_HED, in float64."""
    return np.linalg.solve(RGB_FROM_HED.T, -np.log10(np.maximum(image, 1).reshape(-1, 3) / 255).T).T


def test_stains_are_shifted_by_what_the_severity_says():
    """On all mixtures of three stains, so that no colour is cut off at 0 or 255."""
    mixtures = np.random.default_rng(0).uniform(0.1, 0.45, (128, 128, 3))
    clean = np.rint(255 * 10 ** -(mixtures @ RGB_FROM_HED)).astype(np.uint8)
    seen = set()
    for severity in SEVERITIES:
        gain_limit, shift_limit = 0.1 * severity, 0.01 * severity
        for index in range(12):
            before, now = amounts(clean), amounts(corrupt(clean, "stain_shift", severity, 0, index))
            for stain in range(3):
                gain, shift = np.polyfit(before[:, stain], now[:, stain], 1)
                assert 0.5 * gain_limit - 0.01 < abs(gain - 1) < gain_limit + 0.01
                assert 0.5 * shift_limit - 0.003 < abs(shift) < shift_limit + 0.003
                seen |= {(stain, "gain", gain > 1), (stain, "shift", shift > 0)}
    assert len(seen) == 12


def test_compression_is_pillows(tissue):
    stored = io.BytesIO()
    Image.fromarray(tissue).save(stored, "JPEG", quality=25, subsampling=2)
    assert np.array_equal(corrupt(tissue, "slide_jpeg", 3, 0, 0), np.asarray(Image.open(stored)))


@pytest.mark.parametrize("radius", [1, 2, 3, 4.5, 6])
def test_disks_have_their_area(radius):
    kernel = pathology_corruptions.disk(radius)
    assert kernel.sum() == pytest.approx(1, abs=1e-6)
    assert 1 / kernel.max() == pytest.approx(math.pi * radius**2, rel=0.04)
    offsets = np.arange(len(kernel)) - len(kernel) // 2
    # the mean squared distance from the middle of a disk is radius² / 2, here of pixels, which have a spread of 1 / 6
    spread = (kernel * (offsets[:, None] ** 2 + offsets**2)).sum() - 1 / 6
    assert spread == pytest.approx(radius**2 / 2, abs=0.2)


def test_blurs_are_opencvs_and_scipys(tissue):
    from scipy import ndimage

    expected = ndimage.gaussian_filter(tissue.astype(float), (2.5, 2.5, 0), mode="nearest")
    assert np.abs(corrupt(tissue, "slide_blur", 4, 0, 0) - expected).max() <= 0.6
    kernel = pathology_corruptions.disk(3)[..., None]
    expected = ndimage.convolve(tissue.astype(float), kernel, mode="mirror")
    assert np.abs(corrupt(tissue, "slide_focus", 3, 0, 0) - expected).max() <= 0.6


def test_another_resolution_loses_fine_structures_and_keeps_coarse_ones():
    rng = np.random.default_rng(0)
    fine = np.repeat(rng.choice([60, 200], (128, 128, 1)), 3, axis=2).astype(np.uint8)
    coarse = cv2.resize(rng.uniform(60, 200, (4, 4, 3)).astype(np.uint8), (128, 128), interpolation=cv2.INTER_CUBIC)
    for severity, factor in zip(SEVERITIES, (1.5, 2, 3, 4, 6), strict=True):
        # noise of single pixels is averaged over factor² of them, and a little more by the enlargement
        spread = corrupt(fine, "mpp_change", severity, 0, 0).std() / fine.std()
        assert 0.6 / factor < spread < 1.1 / factor
        assert distance(corrupt(coarse, "mpp_change", severity, 0, 0), coarse)[0] < 1.5


def test_stain_shift_uses_the_matrix_of_the_augmentation():
    np.testing.assert_array_equal(color.RGB_FROM_HED, RGB_FROM_HED)
