"""Draws a Papanicolaou-stained smear: single squamous cells, sheets of small cells and leucocytes on bare glass."""

from dataclasses import dataclass

import cv2
import numpy as np

from dinoscope.slides.demo_texture import draw_nuclei, stain, tiling_noise, wrapped

__all__ = ["draw_smear"]

_BAND = 64
_GROUND = (247, 248, 247)


@dataclass(frozen=True)
class _Kind:
    """A kind of cell; lengths in pixels of 0.5 um, shares of all cells."""

    share: float
    radius_px: tuple[float, float]
    nucleus_px: tuple[float, float]
    corners: int
    dye: str
    amount: tuple[float, float]
    darkness: tuple[float, float]


_KINDS = (
    _Kind(0.30, (40, 58), (10, 13), 6, "orange", (0.18, 0.34), (0.8, 1.0)),
    _Kind(0.16, (40, 56), (10, 13), 6, "eosin", (0.14, 0.26), (0.8, 1.0)),
    _Kind(0.42, (38, 54), (15, 20), 6, "light green", (0.15, 0.28), (0.55, 0.8)),
    _Kind(0.12, (17, 25), (15, 19), 9, "light green", (0.28, 0.42), (0.6, 0.85)),
)
_LEUCOCYTES_PER_CELL, _CELLS_PER_SHEET = 0.5, 45


