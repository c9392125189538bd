"""Features of a task's units by one model, and what the model's training has seen of them."""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dinoscope.errors import FeaturesError
from dinoscope.evaluate.cohort import SEEN
from dinoscope.evaluate.tile_sets import ImageSet, image_files
from dinoscope.evaluate.units import Units
from dinoscope.features.writers import check_same_kind, read_features, read_info
from dinoscope.files import read_json

__all__ = ["History", "UnitFeatures", "groups_seen", "read_history", "sample_rows", "slide_features"]


@dataclass(frozen=True)
class UnitFeatures:
    """What a model gives of each unit.

    Attributes:
        about: model, sha256, width, pooling, mpp, tile_px.
        pooled: (N, D) float32 mean of all tiles.
        bags: N arrays (n, D) float16 or float32 of tiles, a sample where there are too many.
        corners_um: N arrays (n, 2), where these tiles are on their slides.
        slides: N arrays (n,) of the number of each tile's slide.
    """

    about: dict[str, Any]
    pooled: np.ndarray
    bags: list[np.ndarray]
    corners_um: list[np.ndarray]
    slides: list[np.ndarray]


@dataclass(frozen=True)
class History:
    """What is known of the data that a model was trained on.

    Attributes:
        slides: Ids of the slides, of all runs that it comes from.
        folders: Folders of images.
        is_known: Whether that is all; not so of weights that somebody else has trained.
    """

    slides: frozenset[str] = frozenset()
    folders: tuple[Path, ...] = ()
    is_known: bool = True


def read_history(seals: Iterable[Path], folders: Iterable[Path], *, is_known: bool) -> History:
    """From the seals of the runs that a model comes from."""
    slides = {slide for seal in seals for slide in read_json(seal).get("slides", [])}
    return History(frozenset(slides), tuple(folders), is_known)


def groups_seen(
    units: Units,
    history: History,
    case_of: Mapping[str, str],
    images: ImageSet | None = None,
    pattern: str | None = None,
) -> np.ndarray:
    """(N,) int8 an index of `SEEN` a unit: whether training has seen anything of its group.

    Args:
        units: The task's.
        history: Of the model.
        case_of: slide_id -> case_id, of the slide table; where a slide of the training is not in it, "no" is not told.
        images: The images that the units number. A group is seen where one of its images, by content, lies in a folder
            that the model was trained on.
        pattern: Where groups are found in names by a regular expression, a file of such a folder in whose name it
            finds a group stands for the group too: another crop of the same parent.
    """
    seen = {case_of[slide] for slide in history.slides if slide in case_of}
    is_known = history.is_known
    if images is None:
        is_known &= history.slides <= case_of.keys()  # whose a slide was that the table no longer has is not known
    else:
        numbers = {group: unit.group for group, unit in zip(images.groups, units.units, strict=True)}
        seen = {numbers[group] for group in _image_groups_seen(images, history.folders, pattern) if group in numbers}
    rest = "no" if is_known else "unknown"
    told = ["yes" if unit.group in seen else rest for unit in units.units]
    return np.array([SEEN.index(name) for name in told], dtype=np.int8)


def slide_features(units: Units, files: Sequence[Path], *, max_tiles: int, seed: int) -> UnitFeatures:
    """Reads the features of each unit's slides; units of skipped slides alone have no tile, and a mean of 0.

    Args:
        units: The task's.
        files: One a slide, of one model; more than the units' slides do no harm.
        max_tiles: Of all units together, as equal as possible a slide; the mean is over all tiles whatever this is.
        seed: Which tiles are taken where there are more.

    Raises:
        FeaturesError: A slide has no file, or a file is damaged or of another model.
    """
    infos = {path: read_info(path) for path in files}
    wanted = list(dict.fromkeys(slide for unit in units.units for slide in unit.slides))
    of_slide = {info.slide_id: path for path, (info, _, _) in infos.items()}
    missing = [slide for slide in wanted if slide not in of_slide]
    if missing:
        raise FeaturesError(f"task {units.task}: there are no features of slide {missing[0]!r}; extract them first")
    check_same_kind({of_slide[slide]: infos[of_slide[slide]][0] for slide in wanted})
    counts = {slide: infos[of_slide[slide]][1] for slide in wanted}
    quota = _quotas(counts, max_tiles)
    numbers = {slide: number for number, slide in enumerate(wanted)}
    pooled, bags, corners_um, slides = [], [], [], []
    for unit in units.units:
        total, rows, of = 0.0, [], []
        corners_um.append([])
        for slide in unit.slides:
            found = read_features(of_slide[slide])
            total = total + found.features.sum(axis=0, dtype=np.float64)
            kept = sample_rows(counts[slide], quota[slide], seed, slide)
            rows.append(found.features[kept])
            corners_um[-1].append(found.coords[kept] * found.info.level0_mpp)
            of.append(np.full(len(kept), numbers[slide]))
        pooled.append((total / max(1, sum(counts[slide] for slide in unit.slides))).astype(np.float32))
        bags.append(np.concatenate(rows))
        slides.append(np.concatenate(of))
    info = infos[of_slide[wanted[0]]][0]
    about = {"model": info.model, "sha256": info.weights_sha256, "width": len(pooled[0]), "pooling": info.pooling}
    about |= {
        "mpp": info.mpp,
        "tile_px": info.tile_px,
        "tiles": sum(counts.values()),
        "tiles_taken": sum(map(len, bags)),
    }
    return UnitFeatures(about, np.stack(pooled), bags, [np.concatenate(of_unit) for of_unit in corners_um], slides)


def _quotas(counts: Mapping[str, int], limit: int) -> dict[str, int]:
    """Rows to take of each slide: as equal as their numbers allow, `limit` in all."""
    left, quotas = limit, {}
    for place, slide in enumerate(sorted(counts, key=lambda name: counts[name])):
        quotas[slide] = min(counts[slide], max(1, left // (len(counts) - place)))
        left -= quotas[slide]
    return quotas


def sample_rows(count: int, quota: int, seed: int, slide: str) -> np.ndarray:
    """Tiles of a slide, ascending: all of `count`, or `quota` of them, drawn by seed and the slide's name alone."""
    if quota >= count:
        return np.arange(count)
    digest = hashlib.sha256(f"{seed}\n{slide}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    return np.sort(rng.choice(count, quota, replace=False))


def _image_groups_seen(images: ImageSet, folders: Iterable[Path], pattern: str | None) -> set[str]:
    sizes: dict[int, list[int]] = {}
    for index, file in enumerate(images.files):
        sizes.setdefault((images.folder / file).stat().st_size, []).append(index)
    digests: dict[int, bytes] = {}
    found = set()
    for folder in folders:
        for file in image_files(folder) if folder.is_dir() else []:
            path = folder / file
            if pattern is not None and (match := re.search(pattern, file)):
                found.add(match.group(1) if match.re.groups else match.group(0))
            # the content is read only where an image of the set has the very same size
            if candidates := sizes.get(path.stat().st_size):
                mine = _digest(path)
                for index in candidates:
                    if index not in digests:
                        digests[index] = _digest(images.folder / images.files[index])
                    if digests[index] == mine:
                        found.add(images.groups[index])
    return found


def _digest(path: Path) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
