"""Robustness: do features stay what they are when stain, focus or scanner change, and do they tell the site?

Always beside the figure on unchanged tiles. Features that are nearly the same for every tile move little, and must not
win by it: what they tell apart is told next to how much they move.

Shapes: N tiles, D width, K neighbours, G cases.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dinoscope.errors import EvaluationError
from dinoscope.evaluate.folds import balanced_rows, grouped_folds
from dinoscope.evaluate.knn import neighbours
from dinoscope.evaluate.probe import CLEAN, linear_probe
from dinoscope.evaluate.scores import Predictions, Statistic, score, statistic_of

__all__ = [
    "Beside",
    "Retention",
    "RobustnessIndex",
    "SiteReadout",
    "beside_clean",
    "retention",
    "robustness_index",
    "site_readout",
]

_SAME = 1e-5  # cosines that differ by less are of the same features, for float32
_CELL_ROWS = 200
MIN_CELL_CASES = 2


@dataclass(frozen=True)
class Beside:
    """A score on unchanged tiles and, by the same regression, on their changed copies."""

    clean: float
    shifted: float


@dataclass(frozen=True)
class Retention:
    """What nearest neighbours remain those of a changed tile, and what they are worth. One number a tile.

    Attributes:
        retained: (N,) share of the k nearest clean tiles of other cases that are the same for the changed copy.
        itself: (N,) whether the changed copy's nearest clean tile of all is the tile that it was made from.
        itself_clean: (N,) whether an unchanged copy's is, no other being as near: false wherever features collapse.
        alike: (N,) share of the k nearest of the changed copy that have its class; NaN without labels.
        alike_clean: (N,) the same of the unchanged tile.
        chance: What `retained` would be for neighbours drawn at random.
        k: Number of neighbours.
    """

    retained: np.ndarray
    itself: np.ndarray
    itself_clean: np.ndarray
    alike: np.ndarray
    alike_clean: np.ndarray
    chance: float
    k: int

    def means(self) -> dict[str, float]:
        """Means over tiles, and `chance`."""
        names = ("retained", "itself", "itself_clean", "alike", "alike_clean")
        return {name: float(np.mean(getattr(self, name))) for name in names} | {"chance": self.chance}


@dataclass(frozen=True)
class SiteReadout:
    """How well the site is told from features, within a class, by tiles of cases that were not learned from.

    Attributes:
        predictions: Class number -> answers.
        sites: Class number -> the sites that it has enough cases of, in the order of the answers.
        rows: Class number -> the tiles that were asked, in the order of the answers.
        chance: Balanced accuracy of knowing nothing, the mean over classes; features that tell more have learned the
            site. Colour alone often does: ask the colour baseline the same.
        left_out: What could not be asked, and why.
    """

    predictions: dict[int, Predictions]
    sites: dict[int, tuple[str, ...]]
    rows: dict[int, np.ndarray]
    chance: float
    left_out: tuple[str, ...]

    @property
    def cases(self) -> np.ndarray:
        """(G,) all that are asked, sorted: what the statistic's weights belong to."""
        return np.unique(np.concatenate([found.cases for found in self.predictions.values()]))

    def statistic(self, measure: str = "balanced_accuracy") -> Statistic:
        """Mean over classes, as a function of the weights of `cases`."""
        parts = []
        for found in self.predictions.values():
            parts.append((statistic_of(found, measure), np.searchsorted(self.cases, np.unique(found.cases))))
        return lambda weights_BG: np.mean([of_class(weights_BG[:, columns]) for of_class, columns in parts], axis=0)


@dataclass(frozen=True)
class RobustnessIndex:
    """Whether neighbours are of the same class at another site rather than of another class at the same site.

    Attributes:
        value: 1: class alone counts; 0: site alone; 0.5: neither more than the other, as in noise.
        num_pairs: Pairs of two classes at two sites that it was measured on.
        k: Neighbours a tile.
        cases: (G,) sorted.
        for_class: (G,) neighbours of the same class at the other site, of the tiles of each case.
        for_site: (G,) neighbours of the other class at the same site.
        of_tiles: (N, 2) neighbours of the first kind, and of both, of each tile that there was.
    """

    value: float
    num_pairs: int
    k: int
    cases: np.ndarray
    for_class: np.ndarray
    for_site: np.ndarray
    of_tiles: np.ndarray

    def statistic(self) -> Statistic:
        """The index as a function of the weights of `cases`."""

        def of_weights(weights_BG: np.ndarray) -> np.ndarray:
            by_class, by_site = weights_BG @ self.for_class, weights_BG @ self.for_site
            with np.errstate(invalid="ignore"):
                return by_class / (by_class + by_site)

        return of_weights


