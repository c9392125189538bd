"""Snakemake's plans: what runs, what does not, and what is said when the input is wrong. No job runs in these tests."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from dinoscope.errors import ConfigError
from dinoscope.files import write_json
from dinoscope.plan import DEMO_SLIDES, make_plan
from dinoscope.recipe import load_recipe
from dinoscope.train.seal import seal_run
from snakemake_runs import COMMAND, REPOSITORY, plan, snakemake

WHOLE_DEMO = {
    "demo_slides": 1, "inspect_slide": 5, "slides_report": 1, "tile_slide": 5, "split_slides": 1, "slide_table": 1,
    "merge_manifest": 1, "initial_weights": 1, "train": 2, "convert": 2, "extract_features": 15,
    "list_features": 3, "pca_fit": 3, "pca_map": 15, "pca_compare": 5, "pca_region": 2, "cluster_fit": 3,
    "cluster_map": 5, "cluster_examples": 3, "plot_metrics": 2, "report": 1, "all": 1,
    "viewer_pyramid": 5, "list_sampled": 3, "viewer_sample": 3, "viewer_tiles": 15, "viewer": 1,
    "evaluation_units": 1, "measure_model": 3, "compare_models": 1, "evaluation_summary": 1,
    "described_tiles": 1, "described_patches": 3,
}  # fmt: skip
VIEWER = ("viewer_pyramid", "list_sampled", "viewer_sample", "viewer_tiles", "viewer")
# of a slide that comes to a finished demo
OWN_JOBS = {
    "inspect_slide": 1, "tile_slide": 1, "extract_features": 3, "pca_map": 3, "pca_compare": 1, "cluster_map": 1,
    "viewer_pyramid": 1, "viewer_tiles": 3,
}  # fmt: skip


def new_folder(path):
    """A working directory with a copy of the config that comes along."""
    shutil.copytree(REPOSITORY / "config", path / "config")
    return path


@pytest.fixture
def folder(tmp_path):
    return new_folder(tmp_path)


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory):
    """A folder in which Snakemake believes that everything was made: all outputs exist, with their provenance."""
    folder = new_folder(tmp_path_factory.mktemp("finished"))
    _, text = plan(folder)
    outputs = [name for line in re.findall(r"^ +output: (.*)$", text, re.MULTILINE) for name in line.split(", ")]
    assert len(outputs) > 60
    for name in outputs:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    slides = [slide_id for slide_id in DEMO_SLIDES if slide_id != "demo_he_1"]
    for model in ("base", "pretrain", "gram"):
        write_json(folder / "results" / "pca" / model / "basis.json", {"slides": slides})
        write_json(folder / "results" / "neighbours" / f"{model}.json", {"slides": list(DEMO_SLIDES)})
    snakemake(folder, "--touch", "--forceall")
    return folder


@pytest.fixture
def finished(finished_once, tmp_path):
    return shutil.copytree(finished_once, tmp_path / "finished", symlinks=True)


def change(path, **changes):
    """Sets dotted keys of a YAML file."""
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    for dotted, value in changes.items():
        *sections, key = dotted.split(".")
        section = config
        for name in sections:
            section = section.setdefault(name, {})
        section[key] = value
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def change_config(folder, **changes):
    change(folder / "config" / "config.yaml", **changes)


def add_slide(folder, slide_id, use):
    """Appends a slide to the folder's table, which gets a column use."""
    table = folder / "config" / "slides.tsv"
    header, *rows = table.read_text(encoding="utf-8").splitlines()
    rows = [f"{row}\ttrain,features" for row in rows]
    (folder / f"{slide_id}.svs").touch()
    rows.append(f"{slide_id}\t{slide_id}.svs\tnew case\tHE\t{use}")
    table.write_text("\n".join([f"{header}\tuse", *rows]) + "\n", encoding="utf-8")


def test_the_demo_plans_every_stage(folder):
    jobs, text = plan(folder)
    assert jobs == WHOLE_DEMO
    assert "gram_teacher" not in text
    assert "--gram-teacher last" in text


