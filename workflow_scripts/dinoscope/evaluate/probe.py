"""Probes of frozen features: logistic and ridge regression here, nearest ones of `nearest`, all under one roof.

What is tuned, the scaling and the penalty, is chosen by an inner cross-validation (`tuning`), with the same grid and
the same inner folds for every encoder.

Shapes: N rows, D width, C classes, P penalties.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinoscope.evaluate.folds import Fold, strata_of_cases
from dinoscope.evaluate.logistic import fit_logistic, log_probabilities
from dinoscope.evaluate.nearest import SHOTS, few_shot, knn_probe
from dinoscope.evaluate.tuning import (
    CLEAN,
    INNER_FOLDS,
    MAX_ROWS,
    PENALTIES,
    SCALINGS,
    Choice,
    Probed,
    Question,
    answers_by_folds,
    inner_folds,
    pooled,
    scaled,
)

__all__ = [
    "CLEAN",
    "MAX_ROWS",
    "PENALTIES",
    "SCALINGS",
    "SHOTS",
    "Choice",
    "Probed",
    "few_shot",
    "inner_folds",
    "knn_probe",
    "linear_probe",
    "pooled",
    "ridge_probe",
    "scaled",
]

_TOLERANCE_CHOOSING = 1e-4  # with less, weak penalties end early and seem better than they are


def linear_probe(
    features: np.ndarray, labels: np.ndarray, cases: np.ndarray, folds: Sequence[Fold], **options: Any
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
        **options: `tested`, `max_rows`, `max_rows_choosing`, `seed`, `device` of `Question`.
    """
    question = Question(features, labels, cases, folds, **options)
    return answers_by_folds(question, _Logistic(question))


def ridge_probe(
    features: np.ndarray, values: np.ndarray, cases: np.ndarray, folds: Sequence[Fold], **options: Any
) -> Probed:
    """Ridge regression of a continuous label; penalty and scaling with the least squared error on inner folds.

    Args:
        features: (N, D).
        values: (N,) float.
        cases: (N,).
        folds: Stratified by `strata_of_values`, as all probes of a comparison have them.
        **options: `tested`, `max_rows`, `max_rows_choosing`, `seed`, `device` of `Question`.
    """
    question = Question(features, values, cases, folds, **options)
    return answers_by_folds(question, _Ridge(question))


class _Logistic:
    """Multinomial, as `Regression` has it."""

    def __init__(self, question: Question) -> None:
        self.labels = torch.as_tensor(question.truth, device=question.device)
        self.num_classes, self.width = int(question.truth.max()) + 1, question.width

    def strata(self, mine: np.ndarray) -> np.ndarray:
        return self.labels[mine].cpu().numpy()

    def losses(self, rows: Tensor, mine: np.ndarray, held_out: Sequence[np.ndarray]) -> np.ndarray:
        return _log_losses(rows, self.labels[mine], self.num_classes, held_out, self.width)

    def fit(self, rows: Tensor, mine: np.ndarray, penalty: float) -> Callable[[Tensor], np.ndarray]:
        labels = self.labels[mine]
        weights = _class_weights(labels, self.num_classes)[:, None]
        strength = rows.new_tensor([penalty * self.width / len(mine)])
        theta = fit_logistic(rows, labels, self.num_classes, strength, weights)
        return lambda asked: log_probabilities(asked, theta)[:, 0].exp().double().cpu().numpy()


class _Ridge:
    """Least squares, as `Regression` has it."""

    def __init__(self, question: Question) -> None:
        self.values, self.cases, self.width = question.truth, question.cases, question.width
        self.target = torch.as_tensor(question.truth, dtype=torch.float64, device=question.device)

    def strata(self, mine: np.ndarray) -> np.ndarray:
        return strata_of_cases(self.values[mine], self.cases[mine], INNER_FOLDS, INNER_FOLDS)

    def losses(self, rows: Tensor, mine: np.ndarray, held_out: Sequence[np.ndarray]) -> np.ndarray:
        total, of_rows = np.zeros(len(PENALTIES)), self.target[mine]
        for out in held_out:
            known = torch.as_tensor(np.setdiff1d(np.arange(len(mine)), out), device=rows.device)
            asked = torch.as_tensor(out, device=rows.device)
            strengths = [self.width * penalty / len(known) for penalty in PENALTIES]
            said = _ridge(rows[known], of_rows[known], strengths)(rows[asked])
            total += (said - of_rows[asked, None]).square().sum(0).cpu().numpy()
        return total

    def fit(self, rows: Tensor, mine: np.ndarray, penalty: float) -> Callable[[Tensor], np.ndarray]:
        answer = _ridge(rows, self.target[mine], [self.width * penalty / len(mine)])
        return lambda asked: answer(asked)[:, 0].cpu().numpy()


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
