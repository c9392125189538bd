"""Patch features at the resolution of their image, so that structures smaller than a patch can be seen.

`joint_bilateral` doubles the resolution step by step, as FeatUp does (Fu et al. 2024, arXiv:2403.10516), but without
anything learned: every step is the joint bilateral filter of Kopf et al. 2007 (ACM TOG 26, 96). A fine pixel becomes a
mean of the coarse pixels around it, of which those count most that are near and of like colour in the image.

All weights come from the image and sum to one. So the filter commutes with every affine map of the features, and the
three principal components of upsampled features are the upsampled principal components, which takes D/3 times less.

Shapes: h × w patches, H × W pixels, C channels.
"""

import math
import os
from collections.abc import Callable

import cv2
import numpy as np

from dinoscope import user_code
from dinoscope.errors import ConfigError

__all__ = ["BUILT_IN", "Upsampler", "joint_bilateral", "load_upsampler", "nearest_neighbour"]

BUILT_IN = ("jbu", "none")
RADIUS = 1  # of the window, in coarse pixels; 2 takes four times as long and looks the same
NEAR = 0.7  # standard deviation of the spatial weight, in coarse pixels
FAINTEST = 60.0  # exponent: the weights of a pixel unlike all around it must not vanish in float32
LEAST_RANGE = 2.0  # of 255: what differs less is noise of the camera

# of a module: features (1, D, h, w) and image (1, 3, H, W) in 0..1, both float32 tensors -> (1, D, H', W')
Upsampler = Callable[..., object]


def load_upsampler(name: str) -> Upsampler | None:
    """The upsampler module:callable; None for those that are built in, "jbu" and "none".

    Raises:
        ConfigError: It reads otherwise, cannot be imported, or is nothing that can be called.
    """
    if name in BUILT_IN:
        return None
    if not user_code.is_class_name(name):
        raise ConfigError(f"upsample is {name!r}, but must be jbu, none or module:callable, e.g. my_code:featup")
    try:
        found = user_code.load_class(name)
    except Exception as error:
        raise ConfigError(f"upsample {name} cannot be loaded: {user_code.told(error, os.fspath(__file__))}") from error
    if not callable(found):
        raise ConfigError(f"upsample {name} is no callable; name a function of (features, image)")
    return found


def nearest_neighbour(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """Values (h, w, C) at (height, width, C): every pixel has the value of its patch."""
    rows, columns = (np.arange(n) * side // n for n, side in zip((height, width), values.shape, strict=False))
    return values[rows][:, columns]


def joint_bilateral(values: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Upsamples values along the edges of an image.

    Args:
        values: (h, w, C) float32.
        image: (H, W, 3) uint8, of the same place; H ≥ h, W ≥ w.

    Returns:
        (H, W, C) float32. No value lies outside the range of those around it.
    """
    height, width = image.shape[:2]
    smoothed = cv2.cvtColor(image, cv2.COLOR_RGB2LAB).astype(np.float32)  # where distances are as the eye sees them
    values, coarse = values.astype(np.float32), _averaged(smoothed, *values.shape[:2])
    while values.shape[:2] != (height, width):
        size = [min(2 * side, full) for side, full in zip(values.shape[:2], (height, width), strict=True)]
        size = [full if full < 1.5 * side else side for side, full in zip(size, (height, width), strict=True)]
        fine = _averaged(smoothed, *size)
        values, coarse = _step(values, coarse, fine), fine
    return values


def _averaged(image: np.ndarray, height: int, width: int) -> np.ndarray:
    return (
        image
        if image.shape[:2] == (height, width)
        else cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    )


def _step(values: np.ndarray, coarse: np.ndarray, fine: np.ndarray) -> np.ndarray:
    """One joint bilateral upsampling: values (h, w, C) and their image `coarse` to the size of the image `fine`."""
    rows, near_rows = _neighbours(values.shape[0], fine.shape[0])
    columns, near_columns = _neighbours(values.shape[1], fine.shape[1])
    spread = _range(coarse, fine, rows[RADIUS], columns[RADIUS])
    total = np.zeros((*fine.shape[:2], values.shape[2]), np.float32)
    weights = np.zeros(fine.shape[:2], np.float32)
    for row, near_row in zip(rows, near_rows, strict=True):
        for column, near_column in zip(columns, near_columns, strict=True):
            distance = np.square(fine - coarse[row][:, column]).sum(axis=2)
            weight = np.exp(-np.minimum(distance / (2 * spread**2), FAINTEST)) * (near_row[:, None] * near_column)
            weights += weight
            total += weight[..., None] * values[row][:, column]
    return total / weights[..., None]


def _neighbours(side: int, full: int) -> tuple[np.ndarray, np.ndarray]:
    """Of every fine pixel the coarse ones around it and their spatial weights, both (2 · RADIUS + 1, full)."""
    place = (np.arange(full) + 0.5) * side / full - 0.5
    nearest = np.floor(place + 0.5).astype(int) + np.arange(-RADIUS, RADIUS + 1)[:, None]
    weights = np.exp(-np.square(nearest - place) / (2 * NEAR**2)).astype(np.float32)
    return nearest.clip(0, side - 1), weights


def _range(coarse: np.ndarray, fine: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> float:
    """Standard deviation of the weight by colour: how much the image differs within a coarse pixel, typically."""
    inside = np.square(fine - coarse[rows][:, columns]).sum(axis=2)
    return max(math.sqrt(float(inside.mean()) / 3), LEAST_RANGE)
