"""Outlines as GeoJSON in level-0 pixels, as QuPath writes and reads them.

Out goes the tissue, one annotation of class "Tissue". In come annotations: polygons of the classes that are wanted
make the tissue, those of the classes that are not are cut out of it, whatever their order in the file. A polygon is
filled by the even-odd rule, which leaves its holes out and settles outlines that cross themselves. Points and lines
have no area and do not count; neither do annotations of other classes. What lies beyond the slide is cut off.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from dinoscope.errors import SlideError
from dinoscope.files import write_text
from dinoscope.slides.reader import Slide

__all__ = [
    *("NO_CLASS", "Annotations", "Region", "check_place", "fill_polygon", "mask_feature", "outline_document"),
    *("read_annotations", "read_regions", "write_outline"),
]

log = logging.getLogger(__name__)

NO_CLASS = "Unclassified"
_OUTLINE_CLASS = {"name": "Tissue", "color": [0, 158, 115]}
_SIMPLIFY_PX = 0.5  # of the mask: straightens its stairs
_CROSSINGS_AT_ONCE = 2**21

Polygon = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Region:
    """One annotation.

    Attributes:
        number: Place in the file, from 1 on.
        name: Its class.
        polygons: Rings of each polygon, the outer one first, (points, 2) level-0 pixels, x before y.
    """

    number: int
    name: str
    polygons: tuple[Polygon, ...]

    def __str__(self) -> str:
        return f"annotation {self.number} ({self.name})"


@dataclass(frozen=True)
class Annotations:
    """What somebody has outlined on a slide.

    Attributes:
        included: What is tissue.
        excluded: What is cut out of it.
        summary: How many there are, half a sentence.
    """

    included: tuple[Region, ...]
    excluded: tuple[Region, ...]
    summary: str

    def rasterised(self, slide: Slide, shape: tuple[int, int], downsample: float) -> np.ndarray:
        """The mask whose pixels have their centres inside; bool, of `shape`.

        Args:
            slide: What the annotations belong to.
            shape: Height and width of the mask.
            downsample: Side of its pixels in level-0 pixels.

        Raises:
            SlideError: An annotation lies outside of the slide.
        """
        masks = []
        for regions in (self.included, self.excluded):
            mask = np.zeros(shape, bool)
            for region in regions:
                check_place(region, slide)
                crossed = [fill_polygon(mask, polygon, downsample) for polygon in region.polygons]
                if any(crossed):
                    log.warning(
                        "slide %r: the outline of %s crosses itself: places that it runs around twice are left out",
                        slide.slide_id,
                        region,
                    )
            masks.append(mask)
        return masks[0] & ~masks[1]


def read_annotations(
    path: str | Path, slide_id: str, include: Sequence[str] = ("Tissue",), exclude: Sequence[str] = ()
) -> Annotations:
    """Reads a GeoJSON file of annotations, as QuPath exports them.

    Args:
        path: A FeatureCollection, one Feature, or a list of features.
        slide_id: Of the slide, for messages.
        include: Names of the classes that are tissue; `NO_CLASS` for annotations without.
        exclude: Names of the classes that are cut out of it.

    Raises:
        SlideError: The file is missing or no GeoJSON, a coordinate is no number, or nothing is included.
    """
    name = _name(path, slide_id)
    regions = read_regions(path, slide_id)
    counts = Counter(region.name for region in regions)
    included, excluded = (
        tuple(region for region in regions if region.name in names and region.polygons) for names in (include, exclude)
    )
    if not included:
        found = ", ".join(f"{number} {kind}" for kind, number in sorted(counts.items())) or "none"
        raise SlideError(
            f"{name} outline nothing of class {' or '.join(include) or '(none given)'} (found: {found}): set the class "
            "of the outlines in QuPath and export again, or name theirs in tissue.include"
        )
    others = sorted(set(counts) - {*include, *exclude})
    if others:
        log.warning(
            "%s: %d of classes that neither tissue.include nor tissue.exclude names are ignored (%s)",
            name,
            sum(counts[other] for other in others),
            ", ".join(others),
        )
    summary = f"{len(included)} annotations included, {len(excluded)} excluded"
    return Annotations(included, excluded, summary)


def read_regions(path: str | Path, slide_id: str) -> list[Region]:
    """All annotations of a GeoJSON file, in its order; those without area have no polygons.

    Raises:
        SlideError: The file is missing or no GeoJSON, or a coordinate is no number.
    """
    name = _name(path, slide_id)
    return list(_regions(_features(_document(path, name), name), name))


def write_outline(path: str | Path, mask: np.ndarray, downsample: float, width: int, height: int) -> None:
    """Writes the outlines of a mask as one annotation of class "Tissue" (see `outline_document`)."""
    write_text(path, json.dumps(outline_document(mask, downsample, width, height), separators=(",", ":")) + "\n")


def outline_document(mask: np.ndarray, downsample: float, width: int, height: int) -> dict[str, Any]:
    """The outlines of a mask as a GeoJSON FeatureCollection: one MultiPolygon with holes, level-0 pixels.

    Of an empty mask a collection of no feature.

    Args:
        mask: bool (rows, columns).
        downsample: Side of its pixels in level-0 pixels.
        width, height: Size of the slide; nothing reaches beyond.
    """
    feature = mask_feature(mask, downsample, width, height, "tissue", _OUTLINE_CLASS)
    return {"type": "FeatureCollection", "features": [] if feature is None else [feature]}


def mask_feature(
    mask: np.ndarray, downsample: float, width: int, height: int, name: str, classification: dict[str, Any]
) -> dict[str, Any] | None:
    """The outlines of a mask as one GeoJSON feature, a MultiPolygon with holes; None of an empty mask.

    Args:
        mask, downsample, width, height: As in `outline_document`.
        name: Of the annotation.
        classification: Its class, as QuPath writes it: "name" and "color" (RGB).
    """
    polygons = [
        [_ring(ring, downsample, (width, height)) for ring in polygon] for polygon in _outlines(mask.view(np.uint8))
    ]
    geometry = {"type": "MultiPolygon", "coordinates": polygons}
    properties = {"objectType": "annotation", "name": name, "classification": classification, "isLocked": False}
    return {"type": "Feature", "geometry": geometry, "properties": properties} if polygons else None


def fill_polygon(mask: np.ndarray, polygon: Polygon, downsample: float) -> bool:
    """Sets the pixels of a mask whose centres a polygon runs around an odd number of times.

    Args:
        mask: bool (rows, columns); changed.
        polygon: Its rings, (points, 2) level-0 pixels.
        downsample: Side of the mask's pixels in level-0 pixels.

    Returns:
        Whether an outline crosses itself.
    """
    rings = [ring / downsample for ring in polygon]
    points = np.concatenate(rings)
    top, bottom = (int(np.clip(edge, 0, mask.shape[0])) for edge in (points[:, 1].min(), points[:, 1].max() + 1))
    left, right = (int(np.clip(edge, 0, mask.shape[1])) for edge in (points[:, 0].min(), points[:, 0].max() + 1))
    if top >= bottom or left >= right:
        return False
    toggles = np.zeros((bottom - top, right - left + 1), np.uint8)
    for ring in rings:
        _toggle(toggles, ring - (left, top))
    inside = np.cumsum(toggles, axis=1, dtype=np.uint8)[:, :-1] & 1 > 0
    mask[top:bottom, left:right] |= inside
    whole = points.min() >= 0 and (points.max(axis=0) <= mask.shape[::-1]).all()
    areas = [abs(_signed_area(ring)) for ring in rings]
    length = sum(np.hypot(*np.diff(ring, axis=0).T).sum() for ring in rings)
    return bool(whole and abs(np.count_nonzero(inside) - (areas[0] - sum(areas[1:]))) > 0.02 * areas[0] + length)


def _toggle(toggles: np.ndarray, ring: np.ndarray) -> None:
    """Counts, for each row of pixel centres, where a ring crosses it: at the first pixel centre to the right."""
    rows, columns = toggles.shape
    start, end = ring, np.roll(ring, -1, axis=0)
    first, last = (
        np.clip(np.ceil(function(start[:, 1], end[:, 1]) - 0.5), 0, rows).astype(np.int64)
        for function in (np.minimum, np.maximum)
    )
    counts = last - first
    before = np.cumsum(counts) - counts
    for chunk in range(int(before[-1] // _CROSSINGS_AT_ONCE) + 1):
        edges = np.flatnonzero((before // _CROSSINGS_AT_ONCE == chunk) & (counts > 0))
        edge = np.repeat(edges, counts[edges])
        row = first[edge] + np.arange(len(edge)) - (np.cumsum(counts[edges]) - counts[edges]).repeat(counts[edges])
        slope = (end[edge, 0] - start[edge, 0]) / (end[edge, 1] - start[edge, 1])
        column = np.ceil(start[edge, 0] + (row + 0.5 - start[edge, 1]) * slope - 0.5)
        np.add.at(toggles, (row, np.clip(column, 0, columns - 1).astype(np.int64)), 1)


def _signed_area(ring: np.ndarray) -> float:
    x, y = (ring - ring[0]).T
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2)


def check_place(region: Region, slide: Slide) -> None:
    """Refuses an annotation that lies outside of the slide, and warns of one that reaches beyond.

    Raises:
        SlideError: It lies outside.
    """
    points = np.concatenate([polygon[0] for polygon in region.polygons])
    (left, top), (right, bottom) = points.min(axis=0), points.max(axis=0)
    if right <= 0 or bottom <= 0 or left >= slide.width or top >= slide.height:
        raise SlideError(
            f"slide {slide.slide_id!r}: {region} lies at x {left:.0f} to {right:.0f}, y {top:.0f} to {bottom:.0f}, "
            f"outside of the slide's {slide.width} x {slide.height} pixels: give the file of this slide, with "
            "coordinates in pixels of level 0"
        )
    if left < -1 or top < -1 or right > slide.width + 1 or bottom > slide.height + 1:
        log.warning("slide %r: %s reaches beyond the slide and is cut off there", slide.slide_id, region)


def _name(path: str | Path, slide_id: str) -> str:
    return f"slide {slide_id!r}: annotations {Path(path).name}"


def _document(path: str | Path, name: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise SlideError(f"{name} do not exist: export them from QuPath as GeoJSON, or give another method") from None
    except OSError as error:
        raise SlideError(f"{name} cannot be read ({error.strerror}): give a GeoJSON file") from None
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise SlideError(f"{name} are no JSON ({reason}): export them from QuPath as GeoJSON") from None


def _features(document: Any, name: str) -> list[dict[str, Any]]:
    if isinstance(document, dict) and document.get("type") == "FeatureCollection":
        document = document.get("features")
    elif isinstance(document, dict):
        document = [document]
    if isinstance(document, list) and all(
        isinstance(each, dict) and each.get("type") == "Feature" for each in document
    ):
        return document
    raise SlideError(f"{name} are JSON but no GeoJSON features: export them from QuPath as GeoJSON")


def _regions(features: Sequence[dict[str, Any]], name: str) -> Iterator[Region]:
    for number, feature in enumerate(features, start=1):
        kind = _class_name(feature)
        try:
            polygons = [_polygon(rings) for rings in _rings(feature.get("geometry"))]
        except (TypeError, ValueError, IndexError, KeyError, AttributeError):
            raise SlideError(
                f"{name}: the coordinates of annotation {number} ({kind}) are no lists of finite numbers as GeoJSON "
                "wants them: export it again"
            ) from None
        kept = tuple(polygon for polygon in polygons if polygon)
        if len(kept) < len(polygons):
            log.warning("%s: annotation %d (%s) has polygons without area, which do not count", name, number, kind)
        yield Region(number, kind, kept)


def _class_name(feature: dict[str, Any]) -> str:
    properties = feature.get("properties")
    given = properties.get("classification") if isinstance(properties, dict) else None
    if isinstance(given, dict) and isinstance(given.get("names"), list):
        given = ": ".join(map(str, given["names"]))  # how QuPath writes "Tumor: Positive"
    elif isinstance(given, dict):
        given = given.get("name")
    return str(given) if given else NO_CLASS


def _rings(geometry: Any) -> Iterator[Any]:
    """The rings of each polygon; of points and lines, none."""
    if geometry is None:
        return
    kind = geometry["type"]
    if kind == "GeometryCollection":
        for part in geometry["geometries"]:
            yield from _rings(part)
    elif kind == "MultiPolygon":
        yield from geometry["coordinates"]
    elif kind == "Polygon":
        yield geometry["coordinates"]


def _polygon(rings: Any) -> Polygon:
    """Rings as arrays; none if the outer one has no area."""
    arrays = [np.array([[float(point[0]), float(point[1])] for point in ring]).reshape(-1, 2) for ring in rings]
    if not all(np.isfinite(array).all() for array in arrays):
        raise ValueError("a coordinate is not finite")
    if not arrays or len(np.unique(arrays[0], axis=0)) < 3:
        return ()
    return tuple(array for array in arrays if len(array) > 2)


def _outlines(mask: np.ndarray) -> Iterator[list[np.ndarray]]:
    """Rings of every piece of a mask (uint8), the outer one first, in pixels of the mask; float32 (points, 2)."""
    # in a mask of twice the size each pixel of the rim touches the outside on one side at most, both ways
    double = np.zeros((2 * mask.shape[0] + 2, 2 * mask.shape[1] + 2), np.uint8)
    mask = _without_corner_bridges(mask)
    for row in (1, 2):
        for column in (1, 2):
            double[row:-1:2, column:-1:2] = mask
    contours, tree = cv2.findContours(double, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    rims = _on_the_rim(contours, double)
    for number in range(len(contours)):
        if tree[0, number, 3] >= 0:
            continue
        rings, hole = [rims[number]], tree[0, number, 2]
        while hole >= 0:
            rings.append(rims[hole])
            hole = tree[0, hole, 0]
        yield rings


def _without_corner_bridges(mask: np.ndarray) -> np.ndarray:
    """The mask with pixels added where two touch at a corner alone: a ring must not touch itself."""
    mask = cv2.copyMakeBorder(mask, 0, 1, 0, 1, cv2.BORDER_CONSTANT, value=0)
    while True:
        a, b, c, d = mask[:-1, :-1], mask[:-1, 1:], mask[1:, :-1], mask[1:, 1:]
        falling, rising = (a & d & ~b & ~c & 1) > 0, (b & c & ~a & ~d & 1) > 0
        if not (falling.any() or rising.any()):
            return mask[:-1, :-1]
        b[falling] = 1
        a[rising] = 1


def _on_the_rim(contours: Sequence[np.ndarray], double: np.ndarray) -> list[np.ndarray]:
    """Moves contours, which run through the centres of half pixels, out to their rim, and drops needless points."""
    if not contours:
        return []
    x, y = np.concatenate(contours)[:, 0].T
    shift_x = double[y, x - 1].astype(np.float32) - double[y, x + 1]
    shift_y = double[y - 1, x].astype(np.float32) - double[y + 1, x]
    rims = np.stack([x - 0.5 + shift_x / 2, y - 0.5 + shift_y / 2], axis=1, dtype=np.float32) / 2
    rings = np.split(rims, np.cumsum([len(contour) for contour in contours[:-1]]))
    simple = [cv2.approxPolyDP(ring[:, None], _SIMPLIFY_PX, True)[:, 0] for ring in rings]
    return [short if len(short) > 3 else ring for short, ring in zip(simple, rings, strict=True)]


def _ring(points: np.ndarray, downsample: float, size: tuple[int, int]) -> list[list[int]]:
    corners = np.minimum(np.rint(points * downsample), size).astype(int).tolist()
    return [*corners, corners[0]]
