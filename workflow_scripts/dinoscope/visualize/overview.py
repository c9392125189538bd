"""The overview of a tiled slide: the outline of its tissue, tiles kept and left out with the reason, a scale bar."""

import functools
import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dinoscope.files import atomic_path
from dinoscope.slides.grid import Grid, TileSet
from dinoscope.slides.reader import Slide
from dinoscope.slides.tissue import Tissue

__all__ = ["brightened", "draw_overview", "placeholder", "save_jpeg", "scale_bar_mm", "text_font"]

_MAX_PX, _PANEL_PX, _MIN_WIDTH_PX = 1600, 1100, 760
_MARGIN_PX, _LINE_PX, _TITLE_PX, _TEXT_PX = 16, 26, 24, 16
_OUTLINE = (0, 158, 115)
# told apart by the colour-blind too; the second one on dark slides
_KEPT, _KEPT_ON_DARK = (0, 90, 181), (86, 180, 233)
# why a tile that holds tissue was left out: colour and words
_REASONS = {
    "tissue": ((240, 150, 0), "too little tissue"),
    "white": ((86, 200, 255), "too white"),
    "black": ((0, 0, 0), "too black"),
    "grey": ((130, 130, 130), "too grey"),
    "pen": ((230, 0, 190), "pen ink"),
    "focus": ((250, 235, 40), "out of focus"),
}
_GRID_OPACITY, _DROPPED_OPACITY = 0.8, 0.4
_INK, _PAPER = (20, 20, 20), (255, 255, 255)


def draw_overview(slide: Slide, tissue: Tissue, grids: Sequence[Grid]) -> np.ndarray:
    """Draws the overview: one picture of the slide for each grid, side by side or below each other.

    Args:
        slide: The slide; its micrometres a pixel must be known.
        tissue: Its tissue, drawn as an outline.
        grids: The tiles. Kept ones are drawn as squares, those left out although they hold tissue as tinted ones in the
            colour of the reason.

    Returns:
        uint8 array (height, width, 3), RGB.
    """
    picture, colour = _picture(slide, tissue, _MAX_PX if len(grids) < 2 else _PANEL_PX), _KEPT
    if tissue.method == "fluorescence":
        picture, colour = brightened(picture), _KEPT_ON_DARK
    scale = picture.shape[1] / slide.width
    panels = [_with_outline(_with_tiles(picture, grid, scale, colour), tissue, scale) for grid in grids]
    panels = panels or [_with_outline(picture, tissue, scale)]
    columns = 1 if len(panels) == 1 or picture.shape[1] > 1.4 * picture.shape[0] else 2
    reasons = [reason for reason in _REASONS if any(reason in grid.dropped for grid in grids)]
    paper, corners = _framed(panels, columns, num_lines=2 + len(grids) + bool(reasons))
    canvas = Image.fromarray(paper)
    _write_text(canvas, slide, tissue, grids, colour, reasons)
    for number, corner in enumerate(corners):
        _draw_scale_bar(canvas, corner, picture.shape, slide.mpp / scale)
        if len(panels) > 1:
            _draw_label(canvas, corner, grids[number].tile_set)
    return np.asarray(canvas)


