"""Corruptions that slides meet: other stains, stronger compression, blur, defocus, another scanner's resolution.

Severities 1 to 5, by kind (uint8 RGB in and out; masks stay as they are, as nothing is moved):

- stain_shift: haematoxylin, eosin and the rest (Ruifrok & Johnston 2001), unmixed in optical density, become
  gain · stain + shift, as batches and laboratories differ (Tellez et al. 2018). Gains are 1 ± 0.1, 0.2, 0.3, 0.4, 0.5
  and shifts ± 0.01, 0.02, 0.03, 0.04, 0.05 optical densities, each from half to all of that, up or down at random.
- slide_jpeg: JPEG of quality 60, 40, 25, 15, 8 with halved colours; scanners write 70 to 90.
- slide_blur: Gaussian of sigma 0.7, 1.2, 1.8, 2.5, 3.5 pixels: thick sections, dirt on the optics, resampling.
- slide_focus: the scanner's plane of focus is off: the mean over a disk of radius 1, 2, 3, 4.5, 6 pixels.
- mpp_change: as if scanned at 1.5, 2, 3, 4, 6 times the micrometres a pixel and enlarged to the size that the model
  expects: averaged over areas, then bicubic. 0.5 µm becomes 0.75 (20× seen as 13×) … 3 µm (3×).
"""

import io
import math
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import cv2
import numpy as np
from PIL import Image

from dinoscope.data import color
from dinoscope.segment import corruption_blurs as blurs

__all__ = ["KINDS"]

_SAMPLES = 16  # along a pixel, of how much of it a disk covers


def _stain_shift(image: np.ndarray, strength: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    gains, shifts = (rng.uniform(0.5, 1, (2, 3)) * rng.choice([-1, 1], (2, 3))) * np.array(strength)[:, None]
    return color.shift_stains(image, 1 + gains, shifts)


def _jpeg(image: np.ndarray, quality: int, rng: np.random.Generator) -> np.ndarray:
    stored = io.BytesIO()
    Image.fromarray(image).save(stored, "JPEG", quality=quality, subsampling="4:2:0")
    with Image.open(stored) as opened:
        return np.asarray(opened)


def _blur(image: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    return _rounded(blurs.gaussian(image.astype(np.float32), sigma))


def _focus(image: np.ndarray, radius: float, rng: np.random.Generator) -> np.ndarray:
    return _rounded(cv2.filter2D(image.astype(np.float32), -1, disk(radius), borderType=cv2.BORDER_REFLECT_101))


def _mpp_change(image: np.ndarray, factor: float, rng: np.random.Generator) -> np.ndarray:
    return color.coarser(image, factor)


def disk(radius: float) -> np.ndarray:
    """How much of each pixel a disk around the middle one covers, as shares of its area; float32, odd side."""
    reach = math.ceil(radius - 0.5)
    places = (np.arange((2 * reach + 1) * _SAMPLES) + 0.5) / _SAMPLES - reach - 0.5
    inside = (places[:, None] ** 2 + places**2 <= radius**2).astype(np.float32)
    cover = inside.reshape(2 * reach + 1, _SAMPLES, 2 * reach + 1, _SAMPLES).mean(axis=(1, 3))
    return cover / cover.sum()


def _rounded(image: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(image, 0, 255)).astype(np.uint8)


# Of each kind its function (uint8 image, number, generator) and its numbers at severities 1 to 5
KINDS: MappingProxyType[str, tuple[Callable[..., np.ndarray], tuple[Any, ...]]] = MappingProxyType(
    {
        "stain_shift": (_stain_shift, ((0.1, 0.01), (0.2, 0.02), (0.3, 0.03), (0.4, 0.04), (0.5, 0.05))),
        "slide_jpeg": (_jpeg, (60, 40, 25, 15, 8)),
        "slide_blur": (_blur, (0.7, 1.2, 1.8, 2.5, 3.5)),
        "slide_focus": (_focus, (1, 2, 3, 4.5, 6)),
        "mpp_change": (_mpp_change, (1.5, 2, 3, 4, 6)),
    }
)
