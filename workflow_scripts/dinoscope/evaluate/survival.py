"""Survival: Cox's proportional hazards on frozen features, with an L2 penalty.

Shapes: N cases, D width, P penalties.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinoscope.errors import EvaluationError
from dinoscope.evaluate.folds import Fold, strata_of_survival
from dinoscope.evaluate.tuning import INNER_FOLDS, PENALTIES, Probed, Question, answers_by_folds

__all__ = ["MIN_EVENTS", "cox_loss", "cox_probe", "fit_cox"]

MIN_EVENTS = 10
_STEPS = 50


def cox_loss(risks: Tensor, times: Tensor, events: Tensor) -> Tensor:
    """Negative log partial likelihood (Cox 1972), the mean over events; of equal times each by Breslow's formula.

    Args:
        risks: (N,) or (N, P) logarithms of relative hazards.
        times: (N,) to the event or to the end of observation, whichever came first.
        events: (N,) bool, whether it was the event.
    """
    order = torch.argsort(times, descending=True, stable=True)
    ordered, risks, events = times[order], risks[order], events[order]
    # at risk at a time are all whose time is not less: those before and its equals
    last = torch.searchsorted(-ordered, -ordered, right=True) - 1
    at_risk = torch.logcumsumexp(risks, 0)[last]
    return (at_risk - risks)[events].sum(0) / events.sum().clamp(min=1)


def fit_cox(features: Tensor, times: Tensor, events: Tensor, penalty: float) -> Tensor:
    """Coefficients (D,) with the least `cox_loss` plus penalty / 2 times their squares, by Newton's method in float64.

    Args:
        features: (N, D).
        times: (N,).
        events: (N,) bool, at least one.
        penalty: Above 0, so that there is one answer.
    """
    features, order = features.double(), torch.argsort(times, descending=True, stable=True)
    rows, ordered, happened = features[order], times[order], events[order]
    last = torch.searchsorted(-ordered, -ordered, right=True) - 1
    number, beta = happened.sum().clamp(min=1), rows.new_zeros(rows.shape[1])

    def objective(coefficients: Tensor) -> Tensor:
        return cox_loss(rows @ coefficients, ordered, happened) + penalty / 2 * coefficients.square().sum()

    value = objective(beta)
    for _ in range(_STEPS):
        risks = rows @ beta
        weights = torch.exp(risks - risks.max())
        at_risk = weights.cumsum(0)[last]
        means = (weights[:, None] * rows).cumsum(0)[last] / at_risk[:, None]
        slope = (means - rows)[happened].sum(0) / number + penalty * beta
        if slope.abs().max() < 1e-9:
            break
        # an event counts for all that were at risk then: all that come no later in the order, and its equals
        of_events = torch.where(happened, 1 / at_risk, 0)
        shares = weights * _sum_of_those_at_risk(of_events, last)
        bend = (rows.T * shares) @ rows - means[happened].T @ means[happened]
        bend = bend / number + penalty * torch.eye(len(beta), dtype=rows.dtype, device=rows.device)
        step = torch.linalg.solve(bend, slope)
        length, found = 1.0, objective(beta - step)
        while found > value and length > 1e-6:
            length /= 2
            found = objective(beta - length * step)
        if found > value:  # rounding is all that is left
            break
        beta, value = beta - length * step, found
    return beta


def cox_probe(
    features: np.ndarray,
    times: np.ndarray,
    events: np.ndarray,
    cases: np.ndarray,
    folds: Sequence[Fold],
    **options: Any,
) -> Probed:
    """Risks by Cox's regression of features, e.g. of the mean over the tiles of a case.

    Scaling and penalty have the highest cross-validated partial likelihood (Verweij & van Houwelingen 1993) on inner
    folds. Risks of a fold are divided by the standard deviation that they have among its training rows, less their
    mean there, so that those of different folds can be compared.

    Args:
        features: (N, D), one row a case.
        times: (N,).
        events: (N,) bool or 0 and 1.
        cases: (N,).
        folds: Stratified by `events`, as all probes of a comparison have them.
        **options: `tested`, `max_rows`, `seed`, `device` of `Question`.

    Raises:
        EvaluationError: Fewer than 10 events, or a time that is not above 0.
    """
    if events.astype(bool).sum() < MIN_EVENTS:
        raise EvaluationError(
            f"survival has {events.astype(bool).sum()} events, at least {MIN_EVENTS} are needed; leave this label out"
        )
    if not (times > 0).all():
        raise EvaluationError(f"a survival time is {np.min(times)}; times are above 0, in any unit")
    question = Question(features, np.stack([times, events.astype(float)], 1), cases, folds, **options)
    return answers_by_folds(question, _Cox(question))


class _Cox:
    """Proportional hazards, as `Regression` of `tuning` has it."""

    def __init__(self, question: Question) -> None:
        truth = torch.as_tensor(question.truth, dtype=torch.float64, device=question.device)
        self.times, self.events, self.width = truth[:, 0].contiguous(), truth[:, 1] > 0, question.width
        self.truth, self.cases = question.truth, question.cases

    def strata(self, mine: np.ndarray) -> np.ndarray:
        return strata_of_survival(self.truth[mine], self.cases[mine], INNER_FOLDS)

    def losses(self, rows: Tensor, mine: np.ndarray, held_out: Sequence[np.ndarray]) -> np.ndarray:
        times, events, total = self.times[mine], self.events[mine], np.zeros(len(PENALTIES))
        for out in held_out:
            known = torch.as_tensor(np.setdiff1d(np.arange(len(mine)), out), device=rows.device)
            for index, penalty in enumerate(PENALTIES):
                beta = fit_cox(rows[known], times[known], events[known], self._strength(penalty, events[known]))
                total[index] += _partial(rows, beta, times, events)
                total[index] -= _partial(rows[known], beta, times[known], events[known])
        return total

    def fit(self, rows: Tensor, mine: np.ndarray, penalty: float) -> Callable[[Tensor], np.ndarray]:
        times, events = self.times[mine], self.events[mine]
        beta = fit_cox(rows, times, events, self._strength(penalty, events))
        of_train = rows.double() @ beta
        center, spread = of_train.mean(), of_train.std().clamp(min=1e-12)
        return lambda asked: ((asked.double() @ beta - center) / spread).cpu().numpy()

    def _strength(self, penalty: float, events: Tensor) -> float:
        return penalty * self.width / max(1, int(events.sum()))


def _partial(rows: Tensor, beta: Tensor, times: Tensor, events: Tensor) -> float:
    return float(cox_loss(rows.double() @ beta, times, events) * events.sum())


def _sum_of_those_at_risk(of_events: Tensor, last: Tensor) -> Tensor:
    """For each row, by descending time, the sum over the events whose risk set it is in: from its equals on."""
    sums = torch.zeros_like(of_events).index_add_(0, last, of_events)  # an event's set ends with the last of its equals
    return sums.flip(0).cumsum(0).flip(0)