def _picture(slide: Slide, tissue: Tissue, max_px: int) -> np.ndarray:
    """The whole slide, at most `max_px` on its longer side: what tissue was found on, where that is large enough."""
    longest = max(slide.width, slide.height)
    size = tuple(max(1, round(side * min(1.0, max_px / longest))) for side in (slide.width, slide.height))
    if tissue.image is None or max(tissue.image.shape[:2]) < max(size):
        return slide.thumbnail(max_px)
    step = size[0] / slide.width * tissue.downsample
    whole = (round(tissue.image.shape[1] * step), round(tissue.image.shape[0] * step))
    return cv2.resize(tissue.image, whole, interpolation=cv2.INTER_AREA)[: size[1], : size[0]]


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
    draw.text((256, 192), text, fill=_INK, font=text_font(_TITLE_PX), anchor="mm")
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
def text_font(size_px: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans as matplotlib ships it (not imported: that takes long); Pillow's own font knows ASCII only."""
    found = importlib.util.find_spec("matplotlib")
    for folder in found.submodule_search_locations if found else []:
        path = Path(folder) / "mpl-data/fonts/ttf/DejaVuSans.ttf"
        if path.is_file():
            return ImageFont.truetype(str(path), size_px)
    return ImageFont.load_default(size_px)


def _with_tiles(picture: np.ndarray, grid: Grid, scale: float, colour: tuple[int, int, int]) -> np.ndarray:
    side = grid.reading.footprint_px * scale
    for reason, corners in grid.dropped.items():
        picture = _with_squares(picture, corners, scale, side, _REASONS[reason][0], cv2.FILLED, _DROPPED_OPACITY)
        if side >= 5:
            picture = _with_squares(picture, corners, scale, side, _REASONS[reason][0], 1, _GRID_OPACITY)
    kept = np.stack([grid.x, grid.y], axis=1)
    thickness = 1 if side >= 5 else cv2.FILLED
    # a dense grid must not hide the tissue
    opacity = _GRID_OPACITY if side >= 12 else _GRID_OPACITY / 2
    return _with_squares(picture, kept, scale, side, colour, thickness, opacity)


def _with_squares(
    picture: np.ndarray,
    corners: np.ndarray,
    scale: float,
    side: float,
    colour: tuple[int, int, int],
    thickness: int,
    opacity: float,
) -> np.ndarray:
    drawn = picture.copy()
    first, last = np.rint(corners * scale).astype(int).tolist(), np.rint(corners * scale + side).astype(int) - 1
    for start, end in zip(first, last.tolist(), strict=True):
        cv2.rectangle(drawn, start, end, colour, thickness)
    return cv2.addWeighted(drawn, opacity, picture, 1 - opacity, 0)


def _with_outline(picture: np.ndarray, tissue: Tissue, scale: float) -> np.ndarray:
    height, width = picture.shape[:2]
    step = tissue.downsample * scale
    to_mask = np.array([[1 / step, 0, 0.5 / step - 0.5], [0, 1 / step, 0.5 / step - 0.5]])
    flags = cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP
    mask = cv2.warpAffine(tissue.mask.astype(np.uint8), to_mask, (width, height), flags=flags)
    contours = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)[0]
    return cv2.drawContours(picture.copy(), contours, -1, _OUTLINE, 2)


