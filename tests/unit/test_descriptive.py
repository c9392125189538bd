"""Descriptions of features against float64 formulas by brute force."""

import math

import numpy as np
import pytest

from dinoscope.evaluate import descriptive
from dinoscope.evaluate.descriptive import (
    describe,
    effective_rank,
    gram_distance,
    mean_cosine,
    neighbour_origins,
    outlier_patches,
    rank_me,
    uniformity,
)


def features_of(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * 0.9 ** np.arange(shape[1]) + 0.3).astype(np.float32)


SHAPES = pytest.mark.parametrize("shape", [(120, 30), (25, 60)])


@SHAPES
def test_rankme_is_its_formula_in_float64(shape: tuple[int, int]) -> None:
    features = features_of(shape)
    singular = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    shares = singular / singular.sum() + 1e-7
    assert rank_me(features) == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-6)


@SHAPES
def test_effective_rank_is_its_formula_in_float64(shape: tuple[int, int]) -> None:
    features = features_of(shape).astype(np.float64)
    singular = np.linalg.svd(features - features.mean(0), compute_uv=False)
    shares = singular / singular.sum()
    shares = shares[shares > 1e-12]
    expected = math.exp(-(shares * np.log(shares)).sum())
    assert effective_rank(features) == pytest.approx(expected, rel=1e-6)
    assert effective_rank(features + 1000) == pytest.approx(expected, rel=1e-4)  # what all share does not count


def test_effective_rank_of_what_is_known() -> None:
    assert effective_rank(np.ones((10, 4))) == 1
    assert effective_rank(np.concatenate([np.eye(5), -np.eye(5)])) == pytest.approx(5)
    line = np.outer(np.arange(9.0), [1, 2, 3])
    assert effective_rank(line) == pytest.approx(1)


def test_uniformity_and_cosine_are_those_of_double_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    features = features_of((40, 6))
    units = features.astype(np.float64) / np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    pairs = [(i, j) for i in range(40) for j in range(40) if i != j]
    expected = math.log(np.mean([math.exp(-2 * ((units[i] - units[j]) ** 2).sum()) for i, j in pairs]))
    assert uniformity(features) == pytest.approx(expected, abs=1e-5)
    monkeypatch.setattr(descriptive, "_ROWS_AT_ONCE", 7)
    assert uniformity(features) == pytest.approx(expected, abs=1e-5)
    assert mean_cosine(features) == pytest.approx(np.mean([units[i] @ units[j] for i, j in pairs]), abs=1e-6)
    assert uniformity(np.ones((5, 3))) == pytest.approx(0, abs=1e-5)


def test_neighbours_come_from_where_they_were_put() -> None:
    """Features are the coordinates of clusters: of a place, then of a slide, and so on."""
    rng = np.random.default_rng(0)
    for level, expected in enumerate(descriptive.ORIGINS):
        site = np.arange(240) % 3
        case = site + 3 * (np.arange(240) // 3 % 4)
        slide = case + 12 * (np.arange(240) // 12 % 2)
        place = slide + 24 * (np.arange(240) // 24 % 2)
        positions = np.stack([place // 24 * 5000.0, np.zeros(240)], 1) + rng.uniform(0, 100, (240, 2))
        names = [place, slide, case, site]
        # clusters of this level in which no nearer kin is a neighbour: one member of each
        within = names[level] if level < 4 else np.zeros(240, int)
        nearer = names[level - 1] if level else np.arange(240)
        member = np.zeros(240, int)
        for key in np.unique(nearer):
            rows = np.flatnonzero(nearer == key)
            member[rows] = np.arange(len(rows))
        anchors = rng.normal(size=(int(within.max()) + 1, 240, 16))
        features = anchors[within, member] + 1e-3 * rng.normal(size=(240, 16))
        found = neighbour_origins(features.astype(np.float32), slide, case, site, positions, place_um=500, k=1)
        assert found.shares[expected] == 1, (expected, found.shares)
        assert sum(found.chance.values()) == pytest.approx(1)


def test_chance_of_origins_is_that_of_all_pairs() -> None:
    rng = np.random.default_rng(1)
    slides, positions = rng.integers(0, 6, 50), rng.uniform(0, 2000, (50, 2))
    cases, sites = slides // 2, slides // 4
    counts = dict.fromkeys(descriptive.ORIGINS, 0)
    for i in range(50):
        for j in range(50):
            if i == j:
                continue
            near = math.dist(positions[i], positions[j]) <= 500
            if slides[i] == slides[j]:
                counts["same place" if near else "same slide"] += 1
            elif cases[i] == cases[j]:
                counts["same case"] += 1
            else:
                counts["same site" if sites[i] == sites[j] else "elsewhere"] += 1
    found = neighbour_origins(features_of((50, 8)), slides, cases, sites, positions)
    assert found.chance == pytest.approx({name: count / 2450 for name, count in counts.items()})
    without = neighbour_origins(features_of((50, 8)), slides, cases)
    assert without.shares["same place"] == without.shares["same site"] == 0


def test_outliers_are_those_that_were_planted() -> None:
    patches = np.random.default_rng(0).normal(size=(4, 50, 32))
    patches[1, 7] *= 10
    patches[3, 2] *= 10
    assert outlier_patches(patches) == 2 / 200


def test_gram_distance_is_that_of_cosine_matrices() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(3, 20, 8)), rng.normal(size=(3, 20, 12))
    expected = []
    for a, b in zip(one, other, strict=True):
        grams = [m / np.linalg.norm(m, axis=1, keepdims=True) for m in (a, b)]
        expected.append(np.square(grams[0] @ grams[0].T - grams[1] @ grams[1].T).mean())
    assert gram_distance(one, other) == pytest.approx(np.mean(expected), rel=1e-5)
    turned = one @ np.linalg.qr(rng.normal(size=(8, 8)))[0]
    assert gram_distance(one, 3 * turned) == pytest.approx(0, abs=1e-10)


def test_all_that_needs_nothing_but_features() -> None:
    found = describe(features_of((40, 6)), np.ones((2, 9, 6)))
    assert set(found) == {"rankme", "effective_rank", "mean_cosine", "uniformity", "outlier_patches"}
    assert "no" not in found and descriptive.NO_VERDICT.startswith("a description")
