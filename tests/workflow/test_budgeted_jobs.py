"""Jobs as a budget counts them, against Snakemake's own plan; the target that makes it; jobs in a container."""

import os
import re
import shlex
import shutil
import subprocess

import pytest
import yaml

from dinoscope.budget.jobs import count_jobs, profile_groups, submitted
from dinoscope.plan import make_plan
from segmentation_samples import write_discs
from snakemake_runs import NANO_RECIPE, REPOSITORY, plan, snakemake

TWO_RUNS = {"pretrain": {"recipe": "root.yaml"}, "gram": {"recipe": "gram.yaml", "continues": "pretrain"}}
REPEATED = {name: run | {"seeds": [0, 1, 2]} for name, run in TWO_RUNS.items()}
REPEATED["gram"] |= {"control": True}
CONFIGS = {
    "plain": {},
    "everything": {
        "packing": {"enabled": True},
        "export": {"formats": ["hf", "onnx"]},
        "features": {"export": ["clam", "parquet"], "encoders": {"other": {"source": "encoder"}}},
        "pca": {"auto_regions": 1, "regions": [{"slide": "s1", "x": 0, "y": 0}]},
    },
    "little": {
        "features": {"models": ["base"]},
        "pca": {"clusters": None, "auto_regions": 0},
        "viewer": {"enabled": False},
    },
    "labels and tiles from elsewhere": {
        "labels": "labels.tsv",
        "evaluation": {"tile_sets": {"cells": {"folder": "cells"}}, "splits": ["grouped"]},
    },
    "robustness": {
        "labels": "labels.tsv",
        "evaluation": {"robustness": True},
        "features": {"encoders": {"other": {"source": "encoder", "set": "train"}}},
    },
    "nothing is measured": {"evaluation": {"enabled": False}},
    "segmentation": {
        "segmentation": {
            "tasks": {"nuclei": {"dataset": "folder", "root": "masks", "seeds": [0, 1], "data": {"instance": "disc"}}}
        },
    },
    "seeds and a control": {"labels": "labels.tsv", "runs": REPEATED, "export": {"formats": ["timm"]}},
    "seeds of which nothing is measured": {"runs": REPEATED, "evaluation": {"enabled": False}},
    "of a chain of runs the last": {"features": {"models": ["gram"]}, "evaluation": {"enabled": False}},
    "models of which runs are exported": {"features": {"models": ["pretrain"]}, "export": {"formats": ["timm"]}},
}


@pytest.fixture
def folder(tmp_path):
    """A working directory with five empty slides, of which one is for features alone and one for training alone."""
    (tmp_path / "root.yaml").write_text(NANO_RECIPE)
    gram = "extends: root.yaml\ngram: {use_loss: true}\ncrops: {gram_teacher_crops_size: 128}\n"
    (tmp_path / "gram.yaml").write_text(gram)
    (tmp_path / "encoder").mkdir()
    (tmp_path / "cells" / "one").mkdir(parents=True)
    (tmp_path / "labels.tsv").write_text("slide_id\tgrade\n" + "".join(f"s{index}\tlow\n" for index in range(5)))
    write_discs(tmp_path / "masks")
    uses = {"s1": "features", "s2": "train"}
    rows = [f"s{index}\ts{index}.svs\tp{index}\t{uses.get(f's{index}', 'train,features')}" for index in range(5)]
    for index in range(5):
        (tmp_path / f"s{index}.svs").touch()
    (tmp_path / "slides.tsv").write_text("slide_id\tpath\tcase_id\tuse\n" + "\n".join(rows) + "\n")
    (tmp_path / "config").mkdir()
    return tmp_path


def configured(folder, **changes):
    config = {"slides": {"source": "slides.tsv"}, "runs": TWO_RUNS, **changes}
    (folder / "config" / "config.yaml").write_text(yaml.safe_dump(config))
    return config


