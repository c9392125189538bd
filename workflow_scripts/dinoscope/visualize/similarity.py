"""What the patches of one image have in common: cosine similarity to one of them, and their principal components.

Shapes: h rows and w columns of patches, D feature dimensions. A place is (row, column) of a patch, counted from 0.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle

from dinoscope.errors import FeaturesError
from dinoscope.visualize.curves import RUN_COLORS

if TYPE_CHECKING:
    from dinoscope.features.patches import PatchFeatures

__all__ = ["draw_patches", "patch_colors", "similarity_to", "spread_places"]

Place = tuple[int, int]
PANEL_INCHES = 3.2
LOW_PERCENTILE, HIGH_PERCENTILE = 1.0, 99.0


def similarity_to(patches: np.ndarray, place: Place) -> np.ndarray:
    """Cosine similarity (h, w) of all patches to the one at `place`, -1 to 1.

    Args:
        patches: (h, w, D).
        place: Of the patch that is compared with.

    Raises:
        FeaturesError: There is no such patch.
    """
    rows, columns = patches.shape[:2]
    row, column = place
    if not (0 <= row < rows and 0 <= column < columns):
        raise FeaturesError(
            f"there is no patch at row {row}, column {column}: rows are 0 to {rows - 1}, columns 0 to {columns - 1}"
        )
    directions = _directions(patches)
    return directions @ directions[row, column]


def spread_places(patches: np.ndarray, count: int = 3) -> list[Place]:
    """Places of patches that show what there is in an image.

    First comes the patch that is nearest to all together, then, again and again, the one least similar to those taken.

    Args:
        patches: (h, w, D).
        count: How many; fewer where there are no more patches.
    """
    directions = _directions(patches).reshape(-1, patches.shape[2])
    chosen = [int(np.argmax(directions @ directions.mean(axis=0)))]
    for _ in range(min(count, len(directions)) - 1):
        nearest = (directions @ directions[chosen].T).max(axis=1)
        nearest[chosen] = np.inf
        chosen.append(int(np.argmin(nearest)))
    return [divmod(index, patches.shape[1]) for index in chosen]


def patch_colors(patches: np.ndarray) -> tuple[np.ndarray, float]:
    """The patches' first three principal components as red, green and blue, and the share of the variance they hold.

    The components are those of this one image: colours of two images have nothing to do with each other (for that, see
    `dinoscope.visualize.pca`). Patches that do not differ are grey.

    Args:
        patches: (h, w, D).

    Returns:
        (h, w, 3) float64, 0 to 1 between the 1st and the 99th percentile of each component; and 0 to 1.
    """
    rows, columns, width = patches.shape
    centred = patches.reshape(-1, width).astype(np.float64)
    centred -= centred.mean(axis=0)
    _, values, components = np.linalg.svd(centred, full_matrices=False)
    total = np.square(values).sum()
    if total <= 1e-12 * np.square(patches, dtype=np.float64).sum():  # rounding
        return np.full((rows, columns, 3), 0.5), 0.0
    components = components[:3]
    largest = np.abs(components).argmax(axis=1)
    signs = np.sign(components[np.arange(len(components)), largest])
    scores = np.zeros((len(centred), 3))
    scores[:, : len(components)] = centred @ (components * signs[:, None]).T
    low, high = np.percentile(scores, [LOW_PERCENTILE, HIGH_PERCENTILE], axis=0)
    spread = np.where(high > low, high - low, 1.0)
    colors = np.where(high > low, ((scores - low) / spread).clip(0, 1), 0.5)
    return colors.reshape(rows, columns, 3), float(np.square(values[:3]).sum() / total)


def draw_patches(features: "PatchFeatures", places: Sequence[Place] | None = None) -> Figure:
    """Draws an image, the components of its patches, and how similar all patches are to some of them.

    Args:
        features: Of the image.
        places: The patches that the others are compared with; None: three that `spread_places` finds.

    Raises:
        FeaturesError: There is no patch at a place.
    """
    places = spread_places(features.patches) if places is None else list(places)
    maps = [similarity_to(features.patches, place) for place in places]
    colors, explained = patch_colors(features.patches)
    rows, columns = features.patches.shape[:2]
    height = 0.5 + PANEL_INCHES * min(max(rows / columns, 0.4), 2.5)
    width = PANEL_INCHES * (2 + len(maps)) + (0.8 if maps else 0)
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        grid = figure.subplots(1, 2 + len(maps))
        _show(grid[0], features.image, f"{features.image.shape[1]} × {features.image.shape[0]} px")
        _show(grid[1], colors, f"PCA of its patches: {100 * explained:.0f} % of the variance")
        lowest = min((similarity.min() for similarity in maps), default=0.0)
        for number, (axes, place, similarity) in enumerate(zip(grid[2:], places, maps, strict=True)):
            color = RUN_COLORS[1 + number % (len(RUN_COLORS) - 1)]
            shown = _show(axes, similarity, f"similar to row {place[0]}, column {place[1]}", vmin=lowest, vmax=1.0)
            _frame(axes, place, 1, color)
            _frame(grid[0], place, features.patch_px, color)
        if maps:
            figure.colorbar(shown, ax=grid[-1], shrink=0.8, label="cosine similarity")
    return figure


def _directions(patches: np.ndarray) -> np.ndarray:
    """The features with length 1."""
    lengths = np.linalg.norm(patches, axis=-1, keepdims=True)
    return patches / np.maximum(lengths, np.finfo(np.float32).tiny)


def _show(axes: Axes, image: np.ndarray, title: str, **limits: float) -> AxesImage:
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_axis_off()
    return axes.imshow(image, interpolation="nearest", cmap="viridis", **limits)


def _frame(axes: Axes, place: Place, side: int, color: str) -> None:
    """A frame around a patch, which is `side` of the axes' units wide."""
    corner = (place[1] * side - 0.5, place[0] * side - 0.5)
    for line, width in (("white", 3.5), (color, 2.0)):
        axes.add_patch(Rectangle(corner, side, side, fill=False, edgecolor=line, linewidth=width, clip_on=False))
