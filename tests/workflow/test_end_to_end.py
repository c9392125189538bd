"""The whole workflow, really run: from two slides to the report, with a kill in the middle.

The slides are real ones where ../shared/data has them (H&E, and fluorescence on black with brackets in its name), else
two of the demo's.
"""

import json
import os
import re
import signal
import subprocess
import time
import zipfile
from collections import Counter
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
import yaml

from conftest import SHARED
from dinoscope.budget.space import disk_use
from dinoscope.files import read_json
from dinoscope.models.weights import load_backbone
from dinoscope.slides.manifest import read_metadata, read_tiles
from dinoscope.train.metrics import read_metrics
from dinoscope.visualize.viewer.scripts import read_script
from snakemake_runs import COMMAND, plan, snakemake

pytestmark = pytest.mark.slow

REAL_SLIDES = {
    "CMU 1 [a'b]": SHARED / "data" / "wsi" / "CMU-1-Small-Region.svs",
    "test3-DAPI-2-(387)": SHARED / "data" / "wsi" / "test3-DAPI-2-(387).ndpi",
}
DEMO_SLIDES = {name: Path(f"results/demo/{name}.tiff") for name in ("demo_he_1", "demo_ihc_1")}
SLIDES = REAL_SLIDES if all(path.is_file() for path in REAL_SLIDES.values()) else DEMO_SLIDES
RECIPE = """
student: {arch: vit_nano, n_storage_tokens: 2, layerscale: 0.1, drop_path_rate: 0.1, pos_embed_rope_dtype: fp32}
crops: {global_crops_size: 64, local_crops_size: 32, local_crops_number: 2}
augmentation: {recipe: pathology}
dino: {head_n_prototypes: 64, head_hidden_dim: 32, head_bottleneck_dim: 16}
ibot: {head_n_prototypes: 64, head_hidden_dim: 32, head_bottleneck_dim: 16}
optim: {epochs: 4, warmup_epochs: 1, freeze_last_layer_epochs: 1}
teacher: {warmup_teacher_temp_epochs: 2, momentum_teacher: 0.9}
train: {OFFICIAL_EPOCH_LENGTH: 12, batch_size_per_gpu: 4, num_workers: 1, log_every: 4, compile: false}
checkpointing: {period: 6}
"""
GRAM_RECIPE = """
extends: root.yaml
crops: {gram_teacher_crops_size: 96}
gram: {use_loss: true, img_level: true, rep_update: false}
optim: {epochs: 1, warmup_epochs: 0, freeze_last_layer_epochs: 0}
teacher: {warmup_teacher_temp_epochs: 0}
"""
CONFIG = {
    "slides": {"source": "slides.tsv"},
    "demo": {"enabled": True},
    "tiling": {"sets": {"train": {"tile_px": 128, "mpp": 1.0}, "features": {"tile_px": 112, "mpp": 1.0}}},
    "runs": {"pretrain": {"recipe": "root.yaml"}, "gram": {"recipe": "gram.yaml", "continues": "pretrain"}},
    "launch": {"processes": 2},
}
MODELS, RUNS = ("base", "pretrain", "gram"), ("pretrain", "gram")
NUM_ITERATIONS = {"pretrain": 48, "gram": 12}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A folder in which Snakemake was killed while it trained, and what was left of the run then."""
    folder = tmp_path_factory.mktemp("end to end")
    os.umask(0o027)  # of all that is started from here on
    (folder / "config").mkdir()
    (folder / "config" / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (folder / "root.yaml").write_text(RECIPE)
    (folder / "gram.yaml").write_text(GRAM_RECIPE)
    rows = "".join(f"{slide_id}\t{path}\n" for slide_id, path in SLIDES.items())
    (folder / "slides.tsv").write_text(f"slide_id\tpath\n{rows}")
    run_dir = folder / "results" / "runs" / "pretrain"
    with open(folder / "killed.log", "w") as log:
        running = subprocess.Popen([*COMMAND, "pretrain"], cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    wait_for(lambda: list(run_dir.glob("ckpt/[0-9]*/.metadata")) or running.poll() is not None, seconds=240)
    running.send_signal(signal.SIGKILL)
    running.wait()
    wait_for(lambda: not processes_in(folder), seconds=60)
    return folder, sorted(path.name for path in run_dir.iterdir())


@pytest.fixture(scope="module")
def finished(killed):
    """The same folder after the same command was given again, for everything."""
    folder, _ = killed
    refused = snakemake(folder, check=False)
    assert refused.returncode == 1
    assert "unlock" in refused.stdout + refused.stderr
    snakemake(folder, "--unlock")
    snakemake(folder, timeout=600)
    return folder


@pytest.fixture(scope="module", autouse=True)
def umask_of_before():
    before = os.umask(0o022)
    os.umask(before)
    yield
    os.umask(before)


def wait_for(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so after {seconds} s"
        time.sleep(0.1)


def processes_in(folder):
    """Processes with this working directory, our own aside: Snakemake's jobs and their children."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").resolve() == folder.resolve() and int(process.name) != os.getpid():
                found.append(process.name)
        except OSError:  # gone meanwhile, or not ours
            continue
    return found


