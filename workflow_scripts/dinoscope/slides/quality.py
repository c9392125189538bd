"""How good tiles are: shares of white, black, grey and pen ink, measured on the low-resolution picture; and focus.

white: the darkest channel is at least 220: bare glass, lumina, fat.
black: the brightest channel is below 25: places that were never scanned, folds, thick ink.
grey: neither, and the channels differ by at most 14: dust, bubbles, edges of cover slips, pencil.
pen: black, blue, green or red ink, by optical density: no mixture of haematoxylin, eosin and DAB is as blue, as
    green or as evenly dark, and none but blood as red. Spots below 0.1 mm do not count. Pap's light green is told
    from green ink by its lack of absorption in blue.
focus: variance of the Laplacian (Pech-Pacheco et al. 2000) of the grey tile at its own micrometres a pixel, in
    squared grey levels: the lower, the blurrier; plain tiles are low as well. It needs every tile's pixels.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from dinoscope.slides.padding import read_tile
from dinoscope.slides.reader import Slide
from dinoscope.slides.resample import average_squares, square_shares
from dinoscope.slides.tissue import Tissue, with_picture

__all__ = ["NO_LIMITS", "SHARES", "QualityLimits", "QualityMaps", "pen_ink", "quality_maps", "tile_focus"]

SHARES = ("white", "black", "grey", "pen")
_WHITE, _BLACK, _GREY_SPREAD = 220, 25, 14
_FINEST_MPP, _PEN_MPP, _GAP_UM, _SPOT_UM = 8.0, 24.0, 50.0, 30.0
_GROUND, _LIGHTER_THAN_INK = 245.0, 100


@dataclass(frozen=True)
class QualityLimits:
    """What a tile may be like to be kept; None, anything.

    Attributes:
        max_white, max_black, max_grey, max_pen: Largest shares of the tile's area, 0 to 1.
        min_focus: Least variance of the Laplacian, squared grey levels.
        measure_focus: Whether focus is measured although there is no `min_focus`.
    """

    max_white: float | None = None
    max_black: float | None = None
    max_grey: float | None = None
    max_pen: float | None = None
    min_focus: float | None = None
    measure_focus: bool = False

    @property
    def needs_focus(self) -> bool:
        """Whether tiles must be read."""
        return self.measure_focus or self.min_focus is not None

    def most(self, name: str) -> float | None:
        """The largest share of one of `SHARES`."""
        return getattr(self, f"max_{name}")


NO_LIMITS = QualityLimits()


@dataclass(frozen=True)
class QualityMaps:
    """Running sums of where a slide is white, black, grey or inked.

    Attributes:
        sums: Of each of `SHARES` the sums above and left of every pixel's corner, (height + 1, width + 1); None where
            there is none of it.
        downsamples: Side of a pixel of each in level-0 pixels.
    """

    sums: dict[str, np.ndarray | None]
    downsamples: dict[str, float]

    def shares(self, name: str, x: np.ndarray, y: np.ndarray, side: int) -> np.ndarray:
        """Share of the squares at columns `x` and rows `y` (level-0 pixels); float64 (rows, columns)."""
        sums = self.sums[name]
        return np.zeros((len(y), len(x))) if sums is None else square_shares(sums, self.downsamples[name], x, y, side)


def quality_maps(slide: Slide, tissue: Tissue) -> QualityMaps:
    """Measures a slide on the picture that goes with its tissue.

    Raises:
        SlideError: The slide cannot be read.
    """
    tissue = with_picture(slide, tissue)
    fine = max(1, math.ceil(_FINEST_MPP / tissue.mpp - 1e-6))
    coarse = max(1, round(_PEN_MPP / tissue.mpp))
    if tissue.extremes is not None and fine == 1:
        masks = _plain_masks(*tissue.extremes)
    else:
        planes = cv2.split(average_squares(tissue.image, fine))
        masks = _plain_masks(functools.reduce(cv2.max, planes), functools.reduce(cv2.min, planes))
    masks["pen"] = pen_ink(average_squares(tissue.image, coarse), tissue.mpp * coarse)
    sums = {name: cv2.integral(mask) if cv2.countNonZero(mask) else None for name, mask in masks.items()}
    factors = dict.fromkeys(SHARES, fine) | {"pen": coarse}
    return QualityMaps(sums, {name: tissue.downsample * factor for name, factor in factors.items()})


def pen_ink(image: np.ndarray, mpp: float) -> np.ndarray:
    """Where ink is.

    Args:
        image: uint8 (height, width, 3), RGB.
        mpp: Micrometres a pixel, 8 to 40.

    Returns:
        uint8 (height, width), 1 for ink.
    """
    ink = _ink_coloured(image)
    if not ink.any():
        return ink
    ink = cv2.morphologyEx(ink, cv2.MORPH_CLOSE, _disc(_GAP_UM / mpp))
    return cv2.morphologyEx(ink, cv2.MORPH_OPEN, _disc(_SPOT_UM / mpp))


def tile_focus(
    slide: Slide, x: Sequence[int], y: Sequence[int], level: int, read_px: int, tile_px: int, footprint_px: int
) -> Iterator[float]:
    """Reads the tiles (see `padding.read_tile`) and yields the variance of each one's Laplacian."""
    for left, top in zip(x, y, strict=True):
        tile = read_tile(slide, int(left), int(top), level, read_px, tile_px, footprint_px)
        laplacian = cv2.Laplacian(cv2.cvtColor(tile, cv2.COLOR_RGB2GRAY), cv2.CV_16S)
        yield float(cv2.meanStdDev(laplacian)[1][0, 0] ** 2)


