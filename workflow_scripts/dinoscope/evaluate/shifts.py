"""Changes that a slide may undergo between laboratories, for asking whether features stay what they are.

Each is drawn by (seed, index of the tile), the same for all encoders, and of one strength: such as a pathologist reads
through without trouble.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

from dinoscope.data.color import coarser, gaussian_blur, luma, shift_stains
from dinoscope.data.packed import decode_jpeg
from dinoscope.data.packing import encode_jpeg

__all__ = ["SHIFTS", "shifted"]

STAIN_SPREAD, STAIN_OFFSET = 0.25, 0.05  # gains of 1 ± this, shifts of ± this in optical density
BLUR_SIGMA_PX, BLUR_KERNEL_PX = 1.5, 13
JPEG_QUALITY = 30  # scanners store 70 to 90
MPP_FACTOR = 2.0  # as if scanned at so many times the micrometres a pixel


def _stain(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    gains, offsets = rng.uniform(1 - STAIN_SPREAD, 1 + STAIN_SPREAD, 3), rng.uniform(-1, 1, 3) * STAIN_OFFSET
    return shift_stains(image, gains, offsets)


def _blur(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return gaussian_blur(image, BLUR_SIGMA_PX, BLUR_KERNEL_PX)


def _jpeg(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    stream = encode_jpeg(image, JPEG_QUALITY, "4:2:0")
    return decode_jpeg(np.frombuffer(stream, dtype=np.uint8))


def _coarser(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return coarser(image, MPP_FACTOR)


def _turned(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """By half a turn, or where the image is square by a quarter to either side as well."""
    quarters = int(rng.integers(1, 4)) if image.shape[0] == image.shape[1] else 2
    return np.ascontiguousarray(np.rot90(image, quarters))


def _grey(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.repeat(luma(image)[..., None], 3, axis=2)


SHIFTS: Mapping[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = MappingProxyType(
    {"stain": _stain, "blur": _blur, "jpeg": _jpeg, "mpp": _coarser, "rotation": _turned, "grey": _grey}
)


def shifted(image: np.ndarray, kind: str, index: int, seed: int = 0) -> np.ndarray:
    """A changed copy of a tile, uint8 RGB (H, W, 3).

    Args:
        image: The tile.
        kind: "stain": haematoxylin, eosin and the rest each by a gain of 0.75 to 1.25 and a shift of up to 0.05 optical
            densities. "blur": Gaussian of 1.5 px. "jpeg": quality 30. "mpp": as if scanned at twice the µm a pixel, and
            enlarged again. "rotation": by a quarter, half or three quarters of a turn. "grey": without colour.
        index: Of the tile.
        seed: Of the draws.
    """
    return SHIFTS[kind](image, np.random.default_rng([seed, index, sorted(SHIFTS).index(kind)]))
