"""What the SLURM profiles ask for, and how few jobs a large collection is with them; no SLURM is needed."""

import importlib.util
import math
import re
import subprocess
import sys

import pytest
import yaml

from snakemake_runs import COMMAND, REPOSITORY

PROFILES = REPOSITORY / "profiles"
SLIDES, COHORT = 30, 5000


def profile(name):
    """The profile as Snakemake reads it."""
    from snakemake.profiles import ProfileConfigFileParser

    with open(PROFILES / name / "profile.v9+.yaml", encoding="utf-8") as file:
        return ProfileConfigFileParser().parse(file)


def pairs(entries):
    return dict(entry.split("=", 1) for entry in entries)


@pytest.fixture(scope="module")
def demands(tmp_path_factory):
    """Rule -> jobs of the plan, and those submitted, for a few slides with the default config."""
    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    try:
        spec = importlib.util.spec_from_file_location("cluster_jobs", REPOSITORY / "benchmarks" / "cluster_jobs.py")
        cluster_jobs = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(cluster_jobs)
        folder = tmp_path_factory.mktemp("cohort") / "project"
        folder.mkdir()
        cluster_jobs.make_project(folder, SLIDES)
        sizes = [f"{label}={min(int(size), 4)}" for label, size in pairs(profile("slurm")["group-components"]).items()]
        return cluster_jobs.submitted_jobs(folder, PROFILES / "slurm", "all", ("--group-components", *sizes))
    finally:
        sys.path.remove(str(REPOSITORY / "benchmarks"))


