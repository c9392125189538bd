"""A page whose coordinates are pixels from the top left, and pictures side by side on such a page."""

import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from dinoscope.files import atomic_path

__all__ = ["COMPONENT_KEY", "FRAME_GREY", "MARGIN_PX", "Page", "Panel", "fitted", "save_panels", "scale_bar_um"]

DPI = 150
MARGIN_PX = 24
HEADER_PX, FOOTER_PX = 104, 84
PANEL_TITLE_PX, PANEL_SUBTITLE_PX, GAP_PX = 58, 30, 20
FRAME_GREY = 200
WIDER_ALPHABETS = ("Noto Sans CJK JP", "Noto Sans CJK SC", "WenQuanYi Zen Hei", "IPAGothic", "Droid Sans Fallback")
COMPONENT_KEY = (("#d40000", "red: component 1"), ("#009a00", "green: 2"), ("#0000e6", "blue: 3"))


class Page:
    """A white page; nothing is written before `save`."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self._figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
        FigureCanvasAgg(self._figure)
        self._families = ["DejaVu Sans", *_installed(WIDER_ALPHABETS)]
        logging.getLogger("matplotlib.font_manager").addFilter(_tells_of_more_than_weights)  # once; it is kept

    def text(self, x: float, y: float, text: str, size: float, max_width: float, **style: object) -> float:
        """Writes a line around height `y`, smaller or with its middle left out if it would not fit.

        Returns:
            Its width.
        """
        place = (x / self.width, 1 - y / self.height)
        style = {"va": "center", "family": self._families} | style
        label = self._figure.text(*place, text, size=size, parse_math=False, **style)
        if self._width(label) > max_width:
            label.set_size(max(0.7 * size, size * max_width / self._width(label)))
        while self._width(label) > max_width:
            half = max(1, int(len(label.get_text()) * max_width / self._width(label) / 2) - 1)
            label.set_text(f"{text[:half]}…{text[-half:]}")
            if half == 1:
                break
        return self._width(label)

    def rectangle(self, x: float, y: float, width: float, height: float, color: str) -> None:
        """Fills a rectangle."""
        place = (x / self.width, 1 - (y + height) / self.height)
        size = (width / self.width, height / self.height)
        figure = self._figure
        figure.add_artist(Rectangle(place, *size, transform=figure.transFigure, color=color, linewidth=0))

    def picture(self, x: float, y: float, picture: np.ndarray) -> None:
        """Lays down a picture, (h, w, 3) uint8, pixel by pixel, with a thin frame."""
        picture = picture.copy()
        picture[[0, -1]] = picture[:, [0, -1]] = FRAME_GREY
        bottom = self.height - round(y) - len(picture)
        self._figure.figimage(picture, xo=round(x), yo=bottom, origin="upper")

    def scale_bar(self, um_per_px: float, width_px: int, y: float) -> None:
        """A bar at the left margin, as long as a round length of at most a fifth of a picture, and that length."""
        length_um = scale_bar_um(width_px * um_per_px)
        length_px = length_um / um_per_px
        label = f"{length_um / 1000:g} mm" if length_um >= 100 else f"{length_um:g} µm"
        self.rectangle(MARGIN_PX, y - 5, length_px, 10, "black")
        self.text(MARGIN_PX + length_px + 14, y, label, 10, 200)

    def key(self, entries: Sequence[tuple[str, str]], y: float) -> None:
        """Coloured squares with their meanings, in one line that ends at the right margin."""
        right = self.width - MARGIN_PX
        for color, words in reversed(entries):
            taken = self.text(right, y, words, 9, 400, ha="right")
            self.rectangle(right - taken - 26, y - 9, 18, 18, color)
            right -= taken + 26 + 30

    def save(self, output: str | os.PathLike[str]) -> None:
        """Writes the page as a PNG."""
        with warnings.catch_warnings(), atomic_path(output) as temporary:
            _ignore_missing_glyphs()
            self._figure.savefig(temporary, format="png", dpi=DPI, metadata={"Software": None})

    def _width(self, label: Text) -> float:
        with warnings.catch_warnings():
            _ignore_missing_glyphs()
            return label.get_window_extent(self._figure.canvas.get_renderer()).width


@dataclass(frozen=True)
class Panel:
    """A picture (h, w, 3) uint8 with a bold line and a grey line above it."""

    picture: np.ndarray
    title: str = ""
    subtitle: str = ""


def save_panels(
    output: str | os.PathLike[str],
    rows: Sequence[Sequence[Panel | None]],
    *,
    title: str,
    subtitle: str,
    key: Sequence[tuple[str, str]] = (),
    um_per_px: float | None = None,
) -> None:
    """Saves pictures of one size side by side, and one below the other, as a PNG.

    Args:
        output: The PNG.
        rows: Panels from left to right; None leaves a place free.
        title: Of the page.
        subtitle: Below it.
        key: Colours and their meanings.
        um_per_px: Micrometres a pixel of the pictures, for the scale bar; None draws none.
    """
    first = next(panel for row in rows for panel in row if panel is not None)
    height, width = first.picture.shape[:2]
    heads = [_head(row) for row in rows]
    columns = max(len(row) for row in rows)
    page_width = max(MARGIN_PX + columns * (width + GAP_PX) - GAP_PX + MARGIN_PX, 1000)
    page_height = HEADER_PX + sum(heads) + len(rows) * (height + GAP_PX) - GAP_PX + FOOTER_PX
    page = Page(page_width, page_height)
    page.text(MARGIN_PX, 34, title, 13, page_width - 2 * MARGIN_PX, weight="bold")
    page.text(MARGIN_PX, 72, subtitle, 9.5, page_width - 2 * MARGIN_PX, color="#444444")
    y = HEADER_PX
    for row, head in zip(rows, heads, strict=True):
        for column, panel in enumerate(row):
            if panel is not None:
                _lay(page, panel, MARGIN_PX + column * (width + GAP_PX), y, head)
        y += head + height + GAP_PX
    if um_per_px is not None:
        page.scale_bar(um_per_px, width, page_height - FOOTER_PX / 2)
    page.key(key, page_height - FOOTER_PX / 2)
    page.save(output)


def _head(row: Sequence[Panel | None]) -> int:
    """Room for the words above a row, px."""
    panels = [panel for panel in row if panel is not None]
    if any(panel.title for panel in panels):
        return PANEL_TITLE_PX
    return PANEL_SUBTITLE_PX if any(panel.subtitle for panel in panels) else 0


def _lay(page: Page, panel: Panel, x: float, y: float, head: int) -> None:
    width = panel.picture.shape[1]
    if panel.title:
        page.text(x, y + 12, panel.title, 11, width, weight="bold")
    if panel.subtitle:
        page.text(x, y + head - 20, panel.subtitle, 8.5, width, color="#444444")
    page.picture(x, y + head, panel.picture)


def fitted(image: np.ndarray, longest_px: int) -> np.ndarray:
    """An image (h, w, 3) uint8 whose longer side has so many pixels: averaged where smaller, cubic where larger."""
    height, width = image.shape[:2]
    factor = longest_px / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC)


def scale_bar_um(width_um: float) -> float:
    """The longest of 1, 2, 5, 10, 20, 50 … micrometres that is at most a fifth of `width_um`."""
    power = 10.0 ** np.floor(np.log10(width_um / 5))
    return float(max(step * power for step in (1, 2, 5) if step * power <= width_um / 5))


def _ignore_missing_glyphs() -> None:
    warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)


def _tells_of_more_than_weights(record: logging.LogRecord) -> bool:
    """A fallback for other alphabets need not come in bold, and nobody can do anything about it."""
    return "Failed to find font weight" not in record.getMessage()


def _installed(families: tuple[str, ...]) -> list[str]:
    names = {font.name for font in fontManager.ttflist}
    return [family for family in families if family in names]
