"""The answers of all models to one task side by side: scores with intervals, differences on the same resamples.

Only units whose group no model has seen in training count for a difference; what a model has seen makes a number of its
own, labelled transductive. Verdicts come later, over all tasks (verdicts.py), since they are corrected together.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from dinoscope.arrays import damage_named, document_in, document_of, read_arrays, write_arrays
from dinoscope.errors import FeaturesError
from dinoscope.evaluate.answers import Answers
from dinoscope.evaluate.cohort import SEEN
from dinoscope.evaluate.intervals import DRAWS, Comparison
from dinoscope.evaluate.robust_measures import change_sources, own_score, statistic_of_sums, sums_asked
from dinoscope.evaluate.scores import Predictions, Statistic, statistic_of, statistic_of_repeats
from dinoscope.evaluate.seeds import Family, compare_over_seeds, estimate_over_seeds, families, family_references
from dinoscope.evaluate.units import Units

__all__ = ["SCORES", "Row", "TaskComparison", "compare_models", "read_comparison", "scores_of", "write_comparison"]

# Kind of label -> scores, the one that is judged first.
SCORES = {
    "classes": ("balanced_accuracy", "macro_f1", "auroc"),
    "number": ("r2", "pearson"),
    "survival": ("c_index",),
    "masks": ("mean_iou",),
}
# Least values of the scores that may be below 0; none is above 1.
_LEAST = {"r2": -np.inf, "pearson": -1.0, "change": -np.inf}
# A score as a function of cases' weights, number of cases and units, and cases of the smallest class.
_Asked = tuple[Statistic, int, int, int]


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
        seeds: Training seeds of the run, 1 or more; None for what is no run.
        by_seed: The score with each of several; `value` is their mean.
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
    seeds: int | None = None
    by_seed: tuple[float, ...] = ()


@dataclass(frozen=True)
class TaskComparison:
    """All of a task.

    Attributes:
        differences: (measure, model, reference) -> the difference in the first of the measure's scores.
        numbers: Model -> descriptive measures.
        about: Model -> what it is.
        families: Name of a run with several training seeds -> the models of these; it stands among the models too.
    """

    task: str
    kind: str
    rows: list[Row]
    differences: dict[tuple[str, str, str], Comparison]
    numbers: dict[str, dict[str, Any]] = field(default_factory=dict)
    about: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    families: dict[str, list[str]] = field(default_factory=dict)


def compare_models(
    units: Units,
    answers: Mapping[str, Answers],
    references: Mapping[str, Sequence[str]],
    *,
    runs: Sequence[Sequence[str]] = (),
    draws: int = DRAWS,
    seed: int = 0,
) -> TaskComparison:
    """Scores of all models and their differences.

    A run with several training seeds is a further model, whose scores and differences are the means over its seeds.

    Args:
        units: The task's; those of the test set count.
        answers: By model, in the order of the table, about these units.
        references: Model -> the models that it is held against.
        runs: Models that are trainings of ours: of each run the models of its seeds.
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
    repeated = families(runs, list(answers))
    trained = {model for members in runs for model in members}
    statistics = _Statistics(units, answers)
    for measure in _measures(answers):
        asked = {model: answer for model, answer in answers.items() if measure in answer.measures}
        common = clean & np.all([_asked(answer, measure) for answer in asked.values()], axis=0)
        for model, members in _with_families(asked, repeated).items():
            seeds = len(members) if members[0] in trained else None
            rows += _rows(statistics, members, measure, model, clean, draws, seed, seeds)
            transductive = is_test & np.all([asked[member].seen == yes for member in members], axis=0)
            if transductive.any():
                rows += _rows(statistics, members, measure, model, transductive, draws, seed, seeds, seen="yes")
        of_models = {model: statistics.of(model, measure, common) for model in asked}
        of_measure = _differences(measure, of_models, references, trained, repeated, draws, seed)
        differences |= _possible(of_measure, scores_of(units.kind, measure)[0])
    return TaskComparison(
        units.task,
        units.kind,
        rows,
        differences,
        {model: dict(answer.numbers) for model, answer in answers.items() if answer.numbers},
        {model: answer.about for model, answer in answers.items()},
        [*_seen_note(answers, is_test, clean), *dict.fromkeys(n for answer in answers.values() for n in answer.notes)],
        {family.name: list(family.members) for family in repeated},
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
        "families": found.families,
        "differences": [
            [*key, one.difference, one.num_cases, one.smallest_class, one.by_seed]
            for key, one in found.differences.items()
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
            (measure, model, reference): Comparison(difference, arrays[str(index)], num_cases, smallest, tuple(by_seed))
            for index, (measure, model, reference, difference, num_cases, smallest, by_seed) in enumerate(
                document["differences"]
            )
        }
        rows = [Row(**{**row, "by_seed": tuple(row["by_seed"])}) for row in document["rows"]]
        return TaskComparison(**{**document, "rows": rows, "differences": differences})


def _seen_note(answers: Mapping[str, Answers], is_test: np.ndarray, clean: np.ndarray) -> list[str]:
    """Says where training has seen what was to be a test."""
    lost = int(is_test.sum() - clean.sum())
    if not lost or not _measures(answers):
        return []
    models = [model for model, answer in answers.items() if (answer.seen[is_test] == SEEN.index("yes")).any()]
    rest = "no verdict is left" if not clean.any() else f"verdicts rest on the other {int(clean.sum())}"
    return [f"training of {', '.join(models)} saw {lost} of {int(is_test.sum())} test units (transductive): {rest}"]


def scores_of(kind: str, measure: str) -> tuple[str, ...]:
    """What a measure of a task of that kind is given in, first what differences are taken of."""
    own = own_score(measure)
    return SCORES[kind] if own is None else (own,)


def _measures(answers: Mapping[str, Answers]) -> list[str]:
    return list(dict.fromkeys(measure for answer in answers.values() for measure in answer.measures))


def _with_families(asked: Mapping[str, Answers], repeated: Sequence[Family]) -> dict[str, tuple[str, ...]]:
    """Name of a row -> its models: each model, and behind its last seed the run of several."""
    found: dict[str, tuple[str, ...]] = {}
    for model in asked:
        found[model] = (model,)
        for family in repeated:
            if family.members[-1] == model and set(family.members) <= set(asked):
                found[family.name] = family.members
    return found


def _rows(
    statistics: "_Statistics",
    members: Sequence[str],
    measure: str,
    model: str,
    chosen: np.ndarray,
    draws: int,
    seed: int,
    seeds: int | None,
    *,
    seen: str | None = None,
) -> list[Row]:
    """A row a score, on the chosen units as far as the model (all of its seeds) was asked about them."""
    found = []
    answers = [statistics.answers[member] for member in members]
    asked = chosen & np.all([_asked(answer, measure) for answer in answers], axis=0)
    for score in scores_of(statistics.units.kind, measure):
        made = [statistics.of(member, measure, asked, score) for member in members]
        if made[0] is None:
            continue
        _, cases, num_units, smallest = made[0]
        of_seeds = [one[0] for one in made if one is not None]
        value, (low, high), by_seed = _estimated(of_seeds, cases, _LEAST.get(score, 0.0), draws, seed)
        if not np.isfinite(value):
            continue
        unknown = any((answer.seen[chosen] == SEEN.index("unknown")).any() for answer in answers)
        told = seen or ("unknown" if unknown else "no")
        found.append(Row(measure, score, model, value, low, high, cases, num_units, told, smallest, seeds, by_seed))
    return found


def _estimated(
    statistics: Sequence[Statistic], cases: int, least: float, draws: int, seed: int
) -> tuple[float, tuple[float | None, float | None], tuple[float, ...]]:
    """A score, the ends of its interval within what the score can be, and the score of each of several seeds."""
    if cases < 2:
        by_seed = tuple(float(statistic(np.ones((1, cases)))[0]) for statistic in statistics)
        return float(np.mean(by_seed)), (None, None), by_seed if len(by_seed) > 1 else ()
    guess, by_seed = estimate_over_seeds(statistics, cases, draws=draws, seed=seed)
    ends = (guess.low, guess.high)
    if len(by_seed) > 1:  # two or three seeds allow for more than there can be
        ends = (max(guess.low, least), min(guess.high, 1.0))
    low, high = (float(end) if np.isfinite(end) else None for end in ends)
    return guess.value, (low, high), by_seed if len(by_seed) > 1 else ()


def _asked(answer: Answers, measure: str) -> np.ndarray:
    """(N,) bool: units that the model answered about, in some repeat."""
    if measure in answer.confusions:
        return np.ones(len(answer.seen), dtype=bool)
    if measure in answer.sums:
        return sums_asked(answer.sums[measure])
    if (sources := change_sources(measure, answer.said)) is not None:
        return _asked(answer, sources[0]) & _asked(answer, sources[1])
    said = answer.said[measure]
    return np.isfinite(said.reshape(*said.shape[:2], -1)).all(axis=2).any(axis=0)


class _Statistics:
    """The scores of a task's models as functions of the weights of cases.

    Each is made once and remembers what it gave on the resamples: a model's scores stand in its own row, in the row of
    its run, under changes, and in the difference of every model that is held against it.
    """

    def __init__(self, units: Units, answers: Mapping[str, Answers]) -> None:
        self.units, self.answers = units, answers
        self._groups, self._targets = units.groups, units.targets if units.kind not in ("masks", "none") else None
        self._made: dict[tuple[str, str, str, bytes], _Asked | None] = {}

    def of(self, model: str, measure: str, chosen: np.ndarray, score: str | None = None) -> _Asked | None:
        """The score, by default the one that is judged, on the chosen units (N,) bool; None where none is left."""
        score = score or scores_of(self.units.kind, measure)[0]
        key = (model, measure, score, chosen.tobytes())
        if key not in self._made:
            made = self._new(model, measure, chosen, score)
            self._made[key] = made and (_remembered(made[0]), *made[1:])
        return self._made[key]

    def _new(self, model: str, measure: str, chosen: np.ndarray, score: str) -> _Asked | None:
        answer = self.answers[model]
        if measure in answer.confusions:
            confusions = answer.confusions[measure][:, chosen]
            names, numbers = np.unique(self._groups[chosen], return_inverse=True)
            if not len(names):
                return None
            return statistic_of_repeats(confusions, numbers), len(names), int(chosen.sum()), len(names)
        if (sources := change_sources(measure, answer.said)) is not None:
            both = chosen & _asked(answer, measure)
            clean, changed = (self.of(model, source, both) for source in sources)
            return changed and (lambda weights: changed[0](weights) - clean[0](weights), *changed[1:])
        asked = chosen & _asked(answer, measure)
        if not asked.any():
            return None
        if measure in answer.sums:
            names, numbers = np.unique(self._groups[asked], return_inverse=True)
            added = np.zeros((len(names), *answer.sums[measure].shape[1:]))
            np.add.at(added, numbers, answer.sums[measure][asked])
            return statistic_of_sums(added), len(names), int(asked.sum()), len(names)
        predictions = Predictions(self._targets[asked], answer.said[measure][:, asked], self._groups[asked])
        statistic = statistic_of(predictions, score)
        return statistic, predictions.num_cases, int(asked.sum()), predictions.smallest_class()


def _remembered(statistic: Statistic) -> Statistic:
    """The same, which knows what it gave last; the weights of resamples are one array that nobody writes to."""
    last: list[np.ndarray] = []

    def of(weights: np.ndarray) -> np.ndarray:
        if weights.flags.writeable:  # all cases once, made anew each time
            return statistic(weights)
        if not last or last[0] is not weights:
            last[:] = weights, statistic(weights)
        return last[1]

    return of


def _differences(
    measure: str,
    statistics: Mapping[str, _Asked | None],
    references: Mapping[str, Sequence[str]],
    trained: Collection[str],
    repeated: Sequence[Family],
    draws: int,
    seed: int,
) -> dict[tuple[str, str, str], Comparison]:
    """Of each model from its references, then of each run of several seeds from its own."""
    wanted = [
        (model, reference, ((model, reference),)) for model in statistics for reference in references.get(model, ())
    ]
    for family in repeated:
        for name, each in family_references(family, references, repeated).items():
            wanted.append((family.name, name, tuple(zip(family.members, each, strict=True))))
    found = {}
    for model, reference, pairs in wanted:
        sides = [(statistics.get(mine), statistics.get(theirs)) for mine, theirs in pairs]
        known = [(mine, theirs) for mine, theirs in sides if mine is not None and theirs is not None]
        if len(known) < len(sides) or known[0][0][1] < 2:
            continue
        assert len({side[1:3] for pair in known for side in pair}) == 1  # of the units that all were asked about
        one = compare_over_seeds(
            [mine[0] for mine, _ in known],
            [theirs[0] for _, theirs in known],
            known[0][0][1],
            min(side[3] for pair in known for side in pair),
            draws=draws,
            seed=seed,
        )
        is_run = pairs[0][0] in trained
        found[measure, model, reference] = one if is_run else replace(one, by_seed=())
    return found


def _possible(differences: Mapping[tuple[str, str, str], Comparison], score: str) -> dict[Any, Comparison]:
    """Differences with intervals that end where the score's range does: few seeds allow for more than there can be."""
    most = 1.0 - _LEAST.get(score, 0.0)
    found = dict(differences)
    for key, one in differences.items():
        if len(one.by_seed) > 1:
            found[key] = replace(one, resampled=one.resampled.clip(-most, most))
    return found