def test_a_killed_snakemake_leaves_checkpoints_and_no_processes(killed):
    _, left = killed
    assert "ckpt" in left
    assert "final.json" not in left


def test_the_run_goes_on_where_it_was(finished):
    metrics = read_metrics(finished / "results" / "runs" / "pretrain")
    events = [event["event"] for event in metrics.attrs["events"]]
    assert events[:2] == ["start", "resume"]
    resumed_at = metrics.attrs["events"][1]["iteration"]
    assert 0 < resumed_at < NUM_ITERATIONS["pretrain"]


def test_nothing_is_left_to_do(finished):
    jobs, text = plan(finished)
    assert jobs == {}
    assert "Nothing to be done" in text


def test_one_picture_is_made_again_alone(finished):
    picture = finished / "results" / "pca" / "gram" / f"{next(iter(SLIDES))}.png"
    before = picture.read_bytes()
    picture.unlink()
    assert plan(finished, "pca")[0] == {"pca_map": 1, "pca": 1}
    snakemake(finished, "pca")
    assert (cv2.imdecode(np.frombuffer(before, np.uint8), 1) == cv2.imread(str(picture))).all()


@pytest.mark.parametrize("slide_id", SLIDES)
def test_tiles_lie_on_tissue_at_the_requested_size(finished, slide_id):
    for name, tile_px in (("train", 128), ("features", 112)):
        path = finished / "results" / "tiles" / name / f"{slide_id}.parquet"
        tiles, about = read_tiles(path).to_pandas(), read_metadata(path)
        assert len(tiles) >= 4
        assert (tiles["tile_px"] == tile_px).all()
        assert np.allclose(tiles["footprint_px"], tile_px / about["mpp_x"], atol=1)
        assert (tiles["x"] + tiles["footprint_px"] <= about["width"] + 1).all()
        assert (tiles["y"] + tiles["footprint_px"] <= about["height"] + 1).all()


@pytest.mark.parametrize("run", RUNS)
def test_runs_are_whole(finished, run):
    run_dir = finished / "results" / "runs" / run
    final = read_json(run_dir / "final.json")
    assert (run_dir / final["checkpoint"] / ".metadata").is_file()
    assert (run_dir / final["teacher"]).is_file()
    metrics = read_metrics(run_dir)
    assert metrics.index[-1] == NUM_ITERATIONS[run] - 1
    assert np.isfinite(metrics["total_loss"]).all()
    assert ("gram_loss" in metrics) == (run == "gram")
    assert len(list((run_dir / "logs").iterdir())) == (2 if run == "pretrain" else 1)


def test_training_changed_the_weights(finished):
    tokens = {model: load_backbone(finished / "results/models" / model / "teacher.pth").cls_token for model in MODELS}
    assert not (tokens["base"] == tokens["pretrain"]).any()
    assert not (tokens["pretrain"] == tokens["gram"]).any()
    assert all(token.isfinite().all() for token in tokens.values())


