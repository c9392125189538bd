"""Equal compute of a pilot's arms, and the advice that follows from comparisons whose answer is known."""

import csv
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dinoscope.errors import ConfigError
from dinoscope.evaluate.answers import Answers
from dinoscope.evaluate.comparing import TaskComparison, compare_models, write_comparison
from dinoscope.evaluate.intervals import Comparison
from dinoscope.evaluate.pilot import Advice, Arm, advise, costs_of, read_curves, with_site
from dinoscope.evaluate.units import Unit, Units
from dinoscope.files import write_text
from dinoscope.plan import make_plan
from dinoscope.plan_pilot import PilotJobs, equal_iterations
from dinoscope.recipe import load_recipe
from dinoscope.train.metrics import append_metrics
from dinoscope.visualize.report import build_report

REPOSITORY = Path(__file__).parents[2]
ARMS = [Arm("pilot-lora", "lora", 2e12), Arm("pilot-last_n", "last_n", 1e12), Arm("pilot-full", "full", 4e12)]
PRIMARY = "label-grade/linear"


def difference(mean, spread=0.01, smallest_class=60):
    """Of so much, with normal resamples around it."""
    resampled = mean + spread * np.random.default_rng(0).standard_normal(2000)
    return Comparison(mean, resampled, 2 * smallest_class, smallest_class)


def tasks(against_base, *, encoder_against=None, numbers=None):
    """A task with these differences from the starting weights, and of the encoder from arms; a decoy measure beside."""
    differences = {("linear", model, "base"): one for model, one in against_base.items()}
    differences |= {("linear", "uni", arm): one for arm, one in (encoder_against or {}).items()}
    differences |= {("knn_1", model, "base"): difference(0.3) for model in against_base}
    return [TaskComparison("label-grade", "classes", [], differences, numbers or {})]


def advice(against_base, encoders=(), **more):
    return advise(tasks(against_base, **more), PRIMARY, ARMS, encoders, margin=0.02)


def test_identical_arms_keep_the_weights():
    same = Comparison(0.0, np.zeros(2000), 120, 60)
    found = advice({arm.run: same for arm in ARMS})
    assert (found.decision, found.model) == ("keep", "base")
    expected = "Keep the published weights: nothing that was tried differs from them by more than 0.02 on"
    assert found.sentence == f"{expected} {PRIMARY}."


def test_the_best_arm_is_advised():
    found = advice({"pilot-lora": difference(0.08), "pilot-last_n": difference(0.0), "pilot-full": difference(0.12)})
    assert (found.decision, found.model) == ("adapt", "pilot-full")
    assert found.sentence.startswith("Adapt, training the whole backbone (pilot-full): it is better by 0.120 [+0.")
    assert found.sentence.endswith("(pilot-lora is better too).")


def test_worse_and_unclear_arms_keep_the_weights():
    worse = advice({arm.run: difference(-0.1) for arm in ARMS})
    assert worse.decision == "keep" and "nothing that was tried is better" in worse.sentence
    unclear = advice({"pilot-lora": difference(0.03, 0.05), "pilot-full": difference(-0.1)})
    assert (
        unclear.decision == "keep" and "clearly better on label-grade/linear, but pilot-lora may be" in unclear.sentence
    )
    assert ", by 0.030 [-0." in unclear.sentence and unclear.sentence.endswith("], which more cases would tell.")
    hopeless = advice({"pilot-lora": difference(-0.03, 0.05), "pilot-full": difference(-0.1)})
    assert hopeless.decision == "keep" and "more cases would be needed to say so of all" in hopeless.sentence


def test_arms_are_corrected_as_one_family():
    """A p-value of some 0.03 is ground for "better" alone, not where it is the best of three tries."""
    barely, none = difference(0.0445, 0.02), difference(0.0, 0.02)
    assert advice({"pilot-lora": barely}).decision == "adapt"
    assert advice({"pilot-lora": barely, "pilot-last_n": none, "pilot-full": none}).decision == "keep"


