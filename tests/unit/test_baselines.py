"""Baselines without training, and the changes that tiles are shifted by."""

import colorsys
import io

import numpy as np
import pytest
import torch
from PIL import Image

from dinoscope.evaluate.baselines import color_histogram, random_initialisation, thumbnail
from dinoscope.evaluate.shifts import JPEG_QUALITY, MPP_FACTOR, SHIFTS, shifted
from tiny_backbone import tiny_backbone


@pytest.fixture
def image() -> np.ndarray:
    """Purple shapes on pink, with some noise."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:64, :64]
    dark = ((rows - 20) ** 2 + (columns - 30) ** 2 < 150)[..., None]
    picture = np.where(dark, [110, 60, 150], [225, 170, 205]) + rng.normal(size=(64, 64, 3)) * 8
    return picture.clip(0, 255).astype(np.uint8)


def test_histogram_has_the_hues_that_python_has(image: np.ndarray) -> None:
    found = color_histogram(image)
    assert found.shape == (48,) and found.dtype == np.float32
    np.testing.assert_allclose(found.reshape(3, 16).sum(1), 1, rtol=1e-6)
    hsv = np.array([colorsys.rgb_to_hsv(*(pixel / 255)) for pixel in image.reshape(-1, 3)])
    tops = (1, 256 / 255, 256 / 255)
    expected = [np.histogram(hsv[:, channel], 16, (0, tops[channel]))[0] / len(hsv) for channel in range(3)]
    # cv2 rounds hues to 2°, so that pixels at the edge of a bin may fall to either side
    assert np.abs(found - np.concatenate(expected)).sum() < 0.15
    assert np.abs(color_histogram(image[::-1]) - found).sum() == 0


def test_thumbnail_is_the_mean_of_blocks(image: np.ndarray) -> None:
    expected = image.reshape(8, 8, 8, 8, 3).mean((1, 3)) / 255
    np.testing.assert_allclose(thumbnail(image).reshape(8, 8, 3), expected, atol=0.5 / 255 + 1e-6)


def test_random_initialisation_is_drawn_anew_and_is_the_same_kind() -> None:
    trained = tiny_backbone()
    one, again, other = (random_initialisation(trained, seed) for seed in (1, 1, 2))
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    features = [model.forward_features(images)["cls"] for model in (trained, one, again, other)]
    assert torch.equal(features[1], features[2])
    assert not torch.allclose(features[0], features[1]) and not torch.allclose(features[1], features[3])
    assert one.settings == trained.settings and one.mean == trained.mean and not one.training


@pytest.mark.parametrize("kind", sorted(SHIFTS))
def test_each_shift_changes_the_tile_and_repeats(image: np.ndarray, kind: str) -> None:
    before = image.copy()
    found = shifted(image, kind, index=3)
    assert found.shape == image.shape and found.dtype == np.uint8 and found.flags.c_contiguous
    assert np.abs(found.astype(int) - image).mean() > 0.5
    np.testing.assert_array_equal(found, shifted(image, kind, index=3))
    np.testing.assert_array_equal(image, before)


def test_shifts_do_what_they_say(image: np.ndarray) -> None:
    grey = shifted(image, "grey", 0)
    assert (grey[..., 0] == grey[..., 1]).all() and (grey[..., 1] == grey[..., 2]).all()
    turned = {shifted(image, "rotation", index).tobytes() for index in range(20)}
    assert turned == {np.rot90(image, quarters).tobytes() for quarters in (1, 2, 3)}
    np.testing.assert_array_equal(shifted(image[:40], "rotation", 0), image[:40][::-1, ::-1])
    stored = io.BytesIO()
    Image.fromarray(image).save(stored, "JPEG", quality=JPEG_QUALITY)
    by_pillow = np.asarray(Image.open(stored)).astype(int)
    assert np.abs(shifted(image, "jpeg", 0).astype(int) - by_pillow).mean() < 1
    coarse = shifted(image, "mpp", 0).astype(float)
    small = np.asarray(Image.fromarray(image).resize((round(64 / MPP_FACTOR),) * 2, Image.Resampling.BOX))
    enlarged = np.asarray(Image.fromarray(small).resize((64, 64), Image.Resampling.BICUBIC)).astype(float)
    assert np.abs(coarse - enlarged).mean() < 2
    blurred = shifted(image, "blur", 0).astype(float)
    assert np.abs(np.diff(blurred, axis=0)).mean() < 0.5 * np.abs(np.diff(image.astype(float), axis=0)).mean()
    assert len({shifted(image, "stain", index).tobytes() for index in range(5)}) == 5
