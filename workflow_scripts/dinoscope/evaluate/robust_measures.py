"""Names of the measures of robustness, and how those that are no predictions are counted.

    linear~stain          a probe asked about changed copies of what it learned on unchanged: PROBE~CHANGE
    linear~unchanged      of slides, whose copies are of a sample of tiles: the same probe on that sample as it is
    linear_change~stain   the score of linear~stain less that of the unchanged tiles, so that 0 is nothing lost
    retained~stain        share of a tile's nearest neighbours that remain those of its changed copy
    site_readout          how well the site is told within a class
    robustness_index      neighbours of the same class at another site, against those of another class at the same

The last three have no direction that all agree on: features that collapsed keep their neighbours and tell no site. A
change has one where the clean figure is no worse (robust_verdicts.py). A split's name follows behind an @.

Shapes: N units, G cases, K classes, S sites, B sets of weights.
"""

from collections.abc import Iterable

import numpy as np

from dinoscope.evaluate.scores import Statistic, balanced_accuracy

__all__ = [
    "INDEX",
    "RETAINED",
    "SITE",
    "UNCHANGED",
    "change_measures",
    "change_of",
    "change_sources",
    "clean_measure",
    "has_direction",
    "is_robustness",
    "own_score",
    "statistic_of_sums",
    "sums_asked",
]

UNCHANGED = "unchanged"
RETAINED, SITE, INDEX = "retained", "site_readout", "robustness_index"
_JUDGED = ("linear", "ridge", "cox")  # nearest neighbours under changes are shown beside them
_CHANGE = "_change"


def change_of(measure: str) -> str | None:
    """The change that a measure is of, e.g. "stain"; None of unchanged tiles alone."""
    return measure.partition("@")[0].partition("~")[2] or None


def is_robustness(measure: str) -> bool:
    """Whether it is one of those above."""
    return "~" in measure or _stem(measure) in (SITE, INDEX)


def has_direction(measure: str) -> bool:
    """Whether a difference in it may be called better or worse."""
    stem = _stem(measure)
    return change_of(measure) != UNCHANGED and (stem in _JUDGED or stem.removesuffix(_CHANGE) in _JUDGED)


def own_score(measure: str) -> str | None:
    """Name of the score of a measure that has one of its own; None where the task's scores count."""
    stem = _stem(measure)
    if stem.endswith(_CHANGE):
        return "change"
    return stem if stem in (RETAINED, SITE, INDEX) else None


def change_measures(measures: Iterable[str]) -> list[str]:
    """Those of the third kind that follow from the measures that a model answered."""
    given = list(measures)
    stems = {name: _stem(name) for name in given if change_of(name) not in (None, UNCHANGED)}
    found = {name: name.replace(stem, stem + _CHANGE, 1) for name, stem in stems.items() if stem in _JUDGED}
    return [change for name, change in found.items() if clean_measure(name, given) in given]


def change_sources(measure: str, measures: Iterable[str]) -> tuple[str, str] | None:
    """What a measure of the third kind is the difference of (on unchanged tiles, on changed copies); None of others."""
    stem = _stem(measure)
    if not stem.endswith(_CHANGE):
        return None
    changed = measure.replace(stem, stem.removesuffix(_CHANGE), 1)
    return clean_measure(changed, measures), changed


def clean_measure(measure: str, measures: Iterable[str]) -> str:
    """The same on unchanged tiles: of the same sample of tiles, where there is one."""
    stem, split = _stem(measure).removesuffix(_CHANGE), measure.partition("@")[2]
    ending = f"@{split}" if split else ""
    sampled = f"{stem}~{UNCHANGED}{ending}"
    return sampled if sampled in measures else f"{stem}{ending}"


def statistic_of_sums(sums: np.ndarray) -> Statistic:
    """A measure as a function of the weights of cases, from what each case adds to it.

    Args:
        sums: (G, 2) numerators and denominators, or (G, K, S, S) tiles by their site (rows) and the site that was
            told (columns), within each class: the mean over classes of balanced accuracy.
    """
    flat = sums.reshape(len(sums), -1).astype(np.float64)

    def ratio(weights_BG: np.ndarray) -> np.ndarray:
        above, below = (weights_BG @ flat).T
        with np.errstate(invalid="ignore", divide="ignore"):
            return above / below

    def within_classes(weights_BG: np.ndarray) -> np.ndarray:
        of_classes = balanced_accuracy((weights_BG @ flat).reshape(-1, *sums.shape[1:]))
        known = np.isfinite(of_classes)
        with np.errstate(invalid="ignore"):
            return np.where(known, of_classes, 0).sum(1) / known.sum(1)

    return ratio if sums.ndim == 2 else within_classes


def sums_asked(sums: np.ndarray) -> np.ndarray:
    """(N,) bool: units that add anything."""
    return sums.reshape(len(sums), -1).any(axis=1)


def _stem(measure: str) -> str:
    return measure.partition("@")[0].partition("~")[0]
