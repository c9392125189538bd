"""The tiles of a collection that look most alike to a model: exact nearest neighbours among a sample of the tiles.

Likeness is the cosine of the features' angle. The sample (at most 50,000 tiles, as equal as possible a slide) is drawn
once a model and kept, as its colours are: a slide that comes later finds its neighbours in it, and no other slide's
change. Every tile has neighbours, in the sample or not.

Shapes: N tiles of a slide, M tiles of the sample, D feature dimensions, K neighbours.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dinoscope.arrays import damage_named, read_arrays, write_arrays
from dinoscope.errors import FeaturesError
from dinoscope.features.writers import FeatureFile, FeatureInfo, check_same_kind, read_features, read_info
from dinoscope.files import write_json
from dinoscope.visualize.pca import balanced_quotas

__all__ = [
    "MAX_TILES",
    "NONE",
    "Neighbours",
    "TileSample",
    "draw_sample",
    "load_sample",
    "nearest_tiles",
    "save_sample",
]

MAX_TILES = 50_000  # numbers of tiles are stored in 16 bits
NONE = 65_535  # in place of a tile's number where there are fewer neighbours than were asked for
_CHUNK_VALUES = 2**24  # 64 MiB of similarities at once
_BLOCK = 64
_ARRAYS = ("sides", "counts", "slide", "coords", "features")
_KIND = ("model", "weights_sha256", "pooling", "mpp", "tile_px")


@dataclass(frozen=True)
class TileSample:
    """Tiles of all slides of a model.

    Attributes:
        slides: Names of the slides, sorted.
        sides: (slides,) side of a tile in level-0 pixels, of each slide.
        counts: (slides,) tiles that each slide has.
        slide: (M,) number of each tile's slide, ascending.
        coords: (M, 2) top-left corners in level-0 pixels.
        features: (M, D) as stored in the feature files.
        kind: Model, weights, pooling, mpp and tile size of the features.
        max_tiles: Upper bound of M that it was drawn with.
    """

    slides: list[str]
    sides: np.ndarray
    counts: np.ndarray
    slide: np.ndarray
    coords: np.ndarray
    features: np.ndarray
    kind: dict[str, str | float | int]
    max_tiles: int = MAX_TILES

    def rows_of(self, slide_id: str) -> slice:
        """The rows of a slide's tiles; none for a slide that the sample does not know."""
        if slide_id not in self.slides:
            return slice(0, 0)
        number = self.slides.index(slide_id)
        return slice(*np.searchsorted(self.slide, [number, number + 1]).tolist())

    def check_fits(self, info: FeatureInfo, path: str | os.PathLike[str]) -> None:
        """Refuses features of another model or tile kind.

        Raises:
            FeaturesError: They differ in model, weights, pooling, mpp or tile size.
        """
        for key, value in self.kind.items():
            if getattr(info, key) != value:
                raise FeaturesError(
                    f"{path}: its features have {key} {getattr(info, key)}, but the sample of tiles was drawn from "
                    f"features with {key} {value}; draw the sample again, or extract the features again"
                )


@dataclass(frozen=True)
class Neighbours:
    """The most similar tiles of each tile, the most similar first.

    Attributes:
        tiles: (N, K) uint16 rows of the sample, `NONE` where there is none.
        cosines: (N, K) float32, 0 where there is none.
    """

    tiles: np.ndarray
    cosines: np.ndarray


def draw_sample(paths: Sequence[str | os.PathLike[str]], *, seed: int = 0, max_tiles: int = MAX_TILES) -> TileSample:
    """Draws tiles from the features of all slides of a model, as equal as possible a slide.

    Args:
        paths: Feature files of one model, in any order.
        seed: Of the draw; what is drawn from a slide depends on its name and the number, not on the other slides.
        max_tiles: Upper bound of tiles in all.

    Raises:
        FeaturesError: Files of different models or tile sets, or values that are not finite.
    """
    found = {path: read_info(path) for path in paths}
    check_same_kind({path: info for path, (info, _, _) in found.items()})
    found = dict(sorted(found.items(), key=lambda item: item[1][0].slide_id))
    infos, counts = [info for info, _, _ in found.values()], [count for _, count, _ in found.values()]
    max_tiles = min(max_tiles, MAX_TILES)
    quotas = balanced_quotas(counts, max_tiles)
    files = [
        read_features(path, _drawn_rows(count, quota, seed, info.slide_id))
        for (path, (info, count, _)), quota in zip(found.items(), quotas, strict=True)
    ]
    return TileSample(
        slides=[info.slide_id for info in infos],
        sides=np.array([info.patch_size_level0 for info in infos], np.int64),
        counts=np.array(counts, np.int64),
        slide=np.repeat(np.arange(len(files)), [len(file.coords) for file in files]),
        coords=np.concatenate([file.coords for file in files]),
        features=np.concatenate([file.features for file in files]),
        kind={key: getattr(infos[0], key) for key in _KIND},
        max_tiles=max_tiles,
    )


