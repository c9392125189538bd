"""Views of images and masks: in register whatever is drawn, and as often as they should be."""

import dataclasses

import numpy as np
import pytest
from scipy import ndimage, stats

from dinoscope.errors import ConfigError
from dinoscope.segment.transforms import (
    VIEWS,
    ViewSettings,
    check_img_dim,
    training_view,
    view_rng,
)

PLAIN = ViewSettings(scale=(1.0, 1.0), scale_of="pixels", horizontal_flips=False, color_jitter_p=0.0)
MOVING = dataclasses.replace(VIEWS["pathology"], scale=(0.5, 2.0), hed_p=0.0, color_jitter_p=0.0)


def blobs(height, width, seed=0):
    """An image whose red is 40 or 220 after its mask (classes 0 and 1), with large smooth shapes."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(height, width)), 12)
    mask = (noise > 0).astype(np.uint8)
    image = np.stack([np.where(mask, 220, 40), np.full_like(mask, 90), np.full_like(mask, 90)], axis=-1)
    return image.astype(np.uint8), mask


@pytest.mark.parametrize("scale_of", ["pixels", "image"])
@pytest.mark.parametrize("image_hw", [(120, 150), (257, 131), (40, 300)])
def test_image_and_mask_stay_in_register(image_hw, scale_of):
    settings = dataclasses.replace(MOVING, scale_of=scale_of)
    image, mask = blobs(*image_hw)
    agreeing = counted = 0
    for index in range(40):
        view, classes = training_view(image, mask, (96, 64), view_rng(0, index, 1), settings)
        assert view.shape == (96, 64, 3) and classes.shape == (96, 64)
        assert view.dtype == classes.dtype == np.uint8
        inside = classes != 255
        # resampling blurs borders by a pixel or two; a shift by one pixel would show on every border at once
        agreeing += ((view[..., 0] > 130) == (classes == 1))[inside].sum()
        counted += inside.sum()
    assert counted > 0.3 * 40 * 96 * 64
    assert agreeing / counted > 0.995


def test_a_shift_by_one_pixel_would_be_seen():
    """The test above can fail."""
    image, mask = blobs(200, 200)
    wrong = np.mean((image[1:, :, 0] > 130) == (mask[:-1] == 1))
    assert wrong < 0.985


@pytest.mark.parametrize("flips", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("turns", [False, True])
def test_unscaled_views_are_the_same_pixels(flips, turns):
    """Coordinates as colours: each pixel of a view says where it comes from, and so does its class."""
    rows, columns = np.meshgrid(np.arange(90), np.arange(70), indexing="ij")
    image = np.stack([rows, columns, rows * 0], axis=-1).astype(np.uint8)
    mask = ((rows * 7 + columns * 3) % 250).astype(np.uint8)
    settings = dataclasses.replace(PLAIN, horizontal_flips=flips[0], vertical_flips=flips[1], rotations_90=turns)
    seen = set()
    for index in range(60):
        view, classes = training_view(image, mask, (40, 60), view_rng(1, index, 0), settings)
        inside = classes != 255  # turned, the view is higher than the image is wide
        assert np.array_equal(classes[inside], mask[view[..., 0], view[..., 1]][inside])
        assert (view[~inside] == settings.fill).all()
        row, column = np.argwhere(inside[:-1, :-1] & inside[1:, :-1] & inside[:-1, 1:])[0]
        down = view[row + 1, column, :2].astype(int) - view[row, column, :2]
        right = view[row, column + 1, :2].astype(int) - view[row, column, :2]
        seen.add((*down, *right))
    assert len(seen) == (8 if turns and any(flips) else 4 if turns or all(flips) else 2 if any(flips) else 1)


def test_what_is_beyond_the_image_is_filled_and_ignored():
    image, mask = blobs(30, 50)
    places = set()
    for index in range(50):
        view, classes = training_view(image, mask, (64, 64), view_rng(2, index, 0), PLAIN)
        assert (classes != 255).sum() == 30 * 50
        top, left = np.argwhere(classes != 255)[0]
        places.add((top, left))
        assert np.array_equal(view[top : top + 30, left : left + 50], image)
        assert (view[classes == 255] == PLAIN.fill).all()
    assert min(top for top, _ in places) <= 2 and max(top for top, _ in places) >= 32
    assert min(left for _, left in places) == 0 and max(left for _, left in places) == 14


@pytest.mark.parametrize(("scale_of", "at_scale_1"), [("pixels", 100), ("image", 240)])
def test_scales_are_log_uniform(scale_of, at_scale_1):
    """How many pixels of the image a view is wide, read off a ramp."""
    ramp = np.broadcast_to(np.arange(240)[None, :, None], (480, 240, 3)).astype(np.uint8)
    settings = dataclasses.replace(PLAIN, scale=(0.5, 2.0), scale_of=scale_of)
    widths = []
    for index in range(300):
        view, classes = training_view(ramp, np.zeros((480, 240), np.uint8), (200, 100), view_rng(3, index, 0), settings)
        middle = int(np.flatnonzero((classes != 255).any(axis=1)).mean())
        row = view[middle, classes[middle] != 255, 0].astype(float)
        widths.append((row[-8] - row[7]) / (len(row) - 15) * 100)
    logs = np.log2(np.array(widths) / at_scale_1)
    assert stats.kstest(logs, stats.uniform(-1, 2).cdf).statistic < 0.1
    assert 0.9 < np.abs(logs).max() < 1.06


def test_views_depend_on_seed_index_and_epoch_alone():
    image, mask = blobs(100, 100)
    settings = dataclasses.replace(VIEWS["pathology"], scale=(0.5, 2.0))

    def view(*numbers):
        return training_view(image, mask, (64, 64), view_rng(*numbers), settings)[0].tobytes()

    assert view(0, 1, 2) == view(0, 1, 2)
    assert len({view(0, 1, 2), view(1, 1, 2), view(0, 2, 2), view(0, 1, 3), view(0, 2, 1)}) == 5


def test_colours_change_in_the_image_alone_and_move_nothing():
    image, mask = blobs(80, 80)
    still = dataclasses.replace(MOVING, rotations_90=True)
    coloured = dataclasses.replace(still, hed_p=1.0, color_jitter_p=1.0, brightness=0.2, hue=0.05)
    before = image.copy(), mask.copy()
    for index in range(10):
        plain, classes = training_view(image, mask, (64, 64), view_rng(4, index, 0), still)
        changed, same_classes = training_view(image, mask, (64, 64), view_rng(4, index, 0), coloured)
        assert np.array_equal(classes, same_classes)
        assert 1 < np.abs(plain.astype(int) - changed).mean() < 60
    assert np.array_equal(image, before[0]) and np.array_equal(mask, before[1])


def test_jitter_of_nothing_changes_nothing_and_its_order_is_any():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    mask = np.zeros((32, 32), np.uint8)
    none = dataclasses.replace(PLAIN, color_jitter_p=1.0, brightness=0, contrast=0, saturation=0, hue=0)
    assert np.array_equal(training_view(image, mask, (32, 32), view_rng(0, 0, 0), none)[0], image)
    one = dataclasses.replace(none, brightness=0.5)
    means = [
        training_view(image, mask, (32, 32), view_rng(0, index, 0), one)[0].mean() / image.mean()
        for index in range(200)
    ]
    assert min(means) < 0.55 and max(means) > 1.3 and 0.9 < np.mean(means) < 1.05


@pytest.mark.parametrize(
    ("height", "width", "patch", "expected"),
    [
        (300, 320, 16, ["height 300: take 288 or 304"]),
        (308, 310, 14, ["width 310: take 308 or 322"]),
        (8, 33, 16, ["height 8: take 16", "width 33: take 32 or 48"]),
    ],
)
def test_sizes_that_are_no_multiples_name_the_nearest(height, width, patch, expected):
    with pytest.raises(ConfigError) as error:
        check_img_dim(height, width, patch)
    assert all(part in str(error.value) for part in expected)
    assert ("width" in str(error.value).replace("(height width)", "")) == any("width" in part for part in expected)


def test_sizes_of_whole_patches_pass():
    check_img_dim(308, 322, 14)
    check_img_dim(16, 512, 16)
