"""The answers of all models to one task side by side: scores with intervals, differences on the same resamples.

Only units whose group no model has seen in training count for a difference; what a model has seen makes a number of its
own, labelled transductive. Verdicts come later, over all tasks (verdicts.py), since they are corrected together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dinoscope.arrays import damage_named, document_in, document_of, read_arrays, write_arrays
from dinoscope.errors import FeaturesError
from dinoscope.evaluate.answers import Answers
from dinoscope.evaluate.cohort import SEEN
from dinoscope.evaluate.intervals import DRAWS, Comparison, compare, estimate
from dinoscope.evaluate.scores import Predictions, Statistic, statistic_of, statistic_of_repeats
from dinoscope.evaluate.units import Units

__all__ = ["SCORES", "Row", "TaskComparison", "compare_models", "read_comparison", "write_comparison"]

# Kind of label -> scores, the one that is judged first.
SCORES = {
    "classes": ("balanced_accuracy", "macro_f1", "auroc"),
    "number": ("r2", "pearson"),
    "survival": ("c_index",),
    "masks": ("mean_iou",),
}


@dataclass(frozen=True)
class Row:
    """One number.

    Attributes:
        measure: How it was asked, e.g. "linear".
        score: In what it is given, e.g. "balanced_accuracy".
        model: Who was asked.
        value: The score; low and high are its 95 % interval, None where one case alone was asked.
        cases: Groups that were resampled.
        units: That were asked about.
        seen: Whether the model's training saw these cases; "yes" makes the number transductive, and no verdict.
        smallest_class: Cases of the class that has fewest.
    """

    measure: str
    score: str
    model: str
    value: float
    low: float | None
    high: float | None
    cases: int
    units: int
    seen: str
    smallest_class: int


@dataclass(frozen=True)
class TaskComparison:
    """All of a task.

    Attributes:
        differences: (measure, model, reference) -> the difference in the first score of the task's kind.
        numbers: Model -> descriptive measures.
        about: Model -> what it is.
    """

    task: str
    kind: str
    rows: list[Row]
    differences: dict[tuple[str, str, str], Comparison]
    numbers: dict[str, dict[str, Any]] = field(default_factory=dict)
    about: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def compare_models(
    units: Units,
    answers: Mapping[str, Answers],
    references: Mapping[str, Sequence[str]],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> TaskComparison:
    """Scores of all models and their differences.

    Args:
        units: The task's; those of the test set count.
        answers: By model, in the order of the table, about these units.
        references: Model -> the models that it is held against.
        draws: Of cases.
        seed: Of the draws, which are the same for all models.

    Raises:
        FeaturesError: Answers are about other units.
    """
    for model, answer in answers.items():
        if len(answer.seen) != len(units):
            raise FeaturesError(
                f"task {units.task}: model {model} was asked about {len(answer.seen)} units, but there are "
                f"{len(units)} now; delete its file in answers/ and measure again"
            )
    is_test = np.array([unit.set == "test" for unit in units.units])
    yes = SEEN.index("yes")
    clean = is_test & ~np.any([answer.seen == yes for answer in answers.values()], axis=0)
    rows: list[Row] = []
    differences: dict[tuple[str, str, str], Comparison] = {}
    for measure in _measures(answers):
        asked = {model: answer for model, answer in answers.items() if measure in answer.measures}
        common = clean & np.all([_asked(answer, measure) for answer in asked.values()], axis=0)
        statistics = {model: _statistic(units, answer, measure, common) for model, answer in asked.items()}
        for model, answer in asked.items():
            rows += _rows(units, answer, measure, model, clean, draws, seed)
            transductive = is_test & (answer.seen == yes)
            if transductive.any():
                rows += _rows(units, answer, measure, model, transductive, draws, seed, seen="yes")
        if "~" in measure:  # of changed copies: beside the clean figure, without a verdict
            continue
        differences |= _differences(measure, statistics, references, draws, seed)
    return TaskComparison(
        units.task,
        units.kind,
        rows,
        differences,
        {model: dict(answer.numbers) for model, answer in answers.items() if answer.numbers},
        {model: answer.about for model, answer in answers.items()},
        [*_seen_note(answers, is_test, clean), *dict.fromkeys(n for answer in answers.values() for n in answer.notes)],
    )


def write_comparison(path: Path, found: TaskComparison) -> None:
    """Writes it all to one file (.npz), by rename."""
    keys = list(found.differences)
    document = {
        "task": found.task,
        "kind": found.kind,
        "rows": [asdict(row) for row in found.rows],
        "numbers": found.numbers,
        "about": found.about,
        "notes": found.notes,
        "differences": [
            [*key, one.difference, one.num_cases, one.smallest_class] for key, one in found.differences.items()
        ],
    }
    arrays = {str(index): found.differences[key].resampled for index, key in enumerate(keys)}
    write_arrays(path, packed=True, document=document_in(document), **arrays)


def read_comparison(path: Path) -> TaskComparison:
    """Reads it.

    Raises:
        FeaturesError: It is missing or damaged.
    """
    with damage_named(path, "comparison of models", "delete it and compare again"):
        arrays = read_arrays(path)
        document = document_of(arrays["document"])
        differences = {
            (measure, model, reference): Comparison(difference, arrays[str(index)], num_cases, smallest)
            for index, (measure, model, reference, difference, num_cases, smallest) in enumerate(
                document["differences"]
            )
        }
        rows = [Row(**row) for row in document["rows"]]
        return TaskComparison(**{**document, "rows": rows, "differences": differences})


def _seen_note(answers: Mapping[str, Answers], is_test: np.ndarray, clean: np.ndarray) -> list[str]:
    """Says where training has seen what was to be a test."""
    lost = int(is_test.sum() - clean.sum())
    if not lost or not _measures(answers):
        return []
    models = [model for model, answer in answers.items() if (answer.seen[is_test] == SEEN.index("yes")).any()]
    rest = "no verdict is left" if not clean.any() else f"verdicts rest on the other {int(clean.sum())}"
    return [f"training of {', '.join(models)} saw {lost} of {int(is_test.sum())} test units (transductive): {rest}"]


def _measures(answers: Mapping[str, Answers]) -> list[str]:
    return list(dict.fromkeys(measure for answer in answers.values() for measure in answer.measures))


def _rows(
    units: Units,
    answer: Answers,
    measure: str,
    model: str,
    chosen: np.ndarray,
    draws: int,
    seed: int,
    *,
    seen: str | None = None,
) -> list[Row]:
    """A row a score, on the chosen units as far as the model was asked about them."""
    found = []
    for score in SCORES[units.kind]:
        made = _statistic(units, answer, measure, chosen, score)
        if made is None:
            continue
        statistic, cases, num_units, smallest = made
        if cases > 1:
            guess = estimate(statistic, cases, draws=draws, seed=seed)
            value, low, high = guess.value, guess.low, guess.high
        else:
            value, low, high = float(statistic(np.ones((1, cases)))[0]), None, None
        if not np.isfinite(value):
            continue
        low, high = (None if end is None or not np.isfinite(end) else end for end in (low, high))
        told = seen or ("unknown" if (answer.seen[chosen] == SEEN.index("unknown")).any() else "no")
        found.append(Row(measure, score, model, value, low, high, cases, num_units, told, smallest))
    return found


def _asked(answer: Answers, measure: str) -> np.ndarray:
    """(N,) bool: units that the model answered about, in some repeat."""
    if measure in answer.confusions:
        return np.ones(len(answer.seen), dtype=bool)
    said = answer.said[measure]
    return np.isfinite(said.reshape(*said.shape[:2], -1)).all(axis=2).any(axis=0)


def _statistic(
    units: Units, answer: Answers, measure: str, chosen: np.ndarray, score: str | None = None
) -> tuple[Statistic, int, int, int] | None:
    """The score as a function of cases' weights, number of cases and units, and cases of the smallest class."""
    if measure in answer.confusions:
        confusions, groups = answer.confusions[measure][:, chosen], units.groups[chosen]
        names, numbers = np.unique(groups, return_inverse=True)
        if not len(names):
            return None
        return statistic_of_repeats(confusions, numbers), len(names), int(chosen.sum()), len(names)
    asked = chosen & _asked(answer, measure)
    if not asked.any():
        return None
    predictions = Predictions(units.targets[asked], answer.said[measure][:, asked], units.groups[asked])
    statistic = statistic_of(predictions, score or SCORES[units.kind][0])
    return statistic, predictions.num_cases, int(asked.sum()), predictions.smallest_class()


def _differences(
    measure: str,
    statistics: Mapping[str, tuple[Statistic, int, int, int] | None],
    references: Mapping[str, Sequence[str]],
    draws: int,
    seed: int,
) -> dict[tuple[str, str, str], Comparison]:
    found = {}
    for model, mine in statistics.items():
        for reference in references.get(model, ()):
            theirs = statistics.get(reference)
            if mine is None or theirs is None or mine[1] < 2:
                continue
            assert mine[1:3] == theirs[1:3]  # of the units that all were asked about
            found[measure, model, reference] = compare(
                mine[0], theirs[0], mine[1], min(mine[3], theirs[3]), draws=draws, seed=seed
            )
    return found
