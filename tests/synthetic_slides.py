"""Slides that tests make: lossless pyramids of known pixels, and simple pictures of stained tissue."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import tifffile


def write_lossless(
    path: Path,
    image: np.ndarray,
    mpp: float | tuple[float, float] | None = 0.5,
    downsamples: Sequence[int] = (1,),
    unit: str = "CENTIMETER",
) -> Path:
    """A tiled TIFF whose levels are area averages of `image`, without loss; no resolution tags if `mpp` is None."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = image.shape[:2]
    with tifffile.TiffWriter(path) as writer:
        for number, step in enumerate(downsamples):
            rows, columns = height // step, width // step
            blocks = image[: rows * step, : columns * step].reshape(rows, step, columns, step, 3)
            level = np.rint(blocks.mean(axis=(1, 3))).astype(np.uint8) if step > 1 else image
            options = {}
            if mpp is not None:
                per_unit = {"CENTIMETER": 1e4, "INCH": 25400.0}[unit]
                mpp_x, mpp_y = mpp if isinstance(mpp, tuple) else (mpp, mpp)
                options = {"resolution": (per_unit / mpp_x, per_unit / mpp_y), "resolutionunit": unit}
            writer.write(
                level,
                tile=(256, 256),
                photometric="rgb",
                subfiletype=1 if number else 0,
                metadata=None,
                **options,
            )
    return path


def texture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Colourful noise as coarse as stained tissue at 0.5 um a pixel: structures of 6 to 40 pixels, the finest faint."""
    rng = np.random.default_rng(seed)
    image = np.zeros((height, width, 3), np.float32)
    for sigma, strength in ((3, 12), (7, 25), (20, 25)):
        noise = cv2.GaussianBlur(rng.standard_normal((height, width, 3), dtype=np.float32), (0, 0), sigma)
        image += strength * noise / noise.std()
    return np.clip(140 + image, 0, 255).astype(np.uint8)


def blobs(
    height: int, width: int, places: Sequence[tuple[int, int, int]], colour: Sequence[int], ground: Sequence[int]
) -> np.ndarray:
    """Discs (x, y, radius in pixels) of one colour on a ground, both with a little noise."""
    image = np.full((height, width, 3), ground, np.uint8)
    for x, y, radius in places:
        cv2.circle(image, (x, y), radius, tuple(int(value) for value in colour), cv2.FILLED)
    noise = np.random.default_rng(1).standard_normal(image.shape, dtype=np.float32)
    return np.clip(image + 2 * noise, 0, 255).astype(np.uint8)
