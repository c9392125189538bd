"""One slide from file to tile manifests: tissue, grid and what is written beside them."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dinoscope
from dinoscope.progress import progress
from dinoscope.slides.grid import Grid, TileSet, make_grid, plan_reading
from dinoscope.slides.manifest import tile_table, write_tiles
from dinoscope.slides.reader import OPENSLIDE_VERSION, Slide
from dinoscope.slides.tissue import Tissue, detect_tissue, working_level

__all__ = ["tile_slide"]

log = logging.getLogger(__name__)


def tile_slide(
    slide: Slide, tile_sets: Sequence[tuple[TileSet, str | Path]], method: str = "auto"
) -> tuple[Tissue, list[Grid]]:
    """Finds the tissue of a slide, lays a grid for each tile set and writes the manifests.

    Args:
        slide: The slide.
        tile_sets: The sets, each with the file to write.
        method: How tissue is found, one of `tissue.METHODS`.

    Returns:
        The tissue, and the grids in the order of the sets.

    Raises:
        SlideError: The slide is unreadable, has no tissue, or does not suit a set; nothing has been written then.
    """
    for tile_set, _ in tile_sets:
        plan_reading(slide, tile_set)
    level, factor = working_level(slide, method)
    with progress(f"reading {slide.slide_id}", slide.num_blocks(level, factor), unit="blocks") as bar:
        tissue = detect_tissue(slide, method, bar.advance)
    grids = [make_grid(slide, tissue, tile_set) for tile_set, _ in tile_sets]
    for grid, (tile_set, path) in zip(grids, tile_sets, strict=True):
        columns = {
            "x": grid.x,
            "y": grid.y,
            "tissue_fraction": grid.tissue_fraction,
            "level": grid.reading.level,
            "read_px": grid.reading.read_px,
            "tile_px": tile_set.tile_px,
            "mpp": tile_set.mpp,
            "footprint_px": grid.reading.footprint_px,
        }
        write_tiles(path, tile_table(slide.slide_id, columns), _metadata(slide, tissue, grid))
        _report(slide, tissue, grid)
    return tissue, grids


def _metadata(slide: Slide, tissue: Tissue, grid: Grid) -> dict[str, Any]:
    wanted = grid.tile_set
    return {
        "slide_id": slide.slide_id,
        "width": slide.width,
        "height": slide.height,
        "mpp_x": slide.mpp_x,
        "mpp_y": slide.mpp_y,
        "mpp_source": slide.mpp_source,
        "vendor": slide.vendor,
        "num_levels": slide.num_levels,
        "tile_set": wanted.name,
        "tile_px": wanted.tile_px,
        "requested_mpp": wanted.mpp,
        "stride_px": wanted.stride_px or wanted.tile_px,
        "min_tissue": grid.min_tissue,
        "num_candidates": grid.num_candidates,
        **tissue.describe(),
        "software": {"dinoscope": dinoscope.__version__, "openslide": OPENSLIDE_VERSION},
    }


def _report(slide: Slide, tissue: Tissue, grid: Grid) -> None:
    name = f"slide {slide.slide_id!r}, tile set {grid.tile_set.name}"
    if len(grid):
        log.info("%s: %d of %d tiles kept", name, len(grid), grid.num_candidates)
        return
    log.warning(
        "%s: no tile of %d px at mpp %g has at least %g tissue, though there are %.3g mm2 of it: its manifest is "
        "empty; lower min_tissue or ask for smaller tiles",
        name,
        grid.tile_set.tile_px,
        grid.tile_set.mpp,
        grid.min_tissue,
        tissue.area_mm2,
    )
