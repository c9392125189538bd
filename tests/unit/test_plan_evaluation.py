"""Which models are asked what, and with which arguments, before any job runs."""

from pathlib import Path

import numpy as np
import pytest

from dinoscope.errors import ConfigError
from dinoscope.evaluate.inputs import UnitFeatures
from dinoscope.evaluate.measuring import Settings, answer_classes, answer_values
from dinoscope.evaluate.units import Unit, Units
from dinoscope.plan import make_plan
from dinoscope.plan_evaluation import SHIFTS, EvaluationJobs
from dinoscope.plan_evaluation_checks import MEASURES
from dinoscope.plan_features import FeatureJobs

REPOSITORY = Path(__file__).parents[2]
RECIPE = "student: {arch: vit_nano}\ncrops: {global_crops_size: 96, local_crops_size: 48}\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("root.yaml").write_text(RECIPE)
    gram = "extends: root.yaml\ngram: {use_loss: true}\ncrops: {gram_teacher_crops_size: 128}\n"
    Path("gram.yaml").write_text(gram)
    rows = ["slide_id\tpath\tcase_id\tuse"]
    rows += [f"t{i}\tt{i}.svs\tT{i}\ttrain,features" for i in range(3)]
    rows += [f"e{i}\te{i}.svs\tE{i}\teval,features" for i in range(8)]
    for row in rows[1:]:
        Path(row.split("\t")[1]).touch()
    Path("slides.tsv").write_text("\n".join(rows) + "\n")
    Path("labels.tsv").write_text("case_id\tgrade\tos_time\tos_event\nE1\tlow\t3\t1\nE2\thigh\t2\t0\n")
    Path("cells/a").mkdir(parents=True)
    return tmp_path


def jobs_of(evaluation=None, **further):
    config = {
        "slides": {"source": "slides.tsv"},
        "labels": "labels.tsv",
        "tiling": {"sets": {"train": {"tile_px": 256}, "features": None}},
        "runs": {
            "pretrain": {"recipe": "root.yaml"},
            "gram": {"recipe": "gram.yaml", "continues": "pretrain"},
            "more": {"recipe": "root.yaml", "continues": "pretrain"},
        },
        "evaluation": evaluation or {},
    } | further
    plan = make_plan(config, REPOSITORY)
    jobs = EvaluationJobs(plan, FeatureJobs(plan))
    jobs.check()
    return jobs


def test_tasks_and_the_models_that_answer_them(folder):
    jobs = jobs_of({"tile_sets": {"cells": {"folder": "cells"}}, "masks": {"nuclei": {"images": ".", "masks": "."}}})
    assert jobs.tasks == ["label-grade", "label-os", "tiles-cells", "masks-nuclei", "descriptive"]
    # starting from a random initialisation, that is base itself
    assert jobs.models("label-grade") == ["base", "pretrain", "gram", "more", "color-histogram", "thumbnail"]
    assert jobs.models("masks-nuclei") == jobs.models("descriptive") == ["base", "pretrain", "gram", "more"]
    assert jobs_of({"labels": ["os"], "descriptive": False}).tasks == ["label-os"]
    assert jobs_of(labels=None).tasks == ["descriptive"]


def test_an_evaluation_of_nothing_is_refused(folder):
    jobs_of().check_tasks()
    with pytest.raises(ConfigError, match="there is nothing to evaluate: hold cases out"):
        jobs_of({"descriptive": False}, labels=None).check_tasks()


def test_features_of_test_slides_alone_are_taken(folder):
    jobs = jobs_of()
    slides = {Path(file).stem for file in jobs.features("label-grade", "gram")}
    assert len(slides) == 6 and all(slide.startswith("e") for slide in slides)
    assert slides == set(jobs.cohort.slides_of("test"))
    assert not slides & set(jobs.cohort.slides_of("selection"))


def test_a_model_is_told_with_all_runs_that_it_comes_from(folder):
    jobs = jobs_of()
    seals = [part for part in jobs.history("label-grade", "gram") if part != "--seal"]
    assert seals == ["results/runs/gram/run_config.json", "results/runs/pretrain/run_config.json"]
    assert jobs.history("label-grade", "base") == jobs.history("label-grade", "thumbnail") == []
    Path("root.yaml").write_text(RECIPE + "MODEL: {WEIGHTS: published.pth}\n")
    Path("published.pth").touch()
    jobs = jobs_of()
    assert jobs.history("label-grade", "base") == ["--unknown-origin"]
    assert jobs.history("label-grade", "random") == [] and "random" in jobs.models("label-grade")


