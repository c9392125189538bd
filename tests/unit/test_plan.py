import copy
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from dinoscope.errors import ConfigError
from dinoscope.plan import DEMO_SLIDES, make_plan, one_sentence
from dinoscope.plan_checks import TARGETS, check_config
from dinoscope.plan_features import EXPORT_FILES
from dinoscope.plan_slides import SlideJobs
from dinoscope.schema import read_schema, with_defaults
from dinoscope.slides.skipping import Attempt
from dinoscope.train.seal import seal_run
from tiny_slides import write_manifest

REPOSITORY = Path(__file__).parents[2]
SCHEMA = read_schema(REPOSITORY / "config/schemas/config.schema.yaml")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with two recipes and six slides of five cases, which are empty files."""
    monkeypatch.chdir(tmp_path)
    Path("root.yaml").write_text("student: {arch: vit_nano}\ncrops: {global_crops_size: 96, local_crops_size: 48}\n")
    Path("gram.yaml").write_text("extends: root.yaml\ngram: {use_loss: true}\ncrops: {gram_teacher_crops_size: 128}\n")
    rows = ["slide_id\tpath\tcase_id\tuse\tstain\tmpp"]
    uses, stains, mpps = ["", "train", "", "", "features", ""], ["HE", "IHC:CD3", "Pap", "IF", "", ""], {1: "0.25"}
    for index, (use, stain) in enumerate(zip(uses, stains, strict=True)):
        Path(f"s{index}.svs").touch()
        rows.append(f"s{index}\ts{index}.svs\tp{index}\t{use}\t{stain}\t{mpps.get(index, '')}")
    Path("slides.tsv").write_text("\n".join(rows) + "\n")
    return tmp_path


@pytest.fixture
def config(folder):
    return {
        "slides": {"source": "slides.tsv"},
        "tiling": {"sets": {"train": {"tile_px": 256}, "features": None}},
        "runs": {"pretrain": {"recipe": "root.yaml"}, "gram": {"recipe": "gram.yaml", "continues": "pretrain"}},
    }


def plan_of(config, **changes):
    """The plan of a config with dotted keys changed, e.g. {"tiling.sets.train.tile_px": 64}; ... removes a key."""
    changed = copy.deepcopy(config)
    for dotted, value in changes.items():
        *sections, key = dotted.split(".")
        section = changed
        for name in sections:
            section = section.setdefault(name, {})
        if value is ...:
            del section[key]
        else:
            section[key] = value
    return make_plan(changed, REPOSITORY)


def test_the_config_that_comes_along_is_the_demo(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    plan = make_plan(yaml.safe_load(Path("config/config.yaml").read_text(encoding="utf-8")), REPOSITORY)
    assert list(plan.slides) == list(DEMO_SLIDES)
    assert plan.demo_slides() == [f"results/demo/{name}.tiff" for name in DEMO_SLIDES]
    assert plan.models == ["base", "pretrain", "gram"]
    assert len(plan.train_slides) == 4
    assert plan.runs["gram"].recipes == (Path("config/runs/tiny.yaml"), Path("config/runs/tiny_gram.yaml"))


def test_the_config_that_comes_along_names_every_key():
    config = yaml.safe_load((REPOSITORY / "config/config.yaml").read_text(encoding="utf-8"))
    filled = with_defaults(config, SCHEMA)
    for key in ("continues", "gram_teacher", "control"):
        del filled["runs"]["pretrain"][key]
    assert config == filled


def test_demo_slides_are_those_that_the_demo_draws():
    from dinoscope.slides import demo

    assert demo.DEMO_SLIDES == DEMO_SLIDES


def test_only_slides_of_the_demo_are_ever_made(config):
    Path("results/demo").mkdir(parents=True)
    mine = Path("results/demo/mine.tiff")
    mine.touch()
    with open("slides.tsv", "a") as table:
        table.write(f"mine\t{mine}\ndemo_he_1\tresults/demo/demo_he_1.tiff\n")
    assert plan_of(config, **{"demo.enabled": True}).demo_slides() == ["results/demo/demo_he_1.tiff"]
    with pytest.raises(ConfigError, match=r"slide demo_he_1: results/demo/demo_he_1\.tiff does not exist"):
        SlideJobs(plan_of(config)).input_of("demo_he_1")


def test_targets_are_the_rules_of_the_workflow():
    rules = set()
    for file in [REPOSITORY / "Snakefile", *(REPOSITORY / "rules").glob("*.smk")]:
        rules |= set(re.findall(r"^ *(?:use rule \w+ as|rule) (\w+)", file.read_text(encoding="utf-8"), re.MULTILINE))
    assert set(TARGETS) == rules | {f"export_features_{name}" for name in EXPORT_FILES}


def test_defaults_come_from_the_schema(config):
    plan = plan_of(config)
    wanted = {"tile_px": 256, "mpp": 0.5, "min_tissue": None, "stride_px": None, "edge": "drop", "max_upsample": 1.05}
    assert plan.config["tiling"]["sets"]["train"] == wanted
    assert plan.config["tiling"]["sets"]["features"]["tile_px"] == 224
    assert plan.config["features"]["pooling"] == "cls"
    assert plan.results == Path("results")
    without = plan_of(config, tiling=...).config["tiling"]["sets"]
    assert (without["train"]["tile_px"], without["features"]["tile_px"]) == (512, 224)


def test_the_schema_is_strict_and_described_at_every_level():
    def visit(part, key):
        assert part.get("description"), key
        if part.get("type") == "object":
            # checked against data classes instead (SegmentJobs.check_options)
            free = key.endswith((".data", ".augmentation"))
            assert part["additionalProperties"] is free, key
        for name, child in (part.get("properties", {}) | part.get("patternProperties", {})).items():
            visit(child, f"{key}.{name}")

    Draft202012Validator.check_schema(SCHEMA)
    visit(SCHEMA, "config")


def test_making_a_plan_leaves_config_and_schema_alone(config):
    before = copy.deepcopy(config)
    plan = plan_of(config)
    plan.config["tiling"]["sets"]["train"]["mpp"] = 9
    assert config == before
    assert check_config(config, REPOSITORY)["tiling"]["sets"]["train"]["mpp"] == 0.5


BAD_CONFIGS = [
    ({"tilling": {}}, "unknown key tilling; did you mean tiling?"),
    ({"tiling.sets.train.tile_pix": 9}, "unknown key tiling.sets.train.tile_pix; did you mean tile_px?"),
    ({"tiling.sets.train.strid": 9}, "unknown key tiling.sets.train.strid; did you mean stride_px?"),
    ({"runs.gram.continue": "x"}, "unknown key runs.gram.continue; did you mean continues?"),
    ({"recipe": "x"}, "unknown key recipe; did you mean runs.NAME.recipe?"),
    ({"zzz": 1}, "unknown key zzz; known here: results, slides"),
    ({"tiling.sets.train.tile_px": "abc"}, "tiling.sets.train.tile_px is 'abc', but must be a whole number (Side of"),
    (
        {"tiling.sets.train.tile_px": "256"},
        "is '256', but must be a whole number; within braces --config makes texts of",
    ),
    ({"tiling.sets.train.mpp": 0}, "tiling.sets.train.mpp is 0, but must be more than 0"),
    ({"tiling.sets.train.tile_px": 8}, "tiling.sets.train.tile_px is 8, but must be at least 16"),
    ({"tiling.sets.train.min_tissue": 50}, "tiling.sets.train.min_tissue is 50, but must be at most 1"),
    ({"tiling.sets.train.mpp": None}, "tiling.sets.train.mpp is empty, but must be a number"),
    ({"tiling.sets": {"a b": {}}}, "tiling.sets.a b: a name may hold letters, digits, _ and -"),
    ({"features.pooling": "max"}, "features.pooling is 'max', but must be one of cls, mean, cls+mean, cls+storage"),
    ({"features.models": ["gram", "gram"]}, "features.models is ['gram', 'gram'], but must be a list without repeats"),
    ({"features.models": ["gran"]}, "features.models is 'gran', which is not defined; did you mean gram?"),
    ({"features.set": "feature"}, "features.set is 'feature', which is not defined; did you mean features?"),
    ({"demo.enabled": "yes"}, "demo.enabled is 'yes', but must be true or false"),
    ({"slides": "slides.tsv"}, "slides is 'slides.tsv', but must be a section with keys of its own"),
    ({"slides.source": ...}, "slides.source is missing; give it: A table"),
    ({"slides.source": ""}, "slides.source is empty, but must be given"),
    ({"runs": {}}, "runs is {}, but must be a section with at least one entry"),
    ({"runs": ...}, "runs is missing"),
    ({"runs.gram": None}, "runs.gram.recipe is missing"),
    ({"runs.gram.recipe": "no.yaml"}, "runs.gram: recipe no.yaml does not exist"),
    ({"runs.gram.tile_set": "trian"}, "runs.gram.tile_set is 'trian', which is not defined; did you mean train?"),
    (
        {"runs.gram.continues": "pretrian"},
        "is 'pretrian', which is not defined; did you mean pretrain?",
    ),
    ({"runs.gram.continues": "gram"}, "runs.gram.continues leads back to itself: gram -> gram"),
    ({"runs.pretrain.continues": "gram"}, "runs.pretrain.continues leads back to itself: pretrain -> gram -> pretrain"),
    ({"runs.pretrain.gram_teacher": "last"}, "runs.pretrain.gram_teacher is last, but the run continues none"),
    ({"runs.pretrain.gram_teacher": 40}, "runs.pretrain.gram_teacher is 40, but the run continues none"),
    ({"runs.pretrain.gram_teacher": "no.pth"}, "runs.pretrain.gram_teacher no.pth does not exist"),
    ({"runs.tiles": {"recipe": "root.yaml"}}, "runs.tiles: this name is taken by a part of the workflow"),
    ({"runs.base": {"recipe": "root.yaml"}}, "runs.base: this name is taken by a part of the workflow"),
    ({"launch.processes": "all"}, "launch.processes is 'all', but must be auto, gpu or a whole number of at least 1"),
    ({"privacy": "none"}, "privacy is 'none', but must be one of strict, hosts"),
    ({"split.fraction": 1.5}, "split.fraction is 1.5, but must be at most 0.9"),
    (
        {"tiling.sets.train.tile_px": 112},
        "gram_teacher_crops_size is 128 px, but tiles of set train have 112",
    ),
    ({"labels": "labels.tsv"}, "labels.tsv does not exist"),
    ({"tiling.sets.features": {"mpp": [0.5, 1]}}, "features.set is features, which mixes several mpp (0.5, 1)"),
    ({"tiling.sets.train.mpp": []}, "tiling.sets.train.mpp is [], but must be a list with at least one entry"),
    ({"tiling.sets.train.mpp": [0.5, 0]}, "tiling.sets.train.mpp.1 is 0, but must be more than 0"),
    ({"tiling.sets.train.mpp": [1, 1]}, "tiling.sets.train.mpp is [1, 1], but must be a list without repeats"),
    ({"tiling.sets.train.edge": "cut"}, "tiling.sets.train.edge is 'cut', but must be one of drop, shift, pad"),
    ({"tiling.sets.train.max_upsample": 0.5}, "tiling.sets.train.max_upsample is 0.5, but must be at least 1"),
    ({"tiling.quality.max_ink": 0.5}, "unknown key tiling.quality.max_ink; did you mean"),
    ({"tissue.method": "annotations"}, "tissue.method is annotations, but tissue.annotations names no folder"),
    ({"tissue.annotations": "outlines"}, "tissue.annotations outlines is no folder"),
]


@pytest.mark.parametrize(("changes", "sentence"), BAD_CONFIGS)
def test_a_bad_config_gets_one_sentence(config, changes, sentence):
    with pytest.raises(ConfigError) as error:
        plan_of(config, **changes)
    assert sentence in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_all_bad_keys_are_reported_in_one_pass(config):
    with pytest.raises(ConfigError) as error:
        plan_of(config, **{"tilling": {}, "pca.sede": 1, "features.dtype": "int8"})
    assert len(str(error.value).splitlines()) == 3


def test_keys_that_are_numbers_in_yaml_are_names(config):
    config["runs"][2] = config["runs"].pop("gram")
    assert plan_of(config).models == ["base", "pretrain", "2"]


def test_a_recipe_error_names_the_run(config):
    Path("root.yaml").write_text("student: {arch: vit_nan}\n")
    with pytest.raises(
        ConfigError, match=r"runs\.pretrain: recipe root\.yaml: student\.arch is 'vit_nan'; choose one of"
    ):
        plan_of(config)
    Path("root.yaml").write_text("optim: {lrr: 1}\n")
    with pytest.raises(ConfigError, match=r"runs\.pretrain: root\.yaml: unknown key optim\.lrr; did you mean"):
        plan_of(config)


def test_missing_slides_are_named_and_counted(config):
    for index in range(5):
        Path(f"s{index}.svs").unlink()
    jobs = SlideJobs(plan_of(config))
    with pytest.raises(ConfigError) as error:
        jobs.input_of("s3")
    first, *_, last = str(error.value).splitlines()
    assert first == "slide s0: s0.svs does not exist; correct column path of slides.tsv"
    assert last == "… and 2 more slides do not exist"
    assert jobs.input_of("s3", may_be_missing=True) == []
    skipping = SlideJobs(plan_of(config, **{"slides.on_error": "skip"}))
    assert skipping.input_of("s3") == [] and skipping.input_of("s5") == ["s5.svs"]


def test_runs_that_start_from_other_weights_are_refused(config):
    Path("wide.yaml").write_text("extends: root.yaml\nstudent: {arch: vit_micro}\n")
    with pytest.raises(ConfigError, match=r"runs\.wide starts from other weights than runs\.pretrain"):
        plan_of(config, **{"runs.wide": {"recipe": "wide.yaml"}})
    Path("dropping.yaml").write_text("extends: root.yaml\nstudent: {drop_path_rate: 0.0}\noptim: {lr: 1e-5}\n")
    plan = plan_of(config, **{"runs.dropping": {"recipe": "dropping.yaml"}})
    assert plan.base_run.name == "pretrain"


def test_the_base_digest_follows_what_the_starting_weights_depend_on(config):
    digest = plan_of(config).base_digest
    recipe = Path("root.yaml").read_text()
    Path("root.yaml").write_text(recipe + "optim: {lr: 1e-5}  # a comment\n")
    assert plan_of(config).base_digest == digest
    Path("root.yaml").write_text(recipe + "train: {seed: 1}\n")
    assert plan_of(config).base_digest != digest


def test_recipes_are_found_beside_the_snakefile_too(config):
    Path("t.pth").touch()
    runs = {"small": {"recipe": "config/runs/tiny_gram.yaml", "gram_teacher": "t.pth"}}
    plan = plan_of(config, runs=runs, tiling=...)
    assert plan.runs["small"].recipe == REPOSITORY / "config/runs/tiny_gram.yaml"
    assert [path.name for path in plan.runs["small"].recipes] == ["tiny.yaml", "tiny_gram.yaml"]


def test_recipes_for_published_weights_are_refused_without(config):
    with pytest.raises(ConfigError, match=r"runs\.big: recipe .*vitl16_lvd\.yaml .* MODEL\.WEIGHTS is empty"):
        plan_of(config, runs={"big": {"recipe": "config/runs/vitl16_lvd.yaml"}}, tiling=...)


def test_a_run_on_other_data_needs_no_manifest(config):
    recipe = "extends: root.yaml\ntrain: {dataset_path: images}\ncrops: {global_crops_size: 1024}\n"
    Path("images.yaml").write_text(recipe)
    with pytest.raises(ConfigError, match="images is neither a folder of images nor module:Class"):
        plan_of(config, runs={"pretrain": {"recipe": "images.yaml"}})
    Path("images").mkdir()
    plan = plan_of(config, runs={"pretrain": {"recipe": "images.yaml"}})
    assert plan.runs["pretrain"].own_data == "images"
    assert plan.training_sets == []


def test_the_batch_must_suit_the_processes(config):
    text = "dino: {koleo_loss_distributed: true, koleo_distributed_loss_group_size: 7}"
    Path("groups.yaml").write_text(f"extends: root.yaml\n{text}\n")
    with pytest.raises(ConfigError, match="do not fill groups"):
        plan_of(config, runs={"pretrain": {"recipe": "groups.yaml"}}, launch={"processes": 2})


def test_only_runs_that_a_model_needs_are_trained(config):
    config["runs"]["other"] = {"recipe": "root.yaml"}
    assert plan_of(config).trained_runs == ["pretrain", "gram", "other"]
    assert plan_of(config, **{"features.models": ["gram"]}).trained_runs == ["pretrain", "gram"]
    assert plan_of(config, **{"features.models": ["base"]}).trained_runs == []


def test_slides_to_train_on(config):
    plan = plan_of(config, **{"split.fraction": 0})
    assert plan.slides_to_train_on() == ["s0", "s1", "s2", "s3", "s5"]
    assert plan.feature_slides == ["s0", "s2", "s3", "s4", "s5"]
    Path("slides.tsv").write_text("slide_id\tpath\tuse\ns0\ts0.svs\tfeatures\n")
    with pytest.raises(ConfigError, match=r"slides\.tsv has no slide to train on"):
        plan_of(config).slides_to_train_on()


def test_a_features_slide_leaves_the_split_alone(config):
    before = plan_of(config)
    with open("slides.tsv", "a") as table:
        table.write("s6\ts5.svs\tp6\tfeatures\n")
    after = plan_of(config)
    assert "s6" in after.feature_slides
    assert after.split_digest == before.split_digest
    with open("slides.tsv", "a") as table:
        table.write("s7\ts5.svs\tp7\ttrain\n")
    assert plan_of(config).split_digest != before.split_digest


def test_the_stain_says_how_tissue_is_found(config):
    plan = plan_of(config)
    methods = [plan.tissue_method(slide_id) for slide_id in plan.slides]
    assert methods == ["otsu", "otsu", "cytology", "fluorescence", "auto", "auto"]
    plan = plan_of(config, **{"tissue.method": "none"})
    assert {plan.tissue_method(slide_id) for slide_id in plan.slides} == {"none"}


def test_mpp_of_the_table_wins_over_the_config(config):
    assert [plan_of(config).slide_mpp(slide_id) for slide_id in ("s0", "s1")] == [None, 0.25]
    plan = plan_of(config, **{"slides.mpp": 0.5})
    assert [plan.slide_mpp(slide_id) for slide_id in ("s0", "s1")] == [0.5, 0.25]


def test_tiling_arguments(config):
    plan = plan_of(config, **{"tiling.sets.train.stride_px": 128, "tiling.sets.train.min_tissue": 0.25})
    assert plan.tiling_arguments("s0", ["t.parquet", "f.parquet"]) == [
        *["--tissue-method", "otsu"],
        *["--set", "train", "256", "0.5", "t.parquet", "--min-tissue", "train=0.25", "--stride", "train=128"],
        *["--set", "features", "224", "0.5", "f.parquet"],
    ]


def test_tiling_arguments_of_all_settings(config):
    changes = {
        "tiling.sets.train": {"tile_px": 256, "mpp": [0.25, 1], "edge": "pad", "max_upsample": 1.5},
        "tiling.quality": {"max_pen": 0.05, "min_focus": 20, "measure_focus": True},
        "tissue": {"method": "none", "min_area_um2": 0, "max_hole_um2": 500},
    }
    assert plan_of(config, **changes).tiling_arguments("s0", ["t.parquet", "f.parquet"]) == [
        *["--tissue-method", "none", "--min-area-um2", "0", "--max-hole-um2", "500"],
        *["--max-pen", "0.05", "--min-focus", "20", "--measure-focus"],
        *["--set", "train", "256", "0.25,1", "t.parquet", "--edge", "train=pad", "--max-upsample", "train=1.5"],
        *["--set", "features", "224", "0.5", "f.parquet"],
    ]


def test_the_preflight_is_told_how_tiles_are_read(config):
    tiles = {"tile_px": 256, "mpp": [0.25, 1], "min_tissue": 0.2, "max_upsample": 2}
    assert plan_of(config, **{"tiling.sets.train": tiles}).tile_set_arguments() == [
        *["--set", "train", "256", "0.25", "--set", "train", "256", "1", "--max-upsample", "train=2"],
        *["--set", "features", "224", "0.5"],
    ]


def test_slides_with_annotations_take_their_tissue_from_them(config, folder):
    (folder / "outlines").mkdir()
    for name in ("s1.geojson", "s2.txt", "other.geojson"):
        (folder / "outlines" / name).touch()
    changes = {"tissue.annotations": "outlines", "tissue.exclude": ["Ink", "Fold"]}
    plan = plan_of(config, **changes)
    assert plan.annotation_files == {"s1": "outlines/s1.geojson"}
    assert plan.tiling_arguments("s0", ["t", "f"])[:2] == ["--tissue-method", "otsu"]
    assert plan.tiling_arguments("s1", ["t", "f"])[:9] == [
        *["--tissue-method", "annotations", "--annotations", "outlines/s1.geojson"],
        *["--include", "Tissue", "--exclude", "Ink", "Fold"],
    ]
    with pytest.raises(
        ConfigError, match=r"slide s0 and 4 more slides: outlines has no s0\.geojson, which tissue\.meth"
    ):
        plan_of(config, **changes, **{"tissue.method": "annotations"})
    (folder / "outlines/s1.geojson").unlink()
    with pytest.raises(ConfigError, match=r"outlines has no file named after a slide, such as s0\.geojson"):
        plan_of(config, **changes)


def test_an_unknown_slide_gets_the_nearest_name(config):
    with pytest.raises(ConfigError, match=r"slide 'ss1' is not in slides\.tsv; did you mean s1\?"):
        plan_of(config).slide("ss1")


def test_a_basis_is_kept_when_slides_come(config):
    def write_basis(*slides):
        Path("results/pca/gram").mkdir(parents=True, exist_ok=True)
        Path("results/pca/gram/basis.json").write_text(json.dumps({"slides": slides}))

    plan = plan_of(config)
    assert plan.basis_slides("gram") == plan.train_slides
    write_basis("s2", "s0")
    assert plan.basis_slides("gram") == ["s0", "s2"]
    assert plan.basis_slides("pretrain") == plan.train_slides
    write_basis("gone", "s0")
    assert plan.basis_slides("gram") == ["s0"]
    Path("results/pca/gram/basis.json").write_text("{")
    assert plan.basis_slides("gram") == plan.train_slides
    Path("slides.tsv").write_text("slide_id\tpath\tuse\ns0\ts0.svs\tfeatures\n")
    assert plan_of(config).basis_slides("base") == ["s0"]


def test_a_run_that_keeps_its_manifest_says_so(config):
    manifest, plan = Path("results/manifests/train.parquet"), plan_of(config)
    manifest.parent.mkdir(parents=True)
    digest = write_manifest(manifest, ["s0", "s1"], 512, 256)
    assert plan.manifest_notes() == []
    run_dir = Path("results/runs/pretrain")
    seal_run(run_dir, plan.runs["pretrain"].settings, 16, {"manifest": digest}, "a seed")
    (run_dir / "ckpt" / "7").mkdir(parents=True)
    (run_dir / "ckpt" / "7" / ".metadata").touch()
    assert plan.manifest_notes() == []
    current = write_manifest(manifest, ["s0", "s1", "s2"], 512, 256)
    (note,) = plan.manifest_notes()
    assert note == (
        f"run pretrain was trained on manifest {digest[:8]}, current is {current[:8]}: give a new run name to use it"
    )
    manifest.write_bytes(b"PAR1 cut short")
    assert plan.manifest_notes() == []


def test_slides_held_out_unasked_are_named(config):
    (note,) = plan_of(config).split_notes()
    held_out = [slide for slide, use in plan_of(config).split.items() if use == "eval"]
    assert held_out
    assert note == f"no slide has use=eval, so split.fraction holds out of training: {', '.join(held_out)}"
    Path("slides.tsv").write_text("slide_id\tpath\tuse\ns0\ts0.svs\teval\ns1\ts1.svs\ttrain\n")
    assert plan_of(config).split_notes() == []


def test_a_slide_that_a_run_has_seen_is_no_test_of_it(config):
    plan = plan_of(config)
    trained_on = plan.train_slides[0]
    run_dir = Path("results/runs/pretrain")
    seal_run(run_dir, plan.runs["pretrain"].settings, 16, {"manifest": "abc"}, "a seed", plan.train_slides)
    (run_dir / "ckpt/7").mkdir(parents=True)
    (run_dir / "ckpt/7/.metadata").touch()
    assert plan.leak_notes() == []
    rows = "".join(f"{s}\t{s}.svs\t{'eval' if s == trained_on else 'train'}\n" for s in plan.slides)
    Path("slides.tsv").write_text(f"slide_id\tpath\tuse\n{rows}")
    (note,) = plan_of(config).leak_notes()
    assert note.startswith(f"run pretrain was trained on {trained_on}, which is held out by now")


def test_errors_end_the_program_with_their_sentences():
    @one_sentence
    def fail():
        raise ConfigError("this is wrong\nand that")

    with pytest.raises(SystemExit) as error:
        fail()
    assert error.value.code == "error: this is wrong\nerror: and that"


def test_planning_imports_nothing_heavy():
    script = f"""