def test_a_single_target_plans_only_its_chain(folder):
    jobs, _ = plan(folder, "results/tiles/features/demo_ihc_1.parquet")
    assert jobs == {"demo_slides": 1, "tile_slide": 1}
    jobs, _ = plan(folder, "results/features/base/demo_ihc_1.h5")
    assert jobs == {"demo_slides": 1, "tile_slide": 1, "initial_weights": 1, "extract_features": 1}


@pytest.mark.parametrize(
    ("target", "jobs"),
    [
        ("inspect", {"demo_slides": 1, "inspect_slide": 5, "slides_report": 1}),
        ("tiles", {"demo_slides": 1, "tile_slide": 5}),
        ("manifest", {"demo_slides": 1, "tile_slide": 5, "split_slides": 1, "slide_table": 1, "merge_manifest": 1}),
        (
            "pretrain",
            {"demo_slides": 1, "tile_slide": 4, "merge_manifest": 1, "initial_weights": 1, "train": 1, "convert": 1},
        ),
        (
            "gram",
            {"demo_slides": 1, "tile_slide": 4, "merge_manifest": 1, "initial_weights": 1, "train": 2, "convert": 1},
        ),
    ],
)
def test_a_stage_is_a_target(folder, target, jobs):
    assert plan(folder, target)[0] == jobs | {target: 1}


def test_nothing_is_done_twice(finished):
    jobs, text = plan(finished)
    assert jobs == {}
    assert "Nothing to be done" in text


def test_what_changes_no_result_reruns_nothing(finished):
    changes = {"launch.processes": 3, "features.batch_size": 7, "features.workers": 0, "features.slides_per_job": 1}
    changes |= {"features.compile": True}
    change_config(finished, **changes)
    assert plan(finished)[0] == {}


def test_a_features_slide_plans_only_its_own_jobs(finished):
    add_slide(finished, "new [1]", "features")
    joins = {"slides_report": 1, "slide_table": 1, "viewer": 1, "report": 1, "all": 1}
    assert plan(finished)[0] == OWN_JOBS | joins


def test_a_slide_named_sample_is_no_sample_of_tiles(finished):
    """Rules of the viewer tell files of slides from files of models, whatever a slide is called."""
    add_slide(finished, "sample", "features")
    needed = {name: count for name, count in OWN_JOBS.items() if name not in ("pca_map", "pca_compare")}
    assert plan(finished, "viewer")[0] == needed | {"viewer": 1}


def test_a_slide_that_goes_leaves_the_sample_of_tiles(finished):
    table = finished / "config" / "slides.tsv"
    rows = table.read_text(encoding="utf-8").splitlines(keepends=True)
    table.write_text("".join(row for row in rows if not row.startswith("demo_cyto_1")), encoding="utf-8")
    jobs, _ = plan(finished, "results/viewer/models/base/slides/demo_he_1.js")
    assert (jobs["list_sampled"], jobs["viewer_sample"], jobs["viewer_tiles"], jobs["viewer_pyramid"]) == (1, 1, 1, 0)


def test_another_resolution_redoes_the_viewers_pictures_only(finished):
    change_config(finished, **{"viewer.mpp": 4.0})
    assert plan(finished, "viewer")[0] == {"viewer_pyramid": 5, "viewer": 1}


def test_the_viewer_can_be_left_out(folder):
    change_config(folder, **{"viewer.enabled": False})
    jobs, _ = plan(folder)
    assert jobs == {name: count for name, count in WHOLE_DEMO.items() if name not in VIEWER}
    assert plan(folder, "viewer")[0]["viewer_tiles"] == 15


def test_a_training_slide_leaves_finished_runs_and_colours_alone(finished):
    add_slide(finished, "new", "train,features")
    jobs, _ = plan(finished)
    joins = {"split_slides": 1, "merge_manifest": 1, "slides_report": 1, "slide_table": 1, "viewer": 1, "report": 1}
    # with so few test cases the slides of training are described as well
    described = {"evaluation_units": 1, "measure_model": 3, "compare_models": 1, "evaluation_summary": 1}
    described |= {"described_tiles": 1, "described_patches": 3}
    assert jobs == OWN_JOBS | joins | described | {"all": 1}


