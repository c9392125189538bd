"""Manifests of slides that are skipped: valid, without a tile, with the reason."""

from collections.abc import Sequence
from pathlib import Path

from dinoscope.slides.grid import TileSet
from dinoscope.slides.manifest import TILE_SCHEMA, write_tiles

__all__ = ["write_skipped"]

_UNKNOWN = ("width", "height", "mpp_x", "mpp_y", "mpp_source", "vendor", "num_levels")


def write_skipped(slide_id: str, tile_sets: Sequence[tuple[TileSet, str | Path]], reason: str) -> None:
    """Writes manifests without a tile for a slide that cannot be used; their metadata says why under `error`.

    What manifests must have in common to be merged stands in them as in those of other slides (tiling.py).
    """
    for tile_set, path in tile_sets:
        metadata = {
            "slide_id": slide_id,
            **dict.fromkeys(_UNKNOWN),
            "tile_set": tile_set.name,
            "tile_px": tile_set.tile_px,
            "requested_mpp": list(tile_set.mpp) if isinstance(tile_set.mpp, tuple) else tile_set.mpp,
            "stride_px": tile_set.stride_px or tile_set.tile_px,
            "num_candidates": 0,
            "error": reason,
        }
        write_tiles(path, TILE_SCHEMA.empty_table(), metadata)
