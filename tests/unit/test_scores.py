"""Scores against scikit-learn's, with and without weights, and against double loops."""

import numpy as np
import pytest
from sklearn import metrics

from dinoscope.evaluate.scores import (
    Predictions,
    auroc,
    balanced_accuracy,
    c_index,
    confusion_matrices,
    macro_f1,
    mean_iou,
    mean_of,
    pearson,
    r2,
    score,
    statistic_of,
    statistic_of_confusions,
    statistic_of_means,
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(4)


def probabilities_of(rng: np.random.Generator, truth: np.ndarray, num_classes: int, digits: int) -> np.ndarray:
    """Somewhat right, with ties when rounded to few digits."""
    logits = rng.normal(size=(len(truth), num_classes)) + np.eye(num_classes)[truth]
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    rounded = np.round(probabilities, digits)
    return rounded / rounded.sum(1, keepdims=True) if digits > 4 else rounded


@pytest.mark.parametrize("num_classes", [2, 4])
def test_scores_of_classes_are_scikit_learns(rng: np.random.Generator, num_classes: int) -> None:
    truth = rng.integers(0, num_classes, 150)
    said = probabilities_of(rng, truth, num_classes, digits=12)
    found = {
        name: score(Predictions(truth, said[None], np.arange(150)), name)
        for name in ("balanced_accuracy", "macro_f1", "auroc")
    }
    answers = said.argmax(1)
    area = metrics.roc_auc_score(truth, said[:, 1] if num_classes == 2 else said, multi_class="ovr")
    assert found == {
        "balanced_accuracy": pytest.approx(metrics.balanced_accuracy_score(truth, answers)),
        "macro_f1": pytest.approx(metrics.f1_score(truth, answers, average="macro")),
        "auroc": pytest.approx(area),
    }


def test_weights_are_scikit_learns(rng: np.random.Generator) -> None:
    truth, weights = rng.integers(0, 2, 80), rng.integers(0, 4, (5, 80)).astype(float)
    said = probabilities_of(rng, truth, 2, digits=1)  # many ties
    assert len(np.unique(said[:, 1])) < 12
    values = rng.normal(size=80)
    areas, shares = auroc(truth, said, weights), r2(said[:, 1], values, weights)
    for index, row in enumerate(weights):
        assert areas[index] == pytest.approx(metrics.roc_auc_score(truth, said[:, 1], sample_weight=row))
        assert shares[index] == pytest.approx(metrics.r2_score(said[:, 1], values, sample_weight=row))


@pytest.mark.parametrize("measure", ["balanced_accuracy", "macro_f1", "auroc"])
def test_a_weighted_case_is_a_case_repeated(rng: np.random.Generator, measure: str) -> None:
    cases, truth = np.repeat(np.arange(20), 3), rng.integers(0, 3, 60)
    said = probabilities_of(rng, truth, 3, digits=12)
    weights = rng.multinomial(20, np.full(20, 0.05), size=4)
    found = statistic_of(Predictions(truth, said[None], cases), measure)(weights)
    for index, counts in enumerate(weights):
        rows = np.repeat(np.arange(60), counts[cases])
        repeated = Predictions(truth[rows], said[rows][None], np.arange(len(rows)))
        assert found[index] == pytest.approx(score(repeated, measure))


def test_pearson_is_numpys_and_does_not_mind_large_numbers(rng: np.random.Generator) -> None:
    truth, weights = rng.normal(size=50), rng.integers(0, 3, (3, 50))
    said = truth + rng.normal(size=50)
    for shift in (0, 1e6):
        found = pearson(truth + shift, said - shift, weights.astype(float))
        for index, row in enumerate(weights):
            rows = np.repeat(np.arange(50), row)
            assert found[index] == pytest.approx(np.corrcoef(truth[rows], said[rows])[0, 1], abs=1e-9)
    assert pearson(truth, np.ones(50), np.ones((1, 50)))[0] == 0


def plain_c_index(times: np.ndarray, events: np.ndarray, risks: np.ndarray, weights: np.ndarray) -> float:
    known = right = 0.0
    for i in range(len(times)):
        for j in range(len(times)):
            if events[i] and (times[i] < times[j] or (times[i] == times[j] and not events[j])):
                weight = weights[i] * weights[j]
                known += weight
                right += weight * (1 if risks[i] > risks[j] else 0.5 if risks[i] == risks[j] else 0)
    return right / known


def test_c_index_is_that_of_a_double_loop(rng: np.random.Generator) -> None:
    times, events = rng.integers(1, 12, 40).astype(float), rng.integers(0, 2, 40)
    risks, weights = np.round(rng.normal(size=40), 1), rng.integers(0, 3, (4, 40)).astype(float)
    found = c_index(np.stack([times, events], 1), risks, weights)
    expected = [plain_c_index(times, events, risks, row) for row in weights]
    assert found == pytest.approx(expected)
    assert c_index(np.stack([times, np.ones(40)], 1), -times, np.ones((1, 40)))[0] == 1


def test_c_index_of_more_cases_than_are_compared_at_once(rng: np.random.Generator) -> None:
    times, events, risks = rng.exponential(size=1500), rng.integers(0, 2, 1500), rng.normal(size=1500)
    first = times[:, None] < times
    known = first & (events[:, None] > 0)
    expected = (known & (risks[:, None] > risks)).sum() / known.sum()
    assert c_index(np.stack([times, events], 1), risks, np.ones((1, 1500)))[0] == pytest.approx(expected)


def test_confusions_count_by_group_what_is_not_ignored(rng: np.random.Generator) -> None:
    truth, answers, groups = rng.integers(0, 3, (5, 40)), rng.integers(0, 3, (5, 40)), np.arange(5)[:, None] // 2
    truth[0, :10] = 255
    found = confusion_matrices(truth, answers, 3, np.broadcast_to(groups, truth.shape), 3)
    for group in range(3):
        counted = (groups == group) & (truth != 255)
        expected = metrics.confusion_matrix(truth[counted], answers[counted], labels=[0, 1, 2])
        np.testing.assert_array_equal(found[group], expected)


def test_mean_iou_is_scikit_learns_and_leaves_out_absent_classes(rng: np.random.Generator) -> None:
    truth, answers = rng.integers(0, 3, 300), rng.integers(0, 3, 300)
    confusion = confusion_matrices(truth, answers, 4)
    expected = metrics.jaccard_score(truth, answers, average="macro")
    assert mean_iou(confusion)[0] == pytest.approx(expected)
    per_image = confusion_matrices(truth, answers, 4, np.arange(300) % 7, 7)
    assert statistic_of_confusions(per_image)(np.ones((2, 7))) == pytest.approx([expected] * 2)
    assert np.isnan(balanced_accuracy(np.zeros((2, 2)))) and np.isnan(macro_f1(np.zeros((2, 2))))


def test_repeats_are_averaged_and_what_was_not_asked_does_not_count(rng: np.random.Generator) -> None:
    truth, cases = rng.integers(0, 2, 40), np.arange(40)
    one, other = probabilities_of(rng, truth, 2, 12), probabilities_of(rng, truth, 2, 12)
    other[:15] = np.nan
    both = statistic_of(Predictions(truth, np.stack([one, other]), cases), "auroc")(np.ones((1, 40)))[0]
    first = metrics.roc_auc_score(truth, one[:, 1])
    second = metrics.roc_auc_score(truth[15:], other[15:, 1])
    assert both == pytest.approx((first + second) / 2)
    assert mean_of([lambda w: w.sum(1), lambda w: 3 * w.sum(1)])(np.ones((2, 4))).tolist() == [8, 8]


def test_a_class_that_was_not_drawn_does_not_count() -> None:
    truth, said = np.array([0, 0, 1, 2]), np.eye(3)[[0, 1, 1, 2]]
    statistic = statistic_of(Predictions(truth, said[None], np.arange(4)), "balanced_accuracy")
    assert statistic(np.array([[1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 4]])).tolist() == [2.5 / 3, 0.75, 1]
    assert np.isnan(statistic_of(Predictions(truth, said[None], np.arange(4)), "auroc")(np.array([[0, 0, 0, 4]])))[0]


def test_the_smallest_class_counts_cases() -> None:
    cases = np.array([0, 0, 0, 1, 2, 2])
    classes = Predictions(np.array([0, 0, 0, 1, 1, 0]), np.full((1, 6, 2), 0.5), cases)
    assert (classes.num_cases, classes.smallest_class()) == (3, 2)
    assert Predictions(np.arange(6.0), np.zeros((1, 6)), cases).smallest_class() == 3
    survival = np.stack([np.arange(6), [1, 1, 0, 0, 0, 0]], 1).astype(float)
    assert Predictions(survival, np.zeros((1, 6)), cases).smallest_class() == 1


def test_means_are_of_rows_by_the_weights_of_their_cases() -> None:
    statistic = statistic_of_means(np.array([1.0, 2, 6, np.nan, 4]), np.array(["b", "b", "a", "a", "c"]))
    assert statistic(np.array([[1, 1, 1], [0, 2, 0], [3, 0, 1]])).tolist() == [13 / 4, 1.5, 22 / 4]
