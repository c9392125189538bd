"""Who made a run: commit and changes, machines with and without their names, command lines without folders."""

import os
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from dinoscope.files import read_json
from dinoscope.train import provenance
from dinoscope.train.distributed import World
from dinoscope.train.provenance import code_version, without_folders, write_provenance
from dinoscope.train.run_folder import follow_umask

WORLD = World(0, 0, 1, torch.device("cpu"))


@pytest.fixture
def alone(monkeypatch):
    """A world of one process, or of as many as the test says, without a process group."""

    def gathers(*others):
        def gather(gathered, mine):
            gathered[:] = [mine, *others]

        monkeypatch.setattr(provenance.dist, "all_gather_object", gather)

    gathers()
    return gathers


def git(folder, *arguments):
    command = ["git", "-c", "user.name=n", "-c", "user.email=e", *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_and_whether_files_were_changed_since(tmp_path, monkeypatch):
    monkeypatch.delenv("DINOSCOPE_COMMIT", raising=False)
    assert code_version(tmp_path)["git_commit"] is None
    assert code_version(tmp_path)["git_dirty"] is None
    monkeypatch.setenv("DINOSCOPE_COMMIT", "0123abc")  # in a container, which was built of it
    assert code_version(tmp_path)["git_commit"] == "0123abc"
    git(tmp_path, "init", "-q")
    (tmp_path / "code.py").write_text("1")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "-qm", "first")
    assert code_version(tmp_path)["git_commit"] == git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "results.txt").write_text("untracked files are results, not code")
    assert code_version(tmp_path)["git_dirty"] is False
    (tmp_path / "code.py").write_text("2")
    assert code_version(tmp_path)["git_dirty"] is True


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone may give files away")
def test_the_commit_of_a_copy_that_belongs_to_somebody_else(tmp_path):
    """A lab shares one, of which git says nothing by itself."""
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-qm", "first", "--allow-empty")
    commit = git(tmp_path, "rev-parse", "HEAD")
    for path in (tmp_path, tmp_path / ".git"):
        os.chown(path, 12345, 12345)
    refused = subprocess.run(["git", "-C", tmp_path, "rev-parse", "HEAD"], capture_output=True, text=True)
    assert "dubious ownership" in refused.stderr
    assert code_version(tmp_path)["git_commit"] == commit


@pytest.mark.parametrize(
    ("argument", "shown"),
    [
        ("--run-dir", "--run-dir"),
        ("results/runs/pretrain", "results/runs/pretrain"),
        ("/home/somebody/weights/file.pth", "file.pth"),
        ("MODEL.WEIGHTS=/home/somebody/file.pth", "MODEL.WEIGHTS=file.pth"),
        ("optim.lr=0.1", "optim.lr=0.1"),
        ('slides="/home/somebody/slides.tsv"', 'slides="slides.tsv"'),
        ('class_map={"a": "b/c"}', 'class_map={"a": "b/c"}'),
        ("/file.pth", "file.pth"),
        ("C:\\Users\\somebody\\file.pth", "file.pth"),
    ],
)
def test_absolute_paths_are_cut_down(argument, shown):
    assert without_folders(argument) == shown


def test_each_start_has_an_entry_and_hosts_have_names_only_where_they_may(alone, tmp_path):
    others = [("node-2", "NVIDIA H200"), ("node-2", "NVIDIA H200")]
    for first, named in ((0, False), (7, True)):
        alone(*others)
        world = World(0, 0, 3, torch.device("cpu"))
        write_provenance(tmp_path, world, first, name_hosts=named)
    hidden, shown = read_json(tmp_path / "provenance.json")["starts"]
    assert (hidden["first_iteration"], shown["first_iteration"]) == (0, 7)
    assert [machine["host"] for machine in shown["machines"]] == [socket.gethostname(), "node-2"]
    assert shown["machines"][1]["devices"] == {"NVIDIA H200": 2}
    assert len({machine["host"] for machine in hidden["machines"]}) == 2
    assert not {socket.gethostname(), "node-2"} & {machine["host"] for machine in hidden["machines"]}


def test_folders_of_logs_follow_the_umask(tmp_path):
    """As torchrun makes them: for the owner alone."""
    before = os.umask(0o027)
    try:
        (tmp_path / "file").write_text("")
        made = Path(tempfile.mkdtemp(dir=tmp_path))
        assert made.stat().st_mode & 0o777 == 0o700
        follow_umask(tmp_path)
        assert made.stat().st_mode & 0o777 == 0o750
        assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)


def test_a_spoilt_file_or_a_folder_that_cannot_be_written_costs_no_run(alone, tmp_path, caplog):
    (tmp_path / "provenance.json").write_text("{")
    write_provenance(tmp_path, WORLD, 0, name_hosts=False)
    assert len(read_json(tmp_path / "provenance.json")["starts"]) == 1
    (tmp_path / "file").write_text("in the way")
    write_provenance(tmp_path / "file" / "run", WORLD, 0, name_hosts=False)
    assert "provenance.json cannot be written" in caplog.text
