"""What planning makes of tasks of segmentation: one training a way, arguments that the script reads back, mistakes."""

import subprocess
import sys
from pathlib import Path

import pytest

import segment_train
from dinoscope.errors import ConfigError, SealError
from dinoscope.files import write_json
from dinoscope.plan import make_plan
from dinoscope.plan_segmentation import SegmentJobs
from dinoscope.segment.arguments import data_options, settings_of
from dinoscope.segment.settings import nearest_multiples, rounded_img_dim, seal_segmenter

REPOSITORY = Path(__file__).parents[2]
RECIPE = "student: {arch: vit_nano}\ncrops: {global_crops_size: 96, local_crops_size: 48}\n"
FULL = {
    "dataset": "folder", "root": "discs", "data": {"class_map": {0: "ground", 7: "disc"}, "groups": "case"}, "mpp": 0.5,
    "models": ["base", "mine"], "train": ["decoder", "lora", "full", "last_n"], "decoders": ["fpn", "linear"],
    "seeds": [3, 4], "rank": 2, "alpha": 6.0, "targets": ["q", "proj"], "blocks": [0, 1], "img_dim": [96, 128],
    "epochs": 7, "batch_size": 3, "lr": 0.002, "decoder_lr": 0.01, "min_lr": 0.1, "weight_decay": 0.1,
    "warmup_epochs": 2.5, "clip_grad": 0.5, "last_n": 2, "dice_weight": 0.3, "class_weights": [1, 2.5],
    "views": "photographs",
    "augmentation": {"scale": [0.9, 1.1], "hed_sigma": 1e-5},
    "inference": "resize", "overlap": 0.5, "eval_epochs": 2, "precision": "float32",
    "corruptions": ["pathology", "fog"],
    "severities": [3, 5], "slides": ["S1"],
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "root.yaml").write_text(RECIPE)
    (tmp_path / "slides.tsv").write_text("slide_id\tpath\nS1\ta.svs\n")
    (tmp_path / "discs").mkdir()
    return tmp_path


def jobs(**tasks):
    config = {
        "slides": {"source": "slides.tsv"},
        "runs": {"mine": {"recipe": "root.yaml"}},
        "tiling": {"sets": {"train": {"tile_px": 96, "mpp": 1.0}, "features": {"tile_px": 96, "mpp": 1.0}}},
        "segmentation": {"tasks": tasks},
    }
    return SegmentJobs(make_plan(config, REPOSITORY, check_files=False))


def read_back(monkeypatch, arguments):
    """The settings that segment_train.py understands."""
    monkeypatch.setattr(sys, "argv", ["segment_train.py", "--exp-name", "x", *arguments])
    parsed = segment_train.parse_arguments()
    return parsed, settings_of(parsed, data_options(parsed.data_option))


@pytest.mark.parametrize("task", [FULL, {"dataset": "folder", "root": "discs"}, {"dataset": "voc", "root": "discs"}])
def test_scripts_read_the_settings_that_were_planned(folder, monkeypatch, task):
    planned = jobs(cells=task)
    for variant in planned.variants("cells"):
        arguments = planned.train_arguments("cells", "mine", variant)
        parsed, settings = read_back(monkeypatch, arguments)
        assert settings.as_dict() == planned.settings("cells", variant).as_dict()
        assert str(parsed.weights) == "results/models/mine/teacher.pth"
        assert parsed.round_img_dim is False
        assert parsed.mpp == task.get("mpp")


def test_every_setting_of_a_task_arrives(folder):
    settings = jobs(cells=FULL).settings("cells", "lora_fpn_seed4").as_dict()
    for name, value in FULL.items():
        if name in settings and name != "data":
            assert settings[name] == value, name
    assert (settings["trainable"], settings["decoder"], settings["seed"]) == ("lora", "fpn", 4)
    assert settings["data"]["class_map"] == {"0": "ground", "7": "disc"}


