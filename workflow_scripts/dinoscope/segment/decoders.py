"""From patch features to logits: a linear map of each patch, or a pyramid of the last four blocks.

A decoder takes a list of maps (B, D, h, w), the last block's last, of `num_blocks` blocks, and gives logits
(B, C, h', w') that cover the same area.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoscope.errors import ConfigError
from dinoscope.names import nearest
from dinoscope.segment.public_fpn import PublicFPNDecoder

__all__ = ["DECODERS", "FPNDecoder", "LinearDecoder", "build_decoder"]

_CHANNELS, _GROUPS = 128, 16
_SCALES = (4, 2, 1, 0.5)  # of the patch grid: what plain transformers are given in place of a pyramid of their own


class LinearDecoder(nn.Module):
    """One linear map of the last patch features: a 1x1 convolution."""

    num_blocks = 1

    def __init__(self, embed_dim: int, num_classes: int) -> None:
        super().__init__()
        self.classifier = _classifier(embed_dim, num_classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, D, h, w) -> (B, C, h, w)."""
        return self.classifier(maps[-1])


class FPNDecoder(nn.Module):
    """A feature pyramid (arXiv:1612.03144) on four blocks, summed for segmentation (arXiv:1901.02446).

    The features of the last four blocks, reduced to 128 channels, are brought to 4, 2, 1 and 1/2 of the patch grid, the
    earliest block's to the finest; from coarse to fine each level is added to the next, smoothed, and all are summed at
    the finest. Every convolution is padded, so that logits stay where the image is; group norm makes the output of an
    image the same whatever else is in its batch.
    """

    num_blocks = 4

    def __init__(self, embed_dim: int, num_classes: int) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(_convolution(embed_dim, 1) for _ in _SCALES)
        self.smoothing = nn.ModuleList(_convolution(_CHANNELS, 3) for _ in _SCALES)
        self.classifier = _classifier(_CHANNELS, num_classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Four maps (B, D, h, w) -> (B, C, 4h, 4w)."""
        height, width = maps[0].shape[-2:]
        sizes = [(max(1, round(height * scale)), max(1, round(width * scale))) for scale in _SCALES]
        coarser, total = None, None
        for level in reversed(range(len(_SCALES))):
            merged = _resized(self.laterals[level](maps[level]), sizes[level])
            merged = merged if coarser is None else merged + _resized(coarser, sizes[level])
            coarser = self.smoothing[level](merged)
            finest = _resized(coarser, sizes[0])
            total = finest if total is None else total + finest
        return self.classifier(total)


DECODERS: dict[str, Callable[[int, int], nn.Module]] = {
    "linear": LinearDecoder,
    "fpn": FPNDecoder,
    "public_fpn": PublicFPNDecoder,
    "public_fpn3": partial(PublicFPNDecoder, doublings=3),
}


def build_decoder(name: str, embed_dim: int, num_classes: int, seed: int) -> nn.Module:
    """A decoder on the CPU with weights from a seed.

    Args:
        name: One of `DECODERS`; "public_fpn" and "public_fpn3" are for files of dinov2-finetune.
        embed_dim: D.
        num_classes: C.

    Raises:
        ConfigError: There is no such decoder.
    """
    if name not in DECODERS:
        raise ConfigError(f"decoder {name!r} is unknown: choose from {', '.join(DECODERS)}{nearest(name, DECODERS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DECODERS[name](embed_dim, num_classes)


def _classifier(channels: int, num_classes: int) -> nn.Conv2d:
    """Begins with small logits, so that the first loss is that of a guess: log C."""
    layer = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return layer


def _convolution(channels: int, side: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels, _CHANNELS, side, padding=side // 2, bias=False)
    return nn.Sequential(convolution, nn.GroupNorm(_GROUPS, _CHANNELS), nn.ReLU())


def _resized(features: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(features, size, mode="bilinear", align_corners=False)
