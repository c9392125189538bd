"""What SLURM's variables say, what is refused for it, and what jobs ask for."""

import subprocess
import sys

import pytest

from dinoscope.demands import grown
from dinoscope.errors import ConfigError
from dinoscope.train.launching import Meeting, num_processes
from dinoscope.train.slurm import Step, job_end, node_address, srun_command
from snakemake_runs import REPOSITORY

# As SLURM 22.05 sets them for the second of two tasks on two nodes.
TASK = {
    "SLURM_JOB_ID": "77",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_PROCID": "1",
    "SLURM_STEP_NODELIST": "n[1-2]",
}
BATCH = {"SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "2", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}
IN_SNAKEMAKE = {"SLURM_JOB_ID": "77"}  # all that snakemake-executor-plugin-slurm-jobstep leaves


def launch(environment, *arguments, script="import sys; print('trained'); sys.exit(0)", folder=None):
    """Runs launch.py as SLURM would, without a SLURM."""
    (folder / "script.py").write_text(script)
    clean = {"PATH": f"{folder}/bin:/usr/bin:/bin", "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(REPOSITORY / "workflow_scripts" / "launch.py"), *arguments, "--", "script.py"]
    return subprocess.run(command, cwd=folder, env=clean | environment, capture_output=True, text=True, timeout=120)


def test_a_step_is_what_its_variables_say():
    assert Step.of(TASK) == Step("77", 2, "3", 2, 2, 1, "n[1-2]")
    assert Step.of(BATCH) == Step("77", 2)
    assert Step.of(IN_SNAKEMAKE) == Step("77")
    assert Step.of(TASK | {"SLURM_GPUS_ON_NODE": "4"}).gpus == 4
    assert Step.of({"SLURM_STEP_NUM_TASKS": "2"}) == Step()
    # the shell that salloc opens on a node is a step of one task, which is no reason to refuse two nodes
    shell = {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"}
    assert Step.of(TASK | shell) == Step("77", 2)
    Step.of(TASK | shell | {"SLURM_JOB_NUM_NODES": "1"}).require_one_node()
    with pytest.raises(ConfigError, match="job 77 has 2 nodes, but training was asked to run on one"):
        Step.of(TASK | shell).require_one_node()


@pytest.mark.parametrize(
    ("environment", "options", "sentence"),
    [
        (
            TASK,
            [],
            "this is task 1 of the 2 that srun started in job 77, and each of them would train a world of its own",
        ),
        (
            TASK,
            ["--nodes", "3"],
            "asked to run on 3 nodes with one task each, but srun started 2 tasks on 2 nodes in job 77",
        ),
        (
            TASK | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"},
            ["--nodes", "2"],
            "asked to run on 2 nodes with one task each, but srun started 1 task on 1 node in job 77",
        ),
        (
            TASK | {"SLURM_STEP_NUM_NODES": "1"},
            ["--nodes", "2"],
            "asked to run on 2 nodes with one task each, but srun started 2 tasks on 1 node in job 77",
        ),
        (TASK, ["--nodes", "2", "--rendezvous", "a:29500"], "each of them would train a world of its own"),
        (BATCH, [], "job 77 has 2 nodes, but training was asked to run on one, and the others would idle"),
        (BATCH, ["--nodes", "4"], "--nodes is 4, but job 77 has 2 nodes; the two must agree"),
        ({}, ["--nodes", "2"], "--nodes is 2, but this is no SLURM job; start the same command on each machine"),
        ({}, ["--nodes", "0"], "--nodes is 0; give a number from 1"),
        ({}, ["--rendezvous", "a:29500"], "--rendezvous is for several machines; say how many with --nodes"),
        ({}, ["--nodes", "2", "--rendezvous", "a"], "--rendezvous is 'a'; give HOST:PORT of one of the machines"),
        (
            TASK | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_GPUS_ON_NODE": "99"},
            [],
            "SLURM gave job 77 99 GPUs on this node, but torch sees",
        ),
    ],
)
def test_what_does_not_match_is_refused(environment, options, sentence, tmp_path):
    done = launch(environment, *options, folder=tmp_path)
    assert done.returncode == 1
    assert sentence in done.stderr
    assert done.stderr.count("error:") == 1 and "Traceback" not in done.stderr
    assert "trained" not in done.stdout


def test_a_training_script_of_its_own_is_refused_too(tmp_path):
    """srun python pretrain.py with two tasks would be two trainings."""
    code = "from dinoscope.train.distributed import joined_world\nwith joined_world(): print('trained')"
    environment = TASK | {"PYTHONPATH": str(REPOSITORY / "workflow_scripts"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "trained" not in done.stdout
    assert "this is task 1 of the 2" in done.stderr


@pytest.mark.parametrize("environment", [{}, IN_SNAKEMAKE, TASK | {"SLURM_STEP_NUM_TASKS": "1"}])
def test_one_task_is_left_alone(environment, tmp_path):
    done = launch(environment, "--processes", "1", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained") == 1


def test_threads_are_shared_by_the_processes(tmp_path):
    """Snakemake sets the variables of several libraries to all threads of the job; each process must get its share."""
    # One write a process: the parts of a print of two processes may mix in one pipe.
    said = (
        "import os; shares = [os.environ[name + '_NUM_THREADS'] for name in ('OMP', 'MKL', 'OPENBLAS')]\n"
        "os.write(1, (' '.join(shares) + '\\n').encode())"
    )
    given = {"MKL_NUM_THREADS": "6", "OPENBLAS_NUM_THREADS": "6", "OMP_NUM_THREADS": "6"}
    done = launch(given, "--processes", "2", "--threads", "6", script=said, folder=tmp_path)
    assert done.stdout.splitlines() == ["3 3 3", "3 3 3"], done.stderr


def test_several_nodes_are_started_by_srun(tmp_path):
    """Snakemake's jobs are told nothing but the number of theirs; srun then starts a task on each node."""
    (tmp_path / "bin").mkdir()
    srun = tmp_path / "bin" / "srun"
    srun.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    done = launch(IN_SNAKEMAKE, "--nodes", "2", "--cpus-per-node", "8", folder=tmp_path)
    shape = ["--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=8", "--kill-on-bad-exit=1"]
    words = done.stdout.splitlines()
    assert words[:5] == shape and words[5] == sys.executable
    assert words[6:] == [
        *(str(REPOSITORY / "workflow_scripts" / "launch.py"), "--nodes", "2", "--cpus-per-node", "8"),
        *("--", "script.py"),
    ]
    assert "--cpu-bind=none" in srun_command(2, None, ["x"])


def with_programs(folder, monkeypatch, **programs):
    """Programs of these names that print these texts."""
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/bash\ncat <<'E'\n{text}\nE\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_tasks_meet_at_the_first_node_of_their_step(tmp_path, monkeypatch):
    shown = 'case "$*" in *hostnames*) printf "n1\\nn2\\n";; *" n1") echo "NodeName=n1 NodeAddr=10.0.0.1 Port=1";; esac'
    (tmp_path / "scontrol").write_text(f"#!/bin/bash\n{shown}\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("SLURMD_NODENAME", raising=False)
    meetings = [Meeting.of_step(Step.of(TASK | {"SLURM_PROCID": number}), 5) for number in "01"]
    assert [meeting.is_host for meeting in meetings] == [True, False]
    assert {meeting.endpoint for meeting in meetings} == {"10.0.0.1:30273"}
    options = meetings[1].options("now")
    assert options[options.index("--rdzv-conf") + 1] == "join_timeout=300,is_host=0"
    assert options[options.index("--nnodes") + 1] == "2"
    assert node_address("n2") == "n2"


def test_the_end_of_the_job_is_asked_for(tmp_path, monkeypatch):
    with_programs(tmp_path, monkeypatch, squeue="2026-11-28T23:00:30")
    monkeypatch.setenv("TZ", "UTC")
    assert job_end({"SLURM_JOB_ID": "7"}) == "1795906830"
    assert job_end({"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "5"}) == "5"
    assert job_end({}) is None
    with_programs(tmp_path, monkeypatch, squeue="N/A")
    assert job_end({"SLURM_JOB_ID": "7"}) is None
    (tmp_path / "squeue").unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert job_end({"SLURM_JOB_ID": "7"}) is None


def test_a_number_of_processes_needs_no_gpus_of_slurm():
    assert num_processes("1", Step("77", gpus=99)) == 1
    with pytest.raises(ConfigError, match="SLURM gave job 77 99 GPUs"):
        num_processes("auto", Step("77", gpus=99))


def test_demands_grow_with_files_and_attempts(tmp_path):
    file = tmp_path / "slide.mrxs"
    with open(file, "wb") as sparse:
        sparse.truncate(1_500_000_000)
    assert grown(10, 20, [str(file)], 1) == 40
    assert grown(10, 20, [[str(file), str(file)], str(tmp_path / "yet to be made")], 2) == 140
    assert grown(10, 0, [str(file)], 3) == 30


def test_what_is_yet_to_be_brought_counts_as_a_usual_slide(tmp_path):
    """Of Snakemake's own names of files on object storage the test of storage has one."""

    class Remote(str):
        is_storage = True

    remote = Remote(tmp_path / "slide.svs")
    assert grown(10, 20, [remote], 2) == 60
    (tmp_path / "slide.svs").write_bytes(bytes(1000))
    assert grown(10, 20, [remote], 2) == 20
