"""Probes against scikit-learn's regressions, and what they must not see."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier

from dinoscope.evaluate.folds import Fold, grouped_folds, strata_of_values
from dinoscope.evaluate.logistic import fit_logistic, log_probabilities
from dinoscope.evaluate.nearest import _drawn
from dinoscope.evaluate.probe import (
    CLEAN,
    PENALTIES,
    few_shot,
    inner_folds,
    knn_probe,
    linear_probe,
    pooled,
    ridge_probe,
    scaled,
)
from dinoscope.evaluate.scores import score
from dinoscope.evaluate.tuning import fitted_on_fewer


def classes_of(num: int, width: int, num_classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features whose dimensions are correlated and of different size, and classes that they tell in part."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(num, width)) @ (rng.normal(size=(width, width)) * 0.2 + np.eye(width))
    labels = (features[:, :num_classes] + rng.normal(size=(num, num_classes))).argmax(1)
    return features.astype(np.float32) * 0.97 ** np.arange(width, dtype=np.float32) + 3, labels


@pytest.mark.parametrize(("num", "width", "num_classes"), [(300, 20, 3), (400, 30, 2), (60, 90, 4)])
def test_regressions_are_scikit_learns(num: int, width: int, num_classes: int) -> None:
    features, labels = classes_of(num, width, num_classes)
    rows = (features - features.mean(0)) / features.std(0)
    penalties = [1e-3, 1e-1, 10.0]
    weights = 1 / np.bincount(labels)[labels]
    left_out = np.arange(num) % 5 == 0
    columns = torch.tensor(np.stack([weights] * 3 + [weights * ~left_out], 1))
    fitted = [
        (dtype, fit_logistic(
            torch.tensor(rows, dtype=dtype), torch.tensor(labels), num_classes, torch.tensor([*penalties, 0.1]),
            columns, max_iterations=2000, tolerance=tolerance,
        )) for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5))
    ]  # fmt: skip
    for index, penalty in enumerate([*penalties, 0.1]):
        mine = columns[:, index].numpy()
        # two classes have two vectors of coefficients here, one there
        strength = 1 / (penalty * mine.sum()) * (2 if num_classes == 2 else 1)
        reference = LogisticRegression(C=strength, tol=1e-9, max_iter=10_000).fit(rows.astype(float), labels, mine)
        expected = reference.predict_proba(rows)
        for dtype, theta in fitted:
            found = log_probabilities(torch.tensor(rows, dtype=dtype), theta)[:, index].exp().numpy()
            np.testing.assert_allclose(found, expected, atol=1e-5 if dtype == torch.float64 else 1e-3)


def test_features_that_vary_in_few_directions_take_no_more_iterations() -> None:
    """As networks' do: without a guess of how they vary, hundreds of iterations end far from the minimum."""
    rng = np.random.default_rng(0)
    size, turn = 1 / np.arange(1, 65), np.linalg.qr(rng.normal(size=(64, 64)))[0]
    labels = rng.integers(0, 3, 800)
    rows = (rng.normal(size=(800, 64)) + rng.normal(size=(3, 64))[labels] / 3) * size @ turn
    rows = (rows - rows.mean(0)) / rows.std(0)
    penalty = 1e-4
    theta = fit_logistic(
        torch.tensor(rows), torch.tensor(labels), 3, torch.tensor([penalty]), torch.ones(800, 1),
        max_iterations=60, tolerance=2e-6,
    )  # fmt: skip
    reference = LogisticRegression(C=1 / (penalty * 800), tol=1e-9, max_iter=20_000).fit(rows, labels)
    log_probs = log_probabilities(torch.tensor(rows), theta)[:, 0].numpy()
    np.testing.assert_allclose(np.exp(log_probs), reference.predict_proba(rows), atol=1e-4)

    def objective(log_probs: np.ndarray, coefficients: np.ndarray) -> float:
        return -log_probs[np.arange(800), labels].mean() + penalty / 2 * np.square(coefficients).sum()

    least = objective(reference.predict_log_proba(rows), reference.coef_)
    assert objective(log_probs, theta[:-1].numpy()) < least + 1e-8


