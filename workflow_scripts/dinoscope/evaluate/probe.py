"""Probes of frozen features: nearest neighbours, logistic and ridge regression, nearest mean of a few examples.

All answer for rows that they were not fitted on, fold by fold; the answers of a repeat's folds are pooled. What is
tuned, the scaling and the penalty, is chosen by an inner cross-validation over the cases of the training rows, from the
same grid with the same inner folds for every encoder.

Shapes: N rows, D width, C classes, R repeats, P penalties.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dinoscope.errors import EvaluationError
from dinoscope.evaluate.folds import Fold, balanced_rows, grouped_folds, strata_of_values
from dinoscope.evaluate.knn import NEIGHBOURS, knn_predict
from dinoscope.evaluate.logistic import fit_logistic, log_probabilities
from dinoscope.evaluate.scores import Predictions

__all__ = [
    "CLEAN",
    "MAX_ROWS",
    "PENALTIES",
    "SCALINGS",
    "SHOTS",
    "Choice",
    "Probed",
    "answers_by_folds",
    "few_shot",
    "inner_folds",
    "knn_probe",
    "linear_probe",
    "pooled",
    "ridge_probe",
    "scaled",
]

CLEAN = "clean"  # the features themselves, among copies of them
PENALTIES = tuple(10.0**power for power in range(-3, 4))  # times D / N: the same prior at any width and number of rows
SCALINGS = ("each", "all")
SHOTS = (1, 5, 10)
INNER_FOLDS = 3
MAX_ROWS = 200_000  # to fit on, balanced by case
MAX_ROWS_CHOOSING = 20_000
_TOLERANCE_CHOOSING = 5e-4  # losses to three digits tell which is the least
_TEMPERATURE = 0.1


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


def knn_probe(
    features: np.ndarray,
    labels: np.ndarray,
    cases: np.ndarray,
    folds: Sequence[Fold],
    *,
    ks: Sequence[int] = NEIGHBOURS,
    tested: Mapping[str, np.ndarray] | None = None,
) -> dict[int, dict[str, Predictions]]:
    """Classes by the k nearest training rows, for each k and each copy of the features.

    Args:
        features: (N, D).
        labels: (N,) class numbers from 0.
        cases: (N,).
        folds: As all probes of a comparison have them.
        ks: Numbers of neighbours.
        tested: Changed copies (N, D) of the same rows, asked instead of them; the bank is never changed.
    """
    num_classes = int(labels.max()) + 1

    def answers(fold: Fold, rows: np.ndarray) -> np.ndarray:
        found = knn_predict(rows, features[fold.train], labels[fold.train], num_classes, ks=ks)
        return np.stack([found[k] for k in ks], axis=-1)

    copies = {CLEAN: features, **(tested or {})}
    said = {
        name: pooled(folds, [answers(fold, rows[fold.test]) for fold in folds], len(labels))
        for name, rows in copies.items()
    }
    return {
        k: {name: Predictions(labels, of_copy[..., index], cases) for name, of_copy in said.items()}
        for index, k in enumerate(ks)
    }


def linear_probe(
    features: np.ndarray,
    labels: np.ndarray,
    cases: np.ndarray,
    folds: Sequence[Fold],
    *,
    tested: Mapping[str, np.ndarray] | None = None,
    max_rows: int = MAX_ROWS,
    max_rows_choosing: int = MAX_ROWS_CHOOSING,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Probed:
    """Multinomial logistic regression, all classes of the same weight.

    Penalty and scaling are those with the least log loss, each class of the same weight, on inner folds over the cases
    of the training rows (on at most 20,000 of them, balanced by case). Where features tell nothing, pooled answers come
    out a little below chance (AUROC 0.47 on average with 100 cases; scikit-learn's too): what is drawn into a fold that
    is asked is missing where the regression learns.

    Args:
        features: (N, D).
        labels: (N,) class numbers from 0.
        cases: (N,).
        folds: As all probes of a comparison have them.
        tested: Changed copies (N, D) of the same rows, which the same regressions are asked about.
        max_rows: To fit on, balanced by case.
        max_rows_choosing: To choose on, likewise.
        seed: Of the inner folds and of the rows that are drawn.
        device: Where the products are computed.
    """
    num_classes, width = int(labels.max()) + 1, features.shape[1]

    def losses(rows: Tensor, mine: np.ndarray, held_out: Sequence[np.ndarray]) -> np.ndarray:
        return _log_losses(rows, torch.as_tensor(labels[mine], device=device), num_classes, held_out, width)

    def fit(rows: Tensor, mine: np.ndarray, penalty: float) -> Callable[[Tensor], np.ndarray]:
        label = torch.as_tensor(labels[mine], device=device)
        weights = _class_weights(label, num_classes)[:, None]
        strength = torch.tensor([penalty * width / len(mine)], device=device)
        theta = fit_logistic(rows, label, num_classes, strength, weights)
        return lambda asked: log_probabilities(asked, theta)[:, 0].exp().double().cpu().numpy()

    return answers_by_folds(
        features,
        labels,
        cases,
        folds,
        tested,
        max_rows,
        seed,
        device,
        losses,
        fit,
        lambda mine: labels[mine],
        max_rows_choosing,
    )


def ridge_probe(
    features: np.ndarray,
    values: np.ndarray,
    cases: np.ndarray,
    folds: Sequence[Fold],
    *,
    tested: Mapping[str, np.ndarray] | None = None,
    max_rows: int = MAX_ROWS,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Probed:
    """Ridge regression of a continuous label; penalty and scaling with the least squared error on inner folds.

    Args:
        features: (N, D).
        values: (N,) float.
        cases: (N,).
        folds: Stratified by `strata_of_values`, as all probes of a comparison have them.
        tested: Changed copies (N, D) of the same rows.
        max_rows: To fit on, balanced by case.
        seed: Of the inner folds and of the rows that are drawn.
        device: Where the products are computed.
    """
    target, width = torch.as_tensor(values, dtype=torch.float64, device=device), features.shape[1]

    def losses(rows: Tensor, mine: np.ndarray, held_out: Sequence[np.ndarray]) -> np.ndarray:
        total = np.zeros(len(PENALTIES))
        for out in held_out:
            known = torch.as_tensor(np.setdiff1d(np.arange(len(mine)), out), device=device)
            asked = torch.as_tensor(out, device=device)
            of_rows = target[mine]
            strengths = [width * penalty / len(known) for penalty in PENALTIES]
            said = _ridge(rows[known], of_rows[known], strengths)(rows[asked])
            total += (said - of_rows[asked, None]).square().sum(0).cpu().numpy()
        return total

    def fit(rows: Tensor, mine: np.ndarray, penalty: float) -> Callable[[Tensor], np.ndarray]:
        answer = _ridge(rows, target[mine], [width * penalty / len(mine)])
        return lambda asked: answer(asked)[:, 0].cpu().numpy()

    strata = lambda mine: strata_of_values(values[mine], INNER_FOLDS)  # noqa: E731
    return answers_by_folds(features, values, cases, folds, tested, max_rows, seed, device, losses, fit, strata)


def few_shot(
    features: np.ndarray,
    labels: np.ndarray,
    cases: np.ndarray,
    folds: Sequence[Fold],
    *,
    shots: Sequence[int] = SHOTS,
    seed: int = 0,
) -> dict[int, Predictions]:
    """Classes by the nearest mean of a few labelled rows a class (SimpleShot: Wang et al. 2019, arXiv:1911.04623).

    For each fold, `shots` rows a class are drawn from its training rows, from as many cases as there are; repeats of
    the folds are repeats of the draw. Features are centred on the mean of all training rows, which takes no labels,
    and set to length 1. There is nothing to tune.

    Args:
        features: (N, D).
        labels: (N,) class numbers from 0.
        cases: (N,).
        folds: As all probes of a comparison have them; more repeats make a steadier mean.
        shots: Labelled rows a class; where a class has fewer training rows, all of them.
        seed: The rows are drawn by (seed, repeat, fold's number, class) alone, the same for all encoders.
    """
    num_classes = int(labels.max()) + 1
    answers: dict[int, list[np.ndarray]] = {number: [] for number in shots}
    for place, fold in enumerate(folds):
        units = _units(features - features[fold.train].mean(0))
        drawn = _drawn(labels, cases, fold.train, [seed, place])
        for number, found in answers.items():
            means = np.zeros((num_classes, features.shape[1]))
            for label, rows in drawn.items():
                means[label] = units[rows[:number]].mean(0)
            cosines = units[fold.test] @ _units(means).T
            cosines[:, np.setdiff1d(np.arange(num_classes), list(drawn))] = -np.inf
            found.append(_softmax(cosines / _TEMPERATURE))
    return {number: Predictions(labels, pooled(folds, found, len(labels)), cases) for number, found in answers.items()}


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


def answers_by_folds(
    features: np.ndarray,
    truth: np.ndarray,
    cases: np.ndarray,
    folds: Sequence[Fold],
    tested: Mapping[str, np.ndarray] | None,
    max_rows: int,
    seed: int,
    device: str | torch.device,
    losses: Callable[[Tensor, np.ndarray, Sequence[np.ndarray]], np.ndarray],
    fit: Callable[[Tensor, np.ndarray, float], Callable[[Tensor], np.ndarray]],
    strata: Callable[[np.ndarray], np.ndarray],
    max_rows_choosing: int = MAX_ROWS_CHOOSING,
) -> Probed:
    """Chooses scaling and penalty on inner folds, fits, and asks, fold by fold.

    Args:
        features: (N, D).
        truth: (N, …), for the predictions.
        cases: (N,).
        folds: Of all repeats.
        tested: Copies of the features by name.
        max_rows: To fit on, balanced by case.
        seed: Of the inner folds and of the rows that are drawn.
        device: Where the products are computed.
        losses: From scaled rows, their numbers and what each inner fold holds out to losses (P,) of the penalties.
        fit: From scaled rows, their numbers and a penalty to a function of scaled rows.
        strata: From numbers of rows to what inner folds are stratified by.
        max_rows_choosing: Rows that the inner folds have, balanced by case.
    """
    copies, choices, numbers = {CLEAN: features, **(tested or {})}, [], []
    said: dict[str, list[np.ndarray]] = {name: [] for name in copies}
    for fold in folds:
        few = fold.train[balanced_rows(cases[fold.train], min(max_rows, max_rows_choosing), seed)]
        held_out = inner_folds(strata(few), cases[few], seed)
        choice = _chosen(features[few], few, held_out, losses, device)
        mine = fold.train[balanced_rows(cases[fold.train], max_rows, seed)]
        rows, others = scaled(features[mine], choice.scaling, device)
        answer = fit(rows, mine, choice.penalty)
        for name, copy in copies.items():
            said[name].append(answer(others(copy[fold.test])))
        choices.append(choice)
        numbers.append(len(mine))
    predictions = {
        name: Predictions(truth, pooled(folds, answers, len(truth)), cases) for name, answers in said.items()
    }
    return Probed(predictions, tuple(choices), max(numbers))


def _chosen(
    rows: np.ndarray,
    mine: np.ndarray,
    held_out: Sequence[np.ndarray],
    losses: Callable[[Tensor, np.ndarray, Sequence[np.ndarray]], np.ndarray],
    device: str | torch.device,
) -> Choice:
    if not held_out:
        return Choice(SCALINGS[0], PENALTIES[len(PENALTIES) // 2], "default")
    of_scalings = np.stack([losses(scaled(rows, scaling, device)[0], mine, held_out) for scaling in SCALINGS])
    # of equal ones the strongest penalty
    scaling, penalty = np.unravel_index(of_scalings[:, ::-1].argmin(), of_scalings.shape)
    return Choice(SCALINGS[scaling], PENALTIES[::-1][penalty], "inner folds")


def _log_losses(
    rows: Tensor, labels: Tensor, num_classes: int, held_out: Sequence[np.ndarray], width: int
) -> np.ndarray:
    """(P,) mean over classes of the mean log loss of the rows that inner folds hold out, all regressions at once."""
    num_penalties = len(PENALTIES)
    out = torch.zeros(len(rows), len(held_out), dtype=torch.bool, device=rows.device)
    for number, chosen in enumerate(held_out):
        out[torch.as_tensor(chosen, device=rows.device), number] = True
    weights = torch.stack([_class_weights(labels, num_classes, ~out[:, f]) for f in range(len(held_out))], 1)
    strengths = torch.cat([rows.new_tensor(PENALTIES) * width / (len(rows) - len(chosen)) for chosen in held_out])
    weights = weights.repeat_interleave(num_penalties, 1)
    theta = fit_logistic(rows, labels, num_classes, strengths, weights, tolerance=_TOLERANCE_CHOOSING)
    log_probs = log_probabilities(rows, theta)[torch.arange(len(rows)), :, labels].unflatten(1, (-1, num_penalties))
    of_rows = (log_probs * out[..., None]).sum(1)  # each row is held out once
    class_weights = _class_weights(labels, num_classes, out.any(1))
    return -(of_rows * class_weights[:, None]).sum(0).double().cpu().numpy()


def _class_weights(labels: Tensor, num_classes: int, counted: Tensor | None = None) -> Tensor:
    """(N,) weights by which all classes weigh the same; 0 for rows that do not count."""
    counted = torch.ones_like(labels, dtype=torch.bool) if counted is None else counted
    counts = torch.bincount(labels[counted], minlength=num_classes)
    return torch.where(counted, 1 / counts.clamp(min=1)[labels], 0).float()


def _ridge(rows: Tensor, values: Tensor, strengths: Sequence[float]) -> Callable[[Tensor], Tensor]:
    """Least mean squared error plus strength times squared coefficients, in float64: (N, D) -> (N, P)."""
    rows, mean, mean_value = rows.double(), rows.double().mean(0), values.mean()
    centred = rows - mean
    spread, vectors = torch.linalg.eigh(centred.T @ centred / len(rows))
    along = vectors.T @ (centred.T @ (values - mean_value)) / len(rows)
    by_strength = torch.stack([vectors @ (along / (spread.clamp(min=0) + strength)) for strength in strengths], 1)
    return lambda asked: (asked.double() - mean) @ by_strength + mean_value


def _drawn(labels: np.ndarray, cases: np.ndarray, train: np.ndarray, seed: Sequence[int]) -> dict[int, np.ndarray]:
    """Of each class the training rows in random order, first one of each case, then another of each."""
    found = {}
    for label in np.unique(labels[train]):
        rows = np.random.default_rng([*seed, int(label)]).permutation(train[labels[train] == label])
        _, case = np.unique(cases[rows], return_inverse=True)
        by_case = np.argsort(case, kind="stable")
        starts = np.searchsorted(case[by_case], case[by_case])
        turn = np.empty(len(rows), np.int64)
        turn[by_case] = np.arange(len(rows)) - starts
        found[int(label)] = rows[np.argsort(turn, kind="stable")]
    return found


def _units(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)