def beside_clean(predictions: Mapping[str, Predictions], measure: str) -> dict[str, Beside]:
    """Scores of the copies that a probe was asked about (`tested`), each beside that of the unchanged tiles."""
    clean = score(predictions[CLEAN], measure)
    return {name: Beside(clean, score(found, measure)) for name, found in predictions.items() if name != CLEAN}


def retention(
    features: np.ndarray, shifted: np.ndarray, cases: np.ndarray, *, labels: np.ndarray | None = None, k: int = 10
) -> Retention:
    """Compares the nearest neighbours (by cosine, centred) of tiles and of their changed copies, among unchanged tiles.

    Args:
        features: (N, D) of unchanged tiles, at least k of other cases for each.
        shifted: (N, D) of their changed copies.
        cases: (N,) cases; tiles of its own case are no neighbours of a tile.
        labels: (N,) class numbers, or None.
        k: K.

    Raises:
        EvaluationError: A tile has fewer than k tiles of other cases.
    """
    names, case, counts = np.unique(cases, return_inverse=True, return_counts=True)
    if len(features) - counts.max() < k:
        raise EvaluationError(
            f"case {names[counts.argmax()]} has {counts.max()} of {len(features)} tiles, so that not every tile has "
            f"{k} neighbours of other cases; ask for fewer neighbours or give more cases"
        )
    center, others = features.mean(0, dtype=np.float64), (case, case)
    before, _ = neighbours(features, features, k, exclude_groups=others, center=center)
    after, _ = neighbours(shifted, features, k, exclude_groups=others, center=center)
    retained = np.array([len(np.intersect1d(a, b)) for a, b in zip(before, after, strict=True)]) / k
    same, two = neighbours(features, features, 2, center=center)
    nearest, _ = neighbours(shifted, features, 1, center=center)
    rows = np.arange(len(features))
    itself_clean = (same[:, 0] == rows) & (two[:, 0] - two[:, 1] > _SAME)
    unknown = np.full(len(features), np.nan)
    alike = [unknown if labels is None else (labels[near] == labels[:, None]).mean(1) for near in (after, before)]
    chance = float(np.mean(k / (len(features) - counts[case])))
    # a copy of collapsed features finds a tile by rounding alone
    return Retention(retained, (nearest[:, 0] == rows) & itself_clean, itself_clean, *alike, chance, k)


def site_readout(
    features: np.ndarray,
    classes: np.ndarray,
    sites: np.ndarray,
    cases: np.ndarray,
    *,
    folds: int = 5,
    repeats: int = 1,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
) -> SiteReadout:
    """A linear probe of the site (or scanner), within each class, on folds by case.

    Within a class, for otherwise a probe of the site reads the disease that the site treats.

    Args:
        features: (N, D).
        classes: (N,) class numbers.
        sites: (N,).
        cases: (N,).
        folds: By case; sites with fewer cases of a class are left out of it.
        repeats: Of the folds.
        seed: Of the folds.
        class_names: For messages.

    Raises:
        EvaluationError: No class has two sites with enough cases.
    """
    predictions, names, asked, left_out = {}, {}, {}, []
    for label in np.unique(classes):
        called = label if class_names is None else class_names[label]
        of_class = np.flatnonzero(classes == label)
        enough = []
        for site in np.unique(sites[of_class]):
            number = len(np.unique(cases[of_class[sites[of_class] == site]]))
            if number >= folds:
                enough.append(site)
            else:
                left_out.append(f"class {called} at site {site}: {number} cases, {folds} folds need as many")
        if len(enough) < 2:
            left_out.append(f"class {called}: {len(enough)} sites with enough cases, two are needed")
            continue
        rows = of_class[np.isin(sites[of_class], enough)]
        site = np.searchsorted(enough, sites[rows])
        split = grouped_folds(site, cases[rows], folds=folds, repeats=repeats, seed=seed)
        found = linear_probe(features[rows], site, cases[rows], split, seed=seed)
        predictions[int(label)], names[int(label)] = found.predictions[CLEAN], tuple(map(str, enough))
        asked[int(label)] = rows
    if not predictions:
        raise EvaluationError(
            f"the site cannot be read within any class ({'; '.join(left_out)}); more cases, or a class that several "
            "sites have, would be needed"
        )
    chance = float(np.mean([1 / len(found) for found in names.values()]))
    return SiteReadout(predictions, names, asked, chance, tuple(left_out))


