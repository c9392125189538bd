"""Which neighbours of tiles remain when they are changed, and what features tell of the site: numbers, and sums a unit.

Shapes: N tiles, D width, U units of the task.
"""

from collections.abc import Mapping

import numpy as np

from dinoscope.errors import EvaluationError
from dinoscope.evaluate.describing import MAX_TILES
from dinoscope.evaluate.folds import balanced_rows
from dinoscope.evaluate.inputs import UnitFeatures
from dinoscope.evaluate.robust_measures import INDEX, RETAINED, SITE
from dinoscope.evaluate.robustness import SiteReadout, retention, robustness_index, site_readout
from dinoscope.evaluate.units import Units

__all__ = ["Found", "neighbours_kept", "sites_told"]

Found = tuple[dict[str, float], dict[str, np.ndarray]]
"""Numbers by name, and of those that are compared what each unit adds to them, (U, …)."""


def neighbours_kept(
    rows: np.ndarray,
    copies: Mapping[str, np.ndarray],
    cases: np.ndarray,
    labels: np.ndarray | None,
    unit_of: np.ndarray,
    num_units: int,
    notes: list[str],
) -> Found:
    """Nearest neighbours that remain under each change.

    Args:
        rows: (N, D) of unchanged tiles.
        copies: By change, (N, D).
        cases: (N,) tiles of its own case are no neighbours of a tile.
        labels: (N,) class numbers, or None.
        unit_of: (N,) number of each tile's unit.
        num_units: U.
        notes: Why there is nothing, where that is so.
    """
    numbers: dict[str, float] = {}
    sums: dict[str, np.ndarray] = {}
    try:
        for kind, changed in copies.items():
            found = retention(rows, changed, cases, labels=labels)
            numbers |= {f"{name}~{kind}": value for name, value in found.means().items() if np.isfinite(value)}
            added = np.stack([found.retained, np.ones(len(rows))], axis=1)
            sums[f"{RETAINED}~{kind}"] = _by_unit(added, unit_of, num_units)
    except EvaluationError as error:
        notes.append(f"retention: {error}")
    return numbers, sums


def sites_told(units: Units, features: UnitFeatures, seed: int, notes: list[str]) -> Found:
    """Whether features tell the site within a class, and whether class or site makes neighbours.

    Where a figure would say nothing, such as the index where classes and sites do not cross, a note says why.

    Args:
        units: The task's, of classes; those of the test set count.
        features: Tiles of all units.
        seed: Which tiles are taken where there are more than `MAX_TILES`, balanced by case, and of folds.
        notes: Gets what was left out.
    """
    test = np.flatnonzero([unit.set == "test" for unit in units.units])
    names = [units.units[index].site for index in test]
    if None in names:
        if any(names):
            notes.append(
                "sites: not all units have one, so nothing is said of them; complete column `site` (a case whose "
                "slides are of several sites has none)"
            )
        return {}, {}
    if len(set(names)) < 2:
        return {}, {}
    of = np.repeat(test, [len(features.bags[index]) for index in test])
    taken = balanced_rows(units.groups[of], MAX_TILES, seed)
    tiles = np.concatenate([features.bags[index] for index in test])[taken].astype(np.float32)
    unit = of[taken]
    about = units.targets[unit], np.array([units.units[index].site for index in unit]), units.groups[unit]
    numbers: dict[str, float] = {}
    sums: dict[str, np.ndarray] = {}
    try:
        index = robustness_index(tiles, *about, seed=seed)
        if np.isfinite(index.value):
            numbers[INDEX] = index.value
            sums[INDEX] = _by_unit(index.of_tiles, unit, len(units))
    except EvaluationError as error:
        notes.append(f"robustness index: {error}")
    try:
        told = site_readout(tiles, *about, seed=seed, class_names=units.classes)
        numbers[SITE] = float(told.statistic()(np.ones((1, len(told.cases))))[0])
        numbers["site_chance"] = told.chance
        sums[SITE] = _confusions_by_unit(told, unit, len(units))
        notes += told.left_out
    except EvaluationError as error:
        notes.append(f"site read-out: {error}")
    return numbers, sums


def _confusions_by_unit(told: SiteReadout, unit: np.ndarray, num_units: int) -> np.ndarray:
    """(U, K, S, S) tiles of each unit by site and by the site that was told, in each class that could be asked."""
    num_sites = max(map(len, told.sites.values()))
    found = np.zeros((num_units, len(told.predictions), num_sites, num_sites))
    for place, (label, predictions) in enumerate(told.predictions.items()):
        answers = predictions.said[0].argmax(axis=1)
        np.add.at(found, (unit[told.rows[label]], place, predictions.truth, answers), 1)
    return found


def _by_unit(added: np.ndarray, unit_of: np.ndarray, num_units: int) -> np.ndarray:
    sums = np.zeros((num_units, *added.shape[1:]))
    np.add.at(sums, unit_of, added)
    return sums
