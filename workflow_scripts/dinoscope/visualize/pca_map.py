"""Draws the PCA map of a slide: its tiles in the colours of their features, over the dimmed slide.

A canvas pixel is `scale` times a level-0 pixel; everything is painted at the size that is saved, so that tiles keep
sharp edges.
"""

import os
import warnings
from dataclasses import dataclass

import cv2
import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from PIL import Image

from dinoscope.errors import FeaturesError
from dinoscope.features.writers import FeatureFile
from dinoscope.files import atomic_path
from dinoscope.visualize.pca import ColorBasis

__all__ = ["draw_map", "paint_tiles", "read_thumbnail", "scale_bar_um", "without_title"]

LONGEST_PX, SHORTEST_WIDTH_PX, DPI = 1600, 1000, 150
HEADER_PX, FOOTER_PX, MARGIN_PX = 104, 84, 24
FRAME_GREY = 200
OUTLINE = (150, 150, 150)  # of a tile
TEXTURE = 0.3  # how much of the tissue's light and dark shows through a tile
WIDER_ALPHABETS = ("Noto Sans CJK JP", "Noto Sans CJK SC", "WenQuanYi Zen Hei", "IPAGothic", "Droid Sans Fallback")


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
    info = file.info
    canvas = _fit_canvas(thumbnail)
    is_skipped = not info.level0_width  # nothing is known of a slide that could not be read
    scale = canvas.shape[1] / (info.level0_width or canvas.shape[1])
    picture, is_dark = _dimmed(canvas)
    if len(file.coords):
        side = info.patch_size_level0 * (1 - info.overlap_px / info.tile_px)
        offset = (info.patch_size_level0 - side) / 2
        corners = (file.coords + offset) * scale
        paint_tiles(picture, canvas, corners, side * scale, basis.colors(file.features), is_dark=is_dark)
    explained = 100 * basis.info["explained_by_top_3"]
    tile_um = info.tile_px * info.mpp
    tiles = f"{len(file.coords):,} tiles of {tile_um:.0f} µm" if len(file.coords) else "no tiles"
    _save(
        output,
        picture,
        title=slide_name or info.slide_id,
        subtitle=(
            f"PCA of the features of model {info.model} · {tiles} · "
            f"3 components explain {explained:.0f} % of the variance"
        ),
        basis=basis,
        um_per_px=None if is_skipped else info.level0_mpp / scale,
        message="No tiles: the slide was skipped" if is_skipped else _message(basis, file.features),
    )


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


def scale_bar_um(width_um: float) -> float:
    """The longest of 1, 2, 5, 10, 20, 50 … micrometres that is at most a fifth of `width_um`."""
    power = 10.0 ** np.floor(np.log10(width_um / 5))
    return float(max(step * power for step in (1, 2, 5) if step * power <= width_um / 5))


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


def _fit_canvas(thumbnail: np.ndarray) -> np.ndarray:
    height, width = thumbnail.shape[:2]
    factor = LONGEST_PX / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return cv2.resize(thumbnail, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC)


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


@dataclass(frozen=True)
class _Page:
    """A figure whose coordinates are pixels from the top left."""

    figure: Figure
    width: int
    height: int

    def text(self, x: float, y: float, text: str, size: float, max_width: float, **style: object) -> float:
        """Writes a line, smaller or with its middle left out if it would not fit, and returns its width."""
        place = (x / self.width, 1 - y / self.height)
        label = self.figure.text(*place, text, size=size, va="center", parse_math=False, **style)
        if self._width(label) > max_width:
            label.set_size(max(0.7 * size, size * max_width / self._width(label)))
        while self._width(label) > max_width:
            half = int(len(label.get_text()) * max_width / self._width(label) / 2) - 1
            label.set_text(f"{text[:half]}…{text[-half:]}")
        return self._width(label)

    def _width(self, label: Text) -> float:
        return label.get_window_extent(self.figure.canvas.get_renderer()).width

    def rectangle(self, x: float, y: float, width: float, height: float, color: str) -> None:
        place = (x / self.width, 1 - (y + height) / self.height)
        size = (width / self.width, height / self.height)
        self.figure.add_artist(Rectangle(place, *size, transform=self.figure.transFigure, color=color, linewidth=0))


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
    page_width = max(width_px, SHORTEST_WIDTH_PX) + 2 * MARGIN_PX
    page_height = height_px + HEADER_PX + FOOTER_PX
    figure = Figure(figsize=(page_width / DPI, page_height / DPI), dpi=DPI, facecolor="white")
    page = _Page(figure, page_width, page_height)
    FigureCanvasAgg(figure)
    left = (page_width - width_px) / 2
    picture[[0, -1]] = picture[:, [0, -1]] = FRAME_GREY
    figure.figimage(picture, xo=round(left), yo=FOOTER_PX, origin="upper")
    families = ["DejaVu Sans", *_installed(WIDER_ALPHABETS)]
    with matplotlib.rc_context({"font.family": families}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        text_width = page_width - 2 * MARGIN_PX
        page.text(MARGIN_PX, 34, title, 13, text_width, weight="bold")
        page.text(MARGIN_PX, 74, subtitle, 9.5, text_width, color="#444444")
        if message:
            _write_message(page, message, HEADER_PX + 46)
        _draw_footer(page, basis, um_per_px, width_px)
        with atomic_path(output) as temporary:
            figure.savefig(temporary, format="png", dpi=DPI, metadata={"Software": None})


def _write_message(page: _Page, message: str, y: float) -> None:
    box = {"boxstyle": "round,pad=0.6", "facecolor": "white", "edgecolor": "#888888"}
    page.text(page.width / 2, y, message, 11, page.width - 6 * MARGIN_PX, ha="center", bbox=box)


def _draw_footer(page: _Page, basis: ColorBasis, um_per_px: float | None, width_px: int) -> None:
    middle = page.height - FOOTER_PX / 2
    if um_per_px is not None:
        length_um = scale_bar_um(width_px * um_per_px)
        length_px = length_um / um_per_px
        label = f"{length_um / 1000:g} mm" if length_um >= 100 else f"{length_um:g} µm"
        page.rectangle(MARGIN_PX, middle - 5, length_px, 10, "black")
        page.text(MARGIN_PX + length_px + 14, middle, label, 10, 200)
    names = zip(("#d40000", "#009a00", "#0000e6"), ("red", "green", "blue"), strict=True)
    ratios = basis.info["explained_variance_ratio"]
    right = page.width - MARGIN_PX
    for number, (color, name) in reversed(list(enumerate(names))):
        words = f"{name}: component {number + 1}, {100 * ratios[number]:.0f} %"
        taken = page.text(right, middle, words, 9, 400, ha="right")
        page.rectangle(right - taken - 26, middle - 9, 18, 18, color)
        right -= taken + 26 + 30


def _installed(families: tuple[str, ...]) -> list[str]:
    names = {font.name for font in fontManager.ttflist}
    return [family for family in families if family in names]
