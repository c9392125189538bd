"""PCA maps: the tiles of a slide, coloured by the first three principal components of their features.

One basis a model, fitted once over all slides and kept, so that a colour means the same on every slide of that model
(but not from model to model: each has components of its own). Red, green and blue are components 1, 2 and 3.

Shapes: N tiles, D feature dimensions, K components.
"""

import hashlib
import io
import os
import platform
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import dinoscope
from dinoscope.errors import FeaturesError
from dinoscope.features.writers import FeatureInfo, check_same_kind, read_features, read_info
from dinoscope.files import atomic_path, read_json, write_json

__all__ = ["ColorBasis", "fit_basis", "load_basis", "rounding_note", "save_basis"]

MAX_COMPONENTS = 50
MAX_TILES = 200_000
MAX_VALUES = 2**28  # 1 GiB of float32, whatever the width of the features
MIN_VARIANCE = 1e-10  # of component 3 beside component 1: below, it is rounding
DARKEST = 36
LOW_PERCENTILE, HIGH_PERCENTILE = 1.0, 99.0


@dataclass(frozen=True)
class ColorBasis:
    """A colour space for the features of one model.

    Attributes:
        mean: (D,) of the tiles it was fitted on.
        components: (K, D), orthonormal rows, the largest variance first; K is at most 50.
        low: (3,) 1st percentile of the first three components on those tiles: least red, green, blue.
        high: (3,) 99th percentile: full red, green, blue.
        info: What basis.json holds: model, digests, numbers of tiles and slides, explained variance, versions.
    """

    mean: np.ndarray
    components: np.ndarray
    low: np.ndarray
    high: np.ndarray
    info: dict[str, Any]

    def project(self, features: np.ndarray) -> np.ndarray:
        """Coordinates (N, K) of features (N, D) on the components."""
        return (features.astype(np.float32) - self.mean) @ self.components.T

    def colors(self, features: np.ndarray) -> np.ndarray:
        """RGB (N, 3) uint8 of features (N, D); values outside the percentiles are clipped.

        The scale begins at 36, not at 0, so that no tile is black and what lies under it stays visible.
        """
        return np.rint(DARKEST + (255 - DARKEST) * self._scaled(features).clip(0, 1)).astype(np.uint8)

    def share_outside(self, features: np.ndarray) -> float:
        """Share of the tiles that lie far outside the colours' range, so that their colours no longer tell them apart.

        Far means by more than a quarter of the range of a component.
        """
        scaled = self._scaled(features)
        return float(((scaled < -0.25) | (scaled > 1.25)).any(axis=1).mean()) if len(features) else 0.0

    def _scaled(self, features: np.ndarray) -> np.ndarray:
        scores = (features.astype(np.float32) - self.mean) @ self.components[:3].T
        return (scores - self.low) / (self.high - self.low)

    def check_fits(self, info: FeatureInfo, path: str | os.PathLike[str]) -> None:
        """Refuses features of another model or tile kind.

        Raises:
            FeaturesError: They differ in model, weights, pooling, mpp or tile size.
        """
        for key, value in _kind(info).items():
            if value != self.info[key]:
                raise FeaturesError(
                    f"{path}: its features have {key} {value}, but the PCA basis was fitted on {key} {self.info[key]}; "
                    "fit a basis of its own, or extract the features again"
                )


