"""Pages that show what several models see inside one image: colours of patches, and how alike patches are."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from dinoscope.errors import FeaturesError
from dinoscope.visualize.color_basis import BACKGROUND_COLOR, ColorBasis
from dinoscope.visualize.page import Panel, fitted, save_panels
from dinoscope.visualize.patches import PatchEncoder, agreeing_with, cosine_similarity, dense_features, fit_patch_colors
from dinoscope.visualize.upsampling import Upsampler, joint_bilateral, nearest_neighbour

__all__ = ["Seen", "colored", "draw_patch_colors", "draw_similarity", "see", "upsampled_scores"]

COLORS_PX, SIMILARITY_PX = 768, 480
WIDE_PX = 600
MARKER = (0, 230, 118)


@dataclass(frozen=True)
class Seen:
    """What one model sees in some images.

    Attributes:
        name: The model's.
        patch_px: Side of its patches.
        features: (h, w, D) of each image.
        basis: The colour space of all of them.
    """

    name: str
    patch_px: int
    features: list[np.ndarray]
    basis: ColorBasis

    def scores(self, number: int) -> np.ndarray:
        """Three components of an image's patches, and how far they are from the background: (h, w, 4)."""
        return _scores(self.features[number], self.basis)


def see(
    encoder: PatchEncoder,
    images: Sequence[np.ndarray],
    *,
    reference: Seen | None = None,
    background: str = "keep",
) -> Seen:
    """Features of the patches of images, and one colour space for all of them.

    Args:
        encoder: The model.
        images: (H, W, 3) uint8 each.
        reference: A model that has seen the same images, whose hues this one's shall agree with as far as possible.
        background: What becomes of background, see `color_basis.fit_colors`.

    Raises:
        FeaturesError: Features are not finite, or differ in fewer than three directions.
    """
    features = [dense_features(encoder, image) for image in images]
    basis = fit_patch_colors(features, encoder.name, background=background)
    seen = Seen(encoder.name, encoder.patch_px, features, basis)
    if reference is None:
        return seen
    own, theirs = [], []
    for number in range(len(features)):
        wanted = reference.scores(number)[..., :3]
        own.append(cv2.resize(seen.scores(number)[..., :3], wanted.shape[1::-1], interpolation=cv2.INTER_AREA))
        theirs.append(wanted)
    basis = agreeing_with(basis, *(np.concatenate([part.reshape(-1, 3) for part in parts]) for parts in (own, theirs)))
    return Seen(encoder.name, encoder.patch_px, features, basis)


def upsampled_scores(seen: Seen, number: int, image: np.ndarray, upsampler: Upsampler | None) -> np.ndarray:
    """Three components and the distance from the background at the resolution of the image, (H, W, 4) or nearly.

    Args:
        seen: What a model sees.
        number: Of the image among those seen.
        image: (H, W, 3) uint8.
        upsampler: One of the user's own; None for joint bilateral upsampling.

    Raises:
        FeaturesError: The upsampler gives something else than features.
    """
    if upsampler is None:
        return joint_bilateral(seen.scores(number), image)
    import torch

    features = torch.from_numpy(seen.features[number]).permute(2, 0, 1)[None].contiguous()
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255
    with torch.inference_mode():
        given = upsampler(features, pixels)
    if not isinstance(given, torch.Tensor) or given.ndim != 4 or given.shape[:2] != features.shape[:2]:
        found = tuple(given.shape) if isinstance(given, torch.Tensor) else type(given).__name__
        raise FeaturesError(
            f"the upsampler gives {found} for features {tuple(features.shape)} of model {seen.name!r}, but a tensor "
            f"(1, {features.shape[1]}, height, width) is wanted"
        )
    return _scores(given[0].permute(1, 2, 0).float().cpu().numpy(), seen.basis)


def colored(scores: np.ndarray, basis: ColorBasis) -> np.ndarray:
    """RGB (H, W, 3) uint8 of what `Seen.scores` and `upsampled_scores` give."""
    colors = basis.colors_of_scores(scores[..., :3])
    colors[scores[..., 3] < 0] = BACKGROUND_COLOR
    return colors