def group_labels():
    """Rule -> label of its group, as the rules say."""
    found = {}
    for path in (REPOSITORY / "rules").glob("*.smk"):
        for block in re.split(r"^ *rule ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
            label = re.search(r"^ +group:\n +\"(.+)\"$", block, re.MULTILINE)
            if label:
                found[block.partition(":")[0]] = label.group(1)
    return found


def rules_as_written():
    """Rule -> its text; rules of exports are made in a loop, and have no name of their own."""
    found = {}
    for path in (REPOSITORY / "rules").glob("*.smk"):
        for block in re.split(r"^ *rule(?= \w+:|:)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
            found[block.partition(":")[0].strip() or path.stem] = block
    return found


def demand(block, name):
    """Of a rule: (what the smallest job needs, what a gigabyte adds); None where it does not grow with attempts."""
    told = re.search(rf"^ +{name}=growing\((\d+)(?:, per_gb=(\d+))?(?:, of=.*)?\),$", block, re.MULTILINE)
    return told and (int(told.group(1)), int(told.group(2) or 0))


def test_jobs_get_more_with_each_attempt():
    """All that are submitted, but for the time of trainings: these go on where they were."""
    fixed = {"train": {"runtime"}, "segment_train": {"runtime"}}
    seen = 0
    for rule, block in rules_as_written().items():
        for name in ("mem_mb", "runtime"):
            if re.search(rf"^ +{name}=", block, re.MULTILINE) and name not in fixed.get(rule, ()):
                assert demand(block, name), f"{rule}: {name}"
                seen += 1
    assert seen > 40


@pytest.mark.parametrize(("slide_gb", "attempts"), [(1, 3), (2, 2)])
def test_slides_that_share_a_job_fit_into_a_day(slide_gb, attempts):
    """Snakemake adds up the time of what runs in turns; a job that fits into no partition goes to the default one."""
    told = profile("slurm")
    cores, sizes = int(told["cores"]), pairs(told["group-components"])
    site = yaml.safe_load((PROFILES / "slurm" / "site.yaml").read_text(encoding="utf-8"))["partitions"]
    limit = min(partition["max_runtime"] for partition in site.values())
    grouped = {}
    for rule, block in rules_as_written().items():
        if label := re.search(r"^ +group:\n +\"(.+)\"$", block, re.MULTILINE):
            threads = re.search(r"^ +threads: (\d+)$", block, re.MULTILINE)
            base, per_gb = demand(block, "runtime")
            turns = math.ceil(int(sizes[label.group(1)]) / (cores // int(threads.group(1) if threads else 1)))
            size = slide_gb if "slide=slide_path" in block else 0.05
            grouped[rule] = attempts * turns * (base + per_gb * size)
    assert grouped.keys() > {"extract_features", "tile_slide", "segment_predict_slide"}
    assert not {rule: minutes for rule, minutes in grouped.items() if minutes > limit}


@pytest.mark.slow
def test_a_cohort_of_5000_slides_stays_under_1000_jobs(demands):
    """Slides share jobs as the profile says, here four at most; from which the number for a whole cohort follows."""
    labels, sizes = group_labels(), pairs(profile("slurm")["group-components"])
    total = 0
    for rule, demand in demands.items():
        label = labels.get(rule)
        models = demand.planned // SLIDES if label and "{model}" in label else 1
        if label is None:
            assert demand.submitted == demand.planned < 10, (
                f"{rule} is submitted {demand.planned} times for {SLIDES} slides"
            )
            total += demand.planned
        else:
            assert demand.planned == models * SLIDES
            assert demand.submitted == models * math.ceil(SLIDES / 4), rule
            total += models * math.ceil(COHORT / int(sizes[label]))
    assert demands["extract_features"].planned == 3 * SLIDES
    assert total < 1000


def test_every_group_of_the_rules_has_a_size_in_both_profiles():
    for name in ("slurm", "slurm-multinode"):
        assert {*group_labels().values(), "feature_exports_{model}"} == set(pairs(profile(name)["group-components"]))


def test_the_multinode_profile_is_the_other_but_for_training():
    one, several = profile("slurm"), profile("slurm-multinode")
    assert one.keys() == several.keys()
    different = {key for key in one if one[key] != several[key]}
    assert different == {"slurm-partition-config", "set-resources"}
    assert (
        PROFILES / "slurm-multinode" / several["slurm-partition-config"].rpartition("slurm-multinode/")[2]
    ).is_file()
    train = pairs(entry.removeprefix("train:") for entry in several["set-resources"])
    assert train["nodes"] == train["tasks"] == "2" and train["mpi"] == "srun"
    assert train["gpu"] == train["tasks_per_gpu"] == "0" and train["gres"] == "gpu:4"


@pytest.mark.parametrize("name", ["default", "slurm", "slurm-multinode"])
def test_every_entry_has_a_comment(name):
    lines = (PROFILES / name / "profile.v9+.yaml").read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        if re.match(r"[a-z-]+:", line):
            assert lines[number - 1].startswith("#"), line


def test_the_account_is_slurms_own_variable(monkeypatch):
    monkeypatch.delenv("SBATCH_ACCOUNT", raising=False)
    assert not any("account" in entry for entry in profile("slurm")["default-resources"])
    monkeypatch.setenv("SBATCH_ACCOUNT", "lab42")
    for name in ("slurm", "slurm-multinode"):
        assert "slurm_account=lab42" in profile(name)["default-resources"]


def test_partitions_are_read_by_the_plugin():
    plugin = pytest.importorskip("snakemake_executor_plugin_slurm.partitions")
    partitions = {each.name: each.limits for each in plugin.read_partition_file(PROFILES / "slurm" / "site.yaml")}
    assert partitions["gpu"].max_gpu > 0 == partitions["cpu"].max_gpu


@pytest.mark.slow
def test_groups_that_wait_for_each_other_are_refused(tmp_path):
    """rules/groups.smk looks for what Snakemake looks for itself, in one pass."""
    (tmp_path / "Snakefile").write_text(
        f"""
include: "{REPOSITORY}/rules/groups.smk"

rule all:
    input: "c"

rule a:
    output: "a"
    group: "ends"
    shell: "touch a"

rule b:
    input: "a"
    output: "b"
    shell: "touch b"

rule c:
    input: "b", "a"
    output: "c"
    group: "ends"
    shell: "touch c"
"""
    )
    command = [*COMMAND[: COMMAND.index("--snakefile")], "--cores", "1", "--dry-run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "jobs of the groups ends wait for each other" in done.stdout + done.stderr
    done = subprocess.run([*command, "--groups", "b=ends"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
