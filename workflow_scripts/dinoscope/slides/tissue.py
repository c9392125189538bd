"""Where the tissue is, found on a low-resolution copy of the slide.

Methods:
    otsu: stained tissue on bright ground (H&E, IHC, special stains). Otsu's threshold (1979) of optical density plus
        its spread over the colour channels, which is high for any stain and low for dust and shadows.
    cytology: single cells and small groups on bright ground. As otsu, at twice the resolution, and keeps small objects.
    fluorescence: bright signal on dark ground.
    none: all of the slide counts.
    auto: one of the first three, whichever fits the slide's looks; the answer says which and why.

Otsu's method splits any image in two, an empty one as well. Its threshold is therefore kept between a lowest contrast,
which JPEG noise and uneven light do not reach, and a highest, above which it would part dark tissue from pale.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from dinoscope.errors import SlideError
from dinoscope.slides.reader import Slide

__all__ = ["METHODS", "Tissue", "choose_method", "detect_tissue", "working_level"]

METHODS = ("auto", "otsu", "fluorescence", "cytology", "none")


@dataclass(frozen=True)
class _Settings:
    """How a method works: lengths in micrometres, areas in square micrometres, contrasts in the unit of its score."""

    finest_mpp: float
    blur_um: float
    lowest_contrast: float
    highest_contrast: float
    closing_um: float
    min_area_um2: float
    max_hole_um2: float


_SETTINGS = {
    "otsu": _Settings(8, 8, 0.04, 0.06, 16, 10_000, 10_000),
    "cytology": _Settings(4, 2, 0.04, 0.08, 0, 50, 2_000),
    "fluorescence": _Settings(8, 16, 6, 16, 24, 10_000, 10_000),
    "none": _Settings(8, 0, 0, 0, 0, 0, 0),
}
_DARK, _BRIGHT = 60, 200
_BLACK = 25
# a smear has many objects, and next to none of their area lies in pieces that hold a disc of this radius
_SOLID_UM, _MIN_OBJECTS, _MOST_COVERED, _MOST_SOLID = 100, 12, 0.4, 0.3


@dataclass(frozen=True)
class Tissue:
    """A tissue mask.

    Attributes:
        mask: bool (height, width).
        downsample: Side of a mask pixel in level-0 pixels; the mask's corner is the slide's.
        mpp: Side of a mask pixel in micrometres.
        method: The method that made it, never "auto".
        reason: Why this method.
        threshold: What a pixel's score had to exceed; None where all counts.
    """

    mask: np.ndarray
    downsample: float
    mpp: float
    method: str
    reason: str
    threshold: float | None

    @property
    def area_mm2(self) -> float:
        """Area of the tissue in square millimetres."""
        return float(self.mask.sum()) * (self.mpp / 1000) ** 2

    def describe(self) -> dict[str, object]:
        """Method, reason and settings, to be stored beside the tiles."""
        settings = _SETTINGS[self.method]
        return {
            "tissue_method": self.method,
            "tissue_method_reason": self.reason,
            "tissue_threshold": self.threshold,
            "tissue_mask_mpp": round(self.mpp, 4),
            "tissue_area_mm2": round(self.area_mm2, 4),
            "tissue_min_area_um2": settings.min_area_um2,
            "tissue_max_hole_um2": settings.max_hole_um2,
        }


def detect_tissue(slide: Slide, method: str = "auto", advance: Callable[[], object] | None = None) -> Tissue:
    """Finds the tissue of a slide.

    Args:
        slide: The slide; its micrometres a pixel must be known.
        method: One of `METHODS`.
        advance: Called after each block of pixels that was read (`Slide.num_blocks` of `working_level`).

    Raises:
        SlideError: There is none, or the slide cannot be read.
    """
    assert method in METHODS
    level, factor = working_level(slide, "otsu" if method == "auto" else method)
    downsample = slide.level_downsamples[level] * factor
    image, reason = None, "given by stain or setting"
    if method != "none":
        image = slide.shrunk(level, factor, advance)
    if method == "auto":
        method, reason = choose_method(image, slide.mpp * downsample)
        finer = working_level(slide, method)
        if finer != (level, factor):
            level, factor = finer
            downsample, image = slide.level_downsamples[level] * factor, slide.shrunk(level, factor)
    mpp = slide.mpp * downsample
    if image is None:
        width, height = (math.ceil(side / downsample) for side in (slide.width, slide.height))
        return Tissue(np.ones((height, width), bool), downsample, mpp, method, reason, None)
    mask, threshold = _segment(image, mpp, method)
    if not mask.any():
        raise SlideError(
            f"slide {slide.slide_id!r}: no tissue found with method {method} ({reason}) at mpp {slide.mpp:.4g}: if "
            "there is some, try another tissue method (otsu, cytology, fluorescence; none takes the whole slide) and "
            f"check the mpp, since pieces below {_SETTINGS[method].min_area_um2:g} square micrometres are left out"
        )
    return Tissue(mask, downsample, mpp, method, reason, threshold)


def working_level(slide: Slide, method: str) -> tuple[int, int]:
    """The level to read and the squares to average, for 8 to 16 um a pixel (cytology: 4 to 8) where there is such."""
    finest = _SETTINGS[method if method != "auto" else "otsu"].finest_mpp
    mpps = [slide.mpp * downsample for downsample in slide.level_downsamples]
    level = max((level for level, mpp in enumerate(mpps) if mpp < 2 * finest), default=0)
    return level, max(1, math.ceil(finest / mpps[level] - 1e-6))


def choose_method(image: np.ndarray, mpp: float) -> tuple[str, str]:
    """Which method fits the looks of a slide, and why.

    Args:
        image: uint8 (height, width, 3), RGB, the whole slide.
        mpp: Micrometres a pixel of it.

    Returns:
        "fluorescence", "cytology" or "otsu", and the reason as half a sentence.
    """
    brightest, darkest = image.max(axis=2), image.min(axis=2)
    dark, bright = float((brightest < _DARK).mean()), float((darkest > _BRIGHT).mean())
    if dark > 0.3 and bright < 0.02:
        return "fluorescence", f"{dark:.0%} of the slide is dark and none is bright ground"
    mask = _threshold(image, mpp, "otsu")[0]
    num_objects, covered = cv2.connectedComponents(mask)[0] - 1, float(mask.mean())
    solid = cv2.morphologyEx(mask, cv2.MORPH_OPEN, _disc(_SOLID_UM / mpp)).sum() / max(1, mask.sum())
    if num_objects >= _MIN_OBJECTS and covered < _MOST_COVERED and solid < _MOST_SOLID:
        return "cytology", f"{num_objects} objects on bright ground, {1 - solid:.0%} of their area in small ones"
    return "otsu", f"stained tissue on bright ground covers {covered:.0%}"


def _segment(image: np.ndarray, mpp: float, method: str) -> tuple[np.ndarray, float]:
    """A cleaned mask and the threshold that made it."""
    mask, threshold = _threshold(image, mpp, method)
    settings = _SETTINGS[method]
    mask = ~_without_small(mask == 0, settings.max_hole_um2 / mpp**2)
    return _without_small(mask, settings.min_area_um2 / mpp**2), threshold


def _threshold(image: np.ndarray, mpp: float, method: str) -> tuple[np.ndarray, float]:
    """All that is above the threshold, gaps closed; uint8, 0 or 1. And the threshold."""
    settings = _SETTINGS[method]
    score = _brightness_score(image) if method == "fluorescence" else _stain_score(image)
    if settings.blur_um:
        score = cv2.GaussianBlur(score, (0, 0), max(0.5, settings.blur_um / mpp))
    threshold = float(np.clip(_otsu(score), settings.lowest_contrast, settings.highest_contrast))
    mask = (score > threshold).astype(np.uint8)
    if settings.closing_um > mpp:
        mask = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, _disc(settings.closing_um / mpp))
    return mask, threshold


def _stain_score(image: np.ndarray) -> np.ndarray:
    """Optical density plus its spread over the channels; float32 (height, width), 0 on bright ground and black fill."""
    ground = image[image.min(axis=2) > _BRIGHT - 30]
    white = np.percentile(ground, 95, axis=0) if len(ground) > image.shape[0] else np.array([245.0, 245.0, 245.0])
    steps = np.arange(256)[:, None] + 1.0
    table = np.clip(-np.log10(steps / (white + 1)), 0, None).astype(np.float32)
    density = np.stack([table[image[..., channel], channel] for channel in range(3)], axis=2)
    score = density.mean(axis=2) + density.max(axis=2) - density.min(axis=2)
    # unscanned parts filled with black, and the grey seam around them
    black = cv2.morphologyEx((image.max(axis=2) < _BLACK).astype(np.uint8), cv2.MORPH_OPEN, _disc(2))
    score[cv2.dilate(black, _disc(4)) > 0] = 0
    return score


def _brightness_score(image: np.ndarray) -> np.ndarray:
    """Brightest channel above the slide's darkest parts; float32 (height, width)."""
    brightest = image.max(axis=2).astype(np.float32)
    return np.clip(brightest - np.percentile(brightest, 5), 0, None)


def _otsu(score: np.ndarray) -> float:
    top = float(score.max())
    if top <= 0:
        return 0.0
    scaled = np.rint(score * (255 / top)).astype(np.uint8)
    return cv2.threshold(scaled, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)[0] * top / 255


def _disc(radius_px: float) -> np.ndarray:
    side = 2 * max(1, round(radius_px)) + 1
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))


def _without_small(mask: np.ndarray, min_area_px: float) -> np.ndarray:
    """The mask without connected pieces of fewer pixels than `min_area_px`."""
    labels, stats = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)[1:3]
    keep = stats[:, cv2.CC_STAT_AREA] >= min_area_px
    keep[0] = False
    return keep[labels]
