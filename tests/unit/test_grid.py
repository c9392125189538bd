"""Grid: exact footprints, level choice, tissue fractions against brute force, errors with numbers."""

from collections.abc import Callable

import numpy as np
import pytest

from dinoscope.errors import ConfigError, SlideError
from dinoscope.slides.grid import TileSet, make_grid, plan_reading
from dinoscope.slides.reader import Slide
from dinoscope.slides.tissue import Tissue
from synthetic_slides import write_lossless


@pytest.fixture(scope="module")
def blank(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Slide]:
    """Opens an empty slide of some size, micrometres a pixel and levels; each is written once."""
    folder = tmp_path_factory.mktemp("slides")

    def opened(width: int = 3000, height: int = 2000, mpp=0.25, downsamples=(1, 2, 4, 8)) -> Slide:
        path = folder / f"{width}_{height}_{mpp}_{downsamples}.tiff"
        if not path.exists():
            write_lossless(path, np.full((height, width, 3), 200, np.uint8), mpp, downsamples)
        return Slide(path, "S 1")

    return opened


def all_tissue(slide: Slide, downsample: float = 32.0) -> Tissue:
    mask = np.ones((int(np.ceil(slide.height / downsample)), int(np.ceil(slide.width / downsample))), bool)
    return Tissue(mask, downsample, downsample * slide.mpp, "otsu", "test", 0.0)


@pytest.mark.parametrize(
    ("tile_px", "mpp", "level", "read_px", "footprint_px"),
    [
        (224, 0.25, 0, 224, 224),
        (224, 0.5, 1, 224, 448),
        (224, 0.49, 0, 439, 439),
        (256, 1.0, 2, 256, 1024),
        (200, 0.7, 1, 280, 560),
        (101, 0.61, 1, 123, 246),
        (64, 3.0, 3, 96, 768),
        (224, 0.24, 0, 215, 215),
    ],
)
def test_level_and_footprint(blank, tile_px: int, mpp: float, level: int, read_px: int, footprint_px: int) -> None:
    with blank() as slide:
        reading = plan_reading(slide, TileSet("t", tile_px, mpp))
        assert (reading.level, reading.read_px, reading.footprint_px) == (level, read_px, footprint_px)
        assert reading.footprint_px == round(tile_px * mpp / 0.25)
        coarser = [step for step in slide.level_downsamples if step <= footprint_px / tile_px]
        assert slide.level_downsamples[level] == max(coarser, default=1)


def test_a_level_that_is_nominally_right_is_used(blank) -> None:
    with blank(width=3002, height=2002, downsamples=(1, 4)) as slide:
        assert 4 < slide.level_downsamples[1] < 4.004
        reading = plan_reading(slide, TileSet("t", 224, 1.0))
        assert (reading.level, reading.read_px, reading.footprint_px) == (1, 224, 896)


@pytest.mark.parametrize("seed", range(6))
def test_grid_against_brute_force(blank, seed: int) -> None:
    rng = np.random.default_rng(seed)
    with blank(width=int(rng.integers(900, 1500)), height=int(rng.integers(700, 1100))) as slide:
        tile_px, mpp = int(rng.integers(30, 120)), float(rng.uniform(0.25, 1.2))
        stride_px = int(rng.integers(20, 150))
        downsample = float(rng.choice([16, 21.3, 32]))
        shape = (int(np.ceil(slide.height / downsample)), int(np.ceil(slide.width / downsample)))
        mask = rng.random(shape) < 0.5
        tissue = Tissue(mask, downsample, downsample * slide.mpp, "otsu", "test", 0.0)
        grid = make_grid(slide, tissue, TileSet("t", tile_px, mpp, min_tissue=0.5, stride_px=stride_px))
        footprint, stride = round(tile_px * mpp / 0.25), round(stride_px * mpp / 0.25)
        kept, candidates = {}, 0
        for y in range(0, slide.height - footprint + 1, stride):
            for x in range(0, slide.width - footprint + 1, stride):
                candidates += 1
                fraction = brute_fraction(mask, downsample, x, y, footprint)
                if fraction >= 0.5:
                    kept[x, y] = fraction
        assert grid.num_candidates == candidates
        assert list(zip(grid.x.tolist(), grid.y.tolist(), strict=True)) == sorted(kept, key=lambda place: place[::-1])
        assert np.allclose(grid.tissue_fraction, list(kept.values()), atol=1e-6)
        if len(grid):
            assert grid.x.max() + footprint <= slide.width and grid.y.max() + footprint <= slide.height