def draw_smear(height: int, width: int, num_cells: int, num_sheets: int, seed: tuple[int, ...]) -> np.ndarray:
    """Draws a smear within a round area; uint8 (height, width, 3), RGB.

    Args:
        height, width: Size in pixels.
        num_cells: Number of single squamous cells.
        num_sheets: Number of sheets of small cells.
        seed: Of all that is random.
    """
    rng = np.random.default_rng(seed)
    dyes = {name: np.zeros((height, width), np.uint8) for name in ("orange", "eosin", "light green")}
    nuclei = np.zeros((height, width), np.uint8)
    crowding = cv2.resize(rng.standard_normal((5, 6)), (width // 16, height // 16), interpolation=cv2.INTER_CUBIC)
    for kind in _KINDS:
        centres = _places(rng, height, width, round(num_cells * kind.share), crowding)
        for centre in centres:
            _draw_cell(dyes[kind.dye], rng, centre, kind)
        angles = rng.uniform(0, 180, len(centres))
        draw_nuclei(
            nuclei, rng, centres + rng.normal(0, 3, centres.shape), kind.nucleus_px, (1, 1.3), angles, kind.darkness
        )
    for centre in _places(rng, height, width, num_sheets, crowding):
        _draw_sheet(dyes["light green"], nuclei, rng, centre)
    _draw_leucocytes(dyes["light green"], nuclei, rng, _places(rng, height, width, num_cells // 2, crowding))
    return _coloured(dyes, nuclei, rng)


def _places(rng: np.random.Generator, height: int, width: int, count: int, crowding: np.ndarray) -> np.ndarray:
    """Random places inside the round area, more of them where `crowding` is high; pixels (count, 2)."""
    chosen = np.empty((0, 2))
    while len(chosen) < count:
        points = rng.uniform(0, 1, (4 * count + 16, 2)) * (width, height)
        radius = np.hypot(*((points - (width / 2, height / 2)) / (0.44 * width, 0.45 * height)).T)
        rank = crowding[(points[:, 1] / 16).astype(int), (points[:, 0] / 16).astype(int)]
        keep = (radius < 1) & (rng.random(len(points)) < 1 / (1 + np.exp(-1.6 * rank)))
        chosen = np.concatenate([chosen, points[keep]])
    return chosen[:count]


def _draw_cell(layer: np.ndarray, rng: np.random.Generator, centre: np.ndarray, kind: _Kind) -> None:
    """Adds the cytoplasm of one cell: an irregular polygon with round corners, folds, and a denser middle."""
    radius = rng.uniform(*kind.radius_px)
    side = 2 * int(1.5 * radius) + 1
    angles = (np.arange(kind.corners) + rng.uniform(-0.3, 0.3, kind.corners)) * 2 * np.pi / kind.corners
    reach = radius * rng.uniform(0.78, 1.18, kind.corners)
    corners = np.stack([np.cos(angles) * reach, np.sin(angles) * reach], axis=1) + side / 2
    cell = np.zeros((side, side), np.float32)
    cv2.fillPoly(cell, [np.rint(corners).astype(np.int32)], 1.0)
    cell = np.clip(cv2.GaussianBlur(cell, (0, 0), radius / 7) * 3 - 1, 0, 1)
    folds = np.zeros_like(cell)
    for start in range(rng.integers(0, 4)):
        line = corners[[start % kind.corners, (start + 2) % kind.corners]] * 0.7 + rng.normal(0.15 * side, 5, (2, 2))
        cv2.line(folds, *np.rint(line).astype(int).tolist(), 0.35, 3)
    y, x = np.mgrid[:side, :side] - side / 2
    middle = np.exp(-(x**2 + y**2) / (0.55 * radius) ** 2)
    grain = cv2.GaussianBlur(rng.standard_normal((side, side)).astype(np.float32), (0, 0), 2.2)
    cell *= (0.75 + 0.35 * middle + 0.35 * grain + cv2.GaussianBlur(folds, (0, 0), 1.5)) * rng.uniform(*kind.amount)
    _add(layer, cell, centre)


def _draw_sheet(layer: np.ndarray, nuclei: np.ndarray, rng: np.random.Generator, centre: np.ndarray) -> None:
    """A sheet of small, crowded cells with large dark nuclei."""
    count = int(rng.integers(_CELLS_PER_SHEET // 2, 2 * _CELLS_PER_SHEET))
    row, column = np.divmod(np.arange(4 * count), int(2 * np.sqrt(count)) + 1)
    places = np.stack([column + row % 2 / 2, 0.87 * row], axis=1) * 21.0
    places += rng.normal(0, 2.5, places.shape) - places.mean(axis=0)
    stretch = places * (1, rng.uniform(0.6, 1.6))
    places = places[np.argsort(np.hypot(*stretch.T) + rng.normal(0, 12, len(places)))[:count]] + centre
    kind = _Kind(1, (13, 16), (13, 18), 8, "light green", (0.26, 0.36), (0.75, 1.0))
    for place in places:
        _draw_cell(layer, rng, place, kind)
    draw_nuclei(nuclei, rng, places, kind.nucleus_px, (1, 1.4), rng.uniform(0, 180, count), kind.darkness)


def _draw_leucocytes(layer: np.ndarray, nuclei: np.ndarray, rng: np.random.Generator, centres: np.ndarray) -> None:
    """Neutrophils: a pale round cell with two to four lobes."""
    kind = _Kind(1, (10, 12), (6, 8), 10, "light green", (0.12, 0.2), (0.85, 1.0))
    for centre in centres:
        _draw_cell(layer, rng, centre, kind)
    for _ in range(3):
        lobes = centres + rng.normal(0, 3.2, centres.shape)
        draw_nuclei(nuclei, rng, lobes, kind.nucleus_px, (1, 1.5), rng.uniform(0, 180, len(lobes)), kind.darkness)


def _add(layer: np.ndarray, patch: np.ndarray, centre: np.ndarray) -> None:
    """Adds a patch of dye (1 is 255) to a layer, cut off at the layer's edges."""
    left, top = (round(float(value)) - patch.shape[0] // 2 for value in centre)
    rows = slice(max(0, -top), min(patch.shape[0], layer.shape[0] - top))
    columns = slice(max(0, -left), min(patch.shape[1], layer.shape[1] - left))
    if rows.stop > rows.start and columns.stop > columns.start:
        place = layer[top + rows.start : top + rows.stop, left + columns.start : left + columns.stop]
        cv2.add(place, np.clip(patch[rows, columns] * 255, 0, 255).astype(np.uint8), dst=place)


def _coloured(dyes: dict[str, np.ndarray], nuclei: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    height, width = nuclei.shape
    fine, light = tiling_noise(rng, 1024, 1.1, 1.1), tiling_noise(rng, 1024, 150, 150)
    nuclei = cv2.GaussianBlur(nuclei, (0, 0), 0.9)
    image = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, _BAND):
        rows = min(_BAND, height - top)
        grain = wrapped(fine, top, rows, width)
        amounts = {name: layer[top : top + rows].astype(np.float32) / 255 for name, layer in dyes.items()}
        soft = nuclei[top : top + rows] * np.float32(1 / 255)
        amounts["haematoxylin"] = np.clip(0.8 * soft * (1 + 0.2 * grain), 0, None)
        shade = 0.9 * grain + 0.8 * wrapped(light, top, rows, width)
        ground = np.array(_GROUND, np.float32) + shade[..., None]
        image[top : top + rows] = np.clip(np.rint(stain(amounts, ground)), 0, 255)
    return image