@pytest.mark.parametrize("best", [None, "pilot-lora"])
def test_an_encoder_must_beat_the_best_arm(best):
    arms = {arm.run: difference(0.1 if arm.run == best else 0.0) for arm in ARMS}
    encoder = {"encoders": ["uni"]}
    clear = advice(arms | {"uni": difference(0.2)}, encoder_against={"pilot-lora": difference(0.1)}, **encoder)
    assert (clear.decision, clear.model) == ("foreign encoder", "uni")
    assert ("better than pilot-lora" in clear.sentence) == (best is not None)
    no_clearer = advice(arms | {"uni": difference(0.11)}, encoder_against={"pilot-lora": difference(0.01)}, **encoder)
    assert no_clearer.decision == ("adapt" if best else "foreign encoder")


def test_few_cases_are_no_ground_for_anything():
    few = advice({arm.run: difference(0.3, smallest_class=29) for arm in ARMS})
    assert few.decision == "too few to judge" and few.model == "base"
    assert "29 cases in the smallest class, 30 are needed" in few.sentence
    none = advise([TaskComparison("label-grade", "classes", [], {})], None, ARMS, [], margin=0.02)
    assert none.decision == "too few to judge" and "no two models could be compared" in none.sentence


def test_the_site_stands_beside_the_advice():
    numbers = {
        "base": {"site_readout": 0.6, "site_chance": 0.5},
        "pilot-full": {"site_readout": 0.8, "site_chance": 0.5},
    }
    of_sites = tasks({}, numbers=numbers)
    adapt, keep = Advice("adapt", "pilot-full", "Adapt."), Advice("keep", "base", "Keep.")
    assert with_site(adapt, of_sites, PRIMARY) == (
        "Adapt; it tells the site within a class by 0.800, where the starting weights do by 0.600 (chance 0.500)."
    )
    kept = "Keep; the starting weights tell the site within a class by 0.600 (chance 0.500)."
    assert with_site(keep, of_sites, PRIMARY) == kept
    assert with_site(keep, tasks({}), PRIMARY) == "Keep."


def test_iterations_of_equal_compute():
    assert equal_iterations(12.0, {"full": 3.0, "lora": 2.0, "last_n": 0.7}) == {"full": 4, "lora": 6, "last_n": 17}
    assert equal_iterations(0.3, {"tenth": 0.1}) == {"tenth": 3}  # 0.3 / 0.1 is a little less than 3


def test_curves_and_costs_of_a_run(tmp_path):
    run = tmp_path / "pilot-lora"
    run.mkdir()
    append_metrics(run, {"iteration": 0, "probe_knn": 0.5})
    append_metrics(run, {"iteration": 0, "iter_time": 3.0})
    append_metrics(run, {"iteration": 9, "iter_time": 2.0})
    told = {"probe_difference": 0.2, "probe_difference_low": -0.1, "probe_difference_high": 0.4}
    append_metrics(run, {"iteration": 9, "probe_knn": 0.7} | told)
    start, end = read_curves(tmp_path, ARMS[:1])["pilot-lora"]
    assert (start.iterations, start.petaflops, start.value, start.difference) == (0, 0, 0.5, 0)
    assert (end.iterations, end.value, end.low, end.high) == (10, 0.7, -0.1, 0.4)
    assert end.petaflops == pytest.approx(0.02)
    assert costs_of(tmp_path, ARMS[:1])["pilot-lora"] == pytest.approx(
        {"iterations": 10, "petaflops": 0.02, "seconds": 3 + 9 * 2}
    )