def test_a_new_run_is_planned_together_with_the_manifest_that_it_is_for(finished):
    """Snakemake plans no job behind ancient() in the call that makes its input again: new runs must not be there."""
    add_slide(finished, "new", "train,features")
    change_config(finished, **{"runs.second": {"recipe": "config/runs/tiny.yaml"}})
    jobs, _ = plan(finished, "second")
    assert {name: jobs[name] for name in ("merge_manifest", "train", "convert")} == dict.fromkeys(
        ("merge_manifest", "train", "convert"), 1
    )
    (finished / "results/runs/gram/final.json").unlink()
    jobs, _ = plan(finished, "gram")
    assert (jobs["merge_manifest"], jobs["train"]) == (1, 1)


def test_changed_pooling_redoes_features_and_maps(finished):
    change_config(finished, **{"features.pooling": "mean"})
    assert plan(finished)[0] == {
        "extract_features": 15,
        "list_features": 3,
        "pca_fit": 3,
        "pca_map": 15,
        "pca_compare": 5,
        "cluster_fit": 3,
        "cluster_map": 5,
        "cluster_examples": 3,
        "list_sampled": 3,
        "viewer_sample": 3,
        "viewer_tiles": 15,
        "viewer": 1,
        "measure_model": 3,
        "compare_models": 1,
        "evaluation_summary": 1,
        "report": 1,
        "all": 1,
    }


def test_another_encoder_plans_its_own_features_only_and_its_files_are_inputs(finished):
    (finished / "dino").mkdir()
    for name in ("config.json", "model.safetensors", "README.md"):
        (finished / "dino" / name).write_text("{}")
    (finished / "own.py").touch()
    encoders = {"other": {"source": "dino", "set": "train", "pooling": "mean"}, "own": {"source": "own.py:model"}}
    change_config(finished, **{"features.encoders": encoders})
    jobs, text = plan(finished)
    own = {"extract_features": 10, "list_features": 2, "pca_fit": 2, "pca_map": 10}
    assert {name: jobs[name] for name in own} == own
    assert jobs["pca_region"] == 2  # with two models more
    assert not jobs.keys() & {"tile_slide", "train", "convert", "initial_weights"}
    assert "input: results/demo/demo_he_1.tiff, results/tiles/train/demo_he_1.parquet, dino/config.json, " in text
    assert "dino/model.safetensors" in text and "dino/README.md" not in text
    assert "--weights own.py:model --model-name own" in text and "--weights dino --model-name other" in text
    assert re.search(r"--model-name other .* --pooling mean", text)


ENCODER_PROBLEMS = [
    ({"base": {"source": "own.py:x"}}, "features.encoders.base: this name is taken by a part of the workflow"),
    ({"gram": {"source": "own.py:x"}}, "features.encoders.gram: this name is taken by a run"),
    (
        {"a": {"source": "own.py:x", "set": "feature"}},
        "encoders.a.set is 'feature', which is not defined",
    ),
    ({"a": {"source": "gone"}}, "features.encoders.a.source gone does not exist; give the file or folder of a model"),
    ({"a": {"source": "gone.py:x"}}, "features.encoders.a.source gone.py:x: gone.py does not exist"),
    ({"a": {"source": "own.py:x", "files": ["w.bin"]}}, "features.encoders.a.files: w.bin does not exist"),
    ({"a": {"path": "own.py:x"}}, "features.encoders.a.source is missing"),
]


@pytest.mark.parametrize(("encoders", "sentence"), ENCODER_PROBLEMS)
def test_encoders_that_cannot_be_are_explained(folder, monkeypatch, encoders, sentence):
    (folder / "own.py").touch()
    monkeypatch.chdir(folder)
    change_config(folder, **{"features.encoders": encoders})
    config = yaml.safe_load((folder / "config" / "config.yaml").read_text(encoding="utf-8"))
    with pytest.raises(ConfigError) as caught:
        make_plan(config, REPOSITORY)
    assert sentence in str(caught.value)


