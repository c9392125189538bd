"""Changes of colour and sharpness of uint8 RGB images (h, w, 3), each as Pillow and torchvision define it.

Results are rounded, where Pillow cuts off: each may differ from Pillow's by one grey level. Inputs are left unchanged.
"""

import math
import threading
from collections.abc import Sequence

import cv2
import numpy as np

__all__ = ["JITTERS", "coarser", "gaussian_blur", "jitter", "luma", "shift_stains", "solarize", "turn_hues"]

JITTERS = ("brightness", "contrast", "saturation", "hue")
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, of red, green, blue
# Rows: unit optical density of haematoxylin, eosin and DAB in red, green, blue (Ruifrok & Johnston 2001)
RGB_FROM_HED = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
HED_FROM_RGB = np.linalg.inv(RGB_FROM_HED)
# ln(value / 255) of a grey value; black counts as half a grey level, so that it survives the way there and back
_LOG_TRANSMISSION = np.log(np.maximum(np.arange(256), 0.5) / 255).astype(np.float32)
_STRIP_PIXELS = 8_000  # computed in floats at a time, which so stay in the cache
_PIXELS_AT_ONCE = 100_352  # whose hue is turned together, for the same reason
_NOTHING = np.empty(0, np.uint8)
_scratch = threading.local()
_LEAST_TAP = 1e-5  # of a blur; what is left out changes no pixel by more than 0.01 grey levels


def jitter(images: Sequence[np.ndarray], changes: Sequence[Sequence[tuple[str, float]]]) -> list[np.ndarray]:
    """Brightness, contrast, saturation and hue, one after the other, in as few passes over an image as give the same.

    The first three, where they follow each other, are one linear map of the colours, unless a value between them has to
    be cut off at 0 or 255; only then, and at a hue, the image is computed. Hues of all images are turned together.

    Args:
        images: RGB, of one size.
        changes: Of each image, names and amounts. Brightness, contrast and saturation blend the image with black, its
            mean grey, and its grayscale: at 0 nothing but that is left, at 1 nothing changes. Hue, at most once, is
            turned by a share of the full circle within ± 0.5.
    """
    hue_at = [next((at for at, (name, _) in enumerate(each) if name == "hue"), None) for each in changes]
    first = [_mapped(image, each[:at]) for image, each, at in zip(images, changes, hue_at, strict=True)]
    turning = [index for index, at in enumerate(hue_at) if at is not None]
    turned = turn_hues([first[index] for index in turning], [changes[index][hue_at[index]][1] for index in turning])
    for index, image in zip(turning, turned, strict=True):
        first[index] = _mapped(image, changes[index][hue_at[index] + 1 :])
    return first


def _mapped(image: np.ndarray, changes: Sequence[tuple[str, float]]) -> np.ndarray:
    """Brightness, contrast and saturation: c becomes gain·c + gray_gain·luma(c) + offset in all three channels."""
    gain, gray_gain, offset = 1.0, 0.0, 0.0
    for number, (name, amount) in enumerate(changes):
        if number and _may_cut_off(image, gain, gray_gain, offset):
            image, gain, gray_gain, offset = _linear(image, gain, gray_gain, offset), 1.0, 0.0, 0.0
        if name == "saturation":
            gray_gain += (1 - amount) * gain  # as luma(gain·c + gray_gain·luma(c)) = (gain + gray_gain)·luma(c)
            gain *= amount
            continue
        mean = math.floor((gain + gray_gain) * _mean_luma(image) + offset + 0.5) if name == "contrast" else 0
        gain, gray_gain, offset = gain * amount, gray_gain * amount, offset * amount + (1 - amount) * mean
    return image if (gain, gray_gain, offset) == (1, 0, 0) else _linear(image, gain, gray_gain, offset)


def _mean_luma(image: np.ndarray) -> float:
    red, green, blue, _ = cv2.mean(image)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def _may_cut_off(image: np.ndarray, gain: float, gray_gain: float, offset: float) -> bool:
    """Whether a mapped value may be outside 0 … 255, judged by the darkest and the brightest value there are."""
    darkest, brightest, _, _ = cv2.minMaxLoc(image.reshape(len(image), -1))
    lowest = gain * darkest + offset + gray_gain * (darkest if gray_gain > 0 else brightest)
    highest = gain * brightest + offset + gray_gain * (brightest if gray_gain > 0 else darkest)
    return lowest < -0.5 or highest >= 255.5


def _linear(image: np.ndarray, gain: float, gray_gain: float, offset: float) -> np.ndarray:
    red, green, blue = (gray_gain * weight for weight in LUMA)
    matrix = [[red + gain, green, blue, offset], [red, green + gain, blue, offset], [red, green, blue + gain, offset]]
    return cv2.transform(image, np.array(matrix))