def test_images_of_whatever_slides_leave_unknown_what_was_seen(folder):
    sets = {"tile_sets": {"cells": {"folder": "cells"}}}
    Path("own").mkdir()
    Path("root.yaml").write_text(RECIPE + "train: {dataset_path: own}\n")
    jobs = jobs_of(sets)
    assert jobs.history("tiles-cells", "pretrain")[-2:] == ["--trained-on", "own"]  # told by their content
    assert "--unknown-origin" not in jobs.history("tiles-cells", "pretrain")
    assert jobs.history("label-grade", "gram")[0] == "--unknown-origin"


def test_gram_is_held_against_its_control_too(folder):
    jobs = jobs_of()
    assert jobs.controls == {"gram": "more"}
    assert jobs.reference_arguments("label-grade")[-1] == "gram=more"
    Path("gram.yaml").write_text(Path("gram.yaml").read_text() + "optim: {lr: 0.5}\n")
    assert jobs_of().controls == {}


def test_what_refers_to_nothing_is_refused(folder):
    with pytest.raises(ConfigError, match=r"names .gradd., which is no label of labels\.tsv; did you mean"):
        jobs_of({"labels": ["gradd"]}).tasks  # noqa: B018
    with pytest.raises(ConfigError, match=r"evaluation\.primary is 'label-grad/linear', but 'label-grad' is no task"):
        jobs_of({"primary": "label-grad/linear"})
    with pytest.raises(ConfigError, match=r"evaluation\.tile_sets\.cells: nowhere is no folder"):
        jobs_of({"tile_sets": {"cells": {"folder": "nowhere"}}})
    Path("root.yaml").write_text(RECIPE + "evaluation: {probe_every: 5}\n")
    with pytest.raises(ConfigError, match=r"evaluation\.probe\.source is 'cell', which is no tile set"):
        jobs_of({"tile_sets": {"cells": {"folder": "cells"}}, "probe": {"source": "cell"}})
    with pytest.raises(ConfigError, match="no case is for selection"):
        jobs_of({"selection": {"fraction": 0}})


def test_labels_that_cannot_be_asked_about_are_refused_while_planning(folder):
    table = Path("labels.tsv").read_text()
    Path("labels.tsv").write_text("case_id\tgrade\nT1\tlow\nT2\thigh\n")
    with pytest.raises(ConfigError, match="label grade: none of the 6 test cases has it"):
        jobs_of()
    assert jobs_of({"enabled": False}).tasks == ["label-grade", "descriptive"]
    Path("labels.tsv").write_text(table.replace("grade", "WHO grade (2021)"))
    with pytest.raises(ConfigError, match=r"column 'WHO grade \(2021\)' cannot name a label: rename it"):
        jobs_of()
    assert jobs_of({"labels": ["os"]}).tasks == ["label-os", "descriptive"]


def test_probes_ask_about_the_labels_of_the_config(folder):
    Path("root.yaml").write_text(RECIPE + "evaluation: {probe_every: 5}\n")
    assert "--label" not in jobs_of().probe_arguments()
    assert jobs_of({"labels": ["os"]}).probe_arguments()[-2:] == ["--label", "os"]


def test_sets_of_one_folder_have_the_same_groups(folder):
    sets = {"cells": {"folder": "cells"}, "grey": {"folder": str(folder / "cells"), "groups": "c[0-9]+"}}
    assert jobs_of({"tile_sets": sets}).image_tasks  # no run is asked about them
    with pytest.raises(ConfigError, match="tiles-cells and tiles-grey are of one folder, but differ in `groups`"):
        jobs_of({"tile_sets": sets, "probe": {"source": "cells"}})


def test_units_are_made_again_where_images_groups_cases_or_sites_changed(folder):
    """A folder is newer for what lies directly in it alone, so those of the classes are inputs too."""
    Path("parents.csv").write_text("file,group\n")
    Path("cells/b").mkdir()
    Path("cells/a/1.png").touch()
    jobs = jobs_of({"tile_sets": {"cells": {"folder": "cells", "groups": "parents.csv"}}})
    assert jobs.image_inputs("tiles-cells") == ["cells", "cells/a", "cells/b", "parents.csv"]
    assert jobs_of({"tile_sets": {"cells": {"folder": "cells", "groups": "p.*"}}}).image_inputs("tiles-cells")[-1] == (
        "cells/b"
    )
    assert jobs.image_inputs("label-grade") == jobs.image_inputs("descriptive") == []
    before = {task: jobs.cohort_digest(task) for task in jobs.tasks}
    table = Path("slides.tsv").read_text()
    for changed in (
        table.replace("\tE7\t", "\tE6\t"),
        table.replace("use\n", "use\tsite\n").replace("\tE3\teval,features", "\tE3\teval,features\tRome"),
    ):
        assert changed != table
        Path("slides.tsv").write_text(changed)
        after = jobs_of({"tile_sets": {"cells": {"folder": "cells"}}})
        assert {task for task in jobs.tasks if after.cohort_digest(task) != before[task]} == {
            "label-grade",
            "label-os",
            "descriptive",
        }


