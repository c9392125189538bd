"""What the demo slides are drawn with: noise, packed cells, nuclei, and stains after Beer and Lambert."""

from dataclasses import dataclass

import cv2
import numpy as np

__all__ = [
    "COARSE",
    "Packing",
    "coarse_noise",
    "draw_nuclei",
    "jittered_points",
    "magnified",
    "pack",
    "stain",
    "tiling_noise",
    "wrapped",
]

COARSE = 4
_VERY_COARSE = 16
_SHIFT = 4

STAINS = {  # optical density in red, green, blue of one unit of dye
    "haematoxylin": (0.60, 0.70, 0.36),
    "eosin": (0.13, 0.78, 0.46),
    "counterstain": (0.72, 0.60, 0.32),
    "dab": (0.30, 0.57, 0.76),
    "light green": (0.83, 0.34, 0.28),
    "orange": (0.07, 0.48, 0.70),
}


@dataclass(frozen=True)
class Packing:
    """A plane packed with cells or glands, on a grid `COARSE` times coarser than the slide.

    Attributes:
        labels: Which cell a place belongs to, 1 upwards; int32 (height, width).
        depth: Distance from the cell's border in slide pixels; float32 (height, width).
        centres: Of cell `label` the place that it grew from, at row `label`; slide pixels (count + 1, 2).
    """

    labels: np.ndarray
    depth: np.ndarray
    centres: np.ndarray


def tiling_noise(rng: np.random.Generator, side: int, sigma_x: float, sigma_y: float) -> np.ndarray:
    """Smooth noise of mean 0 and deviation 1 whose edges fit together; float32 (side, side)."""
    noise = rng.standard_normal((side, side), dtype=np.float32)
    # three boxes of this side come close to a Gaussian, at a cost that does not grow with sigma
    box = [2 * max(1, round((np.sqrt(4 * sigma**2 + 1) - 1) / 2)) + 1 for sigma in (sigma_x, sigma_y)]
    margin = min(side, 3 * max(box))
    noise = cv2.copyMakeBorder(noise, margin, margin, margin, margin, cv2.BORDER_WRAP)
    for _ in range(3):
        noise = cv2.blur(noise, box)
    noise = noise[margin:-margin, margin:-margin]
    return ((noise - noise.mean()) / noise.std()).astype(np.float32)


