"""Do the crops fit the tiles that they are cut from, and which magnification do they show?"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from dinoscope.data.crops import CropSizes
from dinoscope.data.tiles import TileKind
from dinoscope.errors import ConfigError

__all__ = ["CropRange", "crop_ranges"]


@dataclass(frozen=True)
class CropRange:
    """Effective micrometres a pixel of one kind of crop, over the range of its scale and the tiles' mpp."""

    name: str
    crop_px: int
    finest_mpp: float
    coarsest_mpp: float
    upsampled: bool

    def __str__(self) -> str:
        text = f"{self.name} crops {self.crop_px} px, {self.finest_mpp:.3g} to {self.coarsest_mpp:.3g} µm/px"
        return text + (" (the smallest ones are upsampled)" if self.upsampled else "")


def crop_ranges(kinds: Iterable[TileKind], sizes: CropSizes) -> list[CropRange]:
    """Checks each kind of crop against the smallest tile.

    A crop of c px from a window of w px with smallest scale s (a share of the area) is upsampled when c > w·√s.

    Raises:
        ConfigError: A crop is larger than the window itself.
    """
    windows = {(kind.tile_px, kind.mpp) for kind in kinds}
    wanted = [("global", sizes.global_px, sizes.global_scale), ("local", sizes.local_px, sizes.local_scale)]
    if sizes.gram_px is not None:
        wanted.append(("gram teacher", sizes.gram_px, sizes.global_scale))
    return [_range(name, crop_px, scale, windows) for name, crop_px, scale in wanted]


def _range(name: str, crop_px: int, scale: tuple[float, float], windows: set[tuple[int, float]]) -> CropRange:
    smallest = min(px for px, _ in windows)
    if crop_px > smallest:
        raise ConfigError(
            f"{name} crops are {crop_px} px but the tiles only {smallest} px; "
            f"use a tile set with windows of at least {crop_px} px, or smaller crops"
        )
    finest = min(mpp * px * math.sqrt(scale[0]) / crop_px for px, mpp in windows)
    coarsest = max(mpp * px * math.sqrt(scale[1]) / crop_px for px, mpp in windows)
    return CropRange(name, crop_px, finest, coarsest, crop_px > smallest * math.sqrt(scale[0]))
