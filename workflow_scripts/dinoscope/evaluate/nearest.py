"""Probes without a regression: nearest neighbours, and the nearest mean of a few labelled rows.

Both answer for rows that they were not given, fold by fold, and have nothing to tune.

Shapes: N rows, D width, C classes.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from dinoscope.evaluate.folds import Fold
from dinoscope.evaluate.knn import NEIGHBOURS, knn_predict
from dinoscope.evaluate.scores import Predictions
from dinoscope.evaluate.tuning import CLEAN, pooled

__all__ = ["SHOTS", "few_shot", "knn_probe"]

SHOTS = (1, 5, 10)
_TEMPERATURE = 0.1


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