def draw_patch_colors(
    output: str | os.PathLike[str],
    image: np.ndarray,
    models: Sequence[Seen],
    *,
    title: str,
    subtitle: str,
    upsampler: Upsampler | str | None = "jbu",
    overview: np.ndarray | None = None,
    um_per_px: float | None = None,
) -> None:
    """Saves an image beside the colours of its patches by every model, and those upsampled below.

    Args:
        output: The PNG.
        image: (H, W, 3) uint8, the first of the images that the models have seen.
        models: What they see, from left to right.
        title: Of the page.
        subtitle: Below it.
        upsampler: "jbu", one of the user's own, or None for no second row.
        overview: A picture for the place below the image; the image again when there is none.
        um_per_px: Micrometres a pixel of the image, for the scale bar.
    """
    height, width, shown_um = _sides(image, COLORS_PX, um_per_px)
    shown = _shown(image, height, width)
    panels = [Panel(shown, "image", _size(image, um_per_px))]
    if overview is None:
        below = [Panel(shown, "", "image")]
    else:
        below = [Panel(_centred(overview, height, width), "", "where it is")]
    for seen in models:
        plain = colored(nearest_neighbour(seen.scores(0), height, width), seen.basis)
        explained = 100 * seen.basis.info["explained_by_top_3"]
        order = ", ".join(map(str, seen.basis.info.get("order", (1, 2, 3))))
        about = f"red, green, blue = components {order}"
        if width >= WIDE_PX:  # else the middle of the line would be left out
            about = f"{seen.patch_px}-px patches; {about}, which explain {explained:.0f} %"
        panels.append(Panel(plain, seen.name, about))
        if upsampler is not None:
            scores = upsampled_scores(seen, 0, shown, None if upsampler == "jbu" else upsampler)
            below.append(Panel(_shown(colored(scores, seen.basis), height, width), "", _UPSAMPLED[upsampler == "jbu"]))
    rows = [panels] if upsampler is None and overview is None else [panels, below]
    save_panels(output, rows, title=title, subtitle=subtitle, um_per_px=shown_um)


_UPSAMPLED = {True: "upsampled along the edges of the image", False: "upsampled"}


def draw_similarity(
    output: str | os.PathLike[str],
    image: np.ndarray,
    models: Sequence[Seen],
    places: Sequence[tuple[float, float]],
    *,
    title: str,
    subtitle: str,
    um_per_px: float | None = None,
) -> None:
    """Saves how alike all patches are to one of them, by every model: a row a place.

    Args:
        output: The PNG.
        image: (H, W, 3) uint8, the first of the images that the models have seen.
        models: What they see, from left to right.
        places: Of the patches, as fractions of width and height (x, y).
        title: Of the page.
        subtitle: Below it.
        um_per_px: Micrometres a pixel of the image, for the scale bar.
    """
    height, width, shown_um = _sides(image, SIMILARITY_PX, um_per_px)
    rows = []
    for number, (x, y) in enumerate(places):
        row = [Panel(_marked(_shown(image, height, width), x, y), "" if number else "image", f"patch {number + 1}")]
        for seen in models:
            h, w = seen.features[0].shape[:2]
            likeness = cosine_similarity(seen.features[0], min(int(y * h), h - 1), min(int(x * w), w - 1))
            low = float(np.percentile(likeness, 2))
            heat = _heat(nearest_neighbour(likeness[..., None], height, width)[..., 0], low)
            row.append(
                Panel(
                    _marked(heat, x, y),
                    "" if number else seen.name,
                    f"cosine {low:.2f} (dark) to 1 (bright)".replace("-", "\N{MINUS SIGN}"),
                )
            )
        rows.append(row)
    save_panels(output, rows, title=title, subtitle=subtitle, um_per_px=shown_um)


def _sides(image: np.ndarray, longest_px: int, um_per_px: float | None) -> tuple[int, int, float | None]:
    """Height and width of the image on the page, and micrometres a pixel there."""
    scale = longest_px / max(image.shape[:2])
    height, width = (round(side * scale) for side in image.shape[:2])
    return height, width, um_per_px and um_per_px / scale


def _scores(features: np.ndarray, basis: ColorBasis) -> np.ndarray:
    rows = features.reshape(-1, features.shape[-1]) - basis.mean
    gate = rows @ basis.gate - basis.gate_below if basis.gate is not None else np.ones(len(rows), np.float32)
    scores = np.concatenate([rows @ basis.components[:3].T, gate[:, None]], axis=1)
    return scores.reshape(*features.shape[:2], 4).astype(np.float32)


def _shown(image: np.ndarray, height: int, width: int) -> np.ndarray:
    shrinks = height < image.shape[0]
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def _centred(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """A picture as large as fits, in the middle of a white place."""
    factor = min(height / picture.shape[0], width / picture.shape[1])
    picture = fitted(picture, max(1, round(max(picture.shape[:2]) * factor)))[:height, :width]
    place = np.full((height, width, 3), 255, np.uint8)
    top, left = (height - picture.shape[0]) // 2, (width - picture.shape[1]) // 2
    place[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return place


def _heat(likeness: np.ndarray, low: float) -> np.ndarray:
    scaled = ((likeness - low) / max(1 - low, 1e-6)).clip(0, 1)
    return cv2.applyColorMap(np.rint(255 * scaled).astype(np.uint8), cv2.COLORMAP_MAGMA)[..., ::-1].copy()


def _marked(picture: np.ndarray, x: float, y: float) -> np.ndarray:
    centre = (round(x * picture.shape[1]), round(y * picture.shape[0]))
    for color, thickness in (((0, 0, 0), 5), (MARKER, 2)):
        cv2.circle(picture, centre, 11, color, thickness, cv2.LINE_AA)
    return picture


def _size(image: np.ndarray, um_per_px: float | None) -> str:
    height, width = image.shape[:2]
    if um_per_px is None:
        return f"{width} × {height} px"
    return f"{width * um_per_px:.0f} × {height * um_per_px:.0f} µm, {um_per_px:g} µm a pixel"
