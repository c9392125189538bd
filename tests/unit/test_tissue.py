"""Tissue: found where it was drawn, nowhere on blank slides, by the method that fits."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from dinoscope.errors import SlideError
from dinoscope.slides import demo_cytology
from dinoscope.slides.grid import TileSet, make_grid
from dinoscope.slides.reader import Slide
from dinoscope.slides.tiff_writer import encode_tiles, write_pyramid
from dinoscope.slides.tissue import _cleaned, choose_method, detect_tissue, working_level
from synthetic_slides import blobs, write_lossless

GLASS, PINK, PURPLE, BROWN, PALE_BLUE = (243, 242, 244), (222, 140, 170), (110, 70, 140), (140, 95, 60), (222, 226, 238)
SIDE, MPP = 2048, 2.0
PIECES = [(600, 700, 350), (1500, 1400, 300)]


def slide_of(tmp_path: Path, image: np.ndarray, mpp: float = MPP) -> Slide:
    return Slide(write_lossless(tmp_path / "s.tiff", image, mpp, (1, 4)), "S 1")


def overlap(tissue, places: list[tuple[int, int, int]]) -> float:
    """Intersection over union with the discs that were drawn."""
    truth = np.zeros((SIDE, SIDE), np.uint8)
    for x, y, radius in places:
        cv2.circle(truth, (x, y), radius, 1, cv2.FILLED)
    truth = cv2.resize(truth, tissue.mask.shape[::-1], interpolation=cv2.INTER_AREA) > 0
    return (tissue.mask & truth).sum() / (tissue.mask | truth).sum()


@pytest.mark.parametrize(
    ("colour", "ground"),
    [
        *((colour, GLASS) for colour in (PINK, PURPLE, BROWN, PALE_BLUE)),
        *((colour, (255, 255, 255)) for colour in (PINK, PALE_BLUE)),
        (PINK, (226, 224, 230)),
    ],
)
def test_stained_tissue_is_found(tmp_path: Path, colour: tuple, ground: tuple) -> None:
    with slide_of(tmp_path, blobs(SIDE, SIDE, PIECES, colour, ground)) as slide:
        tissue = detect_tissue(slide)
        assert tissue.method == "otsu"
        assert overlap(tissue, PIECES) > 0.95
        truth_mm2 = sum(np.pi * (radius * MPP / 1000) ** 2 for *_, radius in PIECES)
        assert tissue.area_mm2 == pytest.approx(truth_mm2, rel=0.05)


def test_pale_tissue_beside_dark_tissue_is_kept(tmp_path: Path) -> None:
    image = blobs(SIDE, SIDE, PIECES[:1], PURPLE, GLASS)
    cv2.circle(image, PIECES[1][:2], PIECES[1][2], (236, 215, 226), cv2.FILLED)
    with slide_of(tmp_path, image) as slide:
        assert overlap(detect_tissue(slide), PIECES) > 0.95


@pytest.mark.parametrize(
    ("look", "method"),
    [
        *((look, method) for look in ("white", "glass", "uneven light") for method in ("auto", "otsu", "cytology")),
        *((look, method) for look in ("black", "noisy dark", "glass") for method in ("auto", "fluorescence")),
    ],
)
def test_blank_slides_have_no_tissue(tmp_path: Path, look: str, method: str) -> None:
    rng = np.random.default_rng(0)
    level = {"white": 255, "glass": 238, "uneven light": 240, "black": 0, "noisy dark": 6}[look]
    image = np.full((SIDE, SIDE, 3), level, np.float32)
    if look == "uneven light":
        image -= np.linspace(0, 12, SIDE, dtype=np.float32)[None, :, None]
    if look not in {"white", "black"}:
        image += rng.normal(0, 2.5, image.shape)
    image = np.clip(image, 0, 255).astype(np.uint8)
    path = tmp_path / "blank.tiff"
    write_pyramid(path, [(SIDE, SIDE, encode_tiles(image, quality=50))], MPP)
    with (
        Slide(path, "S 1") as slide,
        pytest.raises(SlideError, match=r"'S 1': no tissue found with method.*try another"),
    ):
        detect_tissue(slide, method)


def test_black_fill_is_no_tissue_and_no_fluorescence(tmp_path: Path) -> None:
    image = blobs(SIDE, SIDE, PIECES, PINK, GLASS)
    image[:, :200] = image[1850:] = 0
    path = tmp_path / "black.tiff"
    write_pyramid(path, [(SIDE, SIDE, encode_tiles(image, quality=60))], MPP)
    with Slide(path, "S") as slide:
        tissue = detect_tissue(slide)
        assert tissue.method == "otsu" and overlap(tissue, PIECES) > 0.94


def test_small_pieces_and_small_holes(tmp_path: Path) -> None:
    image = blobs(SIDE, SIDE, [(700, 700, 500), (1800, 200, 40), (1800, 1800, 14)], PINK, GLASS)
    for x, radius in ((500, 20), (900, 120)):
        cv2.circle(image, (x, 700), radius, GLASS, cv2.FILLED)
    with slide_of(tmp_path, image) as slide:
        tissue = detect_tissue(slide, "otsu")

    def at(x: int, y: int) -> bool:
        return bool(tissue.mask[int(y / tissue.downsample), int(x / tissue.downsample)])

    assert at(700, 300) and at(1800, 200)  # a piece of 20,000 um2
    assert not at(1800, 1800)  # of 2,500
    assert at(500, 700)  # a hole of 5,000 um2
    assert not at(900, 700)  # of 180,000


def smear(num_cells: int = 260) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
    rng = np.random.default_rng(3)
    cells = [(int(x), int(y), int(r)) for x, y, r in rng.uniform((40, 40, 5), (2000, 2000, 12), (num_cells, 3))]
    return blobs(SIDE, SIDE, cells, (150, 200, 205), (248, 248, 247)), cells


def test_smears_are_recognised_and_keep_their_cells(tmp_path: Path) -> None:
    image, cells = smear()
    with slide_of(tmp_path, image) as slide:
        tissue = detect_tissue(slide)
        assert tissue.method == "cytology" and "objects" in tissue.reason
        found = [tissue.mask[int(y / tissue.downsample), int(x / tissue.downsample)] for x, y, _ in cells]
        assert np.mean(found) >= 0.98
        assert working_level(slide, "cytology") == (0, 2) and working_level(slide, "otsu") == (1, 1)
        with pytest.raises(SlideError, match="no tissue found with method otsu"):
            detect_tissue(slide, "otsu")


def test_sparse_islands_of_tissue_are_no_smear() -> None:
    rng = np.random.default_rng(3)
    places = [(int(x), int(y), 60) for x, y in rng.uniform(80, 1960, (25, 2))]
    assert choose_method(blobs(SIDE, SIDE, places, PINK, GLASS)[::4, ::4], 8.0)[0] == "otsu"


def test_fluorescence_is_bright_signal_on_dark_ground(tmp_path: Path) -> None:
    image = blobs(SIDE, SIDE, PIECES, (0, 0, 90), (2, 1, 8))
    with slide_of(tmp_path, image) as slide:
        tissue = detect_tissue(slide)
        assert tissue.method == "fluorescence"
        assert overlap(tissue, PIECES) > 0.9


def test_none_takes_all_of_the_slide_without_reading_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with slide_of(tmp_path, np.full((500, 300, 3), 255, np.uint8)) as slide:
        monkeypatch.setattr(Slide, "shrunk", lambda *_: pytest.fail("was read"))
        tissue = detect_tissue(slide, "none")
        assert tissue.mask.all() and tissue.threshold is None
        assert tissue.mask.shape == (125, 75) and tissue.downsample == 4


def test_a_slide_without_levels_is_read_in_small_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = blobs(SIDE, SIDE, PIECES, PINK, GLASS)
    path = write_lossless(tmp_path / "one.tiff", image, 0.25)
    monkeypatch.setattr("dinoscope.slides.reader._BLOCK_PX", (512, 256))
    largest, calls = [], []
    with Slide(path, "S") as slide:
        read = slide._read
        monkeypatch.setattr(slide, "_read", lambda *place: largest.append(place[3] * place[4]) or read(*place))
        tissue = detect_tissue(slide, "otsu", lambda: calls.append(1))
        assert working_level(slide, "otsu") == (0, 32) and tissue.mpp == 8
        assert max(largest) <= 512 * 256 and len(calls) == slide.num_blocks(0, 32) == 32
        assert overlap(tissue, PIECES) > 0.8


@pytest.mark.parametrize(
    ("mpp", "downsamples", "expected"),
    [(0.25, (1, 4, 16, 32), (3, 1)), (0.25, (1, 4, 16), (2, 2)), (0.5, (1,), (0, 16)), (20.0, (1,), (0, 1))],
)
def test_working_level(tmp_path: Path, mpp: float, downsamples: tuple, expected: tuple[int, int]) -> None:
    path = write_lossless(tmp_path / "w.tiff", np.full((1024, 1024, 3), 240, np.uint8), mpp, downsamples)
    with Slide(path, "S") as slide:
        assert working_level(slide, "otsu") == expected


def test_real_slides(shared: Path) -> None:
    expected = {
        "CMU-1-Small-Region.svs": ("otsu", 0.3, 0.5),
        "test3-DAPI-2-(387).ndpi": ("fluorescence", 0.6, 0.9),
        "dicom_camelyon": ("otsu", 0.2, 0.35),
    }
    for name, (method, least, most) in expected.items():
        with Slide(shared / "data" / "wsi" / name, "S") as slide:
            tissue = detect_tissue(slide)
        assert tissue.method == method
        assert least < tissue.mask.mean() < most
    # lymph node of the DICOM slide, and the gap between its sections
    step = tissue.downsample
    assert tissue.mask[int(300 / step), int(150 / step)] and not tissue.mask[int(600 / step), int(600 / step)]


@pytest.mark.parametrize(("num_cells", "num_sheets", "tile_px"), [(120, 2, 224), (40, 0, 256), (12, 0, 512)])
def test_cells_of_sparse_smears_lie_in_kept_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_cells: int, num_sheets: int, tile_px: int
) -> None:
    """At least 95 % of all cells, leucocytes included, with the settings that nobody has touched."""
    centres, places = [], demo_cytology._places
    monkeypatch.setattr(demo_cytology, "_places", lambda *given: centres.append(places(*given)) or centres[-1])
    image = demo_cytology.draw_smear(4096, 4608, num_cells, num_sheets, (num_cells, 0))
    levels = [image, image[::2, ::2]]
    path = tmp_path / "smear.tiff"
    write_pyramid(path, [(level.shape[1], level.shape[0], encode_tiles(level)) for level in levels], 0.5)
    with Slide(path, "S") as slide:
        tissue = detect_tissue(slide, "cytology")
        grid = make_grid(slide, tissue, TileSet("t", tile_px, 0.5))
    x, y = np.concatenate(centres).T
    found = np.zeros(len(x), bool)
    for left, top in zip(grid.x, grid.y, strict=True):
        found |= (x >= left) & (x < left + tile_px) & (y >= top) & (y < top + tile_px)
    assert len(x) >= 1.5 * num_cells and found.mean() >= 0.95
    assert len(grid) < 0.6 * grid.num_candidates


def test_areas_can_be_set(tmp_path: Path) -> None:
    image = blobs(SIDE, SIDE, [(700, 700, 500), (1800, 1800, 14)], PINK, GLASS)
    cv2.circle(image, (900, 700), 120, GLASS, cv2.FILLED)
    with slide_of(tmp_path, image) as slide:
        tissue = detect_tissue(slide, "otsu", min_area_um2=500, max_hole_um2=300_000)
        assert tissue.describe()["tissue_min_area_um2"] == 500 and tissue.describe()["tissue_max_hole_um2"] == 300_000
        speck, hole = (
            bool(tissue.mask[int(y / tissue.downsample), int(x / tissue.downsample)])
            for x, y in ((1800, 1800), (900, 700))
        )
        assert speck and hole
        with pytest.raises(SlideError, match="pieces below 1e\\+09 square micrometres are left out"):
            detect_tissue(slide, "otsu", min_area_um2=1e9)


@pytest.mark.parametrize("seed", range(5))
def test_small_pieces_and_holes_are_those_of_labelling(seed: int) -> None:
    noise = cv2.GaussianBlur(np.random.default_rng(seed).standard_normal((150, 180)), (0, 0), 2.0)
    mask = noise > 0
    cleaned = _cleaned(mask, 1.0, {"max_hole_um2": 40.0, "min_area_um2": 60.0})

    def without_small(where: np.ndarray, area: float, connectivity: int) -> np.ndarray:
        labels, stats = cv2.connectedComponentsWithStats(where.astype(np.uint8), connectivity=connectivity)[1:3]
        keep = stats[:, cv2.CC_STAT_AREA] > area
        keep[0] = False
        return keep[labels]

    # what touches the border is no hole, however small
    outside = cv2.connectedComponents((~np.pad(mask, 1)).astype(np.uint8), connectivity=4)[1][1:-1, 1:-1] == 1
    filled = ~(without_small(~mask, 40.0, 4) | (~mask & outside))
    assert np.count_nonzero(cleaned != without_small(filled, 59.5, 8)) <= 0.005 * mask.size


def test_sections_are_connected_pieces_in_raster_order(tmp_path: Path) -> None:
    with slide_of(tmp_path, blobs(SIDE, SIDE, PIECES, PINK, GLASS)) as slide:
        tissue = detect_tissue(slide)
    assert np.array_equal(tissue.sections > 0, tissue.mask)
    step = tissue.downsample
    assert [int(tissue.sections[int(y / step), int(x / step)]) for x, y, _ in PIECES] == [1, 2]