@pytest.mark.parametrize("name", CONFIGS)
def test_jobs_are_those_that_snakemake_plans(folder, name, monkeypatch):
    monkeypatch.chdir(folder)
    config = configured(folder, **CONFIGS[name])
    assert count_jobs(make_plan(config, REPOSITORY)) == plan(folder)[0]


def rule_groups(folder):
    """RULE=GROUP as the workflow passes them on."""
    _, text = plan(folder, "--printshellcmds", "budget")
    (arguments,) = re.findall(r"budget\.py --config \S+ --group (.*?) 2>&1", text)
    return dict(part.split("=") for part in shlex.split(arguments))


def test_the_workflow_tells_its_groups(folder):
    configured(folder)
    groups = rule_groups(folder)
    assert groups["tile_slide"] == "tiles"
    assert groups["report"] == groups["pretrain"] == "local"
    assert "train" not in groups


def test_five_thousand_slides_are_fewer_than_a_thousand_jobs_of_the_cluster(folder, monkeypatch):
    profile = REPOSITORY / "profiles" / "slurm" / "profile.v9+.yaml"
    if not profile.is_file():
        pytest.skip("this branch has no profiles/slurm")
    configured(folder)
    groups = rule_groups(folder)
    monkeypatch.chdir(folder)
    rows = "".join(f"s{index}\ts{index}.svs\n" for index in range(5000))
    (folder / "slides.tsv").write_text(f"slide_id\tpath\n{rows}")
    config = yaml.safe_load((REPOSITORY / "config" / "config.yaml").read_text(encoding="utf-8"))
    jobs = count_jobs(make_plan(config | {"slides": {"source": "slides.tsv"}}, REPOSITORY, check_files=False))
    of_profile, components = profile_groups(profile)
    assert sum(jobs.values()) > 40_000
    assert submitted(jobs, groups | of_profile, components) < 1_000


@pytest.mark.long
def test_the_target_inspects_tells_and_refuses(folder):
    """With slides that cannot be read, whose size is guessed; on a full disk nothing else would start either."""
    configured(folder)
    done = snakemake(folder, "budget")
    assert re.search(r"^slides +5: 5 guessed", done.stdout, re.MULTILINE)
    assert (folder / "results" / "budget.json").is_file()
    assert plan(folder, "budget")[0] == {"budget": 1}  # free space may be another by now
    if subprocess.run(["mount", "--bind", folder, folder], capture_output=True, check=False).returncode:
        return
    subprocess.run(["umount", folder], check=True)
    (folder / "small").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", "small"], cwd=folder, check=False)
    assert mounted.returncode == 0
    try:
        shutil.copytree(folder / "results" / "slides", folder / "small" / "results" / "slides")
        refused = snakemake(folder, "budget", "--config", "results=small/results", check=False)
    finally:
        subprocess.run(["umount", folder / "small"], check=True)
    assert refused.returncode == 1
    assert re.search(r"error: the results need .* GB more and .* MB are free on its disk: set ", refused.stdout)


APPTAINER = """#!/bin/bash
case "$1" in
  --version) echo "apptainer version 1.3.0";;
  exec) echo "$*" >> "{log}"; while [ "$1" != "bash" ] && [ "${{1##*/}}" != "bash" ]; do shift; done; exec "$@";;
esac
"""


def test_jobs_run_in_the_container_that_is_named(folder, monkeypatch):
    """With a program in apptainer's place that notes what it is asked for and runs it here."""
    configured(folder)
    programs, image = folder / "bin", folder / "dinoscope.sif"
    programs.mkdir()
    image.touch()
    apptainer = programs / "apptainer"
    apptainer.write_text(APPTAINER.format(log=folder / "asked.log"))
    apptainer.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("DINOSCOPE_CONTAINER", str(image))
    snakemake(folder, "results/splits.tsv", "--sdm", "apptainer")
    assert (folder / "results" / "splits.tsv").is_file()
    (asked,) = (folder / "asked.log").read_text().splitlines()
    assert f" {image} " in asked and "split_slides.py" in asked
