"""One slide as several models see it, side by side: what training has changed."""

import os
from collections.abc import Sequence

import numpy as np

from dinoscope.errors import FeaturesError
from dinoscope.features.writers import FeatureFile
from dinoscope.visualize.color_basis import ColorBasis
from dinoscope.visualize.page import COMPONENT_KEY, Panel, save_panels
from dinoscope.visualize.pca_map import MapPainter, tiles_in_words

__all__ = ["check_same_slide", "draw_comparison", "in_rows", "tiles_of_all"]

PANEL_PX = 720
MAX_COLUMNS = 4


def draw_comparison(
    output: str | os.PathLike[str],
    models: Sequence[tuple[FeatureFile, ColorBasis]],
    thumbnail: np.ndarray,
    *,
    slide_name: str | None = None,
) -> None:
    """Saves the slide and its PCA map by every model in one PNG, each in the colour space of its model.

    Args:
        output: The PNG.
        models: The slide's features and the colour space of each model, from left to right.
        thumbnail: The whole slide, (h, w, 3) uint8.
        slide_name: For the title; the slide's id when not given.

    Raises:
        FeaturesError: The files are of different slides.
    """
    painter = MapPainter(thumbnail, PANEL_PX)
    files = [file for file, _ in models]
    file, tiles = check_same_slide(files), tiles_of_all(files)
    panels = [Panel(painter.canvas, "slide", _size(file, painter))]
    for each, basis in models:
        explained = f"3 components explain {100 * basis.info['explained_by_top_3']:.0f} %"
        panels.append(Panel(painter.pca(each, basis), each.info.model, explained if len(each.coords) else "no tiles"))
    save_panels(
        output,
        in_rows(panels),
        title=slide_name or file.info.slide_id,
        subtitle=f"PCA of the features of {tiles}; colours can be compared within a model, not between",
        key=COMPONENT_KEY,
        um_per_px=painter.um_per_px(file.info),
    )


def check_same_slide(files: Sequence[FeatureFile]) -> FeatureFile:
    """The first of the files, if all are of one slide, and those of one tile set of the same tiles.

    Raises:
        FeaturesError: They are of different slides, or of tiles that were made again in between.
    """
    known: dict[tuple[int, float, int], FeatureFile] = {}
    for file in files:
        same_set = (file.info.tile_px, file.info.mpp, file.info.overlap_px)
        other = known.setdefault(same_set, file)
        for each in (files[0], other):
            ours, theirs = each.info, file.info
            if ours.slide_id != theirs.slide_id or (each is other and ours.manifest_hash != theirs.manifest_hash):
                raise FeaturesError(
                    f"the features of model {theirs.model!r} are of other tiles (slide {theirs.slide_id!r}, manifest "
                    f"{theirs.manifest_hash[:8]}) than those of model {ours.model!r} (slide {ours.slide_id!r}, "
                    f"manifest {ours.manifest_hash[:8]}); extract them again"
                )
    return files[0]


def tiles_of_all(files: Sequence[FeatureFile]) -> str:
    """Number and size of the tiles, if all models have the same."""
    said = {tiles_in_words(file) for file in files}
    return said.pop() if len(said) == 1 else "each model's tiles"


def in_rows(panels: Sequence[Panel]) -> list[list[Panel | None]]:
    """Panels in rows of at most four; the first panel begins each row of models where there are more."""
    if len(panels) <= MAX_COLUMNS + 1:
        return [list(panels)]
    first, models = panels[0], panels[1:]
    rows = [models[start : start + MAX_COLUMNS] for start in range(0, len(models), MAX_COLUMNS)]
    return [[first if number == 0 else None, *row] for number, row in enumerate(rows)]


def _size(file: FeatureFile, painter: MapPainter) -> str:
    if painter.is_skipped(file.info):
        return "it was skipped"
    width, height = (side * file.info.level0_mpp / 1000 for side in (file.info.level0_width, file.info.level0_height))
    return f"{width:.2f} × {height:.2f} mm"