def _framed(panels: Sequence[np.ndarray], columns: int, num_lines: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """The panels on white paper with room for the title above and `num_lines` of legend below, and their corners."""
    height, width = panels[0].shape[:2]
    rows = -(-len(panels) // columns)
    top, below = 2 * _MARGIN_PX + _TITLE_PX, _MARGIN_PX + num_lines * _LINE_PX
    paper_height = top + rows * (height + _MARGIN_PX) + below
    paper = np.full(
        (paper_height, max(columns * (width + _MARGIN_PX), _MIN_WIDTH_PX + _MARGIN_PX) + _MARGIN_PX, 3),
        _PAPER,
        np.uint8,
    )
    corners = []
    for number, panel in enumerate(panels):
        y, x = top + number // columns * (height + _MARGIN_PX), _MARGIN_PX + number % columns * (width + _MARGIN_PX)
        paper[y : y + height, x : x + width] = panel
        cv2.rectangle(paper, (x - 1, y - 1), (x + width, y + height), (190, 190, 190), 1)
        corners.append((x, y))
    return paper, corners


def _write_text(
    canvas: Image.Image,
    slide: Slide,
    tissue: Tissue,
    grids: Sequence[Grid],
    kept_colour: tuple[int, int, int],
    reasons: Sequence[str],
) -> None:
    draw, font = ImageDraw.Draw(canvas), text_font(_TEXT_PX)
    room = canvas.width - 2 * _MARGIN_PX
    title = text_font(_TITLE_PX)
    draw.text((_MARGIN_PX, _MARGIN_PX - 2), _fitted(draw, slide.slide_id, title, room), fill=_INK, font=title)
    size_mm = " × ".join(f"{pixels * slide.mpp / 1000:.2f}" for pixels in (slide.width, slide.height))
    facts = f"{slide.width} × {slide.height} px, {size_mm} mm, {slide.mpp:.4g} µm a pixel"
    lines = [
        (None, facts),
        (_OUTLINE, f"tissue: {tissue.area_mm2:.3g} mm², method {tissue.method} ({tissue.reason})"),
        *((kept_colour, _caption(grid)) for grid in grids),
    ]
    top = canvas.height - _MARGIN_PX - (len(lines) + bool(reasons)) * _LINE_PX
    for number, (colour, text) in enumerate(lines):
        y = top + number * _LINE_PX
        if colour is not None:
            draw.rectangle((_MARGIN_PX, y + 3, _MARGIN_PX + 16, y + 19), outline=colour, width=3)
        left = _MARGIN_PX + (26 if colour is not None else 0)
        draw.text((left, y), _fitted(draw, text, font, canvas.width - _MARGIN_PX - left), fill=_INK, font=font)
    _write_reasons(draw, top + len(lines) * _LINE_PX, reasons)


def _write_reasons(draw: ImageDraw.ImageDraw, y: int, reasons: Sequence[str]) -> None:
    """One line: left out, and why, each reason with its colour."""
    font, x = text_font(_TEXT_PX), _MARGIN_PX
    for text, colour in [("left out:", None), *((_REASONS[reason][1], _REASONS[reason][0]) for reason in reasons)]:
        if colour is not None:
            pale = tuple(round(255 + (value - 255) * 0.6) for value in colour)
            draw.rectangle((x, y + 3, x + 16, y + 19), fill=pale, outline=colour, width=1)
            x += 24
        draw.text((x, y), text, fill=_INK, font=font)
        x += round(draw.textlength(text, font)) + 20


def _draw_label(canvas: Image.Image, corner: tuple[int, int], tile_set: TileSet) -> None:
    """The set's name and resolution in the upper left of its picture."""
    draw, font = ImageDraw.Draw(canvas), text_font(_TEXT_PX)
    text = f"{tile_set.name}, {tile_set.mpp:g} µm a pixel"
    left, top = corner
    draw.rectangle((left, top, left + draw.textlength(text, font) + 16, top + 26), fill=_PAPER, outline=_INK)
    draw.text((left + 8, top + 3), text, fill=_INK, font=font)


def _caption(grid: Grid) -> str:
    wanted = grid.tile_set
    reasons = [f"{len(grid.dropped[name])} {words}" for name, (_, words) in _REASONS.items() if name in grid.dropped]
    return (
        f"{wanted.name}: {len(grid)} tiles of {wanted.tile_px} px at {wanted.mpp:g} µm a pixel "
        f"(of {grid.num_candidates}; at least {100 * grid.min_tissue:.2g} % tissue"
        + (f"; left out: {', '.join(reasons)})" if reasons else ")")
    )


def _fitted(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont, room_px: int) -> str:
    """The text, its end replaced by an ellipsis where it is too long."""
    if draw.textlength(text, font) <= room_px:
        return text
    while text and draw.textlength(text + "…", font) > room_px:
        text = text[:-1]
    return text + "…"


def _draw_scale_bar(canvas: Image.Image, corner: tuple[int, int], picture_shape: tuple[int, ...], mpp: float) -> None:
    """Draws a bar with its length in the lower right of the picture at `corner`; `mpp` is that of the picture."""
    height, width = picture_shape[:2]
    length_mm = scale_bar_mm(width * mpp / 1000)
    length = round(length_mm * 1000 / mpp)
    draw, font = ImageDraw.Draw(canvas), text_font(_TEXT_PX)
    text = f"{length_mm:g} mm"
    box_width = max(length, round(draw.textlength(text, font))) + 20
    right, bottom = corner[0] + width - 8, corner[1] + height - 8
    draw.rectangle((right - box_width, bottom - 44, right, bottom), fill=_PAPER)
    middle = right - box_width / 2
    draw.text((middle, bottom - 42), text, fill=_INK, font=font, anchor="ma")
    draw.rectangle((middle - length / 2, bottom - 14, middle + length / 2, bottom - 8), fill=_INK)