def save_sample(sample: TileSample, path: str | os.PathLike[str]) -> None:
    """Writes a sample to PATH.npz and, last, the names of its slides to PATH.json."""
    path = Path(path)
    arrays = {name: getattr(sample, name) for name in _ARRAYS} | {"slides": np.array(sample.slides, dtype=str)}
    kind = {f"kind_{key}": value for key, value in sample.kind.items()}
    write_arrays(path.with_suffix(".npz"), **arrays, **kind, max_tiles=sample.max_tiles)
    numbers = {"num_tiles": int(sample.counts.sum()), "num_tiles_sampled": len(sample.slide)}
    numbers["max_tiles"] = sample.max_tiles
    write_json(path.with_suffix(".json"), {**sample.kind, **numbers, "slides": sample.slides})


def load_sample(path: str | os.PathLike[str]) -> TileSample:
    """Reads PATH.npz, which `save_sample` wrote.

    Raises:
        FeaturesError: The file is missing or damaged.
    """
    with damage_named(path, "sample of tiles", "run build_viewer.py sample again"):
        arrays = read_arrays(path)
        return TileSample(
            slides=arrays["slides"].tolist(),
            **{name: arrays[name] for name in _ARRAYS},
            kind={key: arrays[f"kind_{key}"].item() for key in _KIND},
            max_tiles=int(arrays["max_tiles"]),
        )


def nearest_tiles(file: FeatureFile, sample: TileSample, num: int) -> tuple[Neighbours, Neighbours]:
    """Finds the most similar tiles of the sample for every tile of a slide, leaving out the tile itself.

    Args:
        file: The slide's features.
        sample: Of the same model.
        num: K, neighbours a tile.

    Returns:
        Neighbours on all slides, and those on other slides than the tile's own.
    """
    own = sample.rows_of(file.info.slide_id)
    itself = _rows_in(file.coords, sample.coords[own]) + own.start
    units, num_sampled = _units(sample.features), len(sample.features)
    if num_sampled % _BLOCK:  # whole blocks, for `_largest`
        units = np.concatenate([units, np.zeros((-num_sampled % _BLOCK, units.shape[1]), np.float32)])
    num_rows = max(1, _CHUNK_VALUES // max(len(units), 1))
    all_slides, elsewhere = [], []
    for start in range(0, len(file.features), num_rows):
        cosines = _units(file.features[start : start + num_rows]) @ units.T
        cosines[:, num_sampled:] = -np.inf
        same = itself[start : start + num_rows]
        known = np.flatnonzero(same >= own.start)
        cosines[known, same[known]] = -np.inf
        all_slides.append(_largest(cosines, num))
        cosines[:, own] = -np.inf
        elsewhere.append(_largest(cosines, num))
    return _joined(all_slides, num), _joined(elsewhere, num)


def _drawn_rows(count: int, quota: int, seed: int, slide_id: str) -> np.ndarray | slice:
    if quota >= count:
        return slice(None)
    name = int.from_bytes(hashlib.sha256(slide_id.encode()).digest()[:8], "little")
    return np.sort(np.random.default_rng([seed, name, 1]).choice(count, quota, replace=False))


def _units(features: np.ndarray) -> np.ndarray:
    features = features.astype(np.float32)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def _rows_in(coords: np.ndarray, sampled: np.ndarray) -> np.ndarray:
    """Row of each tile among the sampled ones of its slide, a large negative number where it is not."""
    row_of = {corner: row for row, corner in enumerate(map(tuple, sampled.tolist()))}
    return np.array([row_of.get(corner, -(2**32)) for corner in map(tuple, coords.tolist())], np.int64)


def _largest(cosines: np.ndarray, num: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns and values of the `num` largest of each row of whole blocks, the largest first.

    Looks at the maxima of blocks first: the largest values lie in the blocks of the largest maxima.
    """
    rows, columns = cosines.shape
    num = min(num, columns)
    candidates, values = np.broadcast_to(np.arange(columns), (rows, columns)), cosines
    if columns > 4 * _BLOCK * num:
        blocks = cosines.reshape(rows, -1, _BLOCK)
        best = np.argpartition(-blocks.max(axis=2), num - 1, axis=1)[:, :num]
        candidates = (best[..., None] * _BLOCK + np.arange(_BLOCK)).reshape(rows, -1)
        values = np.take_along_axis(cosines, candidates, axis=1)
    order = np.lexsort((candidates, -values), axis=1)[:, :num]
    return np.take_along_axis(candidates, order, axis=1), np.take_along_axis(values, order, axis=1)


def _joined(parts: list[tuple[np.ndarray, np.ndarray]], num: int) -> Neighbours:
    num_rows = sum(len(tiles) for tiles, _ in parts)
    tiles, cosines = np.full((num_rows, num), NONE, np.uint16), np.zeros((num_rows, num), np.float32)
    row = 0
    for found, values in parts:
        there = np.isfinite(values)
        place = slice(row, row + len(found)), slice(0, found.shape[1])
        tiles[place] = np.where(there, found, NONE)
        cosines[place] = np.where(there, values, 0)
        row += len(found)
    return Neighbours(tiles, cosines)
