"""Multi-crop augmentation: two global and several local views of one window, uint8 in and out, on numpy and OpenCV.

    crops = make_crops(window, CropSizes(), AUGMENTATIONS["pathology"], sample_rng(seed, sample_index))

Callers that run several worker processes should call `cv2.setNumThreads(0)` in each of them.
"""

import dataclasses
import functools
import math
from types import MappingProxyType

import cv2
import numpy as np

from dinoscope.data import color

__all__ = [
    "AUGMENTATIONS",
    "Augmentation",
    "CropSizes",
    "Crops",
    "contact_sheet",
    "for_stain",
    "make_crops",
    "resize",
    "sample_rng",
]

CROP_TRIES = 10


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Every number of the recipe; the defaults are DINOv3's, as its published trainer really ran (blur!).

    Attributes:
        aspect_ratio: Width / height of a crop before resizing, log-uniform between the two.
        horizontal_flips: Mirror left-right with probability 0.5.
        vertical_flips: Mirror top-bottom with probability 0.5.
        rotations_90: Turn by 0, 90, 180 or 270 degrees, each equally likely.
        hed_p: Probability of stain jitter (haematoxylin, eosin, DAB), before all other changes of colour.
        hed_sigma: Gain of each stain uniform in 1 ± this, shift uniform in ± this (optical density).
        color_jitter_p: Probability of the colour jitter: the next four in random order.
        brightness: Factor uniform in 1 ± this.
        contrast: Factor uniform in 1 ± this.
        saturation: Factor uniform in 1 ± this.
        hue: Shift uniform in ± this (shares of the colour circle, at most 0.5).
        grayscale_p: Probability of grayscale.
        blur_p: Probability of Gaussian blur for the first global, the second global, and the local crops.
        blur_sigma: Standard deviation in pixels of the output crop, uniform between the two.
        blur_kernel_px: Taps of the blur, odd.
        solarize_p: Probability of solarizing the second global crop.
        solarize_threshold: Grey values from here on are inverted.
        by_stain: `for_stain` spares what the colour of a stain tells.
    """

    aspect_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    horizontal_flips: bool = True
    vertical_flips: bool = False
    rotations_90: bool = False
    hed_p: float = 0.0
    hed_sigma: float = 0.05
    color_jitter_p: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grayscale_p: float = 0.2
    blur_p: tuple[float, float, float] = (0.0, 0.9, 0.5)
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    blur_kernel_px: int = 9
    solarize_p: float = 0.2
    solarize_threshold: int = 128
    by_stain: bool = False


AUGMENTATIONS = MappingProxyType(
    {
        "dinov3": Augmentation(),
        "pathology": Augmentation(
            vertical_flips=True,
            rotations_90=True,
            hed_p=0.5,
            brightness=0.2,
            contrast=0.2,
            saturation=0.1,
            hue=0.05,
            grayscale_p=0.1,
            blur_p=(0.5, 0.1, 0.2),
            solarize_p=0.0,
            by_stain=True,
        ),
    }
)


@dataclasses.dataclass(frozen=True)
class CropSizes:
    """Sizes of the crops in pixels, and the shares of the window's area they are cut from.

    Attributes:
        global_px: Edge of the two global crops.
        local_px: Edge of the local crops.
        num_local: Number of local crops.
        gram_px: Edge of the gram teacher's crops, None without a gram teacher.
        global_scale: Smallest and largest share of the window for a global crop, uniform between.
        local_scale: The same for local crops.
        gram_no_distortions: Gram crops keep the window's colours and sharpness; else they get the global crop's.
    """

    global_px: int = 224
    local_px: int = 96
    num_local: int = 8
    gram_px: int | None = None
    global_scale: tuple[float, float] = (0.32, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.32)
    gram_no_distortions: bool = False


@dataclasses.dataclass(frozen=True)
class Crops:
    """All views of one window, uint8 RGB: (2, S, S, 3), (N, s, s, 3) and, with a gram teacher, (2, G, G, 3)."""

    global_crops: np.ndarray
    local_crops: np.ndarray
    gram_crops: np.ndarray | None


def for_stain(augmentation: Augmentation, stain: str | None) -> Augmentation:
    """The distortions for slides of one stain, where `by_stain` asks for that; no number is ever raised.

    Colour is the label in IHC (brown for the marker), fluorescence (a colour a channel) and Pap or MGG cytology, where
    strong blur would also erase the chromatin. So there is no stain jitter in any of them, neither hue shift nor
    grayscale in IHC and IF; in Pap and MGG a hue of at most 0.02, grayscale with p ≤ 0.05, blur with p ≤ 0.2 and a
    sigma of at most 1 px.

    Args:
        augmentation: The recipe's.
        stain: As in the slide table: "IHC" or "IHC:marker", "IF", "Pap", "MGG", in any case; others, "HE" among them,
            and None change nothing.
    """
    kind = (stain or "").partition(":")[0].strip().casefold()
    if not augmentation.by_stain:
        return augmentation
    if kind in ("ihc", "if"):
        return dataclasses.replace(augmentation, hed_p=0.0, hue=0.0, grayscale_p=0.0)
    if kind not in ("pap", "mgg"):
        return augmentation
    low_px, high_px = (min(sigma, 1.0) for sigma in augmentation.blur_sigma)
    return dataclasses.replace(
        augmentation,
        hed_p=0.0,
        hue=min(augmentation.hue, 0.02),
        grayscale_p=min(augmentation.grayscale_p, 0.05),
        blur_p=tuple(min(p, 0.2) for p in augmentation.blur_p),
        blur_sigma=(low_px, high_px),
    )


def sample_rng(seed: int, index: int) -> np.random.Generator:
    """The random stream of sample `index`: depends on (seed, index) alone, costs microseconds, Philox with that key."""
    key = np.array([seed % 2**64, index % 2**64], np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def make_crops(image: np.ndarray, sizes: CropSizes, augmentation: Augmentation, rng: np.random.Generator) -> Crops:
    """Cuts and augments all views of one window.

    Each view: random-resized crop, flips and rotation, stain jitter, colour jitter, grayscale, blur, solarize. With
    gram crops, a global view is cut at the larger of both sizes; its gram crop is that view (before distortions when
    `gram_no_distortions`) at the gram size, its global crop the distorted view at the global size.

    Args:
        image: Window (height, width, 3), uint8 RGB; left unchanged.
        sizes: What to cut.
        augmentation: How to change it.
        rng: Source of all random draws, for instance `sample_rng(seed, index)`.
    """
    assert image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8, (image.shape, image.dtype)
    views = [_global_view(image, position, sizes, augmentation, rng) for position in range(2)]
    local_crops = np.empty((sizes.num_local, sizes.local_px, sizes.local_px, 3), np.uint8)
    for crop in local_crops:
        view = _cut(image, sizes.local_px, sizes.local_scale, augmentation, rng)
        crop[:] = _distort(view, augmentation, rng, augmentation.blur_p[2], solarize_p=0)
    return Crops(
        np.stack([global_crop for global_crop, _ in views]),
        local_crops,
        None if sizes.gram_px is None else np.stack([gram_crop for _, gram_crop in views]),
    )


def resize(image: np.ndarray, size_px: int) -> np.ndarray:
    """Bicubic resampling to a square, low-pass filtered when it shrinks (antialiased).

    Pillow's method, which torchvision uses, in two OpenCV steps: the scaled bicubic kernel (a = -0.5) at every input
    pixel, then bicubic interpolation. On H&E windows the result is within about 1 grey level of Pillow's (mean absolute
    difference; 0.5–0.9 when shrinking, 1–1.4 when enlarging) in about a quarter of its time. `INTER_CUBIC` alone
    aliases and is off by 4–11 when it shrinks to a half or a third; `INTER_AREA` is off by 2 and slower.

    Args:
        image: uint8 (height, width, channels); may be returned itself when it has the size already.
        size_px: Edge of the result.
    """
    height, width = image.shape[:2]
    if height == width == size_px:
        return image
    if max(height, width) > size_px:
        image = cv2.sepFilter2D(image, -1, _shrinking_kernel(width, size_px), _shrinking_kernel(height, size_px))
    return cv2.resize(image, (size_px, size_px), interpolation=cv2.INTER_CUBIC)


def contact_sheet(crops: Crops, gap_px: int = 4) -> np.ndarray:
    """All views of one window in one uint8 RGB picture: a row of global and gram crops, rows of local crops below."""
    large = [*crops.global_crops, *(() if crops.gram_crops is None else crops.gram_crops)]
    width = sum(crop.shape[1] + gap_px for crop in large) + gap_px
    local_px = crops.local_crops.shape[1]
    per_row = max(1, (width - gap_px) // (local_px + gap_px))
    rows = [large, *(crops.local_crops[i : i + per_row] for i in range(0, len(crops.local_crops), per_row))]
    width = max(width, local_px + 2 * gap_px)
    sheet = np.full((sum(max(map(len, row)) + gap_px for row in rows) + gap_px, width, 3), 255, np.uint8)
    top = gap_px
    for row in rows:
        left = gap_px
        for crop in row:
            sheet[top : top + crop.shape[0], left : left + crop.shape[1]] = crop
            left += crop.shape[1] + gap_px
        top += max(map(len, row)) + gap_px
    return sheet


def _global_view(
    image: np.ndarray, position: int, sizes: CropSizes, augmentation: Augmentation, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray | None]:
    """The global crop and, with a gram teacher, its gram crop."""
    view = _cut(image, max(sizes.global_px, sizes.gram_px or 0), sizes.global_scale, augmentation, rng)
    solarize_p = augmentation.solarize_p if position == 1 else 0
    distorted = _distort(view, augmentation, rng, augmentation.blur_p[position], solarize_p)
    global_crop = resize(distorted, sizes.global_px)
    if sizes.gram_px is None:
        return global_crop, None
    return global_crop, resize(view if sizes.gram_no_distortions else distorted, sizes.gram_px)


def _cut(
    image: np.ndarray, size_px: int, scale: tuple[float, float], augmentation: Augmentation, rng: np.random.Generator
) -> np.ndarray:
    top, left, height, width = _crop_box(image.shape[:2], scale, augmentation.aspect_ratio, rng)
    view = resize(image[top : top + height, left : left + width], size_px)
    if augmentation.horizontal_flips and rng.random() < 0.5:
        view = cv2.flip(view, 1)
    if augmentation.vertical_flips and rng.random() < 0.5:
        view = cv2.flip(view, 0)
    quarter_turns = int(rng.integers(4)) if augmentation.rotations_90 else 0
    if quarter_turns:
        view = cv2.rotate(view, quarter_turns - 1)  # cv2.ROTATE_90_CLOCKWISE, _180, _90_COUNTERCLOCKWISE are 0, 1, 2
    return view


def _crop_box(
    image_hw: tuple[int, int], scale: tuple[float, float], aspect_ratio: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random crop: a share of the area, uniform in `scale`, and a log-uniform aspect.

    Draws again up to 10 times when the crop leaves the image; then takes the largest central crop of an allowed aspect.
    """
    image_height, image_width = image_hw
    for _ in range(CROP_TRIES):
        area = image_height * image_width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(aspect_ratio[0]), math.log(aspect_ratio[1])))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= image_width and 0 < height <= image_height:
            top, left = rng.integers(image_height - height + 1), rng.integers(image_width - width + 1)
            return int(top), int(left), height, width
    aspect = min(max(image_width / image_height, aspect_ratio[0]), aspect_ratio[1])
    width, height = min(image_width, round(image_height * aspect)), min(image_height, round(image_width / aspect))
    return (image_height - height) // 2, (image_width - width) // 2, height, width


