"""Attention on bags whose answer is known, beside the mean, which cannot see it."""

import numpy as np
import pytest
import torch

from dinoscope.evaluate import mil
from dinoscope.evaluate.folds import grouped_folds, strata_of_values
from dinoscope.evaluate.mil import GatedAttention, MilSettings, attention_probe, mean_pool
from dinoscope.evaluate.probe import CLEAN, linear_probe
from dinoscope.evaluate.scores import score

KEYS = 6  # tiles of a bag of the one class that tell it
QUICK = MilSettings(hidden=32, attention=16, dropout=0.1, learning_rate=5e-3, epochs=25, bags_at_once=8)


def bags_of(num: int, seed: int = 0) -> tuple[list[np.ndarray], np.ndarray]:
    """Bags of two classes with the same mean: a few tiles of one class are far off, to either side."""
    rng, labels = np.random.default_rng(seed), np.arange(num) % 2
    bags = [rng.normal(size=(rng.integers(25, 45), 10)).astype(np.float32) for _ in range(num)]
    for bag, label in zip(bags, labels, strict=True):
        if label:
            bag[:KEYS, 0] += np.repeat([4, -4], KEYS // 2)
    return bags, labels


def test_attention_finds_the_tiles_that_tell_where_the_mean_cannot() -> None:
    bags, labels = bags_of(72)
    cases = np.arange(72)
    folds = grouped_folds(labels, cases, folds=3, repeats=1)
    found = attention_probe(bags, labels, cases, folds, settings=QUICK, keep_models=True)
    by_mean = linear_probe(mean_pool(bags), labels, cases, folds).predictions[CLEAN]
    assert score(found.predictions, "auroc") > 0.93
    assert score(by_mean, "auroc") < 0.75
    on_keys, share = [], []
    for model, fold in zip(found.models, folds, strict=True):
        for index in fold.test[labels[fold.test] == 1]:
            _, weights = model.ask(bags[index])
            assert float(weights.sum()) == pytest.approx(1, abs=1e-5)
            on_keys.append(float(weights[:KEYS].sum()))
            share.append(KEYS / len(bags[index]))
    assert np.mean(on_keys) > 0.6 > 3 * np.mean(share) - 0.1


def test_network_is_the_formula_bag_by_bag() -> None:
    torch.manual_seed(0)
    network = GatedAttention(10, 3, QUICK).eval().double()
    rng = np.random.default_rng(0)
    bags = [torch.tensor(rng.normal(size=(size, 10))) for size in (4, 1, 7)]
    numbers = torch.tensor(np.repeat([0, 1, 2], [4, 1, 7]))
    outputs, weights = network(torch.cat(bags), numbers, 3)
    start = 0
    for index, bag in enumerate(bags):
        hidden = torch.relu(bag @ network.embed[0].weight.T + network.embed[0].bias)
        gated = torch.tanh(network.value(hidden)) * torch.sigmoid(network.gate(hidden))
        expected = torch.softmax(network.weigh(gated)[:, 0], 0)
        torch.testing.assert_close(weights[start : start + len(bag)], expected)
        torch.testing.assert_close(outputs[index], network.head(expected @ hidden))
        start += len(bag)


@pytest.mark.long
def test_values_and_survival_are_learned() -> None:
    rng = np.random.default_rng(1)
    signal, cases = rng.normal(size=90), np.arange(90)
    bags = [
        rng.normal(size=(20, 6)).astype(np.float32) + np.float32(s) * np.eye(6, dtype=np.float32)[0] for s in signal
    ]
    values = 50 + 7 * signal
    folds = grouped_folds(strata_of_values(values), cases, folds=3, repeats=1)
    found = attention_probe(bags, values, cases, folds, kind="values", settings=QUICK)
    assert score(found.predictions, "r2") > 0.6
    times = rng.exponential(np.exp(-2 * signal))
    events = rng.random(90) < 0.8
    truth = np.stack([times, events], 1)
    folds = grouped_folds(events.astype(int), cases, folds=3, repeats=1)
    found = attention_probe(bags, truth, cases, folds, kind="survival", settings=QUICK)
    assert score(found.predictions, "c_index") > 0.75


def test_nothing_of_the_asked_bags_reaches_the_answers_and_runs_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    bags, labels = bags_of(40)
    cases = np.arange(40)
    settings = MilSettings(hidden=16, attention=8, epochs=3, tiles=10)
    folds = grouped_folds(labels, cases, folds=4, repeats=1)[:1]
    first = attention_probe(bags, labels, cases, folds, settings=settings).predictions.said[0]
    test = folds[0].test
    poisoned, lied = list(bags), labels.copy()
    for index in test[1:]:
        poisoned[index] = bags[index] * 40
    lied[test] = 1 - lied[test]
    torch.manual_seed(99)  # the state of others does not matter, and is left alone
    before = torch.get_rng_state()
    second = attention_probe(poisoned, lied, cases, folds, settings=settings).predictions.said[0]
    np.testing.assert_array_equal(first[test[0]], second[test[0]])
    assert torch.equal(before, torch.get_rng_state())
    other = attention_probe(bags, labels, cases, folds, settings=settings, seed=1).predictions.said[0]
    assert not np.array_equal(first[test], other[test])
    # parts of a batch are the batch
    monkeypatch.setattr(mil, "_TILES_AT_ONCE", 25)
    monkeypatch.setattr(mil, "_TILES_ASKED_AT_ONCE", 25)
    parts = attention_probe(bags, labels, cases, folds, settings=settings).predictions.said[0]
    np.testing.assert_allclose(parts[test], first[test], atol=0.02)


def test_mean_of_bags() -> None:
    bags = [np.array([[1, 2], [3, 6]], np.float16), np.array([[5, 5]], np.float16)]
    np.testing.assert_array_equal(mean_pool(bags), [[2, 4], [5, 5]])


def test_parts_hold_each_bag_once() -> None:
    assert list(mil._parts([20_000, 20_000, 5, 40_000, 1], 32_768)) == [(0, 1), (1, 3), (3, 4), (4, 5)]
    assert list(mil._parts([5], 32_768)) == [(0, 1)]
