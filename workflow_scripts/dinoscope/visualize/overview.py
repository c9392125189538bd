"""The overview of a tiled slide: the slide, the outline of its tissue, the kept tiles of each set, a scale bar."""

import functools
import importlib.util
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dinoscope.files import atomic_path
from dinoscope.slides.grid import Grid
from dinoscope.slides.reader import Slide
from dinoscope.slides.tissue import Tissue

__all__ = ["brightened", "draw_overview", "placeholder", "save_jpeg", "scale_bar_mm"]

_MAX_PX, _MIN_WIDTH_PX = 1600, 760
_MARGIN_PX, _LINE_PX, _TITLE_PX, _TEXT_PX = 16, 26, 24, 16
_OUTLINE = (0, 158, 115)
# told apart by the colour-blind too; the second row on dark slides
_SET_COLOURS = ((0, 90, 181), (230, 120, 0), (170, 60, 140), (120, 94, 20))
_SET_COLOURS_ON_DARK = ((86, 180, 233), (240, 150, 0), (225, 130, 190), (240, 228, 66))
_GRID_OPACITY = 0.8
_INK, _PAPER = (20, 20, 20), (255, 255, 255)


def draw_overview(slide: Slide, tissue: Tissue, grids: Sequence[Grid]) -> np.ndarray:
    """Draws the overview.

    Args:
        slide: The slide; its micrometres a pixel must be known.
        tissue: Its tissue, drawn as an outline.
        grids: The tiles, one grid a set, each drawn in a colour of its own.

    Returns:
        uint8 array (height, width, 3), RGB.
    """
    picture, colours = slide.thumbnail(_MAX_PX), itertools.cycle(_SET_COLOURS)
    if tissue.method == "fluorescence":
        picture, colours = brightened(picture), itertools.cycle(_SET_COLOURS_ON_DARK)
    coloured = list(zip(grids, colours, strict=False))
    scale = picture.shape[1] / slide.width
    for grid, colour in coloured:
        picture = _with_tiles(picture, grid, scale, colour)
    picture = _with_outline(picture, tissue, scale)
    canvas = Image.fromarray(_framed(picture, num_lines=2 + len(grids)))
    _write_text(canvas, slide, tissue, coloured)
    _draw_scale_bar(canvas, picture.shape, slide.mpp / scale)
    return np.asarray(canvas)


def brightened(picture: np.ndarray) -> np.ndarray:
    """A dark picture stretched so that its brightest parts are bright and its middle tones can be seen.

    Every channel gets at least 0.45 of the brightest: the eye hardly sees pure blue, which is what DAPI looks like.
    """
    low, high = np.percentile(picture.max(axis=2), (1, 99.5))
    stretched = np.clip((picture.astype(np.float32) - low) / max(high - low, 1), 0, 1) ** 0.6
    return np.rint(255 * np.maximum(stretched, 0.45 * stretched.max(axis=2, keepdims=True))).astype(np.uint8)


def placeholder(text: str) -> np.ndarray:
    """A grey card with a line of text, in place of a picture that cannot be made; uint8 (height, width, 3)."""
    card = Image.new("RGB", (512, 384), (225, 225, 225))
    draw = ImageDraw.Draw(card)
    draw.text((256, 192), text, fill=_INK, font=_font(_TITLE_PX), anchor="mm")
    return np.asarray(card)


def save_jpeg(image: np.ndarray, path: str | Path, quality: int = 88) -> None:
    """Writes an RGB array as JPEG, whole or not at all."""
    with atomic_path(path) as temporary:
        Image.fromarray(image).save(temporary, format="JPEG", quality=quality, subsampling=0)


def scale_bar_mm(width_mm: float) -> float:
    """The longest of 1, 2 and 5 times a power of ten that is at most a quarter of `width_mm`."""
    limit = width_mm / 4
    power = 10.0 ** math.floor(math.log10(limit))
    return max(step * power for step in (1, 2, 5) if step * power <= limit * (1 + 1e-9))


