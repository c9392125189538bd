"""Where the tissue is, found on a low-resolution copy of the slide.

Methods:
    otsu: stained tissue on bright ground (H&E, IHC, special stains). Otsu's threshold (1979) of optical density plus
        its spread over the colour channels, which is high for any stain and low for dust and shadows.
    cytology: single cells and small groups on bright ground. As otsu, at twice the resolution, and keeps small objects.
    fluorescence: bright signal on dark ground.
    none: all of the slide counts.
    annotations: what somebody has outlined, in QuPath for instance (`geojson`).
    auto: one of the first three, whichever fits the slide's looks; the answer says which and why.

Otsu's method splits any image in two, an empty one as well. Its threshold is therefore kept between a lowest contrast,
which JPEG noise and uneven light do not reach, and a highest, above which it would part dark tissue from pale.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import cv2
import numpy as np

from dinoscope.errors import SlideError
from dinoscope.slides.geojson import Annotations
from dinoscope.slides.reader import Slide

__all__ = ["METHODS", "Tissue", "choose_method", "detect_tissue", "with_picture", "working_level"]

METHODS = ("auto", "otsu", "fluorescence", "cytology", "none", "annotations")


@dataclass(frozen=True)
class _Settings:
    """How a method works: lengths in micrometres, areas in square micrometres, contrasts in the unit of its score."""

    finest_mpp: float
    coarsest_mpp: float
    blur_um: float
    lowest_contrast: float
    highest_contrast: float
    closing_um: float
    min_area_um2: float
    max_hole_um2: float


_SETTINGS = {
    "otsu": _Settings(8, 17, 8, 0.04, 0.06, 16, 10_000, 10_000),
    "cytology": _Settings(4, 7.9, 2, 0.04, 0.08, 0, 50, 2_000),
    "fluorescence": _Settings(8, 17, 16, 6, 16, 24, 10_000, 10_000),
    "none": _Settings(8, 17, 0, 0, 0, 0, 0, 0),
    "annotations": _Settings(8, 17, 0, 0, 0, 0, 0, 0),
}
_DARK, _BRIGHT = 60, 200
_BLACK = 25
_DENSITY_STEP = 0.002  # scores are kept in 8 bits: optical densities up to 0.51, far above any threshold
_SAMPLE_PX = 250  # so many pixels a side are enough for percentiles
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
        min_area_um2: Smaller pieces were left out.
        max_hole_um2: Holes up to this area were filled.
        image: The picture that it was found on, uint8 (height, width, 3), RGB; None if none was read.
        extremes: Its brightest and its darkest channel, uint8 (height, width) each.
    """

    mask: np.ndarray
    downsample: float
    mpp: float
    method: str
    reason: str
    threshold: float | None
    min_area_um2: float = 0.0
    max_hole_um2: float = 0.0
    image: np.ndarray | None = field(default=None, repr=False)
    extremes: tuple[np.ndarray, np.ndarray] | None = field(default=None, repr=False)

    @property
    def area_mm2(self) -> float:
        """Area of the tissue in square millimetres."""
        return float(np.count_nonzero(self.mask)) * (self.mpp / 1000) ** 2

    @functools.cached_property
    def sums(self) -> np.ndarray:
        """Number of tissue pixels above and left of every pixel's corner; int32 (height + 1, width + 1)."""
        return cv2.integral(self.mask.view(np.uint8))

    @functools.cached_property
    def sections(self) -> np.ndarray:
        """Of every pixel of the mask the connected piece that it belongs to, from 1 on in raster order, 0 outside."""
        return cv2.connectedComponents(self.mask.view(np.uint8), connectivity=8)[1]

    def describe(self) -> dict[str, object]:
        """Method, reason and settings, to be stored beside the tiles."""
        return {
            "tissue_method": self.method,
            "tissue_method_reason": self.reason,
            "tissue_threshold": self.threshold,
            "tissue_mask_mpp": round(self.mpp, 4),
            "tissue_area_mm2": round(self.area_mm2, 4),
            "tissue_min_area_um2": self.min_area_um2,
            "tissue_max_hole_um2": self.max_hole_um2,
        }