@pytest.fixture
def planned(tmp_path, monkeypatch):
    """Makes the pilot of a config with published weights."""
    monkeypatch.chdir(tmp_path)
    Path("w.pth").touch()
    recipe = "student: {arch: vit_nano}\ncrops: {global_crops_size: 96, local_crops_size: 48}\n"
    schedules = "schedules:\n" + "".join(
        f"  {name}: {{start: 1e-4, peak: 1e-3, end: 1e-4, warmup_epochs: 10}}\n"
        for name in ("lr", "weight_decay", "momentum", "teacher_temp")
    )
    write_text(Path("root.yaml"), "MODEL: {WEIGHTS: w.pth}\noptim: {epochs: 40, warmup_epochs: 10}\n" + recipe)
    write_text(Path("v2.yaml"), "MODEL: {WEIGHTS: w.pth}\noptim: {epochs: 40}\n" + recipe + schedules)
    rows = [f"e{i}\te{i}.svs\tE{i}\teval,features" for i in range(8)] + ["t\tt.svs\tT\ttrain"]
    write_text(Path("slides.tsv"), "\n".join(["slide_id\tpath\tcase_id\tuse", *rows]) + "\n")
    write_text(Path("labels.tsv"), "case_id\tgrade\nE1\tlow\nE2\thigh\n")

    def make(recipe="root.yaml", pilot=None, **more):
        config = {
            "slides": {"source": "slides.tsv"},
            "labels": "labels.tsv",
            "tiling": {"sets": {"train": {"tile_px": 256}, "features": None}},
            "runs": {"pretrain": {"recipe": recipe}},
            "pilot": {"iterations": 120, "gpu_minutes": 1e6} | (pilot or {}),
        } | more
        return PilotJobs(make_plan(config, REPOSITORY))

    return make


@pytest.mark.parametrize("recipe", ["root.yaml", "v2.yaml"])
def test_arms_are_the_first_run_at_equal_compute(planned, recipe):
    jobs = planned(recipe)
    jobs.check()
    runs = jobs.plan.runs
    compute = {arm: jobs.step_flops(arm) * runs[f"pilot-{arm}"].settings.optim.epochs for arm in jobs.arms.values()}
    for arm, spent in compute.items():
        assert 0 <= compute["full"] - spent < jobs.step_flops(arm)
    full, lora = runs["pilot-full"].settings, runs["pilot-lora"].settings
    assert (full.optim.epochs, full.train.OFFICIAL_EPOCH_LENGTH, full.evaluation.probe_every) == (120, 1, 24)
    rate = (lambda cfg: cfg.optim) if recipe == "root.yaml" else (lambda cfg: cfg.schedules.lr)
    before = load_recipe(recipe)
    key = "lr" if recipe == "root.yaml" else "peak"
    assert rate(full).warmup_epochs == 30  # a quarter, as in the recipe
    assert rate(full)[key] == rate(before)[key] and rate(lora)[key] == 4 * rate(before)[key]
    assert (lora.student.trainable, lora.student.unfrozen_blocks) == ("lora", 1)
    assert jobs.evaluation.models("label-grade")[:4] == ["base", "pilot-lora", "pilot-last_n", "pilot-full"]
    assert {"pilot-full=base", "random=base"} <= set(jobs.references("label-grade"))


def test_minutes_bound_the_arms_together(planned):
    costs = planned().step_flops("full")
    minutes = 3 * 50.5 * costs / 60 / 1e12  # fifty steps of full adaptation, thrice
    jobs = planned(pilot={"gpu_minutes": minutes, "tflops": 1})
    assert jobs.iterations["full"] == 50
    assert planned(pilot={"gpu_minutes": minutes, "tflops": 1, "arms": ["full"]}).iterations["full"] == 120


def test_random_weights_leave_full_adaptation_alone(planned):
    write_text(Path("root.yaml"), Path("root.yaml").read_text().replace("w.pth", "''"))
    jobs = planned()
    assert list(jobs.arms) == ["pilot-full"]
    assert jobs.notes()[0] == "the pilot leaves out lora and last_n: root.yaml names no MODEL.WEIGHTS"
    with pytest.raises(ConfigError, match="of random weights all must be trained"):
        planned(pilot={"arms": ["lora"]}).check()


def test_encoders_are_held_against_all_arms(planned):
    Path("uni.pth").touch()
    jobs = planned(features={"encoders": {"uni": {"source": "uni.pth"}}, "models": ["base"]})
    assert {"uni=base", "uni=pilot-lora", "uni=pilot-full"} <= set(jobs.references("label-grade"))
    assert replace(jobs.plan, runs={}).models == ["base", "pilot-lora", "pilot-last_n", "pilot-full", "uni"]


