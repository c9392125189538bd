"""Intervals by simulation with a known truth, and verdicts."""

from statistics import NormalDist

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from dinoscope.evaluate.intervals import (
    Comparison,
    case_weights,
    compare,
    estimate,
    holm,
    judge_family,
    verdict,
)
from dinoscope.evaluate.scores import Predictions, statistic_of

ROWS = 5  # a case


def simulated(rng: np.random.Generator, num_cases: int, separation: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Class and case of each row, and the answers of two models: a case's rows are alike, and so are the models."""
    classes = np.arange(num_cases) % 2
    case = np.repeat(np.arange(num_cases), ROWS)
    of_case = rng.normal(size=(2, num_cases)) * np.sqrt(0.7)
    shared = rng.normal(size=num_cases) * np.sqrt(0.5)
    of_row = rng.normal(size=(2, len(case))) * np.sqrt(0.3)
    said = separation * classes[case] + (of_case * np.sqrt(0.5 / 0.7) + shared * 0.6)[:, case] + of_row
    return classes[case], case, said


def as_predictions(truth: np.ndarray, case: np.ndarray, scores: np.ndarray) -> Predictions:
    said = 1 / (1 + np.exp(-scores))
    return Predictions(truth, np.stack([1 - said, said], -1)[None], case)


VARIANCE = 0.5 + 0.36 * 0.5 + 0.3
SEPARATION = 1.2
TRUE_AUROC = NormalDist().cdf(SEPARATION / np.sqrt(2 * VARIANCE))


def test_intervals_hold_the_truth_as_often_as_they_say_with_correlated_rows() -> None:
    rng, held, held_by_rows, num = np.random.default_rng(0), 0, 0, 300
    for simulation in range(num):
        truth, case, said = simulated(rng, 40, SEPARATION)
        by_case = estimate(statistic_of(as_predictions(truth, case, said[0]), "auroc"), 40, draws=500)
        held += by_case.low <= TRUE_AUROC <= by_case.high
        if simulation < 100:
            as_if_free = as_predictions(truth, np.arange(len(case)), said[0])
            by_row = estimate(statistic_of(as_if_free, "auroc"), len(case), draws=500)
            held_by_rows += by_row.low <= TRUE_AUROC <= by_row.high
    # three standard errors of 300 simulations about 95 %; that of rows, which are not independent, is far off
    assert 0.912 <= held / num <= 0.988
    assert held_by_rows / 100 < 0.8


def test_differences_of_equally_good_models_are_called_out_as_seldom_as_stated() -> None:
    rng, called, num = np.random.default_rng(1), 0, 300
    for _ in range(num):
        truth, case, said = simulated(rng, 40, SEPARATION)
        first, second = (statistic_of(as_predictions(truth, case, scores), "auroc") for scores in said)
        found = compare(first, second, 40, 20, draws=500)
        low, high = found.interval()
        called += not low <= 0 <= high
        assert (found.p_value <= 0.05) == (not low <= 0 <= high)
    assert called / num <= 0.088


def test_a_pair_is_narrower_than_two_apart() -> None:
    truth, case, said = simulated(np.random.default_rng(2), 60, SEPARATION)
    first = statistic_of(as_predictions(truth, case, said[0]), "auroc")
    second = statistic_of(as_predictions(truth, case, said[0] + 0.2 * said[1]), "auroc")
    paired = compare(first, second, 60, 30, draws=500).interval()
    apart = estimate(first, 60, draws=500)
    assert paired[1] - paired[0] < 0.6 * (apart.high - apart.low)


def test_identical_models_show_no_clear_difference() -> None:
    truth, case, said = simulated(np.random.default_rng(3), 80, SEPARATION)
    statistic = statistic_of(as_predictions(truth, case, said[0]), "auroc")
    found = verdict(compare(statistic, statistic, 80, 40), 0.01)
    assert found.decision == "no clear difference"
    assert (found.difference, found.low, found.high, found.p_value) == (0, 0, 0, 1)
    assert found.sentence == "no clear difference: +0.000 [+0.000, +0.000] lies within ±0.01 (95 % interval, 80 cases)"


def normal(difference: float, spread: float, smallest_class: int = 50, num_cases: int = 100) -> Comparison:
    draws = difference + spread * np.random.default_rng(0).normal(size=20_000)
    return Comparison(difference, draws, num_cases, smallest_class)


def test_each_verdict() -> None:
    assert verdict(normal(0.1, 0.02), 0.02).decision == "better"
    assert verdict(normal(-0.1, 0.02), 0.02).decision == "worse"
    assert verdict(normal(0.002, 0.002), 0.02).decision == "no clear difference"
    assert verdict(normal(0.008, 0.002), 0.02).decision == "no clear difference"  # it is too small to matter
    assert verdict(normal(0.01, 0.02), 0.02).decision == "inconclusive"
    assert verdict(normal(0.1, 0.02, smallest_class=29), 0.02).decision == "too few to judge"
    undefined = Comparison(0.1, np.full(2000, np.nan), 100, 50)
    assert verdict(undefined, 0.02).decision == "too few to judge"
    found = verdict(normal(0.1, 0.02), 0.02, measure="AUROC")
    assert found.sentence.startswith("AUROC: better by 0.100 [+0.0") and "100 cases" in found.sentence


def test_too_few_draws_for_so_many_measures_are_told() -> None:
    """Every resample is far above 0, but with 2,000 of them that cannot be said of 30 measures."""
    for draws, decision in ((2_000, "inconclusive"), (10_000, "better")):
        resampled = 0.5 + 0.05 * np.random.default_rng(0).normal(size=draws)
        clear = {f"measure {number}": Comparison(0.5, resampled, 60, 30) for number in range(30)}
        found = judge_family(clear, dict.fromkeys(clear, 0.02))
        assert {one.decision for one in found.values()} == {decision}
        told = "2,000 draws of cases are too few to tell it among so many measures"
        assert all((told in one.sentence) == (decision == "inconclusive") for one in found.values())


def test_interval_of_a_mean_is_students() -> None:
    """The mean of the cases' values is where theory knows the interval."""
    values = np.random.default_rng(5).normal(size=30)
    found = estimate(lambda weights: weights @ values / 30, 30, draws=20_000)
    half = 2.045 * values.std(ddof=1) / np.sqrt(30)  # t of 29 degrees of freedom
    assert found.high - found.low == pytest.approx(2 * half, rel=0.03)
    assert found.value == pytest.approx(values.mean())


def test_p_value_of_a_mean_is_students() -> None:
    half = np.random.default_rng(6).normal(size=15)
    values = np.concatenate([half, -half]) + 0.4  # even on both sides, as Student's test has it
    found = compare(lambda w: w @ values / 30, lambda w: 0 * w.sum(1), 30, 30, draws=20_000).p_value
    assert found == pytest.approx(ttest_1samp(values, 0).pvalue, rel=0.15)


def test_holm_is_that_of_the_textbook() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, float("nan")]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_family_pays_for_its_number_and_the_primary_measure_does_not() -> None:
    slight = normal(0.1, 0.045)  # p = 0.03
    names = [f"measure {number}" for number in range(4)]
    alone = judge_family({"main": slight}, {"main": 0.01}, primary="main")["main"]
    together = judge_family(
        dict.fromkeys(["main", *names], slight), dict.fromkeys(["main", *names], 0.01), primary="main"
    )
    assert alone.decision == together["main"].decision == "better"
    assert {together[name].decision for name in names} == {"inconclusive"}
    assert {round(together[name].level, 4) for name in names} == {0.9875}
    assert {together[name].p_value > 0.05 for name in names} == {True}