def test_ways_models_and_outputs(folder):
    planned = jobs(cells=FULL, other={"dataset": "folder", "root": "discs"})
    assert len(planned.variants("cells")) == 4 * 2 * 2
    assert list(planned.variants("other")) == ["decoder_linear_seed0", "lora_linear_seed0"]
    assert planned.models("other") == ["base", "mine"]
    folders = planned.folders()
    assert len(folders) == 2 * 16 + 2 * 2
    assert folders[0] == "<results>/segmentation/cells/base/decoder_fpn_seed3"
    assert all("/cells/" in name for name in planned.folders(corrupted=True))
    maps = planned.slide_maps()
    assert len(maps) == 2 * 4 * 2
    assert all("seed3/slides/S1.tiff" in name for name in maps)
    assert planned.corruption_arguments("cells") == ["--kinds", "pathology", "fog", "--severities", "3", "5"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"models": ["mime"]}, r"models names 'mime', which is no model; did you mean mine\?"),
        ({"slides": ["S2"]}, r"slide 'S2' is not in slides.tsv"),
        ({"rang": 3}, r"unknown key segmentation.tasks.cells.rang"),
        ({"img_dim": [96]}, r"segmentation.tasks.cells.img_dim is \[96\]"),
        ({"train": ["adapters"]}, r"must be one of decoder, lora, last_n, full"),
        ({"class_weights": "even"}, r"segmentation.tasks.cells.class_weights is 'even'"),
    ],
)
def test_mistakes_are_told_while_planning(folder, change, sentence):
    with pytest.raises(ConfigError, match=sentence):
        jobs(cells={"dataset": "folder", "root": "discs"} | change)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"data": {"instances": True}}, r"tasks.cells: a data set of kind folder has no option 'instances'"),
        ({"augmentation": {"hed": 1}}, r"tasks.cells: augmentation.hed is unknown"),
        ({"corruptions": ["foggy"]}, r"tasks.cells: corruption 'foggy' is unknown; did you mean fog\?"),
        ({"root": "squares"}, r"tasks.cells: root squares does not exist"),
        ({"dataset": "voc", "root": None}, r"tasks.cells: data set voc: where it lies is not said"),
        ({"slides": ["S1"]}, r"tasks.cells: slides are to be segmented, but mpp is not said"),
    ],
)
def test_options_are_checked_before_a_job_starts(folder, change, sentence):
    with pytest.raises(ConfigError, match=sentence):
        jobs(cells={"dataset": "folder", "root": "discs"} | change).check_options()


def test_no_tasks_need_no_torch(folder):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from dinoscope.plan import make_plan; "
        "from dinoscope.plan_segmentation import SegmentJobs; from pathlib import Path; "
        "jobs = SegmentJobs(make_plan({'slides': {'source': 'slides.tsv'}, 'runs': {'mine': {'recipe': 'root.yaml'}}}, "
        "Path(sys.argv[2]), check_files=False)); jobs.check_options(); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, REPOSITORY / "workflow_scripts", REPOSITORY], check=True)


def test_a_begun_training_refuses_other_settings(folder):
    planned = jobs(cells={"dataset": "folder", "root": "discs"})
    run_dir = planned.run_dir("cells", "mine", "lora_linear_seed0")
    seal_segmenter(run_dir, planned.settings("cells", "lora_linear_seed0"), "e", "d")
    changed = jobs(cells={"dataset": "folder", "root": "discs", "rank": 8})
    changed.check_seal("cells", "mine", "lora_linear_seed0")  # nothing was saved yet
    write_json(run_dir / "final.json", {})
    planned.check_seal("cells", "mine", "lora_linear_seed0")
    assert planned.is_finished("cells", "mine", "lora_linear_seed0")
    with pytest.raises(SealError, match=r"segmenter cells/mine/lora_linear_seed0 was .* rank was 3 and is now 8"):
        changed.check_seal("cells", "mine", "lora_linear_seed0")


@pytest.mark.parametrize(
    ("asked", "patch", "taken", "named"),
    [
        ((308, 308), 16, (304, 304), "304 or 320"),
        ((308, 308), 14, (308, 308), None),
        ((5, 100), 16, (16, 96), "16, 96 or 112"),
        ((312, 320), 16, (304, 320), "304 or 320"),
    ],
)
def test_the_nearest_whole_patches(asked, patch, taken, named):
    size, note = rounded_img_dim(asked, patch)
    assert size == taken
    assert (note is None) == (named is None)
    assert named is None or f"the nearest are {named}" in note
    assert all(low % patch == high % patch == 0 for low, high in (nearest_multiples(side, patch) for side in asked))


def test_slides_are_told_the_mpp_of_the_task_whatever_the_card_says(folder):
    planned = jobs(cells=FULL)
    assert planned.slide_arguments("cells", "S1")[:3] == ["--mpp", "0.5", "--tissue-method"]


def test_the_manifest_of_annotated_slides_is_made_first(folder):
    """As the workflow names it; what lies elsewhere must be there."""
    task = {"dataset": "slides", "data": {"class_map": {"Tumor": "tumour"}}}
    planned = jobs(cells=task | {"root": "results/manifests/train.parquet"}, discs=FULL)
    planned.check_options()
    assert planned.data_files("cells") == ["results/manifests/train.parquet"]
    assert planned.data_files("discs") == []
    with pytest.raises(ConfigError, match=r"tasks.cells: root elsewhere/train.parquet does not exist"):
        jobs(cells=task | {"root": "elsewhere/train.parquet"}).check_options()
