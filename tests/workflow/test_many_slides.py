"""Collections whose files no command line could hold, and per-slide jobs that share a cluster job."""

import hashlib
import json
import os
import re
import subprocess
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from dinoscope.slides.manifest import tile_table, write_tiles
from feature_samples import write_sample
from snakemake_runs import COMMAND, REPOSITORY, plan, snakemake

pytestmark = pytest.mark.long
JOINS = ["results/manifests/train.parquet", "results/slides.parquet", "results/slides_report.tsv"]
LONGEST_ARGUMENT = 131_072  # of a command on Linux
ROWS = 3


def write_stubs(results, slide_id):
    """What inspection and tiling would have left of a slide."""
    size = {"width": 9000, "height": 8000, "mpp_x": 0.25, "mpp_y": 0.25, "num_levels": 1, "vendor": "aperio"}
    document = size | {"slide_id": slide_id, "mpp_source": "file", "objective_power": 40.0, "has_icc_profile": False}
    document |= {"level_dimensions": [[9000, 8000]], "level_downsamples": [1.0], "warnings": [], "content": slide_id}
    document |= {"focal_planes": {"count": 1, "used": 1, "source": ""}, "scanner": None}
    document |= {"looks": dict.fromkeys(("dark", "bright", "stained", "brown", "green", "blue", "purple", "pink"), 0.5)}
    (results / "slides" / f"{slide_id}.json").write_text(json.dumps(document), encoding="utf-8")
    columns = {"x": range(0, 1024 * ROWS, 1024), "y": 0, "level": 0, "read_px": 512, "tile_px": 256, "mpp": 0.5}
    tiles = tile_table(slide_id, columns | {"footprint_px": 512, "tissue_fraction": 1.0})
    for name in ("train", "features"):
        about = {"slide_id": slide_id, "tile_set": name, "tile_px": 256, "requested_mpp": 0.5, "stride_px": 256}
        write_tiles(results / "tiles" / name / f"{slide_id}.parquet", tiles, size | about)


