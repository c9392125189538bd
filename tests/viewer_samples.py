"""Small slide viewers for tests: slides and models whose colours a test can tell from a screenshot."""

from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from dinoscope.features.writers import read_features
from dinoscope.slides.reader import Slide
from dinoscope.visualize.pca import ColorBasis, fit_basis, save_basis
from dinoscope.visualize.viewer.clusters import TileClusters
from dinoscope.visualize.viewer.neighbours import MAX_TILES, draw_sample
from dinoscope.visualize.viewer.page import write_page
from dinoscope.visualize.viewer.pyramid import write_placeholder, write_pyramid
from dinoscope.visualize.viewer.tiles import write_sample_script, write_tiles_script
from feature_samples import grid_coords, write_sample
from synthetic_slides import write_lossless

TILE, MPP, MARGIN = 112, 0.5, 120  # of the slides, level-0 pixels
CLUSTER_COLORS = ["#d62728", "#1f77b4", "#2ca02c"]


@dataclass
class ViewerSample:
    """A viewer in a folder, and what is known of it.

    Attributes:
        page: Its index.html.
        colors: slide -> (N, 3) RGB of the tiles in the picture, each of one colour.
        coords: slide -> (N, 2) corners.
        sides: slide -> side of a tile, level-0 pixels.
        features: (model, slide) -> feature file.
        bases: model -> colour space.
        labels: slide -> cluster of each tile.
    """

    page: Path
    colors: dict[str, np.ndarray] = field(default_factory=dict)
    coords: dict[str, np.ndarray] = field(default_factory=dict)
    sides: dict[str, int] = field(default_factory=dict)
    features: dict[tuple[str, str], Path] = field(default_factory=dict)
    bases: dict[str, ColorBasis] = field(default_factory=dict)
    labels: dict[str, np.ndarray] = field(default_factory=dict)


def build_viewer(
    folder: Path,
    slides: dict[str, tuple[int, int]],
    models: tuple[str, ...],
    *,
    mpps: dict[str, float] | None = None,
    listed: tuple[str, ...] | None = None,
    background: str = "keep",
    max_tiles: int = MAX_TILES,
) -> ViewerSample:
    """A viewer of slides of so many columns and rows of tiles, each tile of one colour, by some models.

    Clusters exist for the first model. Slide "bare" has no features, "empty" no tiles, "broken" no picture, where asked
    for with 0 columns.

    Args:
        folder: For slides, features and the viewer.
        slides: Columns and rows of each.
        models: Their names.
        mpps: Of level 0, of slides where it is not `MPP`.
        listed: The slides that the page lists, where these are not all.
        background: As for `fit_basis`.
        max_tiles: As for `draw_sample`.
    """
    viewer = folder / "viewer"
    sample = ViewerSample(viewer / "index.html")
    for number, (slide_id, (columns, rows)) in enumerate(slides.items()):
        sample.sides[slide_id] = round(TILE * MPP / (mpps or {}).get(slide_id, MPP))
        _write_slide(folder, sample, slide_id, columns, rows, number)
    for number, model in enumerate(models):
        basis = _write_basis(folder, sample, model, number, background)
        _write_model(folder, sample, model, basis, max_tiles, with_clusters=not number)
    bases = {model: folder / "pca" / model for model in models}
    write_page(sample.page, listed or list(slides), bases, report="../report.html")
    return sample


def _write_slide(folder: Path, sample: ViewerSample, slide_id: str, columns: int, rows: int, seed: int) -> None:
    output = folder / "viewer" / "slides" / slide_id / "pyramid.js"
    if slide_id == "broken":
        write_placeholder(output, slide_id, "it is damaged or cut short: copy it again")
        return
    rng = np.random.default_rng(seed)
    colors = rng.integers(40, 215, (max(rows, 3), max(columns, 3), 3)).astype(np.uint8)
    side = sample.sides[slide_id]
    image = cv2.resize(colors, None, fx=side, fy=side, interpolation=cv2.INTER_NEAREST)
    image = cv2.copyMakeBorder(image, MARGIN, MARGIN, MARGIN, MARGIN, cv2.BORDER_CONSTANT, value=(240, 240, 240))
    with Slide(write_lossless(folder / f"{seed}.tiff", image, TILE * MPP / side), slide_id) as slide:
        write_pyramid(slide, output, 1.0)
    if slide_id != "bare":
        sample.colors[slide_id] = colors.reshape(-1, 3)[: columns * rows]
        sample.coords[slide_id] = grid_coords(columns, rows, side) + MARGIN
        sample.labels[slide_id] = rng.integers(0, len(CLUSTER_COLORS), columns * rows).astype(np.int16)


def _write_basis(folder: Path, sample: ViewerSample, model: str, seed: int, background: str) -> ColorBasis:
    mixing = np.random.default_rng(seed).normal(size=(3, 12))
    for slide_id, colors in sample.colors.items():
        side = sample.sides[slide_id]
        sizes = {"tile_px": TILE, "mpp": MPP, "level0_mpp": TILE * MPP / side, "patch_size_level0": side}
        features = (np.tanh(colors / 128 - 1) @ mixing + 0.3).astype(np.float32)
        path = folder / "features" / model / f"{slide_id}.h5"
        sample.features[model, slide_id] = write_sample(path, features, sample.coords[slide_id], model=model, **sizes)
    files = [sample.features[model, slide_id] for slide_id in sample.colors]
    basis = sample.bases[model] = fit_basis(files, background=background)
    save_basis(basis, folder / "pca" / model)
    return basis


def _write_model(
    folder: Path, sample: ViewerSample, model: str, basis: ColorBasis, max_tiles: int, *, with_clusters: bool
) -> None:
    files = {slide_id: sample.features[model, slide_id] for slide_id in sample.colors}
    tiles = draw_sample(list(files.values()), max_tiles=max_tiles)
    target = folder / "viewer" / "models" / model
    write_sample_script(target / "sample.js", tiles)
    for slide_id, path in files.items():
        names = [f"kind {number}" for number in range(3)]
        clusters = TileClusters(sample.labels[slide_id], CLUSTER_COLORS, names) if with_clusters else None
        script = target / "slides" / f"{slide_id}.js"
        write_tiles_script(script, read_features(path), basis, tiles, num_neighbours=4, clusters=clusters)