def _distort(
    view: np.ndarray, augmentation: Augmentation, rng: np.random.Generator, blur_p: float, solarize_p: float
) -> np.ndarray:
    if rng.random() < augmentation.hed_p:
        sigma = augmentation.hed_sigma
        view = color.shift_stains(view, rng.uniform(1 - sigma, 1 + sigma, 3), rng.uniform(-sigma, sigma, 3))
    if rng.random() < augmentation.color_jitter_p:
        view = _jitter(view, augmentation, rng)
    if rng.random() < augmentation.grayscale_p:
        view = color.grayscale(view)
    if rng.random() < blur_p:
        view = color.gaussian_blur(view, rng.uniform(*augmentation.blur_sigma), augmentation.blur_kernel_px)
    if rng.random() < solarize_p:
        view = color.solarize(view, augmentation.solarize_threshold)
    return view


def _jitter(view: np.ndarray, augmentation: Augmentation, rng: np.random.Generator) -> np.ndarray:
    changes = (
        (color.adjust_brightness, 1, augmentation.brightness),
        (color.adjust_contrast, 1, augmentation.contrast),
        (color.adjust_saturation, 1, augmentation.saturation),
        (color.adjust_hue, 0, augmentation.hue),
    )
    for index in rng.permutation(4):
        change, neutral, spread = changes[index]
        if spread:
            lowest = max(neutral - spread, 0) if neutral else -spread  # a factor is never negative
            view = change(view, rng.uniform(lowest, neutral + spread))
    return view


@functools.lru_cache(maxsize=4096)
def _shrinking_kernel(length: int, size_px: int) -> np.ndarray:
    """The bicubic kernel (a = -0.5), widened by the shrinking factor and sampled at whole input pixels."""
    factor = max(length / size_px, 1)
    reach = math.ceil(2 * factor) - 1
    x = np.abs(np.arange(-reach, reach + 1) / factor)
    kernel = np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2)
    return (kernel / kernel.sum()).astype(np.float32)
