"""What is drawn at random for each crop: where it is cut, how it is turned, how it is distorted.

Every view takes the same number of uniform draws, and every decision has draws of its own. So changing the probability
or the strength of one distortion changes no other decision.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dinoscope.data.color import JITTERS

if TYPE_CHECKING:
    from dinoscope.data.crops import Augmentation

__all__ = ["View", "draw_views"]

_TRIES = 10
# Of a view: 0–9 areas and 10–19 aspects of as many tries, 20–21 place, 22–24 flips and turn, 25–31 stains, 32 whether,
# 33–36 in which order and 37–40 how much colours change, 41 gray, 42–43 blur and its sigma, 44 solarize.
_DRAWS = 45
_HUE = JITTERS.index("hue")


class View(NamedTuple):
    """What is drawn for one crop.

    Attributes:
        top: Of the box that is cut out, in pixels of the window.
        left: See `top`.
        height: See `top`.
        width: See `top`.
        transposed: Rows and columns are exchanged, before the next two.
        upside_down: Mirrored top-bottom.
        mirrored: Mirrored left-right.
        stains: Gains of haematoxylin, eosin and DAB, and their shifts (optical density); None without stain jitter.
        jitter: Changes of colour in their order, see `color.jitter`.
        gray: Made gray.
        blur_sigma: Of the Gaussian blur, in pixels of the crop; None without.
        solarized: Bright values are inverted.
    """

    top: int
    left: int
    height: int
    width: int
    transposed: bool
    upside_down: bool
    mirrored: bool
    stains: tuple[list[float], list[float]] | None
    jitter: list[tuple[str, float]]
    gray: bool
    blur_sigma: float | None
    solarized: bool


def draw_views(
    image_hw: tuple[int, int],
    kinds: Sequence[tuple[tuple[float, float], float, float]],
    augmentation: "Augmentation",
    rng: np.random.Generator,
) -> list[View]:
    """One view for each of `kinds`.

    Args:
        image_hw: Height and width of the window.
        kinds: Smallest and largest share of the window's area, probability of blur, probability of solarizing.
        augmentation: All other settings.
        rng: Source of the draws.
    """
    table = rng.random((len(kinds), _DRAWS)).tolist()
    return [_view(image_hw, *kind, augmentation, draws) for kind, draws in zip(kinds, table, strict=True)]


def _view(
    image_hw: tuple[int, int],
    scale: tuple[float, float],
    blur_p: float,
    solarize_p: float,
    augmentation: "Augmentation",
    draws: list[float],
) -> View:
    """Takes each decision from the draws at its places, see `_DRAWS`."""
    sigma_low, sigma_high = augmentation.blur_sigma
    return View(
        *_box(image_hw, scale, augmentation.aspect_ratio, draws),
        *_orientation(augmentation, *draws[22:25]),
        _stains(augmentation.hed_sigma, draws[26:32]) if draws[25] < augmentation.hed_p else None,
        _jitter(augmentation, draws[33:37], draws[37:41]) if draws[32] < augmentation.color_jitter_p else [],
        draws[41] < augmentation.grayscale_p,
        sigma_low + (sigma_high - sigma_low) * draws[43] if draws[42] < blur_p else None,
        draws[44] < solarize_p,
    )


def _box(
    image_hw: tuple[int, int], scale: tuple[float, float], aspect_ratio: tuple[float, float], draws: list[float]
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random crop: a share of the area, uniform in `scale`, and a log-uniform aspect.

    Draws again up to 10 times when the crop leaves the image; then takes the largest central crop of an allowed aspect.
    """
    image_height, image_width = image_hw
    image_area, (smallest, largest) = image_height * image_width, scale
    narrowest, widest = math.log(aspect_ratio[0]), math.log(aspect_ratio[1])
    for attempt in range(_TRIES):
        area = image_area * (smallest + (largest - smallest) * draws[attempt])
        aspect = math.exp(narrowest + (widest - narrowest) * draws[_TRIES + attempt])
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= image_width and 0 < height <= image_height:
            top = int(draws[20] * (image_height - height + 1))
            return top, int(draws[21] * (image_width - width + 1)), height, width
    aspect = min(max(image_width / image_height, aspect_ratio[0]), aspect_ratio[1])
    width, height = min(image_width, round(image_height * aspect)), min(image_height, round(image_width / aspect))
    return (image_height - height) // 2, (image_width - width) // 2, height, width


def _orientation(augmentation: "Augmentation", flip: float, flop: float, turn: float) -> tuple[bool, bool, bool]:
    """Transposed, upside down, mirrored: flips left-right and top-bottom and quarter turns clockwise, all as one."""
    mirrored = augmentation.horizontal_flips and flip < 0.5
    upside_down = augmentation.vertical_flips and flop < 0.5
    turns = int(4 * turn) if augmentation.rotations_90 else 0
    if turns >= 2:
        mirrored, upside_down = not mirrored, not upside_down
    if turns % 2:  # rows and columns are exchanged, and then left and right
        return True, mirrored, not upside_down
    return False, upside_down, mirrored


def _stains(sigma: float, draws: list[float]) -> tuple[list[float], list[float]]:
    deviations = [sigma * (2 * draw - 1) for draw in draws]
    return [1 + deviation for deviation in deviations[:3]], deviations[3:]


def _jitter(augmentation: "Augmentation", keys: list[float], draws: list[float]) -> list[tuple[str, float]]:
    """Changes in the order of their keys, which is any order equally likely; what has no spread is left out."""
    spreads = (augmentation.brightness, augmentation.contrast, augmentation.saturation, augmentation.hue)
    changes = []
    for index in sorted(range(4), key=keys.__getitem__):
        spread, draw = spreads[index], draws[index]
        if not spread:
            continue
        if index == _HUE:
            changes.append((JITTERS[index], spread * (2 * draw - 1)))
        else:
            lowest = max(1 - spread, 0.0)  # a factor is never negative
            changes.append((JITTERS[index], lowest + (1 + spread - lowest) * draw))
    return changes
