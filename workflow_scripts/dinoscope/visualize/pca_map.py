"""Draws the PCA map of a slide: its tiles in the colours of their features, over the dimmed slide.

A canvas pixel is `scale` times a level-0 pixel; everything is painted at the size that is saved, so that tiles keep
sharp edges.
"""

import os

import cv2
import numpy as np
from PIL import Image

from dinoscope.errors import FeaturesError
from dinoscope.features.writers import FeatureFile, FeatureInfo
from dinoscope.visualize.color_basis import ColorBasis
from dinoscope.visualize.page import FOOTER_PX, HEADER_PX, MARGIN_PX, Page, fitted, scale_bar_um

__all__ = [
    "MapPainter",
    "draw_map",
    "paint_tiles",
    "read_thumbnail",
    "scale_bar_um",
    "without_title",
]

LONGEST_PX, SHORTEST_WIDTH_PX = 1600, 1000
OUTLINE = (150, 150, 150)  # of a tile
TEXTURE = 0.3  # how much of the tissue's light and dark shows through a tile


def draw_map(
    output: str | os.PathLike[str],
    file: FeatureFile,
    basis: ColorBasis,
    thumbnail: np.ndarray,
    *,
    slide_name: str | None = None,
) -> None:
    """Saves the PCA map of one slide as a PNG.

    Args:
        output: The PNG.
        file: The slide's features.
        basis: The colour space of their model.
        thumbnail: The whole slide, (h, w, 3) uint8.
        slide_name: For the title; the slide's id when not given.
    """
    info, painter = file.info, MapPainter(thumbnail, LONGEST_PX)
    picture, is_skipped = painter.pca(file, basis), painter.is_skipped(info)
    explained = 100 * basis.info["explained_by_top_3"]
    _save(
        output,
        picture,
        title=slide_name or info.slide_id,
        subtitle=(
            f"PCA of the features of model {info.model} · {tiles_in_words(file)}{_background_in_words(file, basis)} · "
            f"3 components explain {explained:.0f} % of the variance"
        ),
        basis=basis,
        um_per_px=painter.um_per_px(info),
        message="No tiles: the slide was skipped" if is_skipped else _message(basis, file.features),
    )


def tiles_in_words(file: FeatureFile) -> str:
    """Number and size of a slide's tiles."""
    if not len(file.coords):
        return "no tiles"
    return f"{len(file.coords):,} tiles of {file.info.tile_px * file.info.mpp:.0f} µm"


def _background_in_words(file: FeatureFile, basis: ColorBasis) -> str:
    """How many tiles are not coloured, where the basis leaves background out."""
    return f", of which {basis.is_background(file.features).sum():,} background" if basis.gate is not None else ""


class MapPainter:
    """Paints the tiles of one slide over the dimmed slide.

    Attributes:
        canvas: (h, w, 3) uint8, the slide as it is.
    """

    def __init__(self, thumbnail: np.ndarray, longest_px: int) -> None:
        self.canvas = fitted(thumbnail, longest_px)
        self._dimmed, self._is_dark = _dimmed(self.canvas)

    def is_skipped(self, info: FeatureInfo) -> bool:
        """Whether nothing is known of the slide because it could not be read."""
        return not info.level0_width

    def um_per_px(self, info: FeatureInfo) -> float | None:
        """Micrometres a pixel of the picture, None of a slide that could not be read."""
        return None if self.is_skipped(info) else info.level0_mpp * info.level0_width / self.canvas.shape[1]

    def pca(self, file: FeatureFile, basis: ColorBasis) -> np.ndarray:
        """The tiles in the colours of their features; background, where the basis tells it, is left free."""
        shown = ~basis.is_background(file.features)
        return self.tiles(file, basis.colors(file.features), shown)

    def tiles(self, file: FeatureFile, colors: np.ndarray, shown: np.ndarray | None = None) -> np.ndarray:
        """The tiles in the given colours, (N, 3) uint8, or those of them where `shown`, bool (N,), says so."""
        info, picture = file.info, self._dimmed.copy()
        shown = np.ones(len(colors), bool) if shown is None else shown
        if shown.any():
            scale = self.canvas.shape[1] / info.level0_width
            side = info.patch_size_level0 * (1 - info.overlap_px / info.tile_px)
            corners = (file.coords[shown] + (info.patch_size_level0 - side) / 2) * scale
            paint_tiles(picture, self.canvas, corners, side * scale, colors[shown], is_dark=self._is_dark)
        return picture


