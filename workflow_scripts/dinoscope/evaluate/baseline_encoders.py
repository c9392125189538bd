"""The colour histogram and the thumbnail as encoders, so that they go through everything that models go through."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from dinoscope.evaluate import baselines

__all__ = ["color_histogram", "thumbnail"]


class _OfPixels(nn.Module):
    """Features that a function of one uint8 image (H, W, 3) gives; no patches."""

    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

    def __init__(self, function: Callable[[np.ndarray], np.ndarray]) -> None:
        super().__init__()
        self._function = function

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in 0..1, not normalised -> (B, D) float32."""
        pixels = (images.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).cpu().numpy()
        rows = np.stack([self._function(np.ascontiguousarray(image)) for image in pixels])
        return torch.from_numpy(rows).to(images.device)


def color_histogram() -> nn.Module:
    """16 bins each of hue, saturation and value, as shares of the pixels."""
    return _OfPixels(baselines.color_histogram)


def thumbnail() -> nn.Module:
    """The image at 8 x 8 px, values in 0..1."""
    return _OfPixels(baselines.thumbnail)
