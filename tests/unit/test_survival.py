"""Cox's regression against its formula, a general optimiser, and hazards that are known."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from dinoscope.errors import EvaluationError
from dinoscope.evaluate.folds import grouped_folds
from dinoscope.evaluate.probe import CLEAN
from dinoscope.evaluate.scores import c_index, score
from dinoscope.evaluate.survival import cox_loss, cox_probe, fit_cox

BETA = np.array([1.0, -0.7, 0.0, 0.4])


def survival_of(num: int, seed: int = 0, rounded: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, times and events of exponential hazards exp(x·BETA), a third censored."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(num, 4))
    lived, seen = rng.exponential(np.exp(-features @ BETA)), rng.exponential(2.0, num)
    times = np.minimum(lived, seen)
    return features, np.ceil(times * 5) if rounded else times, lived <= seen


def plain_loss(risks: np.ndarray, times: np.ndarray, events: np.ndarray) -> float:
    terms = [
        math.log(sum(math.exp(risks[j]) for j in range(len(times)) if times[j] >= times[i])) - risks[i]
        for i in range(len(times))
        if events[i]
    ]
    return sum(terms) / len(terms)


@pytest.mark.parametrize("rounded", [False, True])
def test_loss_is_that_of_a_double_loop(rounded: bool) -> None:
    features, times, events = survival_of(60, rounded=rounded)
    assert (len(np.unique(times)) < 40) == rounded
    risks = features @ BETA
    found = cox_loss(torch.tensor(risks), torch.tensor(times), torch.tensor(events))
    assert float(found) == pytest.approx(plain_loss(risks, times, events))
    both = cox_loss(torch.tensor(np.stack([risks, 0 * risks], 1)), torch.tensor(times), torch.tensor(events))
    np.testing.assert_allclose(both, [plain_loss(risks, times, events), plain_loss(0 * risks, times, events)])


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("penalty", [1e-6, 0.1, 3.0])
def test_coefficients_are_those_of_a_general_optimiser(penalty: float, rounded: bool) -> None:
    features, times, events = survival_of(50, seed=1, rounded=rounded)
    expected = minimize(
        lambda beta: plain_loss(features @ beta, times, events) + penalty / 2 * beta @ beta, np.zeros(4), tol=1e-8
    ).x
    found = fit_cox(torch.tensor(features), torch.tensor(times), torch.tensor(events), penalty)
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_known_hazards_are_found() -> None:
    features, times, events = survival_of(4000)
    found = fit_cox(torch.tensor(features), torch.tensor(times), torch.tensor(events), 1e-6)
    np.testing.assert_allclose(found, BETA, atol=0.08)  # three standard errors


def test_scale_of_time_does_not_matter() -> None:
    features, times, events = survival_of(80)
    one, other = (
        fit_cox(torch.tensor(features), torch.tensor(t), torch.tensor(events), 0.01) for t in (times, times**3 * 365)
    )
    np.testing.assert_allclose(one, other, atol=1e-8)


def test_separated_cases_end_in_finite_coefficients() -> None:
    times = np.arange(1.0, 31)
    features = np.stack([-times, np.ones(30)], 1)
    found = fit_cox(torch.tensor(features), torch.tensor(times), torch.ones(30, dtype=torch.bool), 1e-4)
    assert found.isfinite().all() and found[0] > 0.5


def test_probe_ranks_cases_it_has_not_seen_about_as_the_truth_does() -> None:
    features, times, events = survival_of(200, seed=3)
    noise = np.random.default_rng(4).normal(size=(200, 20))
    rows = np.concatenate([features, noise], 1).astype(np.float32)
    cases = np.arange(200)
    folds = grouped_folds(events.astype(int), cases, folds=4, repeats=1)
    found = cox_probe(rows, times, events, cases, folds, tested={"noise": rows[:, ::-1].copy()})
    truth = np.stack([times, events], 1).astype(float)
    best = float(c_index(truth, features @ BETA, np.ones((1, 200)))[0])
    reached = score(found.predictions[CLEAN], "c_index")
    assert best - 0.06 < reached < best + 0.02
    assert abs(score(found.predictions["noise"], "c_index") - 0.5) < 0.12
    assert {choice.penalty for choice in found.choices} <= {0.1, 1.0, 10.0}
    # risks of all folds on one scale
    for fold in folds:
        assert 0.5 < found.predictions[CLEAN].said[0, fold.test].std() < 1.5


def test_too_little_to_learn_from_is_refused() -> None:
    features, times, events = survival_of(40)
    rows, cases = features.astype(np.float32), np.arange(40)
    with pytest.raises(EvaluationError, match="survival has 3 events, at least 10 are needed"):
        cox_probe(rows, times, np.arange(40) < 3, cases, [])
    with pytest.raises(EvaluationError, match=r"a survival time is 0\.0; times are above 0"):
        cox_probe(rows, times * 0, events, cases, [])
