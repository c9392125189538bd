"""Snow, frost, fog and spatters on images: float32 RGB (H, W, 3) in 0 … 1, numbers as in corruptions.py."""

import math

import cv2
import numpy as np

from dinoscope.segment.corruption_blurs import gaussian, moved

__all__ = ["fog", "frost", "ice", "plasma", "snow", "spatter"]

_WATER = np.array([175, 238, 238], np.float32) / 255
_MUD = np.array([63, 42, 20], np.float32) / 255
# Mean red, green, blue and spread of brightness of the photographs of ice that the benchmark lays on images
_ICES = (
    ((78, 149, 166), 18),
    ((201, 205, 214), 22),
    ((201, 205, 214), 22),
    ((138, 153, 165), 29),
    ((112, 123, 135), 43),
)
_PIXELS_PER_CRYSTAL = 260
_LIGHTS = 12  # brightnesses of needles


def snow(image: np.ndarray, numbers: tuple[float, ...], rng: np.random.Generator) -> np.ndarray:
    """A whitened image with flakes that fall, twice, the second time upside down."""
    mean, spread, enlargement, least, radius, sigma, share = numbers
    height, width = image.shape[:2]
    small = [math.ceil(side / enlargement) for side in (height, width)]
    # corners stay corners, as in the benchmark: no pixel of the noise is met twice as often as another
    steps = [(side - 1) / max(round(side * enlargement) - 1, 1) for side in small]
    noise = rng.normal(mean, spread, small).astype(np.float32)
    back, flags = np.diag([steps[1], steps[0], 1])[:2], cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    flakes = cv2.warpAffine(noise, back, (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE)
    flakes = np.clip(np.where(flakes < least, 0, flakes), 0, 1)
    fallen = moved(flakes, int(radius), sigma, rng.uniform(-135, -45))
    whitened = np.maximum(image, cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None] * 1.5 + 0.5)
    return share * image + (1 - share) * whitened + (fallen + np.rot90(fallen, 2))[..., None]


