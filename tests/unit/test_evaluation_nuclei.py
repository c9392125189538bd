"""Answers of benchmarks/evaluation_nuclei.py put together: images of both halves, repeats of all seeds."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

from dinoscope.evaluate.answers import Answers
from dinoscope.evaluate.comparing import compare_models
from dinoscope.evaluate.scores import mean_iou
from dinoscope.evaluate.units import Unit, Units


@pytest.fixture
def script(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[2] / "benchmarks"), *sys.path])
    return importlib.import_module("evaluation_nuclei")


def test_halves_are_images_and_seeds_are_repeats(script):
    rng, halves, seeds, repeats = np.random.default_rng(0), (3, 4), 2, 5
    units = script.joined_units(
        [Units("masks-nuclei", "masks", [Unit(str(i), str(i), "test") for i in range(num)]) for num in halves]
    )
    assert [unit.name for unit in units.units] == list("0123456") and len(set(units.groups.tolist())) == 7
    counts = [[rng.integers(1, 50, (repeats, num, 2, 2)) for num in halves] for _ in range(seeds)]
    answers = [
        [Answers({}, np.zeros(num, np.int8), confusions={"dense": of_half}, numbers={"x": seed + 0.5 * half})
         for half, (num, of_half) in enumerate(zip(halves, of_seed, strict=True))]
        for seed, of_seed in enumerate(counts)
    ]  # fmt: skip
    joined = script.joined_answers(answers)
    assert joined.confusions["dense"].shape == (seeds * repeats, 7, 2, 2) and joined.numbers == {"x": 0.75}
    found = compare_models(units, {"nuclei": joined}, {}, draws=100)
    # of each repeat of each seed one score of all pixels of both halves, then their mean
    expected = [
        float(mean_iou(sum(of_half[repeat].sum(axis=0) for of_half in of_seed)))
        for of_seed in counts
        for repeat in range(repeats)
    ]
    (row,) = found.rows
    assert row.value == pytest.approx(np.mean(expected)) and (row.cases, row.units) == (7, 7)
