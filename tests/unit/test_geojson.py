"""GeoJSON: outlines out, annotations in, filled as a slow point-in-polygon test fills them."""

import json
import logging
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
from matplotlib.path import Path as Outline

from dinoscope.errors import SlideError
from dinoscope.slides.geojson import fill_polygon, outline_document, read_annotations, write_outline
from dinoscope.slides.reader import Slide
from dinoscope.slides.tissue import detect_tissue
from synthetic_slides import blobs, write_lossless

SQUARE = [[100, 100], [900, 100], [900, 700], [100, 700], [100, 100]]
HOLE = [[300, 300], [500, 300], [500, 500], [300, 500], [300, 300]]


@pytest.fixture(scope="module")
def slide_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1600 x 1200 px at 2 um a pixel, with two pieces, one of which has a hole."""
    image = blobs(1200, 1600, [(500, 500, 400), (1300, 900, 200)], (200, 120, 160), (243, 242, 244))
    cv2.circle(image, (500, 500), 120, (243, 242, 244), cv2.FILLED)
    return write_lossless(tmp_path_factory.mktemp("slides") / "s.tiff", image, 2.0, (1, 4))


def feature(coordinates, name: str | None = "Tissue", kind: str = "Polygon") -> dict:
    properties = {"objectType": "annotation"} | ({"classification": {"name": name}} if name else {})
    return {"type": "Feature", "geometry": {"type": kind, "coordinates": coordinates}, "properties": properties}


def collection(*features: dict) -> dict:
    return {"type": "FeatureCollection", "features": list(features)}


def write(path: Path, document: object) -> Path:
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def mask_of(slide_path: Path, tmp_path: Path, document: object, **classes) -> np.ndarray:
    annotations = read_annotations(write(tmp_path / "a.geojson", document), "S", **classes)
    with Slide(slide_path, "S") as slide:
        return annotations.rasterised(slide, (120, 160), 10.0)


# filling


@pytest.mark.parametrize("seed", range(12))
def test_polygons_are_filled_as_point_by_point(seed: int) -> None:
    rng = np.random.default_rng(seed)
    angles = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(3, 40))))
    reach = rng.uniform(50, 500, len(angles))
    centre = rng.uniform(-100, 900, 2)  # some lie half outside
    ring = centre + np.stack([np.cos(angles), np.sin(angles)], axis=1) * reach[:, None]
    rings = (ring, centre + (ring - centre)[::-1] * 0.4)
    downsample = float(rng.choice([8.0, 10.6, 13.0]))
    mask = np.zeros((64, 71), bool)
    assert not fill_polygon(mask, rings, downsample)
    y, x = np.mgrid[: mask.shape[0], : mask.shape[1]]
    centres = np.stack([x.ravel() + 0.5, y.ravel() + 0.5], axis=1) * downsample
    outer, inner = (Outline(each).contains_points(centres).reshape(mask.shape) for each in rings)
    assert outer.sum() > 20
    assert np.array_equal(mask, outer & ~inner)


def test_crossing_outlines_are_told_and_filled_by_the_even_odd_rule() -> None:
    eight = np.array([[10, 10], [90, 10], [10, 90], [90, 90]], float)
    mask = np.zeros((100, 100), bool)
    assert fill_polygon(mask, (eight,), 1.0)
    assert mask[15, 50] and mask[85, 50] and not mask[50, 20] and not mask[50, 80]
    angles = np.arange(5) * 4 * np.pi / 5
    star = 50 + 45 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    mask = np.zeros((100, 100), bool)
    assert fill_polygon(mask, (star,), 1.0)
    assert not mask[50, 50] and mask[50, 85]


def test_a_polygon_with_very_many_long_edges_takes_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    ring = rng.uniform(0, 300, (4001, 2))
    whole, pieces = np.zeros((2, 300, 300), bool)
    fill_polygon(whole, (ring,), 1.0)
    monkeypatch.setattr("dinoscope.slides.geojson._CROSSINGS_AT_ONCE", 999)
    fill_polygon(pieces, (ring,), 1.0)
    assert np.array_equal(whole, pieces) and 0.3 < whole.mean() < 0.7


# reading


def test_holes_exclusions_and_their_order(slide_path: Path, tmp_path: Path) -> None:
    cut = [[700, 100], [900, 100], [900, 300], [700, 300], [700, 100]]
    document = collection(feature([cut], "Ink"), feature([SQUARE, HOLE]), feature([HOLE], "Fold"))
    mask = mask_of(slide_path, tmp_path, document, exclude=["Ink", "Fold"])
    expected = np.zeros((120, 160), bool)
    expected[10:70, 10:90] = True
    expected[30:50, 30:50] = expected[10:30, 70:90] = False
    assert np.array_equal(mask, expected)


def test_kinds_of_documents_and_geometries(slide_path: Path, tmp_path: Path) -> None:
    wanted = mask_of(slide_path, tmp_path, collection(feature([SQUARE])))
    assert wanted.any()
    composite = feature([SQUARE], None)
    composite["properties"]["classification"] = {"names": ["Tumor", "Positive"], "color": [1, 2, 3]}
    geometries = feature(None)
    geometries["geometry"] = {"type": "GeometryCollection", "geometries": [feature([SQUARE])["geometry"]]}
    for document, include in (
        (feature([SQUARE]), ["Tissue"]),
        ([feature([SQUARE])], ["Tissue"]),
        (collection(feature([[SQUARE]], kind="MultiPolygon")), ["Tissue"]),
        (collection(feature([[[*point, 0.0] for point in SQUARE]])), ["Tissue"]),
        (collection(feature([SQUARE[:-1]])), ["Tissue"]),
        (collection(geometries), ["Tissue"]),
        (collection(composite), ["Tumor: Positive"]),
        (collection(feature([SQUARE], None)), ["Unclassified"]),
        (
            collection(feature([10, 10], kind="Point"), feature([SQUARE]), feature(SQUARE, kind="LineString")),
            ["Tissue"],
        ),
        ("\ufeff" + json.dumps(collection(feature([SQUARE]))), ["Tissue"]),
    ):
        assert np.array_equal(mask_of(slide_path, tmp_path, document, include=include), wanted)


@pytest.mark.parametrize(
    ("document", "sentence"),
    [
        ("{not json", "are no JSON"),
        ("", "are no JSON"),
        ("[" * 100_000, "are no JSON"),
        ("[1, 2]", "JSON but no GeoJSON features"),
        ('{"type": "Topology"}', "JSON but no GeoJSON features"),
        ({"type": "FeatureCollection", "features": {}}, "JSON but no GeoJSON features"),
        (collection(), r"outline nothing of class Tissue \(found: none\)"),
        (
            collection(feature([SQUARE], "Tisue"), feature([SQUARE], None)),
            r"\(found: 1 Tisue, 1 Unclassified\): set the class",
        ),
        (collection(feature([])), "outline nothing of class Tissue"),
        (collection(feature([[]])), "outline nothing of class Tissue"),
        (collection(feature([[[5, 5], [5, 5], [5, 5]]])), "outline nothing of class Tissue"),
        (collection(feature([[[5, 5], [9, "x"], [7, 8]]])), r"coordinates of annotation 1 \(Tissue\)"),
        (collection(feature([[[5, 5], [9], [7, 8]]])), r"coordinates of annotation 1 \(Tissue\)"),
        (collection(feature(7)), r"coordinates of annotation 1 \(Tissue\)"),
        (collection(feature([[[5, 5], [float("nan"), 9], [7, 8]]])), r"coordinates of annotation 1 \(Tissue\)"),
        (collection(feature([[[5, 5], [float("inf"), 9], [7, 8]]])), r"coordinates of annotation 1 \(Tissue\)"),
        (
            collection(feature([SQUARE]), feature([[[9000, 0], [9900, 0], [9900, 500]]])),
            r"annotation 2 \(Tissue\) lies at x 9000 to 9900, y 0 to 500, outside of the slide's 1600 x 1200",
        ),
    ],
)
def test_bad_files_end_in_one_sentence(slide_path: Path, tmp_path: Path, document: object, sentence: str) -> None:
    with pytest.raises(SlideError, match=sentence) as caught:
        mask_of(slide_path, tmp_path, document)
    assert "slide 'S'" in str(caught.value) and "\n" not in str(caught.value) and str(tmp_path) not in str(caught.value)


def test_missing_files_and_folders_end_in_one_sentence(tmp_path: Path) -> None:
    for path, sentence in ((tmp_path / "no.geojson", "do not exist"), (tmp_path, "cannot be read")):
        with pytest.raises(SlideError, match=f"slide 'S': annotations .*{sentence}"):
            read_annotations(path, "S")


def test_what_is_odd_is_a_warning(slide_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    eight = [[100, 800], [600, 800], [100, 1100], [600, 1100], [100, 800]]
    beyond = [[1500, 1000], [1700, 1000], [1700, 1300], [1500, 1300], [1500, 1000]]
    document = collection(
        feature([[SQUARE], [[[1, 1], [1, 1], [1, 1]]]], kind="MultiPolygon"),
        feature([eight]),
        feature([beyond]),
        feature([HOLE], "Necrosis"),
    )
    with caplog.at_level(logging.WARNING):
        mask = mask_of(slide_path, tmp_path, document)
    for words in (
        "annotation 1 (Tissue) has polygons without area",
        "annotation 2 (Tissue) crosses itself",
        "annotation 3 (Tissue) reaches beyond the slide",
        "1 of classes that neither tissue.include nor tissue.exclude names are ignored (Necrosis)",
    ):
        assert words in caplog.text
    assert len(caplog.records) == 4 and mask[119, 159] and not mask[119, 149]


# writing


def rings_touch_nothing(document: dict) -> bool:
    """Whether no two edges of a polygon's rings meet but at the corner that they share."""
    for polygon in document["features"][0]["geometry"]["coordinates"]:
        edges = [edge for ring in polygon for edge in pairwise(ring)]
        starts, ends = np.array(edges, float).transpose(1, 0, 2)
        for first in range(len(edges)):
            for other in range(first + 1, len(edges)):
                shared = {tuple(starts[first]), tuple(ends[first])} & {tuple(starts[other]), tuple(ends[other])}
                if not shared and _cross(starts[first], ends[first], starts[other], ends[other]):
                    return False
        corners = [tuple(point) for ring in polygon for point in ring[:-1]]
        if len(set(corners)) < len(corners):
            return False
    return True


