"""From features on disk to verdicts, by the steps of evaluate.py."""

import csv
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from dinoscope.errors import ConfigError, FeaturesError
from dinoscope.evaluate.answers import Answers, read_answers
from dinoscope.evaluate.cohort import SEEN
from dinoscope.evaluate.comparing import compare_models, read_comparison, write_comparison
from dinoscope.evaluate.inputs import UnitFeatures
from dinoscope.evaluate.measuring import Settings, answer_classes
from dinoscope.evaluate.units import Unit, Units
from dinoscope.evaluate.verdicts import judge, primary_of
from dinoscope.files import write_json
from feature_samples import write_sample

SCRIPT = Path(__file__).parents[2] / "workflow_scripts" / "evaluate.py"
CASES, TILES, WIDTH = 72, 6, 8


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("evaluate_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(script, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    script.main()


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    """Slides of 72 eval cases of two classes and two sites, 4 training cases; features of a model that knows the class
    (good), one that knows nothing (base), and a copy of that one."""
    folder = tmp_path_factory.mktemp("collection")
    rng = np.random.default_rng(0)
    slides, labels = ["slide_id\tpath\tcase_id\tuse\tsite"], ["case_id\tgrade\tos_time\tos_event"]
    features = {"base": {}, "copy": {}, "good": {}}
    for index in range(CASES):
        slides.append(f"e{index}\te{index}.svs\tE{index}\teval,features\t{'AB'[index // 2 % 2]}")
        kind = index % 2
        labels.append(f"E{index}\t{'high' if kind else 'low'}\t{10 - 5 * kind + index / 100}\t1")
        noise = rng.normal(size=(TILES, WIDTH)).astype(np.float32)
        features["base"][f"e{index}"] = features["copy"][f"e{index}"] = noise
        features["good"][f"e{index}"] = noise * 0.5 + np.float32(4 * kind)
    slides += [f"t{index}\tt{index}.svs\tT{index}\ttrain\tA" for index in range(4)]
    (folder / "slides.tsv").write_text("\n".join(slides) + "\n")
    (folder / "labels.tsv").write_text("\n".join(labels) + "\n")
    for model, of_slides in features.items():
        (folder / model).mkdir()
        for slide, rows in of_slides.items():
            write_sample(folder / model / f"{slide}.h5", rows, slide_id=slide, model=model)
    return folder


@pytest.fixture(scope="module")
def answered(collection, script):
    """Answers of all three models to the label of classes."""
    patch = pytest.MonkeyPatch()
    patch.chdir(collection)
    asked = ["--slides", "slides.tsv", "--labels", "labels.tsv", "--label", "grade", "--selection-fraction", 0.1]
    call(script, patch, "units", "--task", "label-grade", *asked, "--output", "units.json")
    write_json(collection / "seal.json", {"slides": ["t0", "t1"]})
    for model in ("base", "copy", "good"):
        files = sorted((collection / model).glob("*.h5"))
        how = ["--folds", 2, "--repeats", 1, "--seal", "seal.json", "--slides", "slides.tsv", "--model-name", model]
        how += ["--no-attention"]  # below, on fewer cases
        call(script, patch, "measure", "--units", "units.json", "--features", *files, *how, "--output", f"{model}.npz")
    models = ["base", "copy", "good"]
    against = ["--against", "copy=base", "good=base"]
    files = [f"{model}.npz" for model in models]
    compared = ["--models", *models, *against, "--bootstraps", 300, "--output", "grade.npz", "--figure", "grade.png"]
    call(script, patch, "compare", "--units", "units.json", "--answers", *files, *compared)
    patch.undo()
    return collection


def test_verdicts_of_known_models(answered, script, monkeypatch):
    monkeypatch.chdir(answered)
    written = ["--table", "summary.tsv", "--document", "summary.json", "--measures", "measures"]
    call(script, monkeypatch, "summary", "--comparisons", "grade.npz", *written)
    with open("summary.tsv") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    told = {(row["measure"], row["model"]): row for row in rows if row["verdict"]}
    assert told["linear", "good"]["verdict"] == "better" and told["linear", "good"]["primary"] == "yes"
    # identical models differ by nothing, whatever the measure
    same = {measure: row for (measure, model), row in told.items() if model == "copy"}
    without = {"site_readout", "robustness_index"}
    assert {name for name, row in same.items() if row["verdict"] == "not judged"} == without
    assert {row["verdict"] for row in same.values()} == {"no clear difference", "not judged"} and len(same) == 9
    assert {float(row["difference"]) for row in same.values()} == {0.0}
    scored = [row for row in rows if row["measure"] != "robustness"]
    assert {row["cases"] for row in scored} == {str(CASES - 7)}  # a tenth of the cases is for selection
    assert {row["seen"] for row in scored} == {"no"}
    index, site = told["robustness_index", "good"], told["site_readout", "good"]
    assert float(index["value"]) > 0.9 and float(index["difference_low"]) > 0
    # beside chance; there is no colour baseline among these models
    assert (site["chance"], site["color_histogram"], site["primary"]) == ("0.5", "", "no")
    assert float(site["low"]) <= float(site["value"]) <= float(site["high"])
    one = json.loads(Path("measures/label-grade.linear.json").read_text())
    assert {row["score"] for row in one["scores"]} == {"balanced_accuracy", "macro_f1", "auroc"}
    assert [verdict["decision"] for verdict in one["verdicts"]] == ["no clear difference", "better"]
    assert Path("grade.png").stat().st_size > 10_000
    with pytest.raises(ConfigError, match="'label-grade/liner', which no task measures; did you mean"):
        call(script, monkeypatch, "summary", "--comparisons", "grade.npz", "--primary", "label-grade/liner", *written)


def test_cases_of_skipped_slides_are_left_out_of_every_comparison(collection, script, monkeypatch, tmp_path):
    """Each model lacks another case: both are judged on the cases that both were asked about."""
    monkeypatch.chdir(collection)
    asked = ["--slides", "slides.tsv", "--labels", "labels.tsv", "--label", "grade", "--selection-fraction", 0]
    call(script, monkeypatch, "units", "--task", "label-grade", *asked, "--output", tmp_path / "units.json")
    for model, lacking in (("base", "e0"), ("good", "e1")):
        files = [path for path in sorted((collection / model).glob("*.h5")) if path.stem != lacking]
        empty = write_sample(
            tmp_path / f"{lacking}.h5", np.zeros((0, WIDTH), np.float32), slide_id=lacking, model=model
        )
        how = ["--folds", 2, "--repeats", 1, "--slides", "slides.tsv", "--model-name", model, "--no-attention"]
        words = ["--units", tmp_path / "units.json", "--features", *files, empty, *how]
        call(script, monkeypatch, "measure", *words, "--output", tmp_path / f"{model}.npz")
        answers = read_answers(tmp_path / f"{model}.npz")
        assert np.flatnonzero(np.isnan(answers.said["linear"]).any(axis=(0, 2))).tolist() == [int(lacking[1:])]
        assert f"left out, since no tile was found or read: {lacking.upper()}" in answers.notes
    compared = ["--models", "base", "good", "--against", "good=base", "--bootstraps", 200]
    files = ["--answers", tmp_path / "base.npz", tmp_path / "good.npz", "--figure", tmp_path / "f.png"]
    words = ["--units", tmp_path / "units.json", *files, *compared, "--output", tmp_path / "found.npz"]
    call(script, monkeypatch, "compare", *words)
    found = read_comparison(tmp_path / "found.npz")
    assert {row.cases for row in found.rows if row.measure == "linear"} == {CASES - 1}
    difference = found.differences["linear", "good", "base"]
    assert difference.num_cases == CASES - 2 and difference.smallest_class == CASES // 2 - 1


@pytest.mark.parametrize("keep", [0, 40, 0.5, 0.95])
def test_damaged_files_are_named(answered, tmp_path, keep):
    for name, read, what in (("good", read_answers, "answers"), ("grade", read_comparison, "comparison of models")):
        whole = (answered / f"{name}.npz").read_bytes()
        path = tmp_path / f"{name}.npz"
        path.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
        with pytest.raises(FeaturesError, match=rf"{name}\.npz: no whole {what}.*; delete it and"):
            read(path)


def test_survival_is_answered(answered, script, monkeypatch):
    monkeypatch.chdir(answered)
    asked = ["--slides", "slides.tsv", "--labels", "labels.tsv", "--label", "os"]
    call(script, monkeypatch, "units", "--task", "label-os", *asked, "--output", "os.json")
    files = sorted((answered / "good").glob("*.h5"))
    how = ["--folds", 2, "--repeats", 1, "--slides", "slides.tsv", "--model-name", "good", "--no-attention"]
    call(script, monkeypatch, "measure", "--units", "os.json", "--features", *files, *how, "--output", "os_good.npz")
    answers = ["--answers", "os_good.npz", "--models", "good", "--bootstraps", 200]
    call(script, monkeypatch, "compare", "--units", "os.json", *answers, "--output", "os.npz", "--figure", "os.png")
    rows = {row.measure: row for row in read_comparison(answered / "os.npz").rows}
    assert rows["cox"].score == "c_index" and rows["cox"].value > 0.7  # of two groups three quarters of pairs are told


def test_attention_is_asked_of_bags():
    rng = np.random.default_rng(0)
    bags = [rng.normal(size=(5, 4)).astype(np.float32) + 3 * (index % 2) for index in range(12)]
    units = Units("label-x", "classes", [Unit(f"{i}", f"{i}", "test", "ab"[i % 2]) for i in range(12)], ["a", "b"])
    pooled = np.stack([bag.mean(axis=0) for bag in bags])
    features = UnitFeatures({}, pooled, bags, [], [])
    said = answer_classes(units, pooled, Settings(folds=2, repeats=1), features).said
    assert said["attention_mil"].shape == said["linear"].shape == (1, 12, 2)
    assert np.isfinite(said["attention_mil"]).all()


def task(seen_by_model, num=80):
    """A model that is always right and one that never is, on cases of which training has seen some."""
    units = [Unit(str(index), str(index), "test", "ab"[index % 2]) for index in range(num)]
    truth = np.eye(2)[np.arange(num) % 2][None]
    answers = {
        model: Answers({}, seen, {"linear": truth if model == "right" else 1 - truth})
        for model, seen in seen_by_model.items()
    }
    return Units("tiles-x", "classes", units, ["a", "b"]), answers


def test_what_training_saw_is_transductive_and_enters_no_verdict(tmp_path):
    num = 80
    seen = np.zeros(num, np.int8)
    seen[:20] = SEEN.index("yes")
    units, answers = task({"wrong": np.zeros(num, np.int8), "right": seen}, num)
    found = compare_models(units, answers, {"right": ["wrong"]}, draws=200)
    write_comparison(tmp_path / "x.npz", found)
    found = read_comparison(tmp_path / "x.npz")
    clean = [row for row in found.rows if row.seen != "yes"]
    assert {(row.model, row.cases) for row in clean} == {("right", 60), ("wrong", 60)}
    assert {(row.model, row.cases) for row in found.rows if row.seen == "yes"} == {("right", 20)}
    comparison = found.differences["linear", "right", "wrong"]
    assert comparison.num_cases == 60 and comparison.difference == 1
    # where training saw all, there is no number to compare
    units, answers = task({"wrong": np.zeros(num, np.int8), "right": np.full(num, SEEN.index("yes"), np.int8)}, num)
    found = compare_models(units, answers, {"right": ["wrong"]}, draws=200)
    assert not found.differences and {row.seen for row in found.rows} == {"yes"}
    assert primary_of([found], None) is None and judge([found], 0.02, None) == []


def test_few_cases_are_too_few_to_judge():
    units, answers = task({"wrong": np.zeros(50, np.int8), "right": np.zeros(50, np.int8)}, 50)
    found = compare_models(units, answers, {"right": ["wrong"]}, draws=200)
    (one,) = judge([found], 0.02, primary_of([found], None))
    assert one.verdict.decision == "too few to judge" and "25 cases in the smallest class" in one.sentence