@pytest.mark.parametrize("num_classes", [2, 4])
def test_directions_of_very_different_spread_take_few_iterations(num_classes: int) -> None:
    """As features of networks have them; without the covariance it takes some two hundred iterations."""
    rng = np.random.default_rng(0)
    turned = np.linalg.qr(rng.normal(size=(40, 40)))[0]
    rows = rng.normal(size=(2000, 40)) * np.geomspace(10, 0.01, 40)
    labels = (rows[:, :num_classes] / rows[:, :num_classes].std(0) + rng.normal(size=(2000, num_classes))).argmax(1)
    rows, penalty = rows @ turned, 1e-4
    theta = fit_logistic(
        torch.tensor(rows), torch.tensor(labels), num_classes, torch.tensor([penalty]), torch.ones(2000, 1),
        max_iterations=25, tolerance=1e-6,
    )  # fmt: skip
    reference = LogisticRegression(C=(2 if num_classes == 2 else 1) / (penalty * 2000), tol=1e-10, max_iter=20_000)
    expected = reference.fit(rows, labels).predict_proba(rows)
    found = log_probabilities(torch.tensor(rows), theta)[:, 0].exp().numpy()
    np.testing.assert_allclose(found, expected, atol=2e-3)


def test_scaling_is_that_of_the_training_rows() -> None:
    features, _ = classes_of(200, 12, 2)
    train, others = features[:150].astype(np.float64), features[150:].astype(np.float64)
    for scaling in ("each", "all"):
        rows, of_others = scaled(features[:150], scaling)
        deviation = train.std(0) if scaling == "each" else np.sqrt(train.var(0).mean())
        np.testing.assert_allclose(rows, (train - train.mean(0)) / deviation, atol=1e-4)
        np.testing.assert_allclose(of_others(features[150:]), (others - train.mean(0)) / deviation, atol=1e-4)
    constant = np.concatenate([features[:150], np.full((150, 1), 7, np.float32)], 1)
    assert (scaled(constant, "each")[0][:, -1] == 0).all()


