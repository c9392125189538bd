"""Corrupted images to measure robustness with: the kinds of Hendrycks & Dietterich 2019 (arXiv:1807.01697).

    image = corrupt(image, "motion_blur", severity=5, seed=0, index=17)

Fifteen kinds count in the benchmark, four more are for choosing settings; each has five severities. The numbers are
those of the published benchmark in the form for images of any size (Michaelis et al. 2019, arXiv:1907.07484; package
imagecorruptions). What differs from it: every draw comes from (seed, index, kind, severity); values are rounded and not
cut off; zooming keeps the centre where it is; images may be of any size; and the ice of `frost` is drawn
(corruption_weather.py), since the package's photographs are not ours to pass on. Masks stay as they are: what moves
pixels (zoom_blur, elastic_transform, glass_blur) moves them by little.
"""

import io
import zlib
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import cv2
import numpy as np
from PIL import Image

from dinoscope.errors import ConfigError
from dinoscope.names import nearest
from dinoscope.segment import corruption_blurs as blurs
from dinoscope.segment import corruption_weather as weather
from dinoscope.segment import pathology_corruptions as pathology

__all__ = [
    *("ALL_CORRUPTIONS", "CORRUPTIONS", "EXTRA_CORRUPTIONS", "PATHOLOGY_CORRUPTIONS", "SEVERITIES"),
    *("check_kind", "corrupt", "groups_of_kinds"),
]

SEVERITIES = (1, 2, 3, 4, 5)
PATHOLOGY_CORRUPTIONS = tuple(pathology.KINDS)

Change = Callable[[np.ndarray, Any, np.random.Generator], np.ndarray]  # of float32 RGB (H, W, 3) in 0 … 1


def corrupt(image: np.ndarray, kind: str, severity: int, seed: int, index: int) -> np.ndarray:
    """One corrupted image; the same arguments give the same bytes.

    Args:
        image: uint8 (H, W, 3), RGB, of any size; left unchanged.
        kind: One of `ALL_CORRUPTIONS`.
        severity: 1 to 5.
        seed: Of all draws.
        index: Number of the image: another image is corrupted by other draws.

    Returns:
        uint8 (H, W, 3).

    Raises:
        ConfigError: There is no such kind or severity.
    """
    check_kind(kind, severity)
    assert image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8, (image.shape, image.dtype)
    rng = np.random.default_rng([seed % 2**64, index, zlib.crc32(kind.encode()), severity])
    if kind in pathology.KINDS:
        change, levels = pathology.KINDS[kind]
        return change(image, levels[severity - 1], rng)
    change, levels = _KINDS[kind]
    changed = change(image.astype(np.float32) / 255, levels[severity - 1], rng)
    return np.rint(np.clip(changed, 0, 1) * 255).astype(np.uint8)


def check_kind(kind: str, severity: int = 1) -> None:
    """Checks a kind and a severity before anything is computed.

    Raises:
        ConfigError: There is no such kind, with the nearest, or no such severity.
    """
    if kind not in ALL_CORRUPTIONS:
        raise ConfigError(
            f"corruption {kind!r} is none of {', '.join(ALL_CORRUPTIONS)}{nearest(kind, ALL_CORRUPTIONS)}"
        )
    if severity not in SEVERITIES:
        raise ConfigError(f"severity {severity!r} of {kind} must be 1, 2, 3, 4 or 5")


def groups_of_kinds() -> dict[str, tuple[str, ...]]:
    """The kinds as tables show them: noise, blur, weather, digital, extra, pathology."""
    common = {
        "noise": CORRUPTIONS[:3],
        "blur": CORRUPTIONS[3:7],
        "weather": CORRUPTIONS[7:11],
        "digital": CORRUPTIONS[11:],
    }
    return common | {"extra": EXTRA_CORRUPTIONS, "pathology": PATHOLOGY_CORRUPTIONS}


