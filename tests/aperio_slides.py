"""Slides with metadata like a scanner's, for tests: Aperio's description, and TIFF tags that may hold names."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import tifffile


def write_aperio(
    path: Path, image: np.ndarray, keys: Mapping[str, str], tags: Mapping[int, str] | None = None, planes: int = 1
) -> Path:
    """A one-level slide that OpenSlide takes for Aperio's.

    Args:
        path: File to write.
        image: uint8 (height, width, 3).
        keys: Key -> value of the description, e.g. {"MPP": "0.25", "AppMag": "40"}.
        tags: Number -> text of further TIFF tags.
        planes: How often the image stands in the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = image.shape[:2]
    head = f"Aperio Image Library v12.0.0\r\n{width}x{height} [0,0 {width}x{height}] (256x256) JPEG/RGB Q=70"
    description = head + "".join(f"|{key} = {value}" for key, value in keys.items())
    extra = [(number, "s", 0, text, True) for number, text in (tags or {}).items()]
    with tifffile.TiffWriter(path) as writer:
        for _ in range(planes):
            writer.write(
                image,
                tile=(256, 256),
                photometric="rgb",
                description=description,
                metadata=None,
                extratags=extra,
                software=False,
            )
    return path