def detect_tissue(
    slide: Slide,
    method: str = "auto",
    advance: Callable[[], object] | None = None,
    *,
    min_area_um2: float | None = None,
    max_hole_um2: float | None = None,
    annotations: Annotations | None = None,
) -> Tissue:
    """Finds the tissue of a slide.

    Args:
        slide: The slide; its micrometres a pixel must be known.
        method: One of `METHODS`.
        advance: Called after each block of pixels that was read (`Slide.num_blocks` of `working_level`).
        min_area_um2: Smaller pieces are left out; the method's own value when not given.
        max_hole_um2: Holes up to this area are filled; the method's own value when not given.
        annotations: What was outlined; for method annotations.

    Raises:
        SlideError: There is none, the slide cannot be read, or the annotations do not fit it.
    """
    assert method in METHODS and (method == "annotations") == (annotations is not None)
    level, factor = working_level(slide, method)
    downsample = slide.level_downsamples[level] * factor
    areas = {"min_area_um2": min_area_um2, "max_hole_um2": max_hole_um2}
    if method in {"none", "annotations"}:
        return _given(slide, method, downsample, areas, annotations)
    look = _Look(slide.shrunk(level, factor, advance), slide.mpp * downsample)
    reason = "given by stain or setting"
    if method == "auto":
        method, reason = _choose(look)
        finer = working_level(slide, method)
        if finer != (level, factor):
            level, factor = finer
            downsample = slide.level_downsamples[level] * factor
            look = _Look(slide.shrunk(level, factor), slide.mpp * downsample)
    areas = _areas(method, areas)
    mask, threshold = look.thresholded(method)
    mask = _cleaned(mask, look.mpp, areas)
    if not mask.any():
        raise SlideError(
            f"slide {slide.slide_id!r}: no tissue found with method {method} ({reason}) at mpp {slide.mpp:.4g}: if "
            "there is some, try another tissue method (otsu, cytology, fluorescence; none takes the whole slide) and "
            f"check the mpp, since pieces below {areas['min_area_um2']:g} square micrometres are left out"
        )
    pictures = {"image": look.image, "extremes": (look.brightest, look.darkest) if method != "cytology" else None}
    return Tissue(mask, downsample, look.mpp, method, reason, threshold, **areas, **pictures)


def with_picture(slide: Slide, tissue: Tissue, advance: Callable[[], object] | None = None) -> Tissue:
    """The tissue with the picture that goes with its mask, which methods none and annotations have not read.

    Raises:
        SlideError: The slide cannot be read.
    """
    if tissue.image is not None:
        return tissue
    return replace(tissue, image=slide.shrunk(*working_level(slide, tissue.method), advance))


def working_level(slide: Slide, method: str) -> tuple[int, int]:
    """The level to read and the squares to average, for 8 to 17 um a pixel (cytology: 4 to 8) where there is such."""
    settings = _SETTINGS[method if method != "auto" else "otsu"]
    mpps = [slide.mpp * downsample for downsample in slide.level_downsamples]
    level = max((level for level, mpp in enumerate(mpps) if mpp <= settings.coarsest_mpp), default=0)
    return level, max(1, math.ceil(settings.finest_mpp / mpps[level] - 1e-6))


def choose_method(image: np.ndarray, mpp: float) -> tuple[str, str]:
    """Which method fits the looks of a slide, and why.

    Args:
        image: uint8 (height, width, 3), RGB, the whole slide.
        mpp: Micrometres a pixel of it.

    Returns:
        "fluorescence", "cytology" or "otsu", and the reason as half a sentence.
    """
    return _choose(_Look(image, mpp))


