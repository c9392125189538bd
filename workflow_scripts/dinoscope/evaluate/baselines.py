"""What needs no training: the colour of a tile, its thumbnail, and a network at random initialisation.

A model that does not beat them has learned nothing that the task needs, and a task that they solve tells nothing of
models: in blood smears colour alone names the cell.
"""

import cv2
import numpy as np

from dinoscope.models.vit import DinoVisionTransformer
from dinoscope.train.starting import fresh_backbone

__all__ = ["color_histogram", "random_initialisation", "thumbnail"]

BINS = 16
SIDE_PX = 8
_TOPS = (180, 256, 256)  # of hue, saturation and value


def color_histogram(image: np.ndarray) -> np.ndarray:
    """16 bins each of hue, saturation and value as shares of the pixels, (48,) float32.

    Args:
        image: uint8 RGB (H, W, 3).
    """
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV).reshape(-1, 3)
    counts = [np.histogram(hsv[:, channel], BINS, (0, top))[0] for channel, top in enumerate(_TOPS)]
    return (np.concatenate(counts) / len(hsv)).astype(np.float32)


def thumbnail(image: np.ndarray) -> np.ndarray:
    """The tile shrunk to 8×8 px, RGB in 0..1, (192,) float32.

    Args:
        image: uint8 RGB (H, W, 3).
    """
    return cv2.resize(image, (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_AREA).ravel().astype(np.float32) / 255


def random_initialisation(model: DinoVisionTransformer, seed: int = 0) -> DinoVisionTransformer:
    """A network of the same kind as a trained one, as a training from scratch begins, in evaluation mode.

    Args:
        model: Whose architecture, mean and std it has.
        seed: Of its weights.
    """
    fresh = fresh_backbone(model.settings, seed)
    fresh.mean, fresh.std = model.mean, model.std
    return fresh.eval().requires_grad_(False)
