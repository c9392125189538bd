"""Blurred images: float32 RGB (H, W, 3) in 0 … 1, numbers as in corruptions.py, all draws from a generator."""

import math

import cv2
import numpy as np

__all__ = ["defocus", "gaussian", "glass", "motion", "moved", "zoom"]


def gaussian(image: np.ndarray, sigma: float, rng: np.random.Generator | None = None) -> np.ndarray:
    """Gaussian of four sigmas to each side, edges repeated; also of grey (H, W)."""
    taps = 2 * int(4 * sigma + 0.5) + 1
    return cv2.GaussianBlur(image, (taps, taps), sigma, borderType=cv2.BORDER_REPLICATE)


def defocus(image: np.ndarray, disk: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """A lens out of focus: the mean over a disk of `radius` pixels, whose rim a Gaussian softens."""
    radius, softness = disk
    reach = max(8, math.ceil(radius))
    offsets = np.arange(-reach, reach + 1)
    kernel = (offsets[:, None] ** 2 + offsets**2 <= radius**2).astype(np.float32)
    taps = 3 if radius <= 8 else 5
    kernel = cv2.GaussianBlur(kernel / kernel.sum(), (taps, taps), softness)
    return cv2.filter2D(image, -1, kernel)


def glass(image: np.ndarray, numbers: tuple[float, int, int], rng: np.random.Generator) -> np.ndarray:
    """Frosted glass: blurred, pixels exchanged with near ones, blurred again.

    As in the published benchmark, whose pixels are views of one array, a pixel takes the value of its near one and does
    not give it its own.
    """
    sigma, reach, rounds = numbers
    height, width = image.shape[:2]
    blurred = np.floor(np.clip(gaussian(image, sigma), 0, 1) * 255).astype(np.float32) / 255
    sources = np.arange(height * width)
    rows, columns = np.arange(height - reach, reach, -1), np.arange(width - reach, reach, -1)
    places = (rows[:, None] * width + columns).ravel()
    for _ in range(rounds):
        down, right = rng.integers(-reach, reach, (2, len(places)))
        sources = sources[_passed_on(height * width, places, places + down * width + right)]
    return gaussian(blurred.reshape(-1, 3)[sources].reshape(image.shape), sigma)


def _passed_on(count: int, places: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Where the value of each of `count` pixels was before, if each place in turn takes that of its other.

    Places come from the last pixel to the first. A place whose other came before it takes what that one took: such
    chains are followed by doubling their steps, which gives what one place after the other gives.
    """
    came = np.zeros(count, bool)
    came[places] = True
    before, step = np.arange(count), np.arange(count)
    chained = came[others] & (others > places)
    before[places[~chained]] = others[~chained]
    step[places[chained]] = others[chained]
    while not np.array_equal(further := step[step], step):
        step = further
    return before[step]


def motion(image: np.ndarray, numbers: tuple[int, float], rng: np.random.Generator) -> np.ndarray:
    """A moving camera, in a direction within 45 degrees of the horizontal."""
    return moved(image, *numbers, rng.uniform(-45, 45))


def moved(image: np.ndarray, radius: int, sigma: float, degrees: float) -> np.ndarray:
    """The mean along a line from each pixel on, weighted by half a Gaussian; edges repeated; also of grey (H, W)."""
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    angle = math.radians(degrees)
    columns, rows = (np.ceil(steps * part - 0.5).astype(int) for part in (math.cos(angle), math.sin(angle)))
    kernel = np.zeros((4 * radius + 1, 4 * radius + 1), np.float32)
    np.add.at(kernel, (2 * radius + rows, 2 * radius + columns), weights / weights.sum())
    return cv2.filter2D(image, -1, kernel, borderType=cv2.BORDER_REPLICATE)


def zoom(image: np.ndarray, numbers: tuple[int, float], rng: np.random.Generator) -> np.ndarray:
    """A lens that zooms in during exposure: the mean of enlargements from 1 on, which counts twice."""
    count, step = numbers
    total = image.copy()
    for number in range(count):
        total += _enlarged(image, 1 + number * step)
    return total / (count + 1)


def _enlarged(image: np.ndarray, factor: float) -> np.ndarray:
    """The middle of an image, bilinear, its centre unmoved."""
    height, width = image.shape[:2]
    shifts = [(1 - 1 / factor) * (side - 1) / 2 for side in (width, height)]
    back = np.array([[1 / factor, 0, shifts[0]], [0, 1 / factor, shifts[1]]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(image, back, (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE)
