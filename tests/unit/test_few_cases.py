"""Tasks of few cases, rare values and skipped slides: a note says why nothing is told, and no job fails."""

import numpy as np
import pytest

from dinoscope.errors import ConfigError
from dinoscope.evaluate.folds import grouped_folds, strata_of_cases, strata_of_survival
from dinoscope.evaluate.inputs import UnitFeatures
from dinoscope.evaluate.measuring import Settings, answer_classes, answer_values
from dinoscope.evaluate.probe import ridge_probe
from dinoscope.evaluate.survival import cox_probe
from dinoscope.evaluate.units import Unit, Units, read_units


def answers(kind, values, sets="test", sites=None, splits=("grouped",)):
    """Of a model that says nothing but the number of the unit, about units of the values."""
    units = [
        Unit(f"c{place}", f"c{place}", sets, value, (f"s{place}",), sites[place] if sites else None)
        for place, value in enumerate(values)
    ]
    task = Units("label-x", kind, units, sorted(set(values)) if kind == "classes" else [])
    rows = np.random.default_rng(0).normal(size=(len(values), 4)).astype(np.float32)
    features = UnitFeatures({}, rows, [row[None] for row in rows], [np.zeros((1, 2))] * len(rows), [np.zeros(1)])
    ask = answer_classes if kind == "classes" else answer_values
    return ask(task, rows, Settings(5, 1, splits, attention=False), features)


@pytest.mark.parametrize(
    ("kind", "values", "told"),
    [
        ("classes", ["a", "b"] * 5 + ["tumuor"], "class tumuor has one test case only"),
        ("classes", ["a"] * 8, "all test units are of one class, a"),
        ("number", [2.5] * 8, "all test units have the same value"),
        ("number", [1.5, 2.5, 3.5], "there are 3 test cases, and at least four are needed"),
        ("survival", [[1.0 + time, 0.0] for time in range(40)], "0 events among 40 test units"),
        ("survival", [[1.0 + time, float(time < 9)] for time in range(40)], "9 events among 40 test units"),
    ],
)
def test_what_cannot_be_asked_is_a_note(kind, values, told):
    found = answers(kind, values)
    assert not found.said
    assert any(told in note for note in found.notes), found.notes


def test_few_folds_name_the_class():
    assert "3 folds instead of 5: class rare has 3 cases" in answers("classes", ["a", "b"] * 9 + ["rare"] * 3).notes


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("number", list(np.linspace(0, 1, 12))),
        ("number", [0.0] * 38 + [1.5, 2.5]),  # no stratum of the rare values has a case a fold
        ("survival", [[1.0 + time, float(time > 0)] for time in range(40)]),  # one is censored
    ],
)
def test_rare_values_leave_all_folds(kind, values):
    found = answers(kind, values)
    (name,) = found.said
    assert name in ("ridge", "cox") and np.isfinite(found.said[name]).all() and not found.notes


def test_rare_values_leave_inner_folds_to_choose_by():
    rng, cases = np.random.default_rng(0), np.arange(40)
    rows, times, events = rng.normal(size=(40, 4)).astype(np.float32), rng.permutation(40) + 1.0, np.ones(40)
    events[3] = 0
    folds = grouped_folds(strata_of_survival(np.stack([times, events], 1), cases, 5), cases, folds=5, repeats=1)
    assert {choice.by for choice in cox_probe(rows, times, events, cases, folds).choices} == {"inner folds"}
    values = np.where(cases < 38, 0.0, 1.0 + cases)
    folds = grouped_folds(strata_of_cases(values, cases, 5), cases, folds=5, repeats=1)
    assert {choice.by for choice in ridge_probe(rows, values, cases, folds).choices} == {"inner folds"}


@pytest.mark.parametrize(
    ("kind", "value"), [("classes", "a"), ("number", 1.5), ("survival", [2.0, 1.0])], ids=lambda value: str(value)
)
def test_a_task_of_skipped_slides_alone_says_nothing(kind, value):
    found = answers(kind, [value] * 4, sets="skipped")
    assert not found.said and not found.sums


def test_sites_are_named():
    found = answers("classes", ["a"] * 6 + ["b"] * 6, sites=["Rome"] * 6 + ["Pisa"] * 6, splits=("leave-one-site-out",))
    assert any("without site Pisa" in note for note in found.notes), found.notes


def test_missing_units_are_an_error_of_the_user(tmp_path):
    with pytest.raises(ConfigError, match=r"does not exist; write it with evaluate\.py units"):
        read_units(tmp_path / "units.json")