def _cross(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> bool:
    def side(p, q, r):
        return np.sign((q[0] - p[0]) * (r[1] - p[1]) - (q[1] - p[1]) * (r[0] - p[0]))

    apart = (np.maximum(a, b) < np.minimum(c, d)).any() or (np.maximum(c, d) < np.minimum(a, b)).any()
    return not apart and side(a, b, c) * side(a, b, d) <= 0 and side(c, d, a) * side(c, d, b) <= 0


@pytest.mark.parametrize("seed", range(8))
def test_outlines_of_ragged_masks_are_valid_and_come_back(seed: int, slide_path: Path, tmp_path: Path) -> None:
    noise = cv2.GaussianBlur(np.random.default_rng(seed).standard_normal((60, 80)), (0, 0), 1.2 + seed / 4)
    mask = noise > 0.1 * noise.std()
    document = outline_document(mask, 8.0, 640, 480)
    assert rings_touch_nothing(document)
    annotations = read_annotations(write(tmp_path / "o.geojson", document), "S")
    with Slide(slide_path, "S") as slide:
        back = annotations.rasterised(slide, mask.shape, 8.0)
    rim = cv2.Laplacian(mask.astype(np.uint8), cv2.CV_8U) > 0
    assert np.count_nonzero(back != mask) < 0.05 * rim.sum()


def test_an_empty_mask_has_no_outline() -> None:
    assert outline_document(np.zeros((20, 30), bool), 8.0, 240, 160) == {"type": "FeatureCollection", "features": []}


def test_an_exported_outline_gives_the_same_tissue_as_annotations(slide_path: Path, tmp_path: Path) -> None:
    with Slide(slide_path, "S") as slide:
        tissue = detect_tissue(slide, "otsu")
        write_outline(tmp_path / "o.geojson", tissue.mask, tissue.downsample, slide.width, slide.height)
        again = detect_tissue(slide, "annotations", annotations=read_annotations(tmp_path / "o.geojson", "S"))
    assert again.mask.shape == tissue.mask.shape and again.method == "annotations"
    union = (again.mask | tissue.mask).sum()
    assert (again.mask & tissue.mask).sum() / union > 0.995
    document = json.loads((tmp_path / "o.geojson").read_text())
    (feature,) = document["features"]
    assert feature["properties"]["classification"]["name"] == "Tissue" and feature["geometry"]["type"] == "MultiPolygon"
    polygons = feature["geometry"]["coordinates"]
    assert sorted(len(polygon) for polygon in polygons) == [1, 2]
    for ring in (ring for polygon in polygons for ring in polygon):
        assert ring[0] == ring[-1] and len(ring) > 4
        assert all(0 <= x <= 1600 and 0 <= y <= 1200 for x, y in ring)
    # rings lie on the rim of the mask's pixels
    areas = [[abs(cv2.contourArea(np.array(ring, np.int32))) for ring in polygon] for polygon in polygons]
    area = sum(outer - sum(holes) for outer, *holes in areas)
    assert area == pytest.approx(tissue.mask.sum() * tissue.downsample**2, rel=0.005)


def test_annotations_may_still_be_cleaned(slide_path: Path, tmp_path: Path) -> None:
    speck = [[1400, 100], [1440, 100], [1440, 140], [1400, 140], [1400, 100]]  # 6,400 um2
    path = write(tmp_path / "a.geojson", collection(feature([SQUARE, HOLE]), feature([speck])))
    annotations = read_annotations(path, "S")
    with Slide(slide_path, "S") as slide:
        plain = detect_tissue(slide, "annotations", annotations=annotations)
        cleaned = detect_tissue(
            slide, "annotations", annotations=annotations, min_area_um2=10_000, max_hole_um2=1_000_000
        )
        assert plain.mask[30, 355] and not plain.mask[100, 100] and plain.min_area_um2 == 0
        assert not cleaned.mask[30, 355] and cleaned.mask[100, 100] and cleaned.min_area_um2 == 10_000
        with pytest.raises(SlideError, match=r"nothing is left of its annotations \(2 annotations included"):
            detect_tissue(slide, "annotations", annotations=annotations, min_area_um2=1e9)
