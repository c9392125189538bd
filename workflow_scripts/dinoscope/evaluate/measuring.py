"""The answers of one model to one task: which measures there are for which kind of label, on which folds.

Folds depend on labels, cases and the seed alone, so all models are asked the same, with the same budget of tuning.
Only units of the test set are asked or learned from.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dinoscope.errors import EvaluationError
from dinoscope.evaluate.answers import Answers
from dinoscope.evaluate.folds import (
    Fold,
    cases_of_strata,
    grouped_folds,
    leave_one_site_out,
    preserved_site_folds,
    strata_of_cases,
    strata_of_survival,
)
from dinoscope.evaluate.inputs import UnitFeatures
from dinoscope.evaluate.mil import attention_probe
from dinoscope.evaluate.probe import CLEAN, few_shot, knn_probe, linear_probe, ridge_probe
from dinoscope.evaluate.scores import Predictions
from dinoscope.evaluate.shifted_answers import Found, neighbours_kept, sites_told
from dinoscope.evaluate.survival import MIN_EVENTS, cox_probe
from dinoscope.evaluate.tuning import fitted_on_fewer
from dinoscope.evaluate.units import Units

__all__ = ["SPLITS", "Settings", "answer_classes", "answer_values", "probe_classes", "test_rows"]

_log = logging.getLogger(__name__)
SPLITS = ("grouped", "leave-one-site-out", "preserved-site")


@dataclass(frozen=True)
class Settings:
    """How models are asked.

    Attributes:
        folds: Of the cross-validation; fewer where a class has fewer cases.
        repeats: Of the cross-validation.
        splits: Some of `SPLITS`; measures on others than the first carry its name behind an @.
        seed: Of folds and draws.
        attention: Whether attention MIL is trained, which takes by far the most time.
    """

    folds: int = 5
    repeats: int = 5
    splits: tuple[str, ...] = ("grouped",)
    seed: int = 0
    attention: bool = True


def answer_classes(
    units: Units,
    pooled: np.ndarray,
    settings: Settings,
    features: UnitFeatures | None = None,
    shifted: Mapping[str, np.ndarray] | None = None,
) -> Answers:
    """All about classes: `probe_classes`, which neighbours remain under changes, and what features tell of sites.

    Args:
        units: The task's.
        pooled: (N, D) a row a unit.
        settings: How.
        features: With the bags, for units of slides.
        shifted: Features (N, D) of changed copies of the units.
    """
    answers = probe_classes(units, pooled, settings, features, shifted)
    test = test_rows(units)
    if not len(test):
        return answers
    if shifted:
        copies = {kind: of[test].astype(np.float32) for kind, of in shifted.items()}
        labels, cases = units.targets[test], units.groups[test]
        rows = pooled[test].astype(np.float32)
        _add(answers, neighbours_kept(rows, copies, cases, labels, test, len(units), answers.notes))
    if features is not None:
        _add(answers, sites_told(units, features, settings.seed, answers.notes))
    return answers


def probe_classes(
    units: Units,
    pooled: np.ndarray,
    settings: Settings,
    features: UnitFeatures | None = None,
    shifted: Mapping[str, np.ndarray] | None = None,
) -> Answers:
    """k-NN, linear probe and few-shot of a unit's mean feature and, where units are bags of tiles, attention MIL.

    Args:
        units: The task's.
        pooled: (N, D) a row a unit.
        settings: How.
        features: With the bags, for units of slides.
        shifted: Features of changed copies of the units: the same probes are asked about these too, by names
            MEASURE~CHANGE (robust_measures.py).
    """
    test, notes = test_rows(units), []
    if not len(test):
        return _ordered(units, {}, notes)
    names = [units.classes[number] for number in np.unique(units.targets[test])]
    labels, cases = _dense_numbers(units.targets[test]), units.groups[test]
    rows = np.ascontiguousarray(pooled[test], dtype=np.float32)
    copies = {kind: np.ascontiguousarray(of[test], dtype=np.float32) for kind, of in (shifted or {}).items()}
    said: dict[str, np.ndarray] = {}
    for split in settings.splits:
        folds = _folds(split, labels, cases, _sites(units, test), settings, notes, names)
        if folds is None:
            continue
        found: dict[str, Predictions] = {}
        for k, of_copies in knn_probe(rows, labels, cases, folds, tested=copies).items():
            found |= {_copy_name(f"knn_{k}", kind): of for kind, of in of_copies.items()}
        linear = linear_probe(rows, labels, cases, folds, tested=copies, seed=settings.seed).predictions
        found |= {_copy_name("linear", kind): of for kind, of in linear.items()}
        notes += fitted_on_fewer(folds)
        found |= {f"few_shot_{n}": one for n, one in few_shot(rows, labels, cases, folds, seed=settings.seed).items()}
        found |= _attention(features, test, labels, cases, folds, "classes", settings)
        said |= _named(found, split, settings, units, test, labels)
    return _ordered(units, said, notes)


def answer_values(
    units: Units,
    pooled: np.ndarray,
    settings: Settings,
    features: UnitFeatures | None = None,
    shifted: Mapping[str, np.ndarray] | None = None,
) -> Answers:
    """Ridge regression of numbers, Cox regression of times with events, and attention MIL of either.

    Args:
        units: The task's.
        pooled: (N, D) a row a unit.
        settings: How.
        features: With the bags, for attention MIL.
        shifted: Features (N, D) of changed copies of the units, which the same regressions are asked about.
    """
    test, notes = test_rows(units), []
    if not len(test):
        return _ordered(units, {}, notes)
    truth, cases = units.targets[test], units.groups[test]
    is_survival = units.kind == "survival"
    if is_survival and truth[:, 1].sum() < MIN_EVENTS:
        notes.append(f"{truth[:, 1].sum():.0f} events among {len(test)} test units, at least {MIN_EVENTS} are needed")
        return _ordered(units, {}, notes)
    strata = (strata_of_survival if is_survival else strata_of_cases)(truth, cases, settings.folds)
    rows = np.ascontiguousarray(pooled[test], dtype=np.float32)
    copies = {kind: np.ascontiguousarray(of[test], dtype=np.float32) for kind, of in (shifted or {}).items()}
    said: dict[str, np.ndarray] = {}
    for split in settings.splits:
        folds = _folds(split, strata, cases, _sites(units, test), settings, notes, None)
        if folds is None:
            continue
        how: dict[str, Any] = {"tested": copies, "seed": settings.seed}
        if is_survival:
            probed = cox_probe(rows, *truth.T, cases, folds, **how).predictions
        else:
            probed = ridge_probe(rows, truth, cases, folds, **how).predictions
        name = "cox" if is_survival else "ridge"
        found = {_copy_name(name, kind): of for kind, of in probed.items()}
        kind = "survival" if is_survival else "values"
        found |= _attention(features, test, truth, cases, folds, kind, settings)
        said |= _named(found, split, settings, units, test, None)
    return _ordered(units, said, notes)


def _copy_name(measure: str, kind: str) -> str:
    return measure if kind == CLEAN else f"{measure}~{kind}"


def _add(answers: Answers, found: Found) -> None:
    answers.numbers.update(found[0])
    answers.sums.update(found[1])


def _attention(
    features: UnitFeatures | None,
    test: np.ndarray,
    truth: np.ndarray,
    cases: np.ndarray,
    folds: Sequence[Fold],
    kind: str,
    settings: Settings,
) -> dict[str, Predictions]:
    """Attention MIL, where units are bags of tiles; the linear probe of the bags' means is what it has to beat."""
    if features is None or not settings.attention:
        return {}
    bags = [features.bags[index] for index in test]
    return {"attention_mil": attention_probe(bags, truth, cases, folds, kind=kind, seed=settings.seed).predictions}


