import colorsys
import itertools
from concurrent.futures import ThreadPoolExecutor

import cv2
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


def jitter(image, *changes):
    (changed,) = color.jitter([image], [changes])
    return changed


def difference(ours, theirs):
    return np.abs(ours.astype(int) - np.asarray(theirs).astype(int))


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.4])
@pytest.mark.parametrize(
    ("ours", "pillow"),
    [
        ("brightness", ImageEnhance.Brightness),
        ("contrast", ImageEnhance.Contrast),
        ("saturation", ImageEnhance.Color),
    ],
)
def test_factors_equal_pillow(image, ours, pillow, factor):
    assert difference(jitter(image, (ours, factor)), pillow(Image.fromarray(image)).enhance(factor)).max() <= 1


@pytest.mark.parametrize("change", [("brightness", 1.0), ("contrast", 1.0), ("saturation", 1.0), ("hue", 0.0)])
def test_neutral_amounts_change_nothing(image, change):
    assert np.array_equal(jitter(image, change), image)


def by_pillow(image, changes):
    """The same changes with Pillow and colorsys, each on the rounded result of the one before."""
    enhancers = {"brightness": ImageEnhance.Brightness, "contrast": ImageEnhance.Contrast}
    for name, amount in changes:
        if name == "hue":
            image = np.rint(turned(image, amount)).astype(np.uint8)
        else:
            enhance = enhancers.get(name, ImageEnhance.Color)
            image = np.asarray(enhance(Image.fromarray(image)).enhance(amount))
    return image


@pytest.mark.parametrize("brightness", [0.7, 1.3])  # the second cuts off many values
@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_changes_after_each_other_equal_pillow(image, order, brightness):
    amounts = [("brightness", brightness), ("contrast", 1.25), ("saturation", 1.15), ("hue", -0.07)]
    changes = [amounts[index] for index in order]
    made = jitter(image, *changes)
    exact = np.abs(made - in_floats(image, changes))
    assert exact.max() < 4.5  # a turned channel adds the roundings of all three
    assert exact.mean() < 0.55
    # Pillow cuts off what is behind the point at each of four steps, half a grey level on average
    assert difference(made, by_pillow(image, changes)).max() <= 6
    assert difference(made, by_pillow(image, changes)).mean() < 1.25


def in_floats(image, changes):
    """The same changes without rounding, cut off at 0 and 255 after each."""
    image = image.astype(float)
    for name, amount in changes:
        gray = image @ [0.299, 0.587, 0.114]
        blended = {"brightness": 0, "contrast": np.floor(gray.mean() + 0.5), "saturation": gray[..., None]}
        image = turned(image, amount) if name == "hue" else amount * image + (1 - amount) * blended[name]
        image = np.clip(image, 0, 255)
    return image


def test_changes_that_cut_nothing_off_are_one_pass(image, monkeypatch):
    passes = []
    transform = cv2.transform
    monkeypatch.setattr(cv2, "transform", lambda *args: passes.append(args) or transform(*args))
    dim = (image // 2 + 40).astype(np.uint8)
    jitter(dim, ("saturation", 1.1), ("brightness", 0.9), ("contrast", 1.1))
    assert len(passes) == 1
    jitter(image, ("brightness", 1.3), ("contrast", 0.9))
    assert len(passes) == 3


def test_images_are_changed_each_for_itself(image):
    images = [image, np.flipud(image).copy(), (image // 2).copy()]
    changes = [[("hue", 0.1), ("contrast", 0.8)], [("saturation", 1.2)], [("brightness", 1.1), ("hue", -0.4)]]
    together = color.jitter(images, changes)
    for made, single, wanted in zip(together, images, changes, strict=True):
        assert np.array_equal(made, jitter(single, *wanted))


def turned(image, shift):
    def turn(rgb):
        hue, saturation, value = colorsys.rgb_to_hsv(*rgb)
        return colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value)

    return np.array([turn(rgb) for rgb in image.reshape(-1, 3) / 255]).reshape(image.shape) * 255


@pytest.mark.parametrize("shift", [-0.5, -0.34, -0.17, -0.1, 0.0, 0.05, 0.1, 0.16, 0.2, 0.34, 0.5])
def test_hue_equals_colorsys(image, shift):
    expected = turned(image, shift)
    error = np.abs(jitter(image, ("hue", shift)) - expected)
    assert error.max() < 0.51
    # Pillow's 8-bit hue is coarser: a step of 1/256 circle is up to 6 grey levels of a fully saturated colour
    assert error.mean() < np.abs(pillow_hue(image, shift) - expected).mean() + 0.1


def test_hues_of_many_images_are_turned_in_several_goes(monkeypatch, image):
    expected = color.turn_hues([image] * 5, [0.1, -0.1, 0.3, -0.5, 0.0])
    monkeypatch.setattr(color, "_PIXELS_AT_ONCE", 2 * image[..., 0].size)
    made = color.turn_hues([image] * 5, [0.1, -0.1, 0.3, -0.5, 0.0])
    assert len(made) == 5
    assert all(np.array_equal(one, other) for one, other in zip(made, expected, strict=True))
    assert color.turn_hues([], []) == []


def test_hues_in_threads(image):
    """Each thread has memory of its own."""
    shifts = np.linspace(-0.5, 0.5, 60)
    expected = [color.turn_hues([image], [shift])[0] for shift in shifts]
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda shift: color.turn_hues([image], [shift])[0], shifts))
    assert all(np.array_equal(one, other) for one, other in zip(made, expected, strict=True))


def pillow_hue(image, shift):
    """torchvision's adjust_hue on Pillow images."""
    hue, saturation, value = Image.fromarray(image).convert("HSV").split()
    turned = (np.array(hue).astype(int) + int(shift * 255)) % 256
    channels = (Image.fromarray(turned.astype(np.uint8)), saturation, value)
    return np.asarray(Image.merge("HSV", channels).convert("RGB")).astype(float)


def test_grayscale_equals_pillow(image):
    assert difference(color.luma(image), Image.fromarray(image).convert("L")).max() <= 1


@pytest.mark.parametrize("threshold", [0, 128, 255])
def test_solarize_equals_pillow(image, threshold):
    assert np.array_equal(color.solarize(image, threshold), ImageOps.solarize(Image.fromarray(image), threshold))


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.45, 0.7, 0.9, 2.0])
def test_blur_equals_direct_sum(sigma):
    image = np.random.default_rng(1).integers(0, 256, (14, 17, 3), np.uint8)
    offsets = np.arange(-4, 5)
    kernel = np.exp(-(offsets**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    padded = np.pad(image.astype(float), ((4, 4), (4, 4), (0, 0)), "reflect")
    expected = sum(kernel[dy] * kernel[dx] * padded[dy : dy + 14, dx : dx + 17] for dy in range(9) for dx in range(9))
    assert np.abs(color.gaussian_blur(image, sigma, 9) - expected).max() < 0.51
    gray = np.ascontiguousarray(image[..., 0])
    assert np.abs(color.gaussian_blur(gray, sigma, 9) - expected[..., 0]).max() < 0.51


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
        *(lambda x, change=change: jitter(x, change) for change in zip(color.JITTERS, [0.5] * 4, strict=True)),
        lambda x: color.luma(x)[..., None],
        lambda x: color.gaussian_blur(x, 1.0, 9),
        lambda x: color.solarize(x, 128),
        lambda x: color.shift_stains(x, np.full(3, 1.1), np.full(3, 0.1)),
    ):
        assert not np.array_equal(change(image), before)
        assert np.array_equal(image, before)
