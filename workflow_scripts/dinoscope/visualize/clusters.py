"""Kinds of tiles: k-means on the principal components of their features, one set of kinds a model, as fixed over slides
as its colours.

Clusters are numbered from 1, the largest first, and named "Cluster 1" and so on. Components keep their variance: what
differs most counts most. Everything is seeded: reruns give the same clusters, numbers and colours.

Shapes: N tiles, K components, C clusters.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dinoscope.arrays import damage_named, read_arrays, write_arrays
from dinoscope.errors import FeaturesError
from dinoscope.features.writers import FeatureFile
from dinoscope.files import atomic_path, read_json, write_json
from dinoscope.visualize.color_basis import ColorBasis
from dinoscope.visualize.pca import MAX_TILES, sample_features

__all__ = [
    "MAX_CLUSTERS",
    "PALETTE",
    "Clusters",
    "fit_clusters",
    "load_clusters",
    "save_clusters",
    "write_geojson",
    "write_labels",
]

# Told apart by eye on pink, blue and grey tissue, the first eight also with the common colour blindnesses
# (Okabe and Ito 2008); the rest are lighter and darker kin.
PALETTE = np.array(
    [
        (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167),
        (90, 90, 90), (148, 103, 189), (140, 86, 75), (188, 189, 34), (255, 152, 150), (23, 190, 207), (152, 223, 138),
        (127, 0, 0), (0, 0, 128), (255, 127, 255), (0, 90, 50), (199, 180, 140), (176, 196, 222),
    ],
    np.uint8,
)  # fmt: skip
MAX_CLUSTERS = len(PALETTE)
EXAMPLES = 8
RESTARTS = 10


@dataclass(frozen=True)
class Clusters:
    """The kinds of tiles of one model.

    Attributes:
        centres: (C, K) float32 on the components of the model's basis.
        info: What clusters.json holds: model, basis, sizes, spreads and example tiles.
    """

    centres: np.ndarray
    info: dict[str, Any]

    @property
    def colors(self) -> np.ndarray:
        """(C, 3) uint8, RGB."""
        return PALETTE[: len(self.centres)]

    def assign(self, features: np.ndarray, basis: ColorBasis) -> np.ndarray:
        """The nearest centre of each row of features (N, D), int (N,), counted from 0; background is -1.

        Raises:
            FeaturesError: The clusters were made on another basis.
        """
        if self.info["basis"] != _mark(basis):
            raise FeaturesError(
                f"the clusters of model {self.info['model']!r} were made on another PCA basis than that of model "
                f"{basis.info['model']!r} now; fit the clusters again"
            )
        labels = np.empty(len(features), np.int64)
        for start in range(0, len(features), 65_536):
            rows = slice(start, start + 65_536)
            labels[rows] = _distances(basis.project(features[rows]), self.centres).argmin(axis=1)
        labels[basis.is_background(features)] = -1
        return labels


def fit_clusters(
    paths: Sequence[str | os.PathLike[str]],
    basis: ColorBasis,
    *,
    num_clusters: int = 8,
    seed: int = 0,
    max_tiles: int = MAX_TILES,
) -> Clusters:
    """Finds the kinds of tiles of the slides that are given, of one model.

    Args:
        paths: Feature files, those that the basis was fitted on.
        basis: The model's colour space, on whose components the tiles are compared.
        num_clusters: How many kinds, 2 to 20; fewer where there are fewer tiles.
        seed: Of the sample of tiles, when there are many, and of k-means.
        max_tiles: Upper bound of tiles to fit on.

    Raises:
        FeaturesError: As for `fit_basis`, or the features are not those of the basis.
    """
    from sklearn.cluster import KMeans

    info, counts, files = sample_features(paths, seed, max_tiles)
    basis.check_fits(info, paths[0])
    parts, places = [], []
    for file in files:
        kept = ~basis.is_background(file.features)
        parts.append(basis.project(file.features[kept]))
        places += [(file.info.slide_id, int(x), int(y)) for x, y in file.coords[kept]]
    scores = np.concatenate(parts)
    num_clusters = min(num_clusters, len(np.unique(scores, axis=0)))
    # float64: sums of many float32 numbers depend on how threads share them out
    fitted = KMeans(num_clusters, n_init=RESTARTS, random_state=seed).fit(scores.astype(np.float64))
    sizes = np.bincount(fitted.labels_, minlength=num_clusters)
    order = np.argsort(-sizes, kind="stable")
    centres = fitted.cluster_centers_[order].astype(np.float32)
    distances = _distances(scores, centres)
    labels = distances.argmin(axis=1)
    return Clusters(
        centres=centres,
        info={
            "model": info.model,
            "basis": _mark(basis),
            "num_clusters": num_clusters,
            "num_tiles": sum(counts.values()),
            "num_tiles_fitted": len(scores),
            "seed": seed,
            "explained": round(1 - float(distances.min(axis=1).sum() / np.square(scores - scores.mean(0)).sum()), 6),
            "names": [f"Cluster {number + 1}" for number in range(num_clusters)],
            "colors": ["#{:02x}{:02x}{:02x}".format(*PALETTE[number]) for number in range(num_clusters)],
            "clusters": [
                {
                    "name": f"Cluster {number + 1}",
                    "color": PALETTE[number].tolist(),
                    "num_tiles_fitted": int(np.count_nonzero(labels == number)),
                    "num_slides": len({places[row][0] for row in np.flatnonzero(labels == number)}),
                    "examples": _examples(distances[:, number], labels == number, places),
                }
                for number in range(num_clusters)
            ],
        },
    )


def save_clusters(clusters: Clusters, folder: str | os.PathLike[str]) -> None:
    """Writes clusters.npz and, last, clusters.json into a folder."""
    folder = Path(folder)
    write_arrays(folder / "clusters.npz", centres=clusters.centres)
    write_json(folder / "clusters.json", clusters.info)


def load_clusters(folder: str | os.PathLike[str]) -> Clusters:
    """Reads what `save_clusters` wrote.

    Raises:
        FeaturesError: A file is missing or damaged.
    """
    folder = Path(folder)
    with damage_named(folder, "clusters", "run clusters.py fit again"):
        return Clusters(read_arrays(folder / "clusters.npz")["centres"], read_json(folder / "clusters.json"))


def write_labels(path: str | os.PathLike[str], labels: np.ndarray) -> None:
    """Writes the clusters of a slide's tiles, `labels` int16 in the order of its feature file, as .npz."""
    write_arrays(path, labels=labels.astype(np.int16))


