"""What a pilot refuses while planning, and what it says beforehand: one sentence each, that says what to do."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dinoscope.errors import ConfigError, SealError
from dinoscope.evaluate.intervals import MIN_CASES
from dinoscope.evaluate.pilot import Arm
from dinoscope.evaluate.pilot_starts import check_starts
from dinoscope.files import write_json, write_text
from dinoscope.models.weights import read_model_file, state_digest
from dinoscope.plan import make_plan
from dinoscope.plan_pilot import _FEWEST_CASES, PilotJobs
from dinoscope.train.checkpoint_files import record_files
from dinoscope.train.seal import seal_run, write_config
from tiny_backbone import tiny_backbone

REPOSITORY = Path(__file__).parents[2]
RECIPE = """MODEL: {WEIGHTS: w.pth}
optim: {epochs: 40, warmup_epochs: 10}
student: {arch: vit_nano}
crops: {global_crops_size: 96, local_crops_size: 48}
"""
COLUMNS = "slide_id\tpath\tcase_id\tuse\tsite"


def write_slides(num_eval, sites="AB"):
    """Two training slides and so many held out, with labels of two classes in turn."""
    rows = [f"e{i}\te{i}.svs\tE{i}\teval,features\t{sites[i % len(sites)]}" for i in range(num_eval)]
    rows += [f"t{i}\tt{i}.svs\tT{i}\ttrain\t{sites[0]}" for i in range(2)]
    write_text(Path("slides.tsv"), "\n".join([COLUMNS, *rows]) + "\n")
    labels = [f"E{i}\t{'low' if i % 2 else 'high'}" for i in range(num_eval)] + ["T0\tlow", "T1\thigh"]
    write_text(Path("labels.tsv"), "\n".join(["case_id\tgrade", *labels]) + "\n")


@pytest.fixture
def pilot(tmp_path, monkeypatch):
    """Makes the pilot of a config in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    Path("w.pth").touch()
    write_text(Path("root.yaml"), RECIPE)
    write_slides(100)

    def make(settings=None, **more):
        config = {
            "slides": {"source": "slides.tsv"},
            "labels": "labels.tsv",
            "tiling": {"sets": {"train": {"tile_px": 256}, "features": None}},
            "runs": {"pretrain": {"recipe": "root.yaml"}},
            "split": {"fraction": 0},
            "pilot": {"iterations": 120, "gpu_minutes": 1e6} | (settings or {}),
        } | more
        return PilotJobs(make_plan(config, REPOSITORY))

    return make


def begin(jobs, name):
    """A run folder as training leaves it once there is a checkpoint."""
    run, settings = jobs.plan.results / "runs" / name, jobs.plan.runs[name].settings
    folder = run / "ckpt" / "9"
    folder.mkdir(parents=True)
    for file in ("__0_0.distcp", ".metadata"):
        (folder / file).write_bytes(b"of a step")
    record_files(folder)
    seal_run(run, settings, 32, {"weights": "w"}, "somebody's")
    write_config(run, settings)


def refusal(jobs):
    with pytest.raises(ConfigError) as error:
        jobs.check()
    said = str(error.value)
    assert "\n" not in said
    return said


def test_another_budget_is_refused_once_an_arm_has_begun(pilot):
    jobs = pilot()
    minutes_of_60 = 3 * 60.5 * jobs.step_flops("full") / 60 / 1e12
    begin(jobs, "pilot-full")
    jobs.check()  # the same goes on
    refused = [
        ({"iterations": 240}, "optim.warmup_epochs was 30"),
        ({"gpu_minutes": minutes_of_60, "tflops": 1}, "optim.warmup_epochs was 30"),
        ({"lr_factors": {"full": 2}}, "optim.lr was"),
        ({"probes": 4}, "begun with 24 iterations between probes, and the config now comes to 30"),
    ]
    for changed, told in refused:
        said = refusal(pilot(changed))
        assert said.startswith("pilot-full of the pilot was begun with ") and told in said
        assert said.endswith(
            "put the config and the recipe back, or give the changed pilot a name of its own (pilot.name)"
        )
    pilot({"iterations": 240, "name": "longer"}).check()


