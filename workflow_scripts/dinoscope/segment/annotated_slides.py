"""Tiles of slides with masks from QuPath's annotations, filled at the resolution of each tile.

    open_dataset("slides", "results/manifests/train.parquet", "train", slides="slides.tsv", annotations="annotations",
                 class_map={"Stroma": "stroma", "Tumor": "tumour", "Artefact": "ignore"})

A pixel of a mask is of the class whose outline its centre lies in, by the even-odd rule that the tissue mask uses too.
Where outlines overlap, the class that stands later in `class_map` covers those before it. Cases are not divided by the
split: slides of use eval are the test, or a share of the cases is (slides/table.py); of the others a share is for
validation.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from dinoscope.data.tiles import MappedTiles, SlideAccess, SlideTiles, Tile, find_tiles
from dinoscope.errors import ConfigError, MasksError, SlideError
from dinoscope.segment.masks import IGNORE, Problems, Sample, check_masks
from dinoscope.segment.metrics import IGNORED
from dinoscope.segment.palettes import Colour, default_palette, palette_of
from dinoscope.slides.geojson import Region, check_place, fill_polygon, read_regions
from dinoscope.slides.table import SlideRecord, split_cases

__all__ = ["AnnotatedTiles", "Outlines", "SlidesSettings", "open_slides"]

_SUFFIXES = (".geojson", ".json")


@dataclass(frozen=True)
class SlidesSettings:
    """How annotated slides are read.

    Attributes:
        slides: The slides: a table, a folder or a glob.
        annotations: Folder with a GeoJSON file for each slide, named after its slide_id or its file.
        class_map: Class of each QuPath class ("Unclassified" for annotations without); "ignore": nothing is learned
            there; None: such annotations do not count.
        background: Class of what no annotation covers; None: ignored.
        region: QuPath class of outlines in which all was annotated: what lies outside of them is ignored.
        skip_unannotated: Slides without a file are left out; else they are an error.
        min_labelled: Least share of a tile's pixels that are not ignored; other tiles are left out.
        val_fraction: Share of the training cases held out for validation.
        test_fraction: Share of all cases held out for the test, where the table has no slide of use eval.
        seed: Of these draws.
        reader: module:Class that opens slides of other formats.
        palette: Colours of classes, "#rrggbb".
    """

    slides: str = ""
    annotations: str = ""
    class_map: Mapping[str, str | None] = field(default_factory=dict)
    background: str | None = "background"
    region: str | None = None
    skip_unannotated: bool = False
    min_labelled: float = 0.0
    val_fraction: float = 0.2
    test_fraction: float = 0.2
    seed: int = 0
    reader: str | None = None
    palette: Mapping[str, Colour] | None = None


class Outlines:
    """The outlines of one slide, with the class of each, in the order in which they cover each other."""

    def __init__(self, painted: Sequence[tuple[Region, int]], limits: Sequence[Region] | None, ground: int) -> None:
        """Keeps them.

        Args:
            painted: Annotations and their class numbers (255: ignored); later ones cover earlier ones.
            limits: Annotations outside of which all is ignored; None: there is no such limit.
            ground: Class number of what nothing covers.
        """
        self.regions = [region for region, _ in painted]
        self._numbers = [number for _, number in painted]
        self._limits, self._ground = limits, ground
        self._boxes, self._limit_boxes = _boxes(self.regions), _boxes(limits or ())

    def mask(self, tile: Tile) -> np.ndarray:
        """Classes of a tile, uint8 (tile_px, tile_px)."""
        mask = np.full((tile.kind.tile_px, tile.kind.tile_px), self._ground, np.uint8)
        for place in _near(self._boxes, tile):
            mask[_filled(self.regions[place], tile)] = self._numbers[place]
        if self._limits is not None:
            inside = np.zeros(mask.shape, bool)
            for place in _near(self._limit_boxes, tile):
                inside |= _filled(self._limits[place], tile)
            mask[~inside] = IGNORED
        return mask


class AnnotatedTiles:
    """Tiles with masks (a `MaskDataset`)."""

    def __init__(
        self,
        tiles: SlideTiles,
        rows: Sequence[int],
        outlines: Mapping[str, Outlines],
        cases: Mapping[str, str],
        classes: tuple[str, ...],
        palette: np.ndarray,
    ) -> None:
        """Takes the tiles of a manifest, the rows of this split, and by slide its outlines and its case."""
        self._tiles, self._outlines = tiles, outlines
        self._rows = np.asarray(rows, np.int64)
        self.classes, self.palette = classes, palette
        self.names = [tiles.sample_id(int(row)) for row in self._rows]
        self.groups = [cases[tiles.tiles[int(row)].kind.slide_id] for row in self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        image, name = self._tiles.read(int(self._rows[index]))
        return Sample(image, self.mask(index), name)

    def mask(self, index: int) -> np.ndarray:
        """The mask of a tile, whose image is not read; uint8 (tile_px, tile_px)."""
        tile = self._tiles.tiles[int(self._rows[index])]
        return self._outlines[tile.kind.slide_id].mask(tile)

    def content(self, index: int) -> bytes:
        """What a run is sealed with of a tile: the manifest it stands in, its name and its mask, but no pixel of it."""
        return hashlib.sha256(
            f"{self._tiles.digest()} {self.names[index]}".encode() + self.mask(index).tobytes()
        ).digest()

    def check(self, allow_empty: bool = False) -> np.ndarray:
        """Fills every mask and opens every slide; see `check_masks`."""
        problems = Problems()
        for slide_id, outlines in self._outlines.items():
            try:
                for region in outlines.regions:
                    check_place(region, self._tiles.slide(slide_id))
            except SlideError as error:
                problems.add("slides whose annotations cannot be laid on them", str(error))
        if problems:
            raise MasksError(f"{problems.sentence()}; give the annotations of these slides, in pixels of level 0")
        return check_masks("annotated slides", self.classes, self._count, len(self), allow_empty)

    def _count(self, index: int) -> tuple[np.ndarray, list[tuple[str, str]]]:
        return np.bincount(self.mask(index).ravel(), minlength=IGNORED + 1)[: len(self.classes)], []


def open_slides(root: Path, split: str, settings: SlidesSettings) -> AnnotatedTiles:
    """The tiles of one split.

    Args:
        root: A manifest of tiles.
        split: "train", "val" or "test".
        settings: Slides, annotations and classes.

    Raises:
        ConfigError: A setting is missing or wrong.
        ManifestError: The manifest is damaged or empty.
        MasksError: Annotations are missing, damaged or of unknown classes, or no tile is left.
    """
    _check_settings(settings)
    mapped, records, digest = find_tiles(root, settings.slides, None)
    tiled = {kind.slide_id for kind in mapped.kinds}
    on_tiles = [record for record in records if record.slide_id in tiled]
    if settings.skip_unannotated:  # before the draw, so that each split has its share of what is annotated
        on_tiles = [each for each in on_tiles if _annotation_path(each, Path(settings.annotations)) is not None]
    split_of = _splits(on_tiles, settings)
    chosen = [record for record in on_tiles if split_of.get(record.slide_id) == split]
    named = (settings.background, *settings.class_map.values())
    classes = tuple(dict.fromkeys(name for name in named if name not in (None, IGNORE)))
    outlines = _read_outlines(chosen, settings, classes)
    rows = _rows(mapped, outlines, settings.min_labelled)
    if not rows:
        raise MasksError(
            f"no tile of {root.name} is in split {split} ({len(chosen)} of {len(tiled)} slides are, {len(outlines)} "
            "annotated): annotate more slides, change column `use` or the fractions, or lower min_labelled"
        )
    tiles = SlideTiles(mapped, records, digest, SlideAccess(reader=settings.reader))
    cases = {record.slide_id: record.case_id for record in chosen}
    palette = palette_of(settings.palette, classes, default_palette(len(classes)))
    return AnnotatedTiles(tiles, rows, outlines, cases, classes, palette)


def _rows(tiles: MappedTiles, outlines: Mapping[str, Outlines], min_labelled: float) -> list[int]:
    """Rows of the tiles on slides with outlines that have enough of them."""
    return [
        row
        for slide_id, start, count in tiles.slide_runs()
        if slide_id in outlines
        for row in range(start, start + count)
        if min_labelled <= 0 or _labelled(outlines[slide_id], tiles[row]) >= min_labelled
    ]


def _splits(records: Sequence[SlideRecord], settings: SlidesSettings) -> dict[str, str]:
    """Split of each slide."""
    for name in ("val_fraction", "test_fraction"):
        if not 0 <= getattr(settings, name) <= 0.9:
            raise ConfigError(f"{name} is {getattr(settings, name)}; a share of the cases from 0 to 0.9 is wanted")
    serves = split_cases(records, settings.test_fraction, settings.seed)
    training = [
        replace(record, use=frozenset({"train"})) for record in records if serves.get(record.slide_id) == "train"
    ]
    chosen_by = split_cases(training, settings.val_fraction, settings.seed)
    return {slide: "test" for slide, use in serves.items() if use == "eval"} | {
        slide: "val" if use == "eval" else "train" for slide, use in chosen_by.items()
    }


def _check_settings(settings: SlidesSettings) -> None:
    for name in ("slides", "annotations", "class_map"):
        if not getattr(settings, name):
            raise ConfigError(f"a data set of kind slides needs {name}")
    if not Path(settings.annotations).is_dir():
        raise ConfigError(
            f"annotations: {settings.annotations} is no folder; export GeoJSON files from QuPath into one"
        )


def _read_outlines(
    records: Sequence[SlideRecord], settings: SlidesSettings, classes: Sequence[str]
) -> dict[str, Outlines]:
    """Outlines of the slides that have some; all that is wrong in one message."""
    problems, unknown, outlines = Problems(), Counter(), {}
    for record in records:
        path = _annotation_path(record, Path(settings.annotations))
        if path is None:
            problems.add(f"slides without annotations in {settings.annotations}", record.slide_id)
            continue
        try:
            regions = read_regions(path, record.slide_id)
        except SlideError as error:
            problems.add("annotations that cannot be used", str(error))
            continue
        unknown.update(region.name for region in regions if region.name not in {*settings.class_map, settings.region})
        outlines[record.slide_id] = _outlines(regions, settings, classes)
    for name, count in unknown.items():
        problems.add("annotation classes that class_map does not name", f"{name}: {count}")
    if problems:
        raise MasksError(
            f"{problems.sentence()}; export what is missing, and give each class one in class_map, or null"
        )
    return outlines


def _annotation_path(record: SlideRecord, folder: Path) -> Path | None:
    names = dict.fromkeys((record.slide_id, record.path.name, record.path.stem))
    paths = [folder / f"{name}{suffix}" for name in names for suffix in _SUFFIXES]
    return next((path for path in paths if path.is_file()), None)


def _outlines(regions: Sequence[Region], settings: SlidesSettings, classes: Sequence[str]) -> Outlines:
    order = list(settings.class_map)
    counting = [region for region in regions if region.polygons and settings.class_map.get(region.name) is not None]
    counting.sort(key=lambda region: order.index(region.name))
    painted = [(region, _number(settings.class_map[region.name], classes)) for region in counting]
    limits = None
    if settings.region is not None:
        limits = [region for region in regions if region.name == settings.region and region.polygons]
    return Outlines(painted, limits, _number(settings.background, classes))


def _number(name: str | None, classes: Sequence[str]) -> int:
    return IGNORED if name in (None, IGNORE) else classes.index(name)


def _labelled(outlines: Outlines, tile: Tile) -> float:
    """Share of a tile that is not ignored."""
    return float((outlines.mask(tile) != IGNORED).mean())


def _boxes(regions: Sequence[Region]) -> np.ndarray:
    """Left, top, right and bottom of each, in level-0 pixels; float64 (regions, 4)."""
    points = [np.concatenate([polygon[0] for polygon in region.polygons]) for region in regions]
    return np.array([[*each.min(axis=0), *each.max(axis=0)] for each in points], np.float64).reshape(-1, 4)


def _near(boxes: np.ndarray, tile: Tile) -> list[int]:
    """Numbers of the boxes that reach into a tile, in order."""
    side = tile.kind.footprint_px
    apart = (
        (boxes[:, 0] >= tile.x + side)
        | (boxes[:, 2] <= tile.x)
        | (boxes[:, 1] >= tile.y + side)
        | (boxes[:, 3] <= tile.y)
    )
    return np.flatnonzero(~apart).tolist()


def _filled(region: Region, tile: Tile) -> np.ndarray:
    """Where a region covers a tile; bool (tile_px, tile_px)."""
    mask = np.zeros((tile.kind.tile_px, tile.kind.tile_px), bool)
    for polygon in region.polygons:
        moved = tuple(ring - (tile.x, tile.y) for ring in polygon)
        fill_polygon(mask, moved, tile.kind.footprint_px / tile.kind.tile_px)
    return mask