def fit_basis(paths: Sequence[str | os.PathLike[str]], *, seed: int = 0, max_tiles: int = MAX_TILES) -> ColorBasis:
    """Fits one basis over the features of all slides.

    With more than `max_tiles` tiles a sample is taken, as equal as possible a slide, so that one large slide does not
    choose the colours of all. The result does not depend on the order of `paths`.

    Args:
        paths: Feature files of one model.
        seed: Of that sample.
        max_tiles: Upper bound of tiles to fit on; fewer when features are very wide.

    Raises:
        FeaturesError: Files of different models or tile sets, values that are not finite, or too few tiles.
    """
    found = {path: read_info(path) for path in paths}
    check_same_kind({path: info for path, (info, _, _) in found.items()})
    found = dict(sorted(found.items(), key=lambda item: item[1][0].slide_id))
    info = next(iter(found.values()))[0]
    counts = [num_rows for _, num_rows, _ in found.values()]
    _check_enough(sum(counts), info, len(found))
    width = next(iter(found.values()))[2]
    quotas = balanced_quotas(counts, min(max_tiles, MAX_VALUES // width))
    parts, rounding = [], 0.0
    for (path, (slide, count, _)), quota in zip(found.items(), quotas, strict=True):
        features = read_features(path, _sampled_rows(count, quota, seed, slide.slide_id)).features
        rounding += _squared_rounding(features)
        parts.append(features.astype(np.float32))
    slides = [slide.slide_id for slide, _, _ in found.values()]  # planning fits on the same ones again
    numbers = {"slides": slides, "num_slides": len(found), "num_tiles": sum(counts), "seed": seed}
    return _fit(np.concatenate(parts), info, numbers, rounding)


def balanced_quotas(counts: Sequence[int], total: int) -> list[int]:
    """How many to take of each so that at most `total` are taken and the shares are as equal as the counts allow."""
    quotas, remaining = [0] * len(counts), total
    by_size = sorted(range(len(counts)), key=lambda index: counts[index])
    for position, index in enumerate(by_size):
        quotas[index] = min(counts[index], remaining // (len(counts) - position))
        remaining -= quotas[index]
    return quotas


def save_basis(basis: ColorBasis, folder: str | os.PathLike[str]) -> None:
    """Writes basis.npz and, last, basis.json into a folder."""
    folder = Path(folder)
    with atomic_path(folder / "basis.npz") as temporary:
        np.savez(temporary, mean=basis.mean, components=basis.components, low=basis.low, high=basis.high)
    write_json(folder / "basis.json", basis.info)


def load_basis(folder: str | os.PathLike[str]) -> ColorBasis:
    """Reads what `save_basis` wrote.

    Raises:
        FeaturesError: A file is missing or damaged.
    """
    folder = Path(folder)
    try:
        info = read_json(folder / "basis.json")
        # from memory: numpy leaves the file open when it is damaged
        with np.load(io.BytesIO((folder / "basis.npz").read_bytes())) as arrays:
            return ColorBasis(**{name: arrays[name] for name in ("mean", "components", "low", "high")}, info=info)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise FeaturesError(f"{folder}: no whole PCA basis ({error}); run pca.py fit again") from error


def rounding_note(info: dict[str, Any]) -> str:
    """A sentence if features differ so little from tile to tile that their storage blurs it, as of an untrained model.

    Args:
        info: What basis.json holds.
    """
    share = info.get("share_lost_in_rounding", 0.0)
    if share < 0.01:
        return ""
    return (
        f"the features of model {info['model']} hardly differ from tile to tile, and {100 * share:.0f} % of what "
        "differs is rounding: extract with dtype float32, or pooling mean"
    )


def _fit(sample: np.ndarray, info: FeatureInfo, numbers: dict[str, Any], rounding: float) -> ColorBasis:
    from sklearn.decomposition import PCA

    # centred here, in float64, because the covariance solver loses digits when means are large beside the spread
    mean = sample.mean(axis=0, dtype=np.float64)
    sample -= mean.astype(np.float32)
    num_tiles, width = sample.shape
    num_components = min(MAX_COMPONENTS, num_tiles - 1, width)
    if num_components < 3 or not sample.any():
        raise _too_flat(info)
    solver = "covariance_eigh" if num_tiles > width else "full"
    pca = PCA(num_components, svd_solver=solver).fit(sample)
    components = _with_fixed_signs(pca.components_)
    low, high = np.percentile(sample @ components[:3].T, [LOW_PERCENTILE, HIGH_PERCENTILE], axis=0)
    if pca.explained_variance_[2] < MIN_VARIANCE * pca.explained_variance_[0] or not (high > low).all():
        raise _too_flat(info)
    ratios = pca.explained_variance_ratio_.astype(float)
    return ColorBasis(
        mean=(mean + pca.mean_).astype(np.float32),
        components=components.astype(np.float32),
        low=low.astype(np.float32),
        high=high.astype(np.float32),
        info={
            **_kind(info),
            **numbers,
            "num_tiles_fitted": num_tiles,
            "num_dimensions": width,
            "explained_variance_ratio": [round(float(ratio), 6) for ratio in ratios],
            "explained_by_top_3": round(float(ratios[:3].sum()), 6),
            "explained_by_top_50": round(float(ratios[:50].sum()), 6),
            "share_lost_in_rounding": round(rounding / float(np.square(sample, dtype=np.float64).sum()), 6),
            "components_file": "basis.npz",
            "versions": _versions(),
        },
    )


def _squared_rounding(features: np.ndarray) -> float:
    """Expected sum of squares of what was lost when the features were stored: a twelfth of a squared step each."""
    return float(np.square(np.spacing(np.abs(features)), dtype=np.float64).sum()) / 12


def _too_flat(info: FeatureInfo) -> FeaturesError:
    return FeaturesError(
        f"the features of model {info.model!r} differ in fewer than 3 directions from tile to tile; check the weights "
        "of this model, or take other features (--pooling mean, --dtype float32)"
    )


def _with_fixed_signs(components: np.ndarray) -> np.ndarray:
    """Makes the largest loading of every component positive, so that reruns give the same colours."""
    largest = np.abs(components).argmax(axis=1)
    return components * np.sign(components[np.arange(len(components)), largest])[:, None]


def _check_enough(num_tiles: int, info: FeatureInfo, num_slides: int) -> None:
    if num_tiles < 4:
        found = "no tile" if num_tiles == 0 else f"only {num_tiles} tile(s)"
        raise FeaturesError(
            f"the {num_slides} feature file(s) of model {info.model!r} hold {found}, but three components need at "
            "least 4 tiles; check that tissue was found, or add slides"
        )


def _sampled_rows(count: int, quota: int, seed: int, slide_id: str) -> np.ndarray | slice:
    if quota >= count:
        return slice(None)
    # of the slide's name, not of its position: adding a slide leaves the draws of the others alone
    name = int.from_bytes(hashlib.sha256(slide_id.encode()).digest()[:8], "little")
    generator = np.random.default_rng([seed, name])
    return np.sort(generator.choice(count, quota, replace=False))


def _kind(info: FeatureInfo) -> dict[str, Any]:
    return {name: getattr(info, name) for name in ("model", "weights_sha256", "pooling", "mpp", "tile_px")}


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("numpy", "scikit-learn")}
    return {"dinoscope": dinoscope.__version__, "python": platform.python_version(), **packages}
