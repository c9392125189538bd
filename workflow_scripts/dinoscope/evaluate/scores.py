"""Scores of predictions: balanced accuracy, macro F1, AUROC, C-index, R², Pearson's r, mean IoU.

Each score takes weights of the rows, of one set or of many sets at once, so that a bootstrap of thousands of resamples
is a few passes over the predictions: a row that was drawn twice has weight 2.

Shapes: N rows (tiles, slides or cases), G cases, C classes, R repeats of a cross-validation, B sets of weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = [
    "MEASURES",
    "Measure",
    "Predictions",
    "Statistic",
    "auroc",
    "balanced_accuracy",
    "c_index",
    "confusion_matrices",
    "macro_f1",
    "mean_iou",
    "mean_of",
    "pearson",
    "r2",
    "score",
    "statistic_of",
    "statistic_of_confusions",
    "statistic_of_means",
    "statistic_of_repeats",
]

_VALUES_AT_ONCE = 2**20  # 8 MiB of weights
_PAIRS_A_ROW = 200  # of cases; up to so many their products are faster than passes over the rows

Statistic = Callable[[np.ndarray], np.ndarray]
"""From weights of cases (B, G) to a score of each set (B,); what a bootstrap resamples."""


@dataclass(frozen=True)
class Predictions:
    """What a model said of rows that it had not seen, pooled over the folds of each repeat.

    Attributes:
        truth: (N,) class numbers, or values; for survival (N, 2): time, and 1 for an event or 0 for censored.
        said: (R, N, C) probabilities of classes, or (R, N) values or risks; NaN where a repeat asked nothing.
        cases: (N,) what is resampled: the case (patient) of each row, or the parent image.
    """

    truth: np.ndarray
    said: np.ndarray
    cases: np.ndarray

    def __post_init__(self) -> None:
        assert len(self.truth) == len(self.cases) == self.said.shape[1], (self.truth.shape, self.said.shape)

    @property
    def num_cases(self) -> int:
        """G."""
        return len(np.unique(self.cases))

    def smallest_class(self) -> int:
        """Number of cases in the class that the fewest cases have; of values all cases; of survival those with events.

        It decides whether there is enough to judge by.
        """
        if self.truth.ndim == 2:
            return len(np.unique(self.cases[self.truth[:, 1] > 0]))
        if self.said.ndim == 2:
            return self.num_cases
        return min(len(np.unique(self.cases[self.truth == label])) for label in np.unique(self.truth))


@dataclass(frozen=True)
class Measure:
    """A score by name; more is better in all of them.

    Attributes:
        name: As in tables.
        chance: What knowing nothing gives; None where that depends on the number of classes.
        prepare: From truth (N, …), what was said (N, …), the number of each row's case (N,) and G to a function of
            weights (B, G).
    """

    name: str
    chance: float | None
    prepare: Callable[[np.ndarray, np.ndarray, np.ndarray, int], Statistic]


def balanced_accuracy(confusions: np.ndarray) -> np.ndarray:
    """Mean over the classes that occur of the share of their rows that were recognised.

    Args:
        confusions: (…, C, C), truth by rows, answers by columns; counts or sums of weights.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        return _mean_of_finite(np.diagonal(confusions, axis1=-2, axis2=-1) / confusions.sum(-1))