def test_exports_are_planned_where_asked_for(folder):
    target = "results/exports/clam/base/pt_files/demo_ihc_1.pt"
    assert plan(folder, target)[0] == {
        "demo_slides": 1, "tile_slide": 1, "initial_weights": 1, "extract_features": 1, "export_features_clam": 1,
    }  # fmt: skip
    change_config(folder, **{"features.models": ["base"], "features.export": ["stamp", "wsidata"]})
    jobs, text = plan(folder, "export_features")
    assert (jobs["export_features_stamp"], jobs["export_features_wsidata"], jobs["export_features"]) == (5, 5, 1)
    assert "output: results/exports/wsidata/base/demo_ihc_1.zarr" in text


def test_seeds_and_a_control_that_are_wished_for_later_leave_what_is_there(finished):
    """Four further runs, measured on the slides that models are measured on, and no picture of them."""
    change_config(finished, **{"runs.pretrain.seeds": [0, 1], "runs.gram.seeds": [0, 1], "runs.gram.control": True})
    jobs, text = plan(finished, "--printshellcmds")
    assert jobs == {
        "train": 4, "convert": 4, "plot_metrics": 4, "extract_features": 20, "described_patches": 4, "measure_model": 4,
        "compare_models": 1, "evaluation_summary": 1, "report": 1, "all": 1,
    }  # fmt: skip
    trained = re.findall(r"pretrain\.py (.*)--run-dir results/runs/(\S+) (.*) 2>&1", text)
    told = {run: (options, changes) for options, run, changes in trained}
    assert {run: changes for run, (_, changes) in told.items()} == {
        "pretrain-seed1": "train.seed=1",
        "gram-seed1": "train.seed=1",
        "gram-control": "gram.use_loss=false train.stream=gram",
        "gram-control-seed1": "train.seed=1 gram.use_loss=false train.stream=gram-seed1",
    }
    assert "--continues results/runs/pretrain-seed1/final.json" in told["gram-control-seed1"][0]
    assert "--gram-teacher last" in told["gram-seed1"][0] and "--gram-teacher" not in told["gram-control"][0]
    (compared,) = re.findall(r"evaluate\.py compare (.*) --bootstraps", text)
    assert "gram=gram-control gram-seed1=gram-control-seed1" in compared
    assert "--seeds-of gram-control gram-control-seed1" in compared
    assert plan(finished, "gram-seed1")[0] == {"train": 2, "convert": 1, "gram-seed1": 1}


def test_a_longer_run_goes_on_and_the_start_stays(finished):
    recipe = finished / "config" / "runs" / "tiny_gram.yaml"
    change(recipe, **{"optim.epochs": load_recipe(recipe).optim.epochs + 1})
    jobs, _ = plan(finished)
    assert jobs == {
        "train": 1, "convert": 1, "extract_features": 5, "list_features": 1, "pca_fit": 1, "pca_map": 5,
        "pca_compare": 5, "pca_region": 2, "cluster_fit": 1, "cluster_map": 5, "cluster_examples": 1, "plot_metrics": 1,
        "list_sampled": 1, "viewer_sample": 1, "viewer_tiles": 15, "viewer": 1, "report": 1, "all": 1,
        "described_patches": 1, "measure_model": 1, "compare_models": 1, "evaluation_summary": 1,
    }  # fmt: skip


def test_a_region_of_the_config_is_a_job_of_its_own(finished):
    places = [{"slide": "demo_he_2", "x": 300, "y": 400, "size_px": 512, "points": [[320, 410], [500, 600]]}]
    change_config(finished, **{"pca.regions": places})
    jobs, text = plan(finished, "--printshellcmds")
    assert jobs == {"pca_region": 1, "report": 1, "all": 1}
    assert "--region 300 400 512 0.5 --point 320 410 --point 500 600" in text
    assert "--slide results/demo/demo_he_2.tiff --slide-id demo_he_2" in text
    change_config(finished, **{"pca.regions": [], "pca.auto_regions": 1, "pca.clusters": None})
    tiles = {"viewer_tiles": 15, "viewer": 1}  # which show clusters no more
    assert plan(finished)[0] == tiles | {"report": 1, "all": 1}