def make_collection(folder, slides, *, long_names=False, done):
    """A working directory for a table of empty slides; `done` leaves only joins to do."""
    results = folder / "results"
    for name in ("scans", "config", "results/slides", "results/tiles"):
        (folder / name).mkdir(parents=True)
    rows = ["slide_id\tpath\tstain\tuse"]
    for number in range(slides):
        slide_id = f"slide_{number:05d}"
        if long_names:
            slide_id += "_" + hashlib.sha512(slide_id.encode()).hexdigest()
        (folder / "scans" / f"{number}.svs").touch()
        rows.append(f"{slide_id}\tscans/{number}.svs\tHE\t{'eval' if number % 10 == 9 else 'train'},features")
        if done:
            write_stubs(results, slide_id)
    (folder / "config" / "slides.tsv").write_text("\n".join(rows) + "\n")
    config = yaml.safe_load((REPOSITORY / "config" / "config.yaml").read_text(encoding="utf-8"))
    config["demo"] = {"enabled": False}
    (folder / "config" / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def check_joins(folder, slides):
    """Runs the joins through Snakemake; nothing else is left to do."""
    files = [f"results/tiles/train/{path.name}" for path in (folder / "results/tiles/train").iterdir()]
    assert len(" ".join(files)) > LONGEST_ARGUMENT
    assert not (folder / "logs" / "lists").exists()
    done = snakemake(folder, *JOINS, timeout=1800)
    assert "4 of 4 steps" in done.stderr
    merged = pq.read_table(folder / JOINS[0])
    num_train = sum(number % 10 != 9 for number in range(slides))
    assert merged.num_rows == ROWS * num_train
    assert len(set(merged["slide_id"].to_pylist())) == num_train
    assert pq.read_table(folder / JOINS[1]).num_rows == slides
    assert len((folder / JOINS[2]).read_text(encoding="utf-8").splitlines()) == slides + 1
    assert len(list((folder / "logs" / "lists").iterdir())) == 3
    assert plan(folder, *JOINS)[0] == {}


@pytest.mark.slow
def test_joins_of_more_files_than_a_command_line_holds(tmp_path):
    check_joins(make_collection(tmp_path, 1000, long_names=True, done=True), 1000)


def test_a_dry_run_lists_no_files(tmp_path):
    make_collection(tmp_path, 1000, long_names=True, done=False)
    said = snakemake(tmp_path, "--dry-run", "--printshellcmds", JOINS[0]).stdout
    assert re.search(r"merge_manifest\.py --output \S+ @logs/lists/[0-9a-f]{16}\.txt >", said)
    assert not (tmp_path / "logs" / "lists").exists()


def groups_of(folder, *arguments):
    """Of a dry run: (rule, jobs in a group) -> how many groups there are of that kind, and the text."""
    done = snakemake(folder, "--dry-run", "inspect", "tiles", *arguments)
    found = Counter()
    for block in re.split(r"^\[.*\] Group job ", done.stdout + done.stderr, flags=re.MULTILINE)[1:]:
        rules = re.findall(r"^    rule (\w+):", block, re.MULTILINE)
        assert len(set(rules)) == 1
        found[rules[0], len(rules)] += 1
    return found, done.stdout + done.stderr


def test_jobs_of_many_slides_share_a_cluster_job(tmp_path):
    make_collection(tmp_path, 45, done=False)
    alone, _ = groups_of(tmp_path)
    assert alone == {("inspect_slide", 1): 45, ("tile_slide", 1): 45}
    shared, text = groups_of(tmp_path, "--group-components", "inspect=20", "tiles=30")
    assert shared == {
        ("inspect_slide", 20): 2, ("inspect_slide", 5): 1, ("tile_slide", 30): 1, ("tile_slide", 15): 1,
    }  # fmt: skip
    for output in ("slides/slide_{:05d}.jpg", "tiles/train/slide_{:05d}.parquet"):
        assert all(f"results/{output.format(number)}" in text for number in range(45))


@pytest.mark.slow
def test_a_cluster_gets_few_jobs_that_take_no_more_than_allowed(tmp_path):
    """Six slides in jobs of three; the memory that one job may have bounds how many it works on at once."""
    make_collection(tmp_path, 6, done=False)
    options = ["--executor", "standin", "--jobs", "4", "--group-components", "inspect=3", "--resources", "mem_mb=2000"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "tests" / "executor"), "OMP_NUM_THREADS": "1"}
    command = [
        *COMMAND[: COMMAND.index("--cores")],
        "results/slides_report.tsv",
        *options,
        "--seconds-between-status-checks",
        "1",
    ]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    submitted = [json.loads(line) for line in (tmp_path / "submitted.jsonl").read_text(encoding="utf-8").splitlines()]
    wanted = {"name": "inspect_inspect_slide", "jobs": 3, "cores": 2, "mem_mb": 2000, "runtime": 10}
    assert submitted == [wanted, wanted]
    assert len((tmp_path / "results/slides_report.tsv").read_text(encoding="utf-8").splitlines()) == 7


@pytest.mark.slow
@pytest.mark.parametrize("slides", [10, 1000])
def test_the_colours_of_few_and_of_many_slides_are_fitted(tmp_path, slides):
    make_collection(tmp_path, slides, long_names=True, done=False)
    rng = np.random.default_rng(0)
    (tmp_path / "results/features/base").mkdir(parents=True)
    listed = [line.split("\t")[0] for line in (tmp_path / "config/slides.tsv").read_text().splitlines()[1:]]
    for slide_id in listed:
        features = rng.normal(size=(3, 5)).astype("float32")
        write_sample(tmp_path / "results/features/base" / f"{slide_id}.h5", features, model="base")
    snakemake(tmp_path, "results/pca/base/basis.json", timeout=900)
    basis = json.loads((tmp_path / "results/pca/base/basis.json").read_text())
    training = [slide_id for number, slide_id in enumerate(listed) if number % 10 != 9]
    assert basis["slides"] == training
    text = (tmp_path / "logs/list_features/base.txt").read_text()
    assert text.startswith("@logs/lists/") == (slides == 1000)
