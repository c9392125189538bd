"""Intervals of runs with several training seeds: against formulas, brute force, and simulations with a known truth."""

import csv
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from dinoscope.evaluate.answers import Answers
from dinoscope.evaluate.cohort import SEEN
from dinoscope.evaluate.comparing import compare_models, read_comparison, write_comparison
from dinoscope.evaluate.figures import draw_task
from dinoscope.evaluate.intervals import Comparison, case_weights, compare, estimate, interval_of, verdict
from dinoscope.evaluate.scores import Predictions, score, statistic_of_means
from dinoscope.evaluate.seeds import (
    Family,
    compare_over_seeds,
    estimate_over_seeds,
    families,
    family_references,
    seed_errors,
)
from dinoscope.evaluate.units import Unit, Units
from dinoscope.evaluate.verdicts import judge, primary_of, write_summary
from dinoscope.files import read_json
from dinoscope.visualize.evaluation_section import evaluation_facts

CASES = 60


def means(values):
    """The mean of a number a case, as a statistic of cases' weights."""
    return statistic_of_means(np.asarray(values, float), np.arange(len(values)))


def test_one_seed_is_what_it_was_without_seeds():
    rng = np.random.default_rng(0)
    new, old = means(rng.normal(size=CASES)), means(rng.normal(size=CASES))
    one, plain = compare_over_seeds([new], [old], CASES, 30), compare(new, old, CASES, 30)
    assert one.by_seed == (plain.difference,) and one.interval() == plain.interval()
    np.testing.assert_array_equal(one.resampled, plain.resampled)
    assert estimate_over_seeds([new], CASES)[0] == estimate(new, CASES)


@pytest.mark.parametrize("number", [2, 3, 5])
@pytest.mark.parametrize("level", [0.95, 0.995])
def test_where_seeds_alone_differ_the_interval_is_students(number, level):
    """All cases the same: scipy's t interval of the mean of the seeds is the whole answer."""
    given = np.random.default_rng(number).normal(0.1, 0.03, number)
    seeds = [means(np.full(CASES, value)) for value in given]
    found = compare_over_seeds(seeds, [means(np.zeros(CASES))] * number, CASES, 30, draws=40_000)
    expected = stats.t.interval(level, number - 1, given.mean(), stats.sem(given))
    ratio = (np.array(found.interval(level)) - given.mean()) / (np.array(expected) - given.mean())
    assert np.all(ratio >= 1) and np.all(ratio < 1.03)  # wider as far as the draws lie apart
    assert found.p_value == pytest.approx(stats.ttest_1samp(given, 0).pvalue, abs=1e-4)
    assert found.by_seed == pytest.approx(tuple(given))


def test_errors_are_deterministic_symmetric_and_none_of_one_seed():
    errors = seed_errors([0.1, 0.2, 0.4], CASES, 2000, seed=3)
    np.testing.assert_array_equal(errors, seed_errors([0.1, 0.2, 0.4], CASES, 2000, seed=3))
    np.testing.assert_allclose(np.sort(errors), -np.sort(errors)[::-1])
    assert abs(np.corrcoef(errors.clip(-1, 1), np.arange(2000))[0, 1]) < 0.1  # in no order
    assert not seed_errors([0.1], CASES, 2000).any() and not seed_errors([0.1, 0.1], CASES, 2000).any()


def simulated(rng, seeds, of_cases, of_seeds, of_both, num_cases=CASES):
    """Differences (S, G) of seeds on cases whose true mean over all seeds and cases is 0."""
    case = rng.normal(0, of_cases, (1, num_cases))
    return rng.normal(0, of_seeds, (seeds, 1)) + case + rng.normal(0, of_both, (seeds, num_cases))


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize(("of_seeds", "of_both"), [(0.0, 0.0), (0.0, 1.0), (0.1, 0.5), (0.4, 0.5)])
def test_intervals_cover_what_another_seed_on_other_cases_gives(seeds, of_seeds, of_both):
    """95 % at least, whatever the spread between seeds; intervals over cases alone would not."""
    rng, zero = np.random.default_rng(0), means(np.zeros(CASES))
    covered, over_cases = [], []
    for _ in range(400):
        given = simulated(rng, seeds, 1.0, of_seeds, of_both)
        found = compare_over_seeds(list(map(means, given)), [zero] * seeds, CASES, 30, draws=600)
        low, high = found.interval()
        covered.append(low <= 0 <= high)
        alone = case_weights(CASES, 600) @ given.mean(axis=0) / CASES
        low, high = interval_of(alone, 0.95, CASES)
        over_cases.append(low <= 0 <= high)
    assert np.mean(covered) > 0.93  # of 400, two standard deviations
    if of_seeds == 0.4:
        assert np.mean(over_cases) < 0.85