def test_a_family_agrees_with_holm_and_leaves_out_what_cannot_be_judged() -> None:
    given = {"a": normal(0.1, 0.02), "b": normal(0.06, 0.02), "c": normal(0.01, 0.02), "d": normal(0.1, 0.01, 5)}
    found = judge_family(given, dict.fromkeys(given, 0.01))
    assert [found[name].decision for name in given] == ["better", "better", "inconclusive", "too few to judge"]
    assert [round(found[name].level, 4) for name in "abc"] == [0.9833, 0.975, 0.95]
    corrected = holm([given[name].p_value for name in "abc"])
    assert [found[name].p_value for name in "abc"] == corrected


def test_identical_families_err_together_as_seldom_as_stated() -> None:
    rng, wrong, num = np.random.default_rng(7), 0, 300
    for _ in range(num):
        values = rng.normal(size=(6, 40))
        weights = case_weights(40, 2000)
        given = {str(index): Comparison(row.mean(), weights @ row / 40, 40, 40) for index, row in enumerate(values)}
        wrong += any(
            v.decision in ("better", "worse") for v in judge_family(given, dict.fromkeys(given, 0.01)).values()
        )
    assert wrong / num <= 0.088


def test_resamples_depend_on_seed_and_index_alone() -> None:
    weights = case_weights(12, 50, 3)
    assert (weights.sum(1) == 12).all()
    np.testing.assert_array_equal(case_weights(12, 20, 3), weights[:20])
    assert (case_weights(12, 50, 4) != weights).any()