@pytest.mark.parametrize("slide_id", SLIDES)
@pytest.mark.parametrize("model", MODELS)
def test_features_are_in_manifest_order(finished, model, slide_id):
    tiles = read_tiles(finished / "results" / "tiles" / "features" / f"{slide_id}.parquet").to_pandas()
    with h5py.File(finished / "results" / "features" / model / f"{slide_id}.h5") as file:
        assert (file["coords"][:] == tiles[["x", "y"]].to_numpy()).all()
        features = file["features"][:]
    assert features.shape == (len(tiles), 64)
    assert np.isfinite(features).all()
    assert features.std(axis=0).max() > 0


@pytest.mark.parametrize("slide_id", SLIDES)
def test_pictures_show_something(finished, slide_id):
    results = finished / "results"
    pictures = [results / "slides" / f"{slide_id}.jpg", results / "tiles" / f"{slide_id}.jpg"]
    pictures += [results / "pca" / model / f"{slide_id}.png" for model in MODELS]
    region = results / "pca" / "regions" / f"{slide_id}_auto"
    further = [results / "pca" / "compare" / f"{slide_id}.png", results / "clusters" / "maps" / f"{slide_id}.png"]
    further += [region / "colors.png", region / "similarity.png", results / "clusters" / "base" / "examples.png"]
    for path in [*pictures, *further]:
        image = cv2.imread(str(path))
        assert min(image.shape[:2]) > 100
        assert image.std() > 5
    maps = [cv2.imread(str(path)) for path in pictures[2:]]
    assert any(maps[0].shape != other.shape or (maps[0] != other).any() for other in maps[1:])


@pytest.mark.parametrize("slide_id", SLIDES)
@pytest.mark.parametrize("model", MODELS)
def test_every_tile_has_a_cluster(finished, model, slide_id):
    folder = finished / "results" / "clusters" / model
    document = json.loads((folder / f"{slide_id}.geojson").read_text(encoding="utf-8"))
    names = [feature["properties"]["classification"]["name"] for feature in document["features"]]
    tiles = read_tiles(finished / "results" / "tiles" / "features" / f"{slide_id}.parquet")
    with np.load(folder / "labels" / f"{slide_id}.npz") as arrays:
        assert names == [f"Cluster {label + 1}" for label in arrays["labels"]]
    assert len(names) == tiles.num_rows


def test_the_report_is_self_contained(finished):
    page = (finished / "results" / "report.html").read_text(encoding="utf-8")
    for model in MODELS:
        assert model in page
    slides, regions = len(SLIDES) * (2 + len(MODELS)), 2 * 2
    described = [path.parent.name for path in (finished / "results" / "evaluation").glob("*/figure.png")]
    assert described == ["descriptive"]
    pictures = slides + regions + len(MODELS) + 1 + len(described)
    assert len(re.findall(r'src="data:image/', page)) == pictures
    assert not re.search(r'(src|href)="(?!data:|#|viewer/index.html")', page)


def test_the_viewer_has_all_slides_and_models(finished):
    viewer = finished / "results" / "viewer"
    page = (viewer / "index.html").read_text(encoding="utf-8")
    contents = json.loads(re.search(r"const CONTENTS = (.*);", page).group(1))
    assert contents["slides"] == [[slide, list(range(len(MODELS)))] for slide in SLIDES]
    assert {model["name"] for model in contents["models"]} == set(MODELS)
    for slide in SLIDES:
        pyramid = read_script(viewer / "slides" / slide / "pyramid.js")[2]
        assert pyramid["present"][0] == "1" and (viewer / "slides" / slide / "tiles" / "0" / "0_0.jpg").is_file()
        for model in MODELS:
            tiles = read_script(viewer / "models" / model / "slides" / f"{slide}.js")[2]
            with h5py.File(finished / "results" / "features" / model / f"{slide}.h5") as file:
                assert tiles["count"] == len(file["coords"])


