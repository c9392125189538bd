"""Grid: exact footprints, level choice, tissue fractions against brute force, errors with numbers."""

from collections.abc import Callable

import cv2
import numpy as np
import pytest

from dinoscope.errors import ConfigError, SlideError
from dinoscope.slides.grid import TileSet, drop_blurred, make_grid, plan_reading
from dinoscope.slides.padding import read_tile
from dinoscope.slides.quality import SHARES, QualityLimits, QualityMaps
from dinoscope.slides.reader import Slide
from dinoscope.slides.tissue import Tissue
from synthetic_slides import texture, write_lossless


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


@pytest.mark.parametrize("mpp", [(0.25, 1.0, 0.5), (0.3,)])
def test_several_mpp_are_a_set_each(mpp: tuple[float, ...]) -> None:
    tile_set = TileSet("t", 100, mpp, 0.3, 50, "pad", 1.2)
    assert [*tile_set.single()] == [TileSet("t", 100, each, 0.3, 50, "pad", 1.2) for each in mpp]
    for wrong in ((), (0.5, 0.5), (0.5, 0.0)):
        with pytest.raises(ConfigError, match="tile set t"):
            TileSet("t", 100, wrong)


@pytest.mark.parametrize("seed", range(6))
def test_edges(blank, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tile_px, stride_px = int(rng.integers(40, 200)), int(rng.integers(20, 220))
    with blank(width=1301, height=1007) as slide:
        grids = {
            edge: make_grid(slide, all_tissue(slide, 1.0), TileSet("t", tile_px, 0.5, 0.0, stride_px, edge))
            for edge in ("drop", "shift", "pad")
        }
        side, stride = grids["drop"].reading.footprint_px, grids["drop"].reading.stride_px
        for axis, length in (("x", 1301), ("y", 1007)):
            starts = {edge: sorted(set(getattr(grid, axis).tolist())) for edge, grid in grids.items()}
            whole = [start for start in range(0, length, stride) if start + side <= length]
            assert starts["drop"] == whole
            if max(whole[-1] + side, whole[-1] + stride) >= length:
                assert starts["shift"] == starts["pad"] == whole
            else:
                assert starts["shift"] == [*whole, length - side]
                assert starts["pad"] == [*whole, whole[-1] + stride]
        for edge, grid in grids.items():
            assert len(grid) == grid.num_candidates
            inside = (grid.x + side <= slide.width) & (grid.y + side <= slide.height)
            assert (grid.x >= 0).all() and (grid.y >= 0).all() and (inside.all() or edge == "pad")
            # what lies beyond the slide holds no tissue
            seen = (np.minimum(grid.x + side, 1301) - grid.x) * (np.minimum(grid.y + side, 1007) - grid.y) / side**2
            assert np.allclose(grid.tissue_fraction, np.minimum(seen, 1), atol=1e-6)
        if stride <= side:  # no gaps wanted
            covered = np.zeros((1007, 1301), bool)
            for x, y in zip(grids["shift"].x, grids["shift"].y, strict=True):
                covered[y : y + side, x : x + side] = True
            assert covered.all()


def test_a_slide_smaller_than_a_tile_is_padded_if_wanted(blank) -> None:
    with blank(width=300, height=1007) as slide:
        with pytest.raises(SlideError, match=r"only 300 x 1007 .* set edge to pad"):
            plan_reading(slide, TileSet("t", 200, 0.5, edge="shift"))
        grid = make_grid(slide, all_tissue(slide), TileSet("t", 200, 0.5, 0.0, edge="pad"))
        assert list(zip(grid.x.tolist(), grid.y.tolist(), strict=True)) == [(0, 0), (0, 400), (0, 800)]


def test_upsampling_is_an_error_unless_allowed(blank) -> None:
    with blank() as slide:
        for most, fits in ((1.0, False), (1.24, False), (1.25, True)):
            tile_set = TileSet("t", 100, 0.2, max_upsample=most)
            if fits:
                assert plan_reading(slide, tile_set)[:3] == (0, 80, 80)
            else:
                with pytest.raises(SlideError, match=rf"1\.25 times.*at most {most:g} times is allowed"):
                    plan_reading(slide, tile_set)


def test_tiles_that_fail_a_limit_are_dropped_with_the_reason(blank) -> None:
    rng = np.random.default_rng(0)
    with blank(width=1300, height=1000) as slide:
        masks = {name: (rng.random((125, 163)) < 0.5).astype(np.uint8) for name in SHARES}
        maps = QualityMaps({name: cv2.integral(mask) for name, mask in masks.items()}, dict.fromkeys(SHARES, 8.0))
        tissue = Tissue(rng.random((125, 163)) < 0.5, 8.0, 2.0, "otsu", "test", 0.0)
        tile_set = TileSet("t", 32, 0.5, min_tissue=0.45)
        unlimited = make_grid(slide, tissue, tile_set, maps)
        grid = make_grid(slide, tissue, tile_set, maps, QualityLimits(max_white=0.5, max_pen=0.52, max_grey=1.0))
        assert set(unlimited.dropped) == {"tissue"} and set(grid.dropped) == {"tissue", "white", "pen"}
        kept, white, pen = [], [], []
        for x, y in zip(unlimited.x.tolist(), unlimited.y.tolist(), strict=True):
            shares = {name: brute_fraction(mask, 8.0, x, y, 64) for name, mask in masks.items()}
            list_of = white if shares["white"] > 0.5 else pen if shares["pen"] > 0.52 else kept
            list_of.append((x, y))
        assert list(zip(grid.x.tolist(), grid.y.tolist(), strict=True)) == kept
        assert grid.dropped["white"].tolist() == [list(place) for place in white]
        assert grid.dropped["pen"].tolist() == [list(place) for place in pen]
        wanted = [brute_fraction(masks["grey"], 8.0, x, y, 64) for x, y in kept]
        assert np.allclose(grid.quality["grey_fraction"], wanted, atol=1e-6)
        lost = make_grid(slide, tissue, TileSet("t", 32, 0.5, min_tissue=0.0)).num_candidates - len(unlimited)
        assert len(grid.dropped["tissue"]) == lost


def test_blurred_tiles_are_dropped(blank) -> None:
    with blank() as slide:
        grid = make_grid(slide, all_tissue(slide), TileSet("t", 100, 0.5))
        focus = np.arange(len(grid), dtype=float)
        assert len(drop_blurred(grid, focus, None)) == len(grid)
        sharp = drop_blurred(grid, focus, 10.0)
        assert len(sharp) == len(grid) - 10 and sharp.quality["focus"].tolist() == focus[10:].tolist()
        assert sharp.x.tolist() == grid.x[10:].tolist() and sharp.section.shape == sharp.x.shape
        assert sharp.dropped["focus"].tolist() == np.stack([grid.x, grid.y], axis=1)[:10].tolist()


def test_sections_are_the_pieces_that_tiles_lie_on(blank) -> None:
    mask = np.zeros((250, 375), np.uint8)
    places = [(60, 60, 40), (180, 60, 30), (100, 180, 50), (300, 180, 55)]
    for x, y, radius in places:
        cv2.circle(mask, (x, y), radius, 1, cv2.FILLED)
    mask[240, 20] = 1  # smaller than any of the places looked at
    with blank() as slide:
        tissue = Tissue(mask > 0, 8.0, 2.0, "otsu", "test", 0.0)
        grid = make_grid(slide, tissue, TileSet("t", 100, 0.5, min_tissue=1e-6))
        for x, y, section in zip(grid.x, grid.y, grid.section, strict=True):
            inside = tissue.sections[y // 8 : (y + 199) // 8 + 1, x // 8 : (x + 199) // 8 + 1]
            counts = np.bincount(inside[inside > 0])
            assert counts[section] >= 0.5 * counts.max() and counts[section] > 0
        assert set(grid.section) == set(range(1, 6))


# pixels


def padded(image: np.ndarray, side: int) -> np.ndarray:
    return np.pad(image, ((0, side), (0, side), (0, 0)), constant_values=255)


def area_average(square: np.ndarray, tile_px: int) -> np.ndarray:
    """Averages exact areas of level 0, slowly: every tile pixel's overlap with every old one, in float64."""
    side = len(square)
    edges = np.arange(tile_px + 1) * side / tile_px
    old = np.arange(side)
    overlap = np.clip(np.minimum(edges[1:, None], old + 1) - np.maximum(edges[:-1, None], old), 0, None)
    down = np.tensordot(overlap, square.astype(np.float64), 1)
    return np.tensordot(down, overlap, (1, 1)).transpose(0, 2, 1) * (tile_px / side) ** 2


@pytest.mark.parametrize("edge", ["drop", "shift", "pad"])
@pytest.mark.parametrize("seed", range(4))
def test_every_tile_equals_a_slow_average_of_level_0(tmp_path, seed: int, edge: str) -> None:
    rng = np.random.default_rng([seed, len(edge)])
    # whole numbers of pixels on all levels, whose scale OpenSlide then knows exactly
    height, width = 4 * rng.integers(175, 250, 2)
    image = texture(int(height), int(width), seed)
    downsamples = [(1,), (1, 2), (1, 2, 4), (1, 4)][seed]
    with Slide(write_lossless(tmp_path / "s.tiff", image, 0.25, downsamples), "S") as slide:
        tile_px, stride_px = int(rng.integers(30, 90)), int(rng.integers(50, 120))
        mpps = tuple(np.round(rng.uniform(0.25, 1.6, 3), 3).tolist())
        for tile_set in TileSet("t", tile_px, mpps, 0.0, stride_px, edge).single():
            grid = make_grid(slide, all_tissue(slide), tile_set)
            level, read_px, side, _ = grid.reading
            level0, means = padded(image, side), []
            for x, y in zip(grid.x.tolist(), grid.y.tolist(), strict=True):
                tile = read_tile(slide, x, y, level, read_px, tile_px, side)
                wanted = area_average(level0[y : y + side, x : x + side], tile_px)
                means.append(np.abs(tile - wanted).mean())
            assert len(means) == grid.num_candidates > 0
            assert np.mean(means) <= 1.0 and max(means) <= 2, (tile_set.mpp, level)


def test_tiles_inside_are_read_as_ever_and_padding_is_the_background(blank) -> None:
    with blank() as slide:
        grid = make_grid(slide, all_tissue(slide), TileSet("t", 224, 1.1, 0.0, edge="pad"))
        level, read_px, side, _ = grid.reading
        for x, y in zip(grid.x.tolist(), grid.y.tolist(), strict=True):
            tile = read_tile(slide, x, y, level, read_px, 224, side)
            inside = min(side, slide.width - x) / side * min(side, slide.height - y) / side
            assert (np.abs(tile.astype(int) - 200) <= 1).all(axis=2).mean() == pytest.approx(inside, abs=0.02)
            assert tile.min() >= 190  # next to the edge cubic sums overshoot a little
        slide.background = (10, 20, 30)
        corner = read_tile(slide, slide.width - 100, slide.height - 100, 0, 200, 200, 200)
        assert corner[150, 150].tolist() == [10, 20, 30] and corner[50, 50].tolist() == [200, 200, 200]


def test_tiles_of_a_real_pyramid_match_level_0_at_any_mpp(shared) -> None:
    with Slide(shared / "data/wsi/test3-DAPI-2-(387).ndpi", "S") as slide:
        for mpp in (0.29, 0.46, 0.71, 1.0, 1.37):
            (grid,) = (
                make_grid(slide, all_tissue(slide), one) for one in TileSet("t", 200, mpp, 0.0, 230, "shift").single()
            )
            level, read_px, side, _ = grid.reading
            chosen = np.random.default_rng(0).choice(len(grid), min(8, len(grid)), replace=False)
            for x, y in zip(grid.x[chosen].tolist(), grid.y[chosen].tolist(), strict=True):
                tile = read_tile(slide, x, y, level, read_px, 200, side)
                wanted = area_average(slide.read_region(x, y, 0, side, side), 200)
                assert np.abs(tile - wanted).mean() <= 3
                if wanted.std() > 5:
                    blue, other = tile[..., 2].astype(np.float32), wanted[..., 2].astype(np.float32)
                    assert np.hypot(*cv2.phaseCorrelate(blue, other)[0]) < 0.5
