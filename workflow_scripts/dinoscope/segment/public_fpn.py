"""The pyramid decoder whose weights dinov2-finetune saves, so that these give what they gave there.

Made from what its files hold and what its results are: names, shapes and arithmetic follow that tool (MIT), the code is
ours. For trainings of our own `FPNDecoder` is the better choice: here no convolution is padded, so that the map loses
its rim and what is left is stretched over the image, and logits are never below zero.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PublicFPNDecoder"]

_WIDTHS = (128, 64, 32, 21)  # channels after the first four convolutions


class PublicFPNDecoder(nn.Module):
    """Five 3x3 convolutions on the map of the last block; the three blocks before it are added on the way.

    Args:
        embed_dim: D.
        num_classes: C.
        doublings: How often the map is doubled: 2 or 3. Versions of that tool differ, and its files do not tell.
    """

    num_blocks = 4

    def __init__(self, embed_dim: int, num_classes: int, doublings: int = 2) -> None:
        super().__init__()
        self.doublings = doublings
        for number, (before, after) in enumerate(
            zip((embed_dim, *_WIDTHS), (*_WIDTHS, num_classes), strict=True), start=1
        ):
            parts = (nn.Conv2d(before, after, 3, bias=False), nn.BatchNorm2d(after), nn.ReLU())
            self.add_module(f"conv{number}", nn.Sequential(*parts))
        for number, width in enumerate(_WIDTHS[1:], start=1):
            self.add_module(f"inter_conv{number}", nn.Conv2d(embed_dim, width, 1))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Four maps (B, D, h, w) -> (B, C, h', w')."""
        merged = self.conv1(maps[-1])
        for number in (1, 2, 3):
            merged = self.get_submodule(f"conv{number + 1}")(merged)
            if number <= self.doublings:
                merged = F.interpolate(merged, scale_factor=2, mode="nearest")
            lateral = self.get_submodule(f"inter_conv{number}")(maps[number - 1])
            merged = merged + F.interpolate(lateral, merged.shape[-2:], mode="nearest")
        return self.conv5(merged)