@pytest.mark.long
def test_snakemakes_own_report_has_all_pictures(finished):
    """report.zip: every picture under its category, with labels and a caption whose blanks are filled."""
    snakemake(finished, "--report", "report.zip")
    with zipfile.ZipFile(finished / "report.zip") as report:
        page, names = report.read("report/report.html").decode(), set(report.namelist())
    results = json.loads(re.search(r"var results = (\{.*\});?$", page, re.MULTILINE).group(1))
    categories = json.loads(re.search(r"var categories = (\{.*\});?$", page, re.MULTILINE).group(1))
    paths = {name: [path for part in parts.values() for path in part] for name, parts in categories.items()}
    assert len(paths["PCA maps"]) == len(SLIDES) * (len(MODELS) + 1)
    assert len(paths["Training"]) == len(RUNS)
    assert sorted(path for part in paths.values() for path in part) == sorted(results)
    for path, result in results.items():
        assert result["labels"] and all(result["labels"].values()), path
        assert result["caption"].strip() and "{{" not in result["caption"], path
        assert f"report/{result['data_uri']}" in names, path
    labels = [result["labels"] for result in results.values() if result["job_properties"]["rule"] == "pca_map"]
    assert {(each["slide"], each["model"]) for each in labels} == {(s, m) for s in SLIDES for m in MODELS}


def test_the_budget_was_right(finished):
    """Estimates with nothing but inspected slides, against what the run really wrote."""
    ahead = finished / "ahead"
    for path in (finished / "results" / "slides").iterdir():
        (ahead / "slides").mkdir(parents=True, exist_ok=True)
        (ahead / "slides" / path.name).write_bytes(path.read_bytes())
    snakemake(finished, "budget", "--config", "results=ahead")
    told = read_json(ahead / "budget.json")
    assert told["slides"] == {"tiled": 0, "thumbnail": len(SLIDES), "size": 0, "unknown": 0}
    for name, estimated in told["tiles"].items():
        files = (finished / "results" / "tiles" / name).glob("*.parquet")
        real = sum(read_tiles(path).num_rows for path in files)
        assert abs(estimated - real) <= max(2, 0.1 * real), name
    estimated = Counter()
    for product in told["products"]:
        estimated[product["folder"]] += product["bytes"]
    real = {folder: disk_use(finished / "results" / folder)[0] for folder in estimated}
    assert estimated["models"] == pytest.approx(real["models"], rel=0.15)
    for run in RUNS:  # at most one checkpoint more than are left: the one that is being written
        whole = disk_use(next((finished / "results" / "runs" / run / "ckpt").glob("[0-9]*")))[0]
        assert 0.95 * real[f"runs/{run}"] < estimated[f"runs/{run}"] < 1.05 * real[f"runs/{run}"] + whole, run
    for folder in (*(f"features/{model}" for model in MODELS), "slides", "pca", "viewer/slides"):
        assert real[folder] / 2 < estimated[folder] < 2.5 * real[folder], folder
    assert sum(real.values()) / 1.5 < told["bytes"] < 2 * sum(real.values())


def test_under_umask_027_results_are_for_the_group_alone(finished):
    paths = [path for path in (finished / "results").rglob("*") if not path.is_symlink()]
    assert len(paths) > 150
    for path in paths:
        mode = path.stat().st_mode & 0o777
        assert mode & 0o007 == 0 and mode & 0o040, f"{path} {mode:o}"
        assert not path.is_dir() or mode & 0o010, f"{path} {mode:o}"


def test_results_tell_nothing_of_where_they_were_made(finished):
    names = {os.fsencode(finished), os.fsencode(SHARED)} | {os.fsencode(path.name) for path in REAL_SLIDES.values()}
    names -= {os.fsencode(name) for name in SLIDES}
    leaks = [
        (path.relative_to(finished), name)
        for path in (finished / "results").rglob("*")
        if path.is_file() and "demo" not in path.parts
        for name in names
        if name in path.read_bytes()
    ]
    assert leaks == []