def wrapped(texture: np.ndarray, top: int, rows: int, columns: int) -> np.ndarray:
    """Rows `top` to `top + rows` of a texture that repeats for ever."""
    lines = texture[np.arange(top, top + rows) % texture.shape[0]]
    return np.tile(lines, (1, -(-columns // texture.shape[1])))[:, :columns]


def coarse_noise(rng: np.random.Generator, height: int, width: int, wavelength_px: float) -> np.ndarray:
    """Noise with structures of about `wavelength_px` slide pixels, on the grid of `COARSE`; mean 0, deviation 1."""
    rows, columns = -(-height // _VERY_COARSE), -(-width // _VERY_COARSE)
    sigma = wavelength_px / _VERY_COARSE / 4
    margin = int(4 * sigma) + 1
    noise = rng.standard_normal((rows + 2 * margin, columns + 2 * margin), dtype=np.float32)
    noise = cv2.GaussianBlur(noise, (0, 0), sigma)[margin:-margin, margin:-margin]
    noise = (noise - noise.mean()) / noise.std()
    return cv2.resize(noise, (width // COARSE, height // COARSE), interpolation=cv2.INTER_CUBIC)


def magnified(field: np.ndarray, top: int, rows: int) -> np.ndarray:
    """Rows `top` to `top + rows` of the slide, all columns, of a field on the grid of `COARSE`."""
    offset = 0.5 / COARSE - 0.5
    to_field = np.array([[1 / COARSE, 0, offset], [0, 1 / COARSE, top / COARSE + offset]])
    size = (field.shape[1] * COARSE, rows)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(field, to_field, size, flags=flags, borderMode=cv2.BORDER_REPLICATE)


def jittered_points(rng: np.random.Generator, height: int, width: int, spacing_px: float) -> np.ndarray:
    """Points of a hexagonal grid, each moved by up to 0.4 spacings; float64 (count, 2), x before y."""
    y, x = np.mgrid[0 : int(height / spacing_px / 0.87) + 1, 0 : int(width / spacing_px) + 1].astype(float)
    points = np.stack([(x + y % 2 / 2).ravel(), (y * 0.87).ravel()], axis=1) * spacing_px
    points += rng.uniform(-0.4, 0.4, points.shape) * spacing_px
    return points[(points >= 0).all(axis=1) & (points < (width, height)).all(axis=1)]


def pack(
    rng: np.random.Generator, height: int, width: int, spacing_px: float, bend_px: float, rounding_px: float
) -> Packing:
    """Packs the plane with cells about `spacing_px` apart, borders bent by about `bend_px` and corners rounded."""
    points = jittered_points(rng, height, width, spacing_px)
    rows, columns = height // COARSE, width // COARSE
    free = np.ones((rows, columns), np.uint8)
    places = np.minimum((points / COARSE).astype(int), (columns - 1, rows - 1))
    free[places[:, 1], places[:, 0]] = 0
    labels = cv2.distanceTransformWithLabels(free, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)[1]
    border = np.zeros((rows, columns), bool)
    border[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    border[1:] |= labels[1:] != labels[:-1]
    depth = cv2.distanceTransform((~border).astype(np.uint8), cv2.DIST_L2, 5) * COARSE
    x, y = np.meshgrid(np.arange(columns, dtype=np.float32), np.arange(rows, dtype=np.float32))
    x += coarse_noise(rng, height, width, 1.2 * spacing_px) * bend_px / 2 / COARSE
    y += coarse_noise(rng, height, width, 1.2 * spacing_px) * bend_px / 2 / COARSE
    bent = cv2.remap(depth, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    nearest = cv2.remap(labels.astype(np.float32), x, y, cv2.INTER_NEAREST, borderMode=cv2.BORDER_REPLICATE)
    centres = np.zeros((labels.max() + 1, 2))
    centres[labels[places[:, 1], places[:, 0]]] = points
    return Packing(nearest.astype(np.int32), cv2.GaussianBlur(bent, (0, 0), rounding_px / COARSE), centres)


def draw_nuclei(
    layer: np.ndarray,
    rng: np.random.Generator,
    centres: np.ndarray,
    length_px: tuple[float, float],
    elongation: tuple[float, float],
    angles: np.ndarray,
    darkness: tuple[float, float],
) -> None:
    """Draws nuclei into a uint8 layer of dye: a dark rim, a paler inside, and in large ones a nucleolus.

    Args:
        layer: uint8 (height, width), 255 is most dye.
        rng: Source of sizes and shades.
        centres: (count, 2) pixels.
        length_px: Range of the long axis.
        elongation: Range of long by short axis.
        angles: Direction of the long axis in degrees, (count,).
        darkness: Range of the shade, 0 to 1.
    """
    count = len(centres)
    half = rng.uniform(*length_px, count) / 2
    across = half / rng.uniform(*elongation, count)
    shade = 255 * rng.uniform(*darkness, count)
    dots = centres + rng.normal(0, 0.25, (count, 2)) * across[:, None]
    scale = 1 << _SHIFT
    for i in range(count):
        place = tuple(np.rint(centres[i] * scale).astype(int).tolist())
        axes = (round(half[i] * scale), round(across[i] * scale))
        inner = (round(max(half[i] - 2, 1) * scale), round(max(across[i] - 2, 1) * scale))
        angle, dye = float(angles[i]), float(shade[i])
        cv2.ellipse(layer, place, axes, angle, 0, 360, dye, -1, cv2.LINE_AA, _SHIFT)
        if across[i] > 4:
            cv2.ellipse(layer, place, inner, angle, 0, 360, 0.78 * dye, -1, cv2.LINE_AA, _SHIFT)
            dot = tuple(np.rint(dots[i] * scale).astype(int).tolist())
            cv2.circle(layer, dot, round(0.22 * across[i] * scale), dye, -1, cv2.LINE_AA, _SHIFT)


def stain(dyes: dict[str, np.ndarray], ground: np.ndarray) -> np.ndarray:
    """Light that is left behind layers of dye (Beer-Lambert).

    Args:
        dyes: Amounts by name of dye, float32 (height, width).
        ground: Colour of the bare glass, float32 (height, width, 3), 0 to 255.

    Returns:
        float32 (height, width, 3).
    """
    light = np.empty_like(ground)
    for channel in range(3):
        density = sum(amount * np.float32(STAINS[name][channel] * np.log(10)) for name, amount in dyes.items())
        light[..., channel] = ground[..., channel] * np.exp(-density)
    return light