def test_rows(units: Units) -> np.ndarray:
    """Numbers of the units that are asked and learned from."""
    return np.flatnonzero([unit.set == "test" for unit in units.units])


def _dense_numbers(labels: np.ndarray) -> np.ndarray:
    """Numbers without gaps: a class may have selection cases only."""
    return np.unique(labels, return_inverse=True)[1]


def _sites(units: Units, test: np.ndarray) -> np.ndarray | None:
    sites = [units.units[index].site for index in test]
    return None if None in sites else np.array(sites)


def _folds(
    split: str,
    labels: np.ndarray,
    cases: np.ndarray,
    sites: np.ndarray | None,
    settings: Settings,
    notes: list[str],
    names: Sequence[str] | None,
) -> list[Fold] | None:
    """Folds of that kind; None, with a note of why, where the labels do not allow any.

    Those of classes have their `names`; of numbers and survival, labels are strata.
    """
    try:
        if split == "grouped":
            number = _number_of_folds(labels, cases, settings.folds, notes, names)
            return grouped_folds(labels, cases, folds=number, repeats=settings.repeats, seed=settings.seed)
        if sites is None:
            raise EvaluationError(
                "not all units have one site; complete column `site` of the slide table (a case whose slides are of "
                "several sites has none)"
            )
        if split == "leave-one-site-out":
            return leave_one_site_out(labels, cases, sites)
        return preserved_site_folds(labels, cases, sites, repeats=settings.repeats, seed=settings.seed)
    except EvaluationError as error:
        notes.append(f"split {split}: {error}")
        _log.warning("split %s: %s", split, error)
        return None


