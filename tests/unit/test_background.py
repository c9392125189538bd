"""What was never scanned is background and never tissue: outside of the bounds, transparent, filled with black."""

from pathlib import Path

import numpy as np
import pytest

from dinoscope.slides.grid import TileSet, make_grid
from dinoscope.slides.reader import Slide
from dinoscope.slides.tissue import detect_tissue
from synthetic_slides import blobs, write_lossless

GROUND, STAIN = (243, 242, 244), (200, 120, 160)
TISSUE = (900, 700, 350)  # a disc, x, y and radius in level-0 pixels


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return blobs(1400, 2000, [TISSUE], STAIN, GROUND)


def coverage(slide: Slide, method: str = "auto") -> tuple[float, float]:
    """Share of the disc that is taken for tissue, and area of tissue outside of it in discs."""
    tissue = detect_tissue(slide, method)
    y, x = (np.indices(tissue.mask.shape) + 0.5) * tissue.downsample
    disc = np.hypot(x - TISSUE[0], y - TISSUE[1]) < TISSUE[2]
    wide = np.hypot(x - TISSUE[0], y - TISSUE[1]) < TISSUE[2] + 40
    return tissue.mask[disc].mean(), (tissue.mask & ~wide).sum() / disc.sum()


def with_bounds(slide: Slide, left: int, top: int, width: int, height: int, monkeypatch: pytest.MonkeyPatch) -> Slide:
    """The slide as if its file gave bounds."""
    given = {"x": left, "y": top, "width": width, "height": height}
    known = Slide._property
    monkeypatch.setattr(
        Slide,
        "_property",
        lambda self, name: str(given[name.rpartition("-")[2]]) if "bounds-" in name else known(self, name),
    )
    slide.bounds = slide._scanned_bounds()
    return slide


@pytest.mark.parametrize("method", ["auto", "otsu", "cytology"])
def test_what_lies_outside_of_the_bounds_is_no_tissue(
    tmp_path: Path, image: np.ndarray, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dirty = image.copy()
    dirty[:, 1500:] = (170, 90, 140)  # looks like tissue
    path = write_lossless(tmp_path / "a.tiff", dirty, 1.0, (1, 4))
    with Slide(path, "S") as slide:
        assert coverage(slide, method)[1] > 0.5
    with with_bounds(Slide(path, "S"), 200, 100, 1300, 1300, monkeypatch) as slide:
        assert slide.bounds == (200, 100, 1300, 1300)
        inside, outside = coverage(slide, method)
        assert inside > 0.95 and outside == 0
        for level in (0, 1):
            step = round(slide.level_downsamples[level])
            region = slide.read_region(1400, 600, level, 400 // step, 100 // step)
            assert (region[:, 100 // step :] == 255).all() and (region[:, : 100 // step] < 255).any()
        assert (slide.read_tile(1600, 300, 1, 64, 64, 256) == 255).all()
        assert (slide.thumbnail(500)[:, 376:] == 255).all() and (slide.thumbnail(500)[:, :370] < 255).any()
        grid = make_grid(slide, detect_tissue(slide, method), TileSet("t", 64, 1.0))
        assert len(grid) > 20 and grid.x.max() + 64 <= 1300


@pytest.mark.parametrize(
    ("given", "bounds"),
    [
        ((100, 50, 300, 200), (100, 50, 300, 200)),
        ((-10, -10, 300, 200), (0, 0, 290, 190)),
        ((1900, 1300, 300, 300), (1900, 1300, 100, 100)),
        ((2100, 0, 10, 10), (0, 0, 2000, 1400)),
        ((0, 0, 0, 10), (0, 0, 2000, 1400)),
        (("x", 0, 10, 10), (0, 0, 2000, 1400)),
    ],
)
def test_bounds_that_make_no_sense_are_cut_or_passed_over(
    tmp_path: Path, image: np.ndarray, given: tuple, bounds: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    with with_bounds(Slide(write_lossless(tmp_path / "a.tiff", image, 1.0)), *given, monkeypatch) as slide:
        assert slide.bounds == bounds


@pytest.mark.parametrize("hidden", [0, 128, 255])
@pytest.mark.parametrize("method", ["auto", "otsu", "cytology"])
def test_transparent_pixels_are_no_tissue(tmp_path: Path, image: np.ndarray, method: str, hidden: int) -> None:
    """As of MIRAX, where parts were never scanned; whatever colour stands beneath."""
    levels = {f"level{number}": image[::step, ::step] for number, step in enumerate((1, 4))}
    np.savez(tmp_path / "a.npz", mpp=1.0, **levels)
    with Slide(tmp_path / "a.npz", "S", reader=f"array_reader:Unscanned{hidden}") as slide:
        inside, outside = coverage(slide, method)
        assert inside > 0.95 and outside == 0
        assert (slide.read_region(1500, 0, 0, 400, 300) == 255).all()


@pytest.mark.parametrize("black", [(0, 0, 0), (8, 4, 6)])
@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("method", ["auto", "otsu", "cytology"])
def test_black_fill_is_no_tissue(
    tmp_path: Path, image: np.ndarray, method: str, share: float, black: tuple[int, int, int]
) -> None:
    filled = np.concatenate([image, np.full((1400, round(2000 * share / (1 - share)), 3), black, np.uint8)], axis=1)
    filled[:60] = black
    with Slide(write_lossless(tmp_path / "a.tiff", filled, 1.0, (1, 4)), "S") as slide:
        inside, outside = coverage(slide, method)
        assert inside > 0.95 and outside == 0
