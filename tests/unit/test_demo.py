"""Demo slides: the same bytes for the same seed, look like stained tissue, tile as the demo needs."""

import hashlib
from pathlib import Path

import cv2
import numpy as np
import pytest

from dinoscope.slides.demo import DEMO_SLIDES, make_demo_slide, make_demo_slides
from dinoscope.slides.demo_cytology import draw_smear
from dinoscope.slides.demo_histology import Section, draw_section
from dinoscope.slides.demo_texture import STAINS, stain, tiling_noise, wrapped
from dinoscope.slides.grid import TileSet, make_grid
from dinoscope.slides.reader import Slide
from dinoscope.slides.tissue import detect_tissue

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("demo")
    return dict(zip(DEMO_SLIDES, make_demo_slides(folder, processes=2), strict=True))


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_openslide_opens_them_as_pyramids(demo: dict[str, Path]) -> None:
    assert set(demo) == {"demo_he_1", "demo_he_2", "demo_he_3", "demo_ihc_1", "demo_cyto_1"}
    assert sum(path.stat().st_size for path in demo.values()) < 60e6
    for name, path in demo.items():
        assert path.name == f"{name}.tiff"
        with Slide(path) as slide:
            assert (slide.vendor, slide.mpp, slide.mpp_source) == ("generic-tiff", 0.5, "file")
            assert slide.level_downsamples == (1, 2, 4, 8)
            assert 4000 <= slide.width <= 6000 and slide.height >= 4000


def test_levels_are_averages_of_level_0(demo: dict[str, Path]) -> None:
    with Slide(demo["demo_he_2"]) as slide:
        for level, step in enumerate((1, 2, 4, 8)):
            region = slide.read_region(2048, 1536, level, 1024 // step, 1024 // step)
            fine = slide.read_region(2048, 1536, 0, 1024, 1024)
            wanted = cv2.resize(fine, region.shape[1::-1], interpolation=cv2.INTER_AREA)
            assert np.abs(region.astype(int) - wanted).mean() < 4, level  # what JPEG takes away
            shift = cv2.phaseCorrelate(region[..., 1].astype(np.float32), wanted[..., 1].astype(np.float32))[0]
            assert np.hypot(*shift) < 0.1


def test_neither_processes_nor_repetition_change_the_bytes(demo: dict[str, Path], tmp_path: Path) -> None:
    threads = cv2.getNumThreads()
    try:
        cv2.setNumThreads(1)
        for name in ("demo_cyto_1", "demo_he_3"):
            assert digest(make_demo_slide(name, tmp_path)) == digest(demo[name])
    finally:
        cv2.setNumThreads(threads)


def test_the_seed_changes_the_tissue() -> None:
    sections = [draw_section(Section(), 512, 640, (seed, 0)) for seed in (0, 0, 1)]
    smears = [draw_smear(512, 640, 10, 1, (seed, 0)) for seed in (0, 0, 1)]
    for first, again, other in (sections, smears):
        assert np.array_equal(first, again) and not np.array_equal(first, other)


@pytest.mark.parametrize(
    ("name", "method", "features", "train"),
    [
        ("demo_he_1", "otsu", (250, 450), (50, 100)),
        ("demo_he_2", "otsu", (250, 450), (50, 100)),
        ("demo_he_3", "otsu", (250, 450), (45, 100)),
        ("demo_ihc_1", "otsu", (200, 400), (40, 100)),
        ("demo_cyto_1", "cytology", (100, 300), (30, 72)),
    ],
)
def test_number_of_tiles(
    demo: dict[str, Path], name: str, method: str, features: tuple[int, int], train: tuple[int, int]
) -> None:
    with Slide(demo[name]) as slide:
        tissue = detect_tissue(slide)
        assert tissue.method == method
        for (least, most), tile_px in ((features, 224), (train, 512)):
            assert least <= len(make_grid(slide, tissue, TileSet("t", tile_px, 0.5))) <= most


def test_tiles_of_a_slide_differ_in_kind(demo: dict[str, Path]) -> None:
    """Epithelium has several times the haematoxylin of stroma, at the scale of regions."""
    for name in ("demo_he_1", "demo_he_2", "demo_he_3"):
        with Slide(demo[name]) as slide:
            grid = make_grid(slide, detect_tissue(slide), TileSet("t", 224, 0.5, min_tissue=0.99))
            places = zip(grid.x.tolist(), grid.y.tolist(), strict=True)
            reds = [slide.read_region(x, y, 0, 224, 224)[..., 0].mean() for x, y in places]
        low, high = np.percentile(reds, (10, 90))
        assert high - low > 30


def test_nuclei_are_6_to_10_micrometres_wide(demo: dict[str, Path]) -> None:
    with Slide(demo["demo_cyto_1"]) as slide:
        image = slide.read_region(0, 0, 0, slide.width, slide.height)
    dark = cv2.morphologyEx((image.max(axis=2) < 110).astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    areas = np.sort(cv2.connectedComponentsWithStats(dark)[2][1:, cv2.CC_STAT_AREA])
    diameters_um = 0.5 * np.sqrt(4 * areas / np.pi)
    of_half_the_area = diameters_um[np.searchsorted(areas.cumsum(), areas.sum() / 2)]
    assert len(areas) > 500 and 5 < of_half_the_area < 11


def test_stain_follows_beer_and_lambert() -> None:
    ground = np.full((1, 1, 3), 240, np.float32)
    amount = np.full((1, 1), 0.7, np.float32)
    light = stain({"eosin": amount, "haematoxylin": 2 * amount}, ground)
    density = 0.7 * np.array(STAINS["eosin"]) + 1.4 * np.array(STAINS["haematoxylin"])
    assert np.allclose(light, 240 * 10**-density, rtol=1e-5)


def test_noise_repeats_without_a_seam() -> None:
    noise = tiling_noise(np.random.default_rng(0), 256, 12, 3)
    assert abs(noise.mean()) < 1e-3 and abs(noise.std() - 1) < 1e-3
    across, down = (np.abs(noise - np.roll(noise, 1, axis)) for axis in (1, 0))
    assert across[:, 0].mean() < 1.3 * across.mean() and down[0].mean() < 1.3 * down.mean()
    window = wrapped(noise, 200, 100, 600)
    assert np.array_equal(window[:56, :256], noise[200:]) and np.array_equal(window[56:, 256:512], noise[:44])
