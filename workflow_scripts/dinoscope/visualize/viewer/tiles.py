"""What the viewer shows of a model on a slide: places, colours, clusters and nearest neighbours of its tiles."""

import os
from typing import Any

import numpy as np

from dinoscope.features.writers import FeatureFile, FeatureInfo
from dinoscope.visualize.pca import ColorBasis
from dinoscope.visualize.viewer.clusters import TileClusters
from dinoscope.visualize.viewer.neighbours import NONE, Neighbours, TileSample, nearest_tiles
from dinoscope.visualize.viewer.scripts import packed, write_script

__all__ = ["write_sample_script", "write_tiles_script"]


def write_tiles_script(
    output: str | os.PathLike[str],
    file: FeatureFile,
    basis: ColorBasis,
    sample: TileSample,
    *,
    num_neighbours: int = 6,
    clusters: TileClusters | None = None,
) -> None:
    """Writes the data of one model's tiles on one slide.

    Args:
        output: The script, MODEL/slides/SLIDE.js.
        file: The slide's features.
        basis: The colour space of the model.
        sample: Tiles of the collection to look for neighbours among, of the same model.
        num_neighbours: Neighbours a tile.
        clusters: Of the slide's tiles, if there are any.
    """
    info = file.info
    value = {
        "count": len(file.coords),
        "coords": packed(file.coords.astype(np.int32)),
        **_sizes(info),
        "colors": packed(_colors(file, basis)) if len(file.coords) else "",
        "neighbours": num_neighbours,
        "sampled": info.slide_id in sample.slides,
        "clusters": None,
    }
    if len(file.coords) and len(sample.coords):
        found, elsewhere = nearest_tiles(file, sample, num_neighbours)
        value |= {"nearest": _packed_neighbours(found), "elsewhere": _packed_neighbours(elsewhere)}
    if clusters is not None:
        value["clusters"] = {
            "labels": packed(clusters.labels),
            "colors": clusters.colors,
            "names": clusters.names,
        }
    write_script(output, "tiles", f"{info.model}/{info.slide_id}", value)


def write_sample_script(output: str | os.PathLike[str], sample: TileSample) -> None:
    """Writes where the tiles of a model's sample lie, which neighbours are numbers of."""
    value = {
        "slides": sample.slides,
        "sides": sample.sides.tolist(),
        "slide": packed(sample.slide.astype(np.int32)),
        "coords": packed(sample.coords.astype(np.int32)),
        "total": int(sample.counts.sum()),
        "max_tiles": sample.max_tiles,
    }
    write_script(output, "sample", str(sample.kind["model"]), value)


def _colors(file: FeatureFile, basis: ColorBasis) -> np.ndarray:
    """RGB (N, 3) uint8 of the tiles; black, which no colour is, for background, which is not painted."""
    colors = basis.colors(file.features)
    colors[basis.is_background(file.features)] = 0
    return colors


def _sizes(info: FeatureInfo) -> dict[str, Any]:
    """Side of a tile; side and place in it of the square that is painted, so that overlapping tiles do not."""
    step = info.patch_size_level0 * (1 - info.overlap_px / info.tile_px)
    return {
        "side": info.patch_size_level0,
        "step": round(step, 4),
        "inset": round((info.patch_size_level0 - step) / 2, 4),
        "tile_px": info.tile_px,
        "mpp": info.mpp,
    }


def _packed_neighbours(found: Neighbours) -> dict[str, Any]:
    """Numbers in 16 bits; cosines in 8 bits between the least and the largest of the slide."""
    there = found.cosines[found.tiles != NONE]
    low, high = (float(there.min()), float(there.max())) if len(there) else (0.0, 0.0)
    steps = np.rint((found.cosines - low).clip(0) / max(high - low, 1e-9) * 255).clip(0, 255).astype(np.uint8)
    return {"tiles": packed(found.tiles), "cosines": packed(steps), "low": round(low, 6), "high": round(high, 6)}
