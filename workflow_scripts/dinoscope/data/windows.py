"""Do the crops fit the images that they are cut from, and which magnification do they show?"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from dinoscope.data.crops import CropSizes
from dinoscope.data.sources import Window
from dinoscope.errors import ConfigError

__all__ = ["CropRange", "crop_ranges", "describe_windows"]


@dataclass(frozen=True)
class CropRange:
    """Effective micrometres a pixel of one kind of crop, over the range of its scale and the images' mpp.

    Both are None where the mpp of an image is unknown.
    """

    name: str
    crop_px: int
    finest_mpp: float | None
    coarsest_mpp: float | None
    upsampled: bool

    def __str__(self) -> str:
        shown = "magnification unknown"
        if self.finest_mpp is not None:
            shown = f"{self.finest_mpp:.3g} to {self.coarsest_mpp:.3g} µm/px"
        text = f"{self.name} crops {self.crop_px} px, {shown}"
        return text + (" (the smallest ones are upsampled)" if self.upsampled else "")


def crop_ranges(windows: Iterable[Window], sizes: Sequence[CropSizes]) -> list[CropRange]:
    """Checks each kind of crop, in all sizes that it has, against the smallest window.

    A crop of c px from a window of w px with smallest scale s (a share of the area) is upsampled when c > w·√s; w is
    the square root of the area where the window is no square.

    Raises:
        ConfigError: A crop is larger than the shorter side of a window.
    """
    distinct = set(windows)
    wanted = [("global", of_step.global_px, of_step.global_scale) for of_step in sizes]
    wanted += [("local", of_step.local_px, of_step.local_scale) for of_step in sizes]
    wanted += [("gram teacher", s.gram_px, s.global_scale) for s in sizes if s.gram_px is not None]
    return [_range(name, crop_px, scale, distinct) for name, crop_px, scale in dict.fromkeys(wanted)]


def describe_windows(windows: Iterable[Window], sizes: Sequence[CropSizes]) -> dict[str, Any]:
    """For a model card: "tiles", the windows by size and mpp; "crops", which magnifications each kind shows."""
    distinct = set(windows)
    tiles = {(window.shorter_px, window.mpp and round(window.mpp, 6)) for window in distinct}
    return {
        "tiles": [{"tile_px": tile_px, "mpp": mpp} for tile_px, mpp in sorted(tiles)],
        "crops": [vars(entry) for entry in crop_ranges(distinct, sizes)],
    }


def _range(name: str, crop_px: int, scale: tuple[float, float], windows: set[Window]) -> CropRange:
    smallest = min(windows, key=lambda window: (window.shorter_px, window.name))
    if crop_px > smallest.shorter_px:
        raise ConfigError(_too_large(name, crop_px, smallest))
    sides = {window: math.sqrt(window.width * window.height) for window in windows}
    upsampled = crop_px > min(sides.values()) * math.sqrt(scale[0])
    if any(window.mpp is None for window in windows):
        return CropRange(name, crop_px, None, None, upsampled)
    finest = min(window.mpp * side * math.sqrt(scale[0]) / crop_px for window, side in sides.items())
    coarsest = max(window.mpp * side * math.sqrt(scale[1]) / crop_px for window, side in sides.items())
    return CropRange(name, crop_px, finest, coarsest, upsampled)


def _too_large(name: str, crop_px: int, window: Window) -> str:
    if window.mpp is not None:
        return (
            f"{name} crops are {crop_px} px but {window.name} only {window.shorter_px} px; "
            f"use a tile set with windows of at least {crop_px} px, or smaller crops"
        )
    return (
        f"{name} crops are {crop_px} px but {window.name} only {window.width} × {window.height} px; "
        f"use images of at least {crop_px} px on both sides, or smaller crops"
    )
