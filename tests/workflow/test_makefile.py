"""The Makefile's set-up, with a Python that only pretends to install."""

import os
import shutil
import stat
import subprocess

import pytest

from snakemake_runs import REPOSITORY

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")

# Makes an "environment" whose python is this very script, and notes down what pip is asked for.
PYTHON = """#!/bin/bash
case "$1 $2" in
  "-m venv") mkdir -p "$3/bin"; cp --remove-destination "$0" "$3/bin/python"; touch "$3/bin/pip";;
  "-m pip") shift 2; echo "$*" >> pip.log;;
  "-c import sys"*) exit {too_old};;
  "-c import ensurepip"*) exit {no_venv};;
  --version*) echo "Python 3.10.1";;
esac
"""


@pytest.fixture
def clone(tmp_path):
    for name in ("Makefile", "requirements.txt", "requirements-test.txt"):
        shutil.copy(REPOSITORY / name, tmp_path)
    return tmp_path


def pretending_python(folder, too_old=0, no_venv=0):
    path = folder / "python"
    path.write_text(PYTHON.format(too_old=too_old, no_venv=no_venv))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def make(clone, *arguments):
    environment = {"PATH": os.environ["PATH"], "HOME": str(clone)}
    return subprocess.run(["make", *arguments], cwd=clone, env=environment, capture_output=True, text=True, check=False)


def installed(clone):
    log = clone / "pip.log"
    return log.read_text().splitlines() if log.exists() else []


def test_setup_installs_once_and_again_when_the_pins_change(clone):
    python = f"PYTHON={pretending_python(clone)}"
    assert make(clone, "setup", python).returncode == 0
    (call,) = installed(clone)
    assert call.endswith("-r requirements.txt")
    assert "Nothing to be done" in make(clone, "setup", python).stdout
    assert len(installed(clone)) == 1
    newer = (clone / ".venv" / ".setup-done").stat().st_mtime + 10
    os.utime(clone / "requirements.txt", (newer, newer))
    make(clone, "setup", python)
    assert len(installed(clone)) == 2


def test_an_environment_half_made_is_made_again(clone):
    python = f"PYTHON={pretending_python(clone)}"
    (clone / ".venv" / "bin").mkdir(parents=True)
    (clone / ".venv" / "bin" / "python").touch()
    assert make(clone, "setup", python).returncode == 0
    assert (clone / ".venv" / "bin" / "pip").exists()


def test_a_wheelhouse_is_used_without_a_network(clone):
    make(clone, "setup", f"PYTHON={pretending_python(clone)}", "WHEELHOUSE=my wheels")
    (call,) = installed(clone)
    assert "--no-index --find-links my wheels" in call


@pytest.mark.parametrize(
    ("python", "sentence"),
    [
        (None, "is not there; install it: sudo apt-get install python3 python3-venv"),
        ({"too_old": 1}, "is Python 3.10.1, but 3.11 or newer is needed"),
        ({"no_venv": 1}, "cannot make environments; install the module: sudo apt-get install python3-venv"),
    ],
)
def test_what_is_missing_is_said(clone, python, sentence):
    path = clone / "no-python" if python is None else pretending_python(clone, **python)
    done = make(clone, "setup", f"PYTHON={path}")
    assert done.returncode != 0
    assert f"error: {path} {sentence}" in done.stderr
    assert not (clone / ".venv").exists()


def test_help_lists_every_target(clone):
    names = ["setup", "demo", "demo-pilot", "test", "long-test", "kill-test", "cluster-test", "unlock", "clean", "help"]
    assert [line.split()[1] for line in make(clone).stdout.splitlines()] == names
