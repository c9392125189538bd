"""Robustness of features that were made to be robust, to be not, or to have collapsed."""

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from dinoscope.errors import EvaluationError
from dinoscope.evaluate.folds import grouped_folds
from dinoscope.evaluate.probe import linear_probe
from dinoscope.evaluate.robustness import beside_clean, retention, robustness_index, site_readout
from dinoscope.evaluate.scores import statistic_of


def tiles(
    rng: np.random.Generator, for_class: float, for_site: float, for_case: float = 0.5, crossed: bool = True
) -> tuple[np.ndarray, ...]:
    """Features, classes, sites and cases of 60 cases of 5 tiles at three sites; how much of each is in the features."""
    cases = np.repeat(np.arange(60), 5)
    sites = np.array(["north", "east", "west"])[cases % 3]
    classes = (cases // 3 % 2) if crossed else (cases % 3 > 0).astype(int)
    directions = rng.normal(size=(60 + 2 + 3, 24))
    features = (
        for_class * directions[60 + classes]
        + for_site * directions[62 + cases % 3]
        + for_case * directions[cases]
        + rng.normal(size=(300, 24))
    )
    return features.astype(np.float32), classes, sites, cases


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_features_that_did_not_move_keep_all_their_neighbours(rng: np.random.Generator) -> None:
    features, classes, _, cases = tiles(rng, 1, 0)
    found = retention(features, features.copy(), cases, labels=classes).means()
    assert found["retained"] == found["itself"] == found["itself_clean"] == 1
    assert found["alike"] == found["alike_clean"] > 0.8
    assert found["chance"] == pytest.approx(10 / 295)


def test_neighbours_of_moved_features_are_scikit_learns(rng: np.random.Generator) -> None:
    features, classes, _, cases = tiles(rng, 1, 0)
    moved = features + rng.normal(size=features.shape).astype(np.float32)
    found = retention(features, moved, cases, labels=classes, k=7)
    mean = features.mean(0)
    of_all = NearestNeighbors(n_neighbors=300, metric="cosine").fit(features - mean)
    for index in range(0, 300, 17):
        near = []
        for rows in (features, moved):
            order = of_all.kneighbors(rows[index : index + 1] - mean, return_distance=False)[0]
            near.append([row for row in order if cases[row] != cases[index]][:7])
        assert found.retained[index] == pytest.approx(len(set(near[0]) & set(near[1])) / 7)
        assert found.alike[index] == pytest.approx(np.mean(classes[near[1]] == classes[index]))
        assert found.alike_clean[index] == pytest.approx(np.mean(classes[near[0]] == classes[index]))
    assert found.chance < found.means()["retained"] < 1


def test_collapsed_features_do_not_win(rng: np.random.Generator) -> None:
    features, classes, _, cases = tiles(rng, 1, 0)
    collapsed = np.repeat(features[:1], 300, axis=0)
    found = retention(collapsed, collapsed.copy(), cases, labels=classes).means()
    assert found["itself"] == found["itself_clean"] == 0
    assert found["alike_clean"] < 0.7


def test_too_few_others_are_refused(rng: np.random.Generator) -> None:
    features = rng.normal(size=(20, 4)).astype(np.float32)
    with pytest.raises(EvaluationError, match="case 0 has 15 of 20 tiles, so that not every tile has 10 neighbours"):
        retention(features, features, np.r_[np.zeros(15, int), np.arange(1, 6)])


def test_shifted_scores_stand_beside_the_clean_one(rng: np.random.Generator) -> None:
    features, classes, _, cases = tiles(rng, 1, 0)
    folds = grouped_folds(classes, cases, folds=3, repeats=1)
    noisy = features + 3 * rng.normal(size=features.shape).astype(np.float32)
    found = beside_clean(linear_probe(features, classes, cases, folds, tested={"noise": noisy}).predictions, "auroc")
    assert list(found) == ["noise"]
    assert found["noise"].clean > 0.95 > found["noise"].shifted > 0.5


def test_the_site_is_read_where_it_is_and_not_where_it_is_not(rng: np.random.Generator) -> None:
    told = site_readout(*tiles(rng, 1, 1))
    hidden = site_readout(*tiles(rng, 1, 0))
    scores = [float(found.statistic()(np.ones((1, len(found.cases))))[0]) for found in (told, hidden)]
    assert told.chance == pytest.approx(1 / 3)
    assert scores[0] > 0.9 and abs(scores[1] - 1 / 3) < 0.15
    assert told.sites == dict.fromkeys((0, 1), ("east", "north", "west")) and told.left_out == ()


def test_the_site_is_read_within_a_class_only(rng: np.random.Generator) -> None:
    """A class that only one site has tells the site, but is no merit of the scanner's."""
    features, classes, sites, cases = tiles(rng, 2, 0, crossed=False)
    found = site_readout(features, classes, sites, cases)
    assert list(found.sites.values()) == [("east", "west")]
    assert found.left_out == ("class 0: 1 sites with enough cases, two are needed",)
    assert abs(float(found.statistic()(np.ones((1, len(found.cases))))[0]) - 0.5) < 0.15
    with pytest.raises(EvaluationError, match="the site cannot be read within any class"):
        site_readout(features, np.where(sites == "north", 0, np.where(sites == "east", 1, 2)), sites, cases)


def test_statistic_of_the_readout_takes_cases_by_name(rng: np.random.Generator) -> None:
    found = site_readout(*tiles(rng, 1, 1), repeats=2)
    weights = rng.integers(0, 3, (4, len(found.cases)))
    expected = np.zeros(4)
    for predictions in found.predictions.values():
        mine = np.isin(found.cases, predictions.cases)
        expected += statistic_of(predictions, "balanced_accuracy")(weights[:, mine]) / 2
    np.testing.assert_allclose(found.statistic()(weights), expected)


def test_index_of_features_of_class_of_site_and_of_noise(rng: np.random.Generator) -> None:
    for_class = robustness_index(*tiles(rng, 2, 0))
    for_site = robustness_index(*tiles(rng, 0, 2))
    for_none = robustness_index(*tiles(rng, 0, 0, for_case=0))
    assert for_class.num_pairs == 3 and for_class.k == 10
    assert for_class.value > 0.95 and for_site.value < 0.05 and abs(for_none.value - 0.5) < 0.06
    assert for_class.statistic()(np.ones((2, len(for_class.cases)))) == pytest.approx([for_class.value] * 2)


def plain_index(
    features: np.ndarray, classes: np.ndarray, sites: np.ndarray, cases: np.ndarray, k: int
) -> tuple[int, int]:
    """Two classes at two sites, all tiles, by a full sort."""
    centred = features.astype(np.float64) - features.mean(0)
    units = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    for_class = for_site = 0
    for index in range(len(units)):
        others = [row for row in np.argsort(-units @ units[index]) if cases[row] != cases[index]][:k]
        for row in others:
            for_class += classes[row] == classes[index] and sites[row] != sites[index]
            for_site += classes[row] != classes[index] and sites[row] == sites[index]
    return for_class, for_site


def test_index_is_that_of_a_full_sort(rng: np.random.Generator) -> None:
    features, classes, sites, cases = tiles(rng, 0.3, 0.3, for_case=3)  # a case's own tiles would be its neighbours
    chosen = sites != "west"
    features, classes, sites, cases = (values[chosen] for values in (features, classes, sites, cases))
    found = robustness_index(features, classes, sites, cases, k=6)
    expected = plain_index(features, classes, sites, cases, 6)
    assert (found.for_class.sum(), found.for_site.sum()) == expected
    assert found.value == expected[0] / sum(expected)


def test_index_is_refused_where_classes_and_sites_do_not_cross(rng: np.random.Generator) -> None:
    features, classes, sites, cases = tiles(rng, 1, 1, crossed=False)
    with pytest.raises(EvaluationError, match="classes and sites do not cross: no two of 2 classes both have 2 cases"):
        robustness_index(features, classes, sites, cases)
    # one case of the other class at a site does not make them cross
    classes[cases == 0] = 1
    with pytest.raises(EvaluationError, match="do not cross"):
        robustness_index(features, classes, sites, cases)
