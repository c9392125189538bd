"""Places of slides at the scale of cells: what several models see in them, patch by patch.

Coordinates are level-0 pixels, x before y; a region is a square of `size_px` pixels of `mpp` micrometres.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from dinoscope.errors import SlideError
from dinoscope.slides.grid import TileSet, plan_reading
from dinoscope.slides.manifest import read_metadata, read_tiles
from dinoscope.slides.reader import Slide

__all__ = ["Region", "distinct_places", "most_tissue", "read_region", "with_box"]

MAX_UPSAMPLE = 4.0  # nothing is measured on them
NEARLY_AS_MUCH = 0.95
COARSE_PX = 16  # side of the squares among which places are chosen


@dataclass(frozen=True)
class Region:
    """A square of a slide.

    Attributes:
        x, y: Top-left corner in level-0 pixels.
        size_px: Side of the picture.
        mpp: Micrometres a pixel of the picture.
    """

    x: int
    y: int
    size_px: int
    mpp: float

    @property
    def size_um(self) -> float:
        """Side in micrometres."""
        return self.size_px * self.mpp


def read_region(slide: Slide, region: Region) -> tuple[np.ndarray, int]:
    """Pixels of a region, (size_px, size_px, 3) uint8, and its side in level-0 pixels.

    Raises:
        SlideError: The region is not wholly on the slide, or finer than its finest level.
    """
    side = round(region.size_um / slide.mpp)
    if min(region.x, region.y) < 0 or region.x + side > slide.width or region.y + side > slide.height:
        raise SlideError(
            f"slide {slide.slide_id!r}: the region of {region.size_px} px at mpp {region.mpp:g} from ({region.x}, "
            f"{region.y}) is {side} level-0 pixels wide and reaches beyond the slide's {slide.width} x {slide.height}: "
            "move it, or make size_px or mpp smaller"
        )
    reading = plan_reading(slide, TileSet("region", region.size_px, region.mpp, max_upsample=MAX_UPSAMPLE))
    where = (reading.level, reading.read_px, region.size_px, reading.footprint_px)
    return slide.read_tile(region.x, region.y, *where), reading.footprint_px


def most_tissue(tiles: Path, size_px: int, mpp: float | None, seed: int) -> Region | None:
    """The region of a slide with the most tissue, as far as its tiles tell; None where there are no tiles.

    Among those that have nearly as much one is drawn by seed and slide. It is smaller where the slide is.

    Args:
        tiles: The slide's tile manifest.
        size_px: Side of the picture.
        mpp: Micrometres a pixel of it; None, that of the tiles.
        seed: Of the draw.

    Raises:
        ManifestError: The manifest is damaged.
    """
    table, about = read_tiles(tiles), read_metadata(tiles)
    if not table.num_rows:
        return None
    columns = {name: table[name].to_numpy() for name in ("x", "y", "footprint_px", "tissue_fraction", "mpp")}
    mpp, level0_mpp = mpp or round(float(columns["mpp"][0]), 6), (about["mpp_x"] + about["mpp_y"]) / 2
    size_px = min(size_px, int(min(about["width"], about["height"]) * level0_mpp / mpp) // COARSE_PX * COARSE_PX)
    side, step = size_px * mpp / level0_mpp, int(columns["footprint_px"][0])
    rows, columns_of = ((columns[axis] // step).astype(int) for axis in ("y", "x"))
    tissue = np.zeros((rows.max() + 1, columns_of.max() + 1), np.float32)
    np.add.at(tissue, (rows, columns_of), columns["tissue_fraction"] * (columns["footprint_px"] / step) ** 2)
    count = max(1, round(side / step))
    inside = cv2.boxFilter(tissue, -1, (count, count), anchor=(0, 0), normalize=False, borderType=cv2.BORDER_CONSTANT)
    good = np.argwhere(inside >= NEARLY_AS_MUCH * inside.max())
    name = int.from_bytes(hashlib.sha256(str(about["slide_id"]).encode()).digest()[:8], "little")
    row, column = good[np.random.default_rng([seed, name]).integers(len(good))]
    limit = (about["width"] - round(side), about["height"] - round(side))
    x, y = (int(np.clip(place * step, 0, most)) for place, most in zip((column, row), limit, strict=True))
    return Region(x, y, size_px, mpp)


def distinct_places(image: np.ndarray, count: int = 3) -> list[tuple[float, float]]:
    """Places of an image that look unlike each other, as fractions of its width and height (x, y).

    The squares of the image that are nearest to the means of `count` groups of colours (k-means on a fixed start), the
    darkest group first.

    Args:
        image: (H, W, 3) uint8.
        count: How many.
    """
    sides = [max(1, side // COARSE_PX) for side in image.shape[:2]]
    small = cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2LAB), sides[::-1], interpolation=cv2.INTER_AREA)
    colors = small.reshape(-1, 3).astype(np.float32)
    labels = np.argsort(np.argsort(colors[:, 0], kind="stable")) * count // len(colors)
    criteria, flags = (cv2.TERM_CRITERIA_MAX_ITER, 20, 0.0), cv2.KMEANS_USE_INITIAL_LABELS
    _, labels, centres = cv2.kmeans(colors, count, labels.astype(np.int32), criteria, 1, flags)
    places = []
    for group in np.argsort(centres[:, 0]):
        distance = np.square(colors - centres[group]).sum(axis=1)
        distance[labels.ravel() != group] = np.inf
        row, column = divmod(int(distance.argmin()), sides[1])
        places.append(((column + 0.5) / sides[1], (row + 0.5) / sides[0]))
    return places


def with_box(thumbnail: np.ndarray, slide: Slide, region: Region, side_px: int) -> np.ndarray:
    """The picture of a whole slide with the region's outline.

    Args:
        thumbnail: (h, w, 3) uint8.
        slide: The slide.
        region: The region.
        side_px: Its side in level-0 pixels.
    """
    picture, scale = thumbnail.copy(), thumbnail.shape[1] / slide.width
    start = (round(region.x * scale), round(region.y * scale))
    end = (round((region.x + side_px) * scale) - 1, round((region.y + side_px) * scale) - 1)
    line = max(1, round(max(thumbnail.shape) / 200))
    cv2.rectangle(picture, start, end, (255, 255, 255), 3 * line)
    cv2.rectangle(picture, start, end, (0, 0, 0), line)
    return picture
