"""Runs that follow from those of the config: repeats with other seeds, controls of the gram loss."""

from pathlib import Path

import pytest

from dinoscope.errors import ConfigError, SealError
from dinoscope.plan import make_plan
from dinoscope.plan_evaluation import EvaluationJobs
from dinoscope.plan_features import FeatureJobs
from dinoscope.plan_pilot import PilotJobs
from dinoscope.plan_segmentation import SegmentJobs
from dinoscope.train.seal import check_seal, seal_run

REPOSITORY = Path(__file__).parents[2]
RECIPE = "student: {arch: vit_nano}\ncrops: {global_crops_size: 96, local_crops_size: 48}\n"
THREE = [0, 1, 2]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("root.yaml").write_text(RECIPE)
    Path("gram.yaml").write_text("extends: root.yaml\ngram: {use_loss: true}\ncrops: {gram_teacher_crops_size: 128}\n")
    rows = [f"{use}{i}\t{use}{i}.svs\t{use}{i}\t{use},features" for use in ("train", "eval") for i in range(6)]
    for row in rows:
        Path(row.split("\t")[1]).touch()
    Path("slides.tsv").write_text("\n".join(["slide_id\tpath\tcase_id\tuse", *rows]) + "\n")


def config(pretrain=None, gram=None, **further):
    return {
        "slides": {"source": "slides.tsv"},
        "tiling": {"sets": {"train": {"tile_px": 256}, "features": None}},
        "runs": {
            "pretrain": {"recipe": "root.yaml"} | (pretrain or {}),
            "gram": {"recipe": "gram.yaml", "continues": "pretrain", "gram_teacher": 9} | (gram or {}),
        },
    } | further


def plan_of(*arguments, **further):
    return make_plan(config(*arguments, **further), REPOSITORY)


def test_without_wishes_nothing_is_added():
    plan = plan_of()
    assert list(plan.runs) == list(plan.written_runs) == ["pretrain", "gram"]
    assert plan.measured_models == plan.models == ["base", "pretrain", "gram"]
    assert plan.runs["gram"].changes == () and plan.runs["gram"].settings.train.stream is None


def test_repeats_continue_the_repeat_of_their_own_seed():
    plan = plan_of({"seeds": THREE}, {"seeds": THREE, "control": True})
    assert {name: run.continues for name, run in plan.runs.items()} == {
        "pretrain": None,
        "pretrain-seed1": None,
        "pretrain-seed2": None,
        "gram": "pretrain",
        "gram-seed1": "pretrain-seed1",
        "gram-seed2": "pretrain-seed2",
        "gram-control": "pretrain",
        "gram-control-seed1": "pretrain-seed1",
        "gram-control-seed2": "pretrain-seed2",
    }
    seeds = {name: run.settings.train.seed for name, run in plan.runs.items()}
    assert list(seeds.values()) == THREE * 3
    # the exported teacher that gram takes is kept of each run that it continues
    assert [plan.kept_exports(f"pretrain{end}") for end in ("", "-seed1", "-seed2")] == [[9]] * 3


@pytest.mark.parametrize("seeds", [[], [0, 2]])
def test_with_another_list_of_seeds_repeats_continue_the_first(seeds):
    plan = plan_of({"seeds": seeds}, {"seeds": THREE})
    assert {plan.runs[name].continues for name in ("gram", "gram-seed1", "gram-seed2")} == {"pretrain"}


def test_a_control_is_the_run_without_the_loss_on_the_same_draws():
    plan = plan_of({}, {"seeds": [0, 1], "control": True})
    for name, of in (("gram-control", "gram"), ("gram-control-seed1", "gram-seed1")):
        control, run = plan.runs[name].settings, plan.runs[of].settings
        assert run.gram.use_loss and not control.gram.use_loss
        assert control.train.stream == of and control.train.seed == run.train.seed
        assert plan.runs[name].gram_teacher is None and plan.runs[name].recipe == plan.runs[of].recipe


def test_pictures_do_not_show_repeats_and_controls_but_measures_do():
    plan = plan_of({"seeds": [0, 1]}, {"control": True})
    assert plan.models == ["base", "pretrain", "gram"]
    measured = ["base", "pretrain", "pretrain-seed1", "gram", "gram-control"]
    assert plan.measured_models == measured
    assert plan.trained_runs == ["pretrain", "pretrain-seed1", "gram", "gram-control"]
    jobs = EvaluationJobs(plan, FeatureJobs(plan))
    assert jobs.models("descriptive") == measured
    history = jobs.history("descriptive", "gram-control")
    assert history == [
        *("--seal", "results/runs/gram-control/run_config.json", "--seal", "results/runs/pretrain/run_config.json")
    ]
    tasks = {"tasks": {"nuclei": {"dataset": "folder", "root": ".", "models": None}}}
    assert SegmentJobs(plan_of({"seeds": [0, 1]}, segmentation=tasks)).models("nuclei") == plan.models
    # those of runs that are not asked for are not made
    assert plan_of({"seeds": [0, 1]}, {"control": True}, features={"models": ["pretrain"]}).trained_runs == [
        "pretrain",
        "pretrain-seed1",
    ]
    # named, they are shown as well
    plan = plan_of({}, {"control": True}, features={"models": ["gram", "gram-control"]})
    assert plan.models == plan.measured_models == ["gram", "gram-control"]