class _Look:
    """A picture of the slide, what is computed of it, and that only once."""

    def __init__(self, image: np.ndarray, mpp: float) -> None:
        self.image, self.mpp = image, mpp
        self._masks: dict[str, tuple[np.ndarray, float]] = {}

    @functools.cached_property
    def planes(self) -> Sequence[np.ndarray]:
        """The channels."""
        return cv2.split(self.image)

    @functools.cached_property
    def brightest(self) -> np.ndarray:
        """The brightest channel of every pixel."""
        return _folded(cv2.max, self.planes)

    @functools.cached_property
    def darkest(self) -> np.ndarray:
        """The darkest channel of every pixel."""
        return _folded(cv2.min, self.planes)

    def thresholded(self, method: str) -> tuple[np.ndarray, float]:
        """All that is above the threshold, gaps closed; uint8, 0 or 1. And the threshold."""
        if method not in self._masks:
            self._masks[method] = self._threshold(method)
        return self._masks[method]

    def _threshold(self, method: str) -> tuple[np.ndarray, float]:
        settings = _SETTINGS[method]
        step = 1.0 if method == "fluorescence" else _DENSITY_STEP
        score = self._brightness_score() if method == "fluorescence" else self._stain_score()
        if settings.blur_um:
            score = cv2.GaussianBlur(score, (0, 0), max(0.5, settings.blur_um / self.mpp))
        found = cv2.threshold(score, 0, 1, cv2.THRESH_BINARY + cv2.THRESH_OTSU)[0]
        threshold = float(np.clip(found * step, settings.lowest_contrast, settings.highest_contrast))
        mask = cv2.threshold(score, math.floor(threshold / step + 1e-6), 1, cv2.THRESH_BINARY)[1]
        if settings.closing_um >= self.mpp:
            mask = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, _disc(settings.closing_um / self.mpp))
        return mask, threshold

    def _stain_score(self) -> np.ndarray:
        """Optical density plus its spread over the channels; uint8 (height, width), 0 on bright ground and black."""
        steps = np.arange(256) + 1.0
        tables = [np.clip(-np.log10(steps / (white + 1)) / _DENSITY_STEP, 0, 255) for white in self._white()]
        density = [
            cv2.LUT(plane, np.rint(table).astype(np.uint8)) for plane, table in zip(self.planes, tables, strict=True)
        ]
        # results go to arrays that are there already: fresh memory costs more than the sums
        spread, darkest = _folded(cv2.max, density), _folded(cv2.min, density)
        cv2.subtract(spread, darkest, spread)
        mean = cv2.addWeighted(density[0], 0.5, density[1], 0.5, 0, density[0])
        cv2.addWeighted(mean, 2 / 3, density[2], 1 / 3, 0, mean)
        score = cv2.add(mean, spread, mean)
        # unscanned parts filled with black, and the grey seam around them
        black = cv2.compare(self.brightest, _BLACK, cv2.CMP_LT)
        if cv2.countNonZero(black):
            black = cv2.morphologyEx(black, cv2.MORPH_OPEN, np.ones((5, 5), np.uint8))
        if cv2.countNonZero(black):
            score[cv2.dilate(black, np.ones((9, 9), np.uint8)) > 0] = 0
        return score

    def _white(self) -> np.ndarray:
        """Colour of the bare glass, (3,)."""
        image, darkest = _sample(self.image), _sample(self.darkest)
        ground = image[darkest > _BRIGHT - 30]
        return np.percentile(ground, 95, axis=0) if len(ground) > len(image) else np.full(3, 245.0)

    def _brightness_score(self) -> np.ndarray:
        """Brightest channel above the slide's darkest parts; uint8 (height, width)."""
        return cv2.subtract(self.brightest, float(np.percentile(_sample(self.brightest), 5)))


def _choose(look: _Look) -> tuple[str, str]:
    dark = float((_sample(look.brightest) < _DARK).mean())
    bright = float((_sample(look.darkest) > _BRIGHT).mean())
    if dark > 0.3 and bright < 0.02:
        return "fluorescence", f"{dark:.0%} of the slide is dark and none is bright ground"
    mask = look.thresholded("otsu")[0]
    covered = cv2.countNonZero(mask) / mask.size
    if covered < _MOST_COVERED:
        num_objects = len(cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0])
        solid = _solid_share(mask, look.mpp) if num_objects >= _MIN_OBJECTS else 1.0
        if solid < _MOST_SOLID:
            return "cytology", f"{num_objects} objects on bright ground, {1 - solid:.0%} of their area in small ones"
    return "otsu", f"stained tissue on bright ground covers {covered:.0%}"