def paint_tiles(
    picture: np.ndarray,
    canvas: np.ndarray,
    corners: np.ndarray,
    side: float,
    colors: np.ndarray,
    *,
    is_dark: bool = False,
) -> None:
    """Paints squares into `picture`, with a little of the light and dark of `canvas` inside them.

    Args:
        picture: (h, w, 3) uint8, changed in place.
        canvas: (h, w, 3) uint8, the slide at the same scale.
        corners: (N, 2) top-left corners in canvas pixels, x before y.
        side: Of a square in canvas pixels.
        colors: (N, 3) uint8.
        is_dark: The slide is bright on black (fluorescence).
    """
    texture = _luminance(canvas)
    texture = texture / max(float(np.percentile(texture, 99)), 1e-6) if is_dark else texture
    shade = (1 - TEXTURE) + TEXTURE * np.clip(texture, 0, 1)
    gap = 2 if side >= 60 else 1 if side >= 8 else 0
    starts = np.rint(corners).astype(int).clip(0)
    ends = np.maximum(np.rint(corners + side).astype(int) - gap, starts + 1)
    if gap:  # lines around the tiles: pale ones show on pale ground, dark ones on dark ground
        for start, end in zip(starts - 1, ends, strict=True):
            cv2.rectangle(picture, start.tolist(), end.tolist(), OUTLINE, 1)
    for (left, top), (right, bottom), color in zip(starts, ends, colors, strict=True):
        picture[top:bottom, left:right] = shade[top:bottom, left:right, None] * color


def read_thumbnail(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads a thumbnail as (h, w, 3) uint8, RGB.

    Raises:
        FeaturesError: The file is missing or no image.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise FeaturesError(f"{path}: cannot be read as a picture ({error}); inspect the slide again") from error


def without_title(image: Image.Image) -> Image.Image:
    """A map without its title and side margins, for places that say in words what it is of."""
    return image.crop((MARGIN_PX, HEADER_PX, image.width - MARGIN_PX, image.height))


def _message(basis: ColorBasis, features: np.ndarray) -> str:
    if not len(features):
        return "No tiles: no tissue was found on this slide"
    outside = basis.share_outside(features)
    if outside <= 0.5:
        return ""
    return f"{100 * outside:.0f} % of the tiles are unlike all that the colours were made for, and hard to tell apart"


def _luminance(image: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32) / 255


def _dimmed(canvas: np.ndarray) -> tuple[np.ndarray, bool]:
    """The slide in pale grey, or in dark grey where it is bright on black; and which of the two."""
    grey = _luminance(canvas)
    is_dark = bool(np.median(grey) < 0.35)
    if is_dark:
        dimmed = 0.45 * np.clip(grey / max(float(np.percentile(grey, 99.5)), 1e-6), 0, 1)
    else:
        dimmed = 1 - 0.4 * (1 - grey)
    return np.repeat(np.rint(dimmed * 255).astype(np.uint8)[..., None], 3, axis=2), is_dark


def _save(
    output: str | os.PathLike[str],
    picture: np.ndarray,
    *,
    title: str,
    subtitle: str,
    basis: ColorBasis,
    um_per_px: float | None,
    message: str,
) -> None:
    height_px, width_px = picture.shape[:2]
    page = Page(max(width_px, SHORTEST_WIDTH_PX) + 2 * MARGIN_PX, height_px + HEADER_PX + FOOTER_PX)
    page.picture((page.width - width_px) / 2, HEADER_PX, picture)
    text_width = page.width - 2 * MARGIN_PX
    page.text(MARGIN_PX, 34, title, 13, text_width, weight="bold")
    page.text(MARGIN_PX, 74, subtitle, 9.5, text_width, color="#444444")
    if message:
        box = {"boxstyle": "round,pad=0.6", "facecolor": "white", "edgecolor": "#888888"}
        page.text(page.width / 2, HEADER_PX + 46, message, 11, page.width - 6 * MARGIN_PX, ha="center", bbox=box)
    middle = page.height - FOOTER_PX / 2
    if um_per_px is not None:
        page.scale_bar(um_per_px, width_px, middle)
    ratios = basis.info["explained_variance_ratio"]
    names = zip(("#d40000", "#009a00", "#0000e6"), ("red", "green", "blue"), strict=True)
    page.key(
        [(color, f"{name}: component {n + 1}, {100 * ratios[n]:.0f} %") for n, (color, name) in enumerate(names)],
        middle,
    )
    page.save(output)