def test_other_clusters_leave_colours_alone(finished):
    change_config(finished, **{"pca.clusters": 5})
    clusters = {"cluster_fit": 3, "cluster_map": 5, "cluster_examples": 3}
    assert plan(finished)[0] == clusters | {"viewer_tiles": 15, "viewer": 1, "report": 1, "all": 1}
    assert plan(finished, "clusters")[0] == clusters | {"clusters": 1}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"pca.regions": [{"slide": "demo_he_8", "x": 0, "y": 0}]}, "slide 'demo_he_8' is not in config/slides.tsv"),
        ({"pca.regions": [{"slide": "demo_he_1", "x": 0}]}, "config: pca.regions.0.y is missing; give it: Upper edge"),
        ({"pca.regions": 2 * [{"slide": "demo_he_1", "x": 0, "y": 1}]}, "lists demo_he_1_x0_y1_1024px twice"),
        ({"pca.upsample": "featup"}, "pca.upsample is 'featup', but must be jbu, none or module:callable"),
        ({"pca.clusters": 40}, "config: pca.clusters is 40, but must be at most 20"),
        ({"runs.regions": {"recipe": "config/runs/tiny.yaml"}}, "runs.regions: this name is taken by a part of the"),
    ],
)
def test_mistakes_about_pictures_are_explained(folder, changes, sentence):
    change_config(folder, **changes)
    assert_only_sentences(snakemake(folder, "--dry-run", check=False), sentence)


def test_published_weights_are_an_input_of_the_start(finished):
    recipe = finished / "config" / "runs" / "tiny.yaml"
    change(recipe, **{"MODEL.WEIGHTS": "published.pth"})
    (finished / "published.pth").touch()
    jobs, text = plan(finished, "results/features/base/demo_he_1.h5")
    assert jobs == {"initial_weights": 1, "extract_features": 1}
    assert "published.pth" in text


def test_other_settings_than_the_run_was_started_with_are_refused_and_nothing_is_lost(finished):
    run_dir = finished / "results" / "runs" / "pretrain"
    recipe = finished / "config" / "runs" / "tiny.yaml"
    inputs = dict.fromkeys(["manifest", "weights", "continues", "gram_teacher"])
    seal_run(run_dir, load_recipe(recipe), 16, inputs, "a seed")
    (run_dir / "ckpt" / "7").mkdir(parents=True)
    (run_dir / "ckpt" / "7" / ".metadata").touch()
    old = load_recipe(recipe).optim.lr
    change(recipe, **{"optim.lr": 0.125})
    before = sorted(path.relative_to(run_dir) for path in run_dir.rglob("*"))
    done = snakemake(finished, check=False)
    assert_only_sentences(done, f"run pretrain was started with other settings: optim.lr was {old} and is now 0.125")
    assert sorted(path.relative_to(run_dir) for path in run_dir.rglob("*")) == before
    assert plan(finished, "inspect")[0] == {}


def assert_only_sentences(done, *sentences):
    """Snakemake ended with these sentences, one line each, and without a traceback."""
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == len(sentences), done.stderr
    for error, sentence in zip(errors, sentences, strict=True):
        assert sentence in error
    for wall in ("Traceback", 'File "', "Exception"):
        assert wall not in done.stdout + done.stderr


BAD_TABLES = [
    ("demo_he_2", "demo_he_1", "config/slides.tsv line 3: slide_id 'demo_he_1' stands in line 2 already"),
    ("results/demo/demo_he_2.tiff", "gone.tiff", "slide demo_he_2: gone.tiff does not exist"),
    ("stain", "label", "unknown column 'label'; labels live in config/labels.tsv"),
]