def made_up(folder, num_cases=80):
    """Comparisons of a task of two sites in which lora is better, and metrics of all runs."""
    rng = np.random.default_rng(1)
    units = Units(
        "label-grade",
        "classes",
        [Unit(str(i), str(i), "test", "ab"[i % 2]) for i in range(num_cases)],
        ["a", "b"],
    )
    truth, answers = np.eye(2)[np.arange(num_cases) % 2][None], {}
    shares = {"base": 0.7, "pilot-lora": 0.95, "pilot-last_n": 0.7, "pilot-full": 0.7, "color-histogram": 0.6}
    wrong_first = rng.permutation(num_cases)
    for index, (model, share) in enumerate(shares.items()):
        right = np.ones(num_cases, bool)
        right[wrong_first[round(share * num_cases) :]] = False
        said = np.where(right[None, :, None], truth, 1 - truth)
        numbers = {"site_readout": 0.6 + 0.05 * index, "site_chance": 0.5}
        answers[model] = Answers({}, np.zeros(num_cases, np.int8), {"linear": said}, numbers=numbers)
    references = {model: ["base"] for model in shares if model != "base"}
    write_comparison(folder / "grade.npz", compare_models(units, answers, references, draws=300))
    for number, arm in enumerate(ARMS):
        run = folder / "runs" / arm.run
        run.mkdir(parents=True)
        append_metrics(run, {"iteration": 0, "iter_time": 0.5, "probe_knn": 0.6})
        for iteration in range(1, 5):
            gain = 0.03 * iteration * (1 - number)
            told = {"probe_difference": gain, "probe_difference_low": gain - 0.1, "probe_difference_high": gain + 0.1}
            append_metrics(run, {"iteration": 10 * iteration, "iter_time": 0.5, "probe_knn": 0.6 + gain} | told)


def test_table_curves_figure_and_report(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("pilot_script", REPOSITORY / "workflow_scripts" / "pilot.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.chdir(tmp_path)
    made_up(tmp_path)
    arms = [f"{arm.run}={arm.trained}={arm.step_flops}" for arm in ARMS]
    asked = ["--comparisons", "grade.npz", "--runs", "runs", "--arms", *arms, "--baselines", "color-histogram"]
    folder = tmp_path / "results" / "pilot"
    folder.mkdir(parents=True)
    names = {"table": "summary.tsv", "curves": "curves.tsv", "advice": "advice.txt", "figure": "figure.png"}
    files = [part for option, name in names.items() for part in (f"--{option}", str(folder / name))]
    monkeypatch.setattr(sys, "argv", ["pilot.py", "summary", *asked, *files])
    script.main()
    said = (folder / "advice.txt").read_text()
    assert said.startswith("Adapt, training adapters (LoRA) (pilot-lora): it is better by 0.250 [+0.")
    assert said.endswith("by 0.650, where the starting weights do by 0.600 (chance 0.500).\n") and said.count("\n") == 1
    with open(folder / "summary.tsv") as file:
        rows = {row["model"]: row for row in csv.DictReader(file, delimiter="\t")}
    assert [row["kind"] for row in rows.values()] == ["start", "arm", "arm", "arm", "baseline"]
    assert [row["verdict"] for row in rows.values()] == ["", "better", *["no clear difference"] * 2, ""]
    assert {row["iterations"] for row in rows.values() if row["kind"] == "arm"} == {"41"}
    assert float(rows["pilot-full"]["petaflops"]) == pytest.approx(41 * 4e-3)
    assert float(rows["pilot-full"]["seconds"]) == pytest.approx(41 * 0.5)
    with open(folder / "curves.tsv") as file:
        points = list(csv.DictReader(file, delimiter="\t"))
    assert [point["iteration"] for point in points[:5]] == ["0", "11", "21", "31", "41"]
    assert (folder / "figure.png").stat().st_size > 20_000
    write_text(tmp_path / "results" / "slides.tsv", "slide_id\n")
    build_report(tmp_path / "results", [], [], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert said.strip() in page and page.count('id="pilot"') == 1 and "0.700" in page
    (folder / "advice.json").unlink()
    build_report(tmp_path / "results", [], [], tmp_path / "report.html")
    assert 'id="pilot"' not in (tmp_path / "report.html").read_text()