def write_geojson(path: str | os.PathLike[str], file: FeatureFile, labels: np.ndarray, clusters: Clusters) -> None:
    """Writes the tiles of a slide as QuPath reads them: a FeatureCollection of squares, level-0 pixels.

    Every tile is an object of type "tile" with the name of its cluster as class and the cluster's colour. Tiles that
    are background have no class. Tiles beyond the slide's edge are cut off there.

    Args:
        path: The file.
        file: The slide's features.
        labels: (N,) of `Clusters.assign`.
        clusters: The kinds.
    """
    side = file.info.patch_size_level0
    limit = np.array([file.info.level0_width, file.info.level0_height])
    kinds = [{"classification": {key: kind[key] for key in ("name", "color")}} for kind in clusters.info["clusters"]]
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as text:
        text.write('{"type":"FeatureCollection","features":[')
        for number, (corner, label) in enumerate(zip(file.coords, labels, strict=True)):
            (left, top), (right, bottom) = corner.tolist(), np.minimum(corner + side, limit).tolist()
            ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
            properties = {"objectType": "tile"} | (kinds[label] if label >= 0 else {})
            geometry = {"type": "Polygon", "coordinates": [ring]}
            feature = {"type": "Feature", "geometry": geometry, "properties": properties}
            text.write((",\n" if number else "\n") + json.dumps(feature, separators=(",", ":"), ensure_ascii=False))
        text.write("\n]}\n")


def _distances(scores: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Squared distances (N, C)."""
    squares = np.square(scores).sum(axis=1)[:, None] - 2 * scores @ centres.T + np.square(centres).sum(axis=1)
    return np.maximum(squares, 0)


def _examples(
    distances: np.ndarray, inside: np.ndarray, places: Sequence[tuple[str, int, int]]
) -> list[dict[str, Any]]:
    """The tiles nearest to a centre, from as many slides as there are: each slide's nearest first, then its second …"""
    rows = np.flatnonzero(inside)
    taken: dict[str, int] = {}
    ranked = []
    for row in rows[np.argsort(distances[rows], kind="stable")]:
        slide, x, y = places[row]
        ranked.append((taken.get(slide, 0), float(distances[row]), {"slide": slide, "x": x, "y": y}))
        taken[slide] = taken.get(slide, 0) + 1
    ranked.sort(key=lambda each: each[:2])
    return [example for _, _, example in ranked[:EXAMPLES]]


def _mark(basis: ColorBasis) -> str:
    """Tells one basis from another."""
    return hashlib.sha256(basis.mean.tobytes() + basis.components.tobytes()).hexdigest()[:16]