@pytest.mark.parametrize(
    ("primary", "is_known"),
    [
        ("label-grade/linear", True),
        ("label-grade/linear@leave-one-site-out", True),
        ("label-grade/attention_mil", True),
        ("tiles-cells/linear_change~stain", True),
        ("masks-nuclei/dense", True),
        ("label-os/cox~grey", True),
        ("label-grade", False),
        ("label-grade/linea", False),
        ("label-grade/linear_change", False),
        ("label-os/linear", False),
        ("tiles-cells/attention_mil", False),
    ],
)
def test_a_primary_measure_that_is_none_is_refused_before_anything_runs(folder, primary, is_known):
    sets = {"tile_sets": {"cells": {"folder": "cells"}}, "masks": {"nuclei": {"images": ".", "masks": "."}}}
    if is_known:
        assert jobs_of({"primary": primary, **sets}).summary_arguments() == ["--primary", primary]
    else:
        with pytest.raises(ConfigError, match=r"evaluation\.primary is .* is no measure of .*; give .* and one of"):
            jobs_of({"primary": primary, **sets})


def test_measures_are_those_there_are():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(40, 3)).astype(np.float32)
    bags = UnitFeatures({}, rows, [row[None] for row in rows], [np.zeros((1, 2))] * 40, [np.zeros(1)] * 40)
    settings = Settings(folds=2, repeats=1)
    targets = {
        "classes": "ab" * 20,
        "number": rng.normal(size=40).tolist(),
        "survival": [[1.0 + i, 1.0] for i in range(40)],
    }
    for kind, values in targets.items():
        units = [Unit(f"c{place}", f"c{place}", "test", value) for place, value in enumerate(values)]
        task = Units("label-x", kind, units, ["a", "b"] if kind == "classes" else [])
        found = (answer_classes if kind == "classes" else answer_values)(task, rows, settings, bags)
        assert set(found.said) == {*MEASURES[kind], "attention_mil"}


@pytest.mark.parametrize(
    ("groups", "sentence"),
    [("nowhere.csv", "nowhere.csv does not exist; write a table"), ("(p[", "neither a table")],
)
def test_groups_that_are_none_are_refused_before_anything_runs(folder, groups, sentence):
    with pytest.raises(ConfigError, match=r"evaluation\.tile_sets\.cells\.groups") as caught:
        jobs_of({"tile_sets": {"cells": {"folder": "cells", "groups": groups}}})
    assert sentence in str(caught.value)


def test_sets_of_one_folder_share_the_selection(folder):
    """What a teacher was chosen by must not judge it, in grey neither."""
    Path("others/a").mkdir(parents=True)
    sets = {
        "cells": {"folder": "cells"},
        "grey": {"folder": str(folder / "cells"), "grey": True},
        "others": {"folder": "others"},
    }
    jobs = jobs_of({"tile_sets": sets, "probe": {"source": "cells"}})
    fractions = {task: jobs.unit_arguments(task)[-1] for task in jobs.image_tasks}
    assert fractions == {"tiles-cells": "0.25", "tiles-grey": "0.25", "tiles-others": "0"}


def test_changed_copies_are_made_where_robustness_is_asked(folder):
    jobs = jobs_of({"tile_sets": {"cells": {"folder": "cells"}}, "robustness": True})
    assert jobs.shift_arguments("tiles-cells") == ["--shifts", *SHIFTS]
    grey = jobs_of({"tile_sets": {"cells": {"folder": "cells", "grey": True}}, "robustness": True})
    assert grey.shift_arguments("tiles-cells") == ["--shifts", *(kind for kind in SHIFTS if kind != "grey")]
    assert jobs_of({"tile_sets": {"cells": {"folder": "cells"}}}).shift_arguments("tiles-cells") == []


