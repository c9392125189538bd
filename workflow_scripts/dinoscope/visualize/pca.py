"""PCA maps: the tiles of a slide, coloured by the first three principal components of their features.

One basis a model, fitted once over the training slides and kept, so that a colour means the same on every slide of that
model (but not from model to model: each has components of its own). Red, green and blue are components 1, 2 and 3.

Shapes: N tiles, D feature dimensions, K components.
"""

import hashlib
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import dinoscope
from dinoscope.arrays import damage_named, read_arrays, write_arrays
from dinoscope.errors import FeaturesError
from dinoscope.features.writers import FeatureFile, FeatureInfo, check_same_kind, read_features, read_info
from dinoscope.files import read_json, write_json
from dinoscope.visualize.color_basis import DARKEST, ColorBasis, fit_colors, kind_of

__all__ = ["DARKEST", "ColorBasis", "fit_basis", "load_basis", "rounding_note", "sample_features", "save_basis"]

MAX_TILES = 200_000
_ARRAYS = ("mean", "components", "low", "high")
MAX_VALUES = 2**28  # 1 GiB of float32, whatever the width of the features


def fit_basis(
    paths: Sequence[str | os.PathLike[str]], *, seed: int = 0, max_tiles: int = MAX_TILES, background: str = "keep"
) -> ColorBasis:
    """Fits one basis over the features of the slides that are given.

    With more than `max_tiles` tiles a sample is taken, as equal as possible a slide, so that one large slide does not
    choose the colours of all. The result does not depend on the order of `paths`.

    Args:
        paths: Feature files of one model.
        seed: Of that sample.
        max_tiles: Upper bound of tiles to fit on; fewer when features are very wide.
        background: What becomes of background, see `color_basis.fit_colors`.

    Raises:
        FeaturesError: Files of different models or tile sets, a slide twice, values that are not finite, or too few
            tiles.
    """
    info, counts, files = sample_features(paths, seed, max_tiles)
    parts, rounding = [], 0.0
    for file in files:
        rounding += _squared_rounding(file.features)
        parts.append(file.features.astype(np.float32))
    sample = np.concatenate(parts)
    num_sampled = len(sample)
    basis = fit_colors(sample, f"model {info.model!r}", background=background)  # centres the sample in place
    numbers = {"slides": list(counts), "num_slides": len(counts), "num_tiles": sum(counts.values()), "seed": seed}
    about = {
        **kind_of(info),
        **numbers,  # planning fits on the same slides again
        **basis.info,
        "num_tiles_background": num_sampled - basis.info["num_tiles_fitted"],
        "share_lost_in_rounding": round(rounding / float(np.square(sample, dtype=np.float64).sum()), 6),
        "components_file": "basis.npz",
        "versions": _versions(),
        "mean": [round(float(value), 6) for value in basis.mean],
    }
    return replace(basis, info=about)


def sample_features(
    paths: Sequence[str | os.PathLike[str]], seed: int, max_tiles: int
) -> tuple[FeatureInfo, dict[str, int], Iterator[FeatureFile]]:
    """Opens the features of slides of one model, at most `max_tiles` tiles of them, as equal as possible a slide.

    Returns:
        What the first file says about itself, the number of tiles of every slide in the order of their ids, and the
        files with the rows that were drawn, in the same order, read one by one.

    Raises:
        FeaturesError: As for `fit_basis`, but for values that are not finite, which the files raise when read.
    """
    found = {path: read_info(path) for path in paths}
    check_same_kind({path: info for path, (info, _, _) in found.items()})
    _check_same_tiles({path: info for path, (info, _, _) in found.items()})
    found = dict(sorted(found.items(), key=lambda item: item[1][0].slide_id))
    info, _, width = next(iter(found.values()))
    counts = {slide.slide_id: num_rows for slide, num_rows, _ in found.values()}
    _check_enough(sum(counts.values()), info, [os.fspath(path) for path in found])
    quotas = balanced_quotas(list(counts.values()), min(max_tiles, MAX_VALUES // width))
    drawn = (
        read_features(path, _sampled_rows(count, quota, seed, slide.slide_id))
        for (path, (slide, count, _)), quota in zip(found.items(), quotas, strict=True)
    )
    return info, counts, drawn


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
    arrays = {name: getattr(basis, name) for name in _ARRAYS}
    if basis.gate is not None:
        arrays |= {"gate": basis.gate, "gate_below": np.float32(basis.gate_below)}
    write_arrays(folder / "basis.npz", **arrays)
    write_json(folder / "basis.json", basis.info)


def load_basis(folder: str | os.PathLike[str]) -> ColorBasis:
    """Reads what `save_basis` wrote.

    Raises:
        FeaturesError: A file is missing or damaged.
    """
    folder = Path(folder)
    with damage_named(folder, "PCA basis", "run pca.py fit again"):
        info, arrays = read_json(folder / "basis.json"), read_arrays(folder / "basis.npz")
        gate = {"gate": arrays["gate"], "gate_below": float(arrays["gate_below"])} if "gate" in arrays else {}
        return ColorBasis(**{name: arrays[name] for name in _ARRAYS}, info=info, **gate)


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


def _squared_rounding(features: np.ndarray) -> float:
    """Expected sum of squares of what was lost when the features were stored: a twelfth of a squared step each."""
    return float(np.square(np.spacing(np.abs(features)), dtype=np.float64).sum()) / 12


def _check_same_tiles(infos: Mapping[str | os.PathLike[str], FeatureInfo]) -> None:
    """Refuses a slide that is given twice, and tiles that overlap more on one slide than on another."""
    seen: dict[str, str | os.PathLike[str]] = {}
    (first_path, first), *_ = infos.items()
    for path, info in infos.items():
        if info.slide_id in seen:
            other = infos[seen[info.slide_id]]
            tiles = "the same tiles" if other.manifest_hash == info.manifest_hash else "other tiles"
            raise FeaturesError(
                f"{path}: slide {info.slide_id!r} is there twice, with {tiles} in {seen[info.slide_id]}; give one file "
                "a slide"
            )
        seen[info.slide_id] = path
        if info.overlap_px != first.overlap_px:
            raise FeaturesError(
                f"{path}: its tiles overlap by {info.overlap_px} px, those of {first_path} by {first.overlap_px} px: "
                "they come from different tile manifests; extract the features of one tile set again"
            )


def _check_enough(num_tiles: int, info: FeatureInfo, paths: Sequence[str]) -> None:
    if num_tiles < 4:
        found = "no tile" if num_tiles == 0 else f"only {num_tiles} tile(s)"
        others = f" and {len(paths) - 1} more feature file(s)" if len(paths) > 1 else ""
        hold = "hold" if others else "holds"
        raise FeaturesError(
            f"{paths[0]}{others} of model {info.model!r} {hold} {found}, but three components need at "
            "least 4 tiles; check that tissue was found, or add slides"
        )


def _sampled_rows(count: int, quota: int, seed: int, slide_id: str) -> np.ndarray | slice:
    if quota >= count:
        return slice(None)
    # of the slide's name, not of its position: adding a slide leaves the draws of the others alone
    name = int.from_bytes(hashlib.sha256(slide_id.encode()).digest()[:8], "little")
    generator = np.random.default_rng([seed, name])
    return np.sort(generator.choice(count, quota, replace=False))


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("numpy", "scikit-learn")}
    return {"dinoscope": dinoscope.__version__, "python": platform.python_version(), **packages}
