"""Slides that lie on a real S3 server (moto's, on the loopback), and results that are copied to it."""

import logging
import os
import re
import subprocess
from collections import Counter
from pathlib import Path

import h5py
import pytest
import yaml

from dinoscope.errors import ConfigError
from dinoscope.plan import make_plan
from dinoscope.plan_evaluation import EvaluationJobs
from dinoscope.plan_features import FeatureJobs
from dinoscope.plan_segmentation import SegmentJobs
from dinoscope.plan_slides import SlideJobs
from dinoscope.plan_storage import StorageJobs
from dinoscope.slides.remote import remote_address
from snakemake_runs import COMMAND, NANO_RECIPE, REPOSITORY, plan, snakemake
from synthetic_slides import blobs, write_lossless

ACCESS_KEY, SECRET_KEY = "AKIAZq5Xw07Kj", "Zq5secretXw07wordKj"
CONFIG = {
    "slides": {"source": "slides.tsv"},
    "tiling": {"sets": {"train": {"tile_px": 128, "mpp": 1.0}, "features": {"tile_px": 112, "mpp": 1.0}}},
    "runs": {"pretrain": {"recipe": "root.yaml"}},
    "features": {"models": ["base"]},
    "storage": {"results": "s3://results/our/project", "upload": ["features", "models"]},
}


def new_folder(folder, uses=("features", "features"), **changes):
    (folder / "config").mkdir()
    (folder / "config" / "config.yaml").write_text(yaml.safe_dump(CONFIG | changes))
    (folder / "root.yaml").write_text(NANO_RECIPE)
    rows = [f"s{number}\ts3://slides/a cohort/s{number}.tiff\t{use}\n" for number, use in enumerate(uses)]
    (folder / "slides.tsv").write_text("slide_id\tpath\tuse\n" + "".join(rows))
    return folder


class _Requests(logging.Handler):
    """Method and path of all that the server was asked for."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def emit(self, record):
        match = re.search(r"(GET|PUT|POST|DELETE) (/[^ ?]*)(\?\S*)? HTTP", record.getMessage())
        if match and not (match[3] or "").startswith(("?prefix", "?list")):
            self.seen[f"{match[1]} {match[2]}"] += 1


@pytest.fixture(scope="module")
def server():
    """The server's address, what it was asked for, and a client."""
    moto = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    pytest.importorskip("snakemake_storage_plugin_s3")
    requests, log = _Requests(), logging.getLogger("werkzeug")
    log.addHandler(requests)
    log.setLevel(logging.INFO)
    log.propagate = False
    running = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    running.start()
    host, port = running.get_host_and_port()
    keys = {"aws_access_key_id": ACCESS_KEY, "aws_secret_access_key": SECRET_KEY, "region_name": "us-east-1"}
    yield f"http://{host}:{port}", requests, boto3.client("s3", endpoint_url=f"http://{host}:{port}", **keys)
    running.stop()
    log.removeHandler(requests)


@pytest.fixture(scope="module")
def uploaded(server, tmp_path_factory):
    """A folder after `snakemake upload` and pictures of two slides; what the server was asked for, what was said."""
    address, requests, client = server
    folder = new_folder(tmp_path_factory.mktemp("s3"))
    client.create_bucket(Bucket="slides")
    for number in range(2):
        image = blobs(1024, 1024, [(500, 480, 300 + 50 * number)], colour=(190, 90, 150), ground=(240, 238, 242))
        slide = write_lossless(folder / "made" / f"s{number}.tiff", image, downsamples=(1, 4))
        client.upload_file(str(slide), "slides", f"a cohort/s{number}.tiff")
        assert slide.stat().st_size < 8 * 2**20  # larger ones are fetched in several parts
        slide.unlink()
    pictures = [f"results/viewer/slides/s{number}/pyramid.js" for number in range(2)]
    requests.seen.clear()
    done = run_with_keys(folder, address, "upload", "inspect", *pictures)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return folder, Counter(requests.seen), done.stdout + done.stderr


def run_with_keys(folder, address, *targets):
    keys = {"ENDPOINT_URL": address, "ACCESS_KEY": ACCESS_KEY, "SECRET_KEY": SECRET_KEY}
    environment = {f"SNAKEMAKE_STORAGE_S3_{name}": value for name, value in keys.items()}
    environment = {**os.environ, **environment, "OMP_NUM_THREADS": "1"}
    command = [*COMMAND, *targets]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_each_slide_is_fetched_once_for_all_its_jobs_and_released(uploaded):
    folder, requests, said = uploaded
    assert {rule: said.count(f"rule {rule}:") for rule in ("inspect_slide", "tile_slide", "viewer_pyramid")} == {
        "inspect_slide": 2,
        "tile_slide": 2,
        "viewer_pyramid": 2,
    }
    # asked for before the slide is here, as of one of a gigabyte
    first = re.search(r"rule inspect_slide:.*? runtime=(\d+)", said, re.DOTALL)
    assert first and first.group(1) == "6"
    fetched = {path: count for path, count in requests.items() if path.startswith("GET /slides/")}
    assert sorted(fetched.values()) == [1, 1]
    assert not [path for path in (folder / ".snakemake" / "storage").rglob("*") if path.is_file()]


