"""The pixels of the tiles that stand for clusters, read from their slides."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dinoscope.errors import FeaturesError
from dinoscope.slides.manifest import read_tiles
from dinoscope.slides.padding import read_tile
from dinoscope.slides.reader import SlidePool
from dinoscope.visualize.clusters import Clusters

__all__ = ["read_examples"]


def read_examples(clusters: Clusters, pool: SlidePool, tiles: Mapping[str, Path]) -> list[list[tuple[np.ndarray, str]]]:
    """Pixels (tile_px, tile_px, 3) and slide of each example tile of each cluster.

    Args:
        clusters: The clusters.
        pool: The slides.
        tiles: slide_id -> its tile manifest.

    Raises:
        FeaturesError: An example is not among the tiles: they were made again since.
        SlideError: A slide cannot be read.
    """
    tables: dict[str, dict[tuple[int, int], tuple[int, ...]]] = {}
    return [
        [(_pixels(example, pool, tiles, tables), example["slide"]) for example in kind["examples"]]
        for kind in clusters.info["clusters"]
    ]


def _pixels(
    example: Mapping[str, object],
    pool: SlidePool,
    tiles: Mapping[str, Path],
    tables: dict[str, dict[tuple[int, int], tuple[int, ...]]],
) -> np.ndarray:
    slide_id, place = example["slide"], (example["x"], example["y"])
    if slide_id not in tables:
        if slide_id not in tiles:
            raise FeaturesError(f"slide {slide_id!r} has an example tile, but its tile manifest is not given")
        table = read_tiles(tiles[slide_id])
        columns = (table[name].to_pylist() for name in ("x", "y", "level", "read_px", "tile_px", "footprint_px"))
        tables[slide_id] = {(x, y): tuple(rest) for x, y, *rest in zip(*columns, strict=True)}
    if place not in tables[slide_id]:
        raise FeaturesError(
            f"{tiles[slide_id]} has no tile at {place}, which is an example of a cluster: the tiles were made again "
            "since; extract the features and fit the clusters again"
        )
    return read_tile(pool[slide_id], *place, *tables[slide_id][place])
