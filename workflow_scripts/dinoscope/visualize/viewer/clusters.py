"""Clusters of tiles, as the viewer takes them; who made them and how does not matter here.

SLIDE.npz      `labels`, integers (N,), one a tile in the order of the slide's feature file; −1: it is in no cluster
clusters.json  `colors`, a list of "#rrggbb", one a cluster; optionally `names`, as many words
"""

import os
import re
from dataclasses import dataclass

import numpy as np

from dinoscope.arrays import damage_named, read_arrays
from dinoscope.errors import FeaturesError
from dinoscope.files import read_json

__all__ = ["TileClusters", "read_clusters"]


@dataclass(frozen=True)
class TileClusters:
    """The clusters of a slide's tiles.

    Attributes:
        labels: (N,) int16, −1 where a tile is in none.
        colors: "#rrggbb" of each cluster.
        names: A word or more for each.
    """

    labels: np.ndarray
    colors: list[str]
    names: list[str]


def read_clusters(
    labels: str | os.PathLike[str], legend: str | os.PathLike[str], slide_id: str, num_tiles: int
) -> TileClusters:
    """Reads the clusters of a slide's tiles.

    Args:
        labels: The slide's .npz.
        legend: The model's .json.
        slide_id: For messages.
        num_tiles: N, tiles in the slide's feature file.

    Raises:
        FeaturesError: A file is missing or damaged, or does not fit the features.
    """
    colors, names = _read_legend(legend)
    with damage_named(labels, "clusters of tiles", "make the clusters again"):
        found = read_arrays(labels)["labels"]
    if found.shape != (num_tiles,) or found.dtype.kind not in "iu":
        raise FeaturesError(
            f"{labels}: labels {found.dtype} {found.shape} are not one integer for each of the {num_tiles} tiles of "
            f"slide {slide_id!r}; make the clusters again from the features that there are now"
        )
    if num_tiles and not -1 <= found.min() <= found.max() < len(colors):
        raise FeaturesError(
            f"{labels}: labels from {found.min()} to {found.max()} of slide {slide_id!r} do not fit the {len(colors)} "
            f"clusters of {legend}; make the clusters again"
        )
    return TileClusters(found.astype(np.int16), colors, names)


def _read_legend(path: str | os.PathLike[str]) -> tuple[list[str], list[str]]:
    try:
        document = read_json(path)
        colors = document["colors"]
        names = document.get("names") or [f"cluster {number}" for number in range(1, len(colors) + 1)]
        sound = all(re.fullmatch("#[0-9a-fA-F]{6}", color) for color in colors) and len(names) == len(colors)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FeaturesError(f"{path}: no colours of clusters ({error!r}); make the clusters again") from error
    if not sound:
        raise FeaturesError(
            f"{path}: colors must be a list of '#rrggbb' and names, if there are any, as many; make the clusters again"
        )
    return list(colors), [str(name) for name in names]
