"""Changes of colour and sharpness of uint8 RGB images (h, w, 3), each as Pillow and torchvision define it.

Results are rounded, where Pillow cuts off: they may differ from Pillow's by one grey level. Inputs are left unchanged.
"""

import math

import cv2
import numpy as np

__all__ = [
    "adjust_brightness",
    "adjust_contrast",
    "adjust_hue",
    "adjust_saturation",
    "gaussian_blur",
    "grayscale",
    "shift_stains",
    "solarize",
]

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, of red, green, blue
# Rows: unit optical density of haematoxylin, eosin and DAB in red, green, blue (Ruifrok & Johnston 2001)
RGB_FROM_HED = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
HED_FROM_RGB = np.linalg.inv(RGB_FROM_HED)
# ln(value / 255) of a grey value; black counts as half a grey level, so that it survives the way there and back
_LOG_TRANSMISSION = np.log(np.maximum(np.arange(256), 0.5) / 255).astype(np.float32)


def adjust_brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends with black: 0 gives black, 1 the image."""
    return cv2.addWeighted(image, factor, image, 0, 0)


def adjust_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends with the image's mean grey: 0 gives a grey area, 1 the image."""
    mean = math.floor(np.dot(LUMA, cv2.mean(image)[:3]) + 0.5)
    return cv2.addWeighted(image, factor, image, 0, (1 - factor) * mean)


def adjust_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends with the grayscale image: 0 gives grayscale, 1 the image."""
    return cv2.addWeighted(image, factor, grayscale(image), 1 - factor, 0)


def adjust_hue(image: np.ndarray, shift: float) -> np.ndarray:
    """Turns the hue by `shift` of a full circle (in steps of 1/256), at unchanged HSV saturation and value."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(round(shift * 256) % 256)  # wraps around, as hues do
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def grayscale(image: np.ndarray) -> np.ndarray:
    """Luma in all three channels."""
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def gaussian_blur(image: np.ndarray, sigma_px: float, kernel_px: int) -> np.ndarray:
    """Gaussian of `kernel_px` taps, mirrored at the borders without repeating the edge pixel."""
    kernel = cv2.getGaussianKernel(kernel_px, sigma_px, cv2.CV_32F)
    # half the time of cv2.GaussianBlur on uint8, and correctly rounded
    return cv2.sepFilter2D(image, -1, kernel, kernel)


def solarize(image: np.ndarray, threshold: int) -> np.ndarray:
    """Inverts every value at or above `threshold`."""
    values = np.arange(256)
    return cv2.LUT(image, np.where(values < threshold, values, 255 - values).astype(np.uint8))


def shift_stains(image: np.ndarray, gains_hed: np.ndarray, shifts_hed: np.ndarray) -> np.ndarray:
    """Changes the amounts of haematoxylin, eosin and DAB: stain -> gain · stain + shift (Tellez et al. 2018).

    Colours are unmixed in optical density (-log10 of the transmitted share of light) with the matrix of Ruifrok &
    Johnston 2001. Negative amounts, which unmixing gives for colours outside the three stains, are kept, so that gains
    of 1 and shifts of 0 change nothing.

    Args:
        image: Bright-field image.
        gains_hed: (3,) factors of the three stains.
        shifts_hed: (3,) optical densities to add to them.
    """
    mix = HED_FROM_RGB @ np.diag(gains_hed) @ RGB_FROM_HED
    offset = math.log(255) - math.log(10) * (np.asarray(shifts_hed) @ RGB_FROM_HED)
    log_rgb = cv2.transform(cv2.LUT(image, _LOG_TRANSMISSION), np.column_stack([mix.T, offset]))
    return cv2.convertScaleAbs(cv2.exp(log_rgb))
