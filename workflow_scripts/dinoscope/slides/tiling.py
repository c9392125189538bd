"""One slide from file to tile manifests: tissue, grid, quality and what is written beside them."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

import dinoscope
from dinoscope.progress import progress
from dinoscope.slides.geojson import Annotations
from dinoscope.slides.grid import Grid, TileSet, drop_blurred, make_grid, plan_reading
from dinoscope.slides.manifest import tile_table, write_tiles
from dinoscope.slides.quality import NO_LIMITS, SHARES, QualityLimits, quality_maps, tile_focus
from dinoscope.slides.reader import OPENSLIDE_VERSION, Slide
from dinoscope.slides.tissue import Tissue, detect_tissue, with_picture, working_level

__all__ = ["tile_slide"]

log = logging.getLogger(__name__)


def tile_slide(
    slide: Slide,
    tile_sets: Sequence[tuple[TileSet, str | Path]],
    method: str = "auto",
    *,
    limits: QualityLimits = NO_LIMITS,
    min_area_um2: float | None = None,
    max_hole_um2: float | None = None,
    annotations: Annotations | None = None,
) -> tuple[Tissue, list[Grid]]:
    """Finds the tissue of a slide, lays a grid for each tile set and writes the manifests.

    Args:
        slide: The slide.
        tile_sets: The sets, each with the file to write.
        method: How tissue is found, one of `tissue.METHODS`.
        limits: What tiles may be like.
        min_area_um2, max_hole_um2, annotations: As in `detect_tissue`.

    Returns:
        The tissue, and the grids in the order of the sets, one for each mpp of a set.

    Raises:
        SlideError: The slide is unreadable, has no tissue, or does not suit a set; nothing has been written then.
    """
    single = [[*tile_set.single()] for tile_set, _ in tile_sets]
    for tile_set in chain.from_iterable(single):
        plan_reading(slide, tile_set)
    level, factor = working_level(slide, method)
    areas = {"min_area_um2": min_area_um2, "max_hole_um2": max_hole_um2}
    with progress(f"reading {slide.slide_id}", slide.num_blocks(level, factor), unit="blocks") as bar:
        tissue = detect_tissue(slide, method, bar.advance, **areas, annotations=annotations)
        tissue = with_picture(slide, tissue, bar.advance)
    maps = quality_maps(slide, tissue)
    grids = [[make_grid(slide, tissue, one, maps, limits) for one in sets] for sets in single]
    if limits.needs_focus:
        grids = [[_focused(slide, grid, limits) for grid in of_set] for of_set in grids]
    for of_set, (tile_set, path) in zip(grids, tile_sets, strict=True):
        tables = [_columns(grid) for grid in of_set]
        columns = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
        write_tiles(path, tile_table(slide.slide_id, columns), _metadata(slide, tissue, tile_set, of_set, limits))
        for grid in of_set:
            _report(slide, tissue, grid)
    # what was computed for the grids is not kept: of a large smear that is several hundred MB
    return replace(tissue, extremes=None), [*chain.from_iterable(grids)]


def _focused(slide: Slide, grid: Grid, limits: QualityLimits) -> Grid:
    """The grid with the focus of each tile, for which all are read."""
    focus, reading = np.empty(len(grid)), grid.reading
    where = (grid.x, grid.y, reading.level, reading.read_px, grid.tile_set.tile_px, reading.footprint_px)
    with progress(f"focus of {slide.slide_id}", len(grid), unit="tiles") as bar:
        for number, variance in enumerate(tile_focus(slide, *where)):
            focus[number] = variance
            bar.advance()
    return drop_blurred(grid, focus, limits.min_focus)


def _columns(grid: Grid) -> dict[str, np.ndarray]:
    same = {
        "level": grid.reading.level,
        "read_px": grid.reading.read_px,
        "tile_px": grid.tile_set.tile_px,
        "mpp": grid.tile_set.mpp,
        "footprint_px": grid.reading.footprint_px,
    }
    return {
        "x": grid.x,
        "y": grid.y,
        "tissue_fraction": grid.tissue_fraction,
        "section_id": grid.section,
        **grid.quality,
        **{name: np.full(len(grid), value) for name, value in same.items()},
    }


def _metadata(
    slide: Slide, tissue: Tissue, tile_set: TileSet, grids: Sequence[Grid], limits: QualityLimits
) -> dict[str, Any]:
    return {
        "slide_id": slide.slide_id,
        "width": slide.width,
        "height": slide.height,
        "mpp_x": slide.mpp_x,
        "mpp_y": slide.mpp_y,
        "mpp_source": slide.mpp_source,
        "vendor": slide.vendor,
        "num_levels": slide.num_levels,
        "tile_set": tile_set.name,
        "tile_px": tile_set.tile_px,
        "requested_mpp": _one_or_all(list(tile_set.mpps)),
        "stride_px": tile_set.stride_px or tile_set.tile_px,
        "edge": tile_set.edge,
        "min_tissue": _one_or_all([grid.min_tissue for grid in grids]),
        "num_candidates": sum(grid.num_candidates for grid in grids),
        **{f"max_{name}": limits.most(name) for name in SHARES},
        "min_focus": limits.min_focus,
        **tissue.describe(),
        "software": {"dinoscope": dinoscope.__version__, "openslide": OPENSLIDE_VERSION},
    }


def _one_or_all(values: list[float]) -> float | list[float]:
    return values[0] if len(set(values)) == 1 else values


def _report(slide: Slide, tissue: Tissue, grid: Grid) -> None:
    name = f"slide {slide.slide_id!r}, tile set {grid.tile_set.name}"
    if len(grid):
        log.info("%s: %d of %d tiles kept at mpp %g", name, len(grid), grid.num_candidates, grid.tile_set.mpp)
        return
    spoilt = {reason: len(where) for reason, where in grid.dropped.items() if reason != "tissue"}
    if spoilt:
        most = max(spoilt, key=spoilt.__getitem__)
        log.warning(
            "%s: all %d tiles with enough tissue fail the limits of quality, most of them that of %s: its manifest is "
            "empty; change tiling.quality",
            name,
            sum(spoilt.values()),
            most,
        )
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