def test_comparisons_know_seeds_and_controls():
    plan = plan_of({"seeds": [0, 1]}, {"seeds": [0, 1], "control": True})
    jobs = EvaluationJobs(plan, FeatureJobs(plan))
    assert jobs.controls == {"gram": "gram-control", "gram-seed1": "gram-control-seed1"}
    pairs = jobs.reference_arguments("descriptive")
    assert pairs[0] == "--against" and pairs[-2:] == ["gram=gram-control", "gram-seed1=gram-control-seed1"]
    assert jobs.run_arguments("descriptive") == [
        *("--seeds-of", "pretrain", "pretrain-seed1"),
        *("--seeds-of", "gram", "gram-seed1"),
        *("--seeds-of", "gram-control", "gram-control-seed1"),
    ]


def test_the_control_of_the_config_is_recognised_and_ours_wins():
    own = {"more": {"recipe": "root.yaml", "continues": "pretrain", "seeds": [0, 1]}}
    for control, wanted in ((False, ["more", "more-seed1"]), (True, ["gram-control", "gram-control-seed1"])):
        asked = config({}, {"seeds": [0, 1], "control": control})
        plan = make_plan(asked | {"runs": {"more": own["more"], **asked["runs"]}}, REPOSITORY)
        controls = EvaluationJobs(plan, FeatureJobs(plan)).controls
        assert controls == dict(zip(["gram", "gram-seed1"], wanted, strict=True))


def test_all_seeds_start_from_the_same_weights():
    plan = plan_of({"seeds": THREE})
    assert plan.base_run.name == "pretrain" and plan.base_run.settings.train.seed == 0
    other = {"recipe": "other.yaml"}
    Path("other.yaml").write_text("extends: root.yaml\ntrain: {seed: 1}\n")
    with pytest.raises(ConfigError, match=r"runs\.other starts from other weights .*train\.seed is 1 and 0"):
        make_plan(config() | {"runs": config()["runs"] | {"other": other}}, REPOSITORY)


@pytest.mark.parametrize(
    ("pretrain", "gram", "further", "sentence"),
    [
        ({"seeds": [1, 2]}, {}, {}, r"runs\.pretrain\.seeds begins with 1, but train\.seed of root\.yaml is 0"),
        ({"seeds": [0, 0]}, {}, {}, r"seeds is \[0, 0\], but must be a list without repeats"),
        ({"seeds": [0, -1]}, {}, {}, r"runs\.pretrain\.seeds\.1 is -1, but must be at least 0"),
        ({"control": True}, {}, {}, r"runs\.pretrain\.control is true, but gram\.use_loss of root\.yaml is false"),
        (
            {"seeds": [0, 1]},
            {},
            {"features": {"encoders": {"pretrain-seed1": {"source": "root.yaml"}}}},
            r"runs\.pretrain\.seeds adds a run pretrain-seed1, but that is the name of an encoder",
        ),
    ],
)
def test_wishes_that_cannot_be_are_explained(pretrain, gram, further, sentence):
    with pytest.raises(ConfigError, match=sentence) as error:
        plan_of(pretrain, gram, **further)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["gram-control", "gram-seed1"])
def test_names_that_are_taken_are_refused(name):
    asked = config({}, {"seeds": [0, 1], "control": True})
    asked["runs"][name] = {"recipe": "root.yaml"}
    with pytest.raises(
        ConfigError, match=rf"adds a run {name}, but that is the name of runs\.{name}: give one of both"
    ):
        make_plan(asked, REPOSITORY)


def test_a_run_continues_runs_of_the_config_alone():
    with pytest.raises(ConfigError, match=r"runs\.gram\.continues is 'pretrain-seed1', which is not defined"):
        plan_of({"seeds": [0, 1]}, {"continues": "pretrain-seed1"})


def test_a_repeat_that_was_started_keeps_its_settings():
    run = plan_of({"seeds": [0, 1]}).runs["pretrain-seed1"]
    folder = Path("results/runs/pretrain-seed1")
    (folder / "ckpt" / "9").mkdir(parents=True)
    (folder / "ckpt" / "9" / ".metadata").touch()
    seal_run(folder, run.settings, 64, {"weights": "x"}, "random")
    check_seal(folder, run.recipe, run.changes)
    with pytest.raises(SealError, match=r"train\.seed was 1 and is now 0"):
        check_seal(folder, run.recipe)


def test_arms_of_the_pilot_are_changes_of_the_same_recipe():
    Path("root.yaml").write_text(RECIPE + "MODEL: {WEIGHTS: published.pth}\n")
    Path("published.pth").touch()
    plan = plan_of({"seeds": [0, 1]})
    pilot = PilotJobs(plan)
    run = pilot.plan.runs["pilot-lora"]
    assert run.recipe == Path("root.yaml") and "student.trainable=lora" in run.changes
    assert run.settings.student.trainable == "lora" and run.settings.train.seed == 0
    assert pilot.plan.measured_models == ["base", *pilot.arms]