def robustness_index(
    features: np.ndarray, classes: np.ndarray, sites: np.ndarray, cases: np.ndarray, *, k: int = 10, seed: int = 0
) -> RobustnessIndex:
    """Robustness index after de Jong et al. 2025 (arXiv:2501.18055) and its balanced form (Kömen et al. 2025,
    arXiv:2507.17845).

    For every two classes at every two sites, of which all four combinations have cases, the tiles of the four are
    drawn in equal number. Of the k nearest neighbours (by cosine, centred) of each tile, those of the same case left
    out, those of the same class at the other site count for it, those of the other class at the same site against it.

    Args:
        features: (N, D).
        classes: (N,).
        sites: (N,).
        cases: (N,).
        k: Neighbours a tile; fewer where a combination has few tiles.
        seed: Of the tiles that are drawn, at most 200 a combination, balanced by case.

    Raises:
        EvaluationError: Classes and sites do not cross: no two classes are both at two sites, two cases of each.
    """
    names, case = np.unique(cases, return_inverse=True)
    of_tiles, num_pairs, used = np.zeros((len(features), 2)), 0, 0
    for cells in _crossings(classes, sites, case):
        size = min(_CELL_ROWS, *map(len, cells))
        rows = np.concatenate([cell[balanced_rows(case[cell], size, seed)] for cell in cells])
        of_class, of_site = np.repeat([0, 0, 1, 1], size), np.repeat([0, 1, 0, 1], size)
        its_case, drawn = case[rows], features[rows]
        most = min(k, size)
        near, _ = neighbours(drawn, drawn, most, exclude_groups=(its_case, its_case), center=drawn.mean(0))
        there, same_class, same_site = near >= 0, of_class[near] == of_class[:, None], of_site[near] == of_site[:, None]
        counts = (there & same_class & ~same_site).sum(1), (there & (same_class != same_site)).sum(1)
        of_tiles[rows] += np.stack(counts, axis=1)
        num_pairs, used = num_pairs + 1, max(used, most)
    if not num_pairs:
        raise EvaluationError(
            f"classes and sites do not cross: no two of {len(np.unique(classes))} classes both have {MIN_CELL_CASES} "
            f"cases at each of two of {len(np.unique(sites))} sites, so that a robustness index would say nothing; "
            "leave it out"
        )
    for_class, total = (np.bincount(case, column, len(names)) for column in of_tiles.T)
    asked = np.isin(np.arange(len(names)), _cases_of(_crossings(classes, sites, case), case))
    value = float(for_class.sum() / total.sum()) if total.any() else float("nan")
    for_site = total - for_class
    return RobustnessIndex(value, num_pairs, used, names[asked], for_class[asked], for_site[asked], of_tiles)


def _crossings(classes: np.ndarray, sites: np.ndarray, case: np.ndarray) -> Iterator[list[np.ndarray]]:
    """Rows of the four combinations of two classes and two sites, where all have enough cases."""
    rows_of = {
        (label, site): np.flatnonzero((classes == label) & (sites == site))
        for label in np.unique(classes)
        for site in np.unique(sites)
    }
    enough = {key for key, rows in rows_of.items() if len(np.unique(case[rows])) >= MIN_CELL_CASES}
    for labels in itertools.combinations(np.unique(classes), 2):
        for places in itertools.combinations(np.unique(sites), 2):
            keys = list(itertools.product(labels, places))
            if enough.issuperset(keys):
                yield [rows_of[key] for key in keys]


def _cases_of(crossings: Iterator[Sequence[np.ndarray]], case: np.ndarray) -> np.ndarray:
    return np.unique(np.concatenate([case[rows] for cells in crossings for rows in cells]))
