"""Nearest neighbours against scikit-learn's and against a full sort in float64."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from dinoscope.evaluate import knn
from dinoscope.evaluate.knn import knn_predict, neighbours, vote


@pytest.fixture
def bank() -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.normal(size=(900, 24)) + 0.5).astype(np.float32)


@pytest.fixture
def queries() -> np.ndarray:
    return (np.random.default_rng(1).normal(size=(70, 24)) + 0.5).astype(np.float32)


def sorted_cosines(queries: np.ndarray, bank: np.ndarray) -> np.ndarray:
    a, b = queries.astype(np.float64), bank.astype(np.float64)
    return (a / np.linalg.norm(a, axis=1, keepdims=True)) @ (b / np.linalg.norm(b, axis=1, keepdims=True)).T


@pytest.mark.parametrize("chunk", [64, 100_000])
def test_neighbours_are_scikit_learns(
    queries: np.ndarray, bank: np.ndarray, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knn, "_CHUNK_ROWS", chunk)
    monkeypatch.setattr(knn, "_QUERIES_AT_ONCE", 32)
    distances, expected = NearestNeighbors(n_neighbors=20, metric="cosine").fit(bank).kneighbors(queries)
    rows, cosines = neighbours(queries, bank, 20)
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_allclose(cosines, 1 - distances, atol=2e-6)


@pytest.mark.parametrize("center", [False, True])
def test_answers_are_scikit_learns(queries: np.ndarray, bank: np.ndarray, center: bool) -> None:
    labels = np.random.default_rng(2).integers(0, 3, len(bank))
    mean = bank.mean(0, dtype=np.float64) if center else 0
    found = knn_predict(queries, bank, labels, 3, ks=(1, 5, 20), center=center)
    for k, probabilities in found.items():
        reference = KNeighborsClassifier(k, metric="cosine").fit(bank - mean, labels).predict_proba(queries - mean)
        np.testing.assert_allclose(probabilities, reference, atol=1e-3)
        clear = np.sort(reference, 1)[:, -1] > np.sort(reference, 1)[:, -2]
        np.testing.assert_array_equal(probabilities.argmax(1)[clear], reference.argmax(1)[clear])


def test_nobody_of_the_same_group_is_a_neighbour(queries: np.ndarray, bank: np.ndarray) -> None:
    mine, theirs = np.arange(len(queries)) % 7, np.arange(len(bank)) % 9
    rows, _ = neighbours(queries, bank, 15, exclude_groups=(mine, theirs))
    cosines = np.where(mine[:, None] == theirs, -np.inf, sorted_cosines(queries, bank))
    np.testing.assert_array_equal(rows, np.argsort(-cosines, axis=1)[:, :15])


def test_fewer_neighbours_than_asked_for_are_marked(queries: np.ndarray, bank: np.ndarray) -> None:
    groups = (np.zeros(len(queries), int), (np.arange(len(bank)) >= 3).astype(int))
    rows, cosines = neighbours(queries, bank, 5, exclude_groups=(1 - groups[0], groups[1]))
    assert (rows[:, 3:] == -1).all() and np.isneginf(cosines[:, 3:]).all()
    assert (np.sort(rows[:, :3], 1) == [0, 1, 2]).all()
    probabilities = knn_predict(
        queries, bank, np.ones(len(bank), int), 2, exclude_groups=(1 - groups[0], groups[1] * 0 + 1)
    )
    np.testing.assert_allclose(probabilities[5], 0.5)  # nobody votes


def test_of_equal_ones_the_lower_row_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "_CHUNK_ROWS", 16)
    bank = np.eye(4, dtype=np.float32)[np.arange(64) % 4]
    rows, _ = neighbours(np.eye(4, dtype=np.float32), bank, 6)
    np.testing.assert_array_equal(rows, np.arange(4)[:, None] + 4 * np.arange(6))


@pytest.mark.parametrize("threads", [1, 3])
def test_copies_are_in_order_whatever_rounding_says(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of matrices give rows that are the same other last digits, by where they lie."""
    monkeypatch.setattr(knn, "_CHUNK_ROWS", 192)
    rng, before = np.random.default_rng(5), torch.get_num_threads()
    bank = rng.normal(size=(1_001, 129)).astype(np.float32)
    copies = np.sort(rng.choice(1_001, 25, replace=False))
    bank[copies] = bank[copies[0]]
    torch.set_num_threads(threads)
    try:
        rows, _ = neighbours(bank[copies[:3]], bank, 12)
        one, _ = neighbours(bank[copies[:1]], bank, 12)
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(rows, np.tile(copies[:12], (3, 1)))
    np.testing.assert_array_equal(one, rows[:1])


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_later_chunks_are_searched_where_they_have_nearer_ones(
    in_order: bool, grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that come nearer and nearer are found in every chunk, and rows in no order in few blocks."""
    monkeypatch.setattr(knn, "_CHUNK_ROWS", 256)
    searches, hits = [], knn._hits
    monkeypatch.setattr(knn, "_hits", lambda *given: searches.append(hits(*given)) or searches[-1])
    rng = np.random.default_rng(6)
    bank, queries = rng.normal(size=(5_003, 16)).astype(np.float32), rng.normal(size=(9, 16)).astype(np.float32)
    if in_order:
        queries = queries[:1] + 0.01 * queries
        bank = bank[np.argsort(sorted_cosines(queries[:1], bank)[0])]
    groups = (np.arange(9) % 4, rng.integers(0, 4, 5_003)) if grouped else None
    rows, cosines = neighbours(queries, bank, 10, exclude_groups=groups)
    expected = sorted_cosines(queries, bank)
    if grouped:
        expected[groups[0][:, None] == groups[1]] = -np.inf
    np.testing.assert_array_equal(rows, np.argsort(-expected, axis=1)[:, :10])
    np.testing.assert_allclose(cosines, np.take_along_axis(expected, rows, 1), atol=1e-6)
    assert all(found is None for found in searches) == in_order  # in full, and by blocks


def test_half_precision_from_a_file_is_as_from_memory(queries: np.ndarray, bank: np.ndarray, tmp_path: Path) -> None:
    stored = np.memmap(tmp_path / "bank", np.float16, "w+", shape=bank.shape)
    stored[:] = bank
    read = np.memmap(tmp_path / "bank", np.float16, "r", shape=bank.shape)
    rows, cosines = neighbours(queries, read, 8)
    expected = np.argsort(-sorted_cosines(queries, bank.astype(np.float16)), axis=1)[:, :8]
    np.testing.assert_array_equal(rows, expected)
    assert (cosines > 0).all()


def test_votes_and_their_ties() -> None:
    found = vote(np.array([[2, 0, 0, 2], [1, 1, 0, -1], [-1, -1, -1, -1], [0, 1, 1, 1]]), 3)
    assert found.argmax(1).tolist() == [2, 1, 0, 1]  # the nearest wins a tie, and a tie only
    np.testing.assert_allclose(found, [[0.5, 0, 0.5], [1 / 3, 2 / 3, 0], [1 / 3] * 3, [0.25, 0.75, 0]], atol=1e-3)
    np.testing.assert_allclose(found.sum(1), 1)


def test_what_all_share_says_nothing() -> None:
    """A large common part leaves cosines to rounding unless it is taken off."""
    rng = np.random.default_rng(3)
    labels = np.arange(200) % 2
    rows = (np.where(labels, 1.0, -1.0)[:, None] * [1, 0, 0] + 0.3 * rng.normal(size=(200, 3)) + 1e4).astype(np.float32)
    found = knn_predict(rows[100:], rows[:100], labels[:100], 2, ks=(5,))[5]
    assert (found.argmax(1) == labels[100:]).mean() > 0.95
