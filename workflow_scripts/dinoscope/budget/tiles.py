"""How many tiles each slide will give: as counted where it is tiled, else from its thumbnail, else from others."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np

from dinoscope.errors import DinoscopeError, SlideError
from dinoscope.files import read_json
from dinoscope.plan import Plan
from dinoscope.slides.grid import TileSet, make_grid
from dinoscope.slides.reader import Slide
from dinoscope.slides.resample import average_squares
from dinoscope.slides.tissue import detect_tissue

__all__ = ["MOST_THUMBNAILS", "SlideSize", "slide_sizes"]

MOST_THUMBNAILS = 300  # looked at for tissue; more slides are taken to be like these
_USUAL_SHARE = 0.5  # of a slide that tiles cover, where nothing is known of any
_THUMBNAIL_PX = 2048
# a slide of which nothing can be found out
_USUAL = {"width": 60_000, "height": 50_000, "mpp": 0.25}


@dataclass
class SlideSize:
    """What of a slide counts for the budget.

    Attributes:
        slide_id: The slide.
        width, height: In level-0 pixels.
        mpp: Micrometres a level-0 pixel.
        num_tiles: Tile set -> number of tiles.
        source: "tiled", "thumbnail", "size" (as large a share covered as of other slides) or "unknown" (size of other
            slides, too).
    """

    slide_id: str
    width: float
    height: float
    mpp: float
    num_tiles: dict[str, int]
    source: str

    @property
    def thumbnail_pixels(self) -> float:
        """Pixels of its thumbnail."""
        scale = min(1.0, _THUMBNAIL_PX / max(self.width, self.height))
        return self.width * self.height * scale**2

    def pixels_at(self, mpp: float) -> float:
        """Pixels of a picture of all of it, no finer than the slide."""
        return self.width * self.height * min(1.0, self.mpp / mpp) ** 2


def slide_sizes(plan: Plan) -> list[SlideSize]:
    """Of all slides of a plan, in their order."""
    sets = {name: _tile_set(name, settings) for name, settings in plan.config["tiling"]["sets"].items()}
    found = {slide_id: _described(plan, slide_id) for slide_id in plan.slides}
    sizes: dict[str, SlideSize] = {}
    untiled = []
    for slide_id, description in found.items():
        counted = _counted(plan, slide_id, sets)
        if counted is not None and description is not None:
            sizes[slide_id] = SlideSize(slide_id, *description, counted, "tiled")
        elif description is not None:
            untiled.append(slide_id)
    for slide_id in _evenly(untiled, MOST_THUMBNAILS - len(sizes)):
        estimated = _looked_at(plan, slide_id, found[slide_id], sets)
        if estimated is not None:
            sizes[slide_id] = SlideSize(slide_id, *found[slide_id], estimated, "thumbnail")
    return _with_the_rest(found, sizes, sets)


def _with_the_rest(
    found: Mapping[str, tuple | None], known: Mapping[str, SlideSize], sets: Mapping[str, TileSet]
) -> list[SlideSize]:
    """Slides that were not looked at have as many tiles for their area as those that were."""
    shares = {name: _share_covered(known.values(), tile_set) for name, tile_set in sets.items()}
    described = np.array([value for value in found.values() if value is not None] or [tuple(_USUAL.values())], float)
    usual = tuple(np.median(described, axis=0).tolist())
    sizes = []
    for slide_id, description in found.items():
        if slide_id in known:
            sizes.append(known[slide_id])
            continue
        width, height, mpp = description or usual
        num_tiles = {
            name: round(shares[name] * _most_tiles(width, height, mpp, tile_set)) for name, tile_set in sets.items()
        }
        sizes.append(SlideSize(slide_id, width, height, mpp, num_tiles, "size" if description else "unknown"))
    return sizes


def _share_covered(sizes: Iterable[SlideSize], tile_set: TileSet) -> float:
    sizes = list(sizes)
    most = sum(_most_tiles(size.width, size.height, size.mpp, tile_set) for size in sizes)
    return sum(size.num_tiles[tile_set.name] for size in sizes) / most if most else _USUAL_SHARE


def _most_tiles(width: float, height: float, mpp: float, tile_set: TileSet) -> float:
    """Tiles of a set that the whole of a slide would give, over all its resolutions."""
    strides = ((tile_set.stride_px or tile_set.tile_px) * each / mpp for each in tile_set.mpps)
    return sum(width * height / stride**2 for stride in strides)


def _described(plan: Plan, slide_id: str) -> tuple[float, float, float] | None:
    """Width, height and mpp: of the inspected slide, else of the file itself; None where neither tells."""
    path = plan.results / "slides" / f"{slide_id}.json"
    mpp = plan.slide_mpp(slide_id)
    try:
        if path.is_file():
            told = read_json(path)
            mpp = mpp or told.get("mpp_x")
            return (told["width"], told["height"], mpp) if mpp and "width" in told else None
        with Slide(plan.slide(slide_id).path, slide_id, mpp, reader=plan.config["slides"]["reader"]) as slide:
            return slide.width, slide.height, slide.mpp
    except DinoscopeError:
        return None


def _counted(plan: Plan, slide_id: str, sets: Iterable[str]) -> dict[str, int] | None:
    import pyarrow.parquet as pq

    paths = {name: plan.results / "tiles" / name / f"{slide_id}.parquet" for name in sets}
    try:
        return {name: pq.read_metadata(path).num_rows for name, path in paths.items()}
    except (OSError, ValueError):
        return None


def _looked_at(
    plan: Plan, slide_id: str, size: tuple[float, float, float], sets: Mapping[str, TileSet]
) -> dict[str, int] | None:
    """Tiles by the tissue on the slide's thumbnail, found as tile_slide.py finds it; None where that cannot be."""
    path = plan.results / "slides" / f"{slide_id}.jpg"
    image = cv2.imread(str(path)) if path.is_file() else None
    if image is None or slide_id in plan.annotation_files:
        return None
    picture = _Picture(slide_id, image[..., ::-1], *size)
    tissue, method = plan.config["tissue"], plan.tissue_method(slide_id)
    areas = {key: tissue[key] for key in ("min_area_um2", "max_hole_um2")}
    try:
        found = detect_tissue(picture, method, **areas)
    except SlideError:  # none on so coarse a picture, or the wrong method
        return None
    counts = {}
    for name, tile_set in sets.items():
        try:
            counts[name] = sum(len(make_grid(picture, found, single)) for single in tile_set.single())
        except SlideError:  # too coarse or too small for this set
            counts[name] = 0
    return counts


class _Picture(SimpleNamespace):
    """What tissue and grid want to know of a slide, where there is no more than its thumbnail."""

    def __init__(self, slide_id: str, image: np.ndarray, width: int, height: int, mpp: float) -> None:
        super().__init__(slide_id=slide_id, width=width, height=height, mpp=mpp, mpp_x=mpp, mpp_y=mpp)
        self.image, self.level_downsamples = image, [width / image.shape[1]]

    def shrunk(self, level: int, factor: int, advance: object = None) -> np.ndarray:
        """As `Slide.shrunk`."""
        return average_squares(np.ascontiguousarray(self.image), factor)


def _tile_set(name: str, settings: Mapping[str, Any]) -> TileSet:
    mpp = tuple(settings["mpp"]) if isinstance(settings["mpp"], list) else settings["mpp"]
    options = {key: settings[key] for key in ("min_tissue", "stride_px", "edge", "max_upsample")}
    return TileSet(name, settings["tile_px"], mpp, **options)


def _evenly(names: list[str], count: int) -> list[str]:
    if len(names) <= count:
        return names
    return [names[index] for index in np.linspace(0, len(names) - 1, max(count, 0)).astype(int)]