def turn_hues(images: Sequence[np.ndarray], shifts: Sequence[float]) -> list[np.ndarray]:
    """Turns the hue of each image by its share of a full circle (within ± 0.5), at unchanged HSV saturation and value.

    Args:
        images: RGB, of one size.
        shifts: One for each.
    """
    if not images:
        return []
    height, width = images[0].shape[:2]
    at_once = max(1, _PIXELS_AT_ONCE // (height * width))
    turned: list[np.ndarray] = []
    for start in range(0, len(images), at_once):
        turned += _turn_hues(images[start : start + at_once], shifts[start : start + at_once])
    return turned


def _turn_hues(images: Sequence[np.ndarray], shifts: Sequence[float]) -> list[np.ndarray]:
    """Without a way to HSV and back, and exact.

    In the hexagon of hues with corners at the pure and the mixed colours, a turn by d sixths, 0 ≤ d ≤ 1, adds b - g to
    red where that exceeds t = (1 - d)·(max - min), less t; takes g - b away where that does, less t; and stops at the
    smallest and the largest channel. So for green and blue with the channels shifted round. Turning backwards exchanges
    b and g; two sixths exchange all channels. In bytes that stop at 0 and 255 (`cv2.add`, `cv2.subtract`) these are 27
    operations on planes: with several small images in one plane, less than half the time of the two conversions.
    """
    height, width = images[0].shape[:2]
    planes = list(_scratch_planes(12, len(images) * height, width))
    channels, (largest, smallest, slack), raised, results = planes[:3], planes[3:6], planes[6:9], planes[9:]
    parts = [slice(index * height, (index + 1) * height) for index in range(len(images))]
    sixths = [6 * shift - 2 * round(3 * shift) for shift in shifts]
    for image, part, turn in zip(images, parts, sixths, strict=True):
        cv2.split(image, [plane[part] for plane in (channels if turn >= 0 else channels[::-1])])
    cv2.max(cv2.max(channels[0], channels[1], largest), channels[2], largest)
    cv2.min(cv2.min(channels[0], channels[1], smallest), channels[2], smallest)
    cv2.subtract(largest, smallest, slack)
    for part, turn in zip(parts, sixths, strict=True):
        cv2.convertScaleAbs(slack[part], slack[part], 1 - abs(turn))
    for channel, more in zip(channels, raised, strict=True):
        cv2.add(channel, slack, more)
    for index, result in enumerate(results):
        after, before = (index + 1) % 3, (index + 2) % 3
        cv2.subtract(channels[before], raised[after], result)
        cv2.min(cv2.add(result, channels[index], result), largest, result)
        cv2.subtract(channels[after], raised[before], slack)
        cv2.max(cv2.subtract(result, slack, result), smallest, result)
    turned = []
    for part, turn, shift in zip(parts, sixths, shifts, strict=True):
        ordered = results if turn >= 0 else results[::-1]
        turned.append(cv2.merge([ordered[(channel - round(3 * shift)) % 3][part] for channel in range(3)]))
    return turned


def _scratch_planes(count: int, height: int, width: int) -> np.ndarray:
    """Memory that this thread uses again and again; (count, height, width) bytes."""
    needed = count * height * width
    if getattr(_scratch, "memory", _NOTHING).size < needed:
        _scratch.memory = np.empty(needed, np.uint8)
    return _scratch.memory[:needed].reshape(count, height, width)


def luma(image: np.ndarray) -> np.ndarray:
    """The grayscale image, (h, w)."""
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


def coarser(image: np.ndarray, factor: float) -> np.ndarray:
    """As if scanned at so many times the micrometres a pixel: averaged over areas, and enlarged again (bicubic)."""
    height, width = image.shape[:2]
    small = (max(1, round(width / factor)), max(1, round(height / factor)))
    shrunk = cv2.resize(image, small, interpolation=cv2.INTER_AREA)
    return cv2.resize(shrunk, (width, height), interpolation=cv2.INTER_CUBIC)


def gaussian_blur(image: np.ndarray, sigma_px: float, kernel_px: int) -> np.ndarray:
    """Gaussian of `kernel_px` taps, mirrored at the borders without repeating the edge pixel; also of gray (h, w)."""
    kernel = cv2.getGaussianKernel(kernel_px, sigma_px, cv2.CV_32F)
    unused = int(np.argmax(kernel > _LEAST_TAP))
    kernel = kernel[unused : kernel_px - unused]
    # half the time of cv2.GaussianBlur on uint8, and correctly rounded
    return cv2.sepFilter2D(image, -1, kernel, kernel)


def solarize(image: np.ndarray, threshold: int) -> np.ndarray:
    """Inverts every value at or above `threshold`; also of gray (h, w)."""
    values = np.arange(256)
    return cv2.LUT(image, np.where(values < threshold, values, 255 - values).astype(np.uint8))


def shift_stains(image: np.ndarray, gains_hed: Sequence[float], shifts_hed: Sequence[float]) -> np.ndarray:
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
    matrix = np.column_stack([mix.T, offset])
    shifted, rows = np.empty_like(image), max(1, _STRIP_PIXELS // image.shape[1])
    for top in range(0, len(image), rows):
        log_rgb = cv2.transform(cv2.LUT(image[top : top + rows], _LOG_TRANSMISSION), matrix)
        cv2.convertScaleAbs(cv2.exp(log_rgb, log_rgb), shifted[top : top + rows])
    return shifted
