"""The pilot's demo, which is killed on the way, and the report that follows a pilot without forcing one."""

import csv
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from dinoscope.files import read_json, write_json, write_text
from snakemake_runs import COMMAND, NANO_RECIPE, REPOSITORY, plan, snakemake

WEIGHTS = Path("results/models/pretrain/teacher.pth")


def asked_of(config):
    """Arguments that take a config in place of config/config.yaml."""
    return ["--configfile", config, "--replace-workflow-config"]


DEMO = asked_of("config/demo_pilot/config.yaml")


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A working directory with the repository's config and weights where the demo's first step leaves them."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "config").symlink_to(REPOSITORY / "config")
    return folder


def test_the_demo_says_what_comes_first_and_plans_the_rest(clone):
    done = snakemake(clone, *DEMO, "--dry-run", "pilot", check=False)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert f"MODEL.WEIGHTS {WEIGHTS} does not exist" in done.stderr
    (clone / WEIGHTS).parent.mkdir(parents=True)
    (clone / WEIGHTS).touch()
    jobs, text = plan(clone, *DEMO, "pilot")
    wanted = {"demo_biopsies": 1, "tile_slide": 92, "train": 3, "measure_model": 4, "extract_features": 4 * 60}
    assert {name: jobs[name] for name in wanted} == wanted and "demo_slides" not in jobs
    assert "the pilot will find too few" not in text and "no site read-out" not in text


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Slides that are never read, with labels, and published weights."""
    folder = tmp_path_factory.mktemp("reported")
    write_text(folder / "root.yaml", "MODEL: {WEIGHTS: w.pth}\n" + NANO_RECIPE + "\n")
    (folder / "w.pth").touch()
    rows = [f"s{i}\ts{i}.svs\t{'eval,features' if i < 8 else 'train'}" for i in range(10)]
    for row in rows:
        (folder / row.split("\t")[1]).touch()
    write_text(folder / "slides.tsv", "\n".join(["slide_id\tpath\tuse", *rows]) + "\n")
    labels = [f"s{i}\t{'ab'[i % 2]}" for i in range(10)]
    write_text(folder / "labels.tsv", "\n".join(["slide_id\tgrade", *labels]) + "\n")
    config = {"slides": {"source": "slides.tsv"}, "labels": "labels.tsv", "runs": {"mine": {"recipe": "root.yaml"}}}
    config |= {"tiling": {"sets": {"train": {"tile_px": 96, "mpp": 1.0}, "features": {"tile_px": 96, "mpp": 1.0}}}}
    write_text(folder / "config/config.yaml", yaml.safe_dump(config | {"viewer": {"enabled": False}}))
    return folder


def of_report(text):
    """What a dry run says of the job that makes the report."""
    return text.partition("rule report:")[2].partition("jobid:")[0]


def test_the_report_follows_a_pilot_and_forces_none(small):
    jobs, text = plan(small, "report")
    assert "results/slides_report.tsv" in of_report(text) and "pilot" not in of_report(text)
    assert not any("pilot" in name for name in jobs)
    both, text = plan(small, "report", "pilot")
    assert both["pilot_summary"] == both["report"] == 1 and "results/pilot/advice.txt" in of_report(text)
    write_json(small / "results/pilot/advice.json", {})
    jobs, text = plan(small, "report")
    assert "results/pilot/advice.json" in of_report(text)
    assert not any("pilot" in name for name in jobs) and jobs["train"] == 1


def iterations_done(run):
    """As its checkpoints tell."""
    names = [path.name for path in (run / "ckpt").glob("*") if path.name.isdecimal()]
    return max(map(int, names), default=-1) + 1


def processes_of(folder):
    """Of this user, in a working directory."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").resolve() == folder:
                found.append(int(process.name))
        except OSError:  # it has ended, or is somebody else's
            continue
    return found


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_the_demo_runs_survives_a_kill_and_judges(clone):
    """With fewer iterations, and random weights in place of those that training takes minutes for."""
    (clone / WEIGHTS).parent.mkdir(parents=True, exist_ok=True)
    (clone / WEIGHTS).touch()
    config = yaml.safe_load((REPOSITORY / "config/demo_pilot/config.yaml").read_text())
    random = config | {"results": "before", "labels": None, "evaluation": {}}
    random |= {"runs": {"fresh": {"recipe": "config/runs/tiny.yaml"}}}
    write_text(clone / "random.yaml", yaml.safe_dump(random))
    snakemake(clone, *asked_of("random.yaml"), "before/models/base/teacher.pth")
    (clone / "before/models/base/teacher.pth").replace(clone / WEIGHTS)
    config["pilot"] |= {"iterations": 20, "gpu_minutes": 60, "probes": 10}
    write_text(clone / "less.yaml", yaml.safe_dump(config))
    less, run = asked_of("less.yaml"), clone / "results/demo_pilot/runs/pilot-full"
    with open(clone / "killed.log", "w") as log:
        process = subprocess.Popen(
            [*COMMAND, *less, "pilot"], cwd=clone, stdout=log, stderr=log, start_new_session=True
        )
        deadline = time.monotonic() + 2400
        while iterations_done(run) < 2 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        for victim in processes_of(clone):
            os.kill(victim, signal.SIGKILL)
        process.wait()
    done_by_then = iterations_done(run)
    assert 2 <= done_by_then < 20 and not (run / "final.json").exists(), (clone / "killed.log").read_text()[-3000:]
    snakemake(clone, *less, "--unlock")
    snakemake(clone, *less, "--rerun-incomplete", "pilot", timeout=3600)
    events = [line for line in (run / "training_metrics.json").read_text().splitlines() if '"event"' in line]
    assert any('"resume"' in line for line in events), events
    said = (clone / "results/demo_pilot/pilot/advice.txt").read_text()
    assert said.count("\n") == 1 and "too few" not in said.lower() and "the site within a class" in said
    with open(clone / "results/demo_pilot/pilot/summary.tsv") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if row["primary"] == "yes"]
    assert [row["kind"] for row in rows] == ["start", "arm", "arm", "arm"] and {row["cases"] for row in rows} == {"60"}
    assert all(row["low"] and row["site_readout"] for row in rows)
    assert read_json(run / "final.json")["iteration"] == 19
