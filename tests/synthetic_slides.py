"""Slides that tests make: lossless pyramids of known pixels, and simple pictures of stained tissue."""

from collections.abc import Callable, Iterator, Sequence
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


APERIO = "Aperio Image Library v12.0.15\r\n{}x{} (256x256) tiles|AppMag = 20|MPP = 0.5"


def write_tiled(
    path: Path,
    image: np.ndarray,
    encode: Callable[[np.ndarray], bytes],
    *,
    tile: tuple[int, int] = (256, 256),
    downsamples: Sequence[int] = (1, 2, 4),
    missing: Sequence[int] = (),
    compression: int = 7,
    photometric: str = "ycbcr",
    **options: object,
) -> Path:
    """A tiled TIFF of streams that `encode` makes, whose levels take every n-th pixel of `image`.

    Args:
        path: File to write.
        image: Level 0.
        encode: Makes the stream of a tile; those at the edges are filled with the last row and column.
        tile: Height and width of tiles.
        downsamples: Of the levels.
        missing: Numbers of tiles of every level that have no bytes.
        compression: TIFF's number of it.
        photometric: What the file says of its colours.
        options: More for tifffile.
    """
    layout = {"bigtiff": options.pop("bigtiff", False), "byteorder": options.pop("order", "<")}
    with tifffile.TiffWriter(path, **layout) as writer:
        for number, step in enumerate(downsamples):
            level = image[::step, ::step]
            streams = [encode(cut) for cut in cut_tiles(level, tile)]
            writer.write(
                (b"" if place in missing else stream for place, stream in enumerate(streams)),
                shape=level.shape,
                dtype=np.uint8,
                tile=tile,
                compression=compression,
                photometric=photometric,
                subfiletype=1 if number else 0,
                metadata=None,
                resolution=(20000 / step, 20000 / step),
                resolutionunit="CENTIMETER",
                **options,
            )
    return path


def cut_tiles(image: np.ndarray, tile: tuple[int, int]) -> Iterator[np.ndarray]:
    """The tiles of an image in raster order, those at the edges filled with its last row and column."""
    missing = [-side % length for side, length in zip(image.shape, tile, strict=False)]
    padded = np.pad(image, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="edge")
    for top in range(0, padded.shape[0], tile[0]):
        for left in range(0, padded.shape[1], tile[1]):
            yield np.ascontiguousarray(padded[top : top + tile[0], left : left + tile[1]])


def split_jpeg(stream: bytes) -> tuple[bytes, bytes]:
    """The tables of a JPEG stream, and the stream without them, as TIFF stores them ("abbreviated")."""
    tables, rest, place = b"\xff\xd8", b"\xff\xd8", 2
    while stream[place + 1] != 0xDA:
        end = place + 2 + int.from_bytes(stream[place + 2 : place + 4], "big")
        if stream[place + 1] in (0xDB, 0xC4):
            tables += stream[place:end]
        else:
            rest += stream[place:end]
        place = end
    return tables + b"\xff\xd9", rest + stream[place:]
