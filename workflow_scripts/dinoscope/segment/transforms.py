"""Views of an image and its mask, in register: what a model is trained on.

    image, mask = training_view(image, mask, (224, 224), view_rng(seed, index, epoch), VIEWS["pathology"])

A view is a box cut out of the image and of the mask alike, resized, flipped and turned. The image is resampled
(bicubic, low-pass filtered when it shrinks); each pixel of the mask takes the class at its own centre. Where the box
reaches beyond the image, the mask is 255, which nothing is learned from. Colours change in the image alone.
"""

import math
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from PIL import Image

from dinoscope.data import color
from dinoscope.errors import ConfigError
from dinoscope.segment.metrics import IGNORED
from dinoscope.segment.settings import multiples_in_words

__all__ = ["VIEWS", "ViewSettings", "check_img_dim", "training_view", "view_rng"]

_SCALES_OF = ("pixels", "image")
_DRAWS = 22  # of a view, whatever is switched on: changing one setting changes no other draw


@dataclass(frozen=True)
class ViewSettings:
    """How training views are drawn.

    Attributes:
        scale: Enlargement of the image, log-uniform between the two.
        scale_of: What scale 1 is: "pixels", the image as it is (a micrometre keeps its size), or "image", the largest
            view of the wanted shape in the image fills the view (photographs of any size).
        horizontal_flips: Mirror left-right with probability 0.5.
        vertical_flips: Mirror top-bottom with probability 0.5.
        rotations_90: Turn by 0, 90, 180 or 270 degrees, each equally likely.
        hed_p: Probability of stain jitter (haematoxylin, eosin, DAB).
        hed_sigma: Gain of each stain uniform in 1 ± this, shift uniform in ± this (optical density).
        color_jitter_p: Probability of the colour jitter: the next four in random order.
        brightness: Factor uniform in 1 ± this.
        contrast: Factor uniform in 1 ± this.
        saturation: Factor uniform in 1 ± this.
        hue: Shift uniform in ± this (shares of the colour circle, at most 0.5).
        fill: Red, green and blue of what is beyond the image.
    """

    scale: tuple[float, float] = (0.5, 2.0)
    scale_of: str = "image"
    horizontal_flips: bool = True
    vertical_flips: bool = False
    rotations_90: bool = False
    hed_p: float = 0.0
    hed_sigma: float = 0.05
    color_jitter_p: float = 0.5
    brightness: float = 0.25
    contrast: float = 0.25
    saturation: float = 0.25
    hue: float = 0.05
    fill: tuple[int, int, int] = (124, 116, 104)  # ImageNet's mean

    def __post_init__(self) -> None:
        """Refuses what cannot be meant."""
        low, high = self.scale
        wanted = {
            "scale": (0 < low <= high, "two numbers above 0, the lower one first"),
            "scale_of": (self.scale_of in _SCALES_OF, " or ".join(_SCALES_OF)),
            "hed_p": (0 <= self.hed_p <= 1, "a probability from 0 to 1"),
            "color_jitter_p": (0 <= self.color_jitter_p <= 1, "a probability from 0 to 1"),
            "hue": (0 <= self.hue <= 0.5, "a share from 0 to 0.5"),
            "fill": (all(0 <= value <= 255 for value in self.fill), "three numbers from 0 to 255"),
        }
        for name in ("hed_sigma", "brightness", "contrast", "saturation"):
            wanted[name] = (getattr(self, name) >= 0, "0 or more")
        for name, (right, words) in wanted.items():
            if not right:
                raise ConfigError(f"augmentation.{name} is {getattr(self, name)!r}; {words} is wanted")


VIEWS = MappingProxyType(
    {
        "photographs": ViewSettings(),
        "pathology": ViewSettings(
            scale=(0.8, 1.25),
            scale_of="pixels",
            vertical_flips=True,
            rotations_90=True,
            hed_p=0.5,
            brightness=0.2,
            contrast=0.2,
            saturation=0.1,
            hue=0.03,
        ),
    }
)


def check_img_dim(height: int, width: int, patch: int) -> None:
    """Checks that a view is made of whole patches.

    Raises:
        ConfigError: A side is no multiple of the patch; names the nearest ones.
    """
    wrong = [
        f"{name} {side}: take {multiples_in_words(side, patch)}"
        for name, side in (("height", height), ("width", width))
        if side < patch or side % patch
    ]
    if wrong:
        raise ConfigError(
            f"img_dim {height} {width} (height width) must be multiples of the encoder's patch of {patch} pixels; "
            + ", ".join(wrong)
        )


def view_rng(seed: int, index: int, epoch: int) -> np.random.Generator:
    """The random stream of image `index` in `epoch`: depends on the three numbers alone."""
    return np.random.default_rng([seed % 2**64, index, epoch])