@pytest.mark.parametrize(("old", "new", "sentence"), BAD_TABLES)
def test_a_bad_slide_table_is_explained(folder, old, new, sentence):
    table = folder / "config" / "slides.tsv"
    table.write_text(table.read_text(encoding="utf-8").replace(old, new, 1), encoding="utf-8")
    assert_only_sentences(snakemake(folder, "--dry-run", check=False), sentence)


@pytest.mark.parametrize(
    ("columns", "row", "sentence"),
    [
        ("case_id\tuse", "case_1\teval", "case case_1 is in both train (slide a) and eval (slide b)"),
        ("use", "test", "line 3: use 'test' (slide b) is unknown; give a comma list of train, eval, features"),
        ("mpp", "20x", "line 3: mpp '20x' (slide b) is not a positive number of micrometres a pixel"),
    ],
)
def test_a_bad_row_is_explained(folder, columns, row, sentence):
    first = {"case_id\tuse": "case_1\ttrain", "use": "train", "mpp": "0.25"}[columns]
    (folder / "a.svs").touch()
    (folder / "config" / "slides.tsv").write_text(f"slide_id\tpath\t{columns}\na\ta.svs\t{first}\nb\ta.svs\t{row}\n")
    assert_only_sentences(snakemake(folder, "--dry-run", check=False), sentence)


def test_mistyped_keys_are_explained_each_in_a_line(folder):
    config = folder / "config" / "config.yaml"
    text = config.read_text(encoding="utf-8").replace("\ntissue:", "\ntisue:").replace("pooling: cls", "pooling: max")
    config.write_text(text, encoding="utf-8")
    done = snakemake(folder, "--dry-run", check=False)
    assert_only_sentences(
        done,
        "config: unknown key tisue; did you mean tissue?",
        "config: features.pooling is 'max', but must be one of cls, mean, cls+mean, cls+storage",
    )


def test_a_mistyped_slide_in_a_target_is_explained(folder):
    done = snakemake(folder, "--dry-run", "results/tiles/features/demo_he1.parquet", check=False)
    assert_only_sentences(done, "slide 'demo_he1' is not in config/slides.tsv; did you mean demo_he_1?")


def test_training_without_training_slides_is_explained(folder):
    (folder / "a.svs").touch()
    (folder / "config" / "slides.tsv").write_text("slide_id\tpath\tuse\na\ta.svs\tfeatures\n")
    done = snakemake(folder, "--dry-run", check=False)
    assert_only_sentences(done, "config/slides.tsv has no slide to train on")
    assert plan(folder, "results/features/base/a.h5")[0] == {
        "tile_slide": 1,
        "initial_weights": 1,
        "extract_features": 1,
    }


def test_slides_of_a_folder_need_no_table(folder):
    for name in ("b 1.svs", "sub/c'2.mrxs", "sub/c'2/Data0.dat"):
        (folder / "scans" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "scans" / name).touch()
    change_config(folder, **{"slides.source": "scans", "demo.enabled": False})
    jobs, text = plan(folder, "inspect", "--printshellcmds")
    assert jobs == {"inspect_slide": 2, "slides_report": 1, "inspect": 1}
    assert "--slide 'scans/b 1.svs' --slide-id 'b 1'" in text
    assert """--slide 'scans/sub/c'"'"'2.mrxs' --slide-id 'c'"'"'2'""" in text
    assert "scans/sub/c'2/Data0.dat" in text


def test_the_workflow_is_found_without_its_own_folder(folder):
    for recipe in (folder / "config" / "runs").iterdir():
        recipe.unlink()
    assert plan(folder)[0] == WHOLE_DEMO


