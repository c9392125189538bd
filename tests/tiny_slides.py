"""Small slides and manifests for tests."""

from pathlib import Path

import cv2
import numpy as np

from dinoscope.slides.manifest import merge_manifests, tile_table, write_tiles
from dinoscope.slides.tiff_writer import encode_tiles, write_pyramid


def write_slide(path: Path, seed: int, side: int = 1024, mpp: float = 0.5) -> Path:
    """A square slide of two levels with blobs of several sizes and colours."""
    rng = np.random.default_rng(seed)
    image = np.full((side, side, 3), 235, np.uint8)
    for _ in range(side):
        centre = tuple(int(v) for v in rng.integers(0, side, 2))
        colour = tuple(int(v) for v in rng.integers(40, 220, 3))
        cv2.circle(image, centre, int(rng.integers(2, 24)), colour, -1)
    levels = [image, cv2.resize(image, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)]
    write_pyramid(path, [(level.shape[1], level.shape[0], encode_tiles(level)) for level in levels], mpp)
    return path


def write_manifest(path: Path, slide_ids: list[str], slide_px: int, tile_px: int, mpp: float = 0.5) -> str:
    """A merged manifest that covers slides of one size with tiles at the slides' own resolution."""
    corners = np.arange(0, slide_px - tile_px + 1, tile_px)
    y, x = (axis.ravel() for axis in np.meshgrid(corners, corners, indexing="ij"))
    parts = []
    for slide_id in slide_ids:
        columns = {"x": x, "y": y, "level": 0, "read_px": tile_px, "tile_px": tile_px, "mpp": mpp}
        table = tile_table(slide_id, columns | {"footprint_px": tile_px, "tissue_fraction": 1.0})
        about = {"slide_id": slide_id, "tile_set": "train", "tile_px": tile_px, "mpp": mpp, "slide_mpp": mpp}
        about |= {"width": slide_px, "height": slide_px, "requested_mpp": mpp, "stride_px": tile_px}
        parts.append(path.parent / f"{slide_id}.parquet")
        write_tiles(parts[-1], table, about)
    return merge_manifests(parts, path)