def fog(image: np.ndarray, numbers: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """Clouds added, and all made darker so that the brightest stays what it was."""
    amount, decay = numbers
    height, width = image.shape[:2]
    brightest = float(image.max())
    clouds = plasma(max(height, width), decay**2, rng)[:height, :width, None]
    return (image + amount * clouds) * (brightest / (brightest + amount))


def frost(image: np.ndarray, shares: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """An image seen through ice, which `ice` draws."""
    of_image, of_ice = shares
    return of_image * image + of_ice * ice(image.shape[0], image.shape[1], rng)


def spatter(image: np.ndarray, numbers: tuple[float, ...], rng: np.random.Generator) -> np.ndarray:
    """Drops of water or of mud on the lens."""
    mean, spread, sigma, least, strength, mud = numbers
    liquid = gaussian(rng.normal(mean, spread, image.shape[:2]).astype(np.float32), sigma)
    liquid[liquid < least] = 0
    if mud:
        cover = gaussian((liquid > least).astype(np.float32), strength)
        cover[cover < 0.8] = 0
        return image * (1 - cover[..., None]) + _MUD * cover[..., None]
    depth = _relief(liquid)
    return image + np.clip(depth / max(float(depth.max()), 1e-6) * strength, 0, 1)[..., None] * _WATER


def plasma(side: int, decay: float, rng: np.random.Generator) -> np.ndarray:
    """Clouds by diamonds and squares (Fournier et al. 1982) on a torus: float32 in 0 … 1, a power of two ≥ `side` wide.

    Args:
        side: Pixels wanted.
        decay: How much weaker each structure of half the size is.
        rng: Source of the draws.
    """
    size = 2 ** max(1, (side - 1).bit_length())
    heights, step, strength = np.zeros((size, size), np.float64), size, 1.0
    while step >= 2:
        half = step // 2
        corners = heights[::step, ::step]
        pairs = corners + np.roll(corners, -1, axis=0)
        middles = (pairs + np.roll(pairs, -1, axis=1)) / 4
        heights[half::step, half::step] = middles + rng.uniform(-strength, strength, middles.shape)
        centres = heights[half::step, half::step]
        across = (corners + np.roll(corners, -1, axis=1) + centres + np.roll(centres, 1, axis=0)) / 4
        heights[::step, half::step] = across + rng.uniform(-strength, strength, across.shape)
        down = (corners + np.roll(corners, -1, axis=0) + centres + np.roll(centres, 1, axis=1)) / 4
        heights[half::step, ::step] = down + rng.uniform(-strength, strength, down.shape)
        step, strength = half, strength / decay
    heights -= heights.min()
    return (heights / max(float(heights.max()), 1e-9)).astype(np.float32)


def ice(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Drawn ice, float32 (height, width, 3) in 0 … 1: feathered needles that grow from points, in a haze.

    It has the mean colour and the spread of brightness of one of the five photographs of the benchmark, and structures
    of about their sizes in pixels; it is no copy of any.
    """
    colour, spread = _ICES[rng.integers(len(_ICES))]
    needles = np.full((height, width), 90, np.uint8)
    segments = _needles(height, width, rng)
    lights = rng.integers(0, _LIGHTS, len(segments))
    for light in range(_LIGHTS):
        grey = int(30 + 225 * light / (_LIGHTS - 1))
        drawn = np.rint(segments[lights == light] * 16).astype(np.int32)
        cv2.polylines(needles, list(drawn), False, grey, 1, cv2.LINE_AA, 4)
    layer = gaussian(needles.astype(np.float32), 0.6)
    haze = plasma(max(height, width), 1.8, rng)[:height, :width]
    grain = rng.standard_normal((height, width), np.float32)
    parts = ((layer, 0.7), (gaussian(layer, 3), 0.15), (haze, 0.8), (grain, 0.35))
    brightness = sum(weight * _standardised(part) for part, weight in parts)
    picture = np.array(colour, np.float32) + spread * _standardised(brightness)[..., None]
    return np.clip(picture / 255, 0, 1).astype(np.float32)


def _needles(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Ends (x, y) of straight pieces of ice, float64 (pieces, 2, 2): needles from points, and barbs along them."""
    crystals = max(1, round(height * width / _PIXELS_PER_CRYSTAL))
    roots = rng.uniform(-8, 1, (crystals, 2)) + rng.random((crystals, 2)) * (width + 8, height + 8)
    counts = rng.integers(3, 7, crystals)
    starts = np.repeat(roots, counts, axis=0)
    angles = np.repeat(rng.uniform(0, 2 * np.pi, crystals), counts) + rng.normal(0, 0.9, len(starts))
    lengths = np.exp(rng.normal(2.8, 0.6, len(starts)))  # 16 pixels in the middle
    main = np.stack([starts, starts + lengths[:, None] * _direction(angles)], axis=1)
    barbs = 8
    along = np.tile((np.arange(barbs) + 0.5) / barbs, len(starts))
    which, side = np.repeat(np.arange(len(starts)), barbs), rng.choice([-1, 1], len(starts) * barbs)
    roots_of_barbs = main[which, 0] + along[:, None] * (main[which, 1] - main[which, 0])
    reach = 0.35 * lengths[which] * (1 - along) * rng.uniform(0.4, 1, len(which))
    ends = roots_of_barbs + reach[:, None] * _direction(angles[which] + side * np.pi / 3)
    return np.concatenate([main, np.stack([roots_of_barbs, ends], axis=1)])


def _direction(angles: np.ndarray) -> np.ndarray:
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _standardised(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / max(float(values.std()), 1e-6)


def _relief(liquid: np.ndarray) -> np.ndarray:
    """How bright drops of water are: by their amount and by how near a rim is, lit from one side."""
    amount = np.floor(np.clip(liquid, 0, 1) * 255).astype(np.uint8)
    rims = 255 - cv2.Canny(amount, 50, 150)
    distance = np.minimum(cv2.distanceTransform(rims, cv2.DIST_L2, 5), 20)
    even = cv2.equalizeHist(cv2.blur(distance, (3, 3)).astype(np.uint8))
    light = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])
    return amount * cv2.blur(cv2.filter2D(even, cv2.CV_8U, light), (3, 3)).astype(np.float32)