def test_another_length_alone_is_refused_too(pilot):
    """Other runs may be extended; an arm that is longer than the others would not be at equal compute."""
    recipe = RECIPE.replace("warmup_epochs: 10", "warmup_epochs: 0, freeze_last_layer_epochs: 0")
    write_text(Path("root.yaml"), recipe + "teacher: {warmup_teacher_temp_epochs: 0}\n")
    begin(pilot(), "pilot-lora")
    iterations = pilot().iterations["lora"]
    said = refusal(pilot({"iterations": 121}))
    assert f"pilot-lora of the pilot was begun with {iterations} iterations, and the config now comes to" in said


def test_a_changed_recipe_is_refused_and_says_which_key(pilot):
    begin(pilot(), "pilot-last_n")
    write_text(Path("root.yaml"), RECIPE + "augmentation: {recipe: pathology}\n")
    assert "augmentation.recipe was 'dinov3' and is now 'pathology'" in refusal(pilot())
    write_text(Path("root.yaml"), "# a remark\n" + RECIPE)
    pilot().check()


def test_arms_may_come_and_go(pilot):
    begin(pilot(), "pilot-full")
    pilot({"arms": ["full"]}).check()
    pilot({"arms": ["full", "last_n"]}).check()


@pytest.mark.parametrize(
    ("settings", "more", "told"),
    [
        ({"arms": []}, {}, "pilot.arms"),
        ({"arms": ["qlora"]}, {}, "pilot.arms"),
        ({"arms": ["full", "full"]}, {}, "pilot.arms"),
        ({"gpu_minutes": 0}, {}, "pilot.gpu_minutes"),
        ({"tflops": -1}, {}, "pilot.tflops"),
        ({"iterations": 5}, {}, "pilot.iterations"),
        ({"gpu_minute": 5}, {}, "gpu_minutes"),
        ({"gpu_minutes": 1e-6}, {}, "give full adaptation 0 iterations; 10 are the least: raise them"),
        ({}, {"labels": None}, "the pilot has nothing to judge by: name a table in `labels`"),
        ({}, {"labels": "none.tsv"}, "none.tsv"),
        ({}, {"evaluation": {"selection": {"fraction": 0}}}, "no case to follow its runs on while they train: 100 are"),
        ({}, {"evaluation": {"primary": "label-grad/linear"}}, "did you mean label-grade?"),
    ],
)
def test_bad_values_end_in_one_sentence(pilot, settings, more, told):
    with pytest.raises(ConfigError) as error:
        pilot(settings, **more).check()
    said = str(error.value)
    assert told in said and "\n" not in said and len(said) > 30


def test_labels_without_held_out_cases(pilot):
    write_slides(0)
    said = refusal(pilot())
    assert said.endswith(
        "labels.tsv has labels, but no case is held out to be asked about; give some cases use=eval,features"
    )


def test_what_it_will_not_tell_is_said_beforehand(pilot):
    assert pilot().notes() == []
    write_slides(100, sites="A")
    assert pilot().notes() == [
        "the pilot has no site read-out: the test cases are of one site (column site of slides.tsv)"
    ]
    write_slides(24)
    assert pilot().notes() == [
        "the pilot will find too few cases to judge grade: 9 test cases in the smallest class, 30 are needed"
    ]
    assert _FEWEST_CASES == MIN_CASES


def test_arms_of_other_weights_are_not_compared(tmp_path):
    torch.save(
        {"teacher": {f"backbone.{k}": v for k, v in tiny_backbone().state_dict().items()}}, tmp_path / "base.pth"
    )
    digest = state_digest(read_model_file(tmp_path / "base.pth").backbone)
    arms = [Arm("pilot-lora", "lora", 1.0), Arm("pilot-full", "full", 1.0)]
    for arm in arms:
        write_json(tmp_path / "runs" / arm.run / "run_config.json", {"inputs": {"weights": digest}})
    check_starts(tmp_path / "runs", arms, tmp_path / "base.pth")
    write_json(tmp_path / "runs/pilot-full/run_config.json", {"inputs": {"weights": "0123456789"}})
    with pytest.raises(SealError, match=r"pilot-full began from other weights \(01234567\) than .*: give the pilot"):
        check_starts(tmp_path / "runs", arms, tmp_path / "base.pth")


@pytest.mark.parametrize("command", [[], ["summary"]])
def test_help_can_be_read(command):
    script = REPOSITORY / "workflow_scripts" / "pilot.py"
    done = subprocess.run([sys.executable, script, *command, "--help"], capture_output=True, text=True, check=True)
    assert "snakemake --cores all pilot" in done.stdout or "--comparisons" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120 and "Traceback" not in done.stderr