def _plain_masks(brightest: np.ndarray, darkest: np.ndarray) -> dict[str, np.ndarray]:
    """Where the brightest and the darkest channel make a pixel white, black or grey; uint8, 0 or 1."""
    white = cv2.threshold(darkest, _WHITE - 1, 1, cv2.THRESH_BINARY)[1]
    black = cv2.threshold(brightest, _BLACK - 1, 1, cv2.THRESH_BINARY_INV)[1]
    grey = cv2.subtract(brightest, darkest)
    cv2.threshold(grey, _GREY_SPREAD, 1, cv2.THRESH_BINARY_INV, grey)
    for plain in (white, black):
        cv2.subtract(grey, plain, grey)
    return {"white": white, "black": black, "grey": grey}


def _ink_coloured(image: np.ndarray) -> np.ndarray:
    """Where the colour is ink's; uint8 (height, width), 1 for ink."""
    ink = np.zeros(image.shape[:2], np.uint8)
    dark = np.flatnonzero(functools.reduce(cv2.min, cv2.split(image)) < _LIGHTER_THAN_INK)
    density = np.clip(-np.log10((np.arange(256) + 0.5) / _GROUND), 0, None)
    red, green, blue = density[image.reshape(-1, 3)[dark].T]
    mean = (red + green + blue) / 3
    spread = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
    black = (mean > 0.5) & (spread < 0.22 * mean) | (mean > 0.85) & (spread < 0.28 * mean)
    is_green = (red > 0.42) & (red > 1.25 * green) & (blue > 1.12 * green)
    unlike_light_green = (green > 0.55 * red) | (red > 1.1)
    is_blue = (red > 0.42) & (red > 1.12 * green) & (blue < 0.75 * red) & (blue < green) & unlike_light_green
    blue_on_tissue = (red > 0.75) & (red > green) & (blue < 0.6 * red)
    is_red = (green > 0.55) & (blue > 0.65 * green) & (blue < 1.15 * green) & (red < 0.35 * green)
    ink.ravel()[dark] = black | is_green | is_blue | blue_on_tissue | is_red
    return ink


def _disc(radius_px: float) -> np.ndarray:
    side = 2 * max(1, round(radius_px)) + 1
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
