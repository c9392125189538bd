"""Folds: nobody is on both sides, classes are even, and sites as even as any assignment can make them."""

import itertools

import numpy as np
import pytest
from sklearn.model_selection import StratifiedGroupKFold

from dinoscope.errors import EvaluationError
from dinoscope.evaluate.folds import (
    balanced_rows,
    grouped_folds,
    leave_one_site_out,
    preserved_site_folds,
    strata_of_values,
)


def uneven_cases(seed: int = 0, num: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Class and case of rows: cases of 1 to 30 rows, three classes of which one is rare, some cases with several."""
    rng = np.random.default_rng(seed)
    cases = np.repeat(np.arange(num), rng.integers(1, 30, num))
    of_case = rng.choice(3, num, p=[0.5, 0.35, 0.15])
    labels = of_case[cases]
    mixed = (cases % 4 == 0) & (rng.random(len(cases)) < 0.3)
    return np.where(mixed, (labels + 1) % 3, labels), cases


def test_every_row_is_asked_once_a_repeat_and_no_case_is_on_both_sides() -> None:
    labels, cases = uneven_cases()
    found = grouped_folds(labels, cases, folds=5, repeats=3, seed=1)
    assert [(fold.repeat, fold.name) for fold in found] == [(r, str(f + 1)) for r in range(3) for f in range(5)]
    for fold in found:
        assert not set(cases[fold.train]) & set(cases[fold.test])
        np.testing.assert_array_equal(np.sort(np.r_[fold.train, fold.test]), np.arange(len(cases)))
    for repeat in range(3):
        asked = np.concatenate([fold.test for fold in found if fold.repeat == repeat])
        np.testing.assert_array_equal(np.sort(asked), np.arange(len(cases)))


def unevenness(labels: np.ndarray, tests: list[np.ndarray]) -> float:
    shares = np.stack([np.bincount(labels[test], minlength=3) for test in tests]) / np.bincount(labels)
    return float(np.abs(shares - 1 / len(tests)).max())


def test_classes_are_about_as_even_as_scikit_learn_makes_them() -> None:
    ours, theirs = [], []
    for seed in range(10):
        labels, cases = uneven_cases(seed)
        ours.append(unevenness(labels, [fold.test for fold in grouped_folds(labels, cases, repeats=1, seed=seed)]))
        split = StratifiedGroupKFold(5, shuffle=True, random_state=seed).split(labels, labels, cases)
        theirs.append(unevenness(labels, [test for _, test in split]))
    at_random = []
    for seed in range(10):
        labels, cases = uneven_cases(seed)
        fold = np.random.default_rng(seed).integers(0, 5, cases.max() + 1)[cases]
        at_random.append(unevenness(labels, [np.flatnonzero(fold == number) for number in range(5)]))
    assert np.mean(ours) < 0.7 * np.mean(at_random)
    assert np.mean(ours) < np.mean(theirs) + 0.1


def test_cases_of_one_class_are_dealt_evenly() -> None:
    labels = np.repeat([0, 1], [63, 22])
    for fold in grouped_folds(labels, np.arange(85), folds=5, repeats=2):
        counts = np.bincount(labels[fold.test])
        assert counts[0] in (12, 13) and counts[1] in (4, 5)


def test_repeats_differ_and_the_seed_alone_decides() -> None:
    labels, cases = uneven_cases()

    def tests_of(repeats: int, seed: int) -> list[frozenset]:
        return [frozenset(fold.test) for fold in grouped_folds(labels, cases, repeats=repeats, seed=seed)]

    two = tests_of(2, 5)
    assert set(two[:5]) & set(two[5:]) == set()
    assert tests_of(1, 5) == two[:5]
    assert tests_of(1, 6) != two[:5]


def test_too_few_cases_are_refused() -> None:
    with pytest.raises(EvaluationError, match="class 1 has 3 cases, but 5 folds need as many; ask for fewer folds"):
        grouped_folds(np.repeat([0, 1], [20, 30]), np.r_[np.arange(20), 20 + np.arange(30) % 3])
    with pytest.raises(EvaluationError, match="all rows are of one class, 0"):
        grouped_folds(np.zeros(20, int), np.arange(20))


def test_a_site_is_left_out_with_all_that_belongs_to_its_cases() -> None:
    sites = np.array(["a", "a", "b", "b", "c", "c", "a"])
    cases = np.array([0, 1, 2, 3, 4, 5, 2])  # case 2 is at two sites
    labels = np.array([0, 1, 0, 1, 0, 1, 0])
    found = {fold.name: fold for fold in leave_one_site_out(labels, cases, sites)}
    assert list(found) == ["a", "b", "c"]
    np.testing.assert_array_equal(found["a"].test, [0, 1, 6])
    np.testing.assert_array_equal(found["a"].train, [3, 4, 5])
    with pytest.raises(EvaluationError, match="all rows are of one site, x"):
        leave_one_site_out(labels, cases, np.full(7, "x"))
    with pytest.raises(EvaluationError, match="without site a fewer than two classes are left"):
        leave_one_site_out(np.array([0, 1, 1]), np.arange(3), np.array(["a", "b", "b"]))


def site_unevenness(labels: np.ndarray, sites: np.ndarray, fold_of_site: np.ndarray, folds: int) -> float:
    """As the function minimises it: squared differences from even shares of each class's cases."""
    fold = fold_of_site[sites]
    shares = [[np.mean(fold[labels == label] == number) for label in np.unique(labels)] for number in range(folds)]
    return float(np.square(np.array(shares) - 1 / folds).sum())


@pytest.mark.parametrize("seed", range(5))
def test_preserved_sites_are_as_even_as_the_best_of_all_assignments(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sites = rng.choice(7, 140, p=rng.dirichlet(np.ones(7)) * 0.6 + 0.4 / 7)
    labels = (rng.random(140) < rng.random(7)[sites]).astype(int)
    found = preserved_site_folds(labels, np.arange(140), sites, folds=3, seed=seed)
    of_site = np.array([next(n for n, fold in enumerate(found) if site in sites[fold.test]) for site in range(7)])
    for number, fold in enumerate(found):
        assert set(sites[fold.test]) == set(np.flatnonzero(of_site == number))
        assert not set(sites[fold.train]) & set(sites[fold.test])
    best = min(
        site_unevenness(labels, sites, np.array(assignment), 3)
        for assignment in itertools.product(range(3), repeat=7)
        if len(set(assignment)) == 3
    )
    assert site_unevenness(labels, sites, of_site, 3) == pytest.approx(best)


def test_sites_that_share_a_case_stay_together() -> None:
    sites, cases = np.array([0, 0, 1, 1, 2, 2, 3, 3]), np.array([0, 1, 1, 2, 3, 4, 5, 6])
    found = preserved_site_folds(np.arange(8) % 2, cases, sites, folds=3)
    together = next(fold for fold in found if 0 in sites[fold.test])
    assert set(sites[together.test]) == {0, 1}
    with pytest.raises(EvaluationError, match="there are 3 sites without common cases, but 4 folds"):
        preserved_site_folds(np.arange(8) % 2, cases, sites, folds=4)
    with pytest.raises(EvaluationError, match="a class is missing from what is learned from"):
        preserved_site_folds((sites == 3).astype(int), np.arange(8), sites, folds=3)


def test_strata_hold_equal_numbers() -> None:
    values = np.random.default_rng(0).exponential(size=100)
    strata = strata_of_values(values)
    assert np.bincount(strata).tolist() == [20] * 5
    assert all(values[strata == n].max() < values[strata == n + 1].min() for n in range(4))
    assert len(np.unique(strata_of_values(np.array([0.0] * 90 + [1.0] * 10)))) == 2


def test_no_group_dominates_a_sample() -> None:
    groups = np.repeat([0, 1, 2, 3], [10, 500, 1000, 40])
    rows = balanced_rows(groups, 200, seed=1)
    assert len(rows) == len(set(rows)) == 200 and (np.diff(rows) > 0).all()
    assert np.bincount(groups[rows]).tolist() == [10, 75, 75, 40]
    np.testing.assert_array_equal(balanced_rows(groups, 5000), np.arange(1550))
    np.testing.assert_array_equal(balanced_rows(groups, 200, seed=1), rows)
