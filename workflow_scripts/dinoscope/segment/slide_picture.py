"""The overview of a segmented slide: the slide beside its classes in colour, with the area of each."""

import os

import cv2
import numpy as np

from dinoscope.segment.class_map import UNKNOWN, ClassMap
from dinoscope.slides.reader import Slide
from dinoscope.visualize.page import FOOTER_PX, HEADER_PX, MARGIN_PX, Page, fitted

__all__ = ["draw_segmented_slide", "painted"]

_LONGEST_PX, _GAP_PX, _LINE_PX = 1100, 20, 32
_OPACITY = 0.55


def draw_segmented_slide(
    output: str | os.PathLike[str], slide: Slide, class_map: ClassMap, areas_mm2: dict[str, float]
) -> None:
    """Saves the overview of a slide as a PNG.

    Args:
        output: The PNG.
        slide: The slide.
        class_map: Its classes.
        areas_mm2: Area of each class in square millimetres; classes without any are left out of the key.
    """
    picture = fitted(slide.thumbnail(_LONGEST_PX), _LONGEST_PX)
    height, width = picture.shape[:2]
    colored = painted(picture, _classes_at(class_map, height, width), class_map.palette)
    shown = [(index, name) for index, name in enumerate(class_map.classes) if areas_mm2[name] > 0]
    page_width = max(2 * MARGIN_PX + 2 * width + _GAP_PX, 1000)
    lines = _lines(page_width, len(shown))
    page = Page(page_width, HEADER_PX + height + FOOTER_PX + lines * _LINE_PX)
    total = sum(areas_mm2.values())
    room = page.width - 2 * MARGIN_PX
    page.text(MARGIN_PX, 34, slide.slide_id, 13, room, weight="bold")
    words = (
        f"{total:.3g} mm² predicted at {class_map.mpp:g} µm a pixel · {len(shown)} of {len(areas_mm2)} classes found"
    )
    page.text(MARGIN_PX, 74, words, 9.5, room, color="#444444")
    page.picture(MARGIN_PX, HEADER_PX, picture)
    page.picture(MARGIN_PX + width + _GAP_PX, HEADER_PX, colored)
    bottom = HEADER_PX + height
    page.scale_bar(slide.mpp * slide.width / width, width, bottom + FOOTER_PX / 2)
    for number, (index, name) in enumerate(shown):
        row, column = divmod(number, _columns(page_width))
        x, y = MARGIN_PX + column * _COLUMN_PX, bottom + FOOTER_PX + (row + 0.3) * _LINE_PX
        page.rectangle(x - 1, y - 10, 20, 20, "#aaaaaa")  # white classes show, too
        page.rectangle(x, y - 9, 18, 18, "#{:02x}{:02x}{:02x}".format(*class_map.palette[index]))
        area = areas_mm2[name]
        page.text(x + 26, y, f"{name}: {area:.3g} mm², {100 * area / total:.3g} %", 9, _COLUMN_PX - 40)
    page.save(output)


def painted(picture: np.ndarray, classes: np.ndarray, palette: tuple[tuple[int, int, int], ...]) -> np.ndarray:
    """A picture with the colour of its class over every pixel, and the line between classes; unknown ones are paler.

    Args:
        picture: uint8 (h, w, 3).
        classes: uint8 (h, w), `UNKNOWN` where nothing is known.
        palette: RGB of each class.
    """
    colors = np.full((256, 3), 255, np.uint8)
    colors[: len(palette)] = palette
    drawn = cv2.addWeighted(colors[classes], _OPACITY, picture, 1 - _OPACITY, 0)
    edges = np.zeros(classes.shape, bool)
    edges[1:] |= classes[1:] != classes[:-1]
    edges[:, 1:] |= classes[:, 1:] != classes[:, :-1]
    drawn[edges & (classes != UNKNOWN)] = colors[classes[edges & (classes != UNKNOWN)]]
    return drawn


_COLUMN_PX = 420


def _columns(page_width: int) -> int:
    return max(1, (page_width - 2 * MARGIN_PX) // _COLUMN_PX)


def _lines(page_width: int, count: int) -> int:
    return -(-count // _columns(page_width))


def _classes_at(class_map: ClassMap, height: int, width: int) -> np.ndarray:
    """The classes at the size of a picture of the slide: the nearest pixels of the level just finer."""
    fine_enough = [number for number, level in enumerate(class_map.levels) if min(level.shape) >= min(height, width)]
    level = class_map.levels[max(fine_enough, default=0)]
    rows, columns = (
        ((np.arange(wanted) + 0.5) * given / wanted).astype(np.intp)
        for wanted, given in zip((height, width), level.shape, strict=True)
    )
    return np.asarray(level[rows][:, columns])
