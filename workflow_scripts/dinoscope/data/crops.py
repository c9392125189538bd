"""Multi-crop augmentation: two global and several local views of one window, uint8 in and out, on one thread.

    crops = make_crops(window, CropSizes(), AUGMENTATIONS["pathology"], sample_rng(seed, sample_index))

What is drawn at random is decided first (views.py), then done: cutting with Pillow's resampling (resize.py), colours
(color.py), and flips and turns with the last copy. Callers that run several worker processes should call
`cv2.setNumThreads(0)` and `processes.keep_freed_memory()` in each of them.
"""

import dataclasses
from types import MappingProxyType

import cv2
import numpy as np

from dinoscope.data import color
from dinoscope.data.resize import resize
from dinoscope.data.views import View, draw_views

__all__ = [
    "AUGMENTATIONS",
    "Augmentation",
    "CropSizes",
    "Crops",
    "contact_sheet",
    "for_stain",
    "make_crops",
    "sample_rng",
]

_FLIP_CODES = {(True, False): 0, (False, True): 1, (True, True): -1}  # of OpenCV, by upside down and mirrored


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
    first_blur_p, second_blur_p, local_blur_p = augmentation.blur_p
    kinds = [
        (sizes.global_scale, first_blur_p, 0.0),
        (sizes.global_scale, second_blur_p, augmentation.solarize_p),
        *[(sizes.local_scale, local_blur_p, 0.0)] * sizes.num_local,
    ]
    views = draw_views(image.shape[:2], kinds, augmentation, rng)
    cut_px = max(sizes.global_px, sizes.gram_px or 0)
    clean = [_cut(image, view, cut_px) for view in views[:2]]
    distorted = _distort(clean, views[:2], augmentation)
    local_crops = _distort([_cut(image, view, sizes.local_px) for view in views[2:]], views[2:], augmentation)
    gram_crops = None
    if sizes.gram_px is not None:
        gram_crops = _stack(clean if sizes.gram_no_distortions else distorted, views[:2], sizes.gram_px)
    return Crops(
        _stack(distorted, views[:2], sizes.global_px), _stack(local_crops, views[2:], sizes.local_px), gram_crops
    )


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


def _cut(image: np.ndarray, view: View, size_px: int) -> np.ndarray:
    return resize(image[view.top : view.top + view.height, view.left : view.left + view.width], size_px)


def _distort(images: list[np.ndarray], views: list[View], augmentation: Augmentation) -> list[np.ndarray]:
    """Changes colours and sharpness of cut-out views, all of one size."""
    stained = [
        color.shift_stains(image, *view.stains) if view.stains else image
        for image, view in zip(images, views, strict=True)
    ]
    jittered = color.jitter(stained, [view.jitter for view in views])
    return [_finish(image, view, augmentation) for image, view in zip(jittered, views, strict=True)]


def _finish(image: np.ndarray, view: View, augmentation: Augmentation) -> np.ndarray:
    if view.gray:
        image = color.luma(image)
    if view.blur_sigma is not None:
        image = color.gaussian_blur(image, view.blur_sigma, augmentation.blur_kernel_px)
    if view.solarized:
        image = color.solarize(image, augmentation.solarize_threshold)
    return cv2.cvtColor(image, cv2.COLOR_GRAY2RGB) if view.gray else image


def _stack(images: list[np.ndarray], views: list[View], size_px: int) -> np.ndarray:
    """Resized and turned as they shall be; (images, size, size, 3)."""
    stacked = np.empty((len(images), size_px, size_px, 3), np.uint8)
    for image, view, place in zip(images, views, stacked, strict=True):
        image = resize(image, size_px)
        if view.transposed:
            image = cv2.transpose(image)
        if view.upside_down or view.mirrored:
            cv2.flip(image, _FLIP_CODES[view.upside_down, view.mirrored], place)
        else:
            place[:] = image
    return stacked
