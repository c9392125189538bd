"""A whole slide to a map of classes: its tissue is predicted in overlapping tiles, a row of tiles after the other.

Map pixels are at the micrometres a pixel that the model works at; the map's corner is the slide's. The map and what is
not finished of it lie in files, so that memory is bounded by some rows of tiles whatever the size of the slide.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dinoscope.errors import ConfigError
from dinoscope.features.embedding import choose_precision
from dinoscope.features.read_ahead import read_ahead
from dinoscope.progress import progress
from dinoscope.segment.blending import RowBlender
from dinoscope.segment.class_map import UNKNOWN, ClassMap, array_on_disk
from dinoscope.segment.inference import window_starts, window_weights
from dinoscope.segment.model import Segmenter
from dinoscope.segment.settings import multiples_in_words
from dinoscope.slides.geojson import mask_feature
from dinoscope.slides.grid import TileSet, plan_reading
from dinoscope.slides.padding import read_tile
from dinoscope.slides.reader import Slide
from dinoscope.slides.resample import square_shares
from dinoscope.slides.tissue import Tissue

__all__ = ["SlideSettings", "class_outlines", "predict_slide", "slide_settings"]

_log = logging.getLogger(__name__)
_OUTLINE_PX = 2**25  # pixels of the level that outlines are taken from: what fits into memory several times
_BACKGROUNDS = frozenset({"background", "other", "nothing", "rest"})


@dataclass(frozen=True)
class SlideSettings:
    """How slides are predicted.

    Attributes:
        mpp: Micrometres a pixel of tiles and map.
        tile_px: Side of a tile.
        overlap_px: Of neighbouring tiles.
        batch_size: Tiles a forward pass.
        workers: Threads that read tiles.
        precision: As in features/embedding.py.
    """

    mpp: float
    tile_px: int = 512
    overlap_px: int = 128
    batch_size: int = 8
    workers: int = 2
    precision: str = "auto"


def slide_settings(
    segmenter: Segmenter, mpp: float | None, tile_px: int | None, overlap_px: int | None, **options: object
) -> SlideSettings:
    """Settings completed from the model's card: its mpp, the size of its training images, a quarter of that as overlap.

    Raises:
        ConfigError: The mpp is unknown, or the sizes do not go together.
    """
    card, patch = segmenter.card, segmenter.patch_size
    mpp = card.mpp if mpp is None and card is not None else mpp
    if mpp is None:
        raise ConfigError("the model does not say at which micrometres a pixel it works; give --mpp, e.g. 0.5")
    if tile_px is None:
        sides = card.img_dim if card is not None and card.img_dim else (round(512 / patch) * patch,)
        tile_px = max(sides)
    overlap_px = tile_px // 4 if overlap_px is None else overlap_px
    if tile_px < 1 or tile_px % patch:
        raise ConfigError(
            f"tiles are to be {tile_px} px, but must be a multiple of the model's patch size of {patch} px: "
            f"{multiples_in_words(tile_px, patch)}"
        )
    if not 0 <= overlap_px <= tile_px // 2:
        raise ConfigError(f"tiles of {tile_px} px are to overlap by {overlap_px} px; wanted is 0 to {tile_px // 2}")
    return SlideSettings(mpp, tile_px, overlap_px, **options)


def predict_slide(
    slide: Slide, segmenter: Segmenter, tissue: Tissue, settings: SlideSettings, scratch: Path
) -> ClassMap:
    """Predicts the tissue of a slide.

    Args:
        slide: The slide.
        segmenter: In evaluation mode, with a card, on the device that is to be used.
        tissue: Where to look. Elsewhere the map is `UNKNOWN`.
        settings: How.
        scratch: A folder for the files of the map, which is as long-lived as they are needed.

    Raises:
        SlideError: The slide is damaged, or too coarse for the model.
    """
    assert segmenter.card is not None
    tiles = _Tiles.of(slide, tissue, settings)
    height, width = tiles.height, tiles.width
    finest = array_on_disk(scratch / "level_0", np.uint8, (height, width))
    finest[:] = UNKNOWN
    inside = _TissueRows(tissue, tiles.downsample, width)
    blender = RowBlender(segmenter.num_classes, settings.tile_px, max(width, settings.tile_px), scratch)

    def store(top: int) -> None:
        start = blender.top
        rows = blender.move_to(top, UNKNOWN)[: max(0, height - start), :width]
        finest[start : start + len(rows)] = np.where(inside.rows(start, len(rows)), rows, UNKNOWN)

    _log.info("slide %r: %d tiles of %d px at mpp %g", slide.slide_id, len(tiles), settings.tile_px, settings.mpp)
    with progress(f"segmenting {slide.slide_id}", len(tiles), unit="tiles") as bar:
        for number, weighted in _weighted_logits(segmenter, tiles, settings):
            if tiles.top[number] != blender.top:
                store(int(tiles.top[number]))
            blender.add(int(tiles.left[number]), weighted)
            bar.advance()
    store(blender.top + settings.tile_px)
    card = segmenter.card
    return ClassMap.with_levels(
        finest, scratch, mpp=settings.mpp, downsample=tiles.downsample, classes=card.classes, palette=card.palette
    )


def class_outlines(class_map: ClassMap, slide: Slide, leave_out: Sequence[str] | None = None) -> dict[str, object]:
    """The outlines of the classes as GeoJSON in level-0 pixels, an annotation each, as QuPath opens them.

    They are taken from the finest level of the map of at most 33 million pixels.

    Args:
        class_map: The map.
        slide: Its slide.
        leave_out: Classes without an outline; None: those called background, other, nothing or rest.
    """
    left_out = _BACKGROUNDS if leave_out is None else set(leave_out)
    number = class_map.level_below(_OUTLINE_PX)
    level, downsample = np.asarray(class_map.levels[number]), class_map.downsample * 2**number
    if number:
        _log.info("slide %r: outlines are taken at %.3g um a pixel", slide.slide_id, class_map.mpp * 2**number)
    features = []
    for index, (name, color) in enumerate(zip(class_map.classes, class_map.palette, strict=True)):
        if name not in left_out and (mask := level == index).any():
            classification = {"name": name, "color": list(color)}
            features.append(mask_feature(mask, downsample, slide.width, slide.height, name, classification))
    return {"type": "FeatureCollection", "features": features}


@dataclass(frozen=True)
class _Tiles:
    """Where tiles lie: `left` and `top` in map pixels, in raster order; and the size of the map."""

    slide: Slide
    left: np.ndarray
    top: np.ndarray
    width: int
    height: int
    tile_px: int
    downsample: float
    level: int

    @classmethod
    def of(cls, slide: Slide, tissue: Tissue, settings: SlideSettings) -> "_Tiles":
        reading = plan_reading(slide, TileSet("segmentation", settings.tile_px, settings.mpp, edge="pad"))
        downsample, stride = settings.mpp / slide.mpp, settings.tile_px - settings.overlap_px
        width, height = (max(1, math.floor(side / downsample + 1e-6)) for side in (slide.width, slide.height))
        columns, rows = (window_starts(length, settings.tile_px, stride) for length in (width, height))
        side = settings.tile_px * downsample
        share = square_shares(tissue.sums, tissue.downsample, columns * downsample, rows * downsample, side)
        row, column = np.nonzero(share > 0)
        return cls(slide, columns[column], rows[row], width, height, settings.tile_px, downsample, reading.level)

    def __len__(self) -> int:
        return len(self.left)

    def empty(self, rows: slice) -> Tensor:
        return torch.empty((rows.stop - rows.start, self.tile_px, self.tile_px, 3), dtype=torch.uint8)

    def read_row(self, row: int, place: Tensor) -> None:
        x, y = (float(starts[row]) * self.downsample for starts in (self.left, self.top))
        footprint = self.tile_px * self.downsample
        image = read_tile(self.slide, x, y, self.level, self.tile_px, self.tile_px, footprint)
        place.copy_(torch.from_numpy(image))


class _TissueRows:
    """The tissue's mask at the resolution of the map, some rows at a time."""

    def __init__(self, tissue: Tissue, downsample: float, width: int) -> None:
        self._mask, self._step = tissue.mask, downsample / tissue.downsample
        self._columns = self._places(0, width, tissue.mask.shape[1])

    def rows(self, top: int, count: int) -> np.ndarray:
        """bool (count, width): whether the centres of the map's pixels lie on tissue."""
        return self._mask[self._places(top, count, self._mask.shape[0])][:, self._columns]

    def _places(self, start: int, count: int, length: int) -> np.ndarray:
        return np.minimum((np.arange(start, start + count) + 0.5) * self._step, length - 1).astype(np.intp)


def _weighted_logits(segmenter: Segmenter, tiles: _Tiles, settings: SlideSettings) -> Iterator[tuple[int, np.ndarray]]:
    """Each tile's number and its logits times their weights, float32 (C, tile_px, tile_px), in order."""
    device = next(segmenter.parameters()).device
    dtype = choose_precision(device, settings.precision)
    weights = window_weights((settings.tile_px,) * 2, (settings.overlap_px,) * 2)
    weights = torch.from_numpy(weights).to(device)
    size = settings.batch_size
    batches = [slice(start, min(start + size, len(tiles))) for start in range(0, len(tiles), size)]
    depth = 1 + math.ceil(2 * max(1, settings.workers) / size)
    for rows, images in read_ahead(tiles, batches, max(1, settings.workers), depth):
        with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = segmenter(segmenter.normalised(images.to(device))) * weights
        yield from zip(range(rows.start, rows.stop), logits.float().cpu().numpy(), strict=True)