@pytest.mark.slow
def test_features_and_models_are_on_the_server_as_they_are_here(uploaded, server):
    folder, client = uploaded[0], server[2]
    listed = client.list_objects_v2(Bucket="results")["Contents"]
    names = {entry["Key"].removeprefix("our/project/") for entry in listed}
    models = {f"models/base/{file}" for file in ("teacher.pth", "teacher.safetensors", "model.json")}
    assert names == models | {f"features/base/s{number}.h5" for number in range(2)}
    for name in names:
        stored = client.get_object(Bucket="results", Key=f"our/project/{name}")["Body"].read()
        assert stored == (folder / "results" / name).read_bytes()
    with h5py.File(folder / "results" / "features" / "base" / "s0.h5") as file:
        assert len(file["features"]) > 3


@pytest.mark.slow
def test_nothing_is_brought_or_copied_twice(uploaded, server):
    address, requests, _ = server
    requests.seen.clear()
    again = run_with_keys(uploaded[0], address, "upload")
    assert again.returncode == 0, again.stderr[-3000:]
    assert "Nothing to be done" in again.stdout + again.stderr
    assert not [request for request in requests.seen if not request.startswith("GET /results")]


@pytest.mark.slow
def test_keys_and_addresses_of_slides_stay_out_of_logs_and_results(uploaded):
    folder, _, said = uploaded
    assert ACCESS_KEY not in said and SECRET_KEY not in said
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 40
    for path in files:
        content = path.read_bytes()
        assert ACCESS_KEY.encode() not in content and SECRET_KEY.encode() not in content, path
        assert "results" not in path.relative_to(folder).parts[:1] or b"a cohort" not in content, path


def test_training_takes_packed_tiles_of_slides_on_storage(tmp_path, monkeypatch):
    folder = new_folder(tmp_path, ("train,features", "train"), features={"models": ["pretrain"]})
    monkeypatch.chdir(folder)
    config = yaml.safe_load((folder / "config" / "config.yaml").read_text())
    with pytest.raises(
        ConfigError, match=r"runs\.pretrain: training opens slides at random.*set packing\.enabled to true"
    ):
        make_plan(config, REPOSITORY)
    packed = make_plan(config | {"packing": {"enabled": True}}, REPOSITORY)
    assert SlideJobs(packed).address_of("s0") == "s3://slides/a cohort/s0.tiff"
    refused = snakemake(folder, "--dry-run", check=False)
    assert refused.returncode == 1
    assert "error: runs.pretrain: training opens slides at random" in refused.stderr


def test_slides_of_several_files_and_a_place_that_is_none_are_refused(tmp_path, monkeypatch):
    folder = new_folder(tmp_path)
    monkeypatch.chdir(folder)
    config = yaml.safe_load((folder / "config" / "config.yaml").read_text())
    (folder / "slides.tsv").write_text("slide_id\tpath\na\ts3://slides/a.mrxs\n")
    with pytest.raises(ConfigError, match=r"slide a: s3://slides/a\.mrxs has several files"):
        make_plan(config, REPOSITORY)
    new = config | {"slides": {"source": "slides.tsv"}, "storage": {"results": "gs://bucket"}}
    with pytest.raises(ConfigError, match=r"storage\.results"):
        make_plan(new, REPOSITORY)
    (folder / "slides.tsv").write_text("slide_id\tpath\na\tslides/a.tiff\n")
    local = make_plan(config | {"storage": {}}, REPOSITORY)
    with pytest.raises(ConfigError, match=r"storage\.results is null; give s3://BUCKET/PREFIX"):
        StorageJobs(local, EvaluationJobs(local, FeatureJobs(local)), SegmentJobs(local)).objects()


def test_without_a_place_the_target_says_so(tmp_path):
    folder = new_folder(tmp_path, storage={"results": None})
    (folder / "slides.tsv").write_text("slide_id\tpath\na\ta.tiff\n")
    (folder / "a.tiff").touch()
    refused = snakemake(folder, "--dry-run", "upload", check=False)
    assert refused.returncode == 1
    assert "error: config: storage.results is null; give s3://BUCKET/PREFIX" in refused.stderr
    assert plan(folder, "features")[0]["extract_features"] == 1


@pytest.mark.parametrize(
    ("path", "address"),
    [
        ("s3://bucket/key.svs", "s3://bucket/key.svs"),
        (Path("s3://bucket/a b/key.svs"), "s3://bucket/a b/key.svs"),
        ("/s3:/bucket/key.svs", None),
        ("slides/s3:/key.svs", None),
        (Path("a.svs"), None),
    ],
)
def test_addresses(path, address):
    assert remote_address(path) == address
