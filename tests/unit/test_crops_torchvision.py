"""The same recipe in torchvision v2 on PIL images: the same distributions of draws and of pixels, fixed seeds."""

import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from dinoscope.data.crops import AUGMENTATIONS, CropSizes, make_crops, sample_rng
from dinoscope.data.views import draw_views
from other_libraries import require

require("torchvision")
import torchvision_on_cpu_torch  # noqa: E402, F401

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from torchvision.transforms import v2  # noqa: E402
from torchvision_crops import TorchvisionCrops, distortion, geometry  # noqa: E402

COUNT = 1000
WINDOW_PX = 300
GLOBAL, LOCAL = (0.32, 1.0), (0.05, 0.32)


def ours(recipe, scale):
    kinds = [(scale, 1.0, 0.0)]
    size = (WINDOW_PX, WINDOW_PX)
    return [draw_views(size, kinds, AUGMENTATIONS[recipe], sample_rng(12, index))[0] for index in range(COUNT)]


def theirs(transform):
    torch.manual_seed(12)
    image = Image.new("RGB", (WINDOW_PX, WINDOW_PX))
    return [transform.make_params([image]) for _ in range(COUNT)]


def same(first, second):
    return stats.ks_2samp(first, second).pvalue > 1e-3


@pytest.mark.parametrize("scale", [GLOBAL, LOCAL], ids=["global", "local"])
def test_boxes(scale):
    mine = np.array([view[:4] for view in ours("dinov3", scale)])
    crop, *_ = geometry(64, scale, AUGMENTATIONS["dinov3"])
    other = np.array([[box[key] for key in ("top", "left", "height", "width")] for box in theirs(crop)])
    for values in (lambda b: b[:, 0], lambda b: b[:, 1], lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 2] / b[:, 3]):
        assert same(values(mine), values(other))
    assert not same(mine[:, 2] * 1.1, other[:, 2])  # such a difference would be seen


@pytest.mark.parametrize("recipe", AUGMENTATIONS)
def test_colours_and_blur(recipe):
    mine = ours(recipe, GLOBAL)
    apply_jitter, _, apply_blur, *_ = [
        step for step in distortion(AUGMENTATIONS[recipe], 1.0, 0.0) if "Stain" not in repr(step)
    ]
    params = theirs(apply_jitter.transforms[0])
    for number, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        values = [amount for view in mine for called, amount in view.jitter if called == name]
        assert same(values, [each[f"{name}_factor"] for each in params])
        places = [[called for called, _ in view.jitter].index(name) for view in mine if view.jitter]
        their_places = [each["fn_idx"].tolist().index(number) for each in params]
        table = [np.bincount(places, minlength=4), np.bincount(their_places, minlength=4)]
        assert stats.chi2_contingency(table).pvalue > 1e-3
    sigmas = [each["sigma"][0] for each in theirs(apply_blur.transforms[0])]
    assert same([view.blur_sigma for view in mine], sigmas)


@pytest.fixture(scope="module")
def window():
    """Coloured smoothed noise with structure at several scales."""
    rng = np.random.default_rng(0)
    noise = sum(cv2.GaussianBlur(rng.normal(size=(160, 160, 3)), (0, 0), sigma) * sigma for sigma in (1, 4, 12))
    mixed = noise @ [[1.0, 0.4, 0.2], [0.3, 1.0, 0.3], [0.1, 0.4, 0.8]]
    return np.clip([170, 130, 175] + 45 * mixed / mixed.std(), 0, 255).astype(np.uint8)


def measures(crop):
    """What distortions move: level, contrast, colour, sharpness, and the light and the dark."""
    pixels = crop.astype(float)
    gray = pixels @ [0.299, 0.587, 0.114]
    largest, smallest = pixels.max(-1), pixels.min(-1)
    return [
        *pixels.mean((0, 1)),
        gray.std(),
        (largest - smallest).mean(),
        np.abs(np.diff(gray, axis=1)).mean(),
        np.abs(cv2.Laplacian(gray, cv2.CV_64F)[1:-1, 1:-1]).mean(),
        np.quantile(gray, 0.02),
        np.quantile(gray, 0.98),
        (pixels[..., 0] - pixels[..., 2]).mean(),
    ]


@pytest.mark.parametrize("recipe", AUGMENTATIONS)
def test_pixels(recipe, window):
    """The first and the second global crop and the local ones: p-values of 30 measures, corrected for their number."""
    sizes = CropSizes(global_px=48, local_px=32, num_local=1)
    reference = TorchvisionCrops(sizes, AUGMENTATIONS[recipe])
    torch.manual_seed(13)
    image, count = Image.fromarray(window), 250
    mine, others = [], []
    for index in range(count):
        made = make_crops(window, sizes, AUGMENTATIONS[recipe], sample_rng(13, index))
        mine.append([measures(crop) for crop in (*made.global_crops, *made.local_crops)])
        others.append([measures(crop.permute(1, 2, 0).numpy()) for crop in reference(image)])
    mine, others = np.array(mine).reshape(count, -1), np.array(others).reshape(count, -1)
    pvalues = [stats.ks_2samp(one, other).pvalue for one, other in zip(mine.T, others.T, strict=True)]
    assert min(pvalues) > 1e-3 / len(pvalues)
    assert np.mean(pvalues) > 0.2


def test_the_reference_is_torchvision(window):
    """Its transforms are torchvision's own classes, in the order of the recipe."""
    names = [
        type(step).__name__ for step in TorchvisionCrops(CropSizes(), AUGMENTATIONS["dinov3"]).transforms[1].transforms
    ]
    expected = (v2.RandomResizedCrop, v2.RandomHorizontalFlip, v2.RandomApply, v2.RandomGrayscale, v2.RandomApply)
    assert names == [*(each.__name__ for each in expected), "RandomSolarize", "PILToTensor"]
