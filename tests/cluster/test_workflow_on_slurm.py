"""The whole workflow, submitted to a real SLURM of two nodes; and a single stage of it again."""

import re
import time

import pytest

from cluster_runs import FINAL, NAMES, copy_untrained, make_folder, results, run_on_slurm, start_on_slurm, trained

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]
GROUPS = ["inspect=2", "tiles=2", "features_{model}=2", "maps_{model}=2", "comparisons=2"]


@pytest.fixture(scope="module")
def submitted(cluster, tmp_path_factory):
    """The folder, what was seen of its jobs in squeue, and what Snakemake said."""
    folder = make_folder(tmp_path_factory.mktemp("submitted"))
    snakemake = start_on_slurm(folder, "--group-components", *GROUPS)
    seen = {}
    while snakemake.poll() is None:
        for job, state, *rest in cluster.jobs():
            if state == "RUNNING":
                seen[int(job)] = rest  # node, rule
        time.sleep(0.3)
    said = (folder / "said.log").read_text()
    assert snakemake.returncode == 0, said[-6000:]
    ours = {int(number) for number in re.findall(r"has been submitted with SLURM jobid (\d+)", said)}
    return folder, {job: seen.get(job, ["?", "not seen"]) for job in ours}, said


def test_results_are_those_of_one_machine(submitted, local):
    on_slurm, on_one = results(submitted[0]), results(local)
    assert on_slurm.keys() == on_one.keys()
    assert [name for name in on_one if on_slurm[name] != on_one[name]] == []
    assert (submitted[0] / "results/report.html").stat().st_size > 10_000


def test_jobs_are_seen_in_squeue_on_both_nodes(submitted):
    _, seen, _ = submitted
    assert len(seen) > 10 and ["?", "not seen"] not in seen.values()
    of_slides = ("rule_inspect_", "rule_tiles_", "rule_features_", "rule_maps_", "rule_comparisons_")
    assert {node for node, rule in seen.values() if rule.startswith(of_slides)} == {"n1", "n2"}
    (training,) = (node for node, rule in seen.values() if rule == "rule_train_wildcards_pretrain")
    assert training in ("n1", "n2")


def test_slides_share_jobs_and_none_is_extracted_twice(submitted):
    folder, seen, _ = submitted
    jobs = [rule for _, rule in seen.values()]
    for rule in ("inspect_inspect_slide", "tiles_tile_slide", "features_pretrain_extract_features"):
        assert jobs.count(f"rule_{rule}") == 2
    logs = "".join(path.read_text() for path in folder.glob("logs/extract_features/pretrain/*.log"))
    for name in NAMES:
        assert len(re.findall(rf"^{name}: \d+ tiles in", logs, re.MULTILINE)) == 1


def test_partitions_follow_from_what_jobs_ask_for(submitted):
    said = submitted[2]
    assert "Auto-selected partition 'gpu' for job train" in said
    assert "Auto-selected partition 'gpu' for job features_pretrain_extract_features" in said
    assert "Auto-selected partition 'cpu' for job tiles_tile_slide" in said


def test_a_single_stage_again(submitted):
    folder, _, _ = submitted
    picture = folder / "results/pca/pretrain/b.png"
    before, others = picture.read_bytes(), _times(folder)
    picture.unlink()
    said = run_on_slurm(folder, "results/pca/pretrain/b.png")
    assert picture.read_bytes() == before
    assert said.count("has been submitted with SLURM jobid") == 1
    assert {path: when for path, when in _times(folder).items() if others.get(path) != when}.keys() == {picture}


def test_two_nodes_train_as_one_world(cluster, local, tmp_path):
    """One process on each of two nodes is what two processes on one are, bit for bit."""
    folder = copy_untrained(local, tmp_path / "two nodes", processes=1)
    run_on_slurm(folder, FINAL, profile="slurm-multinode")
    assert trained(folder) == trained(local)
    launches = sorted(path.name for path in (folder / "results/runs/pretrain/logs").iterdir())
    assert len(launches) == 2 and all(re.fullmatch(r"job-\d+\.0_\w+", name) for name in launches)
    assert "2 processes × 4" in (folder / "logs/train/pretrain.log").read_text()


def _times(folder):
    return {path: path.stat().st_mtime_ns for path in (folder / "results").rglob("*") if path.is_file()}