def brute_fraction(mask: np.ndarray, downsample: float, x: int, y: int, side: int) -> float:
    """Sums the overlap of the square with every mask pixel."""
    down, across = (
        np.clip(np.minimum(start + side, edges + downsample) - np.maximum(start, edges), 0, None)
        for start, edges in ((y, np.arange(mask.shape[0]) * downsample), (x, np.arange(mask.shape[1]) * downsample))
    )
    return float((mask * np.outer(down, across)).sum() / side**2)


def test_tiles_of_a_set_fill_the_slide_without_gap_or_overlap(blank) -> None:
    with blank() as slide:
        grid = make_grid(slide, all_tissue(slide), TileSet("t", 100, 0.5))
        covered = np.zeros((slide.height, slide.width), int)
        for x, y in zip(grid.x, grid.y, strict=True):
            covered[y : y + 200, x : x + 200] += 1
        assert (covered == 1).all() and len(grid) == grid.num_candidates == 150


@pytest.mark.parametrize(
    ("method", "least"), [("otsu", 0.5), ("cytology", 0.012), ("fluorescence", 0.25), ("none", 0.0)]
)
def test_least_tissue_depends_on_the_method_unless_given(blank, method: str, least: float) -> None:
    with blank() as slide:
        tissue = Tissue(all_tissue(slide).mask, 32.0, 8.0, method, "test", 0.0)
        assert make_grid(slide, tissue, TileSet("t", 100, 0.5)).min_tissue == pytest.approx(least)
        assert make_grid(slide, tissue, TileSet("t", 100, 0.5, min_tissue=0.2)).min_tissue == 0.2


def test_a_slide_that_is_too_coarse_is_refused_with_the_numbers(blank) -> None:
    with blank() as slide:
        assert plan_reading(slide, TileSet("t", 100, 0.239)).footprint_px == 96
        with pytest.raises(SlideError, match=r"'S 1', tile set t: tiles at mpp 0\.2 .* 1\.25 times.* only mpp 0\.25"):
            plan_reading(slide, TileSet("t", 100, 0.2))


def test_a_slide_that_is_too_small_is_refused_with_the_numbers(blank) -> None:
    with blank() as slide:
        assert plan_reading(slide, TileSet("t", 1000, 0.5)).footprint_px == 2000
        with pytest.raises(
            SlideError, match=r"'S 1', tile set t: a tile of 1001 px .* 2002 x 2002 .* only 3000 x 2000"
        ):
            plan_reading(slide, TileSet("t", 1001, 0.5))


def test_pixels_that_are_not_square_are_refused_unless_overruled(blank) -> None:
    with blank(mpp=(0.25, 0.2525)) as slide:
        assert plan_reading(slide, TileSet("t", 100, 0.5)).footprint_px == 199
    with blank(mpp=(0.25, 0.26)) as slide:
        with pytest.raises(SlideError, match=r"mpp 0\.25 horizontally and 0\.26 vertically.*column mpp"):
            plan_reading(slide, TileSet("t", 100, 0.5))
        with Slide(slide.path, "S 1", mpp=0.25) as overruled:
            assert plan_reading(overruled, TileSet("t", 100, 0.5)).footprint_px == 200


@pytest.mark.parametrize(("tile_px", "mpp"), [(0, 0.5), (40_000, 0.5), (100, 0.0), (100, -1.0)])
def test_impossible_tile_sets(tile_px: int, mpp: float) -> None:
    with pytest.raises(ConfigError, match="tile set t"):
        TileSet("t", tile_px, mpp)