def _number_of_folds(
    labels: np.ndarray, cases: np.ndarray, wanted: int, notes: list[str], names: Sequence[str] | None
) -> int:
    """As many as are wanted, or as the rarest class has cases.

    Raises:
        EvaluationError: Not even two.
    """
    counts = cases_of_strata(labels, cases)
    if len(counts) < 2:
        same = f"are of one class, {names[0]}" if names else "have the same value"
        raise EvaluationError(f"all test units {same}; there is nothing to tell apart")
    fewest = int(np.argmin(counts))
    if counts[fewest] < 2 and names:
        raise EvaluationError(
            f"class {names[fewest]} has one test case only, so that none is left to ask about; correct the label if it "
            "is mistyped, empty it, or label more cases"
        )
    if counts[fewest] < 2:
        raise EvaluationError(f"there are {len(np.unique(cases))} test cases, and at least four are needed")
    number = min(wanted, counts[fewest])
    if number < wanted:
        why = f"class {names[fewest]} has {number} cases" if names else f"there are {len(np.unique(cases))} cases"
        notes.append(f"{number} folds instead of {wanted}: {why}")
    return number


def _named(
    found: Mapping[str, Predictions],
    split: str,
    settings: Settings,
    units: Units,
    test: np.ndarray,
    labels: np.ndarray | None,
) -> dict[str, np.ndarray]:
    """Answers for all units, NaN for those that were not asked; classes by their numbers in the task."""
    suffix = "" if split == settings.splits[0] else f"@{split}"
    named = {}
    for name, predictions in found.items():
        given = predictions.said
        if labels is not None and given.shape[2] < len(units.classes):
            present = np.unique(units.targets[test])
            wider = np.zeros((*given.shape[:2], len(units.classes)))
            wider[..., present] = given
            wider[np.isnan(given).any(axis=2)] = np.nan
            given = wider
        whole = np.full((len(given), len(units), *given.shape[2:]), np.nan, dtype=np.float32)
        whole[:, test] = given
        named[name + suffix] = whole
    return named


def _ordered(units: Units, said: dict[str, np.ndarray], notes: list[str]) -> Answers:
    """Answers with the measure that is most often meant first."""
    first = [name for name in ("linear", "ridge", "cox") if name in said]
    order = [*first, *(name for name in said if name not in first)]
    about: dict[str, Any] = {}
    return Answers(about, np.zeros(len(units), dtype=np.int8), {name: said[name] for name in order}, notes=notes)