def test_a_span_of_the_rows_changes_no_product() -> None:
    features, _ = classes_of(20, 50, 2)
    rows, of_others = scaled(features[:12], "each")
    assert rows.shape == (12, 12)
    full = (features - features[:12].mean(0)) / features[:12].std(0)
    np.testing.assert_allclose(rows @ rows.T, full[:12] @ full[:12].T, rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(rows @ of_others(features[12:]).T, full[:12] @ full[12:].T, rtol=1e-3, atol=1e-2)


def by_hand(features: np.ndarray, labels: np.ndarray, fold: Fold, scaling: str, penalty: float) -> np.ndarray:
    """scikit-learn's probabilities with a given scaling and penalty."""
    train = features[fold.train].astype(np.float64)
    deviation = train.std(0) if scaling == "each" else np.sqrt(train.var(0).mean())
    rows = (features - train.mean(0)) / deviation
    num_classes = len(np.unique(labels))
    strength = (2 if num_classes == 2 else 1) / (penalty * features.shape[1])
    model = LogisticRegression(C=strength, class_weight="balanced", tol=1e-8, max_iter=10_000)
    return model.fit(rows[fold.train], labels[fold.train]).predict_proba(rows)


def test_linear_probe_is_scikit_learns_with_what_was_chosen_by_inner_folds() -> None:
    features, labels = classes_of(150, 16, 3)
    cases = np.arange(150) // 2
    folds = grouped_folds(labels, cases, folds=3, repeats=1)
    found = linear_probe(features, labels, cases, folds, seed=4)
    assert found.num_fitted == max(len(fold.train) for fold in folds)
    for fold, choice in zip(folds, found.choices, strict=True):
        expected = by_hand(features, labels, fold, choice.scaling, choice.penalty)
        np.testing.assert_allclose(found.predictions[CLEAN].said[0, fold.test], expected[fold.test], atol=5e-3)
        assert choice.by == "inner folds"
    # the choice: by hand, over all pairs, on rows scaled as the training rows are
    fold, choice = folds[0], found.choices[0]
    losses = {}
    held_out = inner_folds(labels[fold.train], cases[fold.train], 4)
    for scaling in ("each", "all"):
        for penalty in PENALTIES[1:]:
            log_loss = np.empty(len(fold.train))
            for out in held_out:
                known = np.setdiff1d(np.arange(len(fold.train)), out)
                rows = scaled(features[fold.train], scaling)[0].numpy().astype(np.float64)
                strength = 1 / (penalty * 16)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    model = LogisticRegression(C=strength, class_weight="balanced", max_iter=5000)
                    model.fit(rows[known], labels[fold.train][known])
                log_loss[out] = -model.predict_log_proba(rows[out])[np.arange(len(out)), labels[fold.train][out]]
            losses[scaling, penalty] = np.mean([log_loss[labels[fold.train] == c].mean() for c in range(3)])
    assert min(losses, key=losses.get) == (choice.scaling, choice.penalty)


def test_nothing_of_the_asked_rows_reaches_the_answers() -> None:
    """Labels, and features of other rows, that are asked in the same fold change no answer."""
    features, labels = classes_of(90, 10, 3)
    cases = np.arange(90)
    folds = grouped_folds(labels, cases, folds=3, repeats=1)[:1]
    first = linear_probe(features, labels, cases, folds).predictions[CLEAN].said[0]
    test = folds[0].test
    poisoned, lied = features.copy(), labels.copy()
    poisoned[test[1:]] *= -50
    lied[test] = (lied[test] + 1) % 3
    second = linear_probe(poisoned, lied, cases, folds).predictions[CLEAN].said[0]
    np.testing.assert_array_equal(first[test[0]], second[test[0]])
    for k, of_k in knn_probe(features, labels, cases, folds).items():
        other = knn_probe(poisoned, lied, cases, folds)[k][CLEAN].said
        np.testing.assert_array_equal(of_k[CLEAN].said[0, test[0]], other[0, test[0]])
    for shots, predictions in few_shot(features, labels, cases, folds).items():
        np.testing.assert_array_equal(
            predictions.said[0, test[0]], few_shot(poisoned, lied, cases, folds)[shots].said[0, test[0]]
        )


def test_noise_is_worth_nothing() -> None:
    """Out-of-fold answers about labels that features do not tell, with rows of a case alike: no leak by case."""
    linear, nearest, leaking = [], [], []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        cases = np.repeat(np.arange(100), 3)
        labels = rng.integers(0, 2, 100)[cases]
        features = (rng.normal(size=(100, 12))[cases] + 0.1 * rng.normal(size=(300, 12))).astype(np.float32)
        folds = grouped_folds(labels, cases, folds=5, repeats=1)
        linear.append(score(linear_probe(features, labels, cases, folds).predictions[CLEAN], "auroc"))
        nearest.append(score(knn_probe(features, labels, cases, folds)[1][CLEAN], "auroc"))
        torn = [np.arange(300) % 3 == number for number in range(3)]  # rows of the same case on both sides
        torn = [Fold(0, str(n), np.flatnonzero(~test), np.flatnonzero(test)) for n, test in enumerate(torn)]
        leaking.append(score(knn_probe(features, labels, cases, torn)[1][CLEAN], "auroc"))
    # a single one scatters by 0.08; the linear one lies at 0.47 on average, as scikit-learn's does
    assert 0.4 < np.mean(linear) < 0.58 and 0.42 < np.mean(nearest) < 0.58
    assert np.mean(leaking) > 0.95


def test_copies_are_asked_of_the_same_regressions() -> None:
    features, labels = classes_of(120, 10, 2)
    cases = np.arange(120)
    folds = grouped_folds(labels, cases, folds=3, repeats=2)
    changed = features[:, ::-1].copy()
    found = linear_probe(
        features, labels, cases, folds, tested={"same": features.copy(), "turned": changed}
    ).predictions
    np.testing.assert_array_equal(found["same"].said, found[CLEAN].said)
    assert score(found["turned"], "auroc") < score(found[CLEAN], "auroc") - 0.2
    neighbours = knn_probe(features, labels, cases, folds, tested={"turned": changed})
    assert score(neighbours[5]["turned"], "auroc") < score(neighbours[5][CLEAN], "auroc") - 0.1


def test_neighbours_are_asked_by_fold() -> None:
    features, labels = classes_of(120, 10, 3)
    folds = grouped_folds(labels, np.arange(120), folds=4, repeats=2)
    found = knn_probe(features, labels, np.arange(120), folds)
    for fold in folds:
        mean = features[fold.train].mean(0, dtype=np.float64)
        for k in (1, 5, 20):
            reference = KNeighborsClassifier(k, metric="cosine").fit(features[fold.train] - mean, labels[fold.train])
            expected = reference.predict_proba(features[fold.test] - mean)
            np.testing.assert_allclose(found[k][CLEAN].said[fold.repeat, fold.test], expected, atol=1e-3)


def test_ridge_is_scikit_learns_with_what_was_chosen() -> None:
    rng = np.random.default_rng(0)
    features, _ = classes_of(160, 20, 2)
    values = features @ rng.normal(size=20) + 3 * rng.normal(size=160)
    cases = np.arange(160) // 2
    folds = grouped_folds(strata_of_values(values), cases, folds=4, repeats=1)
    found = ridge_probe(features, values, cases, folds)
    for fold, choice in zip(folds, found.choices, strict=True):
        train = features[fold.train].astype(np.float64)
        deviation = train.std(0) if choice.scaling == "each" else np.sqrt(train.var(0).mean())
        rows = (features - train.mean(0)) / deviation
        model = Ridge(alpha=choice.penalty * 20).fit(rows[fold.train], values[fold.train])
        np.testing.assert_allclose(
            found.predictions[CLEAN].said[0, fold.test], model.predict(rows[fold.test]), rtol=1e-3, atol=1e-2
        )
    assert score(found.predictions[CLEAN], "r2") > 0.5


def test_few_shots_take_as_many_rows_of_as_many_cases_and_get_better() -> None:
    features, labels = classes_of(300, 12, 3, seed=2)
    cases = np.arange(300) // 5
    folds = grouped_folds(labels, cases, folds=5, repeats=4)
    found = few_shot(features, labels, cases, folds)
    scores = {shots: score(predictions, "balanced_accuracy") for shots, predictions in found.items()}
    assert 0.36 < scores[1] < scores[5] < scores[10]
    # of one example a class, the answer is the example with the larger cosine
    fold = folds[0]
    drawn = _drawn(labels, cases, fold.train, [0, 0])
    centred = features - features[fold.train].mean(0)
    units = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    examples = np.stack([units[drawn[label][0]] for label in range(3)])
    np.testing.assert_array_equal(found[1].said[0, fold.test].argmax(1), (units[fold.test] @ examples.T).argmax(1))
    for label, rows in drawn.items():
        assert set(labels[rows]) == {label} and set(rows) <= set(fold.train)
        num_cases = len(set(cases[rows]))
        assert len(set(cases[rows[:num_cases]])) == num_cases


def test_a_class_that_a_fold_does_not_know_is_never_the_answer() -> None:
    features, labels = classes_of(60, 8, 3)
    fold = [Fold(0, "1", np.flatnonzero(labels != 2), np.flatnonzero(labels == 2))]
    assert linear_probe(features, labels, np.arange(60), fold).predictions[CLEAN].said[0, fold[0].test, 2].max() < 0.01
    assert few_shot(features, labels, np.arange(60), fold)[5].said[0, fold[0].test, 2].max() == 0


def test_fewer_rows_are_fitted_where_there_are_many() -> None:
    features, labels = classes_of(300, 8, 2)
    cases = np.minimum(np.arange(300), 100)  # two thirds are of one case
    folds = grouped_folds(labels, cases, folds=3, repeats=1)
    found = linear_probe(features, labels, cases, folds, max_rows=80)
    assert found.num_fitted == 80
    assert score(found.predictions[CLEAN], "auroc") > 0.7


def test_fewer_rows_are_stated() -> None:
    folds = [Fold(0, "1", np.arange(50), np.arange(50, 60)), Fold(0, "2", np.arange(9), np.arange(9, 60))]
    assert fitted_on_fewer(folds) == []
    assert fitted_on_fewer(folds, 40) == [
        "regressions are fitted on 40 of up to 50 training rows, as equal as possible a case"
    ]


def test_too_few_cases_to_choose_by_take_the_default() -> None:
    features, labels = classes_of(40, 8, 2)
    cases = np.where(labels == 1, 0, 1 + np.arange(40))
    fold = [Fold(0, "1", np.arange(30), np.arange(30, 40))]
    assert {choice.by for choice in linear_probe(features, labels, cases, fold).choices} == {"default"}
    assert inner_folds(labels, cases, 0) == []


def test_pooling_keeps_what_was_not_asked_apart() -> None:
    folds = [Fold(0, "1", np.array([2]), np.array([0, 1])), Fold(3, "1", np.array([0]), np.array([2]))]
    said = pooled(folds, [np.array([1.0, 2.0]), np.array([3.0])], 4)
    np.testing.assert_array_equal(said, [[1, 2, np.nan, np.nan], [np.nan, np.nan, 3, np.nan]])
