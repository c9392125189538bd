"""From an image of any size to the logits of its pixels.

Either windows of the training size are laid over the image at its own size, overlapping, and their logits averaged,
with less weight towards the rims ("slide"), or the whole image is brought to the training size and its logits back
("resize", as the public tool measures). Whole slides are laid out and weighted alike (slides.py).

Shapes: H, W of the image, h, w of a window, C classes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dinoscope.errors import ConfigError

if TYPE_CHECKING:
    from dinoscope.segment.model import Segmenter

__all__ = ["Inference", "predict_logits", "window_starts", "window_weights"]


@dataclass(frozen=True)
class Inference:
    """How images are looked at.

    Attributes:
        window_hw: Height and width of what the model sees at once, px.
        mode: slide or resize.
        overlap: Share of a window that the next one covers again.
        batch_size: Windows a forward pass; changes memory and speed alone.
        autocast: Type of matrix products, None: float32.
    """

    window_hw: tuple[int, int]
    mode: str = "slide"
    overlap: float = 1 / 3
    batch_size: int = 8
    autocast: torch.dtype | None = None

    def __post_init__(self) -> None:
        """Refuses what cannot be meant."""
        if not 0 <= self.overlap < 1:
            raise ConfigError(f"overlap is {self.overlap}; a share of a window from 0 to below 1 is wanted")
        if self.batch_size < 1:
            raise ConfigError(f"batch_size is {self.batch_size}; at least 1 is wanted")

    @property
    def stride_hw(self) -> tuple[int, int]:
        """Largest distance of neighbouring windows, px."""
        height, width = (max(1, int(side * (1 - self.overlap))) for side in self.window_hw)
        return height, width


@torch.inference_mode()
def predict_logits(model: "Segmenter", image: np.ndarray, how: Inference, device: torch.device) -> Tensor:
    """Logits (C, H, W), float32 on the device, of a uint8 RGB image (H, W, 3).

    Args:
        model: In evaluation mode, on that device.
        image: Of any size; sides that are smaller than the window are mirrored up to it.
        how: The window and how it is laid.
        device: Where the model is.
    """
    height, width = image.shape[:2]
    if how.mode == "resize":
        area = how.window_hw[0] * how.window_hw[1] < height * width
        method = cv2.INTER_AREA if area else cv2.INTER_LINEAR
        small = cv2.resize(image, how.window_hw[::-1], interpolation=method)
        logits = _forward(model, torch.from_numpy(small)[None], how, device)
        return F.interpolate(logits, (height, width), mode="bilinear", align_corners=False)[0]
    padded = torch.from_numpy(_mirrored(image, how.window_hw))
    overlap_hw = tuple(side - stride for side, stride in zip(how.window_hw, how.stride_hw, strict=True))
    weights = torch.from_numpy(window_weights(how.window_hw, overlap_hw)).to(device)
    summed, total = None, torch.zeros(padded.shape[:2], device=device)
    for places in _batches(padded.shape[:2], how):
        windows = torch.stack([padded[place] for place in places])
        for place, logits in zip(places, _forward(model, windows, how, device), strict=True):
            if summed is None:
                summed = torch.zeros(len(logits), *padded.shape[:2], device=device)
            summed[:, *place] += logits * weights
            total[place] += weights
    return (summed / total)[:, :height, :width]


def window_starts(length: int, window: int, stride: int) -> np.ndarray:
    """Where windows begin along a side of an image or a slide: as few as cover it, spread evenly, the last at its end.

    Args:
        length: Of the side in pixels; where it is shorter than a window, one window reaches beyond it.
        window: Side of a window.
        stride: Largest distance of neighbours.

    Returns:
        int64, rising.
    """
    last = max(0, length - window)
    return np.rint(np.linspace(0, last, -(-last // stride) + 1)).astype(np.int64)


def window_weights(window_hw: tuple[int, int], overlap_hw: tuple[int, int]) -> np.ndarray:
    """How much each pixel of a window counts where others overlap it: less towards the rims, where it sees least.

    Args:
        window_hw: Height and width of a window.
        overlap_hw: Pixels that the next one covers again, over which weights rise linearly.

    Returns:
        float32 (h, w), above 0, 1 in the middle; those of two neighbours add up to 1.
    """
    ramps = []
    for side, overlap in zip(window_hw, overlap_hw, strict=True):
        distance = np.minimum(np.arange(side), np.arange(side)[::-1]) + 0.5
        ramps.append(np.minimum(distance / max(overlap, 0.5), 1))
    return np.outer(*ramps).astype(np.float32)


def _batches(size_hw: tuple[int, int], how: Inference) -> Iterator[list[tuple[slice, slice]]]:
    height, width = how.window_hw
    tops, lefts = (window_starts(*sides).tolist() for sides in zip(size_hw, how.window_hw, how.stride_hw, strict=True))
    places = [(slice(top, top + height), slice(left, left + width)) for top in tops for left in lefts]
    for first in range(0, len(places), how.batch_size):
        yield places[first : first + how.batch_size]


def _forward(model: "Segmenter", windows: Tensor, how: Inference, device: torch.device) -> Tensor:
    images = model.normalised(windows.to(device))
    with torch.autocast(device.type, how.autocast, enabled=how.autocast is not None):
        return model(images).float()


def _mirrored(image: np.ndarray, window_hw: tuple[int, int]) -> np.ndarray:
    """The image, continued by its mirror image at the lower and right edge up to the size of the window."""
    below, right = (max(0, window - size) for window, size in zip(window_hw, image.shape[:2], strict=True))
    image = np.ascontiguousarray(image)
    return cv2.copyMakeBorder(image, 0, below, 0, right, cv2.BORDER_REFLECT) if below or right else image