def test_every_rule_logs_and_quotes():
    start = re.compile(r"^ *(?:use rule .* with|rule ?\w*):", re.MULTILINE)
    for path in (REPOSITORY / "rules").glob("*.smk"):
        for rule in start.split(path.read_text(encoding="utf-8"))[1:]:
            if "shell:" not in rule:
                continue
            assert "log:" in rule
            shell = rule[rule.index("shell:") :]
            assert len([line for line in shell.splitlines() if '"' in line]) <= 4
            unquoted = set(re.findall(r"{[\w.]+}", shell))
            assert unquoted <= {
                "{threads}", "{params.seed}", "{params.fraction}", "{params.pooling}", "{params.dtype}",
                "{params.batch_size}", "{params.workers}", "{params.quality}", "{params.subsampling}",
            }  # fmt: skip


def test_profile_entries_are_commented():
    profile = Path(REPOSITORY / "profiles/default/profile.v9+.yaml").read_text(encoding="utf-8")
    for entry in profile.split("\n\n"):
        assert entry.startswith("# ")


def test_jobs_see_the_gpus_that_the_config_names(folder):
    """What a job's environment says is written down by Python itself, as it starts."""
    change_config(folder, **{"launch.gpus": [1, 2, 3]})
    (folder / "sitecustomize.py").write_text(
        "import os, pathlib\n"
        "if b'split_slides.py' in pathlib.Path('/proc/self/cmdline').read_bytes():\n"
        "    pathlib.Path('seen.txt').write_text(os.environ.get('CUDA_VISIBLE_DEVICES', 'unset'))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(folder)}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    command = [*COMMAND, "results/splits.tsv"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (folder / "seen.txt").read_text() == "1,2,3"
    environment["CUDA_VISIBLE_DEVICES"] = "0,1"
    done = subprocess.run([*command, "-f"], cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "error: launch.gpus asks for GPU 2, but CUDA_VISIBLE_DEVICES is '0,1'" in done.stderr


PACKING = {"pack_slide": 4, "pack_index": 1}


def begin_pretrain(folder, pixels):
    """A run pretrain with a checkpoint, trained on such pixels."""
    run_dir = folder / "results" / "runs" / "pretrain"
    inputs = dict.fromkeys(["manifest", "weights", "continues", "gram_teacher"]) | {"pixels": pixels}
    seal_run(run_dir, load_recipe(folder / "config" / "runs" / "tiny.yaml"), 16, inputs, "a seed")
    (run_dir / "ckpt" / "7").mkdir(parents=True)
    (run_dir / "ckpt" / "7" / ".metadata").touch()


def test_training_slides_are_packed_once_for_all_runs(folder):
    change_config(folder, **{"packing.enabled": True})
    jobs, text = plan(folder)
    assert jobs == WHOLE_DEMO | PACKING
    assert text.count("--packed results/packed/train/index.json") == 2
    assert "--quality 90 --subsampling 4:2:0  --file-gb 1.0 --output results/packed/train/demo_he_2.arrow" in text
    assert "results/packed/train/demo_he_1.arrow" not in text  # held out of training
    change_config(folder, **{"packing.copy_stored": True, "packing.file_gb": 0.25})
    jobs, text = plan(folder, "results/packed/train/index.json")
    assert "--copy-stored --file-gb 0.25" in text
    assert jobs == {"demo_slides": 1, "tile_slide": 4, "merge_manifest": 1, **PACKING}


def test_nothing_is_packed_unless_asked(folder):
    jobs, text = plan(folder, "pretrain")
    assert not jobs.keys() & PACKING.keys()
    assert "--packed" not in text


def test_a_run_keeps_the_pixels_it_was_started_with(finished):
    begin_pretrain(finished, None)
    change_config(finished, **{"packing.enabled": True})
    jobs, text = plan(finished, "pretrain")
    assert jobs == {}
    assert (
        "note: run pretrain was started on tiles of the slides and keeps to them: give a new run name to train with "
        "packing.enabled: true"
    ) in text


def test_a_run_on_packed_tiles_goes_on_with_them(folder):
    begin_pretrain(folder, "JPEG 90 4:2:0 abc")
    jobs, text = plan(folder, "pretrain")
    assert jobs["pack_index"] == 1
    assert "--packed results/packed/train/index.json" in text
    assert "run pretrain was started on packed tiles and keeps to them" in text
