import colorsys

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from dinoscope.data import color

HED = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])


@pytest.fixture(scope="module")
def image():
    """All combinations of 13 values a channel, in random order."""
    levels = np.linspace(0, 255, 13).round()
    colours = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 3).astype(np.uint8)
    return np.random.default_rng(0).permutation(colours)[: 13 * 169].reshape(13, 169, 3)


def difference(ours, theirs):
    return np.abs(ours.astype(int) - np.asarray(theirs).astype(int))


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.4])
@pytest.mark.parametrize(
    ("ours", "pillow"),
    [
        (color.adjust_brightness, ImageEnhance.Brightness),
        (color.adjust_contrast, ImageEnhance.Contrast),
        (color.adjust_saturation, ImageEnhance.Color),
    ],
)
def test_factors_equal_pillow(image, ours, pillow, factor):
    assert difference(ours(image, factor), pillow(Image.fromarray(image)).enhance(factor)).max() <= 1


@pytest.mark.parametrize("ours", [color.adjust_brightness, color.adjust_contrast, color.adjust_saturation])
def test_factor_one_changes_nothing(image, ours):
    assert np.array_equal(ours(image, 1.0), image)


@pytest.mark.parametrize("shift", [-0.5, -0.1, 0.0, 0.05, 0.1, 0.34])
def test_hue_equals_colorsys(image, shift):
    def turn(rgb):
        hue, saturation, value = colorsys.rgb_to_hsv(*rgb)
        return colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value)

    expected = np.array([turn(rgb) for rgb in image.reshape(-1, 3) / 255]).reshape(image.shape) * 255
    error = np.abs(color.adjust_hue(image, shift) - expected)
    # 8-bit hue: a step of 1/256 circle is up to 6 grey levels of a fully saturated colour, in Pillow as here
    assert error.mean() < 1.5
    assert error.max() < 12
    assert error.mean() < np.abs(pillow_hue(image, shift) - expected).mean() + 0.1


def pillow_hue(image, shift):
    """torchvision's adjust_hue on Pillow images."""
    hue, saturation, value = Image.fromarray(image).convert("HSV").split()
    turned = (np.array(hue).astype(int) + int(shift * 255)) % 256
    channels = (Image.fromarray(turned.astype(np.uint8)), saturation, value)
    return np.asarray(Image.merge("HSV", channels).convert("RGB")).astype(float)


def test_grayscale_equals_pillow(image):
    gray = color.grayscale(image)
    assert gray.shape == image.shape
    assert difference(gray[..., 0], Image.fromarray(image).convert("L")).max() <= 1
    assert (gray == gray[..., :1]).all()


@pytest.mark.parametrize("threshold", [0, 128, 255])
def test_solarize_equals_pillow(image, threshold):
    assert np.array_equal(color.solarize(image, threshold), ImageOps.solarize(Image.fromarray(image), threshold))


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_equals_direct_sum(sigma):
    image = np.random.default_rng(1).integers(0, 256, (14, 17, 3), np.uint8)
    offsets = np.arange(-4, 5)
    kernel = np.exp(-(offsets**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    padded = np.pad(image.astype(float), ((4, 4), (4, 4), (0, 0)), "reflect")
    expected = sum(kernel[dy] * kernel[dx] * padded[dy : dy + 14, dx : dx + 17] for dy in range(9) for dx in range(9))
    assert np.abs(color.gaussian_blur(image, sigma, 9) - expected).max() < 0.51


def naive_shift_stains(image, gains, shifts):
    """Unmix, change, mix again, in float64."""
    density = -np.log10(np.maximum(image, 0.5) / 255)
    stains = np.linalg.solve(HED.T, density.reshape(-1, 3).T).T
    mixed = (stains * gains + shifts) @ HED
    return np.clip(255 * 10**-mixed, 0, 255).reshape(image.shape)


@pytest.mark.parametrize("seed", range(5))
def test_stains_equal_naive_formula(image, seed):
    rng = np.random.default_rng(seed)
    gains, shifts = rng.uniform(0.8, 1.2, 3), rng.uniform(-0.2, 0.2, 3)
    assert np.abs(color.shift_stains(image, gains, shifts) - naive_shift_stains(image, gains, shifts)).max() < 0.51


def test_unchanged_stains_change_nothing(image):
    assert np.array_equal(color.shift_stains(image, np.ones(3), np.zeros(3)), image)


@pytest.mark.parametrize("stain", [0, 1, 2])
def test_gain_acts_on_its_own_stain_only(stain):
    amounts = np.zeros((1, 40, 3))
    amounts[0, :, stain] = np.linspace(0, 0.9, 40)
    image = np.rint(255 * 10 ** -(amounts @ HED)).astype(np.uint8)
    doubled = 255 * 10 ** -(2 * amounts @ HED)
    gains = np.array([3.0, 3.0, 3.0])
    gains[stain] = 2
    ours = color.shift_stains(image, gains, np.zeros(3))
    # rounding of the input alone is up to 0.5 grey levels times the gain
    assert np.abs(ours - doubled).max() < 2.5


def test_inputs_are_left_alone(image):
    before = image.copy()
    for change in (
        lambda x: color.adjust_brightness(x, 0.5),
        lambda x: color.adjust_contrast(x, 0.5),
        lambda x: color.adjust_saturation(x, 0.5),
        lambda x: color.adjust_hue(x, 0.1),
        color.grayscale,
        lambda x: color.gaussian_blur(x, 1.0, 9),
        lambda x: color.solarize(x, 128),
        lambda x: color.shift_stains(x, np.full(3, 1.1), np.full(3, 0.1)),
    ):
        assert not np.array_equal(change(image), before)
        assert np.array_equal(image, before)