def test_tiles_of_test_slides_are_sampled_where_robustness_is_asked(folder):
    Path("encoder").mkdir()
    encoders = {"other": {"source": "encoder", "set": "train"}}
    jobs = jobs_of({"robustness": True, "robustness_tiles": 7, "seed": 3}, features={"encoders": encoders})
    test = jobs.cohort.slides_of("test")
    # where each model's own tiles are; baselines see those of ours
    for model, tile_set in (("base", "features"), ("thumbnail", "features"), ("other", "train")):
        assert jobs.samples(model) == [f"<results>/evaluation/sampled/{tile_set}/{slide}.npz" for slide in test]
    assert jobs.sampled_features("label-os", "gram") == ["<results>/evaluation/sampled/gram.npz"]
    assert jobs.sampled_features("descriptive", "gram") == jobs_of().sampled_features("label-os", "gram") == []
    assert jobs.sample_arguments() == ["--count", "7", "--seed", "3"]


def test_patches_are_compared_with_the_start_and_with_the_run_that_is_continued(folder):
    jobs = jobs_of({"masks": {"nuclei": {"images": ".", "masks": "."}}})
    of_tiles = "<results>/evaluation/descriptive/patches/{}.npz"
    assert jobs.patch_files("descriptive", "base") == {}
    assert jobs.patch_files("descriptive", "pretrain") == {
        "own": of_tiles.format("pretrain"),
        "base": of_tiles.format("base"),
    }
    assert list(jobs.patch_files("descriptive", "gram")) == ["own", "base", "continued_run"]
    assert jobs.patch_files("descriptive", "gram")["continued_run"] == of_tiles.format("pretrain")
    assert jobs.patch_arguments("masks-nuclei", "gram") == [
        "--patches-from",
        "base=results/evaluation/masks-nuclei/features/base.npz",
        "continued_run=results/evaluation/masks-nuclei/features/pretrain.npz",
    ]
    assert jobs.patch_files("label-grade", "gram") == {} and jobs.patch_arguments("label-grade", "gram") == []
    arguments = jobs.patch_arguments("descriptive", "gram")
    assert arguments[:2] == ["--patches", "results/evaluation/descriptive/patches/gram.npz"]
    # without the starting weights there is nothing to be compared with
    only = jobs_of(None, features={"models": ["pretrain"]})
    assert only.patch_files("descriptive", "pretrain") == {}


def test_tiles_are_taken_of_slides_on_this_machine_alone(folder):
    table = Path("slides.tsv").read_text()
    jobs = jobs_of(packing={"enabled": True})
    (first, *others), (kept, *_) = jobs.sampled_slides, jobs.probed_slides
    record = next(line for line in table.splitlines() if line.startswith(f"{first}\t"))
    Path("slides.tsv").write_text(table.replace(record, record.replace(record.split("\t")[1], "s3://bucket/x.tiff")))
    assert (
        jobs_of(packing={"enabled": True}).sampled_slides == others
        and jobs_of(packing={"enabled": True}).probed_slides == jobs.probed_slides
    )
    lines = [line.split("\t") for line in table.splitlines()]
    remote = ["\t".join([name, f"s3://bucket/{name}.tiff", *rest]) for name, _, *rest in lines[1:]]
    Path("slides.tsv").write_text("\n".join(["\t".join(lines[0]), *remote]) + "\n")
    jobs = jobs_of(packing={"enabled": True})
    assert jobs.sampled_slides == [] and jobs.patch_files("descriptive", "gram") == {}
    assert jobs.patch_arguments("descriptive", "gram") == [] and jobs.probed_slides == []
    Path("root.yaml").write_text(RECIPE + "evaluation: {probe_every: 5}\n")
    with pytest.raises(ConfigError, match="the slides of all cases for selection lie on object storage"):
        jobs_of(packing={"enabled": True}).probed_slides  # noqa: B018
    assert kept


def test_tiles_to_compare_patches_on_are_of_a_few_slides(folder, monkeypatch):
    jobs = jobs_of()
    assert jobs.sampled_slides == jobs.slides("descriptive")
    monkeypatch.setattr("dinoscope.plan_evaluation._MOST_SLIDES", 3)
    few = jobs_of().sampled_slides
    assert len(few) == 3 and set(few) < set(jobs.sampled_slides)
    assert jobs_of({"seed": 1}).sampled_slides != few
    assert jobs_of().sampled_manifests() == [f"<results>/tiles/features/{slide}.parquet" for slide in few]


def test_shifts_are_those_there_are():
    from dinoscope.evaluate import shifts

    assert set(SHIFTS) == set(shifts.SHIFTS)
