"""Differences in robustness between models: against brute force, and of models made to collapse, to fall, to stand."""

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

from dinoscope.evaluate.answers import Answers, read_answers, write_answers
from dinoscope.evaluate.comparing import compare_models, read_comparison, write_comparison
from dinoscope.evaluate.inputs import UnitFeatures
from dinoscope.evaluate.intervals import case_weights
from dinoscope.evaluate.measuring import Settings, answer_classes
from dinoscope.evaluate.robust_measures import (
    change_measures,
    change_sources,
    clean_measure,
    has_direction,
    is_robustness,
    statistic_of_sums,
)
from dinoscope.evaluate.robustness import retention, robustness_index, site_readout
from dinoscope.evaluate.scores import statistic_of_means
from dinoscope.evaluate.units import Unit, Units
from dinoscope.evaluate.verdicts import judge, primary_of, summary_rows

NUM, SETTINGS = 160, Settings(folds=3, repeats=1, attention=False)
AGAINST = {"model": ["base"]}


def tiles(num: int = NUM) -> Units:
    """Two tiles a group, two classes."""
    units = [Unit(str(index), str(index // 2), "test", "ab"[index // 2 % 2]) for index in range(num)]
    return Units("tiles-x", "classes", units, ["a", "b"])


def planted(kind: str, rng: np.random.Generator) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Features of the tiles, and of copies in another stain: of a model that stands, falls, or has collapsed."""
    signal = np.eye(2)[tiles().targets] * 5
    noise, again = rng.normal(size=(2, NUM, 6)), rng.normal(size=(2, NUM, 6))
    if kind == "collapsed":
        rows = 1 + 1e-3 * noise[0]
        return rows, {"stain": rows.copy()}
    changed = signal if kind == "stands" else signal[:, ::-1] * 0.3
    rows = np.concatenate([signal, noise[0]], axis=1)
    return rows, {"stain": np.concatenate([changed, again[0]], axis=1)}


def judged(model: str, base: str) -> dict[str, object]:
    """Measure -> verdict of a planted model against another."""
    rng = np.random.default_rng(0)
    answers = {name: answer_of(kind, rng) for name, kind in (("base", base), ("model", model))}
    found = compare_models(tiles(), answers, AGAINST, draws=500)
    return {one.measure: one for one in judge([found], 0.02, "tiles-x/linear")}


def answer_of(kind: str, rng: np.random.Generator) -> Answers:
    rows, copies = planted(kind, rng)
    return answer_classes(tiles(), rows, SETTINGS, shifted=copies)


def test_names_of_measures() -> None:
    given = ["linear", "linear~unchanged", "linear~stain", "linear~stain@preserved-site", "knn_5", "knn_5~stain"]
    # on another split there is nothing clean beside it
    assert change_measures(given) == ["linear_change~stain"]
    assert change_measures([*given, "linear@preserved-site"])[1] == "linear_change~stain@preserved-site"
    assert change_sources("linear_change~stain", given) == ("linear~unchanged", "linear~stain")
    assert change_sources("cox_change~blur@preserved-site", ["cox@preserved-site"]) == (
        "cox@preserved-site",
        "cox~blur@preserved-site",
    )
    assert change_sources("linear~stain", given) is None and clean_measure("knn_5~stain", given) == "knn_5"
    with_verdict = [*given, "linear_change~stain", "retained~stain", "site_readout", "robustness_index"]
    assert [name for name in with_verdict if has_direction(name) and is_robustness(name)] == [
        "linear~stain",
        "linear~stain@preserved-site",
        "linear_change~stain",
    ]


def said(truth: np.ndarray, right: float, rng: np.random.Generator) -> np.ndarray:
    """Probabilities that are right of so many."""
    answers = np.where(rng.random(len(truth)) < right, truth, 1 - truth)
    return np.eye(2)[answers][None] * 0.8 + 0.1


def test_difference_of_changes_is_that_of_resampled_rows(tmp_path) -> None:
    """Each resample written out row by row, scored by scikit-learn."""
    rng, units = np.random.default_rng(1), tiles(40)
    truth, groups = units.targets, units.groups
    kinds = {"base": (0.9, 0.6), "model": (0.8, 0.75)}
    answers = {}
    for name, (clean, changed) in kinds.items():
        given = {"linear": said(truth, clean, rng), "linear~stain": said(truth, changed, rng)}
        write_answers(tmp_path / "a.npz", Answers({}, np.zeros(40, np.int8), given))
        answers[name] = read_answers(tmp_path / "a.npz")
    found = compare_models(units, answers, AGAINST, draws=200, seed=3)
    write_comparison(tmp_path / "c.npz", found)
    difference = read_comparison(tmp_path / "c.npz").differences["linear_change~stain", "model", "base"]

    def change(name: str, rows: np.ndarray) -> float:
        scores = [
            balanced_accuracy_score(truth[rows], answers[name].said[measure][0, rows].argmax(1))
            for measure in ("linear~stain", "linear")
        ]
        return scores[0] - scores[1]

    everything = np.arange(40)
    assert difference.difference == pytest.approx(change("model", everything) - change("base", everything))
    for weights, resampled in zip(case_weights(20, 200, 3), difference.resampled, strict=True):
        rows = np.concatenate([np.flatnonzero(groups == g).repeat(int(n)) for g, n in enumerate(weights)])
        assert resampled == pytest.approx(change("model", rows) - change("base", rows), abs=1e-6)
    row = next(row for row in found.rows if row.measure == "linear_change~stain" and row.model == "base")
    assert row.score == "change" and row.value == pytest.approx(change("base", everything))
    assert row.low < row.value < row.high


def test_a_collapsed_model_loses_nothing_and_does_not_win() -> None:
    found = judged("collapsed", "falls")
    assert found["linear"].verdict.decision == "worse"
    change = found["linear_change~stain"].verdict
    assert change.low > 0.02  # it does lose less
    assert change.decision == "not judged"
    assert "but it is not shown to be as good on unchanged tiles within 0.02: -0." in change.sentence
    assert found["retained~stain"].verdict.low > 0 and found["retained~stain"].verdict.decision == "not judged"
    # nor does it make another one lose: the same the other way round
    found = judged("falls", "collapsed")
    assert found["linear_change~stain"].verdict.decision == "not judged"
    assert "but the other is not shown to be as good" in found["linear_change~stain"].sentence


def test_a_model_that_stands_is_better_than_one_that_falls() -> None:
    found = judged("stands", "falls")
    for measure in ("linear~stain", "linear_change~stain"):
        assert found[measure].verdict.decision == "better" and "; on unchanged tiles " in found[measure].sentence
    assert found["linear"].verdict.decision == "no clear difference"
    assert judged("falls", "stands")["linear_change~stain"].verdict.decision == "worse"
    assert {one.verdict.decision for one in judged("stands", "stands").values()} <= {
        "no clear difference",
        "inconclusive",
        "not judged",
    }


def test_robustness_is_a_family_of_its_own() -> None:
    """That it was asked changes no other verdict."""
    rng, units = np.random.default_rng(2), tiles()
    answers = {name: answer_of(kind, rng) for name, kind in (("base", "falls"), ("model", "stands"))}
    without = {
        name: Answers({}, one.seen, {measure: given for measure, given in one.said.items() if "~" not in measure})
        for name, one in answers.items()
    }
    both, alone = (compare_models(units, some, AGAINST, draws=500) for some in (answers, without))
    assert primary_of([both], None) == "tiles-x/linear"
    with_it = {one.measure: one.verdict for one in judge([both], 0.02, "tiles-x/linear")}
    for one in judge([alone], 0.02, "tiles-x/linear"):
        assert one.verdict == with_it[one.measure]
    levels = sorted(with_it[measure].level for measure in ("linear~stain", "linear_change~stain"))
    assert levels == pytest.approx([0.95, 0.975])  # Holm's two steps, not those of a family of nine
    # what is chosen beforehand is judged by itself, be it one of these
    chosen = {one.measure: one.verdict for one in judge([both], 0.02, "tiles-x/linear~stain")}
    assert chosen["linear~stain"].level == chosen["linear_change~stain"].level == pytest.approx(0.95)
    rows = summary_rows([both], judge([both], 0.02, "tiles-x/linear"))
    told = next(row for row in rows if row["measure"] == "linear~stain" and row["model"] == "base")
    clean = next(row for row in rows if row["measure"] == "linear" and row["model"] == "base")
    assert told["clean"] == clean["value"] and told["score"] == clean["score"] == "balanced_accuracy"
    assert "clean" not in clean


def test_sums_are_the_statistics_that_they_come_from() -> None:
    rng = np.random.default_rng(4)
    cases = np.repeat(np.arange(40), 4)
    classes, sites = cases % 2, np.array(["north", "south"])[cases // 2 % 2]
    features = rng.normal(size=(160, 8)) + np.outer(sites == "north", np.r_[1, np.zeros(7)])
    units = [Unit(f"C{i}", f"C{i}", "test", "ab"[i % 2], (f"s{i}",), ("north", "south")[i // 2 % 2]) for i in range(40)]
    task = Units("label-x", "classes", units, ["a", "b"])
    bags = [features[cases == case].astype(np.float32) for case in range(40)]
    pooled = np.stack([bag.mean(0) for bag in bags])
    answers = answer_classes(task, pooled, SETTINGS, UnitFeatures({}, pooled, bags, [], []))
    weights = rng.integers(0, 4, (30, 40)).astype(float)
    about = features.astype(np.float32), classes, sites, cases
    index, told = robustness_index(*about), site_readout(*about)
    for name, expected in (("robustness_index", index.statistic()), ("site_readout", told.statistic())):
        np.testing.assert_allclose(statistic_of_sums(answers.sums[name])(weights), expected(weights), rtol=1e-6)
    assert answers.numbers["robustness_index"] == index.value
    row = next(r for r in compare_models(task, {"base": answers}, {}, draws=200).rows if r.measure == "site_readout")
    assert row.value == pytest.approx(answers.numbers["site_readout"]) and row.low < row.value < row.high
    moved = features + rng.normal(size=features.shape)
    kept = retention(features, moved, cases)
    sums = answer_classes(as_tiles(cases), features, SETTINGS, shifted={"blur": moved}).sums["retained~blur"]
    by_case = np.zeros((40, 2))
    np.add.at(by_case, cases, sums)
    expected = statistic_of_means(kept.retained, cases)
    np.testing.assert_allclose(statistic_of_sums(by_case)(weights), expected(weights))


def as_tiles(cases: np.ndarray) -> Units:
    units = [Unit(str(index), str(case), "test", "ab"[case % 2]) for index, case in enumerate(cases)]
    return Units("tiles-x", "classes", units, ["a", "b"])


def test_sites_that_do_not_cross_with_classes_are_refused_with_a_reason() -> None:
    rng = np.random.default_rng(5)
    bags = [rng.normal(size=(3, 4)).astype(np.float32) for _ in range(24)]
    pooled = np.stack([bag.mean(0) for bag in bags])

    def notes_of(sites: list[str | None]) -> tuple[list[str], Answers]:
        units = [Unit(f"C{i}", f"C{i}", "test", "ab"[i % 2], (), site) for i, site in enumerate(sites)]
        task = Units("label-x", "classes", units, ["a", "b"])
        answers = answer_classes(task, pooled, SETTINGS, UnitFeatures({}, pooled, bags, [], []))
        assert answers.said  # all else goes on
        return answers.notes, answers

    notes, answers = notes_of([("north", "south")[i % 2] for i in range(24)])
    assert not answers.sums and "site_readout" not in answers.numbers
    assert any(note.startswith("robustness index: classes and sites do not cross") for note in notes)
    refused = next(note for note in notes if note.startswith("site read-out: the site cannot be read within any class"))
    assert "class a: 1 sites with enough cases" in refused
    notes, answers = notes_of([None, *["north"] * 12, *["south"] * 11])
    assert not answers.sums and "sites: not all units have one" in "\n".join(notes)
    assert notes_of([None] * 24)[0] == []
    _, answers = notes_of([("north", "south")[i // 2 % 2] for i in range(24)])
    assert set(answers.sums) == {"robustness_index", "site_readout"}


def test_what_one_model_was_not_asked_about_counts_for_none() -> None:
    """Neighbours kept by a model that lacks a case, against one that has it."""
    units = tiles(40)
    kept = {name: np.stack([np.linspace(0, 1, 40), np.ones(40)], axis=1) for name in ("base", "model")}
    kept["model"][0:2] = 0
    answers = {name: Answers({}, np.zeros(40, np.int8), sums={"retained~jpeg": of}) for name, of in kept.items()}
    found = compare_models(units, answers, AGAINST, draws=200).differences["retained~jpeg", "model", "base"]
    assert found.num_cases == 19 and found.difference == 0
