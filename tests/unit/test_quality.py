"""Tile quality: shares of white, black and grey by counting, pen ink on real texture, focus against plain numpy."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from dinoscope.slides.quality import SHARES, QualityLimits, pen_ink, quality_maps, tile_focus
from dinoscope.slides.reader import Slide
from dinoscope.slides.tissue import Tissue, detect_tissue
from synthetic_slides import texture, write_lossless

INKS = {"black": (38, 36, 42), "blue": (32, 52, 150), "green": (22, 112, 72), "red": (192, 32, 52)}
STAINS = {"haematoxylin": (0.65, 0.70, 0.29), "DAB": (0.27, 0.57, 0.78), "eosin": (0.10, 0.62, 0.36)}
STAINS |= {"other haematoxylin": (0.56, 0.72, 0.41), "light green": (0.83, 0.34, 0.28), "orange G": (0.07, 0.48, 0.70)}
STAINS |= {"DAB on haematoxylin": (0.46, 0.635, 0.535)}
PEN_MPP, FINE = 16.0, 4
SIDE = 480


@pytest.fixture(scope="module")
def tissue_texture(shared: Path) -> np.ndarray:
    """Real H&E at 16 um a pixel, mirrored to fill 7.7 mm; float, 0 to 255."""
    pieces = []
    with Slide(shared / "data/wsi/CMU-1-Small-Region.svs", "S") as slide:
        pieces.append(slide.read_region(650, 1750, 0, 736, 1184))
    pieces.append(cv2.imread(str(shared / "data/tiles/singles/histo.jpg"))[..., ::-1])
    shrunk = [
        cv2.resize(piece, (piece.shape[1] // 32, piece.shape[0] // 32), interpolation=cv2.INTER_AREA)
        for piece in pieces
    ]
    halves = [mirrored(piece, SIDE, SIDE // 2) for piece in shrunk]
    return np.concatenate(halves, axis=1).astype(np.float32)


def mirrored(image: np.ndarray, height: int, width: int) -> np.ndarray:
    image = np.concatenate([image, image[:, ::-1]], axis=1)
    image = np.concatenate([image, image[::-1]])
    return image[(np.arange(height) % len(image))[:, None], np.arange(width) % image.shape[1]]


def strokes(rng: np.random.Generator, count: int, width_um: tuple[float, float]) -> np.ndarray:
    """Bent lines with soft edges; share of each pixel that is inked, float32 (SIDE, SIDE)."""
    fine = np.zeros((SIDE * FINE, SIDE * FINE), np.uint8)
    for _ in range(count):
        points = rng.uniform(0, SIDE * FINE, 2) + np.cumsum(rng.normal(0, 120, (12, 2)), axis=0)
        width_px = round(rng.uniform(*width_um) / PEN_MPP * FINE)
        cv2.polylines(fine, [points.astype(np.int32)], False, 255, width_px, cv2.LINE_AA)
    return cv2.resize(fine, (SIDE, SIDE), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def inked(image: np.ndarray, ink: tuple[int, int, int], cover: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Ink lets through its colour's share of the light, to a power that varies along the stroke."""
    layer = 0.95 + 0.15 * texture_of(rng)
    through = (np.array(ink, np.float32) / 245) ** layer[..., None]
    seen = image * (1 - cover[..., None] * (1 - through)) + rng.normal(0, 1.5, image.shape)
    return np.clip(np.rint(seen), 0, 255).astype(np.uint8)


def texture_of(rng: np.random.Generator) -> np.ndarray:
    noise = cv2.GaussianBlur(rng.standard_normal((SIDE, SIDE), dtype=np.float32), (0, 0), 6)
    return noise / noise.std()