def test_no_run_is_better_where_its_seeds_disagree():
    clear = Comparison(0.1, 0.1 + 0.01 * np.random.default_rng(0).standard_normal(2000), CASES, 30, (0.1, 0.12, 0.08))
    assert verdict(clear, 0.02).decision == "better"
    assert "60 cases; 3 seeds, all better: +0.100, +0.120, +0.080)" in verdict(clear, 0.02).sentence
    said = verdict(replace(clear, by_seed=(0.3, 0.02, -0.02)), 0.02)
    assert said.decision == "inconclusive"
    assert "but training seeds disagree" in said.sentence and "3 seeds, 2 better, 1 worse: +0.300" in said.sentence
    assert ", 60 cases, 1 seed)" in verdict(replace(clear, by_seed=(0.1,)), 0.02).sentence
    assert ", 60 cases)" in verdict(replace(clear, by_seed=()), 0.02).sentence


def test_families_and_whom_they_are_held_against():
    runs = [["a", "a-seed1"], ["b", "b-seed1"], ["c"], ["d", "d-seed1"]]
    found = families(runs, ["base", "a", "a-seed1", "b", "b-seed1", "c", "d"])
    assert found == [Family("a (2 seeds)", ("a", "a-seed1")), Family("b (2 seeds)", ("b", "b-seed1"))]
    references = {"a": ["base", "b"], "a-seed1": ["base", "b-seed1"], "b": ["base", "c"], "b-seed1": ["base"]}
    of_a = family_references(found[0], references, found)
    assert of_a == {"base": ("base", "base"), "b (2 seeds)": ("b", "b-seed1")}
    assert family_references(found[1], references, found) == {"base": ("base", "base")}
    crossed = references | {"a": ["b-seed1"], "a-seed1": ["b"]}
    assert family_references(found[0], crossed, found) == {}


def answered(right_by_model):
    """A task of two classes that each model answers rightly in another share of the cases."""
    units = [Unit(str(index), str(index), "test", "ab"[index % 2]) for index in range(2 * CASES)]
    truth, answers = np.arange(2 * CASES) % 2, {}
    for model, share in right_by_model.items():
        rng = np.random.default_rng(sum(map(ord, model)))
        said = np.where(rng.random(2 * CASES) < share, truth, 1 - truth)
        answers[model] = Answers({}, np.zeros(2 * CASES, np.int8), {"linear": np.eye(2)[said][None]})
    return Units("tiles-x", "classes", units, ["a", "b"]), answers


SHARES = {
    "base": 0.6,
    "run": 0.9,
    "run-seed1": 0.92,
    "run-seed2": 0.91,
    "gram": 0.9,
    "gram-seed1": 0.9,
    "gram-seed2": 0.93,
    "ctl": 0.9,
    "ctl-seed1": 0.91,
    "ctl-seed2": 0.9,
    "single": 0.9,
    "thumbnail": 0.7,
}
RUNS = [[name, f"{name}-seed1", f"{name}-seed2"] for name in ("run", "gram", "ctl")] + [["single"]]
REFERENCES = {model: ["base"] for model in SHARES if model != "base"} | {
    f"gram{end}": ["base", f"ctl{end}"] for end in ("", "-seed1", "-seed2")
}


@pytest.fixture
def compared(tmp_path):
    units, answers = answered(SHARES)
    write_comparison(tmp_path / "x.npz", compare_models(units, answers, REFERENCES, runs=RUNS, draws=500))
    return read_comparison(tmp_path / "x.npz"), units, answers