def _solid_share(mask: np.ndarray, mpp: float) -> float:
    """Share of a mask's area in places that hold a disc of radius `_SOLID_UM`."""
    factor = max(1, round(_SOLID_UM / 3 / mpp))  # a radius of three pixels is enough to tell
    if factor > 1:
        size = (max(1, mask.shape[1] // factor), max(1, mask.shape[0] // factor))
        mask = cv2.threshold(cv2.resize(mask * 255, size, interpolation=cv2.INTER_AREA), 127, 1, cv2.THRESH_BINARY)[1]
    solid = cv2.morphologyEx(mask, cv2.MORPH_OPEN, _disc(_SOLID_UM / mpp / factor))
    return cv2.countNonZero(solid) / max(1, cv2.countNonZero(mask))


def _given(
    slide: Slide,
    method: str,
    downsample: float,
    areas: dict[str, float | None],
    annotations: Annotations | None,
) -> Tissue:
    """The whole slide, or what was outlined on it."""
    width, height = (math.ceil(side / downsample) for side in (slide.width, slide.height))
    mpp, areas = slide.mpp * downsample, _areas(method, areas)
    if annotations is None:
        mask, reason = np.ones((height, width), bool), "given by stain or setting"
    else:
        mask = _cleaned(annotations.rasterised(slide, (height, width), downsample), mpp, areas)
        reason = annotations.summary
    if not mask.any():
        raise SlideError(
            f"slide {slide.slide_id!r}: nothing is left of its annotations ({reason}) at {mpp:.3g} um a pixel: outline "
            "larger regions, or lower tissue.min_area_um2"
        )
    return Tissue(mask, downsample, mpp, method, reason, None, **areas)


def _areas(method: str, wanted: dict[str, float | None]) -> dict[str, float]:
    return {name: getattr(_SETTINGS[method], name) if value is None else value for name, value in wanted.items()}


def _cleaned(mask: np.ndarray, mpp: float, areas: dict[str, float]) -> np.ndarray:
    """The mask, as bool, without small holes and then without small pieces.

    Works on contours, which takes a fraction of the time of labelling: by Pick's theorem a closed line of area A over B
    pixels has A - B/2 + 1 pixels inside.
    """
    mask = mask.astype(np.uint8)
    contours, tree = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    areas_px = np.array([cv2.contourArea(contour) + 1 for contour in contours])
    half_px = np.array([len(contour) / 2 for contour in contours])
    parents = tree[0, :, 3] if tree is not None else np.empty(0, int)
    hole_px = np.where(parents >= 0, areas_px - half_px, 0)
    filled = (parents >= 0) & (hole_px <= areas["max_hole_um2"] / mpp**2)
    piece_px = areas_px + half_px
    np.subtract.at(piece_px, parents[(parents >= 0) & ~filled], hole_px[(parents >= 0) & ~filled])
    small = (parents < 0) & (piece_px < areas["min_area_um2"] / mpp**2)
    for number in np.flatnonzero(filled):
        cv2.drawContours(mask, contours[number : number + 1], 0, 1, cv2.FILLED)
    for number in np.flatnonzero(small):
        cv2.drawContours(mask, contours[number : number + 1], 0, 0, cv2.FILLED)
    return mask > 0


def _folded(function: Callable[..., np.ndarray], planes: Sequence[np.ndarray]) -> np.ndarray:
    """A function of two planes over three."""
    result = function(planes[0], planes[1])
    return function(result, planes[2], result)


def _sample(plane: np.ndarray) -> np.ndarray:
    step = max(1, max(plane.shape[:2]) // _SAMPLE_PX)
    return plane[::step, ::step]


def _disc(radius_px: float) -> np.ndarray:
    side = 2 * max(1, round(radius_px)) + 1
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