@pytest.mark.parametrize("colour", INKS)
@pytest.mark.parametrize(
    ("ground", "width_um", "least"),
    [("tissue", (250, 700), 0.9), ("glass", (250, 700), 0.9), ("tissue", (120, 200), 0.8)],
)
def test_pen_ink_of_four_colours_is_found(
    tissue_texture: np.ndarray, colour: str, ground: str, width_um: tuple[int, int], least: float
) -> None:
    rng = np.random.default_rng(list(INKS).index(colour))
    image = tissue_texture if ground == "tissue" else np.full_like(tissue_texture, 243)
    cover = strokes(rng, 10, width_um)
    found = pen_ink(inked(image, INKS[colour], cover, rng), PEN_MPP) > 0
    recall = found[cover > 0.5].mean()
    near = cv2.dilate((cover > 0).astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    precision = near[found].mean()
    print(f"{colour} on {ground}, {width_um} um: recall {recall:.3f}, precision {precision:.3f}")
    assert 0.02 < (cover > 0.5).mean() < 0.5
    assert recall >= least and precision >= 0.97


@pytest.mark.parametrize(
    ("stain", "strength"),
    # light green as dense as ink is taken for ink
    [(stain, strength) for stain in STAINS for strength in (0.5, 1.0, 2.0) if stain != "light green" or strength < 1],
)
def test_stains_are_no_ink(tissue_texture: np.ndarray, stain: str, strength: float) -> None:
    density = -np.log10(np.clip(tissue_texture, 1, 245) / 245).mean(axis=2, keepdims=True)
    amount = strength * density / density.mean() * 0.25
    image = np.rint(245 * 10 ** -(amount * np.array(STAINS[stain]) / np.mean(STAINS[stain]))).astype(np.uint8)
    share = pen_ink(image, PEN_MPP).mean()
    print(f"{stain} x {strength}: {share:.4f}, mean colour {image.mean(axis=(0, 1)).round()}")
    assert share <= 0.002


def test_shares_are_those_of_counted_pixels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    kinds = {"white": (230, 226, 221), "black": (20, 10, 24), "grey": (130, 140, 126), "coloured": (190, 120, 150)}
    choice = rng.integers(0, len(kinds), (40, 50))
    choice[:10] = list(kinds).index("coloured")
    image = np.array(list(kinds.values()), np.uint8)[choice].repeat(8, axis=0).repeat(8, axis=1)
    with Slide(write_lossless(tmp_path / "q.tiff", image, 1.0), "S") as slide:
        tissue = Tissue(np.ones((40, 50), bool), 8.0, 8.0, "otsu", "test", None, image=slide.shrunk(0, 8))
        x, y, side = np.array([0, 37, 200]), np.array([0, 121, 250]), 70
        maps = quality_maps(slide, tissue)
        for name in ("white", "black", "grey"):
            where = (choice == list(kinds).index(name)).repeat(8, axis=0).repeat(8, axis=1)
            counted = [[where[top : top + side, left : left + side].mean() for left in x] for top in y]
            assert np.allclose(maps.shares(name, x, y, side), counted, atol=1e-9)
        assert maps.sums["pen"] is None and not maps.shares("pen", x, y, side).any()


@pytest.mark.parametrize("values", [(219, 219, 219), (220, 220, 220), (24, 24, 24), (25, 25, 25), (100, 114, 107)])
def test_thresholds_are_as_documented(tmp_path: Path, values: tuple[int, int, int]) -> None:
    image = np.full((64, 64, 3), values, np.uint8)
    with Slide(write_lossless(tmp_path / "t.tiff", image, 8.0), "S") as slide:
        tissue = Tissue(np.ones((64, 64), bool), 1.0, 8.0, "otsu", "test", None, image=image)
        shares = {name: quality_maps(slide, tissue).shares(name, *np.zeros((2, 1), int), 64) for name in SHARES}
    white, black = min(values) >= 220, max(values) < 25
    grey = not white and not black and max(values) - min(values) <= 14
    assert [shares[name].item() for name in ("white", "black", "grey")] == [white, black, grey]


def test_the_picture_is_read_where_tissue_was_not_looked_for(tmp_path: Path) -> None:
    image = np.full((600, 400, 3), 240, np.uint8)
    with Slide(write_lossless(tmp_path / "n.tiff", image, 1.0), "S") as slide:
        tissue = detect_tissue(slide, "none")
        assert tissue.image is None
        assert quality_maps(slide, tissue).shares("white", np.array([0]), np.array([0]), 400) == pytest.approx(1.0)


@pytest.mark.parametrize("mpp", [0.5, 0.8, 1.0])
def test_focus_is_the_variance_of_the_laplacian(tmp_path: Path, mpp: float) -> None:
    image = texture(600, 600)
    image[:, 300:] = cv2.GaussianBlur(image, (0, 0), 4)[:, 300:]
    with Slide(write_lossless(tmp_path / "f.tiff", image, 0.5, (1, 2)), "S") as slide:
        side, tile_px = 256, round(256 * 0.5 / mpp)
        level = 1 if mpp == 1.0 else 0
        where = ([0, 320], [40, 40], level, side >> level, tile_px, side)
        focus = list(tile_focus(slide, *where))
        for number, left in enumerate((0, 320)):
            tile = slide.read_tile(left, 40, level, side >> level, tile_px, side).astype(np.float64)
            grey = np.rint(tile @ (0.299, 0.587, 0.114))
            around = np.pad(grey, 1, mode="reflect")
            laplacian = around[:-2, 1:-1] + around[2:, 1:-1] + around[1:-1, :-2] + around[1:-1, 2:] - 4 * grey
            assert focus[number] == pytest.approx(laplacian.var(), rel=0.02)
        assert focus[0] > 1.5 * focus[1]


def test_limits_of_focus_need_the_tiles() -> None:
    assert not QualityLimits(max_pen=0.1).needs_focus
    assert QualityLimits(min_focus=0.0).needs_focus and QualityLimits(measure_focus=True).needs_focus