def training_view(
    image: np.ndarray, mask: np.ndarray, size_hw: tuple[int, int], rng: np.random.Generator, settings: ViewSettings
) -> tuple[np.ndarray, np.ndarray]:
    """A random view for training.

    Args:
        image: uint8 (H, W, 3), left unchanged.
        mask: uint8 (H, W), left unchanged.
        size_hw: Height and width of the view.
        rng: Source of all draws, see `view_rng`.
        settings: What is drawn.

    Returns:
        uint8 (h, w, 3) and (h, w) of the wanted size.
    """
    draws = rng.random(_DRAWS)
    turns = int(4 * draws[5]) if settings.rotations_90 else 0
    cut_hw = size_hw[::-1] if turns % 2 else size_hw
    box = _box(image.shape[:2], cut_hw, settings, draws)
    image, mask = _cut(image, mask, box, cut_hw, settings.fill)
    if settings.horizontal_flips and draws[3] < 0.5:
        image, mask = image[:, ::-1], mask[:, ::-1]
    if settings.vertical_flips and draws[4] < 0.5:
        image, mask = image[::-1], mask[::-1]
    image, mask = (np.ascontiguousarray(np.rot90(each, turns)) for each in (image, mask))
    return _recoloured(image, settings, draws[6:]), mask


def _box(
    image_hw: tuple[int, int], view_hw: tuple[int, int], settings: ViewSettings, draws: np.ndarray
) -> tuple[int, int, int, int]:
    """Top, left, height and width of what is cut, in pixels of the image; may reach beyond it on each side."""
    low, high = (math.log(bound) for bound in settings.scale)
    scale = math.exp(low + (high - low) * draws[0])
    if settings.scale_of == "image":
        scale *= max(view / side for view, side in zip(view_hw, image_hw, strict=True))
    box_hw = [max(1, round(view / scale)) for view in view_hw]
    # where the box is the larger of the two, the image is somewhere inside of it
    starts = [
        math.floor(draw * (abs(side - box) + 1)) * (1 if box <= side else -1)
        for draw, side, box in zip(draws[1:3], image_hw, box_hw, strict=True)
    ]
    return starts[0], starts[1], box_hw[0], box_hw[1]


def _cut(
    image: np.ndarray,
    mask: np.ndarray,
    box: tuple[int, int, int, int],
    size_hw: tuple[int, int],
    fill: tuple[int, int, int],
) -> tuple[np.ndarray, np.ndarray]:
    top, left, height, width = box
    rows, columns = (
        _centres(start, length, count)
        for start, length, count in zip((top, left), (height, width), size_hw, strict=True)
    )
    inside = ((rows >= 0) & (rows < mask.shape[0]))[:, None] & ((columns >= 0) & (columns < mask.shape[1]))
    classes = mask[np.clip(rows, 0, mask.shape[0] - 1)][:, np.clip(columns, 0, mask.shape[1] - 1)]
    part = _part(image, box, fill)
    if part.shape[:2] != size_hw:
        part = np.asarray(Image.fromarray(part).resize(size_hw[::-1], Image.Resampling.BICUBIC))
    return part, np.where(inside, classes, np.uint8(IGNORED))


def _centres(start: int, length: int, count: int) -> np.ndarray:
    """The pixel of the image that the centre of each of `count` pixels lies in, which share `length` pixels."""
    return start + (2 * np.arange(count) + 1) * length // (2 * count)


def _part(image: np.ndarray, box: tuple[int, int, int, int], fill: tuple[int, int, int]) -> np.ndarray:
    top, left, height, width = box
    bottom, right = min(top + height, image.shape[0]), min(left + width, image.shape[1])
    inner = image[max(top, 0) : bottom, max(left, 0) : right]
    if inner.shape[:2] == (height, width):
        return np.ascontiguousarray(inner)
    part = np.full((height, width, 3), fill, np.uint8)
    down, across = max(-top, 0), max(-left, 0)
    part[down : down + inner.shape[0], across : across + inner.shape[1]] = inner
    return part


def _recoloured(image: np.ndarray, settings: ViewSettings, draws: np.ndarray) -> np.ndarray:
    if draws[0] < settings.hed_p:
        deviations = settings.hed_sigma * (2 * draws[1:7] - 1)
        image = color.shift_stains(image, 1 + deviations[:3], deviations[3:])
    spreads = {name: getattr(settings, name) for name in color.JITTERS}
    if draws[7] >= settings.color_jitter_p or not any(spreads.values()):
        return image
    changes = []
    for number in np.argsort(draws[8:12]):  # any order is as likely as another
        name, spread = color.JITTERS[number], spreads[color.JITTERS[number]]
        deviation = spread * (2 * draws[12 + number] - 1)
        if spread:
            changes.append((name, deviation if name == "hue" else max(1 + deviation, 0.0)))
    return color.jitter([image], [changes])[0]
