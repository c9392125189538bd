"""A viewer of one very large slide, painted when it is read, for tests of speed."""

from dataclasses import replace
from types import SimpleNamespace

import cv2
import numpy as np

from dinoscope.features.writers import FeatureFile
from dinoscope.visualize.pca import fit_basis, save_basis
from dinoscope.visualize.viewer.neighbours import TileSample
from dinoscope.visualize.viewer.page import write_page
from dinoscope.visualize.viewer.pyramid import write_pyramid
from dinoscope.visualize.viewer.tiles import write_sample_script, write_tiles_script
from feature_samples import INFO, grid_coords, write_sample


class PaintedSlide(SimpleNamespace):
    """What a pyramid needs of a slide, with noise for tissue."""

    def read_region(self, x, y, level, width, height):
        rng = np.random.default_rng([abs(int(x)), abs(int(y))])
        small = rng.integers(90, 230, (height // 16 + 1, width // 16 + 1, 3)).astype(np.uint8)
        return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def build_painted_viewer(folder, columns, rows, tile, mpp):
    """A viewer of a slide that tiles cover in so many columns and rows, each with made-up neighbours."""
    viewer, width, height = folder / "viewer", columns * tile, rows * tile
    slide = PaintedSlide(slide_id="large", width=width, height=height, mpp=mpp, level_downsamples=(1.0, 8.0))
    slide.background = (255, 255, 255)
    write_pyramid(slide, viewer / "slides" / "large" / "pyramid.js", 4.0)
    coords, rng = grid_coords(columns, rows, tile), np.random.default_rng(0)
    features = rng.normal(size=(len(coords), 4)).astype(np.float32)
    basis = fit_basis([write_sample(folder / "large.h5", features, coords)])
    save_basis(basis, folder / "pca")
    sizes = {"tile_px": tile, "mpp": mpp, "patch_size_level0": tile, "level0_mpp": mpp}
    info = replace(INFO, slide_id="large", **sizes)
    sampled = np.arange(0, len(coords), max(1, len(coords) // 500))
    sample = TileSample(
        slides=["large"],
        sides=np.array([tile]),
        counts=np.array([len(coords)]),
        slide=np.zeros(len(sampled), np.int64),
        coords=coords[sampled],
        features=features[sampled],
        kind={"model": "gram"},
    )
    write_sample_script(viewer / "models" / "gram" / "sample.js", sample)
    script = viewer / "models" / "gram" / "slides" / "large.js"
    write_tiles_script(script, FeatureFile(info, features, coords), basis, sample)
    write_page(viewer / "index.html", ["large"], {"gram": folder / "pca"})
    return SimpleNamespace(page=viewer / "index.html")