def macro_f1(confusions: np.ndarray) -> np.ndarray:
    """Mean F1 over the classes that occur or were answered: 2·right / (of the class + answered as it).

    Args:
        confusions: (…, C, C), truth by rows.
    """
    right = np.diagonal(confusions, axis1=-2, axis2=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return _mean_of_finite(2 * right / (confusions.sum(-1) + confusions.sum(-2)))


def mean_iou(confusions: np.ndarray) -> np.ndarray:
    """Mean over classes of intersection over union; a class in neither truth nor answers does not count.

    Args:
        confusions: (…, C, C) of pixels or patches, truth by rows.
    """
    right = np.diagonal(confusions, axis1=-2, axis2=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return _mean_of_finite(right / (confusions.sum(-1) + confusions.sum(-2) - right))


def auroc(truth: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve; of more than two classes the mean of each against the rest (macro).

    The probability that a row of the class gets more than one of the rest, ties counting half. A class that has no
    weight, or all of it, does not count; NaN where none counts.

    Args:
        truth: (N,) class numbers.
        probabilities: (N, C).
        weights: (B, N).
    """
    areas = [_area(truth == c, probabilities[:, c], weights) for c in _asked_classes(probabilities)]
    return _mean_of_finite(np.stack(areas, axis=-1))


def c_index(truth: np.ndarray, risks: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Harrell's concordance (Harrell et al. 1982): of two cases, one known to die first, has that one the higher risk?

    A pair counts where the shorter time ended in an event, or of equal times one did: the other lived on. Equal risks
    count half.

    Args:
        truth: (N, 2) time, and whether it ended in an event.
        risks: (N,) higher for earlier events.
        weights: (B, N).
    """
    times, events = truth[:, 0], truth[:, 1] > 0
    weights = weights.astype(np.float64)
    known, right = np.zeros(len(weights)), np.zeros(len(weights))
    for start in range(0, len(times), 1024):
        part = slice(start, start + 1024)
        later = (times[part, None] < times) | ((times[part, None] == times) & ~events)
        comparable = later & events[part, None]
        ahead = (np.sign(risks[part, None] - risks) + 1) / 2 * comparable
        known += np.einsum("bi,bi->b", weights[:, part], weights @ comparable.T)
        right += np.einsum("bi,bi->b", weights[:, part], weights @ ahead.T)
    with np.errstate(invalid="ignore", divide="ignore"):
        return right / known


def r2(truth: np.ndarray, said: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Share of the variance that is explained, R²: 0 for saying the mean, negative for worse.

    Args:
        truth: (N,).
        said: (N,).
        weights: (B, N).
    """
    total = weights.sum(1)
    # about the plain mean first: the variance of far-off values would drown in rounding
    centred = truth - truth.mean()
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = weights @ centred**2 - (weights @ centred) ** 2 / total
        return np.where(spread > 0, 1 - weights @ (truth - said) ** 2 / spread, np.nan)


def pearson(truth: np.ndarray, said: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Pearson's correlation; 0 where everything that is said is the same.

    Args:
        truth: (N,).
        said: (N,).
        weights: (B, N).
    """
    total = weights.sum(1)
    a, b = truth - truth.mean(), said - said.mean()

    def covariance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return weights @ (one * other) / total - (weights @ one) * (weights @ other) / total**2

    with np.errstate(invalid="ignore", divide="ignore"):
        spread = np.sqrt(np.maximum(covariance(a, a), 0) * np.maximum(covariance(b, b), 0))
        return np.where(spread > 0, covariance(a, b) / spread, np.where(total > 0, 0.0, np.nan))


def confusion_matrices(
    truth: np.ndarray,
    answers: np.ndarray,
    num_classes: int,
    groups: np.ndarray | None = None,
    num_groups: int = 1,
    ignored: int = 255,
) -> np.ndarray:
    """Counts of truth (rows) by answers (columns) of each group, (num_groups, C, C) float64.

    Args:
        truth: Class numbers, any shape; where it is `ignored` nothing counts.
        answers: Class numbers, of the same shape.
        num_classes: C.
        groups: Group number of each, of the same shape; None: all in one.
        num_groups: G.
        ignored: Number of no class.
    """
    counted = truth != ignored
    cells = truth[counted].astype(np.int64) * num_classes + answers[counted]
    if groups is not None:
        cells += groups[counted].astype(np.int64) * num_classes**2
    counts = np.bincount(cells, minlength=num_groups * num_classes**2)
    return counts.reshape(num_groups, num_classes, num_classes).astype(np.float64)


def _by_confusions(measure: Callable[[np.ndarray], np.ndarray]) -> Callable[..., Statistic]:
    def prepare(truth: np.ndarray, said: np.ndarray, case: np.ndarray, num_cases: int) -> Statistic:
        confusions = confusion_matrices(truth, said.argmax(1), said.shape[1], case, num_cases, ignored=-1)
        return statistic_of_confusions(confusions, measure)

    return prepare


def _by_rows(of_rows: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]) -> Callable[..., Statistic]:
    def prepare(truth: np.ndarray, said: np.ndarray, case: np.ndarray, num_cases: int) -> Statistic:
        step = max(1, _VALUES_AT_ONCE // max(1, len(case)))

        def statistic(weights_BG: np.ndarray) -> np.ndarray:
            parts = [weights_BG[start : start + step] for start in range(0, len(weights_BG), step)]
            return np.concatenate([of_rows(truth, said, part.astype(np.float64)[:, case]) for part in parts])

        return statistic

    return prepare


def _by_pairs_of_cases(truth: np.ndarray, said: np.ndarray, case: np.ndarray, num_cases: int) -> Statistic:
    """AUROC: few cases of many rows are compared once, pair by pair; many cases of few rows for each set of weights."""
    if num_cases**2 > _PAIRS_A_ROW * len(case):
        return _by_rows(auroc)(truth, said, case, num_cases)
    won = np.stack([_won(truth == c, said[:, c], case, num_cases) for c in _asked_classes(said)])
    rows = np.stack([np.bincount(case, truth == c, num_cases) for c in _asked_classes(said)], 1)
    rest = np.bincount(case, minlength=num_cases)[:, None] - rows

    def statistic(weights_BG: np.ndarray) -> np.ndarray:
        weights_BG = weights_BG.astype(np.float64)
        wins = np.stack([np.einsum("bg,bg->b", weights_BG @ of_class, weights_BG) for of_class in won], -1)
        with np.errstate(invalid="ignore", divide="ignore"):
            return _mean_of_finite(wins / ((weights_BG @ rows) * (weights_BG @ rest)))

    return statistic


def _won(positive: np.ndarray, scores: np.ndarray, case: np.ndarray, num_cases: int) -> np.ndarray:
    """(G, G): of rows of the class in the one and of the rest in the other, pairs in the right order; ties half."""
    below = np.sort(scores[~positive])
    order = np.argsort(scores[~positive], kind="stable")
    case_below, found = case[~positive][order], np.zeros((num_cases, num_cases))
    left, right = (np.searchsorted(below, scores[positive], side) for side in ("left", "right"))
    for other in np.unique(case_below):
        counts = np.r_[0, np.cumsum(case_below == other)]
        found[:, other] = np.bincount(case[positive], (counts[left] + counts[right]) / 2, num_cases)
    return found


MEASURES = {
    "balanced_accuracy": Measure("balanced accuracy", None, _by_confusions(balanced_accuracy)),
    "macro_f1": Measure("macro F1", None, _by_confusions(macro_f1)),
    "auroc": Measure("AUROC", 0.5, _by_pairs_of_cases),
    "c_index": Measure("C-index", 0.5, _by_rows(c_index)),
    "r2": Measure("R²", 0.0, _by_rows(r2)),
    "pearson": Measure("Pearson's r", 0.0, _by_rows(pearson)),
}


def statistic_of(predictions: Predictions, measure: str) -> Statistic:
    """A measure of predictions as a function of the weights of their cases, sorted by name: the mean over repeats."""
    names, case = np.unique(predictions.cases, return_inverse=True)
    parts = []
    for said in predictions.said:
        asked = np.isfinite(said.reshape(len(said), -1)).all(1)
        parts.append(MEASURES[measure].prepare(predictions.truth[asked], said[asked], case[asked], len(names)))
    return mean_of(parts)


def statistic_of_confusions(
    confusions_GCC: np.ndarray, measure: Callable[[np.ndarray], np.ndarray] = mean_iou
) -> Statistic:
    """A measure of the sum of the cases' confusion matrices, as a function of the weights of the cases.

    Args:
        confusions_GCC: One matrix a case, in the order of the weights.
        measure: From matrices (…, C, C) to numbers.
    """
    num_cases, num_classes, _ = confusions_GCC.shape
    flat = confusions_GCC.reshape(num_cases, -1)
    return lambda weights_BG: measure((weights_BG @ flat).reshape(-1, num_classes, num_classes))


def statistic_of_repeats(
    confusions_RNCC: np.ndarray, case: np.ndarray, measure: Callable[[np.ndarray], np.ndarray] = mean_iou
) -> Statistic:
    """The mean over repeats of a measure of confusion matrices, as a function of the weights of the cases.

    Args:
        confusions_RNCC: A matrix a repeat and row, e.g. of the pixels of an image.
        case: (N,) numbers of the rows' cases, without gaps.
        measure: From matrices (…, C, C) to numbers.
    """
    summed = np.zeros((len(confusions_RNCC), int(case.max()) + 1, *confusions_RNCC.shape[2:]))
    np.add.at(summed, (slice(None), case), confusions_RNCC)
    return mean_of([statistic_of_confusions(of_repeat, measure) for of_repeat in summed])


def statistic_of_means(values: np.ndarray, cases: np.ndarray) -> Statistic:
    """The mean of one number a row, e.g. `robustness.Retention.retained`, as a function of the weights of the cases.

    Args:
        values: (N,) of rows; NaN does not count.
        cases: (N,); weights belong to them sorted.
    """
    names, case = np.unique(cases, return_inverse=True)
    known = np.isfinite(values)
    sums = np.bincount(case[known], values[known].astype(np.float64), len(names))
    counts = np.bincount(case[known], minlength=len(names))

    def statistic(weights_BG: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            return (weights_BG @ sums) / (weights_BG @ counts)

    return statistic


def mean_of(statistics: Sequence[Statistic]) -> Statistic:
    """The mean of several statistics of the same cases, e.g. one for each training seed."""
    return lambda weights_BG: np.mean([statistic(weights_BG) for statistic in statistics], axis=0)


def score(predictions: Predictions, measure: str) -> float:
    """A measure of all rows, the mean over repeats."""
    return float(statistic_of(predictions, measure)(np.ones((1, predictions.num_cases)))[0])


def _area(positive: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    order = np.argsort(scores, kind="stable")
    ordered, weights = scores[order], weights[:, order]
    of_class, of_rest = weights[:, positive[order]], weights * ~positive[order]
    below = np.concatenate([np.zeros((len(weights), 1)), np.cumsum(of_rest, axis=1)], axis=1)
    left, right = (np.searchsorted(ordered, ordered[positive[order]], side) for side in ("left", "right"))
    with np.errstate(invalid="ignore", divide="ignore"):
        won = np.einsum("bp,bp->b", of_class, below[:, left] + below[:, right]) / 2
        return won / (of_class.sum(1) * below[:, -1])


def _asked_classes(probabilities: np.ndarray) -> range:
    """One of two classes, or each of several against the rest."""
    return range(1, 2) if probabilities.shape[1] == 2 else range(probabilities.shape[1])


def _mean_of_finite(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis of what is finite; NaN where nothing is."""
    finite = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(finite, values, 0).sum(-1) / finite.sum(-1)