def _gaussian_noise(image: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    return image + sigma * rng.standard_normal(image.shape, np.float32)


def _shot_noise(image: np.ndarray, photons: float, rng: np.random.Generator) -> np.ndarray:
    return (rng.poisson(image * photons) / photons).astype(np.float32)


def _impulse_noise(image: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Channels of pixels become 0 or 1, each as likely."""
    draws = rng.random(image.shape, np.float32)
    return np.where(draws < share / 2, np.float32(0), np.where(draws < share, np.float32(1), image))


def _speckle_noise(image: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    return image + image * (sigma * rng.standard_normal(image.shape, np.float32))


def _brightness(image: np.ndarray, more: float, rng: np.random.Generator) -> np.ndarray:
    """Adds to the value of hue, saturation and value; black, which has no hue, turns grey."""
    value = image.max(axis=2, keepdims=True)
    brighter = np.minimum(value + more, 1)
    return np.where(value > 0, image * (brighter / np.maximum(value, 1e-6)), brighter)


def _contrast(image: np.ndarray, gain: float, rng: np.random.Generator) -> np.ndarray:
    mean = image.mean(axis=(0, 1), keepdims=True)
    return (image - mean) * gain + mean


def _saturate(image: np.ndarray, change: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """Saturation s of hue, saturation and value becomes gain·s + more; grey counts as red, as its hue is 0."""
    gain, more = change
    value = image.max(axis=2, keepdims=True)
    saturation = (value - image.min(axis=2, keepdims=True)) / np.maximum(value, 1e-6)
    wanted = np.clip(saturation * gain + more, 0, 1)
    coloured = value - (value - image) * (wanted / np.maximum(saturation, 1e-6))
    of_grey = value * np.concatenate([np.ones_like(wanted), 1 - wanted, 1 - wanted], axis=2)
    return np.where(saturation > 0, coloured, of_grey)


def _jpeg(image: np.ndarray, quality: int, rng: np.random.Generator) -> np.ndarray:
    stored = io.BytesIO()
    Image.fromarray(np.rint(image * 255).astype(np.uint8)).save(stored, "JPEG", quality=quality)
    with Image.open(stored) as opened:
        return np.asarray(opened, np.float32) / 255


def _pixelate(image: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    height, width = image.shape[:2]
    small = (max(1, int(width * share)), max(1, int(height * share)))
    picture = Image.fromarray(np.rint(image * 255).astype(np.uint8)).resize(small, Image.Resampling.BOX)
    return np.asarray(picture.resize((width, height), Image.Resampling.NEAREST), np.float32) / 255


def _elastic(image: np.ndarray, gain: float, rng: np.random.Generator) -> np.ndarray:
    """Moves pixels by smoothed noise; sizes are shares of the image, whose borders are mirrored."""
    height, width = image.shape[:2]
    sigmas = (0.01 * width, 0.01 * height)
    taps = [2 * int(3 * sigma + 0.5) + 1 for sigma in sigmas]
    columns, rows = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    places = []
    for start in (columns, rows):
        noise = rng.uniform(-0.005 * height, 0.005 * height, (height, width)).astype(np.float32)
        smooth = cv2.GaussianBlur(noise, taps, sigmas[0], sigmaY=sigmas[1], borderType=cv2.BORDER_REFLECT)
        places.append(start + gain * smooth)
    return cv2.remap(image, *places, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)


# Of each kind its function and its numbers at severities 1 to 5
_KINDS: MappingProxyType[str, tuple[Change, tuple[Any, ...]]] = MappingProxyType(
    {
        "gaussian_noise": (_gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
        "shot_noise": (_shot_noise, (60, 25, 12, 5, 3)),
        "impulse_noise": (_impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),
        # radius, sigma that softens the rim
        "defocus_blur": (blurs.defocus, ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))),
        # sigma, largest shift, rounds
        "glass_blur": (blurs.glass, ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))),
        # radius, sigma along the motion
        "motion_blur": (blurs.motion, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))),
        # number of enlargements from 1 on, step between them
        "zoom_blur": (blurs.zoom, ((12, 0.01), (16, 0.01), (11, 0.02), (13, 0.02), (11, 0.03))),
        # mean and spread of the noise, its enlargement, least density, radius and sigma of the fall, share of the image
        "snow": (
            weather.snow,
            (
                (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
                (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
                (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
                (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
                (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
            ),
        ),
        # share of the image, share of the ice
        "frost": (weather.frost, ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))),
        # amount, how much weaker each finer structure is
        "fog": (weather.fog, ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))),
        "brightness": (_brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
        "contrast": (_contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
        "elastic_transform": (_elastic, (12.5, 16.25, 21.25, 25, 30)),
        "pixelate": (_pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),
        "jpeg_compression": (_jpeg, (25, 18, 15, 10, 7)),
        "speckle_noise": (_speckle_noise, (0.15, 0.2, 0.35, 0.45, 0.6)),
        "gaussian_blur": (blurs.gaussian, (1, 2, 3, 4, 6)),
        # mean and spread of the noise, its sigma, least amount, strength or softness, whether mud
        "spatter": (
            weather.spatter,
            (
                (0.65, 0.3, 4, 0.69, 0.6, False),
                (0.65, 0.3, 3, 0.68, 0.6, False),
                (0.65, 0.3, 2, 0.68, 0.5, False),
                (0.65, 0.3, 1, 0.65, 1.5, True),
                (0.67, 0.4, 1, 0.65, 1.5, True),
            ),
        ),
        "saturate": (_saturate, ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))),
    }
)
CORRUPTIONS, EXTRA_CORRUPTIONS = tuple(_KINDS)[:15], tuple(_KINDS)[15:]
ALL_CORRUPTIONS = (*CORRUPTIONS, *EXTRA_CORRUPTIONS, *PATHOLOGY_CORRUPTIONS)