import sys
sys.path.insert(0, {str(REPOSITORY / "workflow_scripts")!r})
import dinoscope.plan
print(*sorted({{name.partition(".")[0] for name in sys.modules}}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert "omegaconf" in imported
    heavy = {"torch", "pandas", "sklearn", "cv2", "numpy", "matplotlib", "openslide", "snakemake", "pyarrow"}
    assert not heavy & imported
    assert all(importlib.util.find_spec(name) for name in heavy)


def test_gpus_are_those_that_the_environment_allows(config):
    assert plan_of(config).visible_gpus({"CUDA_VISIBLE_DEVICES": "0"}) == {}
    chosen = plan_of(config, **{"launch.gpus": [1, 2, 3]})
    wanted = {"CUDA_VISIBLE_DEVICES": "1,2,3"}
    assert chosen.visible_gpus({}) == chosen.visible_gpus({"CUDA_VISIBLE_DEVICES": "1,2,3,5"}) == wanted
    with pytest.raises(ConfigError, match=r"launch\.gpus asks for GPU 2, but CUDA_VISIBLE_DEVICES is '1,3'"):
        chosen.visible_gpus({"CUDA_VISIBLE_DEVICES": "1,3"})
    for wrong in ([], [1, 1], [-1], "1,2"):
        with pytest.raises(ConfigError, match=r"launch\.gpus"):
            plan_of(config, **{"launch.gpus": wrong})


def test_exports_that_other_runs_need_are_known(config):
    runs = {"other": {"recipe": "gram.yaml", "continues": "pretrain", "gram_teacher": 249}}
    runs["more"] = runs["other"] | {"gram_teacher": "9"}
    plan = plan_of(config, runs=config["runs"] | runs)
    assert plan.kept_exports("pretrain") == [9, 249]
    assert plan.kept_exports("gram") == []


def test_a_reader_of_ones_own_is_a_trigger_only_for_formats_that_openslide_lacks(config):
    with open("slides.tsv", "a") as table:
        table.write("phil\tphil.isyntax\n")
    jobs = SlideJobs(plan_of(config, **{"slides.reader": "formats:Philips"}))
    assert jobs.own_reader("phil") == ["--slide-reader", "formats:Philips"] and jobs.own_reader("s0") == []
    assert jobs.options("phil") == [] and jobs.options("s0") == ["--slide-reader", "formats:Philips"]
    assert jobs.training_options() == ["--slide-reader", "formats:Philips"]
    assert SlideJobs(plan_of(config)).options("s0") == SlideJobs(plan_of(config)).training_options() == []
    with pytest.raises(ConfigError, match=r"slides\.reader is 'formats', but must read module:Class"):
        plan_of(config, **{"slides.reader": "formats"})


def test_how_errors_are_taken_is_told_to_every_stage(config):
    jobs = SlideJobs(plan_of(config, **{"slides.on_error": "skip"}))
    assert jobs.options("s0", "tiles") == ["--on-error", "skip", "--skip-record", "results/skipped/tiles/s0.json"]
    many = ["--on-error", "skip", "--skip-records", "results/skipped/features_base"]
    assert jobs.options("s0", "features_base", many=True) == many
    assert jobs.training_options() == ["--on-error", "skip", "--skip-records", "results/skipped"]


def test_a_skipped_slide_is_tried_again_when_its_files_or_the_setting_change(config):
    def attempts(on_error):
        return SlideJobs(plan_of(config, **{"slides.on_error": on_error})).attempt("s0")

    def end(problem, number):
        Attempt(Path("s0.svs"), "s0", "tiles", "skip", number, Path("results/skipped/tiles/s0.json")).end(problem)

    assert attempts("skip") == attempts("fail") == 0
    end("it is broken", 0)
    assert (attempts("skip"), attempts("fail")) == (0, 1)
    Path("s0.svs").write_text("repaired")
    os.utime("s0.svs", (1, 1))
    assert (attempts("skip"), attempts("fail")) == (1, 1)
    end("it is still broken", 1)
    assert (attempts("skip"), attempts("fail")) == (1, 2)
    end(None, 2)
    Path("s0.svs").write_text("changed, which its date tells Snakemake")
    assert attempts("skip") == attempts("fail") == 2


def test_the_closing_words_name_skipped_slides_and_problems(config):
    jobs = SlideJobs(plan_of(config))
    assert list(jobs.closing_notes()) == [] and not Path("results").exists()
    for name in ("s1", "s2", "gone_from_the_table"):
        record = Path(f"results/skipped/tiles/{name}.json")
        Attempt(Path(f"{name}.svs"), name, "tiles", "skip", 0, record).end(f"slide {name}\tis broken")
    table = "slide_id\tproblems\n*\tconfounded\ns1\tbroken\ns0\tnone\n"
    Path("results/slides_report.tsv").write_text(table)
    skipped, inspected = jobs.closing_notes()
    assert skipped.startswith("2 of 6 slides were skipped (tiles 2), the first because: slide s1 is broken")
    assert inspected.startswith("1 of 2 inspected slides have problems; so has the collection as a whole")
    rows = Path("results/failed_slides.tsv").read_text().splitlines()
    assert rows == ["slide_id\tstage\treason", "s1\ttiles\tslide s1 is broken", "s2\ttiles\tslide s2 is broken"]
    for name in ("s1", "s2"):
        Attempt(Path(f"{name}.svs"), name, "tiles", "skip", 1, Path(f"results/skipped/tiles/{name}.json")).end(None)
    assert len(list(jobs.closing_notes())) == 1
    assert Path("results/failed_slides.tsv").read_text() == "slide_id\tstage\treason\n"