def test_a_run_of_several_seeds_has_the_means_of_its_seeds(compared):
    found, units, answers = compared
    rows = {(row.model, row.score): row for row in found.rows}
    for name in ("balanced_accuracy", "macro_f1", "auroc"):
        each = [
            score(Predictions(units.targets, answers[model].said["linear"], units.groups), name) for model in RUNS[0]
        ]
        row = rows["run (3 seeds)", name]
        assert row.by_seed == pytest.approx(each) and row.value == pytest.approx(np.mean(each))
        assert row.seeds == 3 and 0 <= row.low < row.value < row.high <= 1
        single = rows["run", name]
        assert single.seeds == 1 and single.value == pytest.approx(each[0]) and single.by_seed == ()
    assert rows["base", "auroc"].seeds is None and rows["single", "auroc"].seeds == 1
    whole = found.differences["linear", "gram (3 seeds)", "ctl (3 seeds)"]
    pairs = [found.differences["linear", f"gram{end}", f"ctl{end}"].difference for end in ("", "-seed1", "-seed2")]
    assert whole.by_seed == pytest.approx(pairs) and whole.difference == pytest.approx(np.mean(pairs))
    assert found.differences["linear", "thumbnail", "base"].by_seed == ()


def test_intervals_of_few_seeds_end_where_scores_do():
    units, answers = answered({"base": 0.6, "run": 0.6, "run-seed1": 0.99})
    found = compare_models(units, answers, REFERENCES, runs=[["run", "run-seed1"]], draws=500)
    low, high = found.differences["linear", "run (2 seeds)", "base"].interval(0.99)
    assert (low, high) == (-1, 1)
    (row,) = [row for row in found.rows if (row.model, row.score) == ("run (2 seeds)", "balanced_accuracy")]
    assert (row.low, row.high) == (0, 1)


def test_the_run_is_judged_and_not_its_seeds(compared, tmp_path):
    found, _, _ = compared
    primary = primary_of([found], None)
    judgements = judge([found], 0.02, primary)
    said = {(one.model, one.reference): one for one in judgements}
    assert set(said) == {
        *(("run (3 seeds)", "base"), ("gram (3 seeds)", "base"), ("gram (3 seeds)", "ctl (3 seeds)")),
        *(("ctl (3 seeds)", "base"), ("single", "base"), ("thumbnail", "base")),
    }
    assert said["run (3 seeds)", "base"].verdict.decision == "better"
    assert "run (3 seeds) against base, tiles-x/linear: better by" in said["run (3 seeds)", "base"].sentence
    assert "3 seeds, all better: +" in said["run (3 seeds)", "base"].sentence
    assert ", 1 seed)" in said["single", "base"].sentence and "seed" not in said["thumbnail", "base"].sentence
    places = {"table": tmp_path / "summary.tsv", "document": tmp_path / "evaluation/summary.json"}
    (tmp_path / "evaluation").mkdir()
    write_summary([found], judgements, primary, folder=tmp_path / "measures", **places)
    with open(tmp_path / "summary.tsv") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if row["score"] == "balanced_accuracy"]
    told = {(row["model"], row["reference"]): row for row in rows}
    whole = told["run (3 seeds)", "base"]
    assert whole["seeds"] == "3" and whole["verdict"] == "better"
    assert len(whole["by_seed"].split()) == len(whole["difference_by_seed"].split()) == 3
    one = told["run-seed1", "base"]
    assert one["seeds"] == "1" and one["verdict"] == one["p_value"] == "" and float(one["difference_low"]) > 0
    assert told["gram", "ctl"]["difference"] and told["thumbnail", "base"]["seeds"] == ""
    document = read_json(tmp_path / "evaluation/summary.json")
    (of_run,) = [one for one in document["verdicts"] if one["model"] == "run (3 seeds)"]
    assert of_run["seeds"] == 3 and len(of_run["by_seed"]) == 3
    facts = evaluation_facts(tmp_path)
    assert any("Run (3 seeds) against base" in sentence for sentence in facts.on_top)
    assert {"run-seed1 (1 seed)", "run (3 seeds)", "thumbnail"} <= {model for _, model, _ in facts.tasks[0].rows}
    draw_task(found, tmp_path / "figure.png", margin=0.02)
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_seeds_that_saw_the_cases_are_transductive_together():
    units, answers = answered({name: SHARES[name] for name in ("base", *RUNS[0])})
    for model in RUNS[0]:
        answers[model].seen[:20] = SEEN.index("yes")
    found = compare_models(units, answers, REFERENCES, runs=RUNS, draws=200)
    cases = {(row.model, row.seen): row.cases for row in found.rows}
    assert cases["run (3 seeds)", "yes"] == 20 and cases["run (3 seeds)", "no"] == 2 * CASES - 20
    assert found.differences["linear", "run (3 seeds)", "base"].num_cases == 2 * CASES - 20
