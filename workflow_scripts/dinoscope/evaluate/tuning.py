"""What regressions on frozen features share: scaling and penalty are chosen on inner folds, fold by fold.

The inner cross-validation is over the cases of the training rows, from the same grid with the same inner folds for
every encoder. Answers are for rows that nothing was fitted on; those of a repeat's folds are pooled.

Shapes: N rows, D width, R repeats, P penalties.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dinoscope.errors import EvaluationError
from dinoscope.evaluate.folds import Fold, balanced_rows, grouped_folds
from dinoscope.evaluate.scores import Predictions

__all__ = [
    "CLEAN",
    "MAX_ROWS",
    "PENALTIES",
    "SCALINGS",
    "Choice",
    "Probed",
    "Question",
    "Regression",
    "answers_by_folds",
    "fitted_on_fewer",
    "inner_folds",
    "pooled",
    "scaled",
]

CLEAN = "clean"  # the features themselves, among copies of them
PENALTIES = tuple(10.0**power for power in range(-3, 4))  # times D / N: the same prior at any width and number of rows
SCALINGS = ("each", "all")
INNER_FOLDS = 3
MAX_ROWS = 200_000  # to fit on, balanced by case
MAX_ROWS_CHOOSING = 20_000


@dataclass(frozen=True)
class Question:
    """What a probe is asked, and how.

    Attributes:
        features: (N, D).
        truth: (N, …), e.g. class numbers from 0.
        cases: (N,).
        folds: Of all repeats, as all probes of a comparison have them.
        tested: Changed copies (N, D) of the same rows, which the same regressions are asked about.
        max_rows: To fit on, balanced by case.
        max_rows_choosing: To choose on, likewise.
        seed: Of the inner folds and of the rows that are drawn.
        device: Where the products are computed.
    """

    features: np.ndarray
    truth: np.ndarray
    cases: np.ndarray
    folds: Sequence[Fold]
    tested: Mapping[str, np.ndarray] | None = None
    max_rows: int = MAX_ROWS
    max_rows_choosing: int = MAX_ROWS_CHOOSING
    seed: int = 0
    device: str | torch.device = "cpu"

    @property
    def width(self) -> int:
        """D."""
        return self.features.shape[1]


class Regression(Protocol):
    """A regression with an L2 penalty; rows are scaled by `scaled`, `mine` are their numbers among all N."""

    def strata(self, mine: np.ndarray) -> np.ndarray:
        """Of rows, what inner folds are stratified by."""

    def losses(self, rows: Tensor, mine: np.ndarray, held_out: Sequence[np.ndarray]) -> np.ndarray:
        """(P,) losses of `PENALTIES` on the rows that each inner fold holds out."""

    def fit(self, rows: Tensor, mine: np.ndarray, penalty: float) -> Callable[[Tensor], np.ndarray]:
        """A function of scaled rows that answers."""


@dataclass(frozen=True)
class Choice:
    """What the inner folds chose for one fold.

    Attributes:
        scaling: "each": every dimension to a standard deviation of 1. "all": one factor for all, so that what varies
            more counts more.
        penalty: On the sum of the losses of the rows, in units of D (C of scikit-learn is 1 over this times D).
        by: "inner folds", or "default" where the training rows have too few cases to choose by.
    """

    scaling: str
    penalty: float
    by: str


@dataclass(frozen=True)
class Probed:
    """Answers of a probe.

    Attributes:
        predictions: On the features themselves under "clean", and on each copy of them under its name.
        choices: Of each fold, in the order of the folds.
        num_fitted: Most rows that a regression was fitted on.
    """

    predictions: dict[str, Predictions]
    choices: tuple[Choice, ...]
    num_fitted: int


def answers_by_folds(question: Question, regression: Regression) -> Probed:
    """Chooses scaling and penalty on inner folds, fits, and asks, fold by fold."""
    copies = {CLEAN: question.features, **(question.tested or {})}
    said: dict[str, list[np.ndarray]] = {name: [] for name in copies}
    choices, numbers = [], []
    for fold in question.folds:
        few = _taken(question, fold, question.max_rows_choosing)
        choice, prepared = _chosen(question, few, regression)
        mine = _taken(question, fold, question.max_rows)
        if prepared is None or len(mine) != len(few):
            prepared = scaled(question.features[mine], choice.scaling, question.device)
        rows, others = prepared
        answer = regression.fit(rows, mine, choice.penalty)
        for name, copy in copies.items():
            said[name].append(answer(others(copy[fold.test])))
        choices.append(choice)
        numbers.append(len(mine))
    predictions = {
        name: Predictions(question.truth, pooled(question.folds, answers, len(question.truth)), question.cases)
        for name, answers in said.items()
    }
    return Probed(predictions, tuple(choices), max(numbers))


def pooled(folds: Sequence[Fold], answers: Sequence[np.ndarray], num_rows: int) -> np.ndarray:
    """Answers of all folds (R, N, …), a repeat's folds together; NaN for rows that a repeat does not ask about.

    Args:
        folds: Of all repeats.
        answers: What was said of the rows that each fold asks about.
        num_rows: N.
    """
    repeats = sorted({fold.repeat for fold in folds})
    said = np.full((len(repeats), num_rows, *answers[0].shape[1:]), np.nan)
    for fold, answer in zip(folds, answers, strict=True):
        said[repeats.index(fold.repeat), fold.test] = answer
    return said


def inner_folds(strata: np.ndarray, cases: np.ndarray, seed: int, most: int = INNER_FOLDS) -> list[np.ndarray]:
    """Rows held out in each of `most` inner folds over the cases of training rows, fewer or none of too few cases."""
    for number in range(most, 1, -1):
        try:
            return [fold.test for fold in grouped_folds(strata, cases, folds=number, repeats=1, seed=seed)]
        except EvaluationError:
            continue
    return []


def scaled(train: np.ndarray, scaling: str, device: str | torch.device = "cpu") -> tuple[Tensor, Callable]:
    """Training rows scaled by their own mean and deviation, in float32, and the function that scales others likewise.

    Fewer rows than dimensions are turned into their own span, as many dimensions as there are rows: a regression with
    an L2 penalty has nothing outside of it, and is faster within.
    """
    assert scaling in SCALINGS, scaling
    rows = torch.as_tensor(np.ascontiguousarray(train, np.float32), device=device)
    mean = rows.mean(0)
    deviation = (rows - mean).square().mean(0)
    factor = (deviation if scaling == "each" else deviation.mean()).clamp(min=1e-12).rsqrt()
    if scaling == "each":  # a dimension that hardly varies beside the others is rounding, and stays small
        factor = torch.where(deviation < 1e-10 * deviation.max(), 0.0, factor)
    centred = (rows - mean) * factor
    turn = None
    if len(rows) < rows.shape[1]:
        turn = torch.linalg.svd(centred, full_matrices=False).Vh.T
        centred = centred @ turn

    def of_others(others: np.ndarray) -> Tensor:
        moved = torch.as_tensor(np.ascontiguousarray(others, np.float32), device=device).sub(mean).mul_(factor)
        return moved if turn is None else moved @ turn

    return centred, of_others


def fitted_on_fewer(folds: Sequence[Fold], max_rows: int = MAX_ROWS) -> list[str]:
    """A note that regressions are fitted on a part of the training rows, or none."""
    most = max(len(fold.train) for fold in folds)
    if most <= max_rows:
        return []
    return [f"regressions are fitted on {max_rows:,} of up to {most:,} training rows, as equal as possible a case"]


def _taken(question: Question, fold: Fold, limit: int) -> np.ndarray:
    """Training rows of a fold, all or as equal a number of each case as there are."""
    return fold.train[balanced_rows(question.cases[fold.train], min(question.max_rows, limit), question.seed)]


def _chosen(
    question: Question, mine: np.ndarray, regression: Regression
) -> tuple[Choice, tuple[Tensor, Callable] | None]:
    """Scaling and penalty, and what `scaled` made of the rows with that scaling."""
    held_out = inner_folds(regression.strata(mine), question.cases[mine], question.seed)
    if not held_out:
        return Choice(SCALINGS[0], PENALTIES[len(PENALTIES) // 2], "default"), None
    features = question.features[mine]
    prepared = [scaled(features, scaling, question.device) for scaling in SCALINGS]
    of_scalings = np.stack([regression.losses(rows, mine, held_out) for rows, _ in prepared])
    # of equal ones the strongest penalty
    scaling, penalty = np.unravel_index(of_scalings[:, ::-1].argmin(), of_scalings.shape)
    return Choice(SCALINGS[scaling], PENALTIES[::-1][penalty], "inner folds"), prepared[scaling]