@functools.cache
def _font(size_px: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans as matplotlib ships it (not imported: that takes long); Pillow's own font knows ASCII only."""
    found = importlib.util.find_spec("matplotlib")
    for folder in found.submodule_search_locations if found else []:
        path = Path(folder) / "mpl-data/fonts/ttf/DejaVuSans.ttf"
        if path.is_file():
            return ImageFont.truetype(str(path), size_px)
    return ImageFont.load_default(size_px)


def _with_tiles(picture: np.ndarray, grid: Grid, scale: float, colour: tuple[int, int, int]) -> np.ndarray:
    drawn = picture.copy()
    side = grid.reading.footprint_px * scale
    thickness = 1 if side >= 5 else cv2.FILLED
    for left, top in zip((grid.x * scale).tolist(), (grid.y * scale).tolist(), strict=True):
        corners = (round(left), round(top)), (round(left + side) - 1, round(top + side) - 1)
        cv2.rectangle(drawn, *corners, colour, thickness)
    opacity = _GRID_OPACITY if thickness == 1 else _GRID_OPACITY / 2
    return cv2.addWeighted(drawn, opacity, picture, 1 - opacity, 0)


def _with_outline(picture: np.ndarray, tissue: Tissue, scale: float) -> np.ndarray:
    height, width = picture.shape[:2]
    step = tissue.downsample * scale
    to_mask = np.array([[1 / step, 0, 0.5 / step - 0.5], [0, 1 / step, 0.5 / step - 0.5]])
    flags = cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP
    mask = cv2.warpAffine(tissue.mask.astype(np.uint8), to_mask, (width, height), flags=flags)
    contours = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)[0]
    return cv2.drawContours(picture.copy(), contours, -1, _OUTLINE, 2)


def _framed(picture: np.ndarray, num_lines: int) -> np.ndarray:
    """The picture on white paper with room for the title above and `num_lines` of legend below."""
    height, width = picture.shape[:2]
    above, below = 2 * _MARGIN_PX + _TITLE_PX, 2 * _MARGIN_PX + num_lines * _LINE_PX
    paper_width = max(width, _MIN_WIDTH_PX) + 2 * _MARGIN_PX
    paper = np.full((above + height + below, paper_width, 3), _PAPER, np.uint8)
    paper[above : above + height, _MARGIN_PX : _MARGIN_PX + width] = picture
    return cv2.rectangle(paper, (_MARGIN_PX - 1, above - 1), (_MARGIN_PX + width, above + height), (190, 190, 190), 1)


def _write_text(canvas: Image.Image, slide: Slide, tissue: Tissue, coloured: Sequence[tuple[Grid, tuple]]) -> None:
    draw, font = ImageDraw.Draw(canvas), _font(_TEXT_PX)
    room = canvas.width - 2 * _MARGIN_PX
    title = _font(_TITLE_PX)
    draw.text((_MARGIN_PX, _MARGIN_PX - 2), _fitted(draw, slide.slide_id, title, room), fill=_INK, font=title)
    size_mm = " × ".join(f"{pixels * slide.mpp / 1000:.2f}" for pixels in (slide.width, slide.height))
    facts = f"{slide.width} × {slide.height} px, {size_mm} mm, {slide.mpp:.4g} µm a pixel"
    lines = [
        (None, facts),
        (_OUTLINE, f"tissue: {tissue.area_mm2:.3g} mm², method {tissue.method} ({tissue.reason})"),
        *((colour, _caption(grid)) for grid, colour in coloured),
    ]
    top = canvas.height - _MARGIN_PX - len(lines) * _LINE_PX
    for number, (colour, text) in enumerate(lines):
        y = top + number * _LINE_PX
        if colour is not None:
            draw.rectangle((_MARGIN_PX, y + 3, _MARGIN_PX + 16, y + 19), outline=colour, width=3)
        left = _MARGIN_PX + (26 if colour is not None else 0)
        draw.text((left, y), _fitted(draw, text, font, canvas.width - _MARGIN_PX - left), fill=_INK, font=font)


def _caption(grid: Grid) -> str:
    wanted = grid.tile_set
    return (
        f"{wanted.name}: {len(grid)} tiles of {wanted.tile_px} px at {wanted.mpp:g} µm a pixel "
        f"(of {grid.num_candidates}; at least {grid.min_tissue:.0%} tissue)"
    )


def _fitted(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont, room_px: int) -> str:
    """The text, its end replaced by an ellipsis where it is too long."""
    if draw.textlength(text, font) <= room_px:
        return text
    while text and draw.textlength(text + "…", font) > room_px:
        text = text[:-1]
    return text + "…"


def _draw_scale_bar(canvas: Image.Image, picture_shape: tuple[int, ...], mpp: float) -> None:
    """Draws a bar with its length in the lower right of the picture; `mpp` is that of the picture."""
    height, width = picture_shape[:2]
    length_mm = scale_bar_mm(width * mpp / 1000)
    length = round(length_mm * 1000 / mpp)
    draw, font = ImageDraw.Draw(canvas), _font(_TEXT_PX)
    text = f"{length_mm:g} mm"
    box_width = max(length, round(draw.textlength(text, font))) + 20
    right, bottom = _MARGIN_PX + width - 8, 2 * _MARGIN_PX + _TITLE_PX + height - 8
    draw.rectangle((right - box_width, bottom - 44, right, bottom), fill=_PAPER)
    middle = right - box_width / 2
    draw.text((middle, bottom - 42), text, fill=_INK, font=font, anchor="ma")
    draw.rectangle((middle - length / 2, bottom - 14, middle + length / 2, bottom - 8), fill=_INK)
