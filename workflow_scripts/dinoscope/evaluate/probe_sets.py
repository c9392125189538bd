"""The images that a run is asked about while it trains, of the groups of the selection alone."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np

from dinoscope.data.images import read_image
from dinoscope.errors import ConfigError, SlideError
from dinoscope.evaluate.embedding import read_mask, tile
from dinoscope.evaluate.folds import balanced_rows
from dinoscope.evaluate.labels import Label
from dinoscope.evaluate.tile_sets import ImageSet
from dinoscope.evaluate.units import Units
from dinoscope.features.read_ahead import load_tiles
from dinoscope.slides.padding import read_tile
from dinoscope.slides.reader import SlidePool
from dinoscope.train.probing import ProbeSet

__all__ = ["probe_of_images", "probe_of_slides", "sampled_tiles"]

_log = logging.getLogger(__name__)
_NOTHING = np.zeros(0, dtype=np.int64)


def probe_of_images(
    images: ImageSet, units: Units, *, count: int, seed: int, tile_px: int, grey: bool, instances: bool, enlarge: float
) -> ProbeSet:
    """Images of the selection's groups, as equal as possible a group.

    Args:
        images: A tile set, or images with masks.
        units: The same, with their sets.
        count: At most so many images.
        seed: Which ones.
        tile_px: Side of tiles; of images with masks the largest square that fits all is cut out of the middle.
        grey: Take colour away.
        instances: Mask values above 0 are instances of one class.
        enlarge: Times that images with masks are enlarged.

    Raises:
        ConfigError: No group is for selection.
    """
    chosen = np.flatnonzero([unit.set == "selection" for unit in units.units])
    if not len(chosen):
        raise ConfigError(
            f"task {units.task}: no group is for selection, so there is nothing to ask a run about; raise "
            "evaluation.selection.fraction"
        )
    groups = units.groups
    rows = chosen[balanced_rows(groups[chosen], count, seed)]
    if units.kind == "classes":
        pixels = np.stack([tile(read_image(images.folder, images.files[row]), tile_px, grey) for row in rows])
        return ProbeSet(pixels, groups[rows], units.targets[rows], np.zeros((0, 1, 1), np.uint8))
    found, masks = [], []
    for row in rows:
        image, mask = read_image(images.folder, images.files[row]), read_mask(images, int(row), instances)
        size = (round(image.shape[1] * enlarge), round(image.shape[0] * enlarge))
        found.append(cv2.resize(image, size, interpolation=cv2.INTER_AREA if enlarge < 1 else cv2.INTER_CUBIC))
        masks.append(cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST))
    side = min(min(image.shape[:2]) for image in found)
    return ProbeSet(
        np.stack([tile(_middle(image, side), side, grey) for image in found]),
        groups[rows],
        _NOTHING,
        np.stack([_middle(mask, side) for mask in masks]),
    )


def probe_of_slides(
    slides: Sequence[str],
    case_of: Mapping[str, str],
    pool: SlidePool,
    tiles: Mapping[str, Path],
    label: Label | None,
    *,
    count: int,
    seed: int,
    skip: bool = False,
) -> ProbeSet:
    """Tiles of the selection's slides, as equal as possible a slide, with the class of their slide or case.

    Args:
        slides: Of the selection cases.
        case_of: slide_id -> case_id.
        pool: The slides.
        tiles: slide_id -> its tile manifest.
        label: Of classes; None, the tiles have none.
        count: Tiles at most.
        seed: Which ones.
        skip: Leave out slides that cannot be read.

    Raises:
        ConfigError: There is no tile.
        SlideError: A slide cannot be read, and must not be skipped.
    """
    pixels, of = sampled_tiles(slides, pool, tiles, count=count, seed=seed, skip=skip)
    if not len(of):
        raise ConfigError(
            "there is no tile of a selection case to ask runs about; hold out three cases or more, raise "
            "evaluation.selection.fraction, or set evaluation.probe.source"
        )
    cases = {case: number for number, case in enumerate(dict.fromkeys(case_of[slide] for slide in slides))}
    groups = np.array([cases[case_of[slides[number]]] for number in of], dtype=np.int64)
    labels = _NOTHING
    if label is not None:
        numbers = {name: number for number, name in enumerate(label.classes)}
        keys = [slides[number] if label.key == "slide_id" else case_of[slides[number]] for number in of]
        labels = np.array([numbers[label.values[key]] if key in label.values else -1 for key in keys], dtype=np.int64)
    return ProbeSet(pixels, groups, labels, np.zeros((0, 1, 1), np.uint8))


def sampled_tiles(
    slides: Sequence[str], pool: SlidePool, tiles: Mapping[str, Path], *, count: int, seed: int, skip: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Tiles (N, S, S, 3) uint8, as equal in number as possible a slide, and the number (N,) of the slide of each.

    Args:
        slides: Which.
        pool: The slides.
        tiles: slide_id -> its tile manifest, of tiles of one size.
        count: Tiles at most.
        seed: Which ones.
        skip: Leave out slides that cannot be read, with a warning.

    Raises:
        SlideError: A slide cannot be read, and must not be skipped.
    """
    listed = {slide: load_tiles(tiles[slide]) for slide in slides}
    of = np.concatenate([np.full(len(listed[slide]), number) for number, slide in enumerate(slides)] or [_NOTHING])
    first = np.cumsum([0, *(len(listed[slide]) for slide in slides)])
    rows = balanced_rows(of, count, seed) if len(of) else _NOTHING
    read: dict[int, np.ndarray] = {}
    unreadable: set[str] = set()
    for row in rows:
        slide = slides[of[row]]
        table, place = listed[slide], row - first[of[row]]
        where = (int(column[place]) for column in (table.x, table.y, table.level, table.read_px))
        try:
            if slide not in unreadable:
                read[row] = read_tile(pool[slide], *where, table.tile_px, table.footprint_px)
        except SlideError as error:
            if not skip:
                raise
            _log.warning("slide %s is left out: %s", slide, error)
            unreadable.add(slide)
    kept = [row for row in rows if row in read and slides[of[row]] not in unreadable]
    return np.stack([read[row] for row in kept]) if kept else np.zeros((0, 1, 1, 3), np.uint8), of[kept]


def _middle(image: np.ndarray, side: int) -> np.ndarray:
    top, left = ((length - side) // 2 for length in image.shape[:2])
    return image[top : top + side, left : left + side]
